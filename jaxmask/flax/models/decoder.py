"""A decoder of the Llama family, in one file: a configuration makes it Llama, Mistral, Gemma, Qwen or another.

Each layer is attention and a gated feed-forward network. Both have a root-mean-square norm before them and add to the
residual stream. :class:`DecoderConfig` says how models differ, :class:`DecoderLayer` how layers differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Integer

from jaxmask import checks
from jaxmask.dispatch import Implementation, attention
from jaxmask.flax.cache import Cache, LayerCache, Step, Valid, as_valid, consecutive
from jaxmask.flax.models import axes
from jaxmask.flax.models.blockwise import Blockwise
from jaxmask.flax.models.layers import Linear, check_cache, convert_sizes, embed, last_token, project, table
from jaxmask.mask import And, Empty, Full, Mask, Or
from jaxmask.masks import Causal, Chunked, Padding, Segments, Window

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches rotary embeddings to longer texts: it divides low frequencies by ``factor``.

    Source: ``_compute_llama3_parameters`` in Transformers.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __post_init__(self) -> None:
        convert_sizes(self, "original_length")
        for name in ("factor", "low_frequency_factor"):
            checks.real(name, getattr(self, name), checks.POSITIVE)
        high = checks.real("high_frequency_factor", self.high_frequency_factor, checks.POSITIVE)
        if high <= self.low_frequency_factor:
            raise ValueError(f"high_frequency_factor must be above low_frequency_factor, got {high}")

    def __call__(self, frequencies: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
        turns = self.original_length * frequencies / (2 * math.pi)
        smooth = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        smooth = np.clip(smooth, 0, 1)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (https://arxiv.org/abs/2104.09864) that pair the two halves of a head.

    Args:
        theta: the base of the wavelengths.
        factor: the number that positions are divided by.
        scaling: Llama 3's scaling, or ``None``.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        for name in ("theta", "factor"):
            checks.real(name, getattr(self, name), checks.POSITIVE)
        if not isinstance(self.scaling, Llama3Scaling | None):
            raise TypeError(f"scaling must be a Llama3Scaling or None, got {checks.describe(self.scaling)}")

    def angles(self, positions: Integer[Array | np.ndarray, "batch q"], dim: int) -> tuple[Array, Array]:
        """Cosine and sine for heads of size ``dim``, float32 ``[batch, q, 1, dim // 2]``."""
        # In float32 like PyTorch: at positions in the thousands, the last bit of a frequency matters.
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = (np.float32(1) / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        frequencies = frequencies / np.float32(self.factor)
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles = jnp.asarray(positions, jnp.float32)[..., None, None] * frequencies[None, None, None]
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch q heads dim"], cos: Array, sin: Array) -> Float[Array, "batch q heads dim"]:
    """Turn each pair of elements, one from each half of the head, by its angle."""
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), -1).astype(x.dtype)


@dataclass(frozen=True)
class DecoderLayer:
    """What differs from layer to layer.

    Args:
        window: how many keys a query looks back on, itself included; ``None`` for all.
        chunk: the size of the chunks that a query does not look beyond; ``None`` for no chunks.
        rope: the rotary embeddings; ``None`` for a layer without positions.
        temperature: ``(floor, scale)`` multiplies the query at position ``p`` by
            ``1 + scale * log(1 + floor((p + 1) / floor))``, as in Llama 4's layers without positions. ``None`` for 1.
            Transformers counts padding on the left as positions here, so its output for a text depends on the padding.

    Raises:
        TypeError, ValueError: a window or a chunk is not an integer of at least 1; ``rope`` is no :class:`Rope`;
            ``temperature`` is no pair of a positive and a finite number.
    """

    window: int | None = None
    chunk: int | None = None
    rope: Rope | None = Rope()
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        convert_sizes(self, *(name for name in ("window", "chunk") if getattr(self, name) is not None))
        if not isinstance(self.rope, Rope | None):
            raise TypeError(f"rope must be a Rope or None, got {checks.describe(self.rope)}")
        if self.temperature is not None:
            if not isinstance(self.temperature, tuple) or len(self.temperature) != 2:
                raise TypeError(f"temperature must be (floor, scale), got {checks.describe(self.temperature)}")
            for name, value, least in zip(
                ("floor", "scale"), self.temperature, (checks.POSITIVE, -math.inf), strict=True
            ):
                checks.real(f"{name} of temperature", value, least)

    def mask(
        self,
        positions: Integer[Array | np.ndarray, "#batch q"] | None = None,
        blocks: Mask | None = None,
        *,
        blocks_exceed_window: bool = False,
    ) -> Mask:
        """The keys that a query attends to, for tokens at ``positions``, or at all positions from 0 on.

        Args:
            positions: of the tokens; ``None`` for the positions at which the mask is read.
            blocks: the pairs that attend to each other both ways, as of an image.
            blocks_exceed_window: as in :class:`DecoderConfig`.
        """
        blocks = Empty() if blocks is None else blocks
        near: Mask = Full() if self.window is None else Window(self.window - 1, None)
        if self.chunk is not None:
            # Chunks count from the start of each document, which may follow padding or another document.
            near = near & (Chunked(self.chunk) if positions is None else Segments(positions.clip(0) // self.chunk))
        return Causal() & near | blocks if blocks_exceed_window else (Causal() | blocks) & near

    @property
    def looks_back(self) -> int | None:
        """The most keys that a query attends to; ``None`` for no limit."""
        return min((size for size in (self.window, self.chunk) if size is not None), default=None)


@dataclass(frozen=True)
class DecoderConfig:
    """What differs from model to model.

    Args:
        vocab_size, dim, hidden_dim: the number of tokens, and the widths of the residual stream and the feed-forward.
        heads, kv_heads, head_dim: the number of heads of queries, the number of heads of keys, and their size.
        layers: one for each layer.
        epsilon: added to the mean square by root-mean-square norms.
        activation: the gate's, ``"silu"`` or ``"gelu_tanh"``.
        tied: whether the logits use the weights of the token embeddings.
        qkv_bias, out_bias, hidden_bias: whether the projections to queries, keys and values, the projection from heads,
            and the feed-forward have a bias.
        qk_norm: how heads of queries and keys are normed. ``"weighted"`` norms before rotary embeddings (Qwen 3,
            Gemma 3). ``"plain"`` norms after them, without weights, in layers that have them (Llama 4). ``None`` for
            no norm.
        post_norm: whether the outputs of attention and feed-forward are normed too (Gemma).
        embedding_scale: multiplies the embeddings.
        attention_scale: multiplies the scores; ``None`` for ``head_dim ** -0.5``.
        attention_cap, logits_cap: soft caps of the scores and of the logits (Gemma 2); ``None`` for no cap.
        blocks_exceed_window: whether a token in a block, as of an image, attends to all of the block in a layer with a
            window, too (PaliGemma 2), or only to what is in the window (Gemma 3). The caches of all layers then keep
            all keys.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1, sizes do not fit each other, or a name is unknown.
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
    blocks_exceed_window: bool = False

    def __post_init__(self) -> None:
        convert_sizes(self, "vocab_size", "dim", "hidden_dim", "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if not isinstance(self.layers, tuple) or not all(isinstance(layer, DecoderLayer) for layer in self.layers):
            raise TypeError(
                f"layers must be a tuple with a DecoderLayer for each layer, got {checks.describe(self.layers)}"
            )
        if not self.layers:
            raise ValueError("layers must hold a DecoderLayer for each layer, got none")
        checks.real("epsilon", self.epsilon, 0)
        checks.real("embedding_scale", self.embedding_scale)
        for name, least in (
            ("attention_scale", -math.inf),
            ("attention_cap", checks.POSITIVE),
            ("logits_cap", checks.POSITIVE),
        ):
            if getattr(self, name) is not None:
                checks.real(name, getattr(self, name), least)
        if self.head_dim % 2 and any(layer.rope is not None for layer in self.layers):
            raise ValueError(f"head_dim must be even, for rotary embeddings turn pairs, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.qk_norm not in (None, "weighted", "plain"):
            raise ValueError(f"qk_norm must be 'weighted', 'plain' or None, got {self.qk_norm!r}")


class Context(NamedTuple):
    """What all layers share in one call: where tokens and blocks are, what the caller masks, how to attend."""

    positions: Integer[Array | np.ndarray, "#batch q"]
    mask: Mask
    blocks: Mask | None
    step: Step | None
    implementation: Implementation | None


class Norm(nnx.RMSNorm):
    """nnx's norm, computed in at least float32: bfloat16 would round a scale close to 1, such as Gemma's."""

    def __init__(
        self, size: int, config: DecoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs, *, use_scale: bool = True
    ) -> None:
        wide = checks.at_least_float32(param_dtype)
        names = axes.named(norm=size)
        super().__init__(
            size, epsilon=config.epsilon, param_dtype=wide, use_scale=use_scale, scale_metadata=names, rngs=rngs
        )
        axes.settled(self)

    def __call__(self, x: Float[Array, "..."], mask: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        return super().__call__(x, mask).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embeddings, over the tokens of the call or over a cache.

    The weight of queries, keys and values is ``[kv_heads, group + 2, head_dim, dim]``: a head of keys, with the
    ``group`` heads of queries that attend to it before it and its values after it.
    """

    def __init__(self, config: DecoderConfig, layer: DecoderLayer, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config, self.layer = config, layer
        linear = partial(Linear, param_dtype=param_dtype, rngs=rngs)
        # One product in place of three: on a CPU, the start of each costs time in a decoding step. A shard of its heads
        # has whole heads of each.
        group = {"query_key_value": config.heads // config.kv_heads + 2, "head_dim": config.head_dim}
        self.query_key_value = linear(
            {"dim": config.dim}, {"kv_heads": config.kv_heads, **group}, use_bias=config.qkv_bias
        )
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        self.out = linear(heads, {"dim": config.dim}, use_bias=config.out_bias)
        # Without a scale they have no weights, so that a model that does not use them may have them.
        norm = partial(Norm, config.head_dim, config, param_dtype, rngs, use_scale=config.qk_norm == "weighted")
        self.query_norm, self.key_norm = norm(), norm()

    def __call__(
        self, x: Float[Array, "batch q dim"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "batch q dim"], LayerCache | None]:
        config, layer, (positions, mask, blocks, step, implementation) = self.config, self.layer, context
        joined = self.query_key_value(x)
        # From [batch, q, kv_heads, group, dim] to [batch, q, heads, dim].
        query = joined[..., :-2, :].reshape(*x.shape[:2], config.heads, config.head_dim)
        key, value = joined[..., -2, :], joined[..., -1, :]
        if config.qk_norm == "weighted":
            query, key = self.query_norm(query), self.key_norm(key)
        if layer.rope is not None:
            cos, sin = layer.rope.angles(positions, config.head_dim)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            if config.qk_norm == "plain":
                query, key = self.query_norm(query), self.key_norm(key)
        if layer.temperature is not None:
            floor, slope = layer.temperature
            # Padding before a text has negative positions, whose logarithm would be NaN.
            times = 1 + slope * jnp.log1p(jnp.floor((jnp.maximum(positions, 0) + 1) / floor))
            query = query * times[..., None, None].astype(query.dtype)
        how: Any = {"scale": config.attention_scale, "logits_soft_cap": config.attention_cap}
        how |= {
            "sharding": axes.told("length" if cache is None else axes.slots_of(cache)),
            "implementation": implementation,
        }
        own = layer.mask(positions if step is None else None, blocks, blocks_exceed_window=config.blocks_exceed_window)
        if cache is None or step is None:
            out = attention(query, key, value, mask & own, **how)
        else:
            out, cache = axes.heads_beside(cache, key).attend(step, query, key, value, own, **how)
        return self.out(out), cache


class FeedForward(nnx.Module):
    """A gated feed-forward network (https://arxiv.org/abs/2002.05202). Its first weight is ``[2, hidden, dim]``."""

    def __init__(self, config: DecoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, use_bias=config.hidden_bias, param_dtype=param_dtype, rngs=rngs)
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up = linear({"dim": config.dim}, {"gate_up": 2, "hidden": config.hidden_dim})
        self.down = linear({"hidden": config.hidden_dim}, {"dim": config.dim})

    def __call__(self, x: Float[Array, "batch q dim"]) -> Float[Array, "batch q dim"]:
        joined = self.gate_up(x)
        return self.down(self.activation(joined[..., 0, :]) * joined[..., 1, :])


class Block(nnx.Module):
    """One layer: attention and feed-forward."""

    def __init__(self, config: DecoderConfig, layer: DecoderLayer, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        norm = partial(Norm, config.dim, config, param_dtype, rngs)
        self.attention_norm = norm()
        self.attention = Attention(config, layer, param_dtype, rngs)
        self.attention_post_norm = norm() if config.post_norm else None
        self.feed_forward_norm = norm()
        self.feed_forward = FeedForward(config, param_dtype, rngs)
        self.feed_forward_post_norm = norm() if config.post_norm else None

    def __call__(
        self, x: Float[Array, "batch q dim"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "batch q dim"], LayerCache | None]:
        out, cache = self.attention(self.attention_norm(x), context, cache)
        x = x + (out if self.attention_post_norm is None else self.attention_post_norm(out))
        out = self.feed_forward(self.feed_forward_norm(x))
        return x + (out if self.feed_forward_post_norm is None else self.feed_forward_post_norm(out)), cache


class Decoder(nnx.Module):
    """A decoder of the Llama family, from tokens to logits. Under :func:`axis_rules` it is sharded over a mesh.

    Args:
        config: its sizes and its layers.
        param_dtype: of the weights, and of the computation. Norms, their scales, and softmax are in float32.
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
        self.embedding = table({"vocab": config.vocab_size, "dim": config.dim}, param_dtype, rngs)
        self.blocks = nnx.List([Block(config, layer, param_dtype, rngs) for layer in config.layers])
        self.norm = Norm(config.dim, config, param_dtype, rngs)
        head = partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.head = None if config.tied else head({"dim": config.dim}, {"vocab": config.vocab_size})

    def empty_cache(self, batch: SupportsIndex, length: SupportsIndex) -> Cache:
        """A cache for ``batch`` texts of at most ``length`` tokens, where the rules of axes put it.

        It raises as :meth:`Cache.empty` does.
        """
        config, dtype = self.config, self.embedding.embedding.dtype
        heads = {"kv_heads": config.kv_heads}
        return axes.empty_cache(batch, length, self._windows, heads, config.head_dim, dtype)

    @property
    def _windows(self) -> list[int | None]:
        """How many keys each layer looks back on; ``None`` for all."""
        config = self.config
        return [None if config.blocks_exceed_window else layer.looks_back for layer in config.layers]

    def embed(
        self,
        tokens: Integer[Array | np.ndarray, "batch q"],
        valid: Valid | None = None,
    ) -> Float[Array, "batch q dim"]:
        """The embedding of each token, scaled as the layers take it. An id outside the vocabulary makes NaN.

        Args:
            tokens: ``[batch, q]``.
            valid: bool or 0/1, false for padding, whose id may be any; ``None`` if there is no padding.
        """
        valid = None if valid is None else as_valid(valid, checks.array("tokens", tokens, "i", 2).shape)
        return self._embed(tokens, valid)

    def _embed(self, tokens: Any, valid: Any, *, has_cache: bool = False) -> Float[Array, "batch q dim"]:
        return embed("tokens", tokens, self.embedding, valid, has_cache=has_cache) * self.config.embedding_scale

    def __call__(
        self,
        tokens: Integer[Array | np.ndarray, "batch q"],
        valid: Valid | None = None,
        *,
        cache: Cache | None = None,
        mask: Mask | None = None,
        block_sequence_ids: Integer[Array | np.ndarray, "batch q"] | None = None,
        embeddings: Float[Array | np.ndarray, "batch q dim"] | None = None,
        positions: Integer[Array | np.ndarray, "batch q"] | None = None,
        last_only: bool = False,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "batch #q vocab"], Cache | None]:
        """The logits for the token after each, and the cache with these tokens.

        Args:
            tokens: the text, or its continuation if there is a cache. An id outside the vocabulary makes NaN.
            valid: bool or 0/1, true for tokens, false for padding on either side; ``None`` if there is no padding.
            cache: the text so far, from :meth:`empty_cache` or the last call; ``None`` if ``tokens`` is the whole text.
            mask: restricts each layer's mask, which stays causal, as ``Segments(ids)`` does for packed documents. Where
                tokens attend to later ones, say ``block_sequence_ids``. It needs a call without a cache, because its
                keys are in the order of ``tokens``.
            block_sequence_ids: the block of each token, negative for a token of none, which is causal. A token attends
                to all tokens of its block, those that follow it included: an image of Gemma 3, the prefix of PaliGemma.
                All tokens of a block are in one call. The name is that of Transformers' ``create_causal_mask``.
            embeddings: what the layers take in place of the embeddings of ``tokens``, of which the shape alone is then
                read: ``jnp.where(is_image[..., None], image, model.embed(tokens))``.
            positions: of the tokens, for rotary embeddings and chunks, ``[batch, q]``; ``None`` to count each row's
                tokens from 0. Padding between tokens is then an error, or makes NaN where ``valid`` is traced.
            last_only: whether to return the logits after the last token of each row only, ``[batch, 1, vocab]``. A row
                of padding gives NaN.
            implementation: as in :func:`jaxmask.attention`.

        Raises:
            ValueError: shapes do not fit each other, the cache has no room, or ``mask`` or ``positions`` meet a cache;
                ``mask`` is of tokens that attend to later ones, as ``Causal() | Prefix(3)`` or ``Window(2, 2)``.
            TypeError: an argument has the wrong type or dtype.
        """
        if not checks.array("tokens", tokens, "i", 2).shape[1]:
            raise ValueError(f"tokens must have at least one token in a row, got {checks.describe(tokens)}")
        if valid is not None:
            valid = as_valid(valid, tokens.shape)
            if checks.is_traced(valid):
                valid = axes.placed(valid, "batch", None if cache is not None else "length")
        if cache is not None:
            heads = self.config.kv_heads, self.config.head_dim
            check_cache(cache, tokens, self._windows, heads, self.embedding.embedding.dtype)
        if cache is not None and (mask is not None or positions is not None):
            raise ValueError(
                "mask and positions need a call without a cache, for a cache knows the positions of its tokens; leave "
                "them out, or leave the cache out"
            )
        if block_sequence_ids is not None:
            checks.fits_int32("block_sequence_ids", _for_tokens("block_sequence_ids", block_sequence_ids, tokens))
        if embeddings is not None and checks.array("embeddings", embeddings, "f").shape != (
            *tokens.shape,
            self.config.dim,
        ):
            raise ValueError(
                f"embeddings must be [batch, q, dim] = {[*tokens.shape, self.config.dim]}, one for each of tokens, got "
                f"{checks.describe(embeddings)}"
            )
        if embeddings is None:
            x = self._embed(tokens, valid, has_cache=cache is not None)
        else:
            x = jnp.asarray(embeddings).astype(self.embedding.embedding.dtype)
            x = axes.placed(x, "batch", None if cache is not None else "length", None)
        cache = None if cache is None else axes.rows_beside(cache, x)
        step, is_given = None if cache is None else cache.step(tokens.shape[1], valid), positions is not None
        fits: Array | np.ndarray | None = None
        if step is not None:
            positions = step.positions
        elif positions is None:
            positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
            if valid is not None:
                _, padding, fits = consecutive(valid)
                positions = positions - padding[:, None]
        else:
            _for_tokens("positions", positions, tokens, "; leave them out to count the tokens of each row")
        if mask is not None:
            _refuse_more_than_causal(mask)
        if step is None:
            self._refuse_mixed_documents(mask, positions if is_given else None, valid)
        mask = Full() if mask is None else mask
        blocks = None
        if block_sequence_ids is not None:
            ids = jnp.asarray(block_sequence_ids).astype(jnp.int32)
            blocks = Blockwise(ids, 0 if step is None else step.offset)
        mask = mask if valid is None else mask & Padding(valid)
        context = Context(positions, mask, blocks, step, implementation)
        layers: list[LayerCache] = []
        for i, block in enumerate(self.blocks):
            x, layer = block(x, context, None if cache is None else cache.layers[i])
            if layer is not None:
                layers.append(layer)
        x = self.norm(last_token(x, valid) if last_only else x)
        if fits is not None:
            x = jnp.where(fits[:, None, None], x, jnp.nan)
        logits = project(x, self.embedding.embedding[...]) if self.head is None else self.head(x)
        if (cap := self.config.logits_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits, None if step is None else step.end(layers)

    def _refuse_mixed_documents(self, mask: Mask | None, positions: Any, valid: Any) -> None:
        """Refuse positions that begin anew without ids of documents, and ids without positions where these matter."""
        has_ids = mask is not None and any(isinstance(part, Segments) for part in mask.parts())
        if has_ids and positions is None and any(layer.chunk or layer.temperature for layer in self.config.layers):
            raise ValueError(
                "positions is missing: mask has Segments, and layers with chunks or a temperature need the position of "
                "each token in its own document; say positions=<0, 1, 2, … from the start of each document>"
            )
        if mask is None and positions is not None and not any(map(checks.is_traced, (positions, valid))):
            positions = np.asarray(positions)
            begins = positions[:, 1:] < positions[:, :-1]
            begins &= True if valid is None else np.asarray(valid)[:, 1:]
            if begins.any():
                row, column = np.argwhere(begins)[0]
                raise ValueError(
                    f"mask is missing: positions begin anew in row {row} at token {column + 1}, so that there are "
                    "several documents, which would attend to each other; say mask=Segments(ids)"
                )


def _refuse_more_than_causal(mask: Mask) -> None:
    """Refuse what says of later tokens that they are attended to, since each layer's own mask is causal."""
    joined = mask.masks if isinstance(mask, And) else (mask,)
    for part in mask.parts():
        # The other part of a union with the causal mask would change nothing.
        is_more = isinstance(part, Or) and any(isinstance(one, Causal) for one in part.masks)
        looks_ahead = isinstance(part, Window) and part in joined and isinstance(part.right, int) and part.right > 0
        if is_more or looks_ahead:
            raise ValueError(
                f"mask must restrict the causal mask of each layer, got {part!r}, which would let a token attend to "
                "later ones; say which attend to each other both ways by block_sequence_ids, as "
                "for a prefix by jnp.where(jnp.arange(length) < prefix_length, 0, -1)[None]"
            )


def _for_tokens(
    name: str,
    array: Integer[Array | np.ndarray, "batch q"],
    tokens: Integer[Array | np.ndarray, "batch q"],
    hint: str = "",
) -> Integer[Array | np.ndarray, "batch q"]:
    """``array``, which must have an integer for each token."""
    if checks.array(name, array, "i", 2).shape != tokens.shape:
        raise ValueError(
            f"{name} must have the shape of tokens, {list(tokens.shape)}, got {checks.describe(array)}{hint}"
        )
    return array
