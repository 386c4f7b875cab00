"""A decoder of the Llama family, in one file: configured, not subclassed, for Llama, Mistral, Gemma, Qwen and others.

Each layer is attention and a gated feed-forward network, each after a root-mean-square norm and added to what came in.
What differs between the models is in :class:`DecoderConfig`; what differs between layers, in :class:`DecoderLayer`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxmask import checks
from jaxmask.dispatch import Implementation, attention
from jaxmask.flax.cache import Cache, LayerCache, Step, check_valid, consecutive
from jaxmask.flax.models.layers import Linear, embed, project
from jaxmask.mask import Full, Mask
from jaxmask.masks import Causal, Chunked, Padding, Segments, SlidingWindow

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches rotary embeddings to longer texts: low frequencies by ``factor``, high ones not.

    Source: ``_compute_llama3_parameters`` in Transformers.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __call__(self, frequencies: Any) -> Any:
        turns = self.original_length * frequencies / (2 * math.pi)
        smooth = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        smooth = np.clip(smooth, 0, 1)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings, of the two halves of a head (https://arxiv.org/abs/2104.09864).

    Args:
        theta: the base of the wave lengths.
        factor: by which positions are divided.
        scaling: that of Llama 3, or ``None``.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    scaling: Llama3Scaling | None = None

    def angles(self, positions: Int[Array, "batch q"], dim: int) -> tuple[Array, Array]:
        """Cosine and sine for heads of ``dim``, ``[batch, q, 1, dim // 2]``, float32."""
        # In float32 as PyTorch does, for at a position of thousands the last bit of a frequency shows.
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = (np.float32(1) / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        frequencies = frequencies / np.float32(self.factor)
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32)
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch q heads dim"], cos: Array, sin: Array) -> Float[Array, "batch q heads dim"]:
    """Turn each pair of elements, one of either half of the head, by its angle."""
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), -1).astype(x.dtype)


@dataclass(frozen=True)
class DecoderLayer:
    """What differs from layer to layer.

    Args:
        window: how many keys a query looks back on, itself included; ``None`` for all.
        chunk: the size of the chunks, beyond which a query does not look; ``None`` for no chunks.
        rope: how positions are told; ``None`` where they are not.
        temperature: ``(floor, scale)``: a query at position ``p`` is multiplied by
            ``1 + scale * log(1 + floor((p + 1) / floor))``, as where Llama 4 tells no positions; ``None`` for 1.
            Transformers counts padding on the left as positions, too, so that a text is not as it is alone.
    """

    window: int | None = None
    chunk: int | None = None
    rope: Rope | None = Rope()
    temperature: tuple[float, float] | None = None

    def mask(self, positions: Int[Array | np.ndarray, "batch q"] | None = None) -> Mask:
        """Which keys a query attends to; of the tokens at ``positions``, or of all positions from 0 on."""
        mask: Mask = Causal()
        if self.window is not None:
            mask = mask & SlidingWindow(self.window)
        if self.chunk is not None:
            # By their positions, for padding may come before a text, and another document.
            mask = mask & (Chunked(self.chunk) if positions is None else Segments(positions.clip(0) // self.chunk))
        return mask

    @property
    def looks_back(self) -> int | None:
        """The most keys that a query attends to, ``None`` without end."""
        return min((size for size in (self.window, self.chunk) if size is not None), default=None)


@dataclass(frozen=True)
class DecoderConfig:
    """What differs from model to model.

    Args:
        vocab_size, dim, hidden_dim: the number of tokens, and the sizes of the residual stream and of the feed-forward.
        heads, kv_heads, head_dim: of attention.
        layers: one for each layer.
        epsilon: what root-mean-square norms add to the square.
        activation: of the gate, ``"silu"`` or ``"gelu_tanh"``.
        tied: whether the embeddings of tokens also give the logits.
        qkv_bias, out_bias, hidden_bias: whether there is a bias in the projections to queries, keys and values, from
            heads, and in the feed-forward.
        qk_norm: how each head of queries and keys is normed: ``"weighted"`` before positions are told (Qwen 3,
            Gemma 3), ``"plain"`` after that and in layers where they are (Llama 4), or ``None``.
        post_norm: whether the outputs of attention and feed-forward are normed too (Gemma).
        embedding_scale: by which embeddings are multiplied.
        attention_scale: of the scores; ``None`` for ``head_dim ** -0.5``.
        attention_cap, logits_cap: soft caps of the scores and of the logits (Gemma 2); ``None`` for none.

    Raises:
        ValueError, TypeError: a size is no positive Python int; these do not fit each other, or are not known.
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[DecoderLayer, ...]
    epsilon: float = 1e-6
    activation: Literal["silu", "gelu_tanh"] = "silu"
    tied: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    hidden_bias: bool = False
    qk_norm: Literal["weighted", "plain"] | None = None
    post_norm: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "hidden_dim", "heads", "kv_heads", "head_dim"):
            checks.integer(name, getattr(self, name), minimum=1)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if not self.layers:
            raise ValueError("layers must hold a DecoderLayer for each layer, got none")
        if self.head_dim % 2 and any(layer.rope is not None for layer in self.layers):
            raise ValueError(f"head_dim must be even, for rotary embeddings turn pairs, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.qk_norm not in (None, "weighted", "plain"):
            raise ValueError(f"qk_norm must be 'weighted', 'plain' or None, got {self.qk_norm!r}")


class Norm(nnx.RMSNorm):
    """That of nnx, in float32 and back: a scale that is 1 and a little, as Gemma's, is not rounded to bfloat16."""

    def __call__(self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        return super().__call__(x, mask).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings, over the text at hand or over a cache."""

    def __init__(self, config: DecoderConfig, layer: DecoderLayer, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config, self.layer = config, layer
        # One product where there could be three: on a CPU, a step of decoding waits for the start of each.
        self.sizes = tuple(config.head_dim * heads for heads in (config.heads, config.kv_heads, config.kv_heads))
        linear = partial(Linear, param_dtype=param_dtype, rngs=rngs)
        self.query_key_value = linear(config.dim, sum(self.sizes), use_bias=config.qkv_bias)
        self.out = linear(self.sizes[0], config.dim, use_bias=config.out_bias)
        # What they norm, if anything, qk_norm says; without a scale they hold no weights.
        norm = partial(_norm, config, config.head_dim, param_dtype, rngs, has_scale=config.qk_norm == "weighted")
        self.query_norm, self.key_norm = norm(), norm()

    def __call__(
        self,
        x: Float[Array, "batch q dim"],
        positions: Int[Array, "batch q"],
        mask: Mask,
        cache: LayerCache | None,
        step: Step | None,
        implementation: Implementation | None,
    ) -> tuple[Float[Array, "batch q dim"], LayerCache | None]:
        config, layer = self.config, self.layer
        query, key, value = (
            part.reshape(*x.shape[:2], -1, config.head_dim)
            for part in jnp.split(self.query_key_value(x), np.cumsum(self.sizes[:2]), -1)
        )
        if config.qk_norm == "weighted":
            query, key = self.query_norm(query), self.key_norm(key)
        if layer.rope is not None:
            cos, sin = layer.rope.angles(positions, config.head_dim)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            if config.qk_norm == "plain":
                query, key = self.query_norm(query), self.key_norm(key)
        if layer.temperature is not None:
            floor, scale = layer.temperature
            # Padding before the text is told no positions, or it would be NaN.
            times = 1 + scale * jnp.log1p(jnp.floor((jnp.maximum(positions, 0) + 1) / floor))
            query = query * times[..., None, None].astype(query.dtype)
        how: Any = {
            "scale": config.attention_scale,
            "logits_soft_cap": config.attention_cap,
            "implementation": implementation,
        }
        if cache is None or step is None:
            out = attention(query, key, value, mask & layer.mask(positions), **how)
        else:
            out, cache = cache.attend(step, query, key, value, layer.mask(), **how)
        return self.out(out.reshape(*x.shape[:2], -1)), cache


class FeedForward(nnx.Module):
    """Two projections, the first the gate of the second, and a third one back (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: DecoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, use_bias=config.hidden_bias, param_dtype=param_dtype, rngs=rngs)
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up = linear(config.dim, 2 * config.hidden_dim)
        self.down = linear(config.hidden_dim, config.dim)

    def __call__(self, x: Float[Array, "batch q dim"]) -> Float[Array, "batch q dim"]:
        gate, up = jnp.split(self.gate_up(x), 2, -1)
        return self.down(self.activation(gate) * up)


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: DecoderConfig, layer: DecoderLayer, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, config.dim, param_dtype, rngs)
        self.attention = Attention(config, layer, param_dtype, rngs)
        self.attention_post_norm = _norm(config, config.dim, param_dtype, rngs) if config.post_norm else None
        self.feed_forward_norm = _norm(config, config.dim, param_dtype, rngs)
        self.feed_forward = FeedForward(config, param_dtype, rngs)
        self.feed_forward_post_norm = _norm(config, config.dim, param_dtype, rngs) if config.post_norm else None

    def __call__(self, x: Array, *where: Any) -> tuple[Array, LayerCache | None]:
        out, cache = self.attention(self.attention_norm(x), *where)
        x = x + (out if self.attention_post_norm is None else self.attention_post_norm(out))
        out = self.feed_forward(self.feed_forward_norm(x))
        return x + (out if self.feed_forward_post_norm is None else self.feed_forward_post_norm(out)), cache


class Decoder(nnx.Module):
    """A decoder: tokens to logits.

    Args:
        config: its sizes, and what its layers are.
        param_dtype: of the weights, and so of what is computed; norms, their scales too, and softmax are in float32.
        rngs: for random weights.

    >>> layers = DecoderLayer(), DecoderLayer(window=4)
    >>> config = DecoderConfig(16, 8, 16, heads=2, kv_heads=1, head_dim=4, layers=layers)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.array([[3, 1, 4, 1, 5]])
    >>> logits, cache = model(tokens[:, :4], cache=model.empty_cache(1, 8))
    >>> logits, cache = model(tokens[:, 4:], cache=cache)
    >>> bool(jnp.allclose(logits, model(tokens)[0][:, 4:], atol=1e-5))
    True
    """

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = nnx.Embed(config.vocab_size, config.dim, param_dtype=param_dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, layer, param_dtype, rngs) for layer in config.layers])
        self.norm = _norm(config, config.dim, param_dtype, rngs)
        head = partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.head = None if config.tied else head(config.dim, config.vocab_size)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for ``batch`` texts of at most ``length`` tokens; see :meth:`Cache.empty` for what it raises."""
        config = self.config
        windows = [layer.looks_back for layer in config.layers]
        dtype = self.embedding.embedding.dtype
        return Cache.empty(batch, length, layers=windows, kv_heads=config.kv_heads, dim=config.head_dim, dtype=dtype)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch q"],
        valid: Bool[Array | np.ndarray, "batch q"] | None = None,
        *,
        cache: Cache | None = None,
        mask: Mask | None = None,
        positions: Int[Array | np.ndarray, "batch q"] | None = None,
        last_only: bool = False,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "batch q vocab"], Cache | None]:
        """The logits of the token after each, and the cache with these tokens.

        Args:
            tokens: the text, or what comes after that in the cache. What is no token of the model makes NaN.
            valid: which of them are no padding; ``None`` for all. Padding may be on either side.
            cache: the text so far, of :meth:`empty_cache` or of the last call; ``None`` where this is all of the text.
            mask: joined to that of each layer, as ``Segments(ids)`` for packed documents. Its keys are in the order of
                ``tokens``, so that it needs that there is no cache.
            positions: of the tokens, for rotary embeddings and chunks, ``[batch, q]``; ``None`` to count those of each
                row that are no padding, of which there is then none between two tokens: an error, or NaN where that
                is not known when the program is traced.
            last_only: whether to return the logits after the last token of each row only, ``[batch, 1, vocab]``; NaN
                for a row of padding.
            implementation: of :func:`jaxmask.attention`.

        Raises:
            ValueError, TypeError: what does not fit; and of the cache as :meth:`Cache.step`.
        """
        checks.array("tokens", tokens, "i", 2)
        if valid is not None:
            check_valid(valid, tokens.shape)
        if cache is not None and len(cache.tokens) != len(tokens):
            raise ValueError(f"tokens must have a row for each of the cache's {len(cache.tokens)}, got {len(tokens)}")
        if cache is not None and (mask is not None or positions is not None):
            raise ValueError(
                "mask and positions are for a text without a cache, which knows the positions of its tokens; leave "
                "them out, or cache"
            )
        step = None if cache is None else cache.step(tokens.shape[1], valid)
        fits: Any = None
        if step is not None:
            positions = step.positions
        elif positions is None:
            positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
            if valid is not None:
                _, padding, fits = consecutive(valid)
                positions = positions - padding[:, None]
        elif checks.array("positions", positions, "i", 2).shape != tokens.shape:
            raise ValueError(
                f"positions must be as tokens, {list(tokens.shape)}, got {checks.describe(positions)}; leave them out "
                "to count the tokens"
            )
        mask = Full() if mask is None else mask
        if valid is not None:
            mask = mask & Padding(valid)
        x = embed("tokens", tokens, self.embedding, valid) * self.config.embedding_scale
        layers: list[Any] = [None] * len(self.blocks) if cache is None else list(cache.layers)
        for i, block in enumerate(self.blocks):
            x, layers[i] = block(x, positions, mask, layers[i], step, implementation)
        if last_only and valid is not None:
            last = tokens.shape[1] - 1 - jnp.argmax(jnp.asarray(valid)[:, ::-1], 1)
            is_there = jnp.asarray(valid).any(1)[:, None, None]
            x = jnp.where(is_there, jnp.take_along_axis(x, last[:, None, None], 1), jnp.nan)
        x = self.norm(x[:, -1:] if last_only else x)
        if fits is not None:
            x = jnp.where(fits[:, None, None], x, jnp.nan)
        logits = project(x, self.embedding.embedding[...]) if self.head is None else self.head(x)
        if (cap := self.config.logits_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits, None if step is None else step.end(layers)


def _norm(config: DecoderConfig, size: int, param_dtype: DTypeLike, rngs: nnx.Rngs, *, has_scale: bool = True) -> Norm:
    wide = jnp.promote_types(param_dtype, jnp.float32)
    return Norm(size, epsilon=config.epsilon, param_dtype=wide, use_scale=has_scale, rngs=rngs)
