"""T5: an encoder that reads a text, and a decoder that answers it, whose keys and values of the text are kept."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer

from jaxmask import checks
from jaxmask.dispatch import Implementation, attention
from jaxmask.flax.cache import Cache, LayerCache, Valid, as_valid
from jaxmask.flax.models import axes
from jaxmask.flax.models.layers import Linear, check_cache, convert_sizes, embed, last_token, project, table
from jaxmask.mask import Full, Mask
from jaxmask.masks import Causal, Padding

Tokens = Integer[Array | np.ndarray, "batch length"]
Hidden = Float[Array, "batch length dim"]
Heads = Float[Array, "batch length heads head_dim"]


@dataclass(frozen=True)
class T5Config:
    """The sizes of a :class:`T5`.

    Args:
        vocab_size: the number of tokens.
        dim, hidden_dim: the width of the hidden states, and the width inside the MLP.
        layers: the number of layers, of the encoder and of the decoder alike.
        heads, head_dim: the number of heads, and their size.
        buckets: the number of distances between tokens that a layer tells apart.
        max_distance: from this distance on, all are one.
        epsilon: added to the mean square by norms.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1, or buckets are too few, or too many for the distance.
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    head_dim: int
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        sizes = "vocab_size", "dim", "hidden_dim", "layers", "heads", "head_dim", "buckets", "max_distance"
        convert_sizes(self, *sizes)
        checks.real("epsilon", self.epsilon, 0.0)
        # Half of the buckets are of one distance each, and in the encoder half are for each direction.
        if not 4 <= self.buckets < 2 * self.max_distance:
            raise ValueError(
                f"buckets must be at least 4 and less than 2 * max_distance, {2 * self.max_distance}, got "
                f"{self.buckets}"
            )


def bucket(
    distance: Int[Array | np.ndarray, "..."], buckets: int, max_distance: int, both_ways: bool
) -> Int[Array, "..."]:
    """The bucket of a distance: one for each that is near, and ever wider ones for those afar.

    Source: ``T5Attention._relative_position_bucket`` in Transformers.
    """
    ahead = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        ahead = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance) if both_ways else jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The same arithmetic as the original's, for where one bucket ends is a matter of rounding.
    ratios = np.log(np.maximum(np.arange(max_distance), 1).astype(np.float32) / np.float32(exact))
    wide = exact + (ratios / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int32)
    table = jnp.asarray(np.where(np.arange(max_distance) < exact, np.arange(max_distance), wide))
    return ahead + jnp.where(distance < max_distance, table[jnp.minimum(distance, max_distance - 1)], buckets - 1)


@dataclass(frozen=True)
class _Buckets:
    """The bias of a table with a row for each bucket: equal to another of the same, so that it compiles once."""

    buckets: int
    max_distance: int
    both_ways: bool

    def __call__(self, table: Array, b: Any, h: Any, q: Any, kv: Any) -> Array:
        return table[bucket(kv - q, self.buckets, self.max_distance, self.both_ways), h]


class T5Attention(nnx.Module):
    """The projections of attention. T5 does not scale the scores: its initialisation does."""

    def __init__(self, config: T5Config, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        dim, heads = {"dim": config.dim}, {"heads": config.heads, "head_dim": config.head_dim}
        self.query, self.key, self.value = (linear(dim, heads) for _ in range(3))
        self.out = linear(heads, dim)

    def queries(self, x: Hidden) -> Heads:
        """The queries of hidden states."""
        return self.query(x)

    def keys_and_values(self, x: Hidden) -> tuple[Heads, Heads]:
        """The keys and the values of hidden states."""
        return self.key(x), self.value(x)

    def join(self, attended: Heads) -> Hidden:
        """The heads in one."""
        return self.out(attended)


class T5EncoderLayer(nnx.Module):
    """Attention within a text, and an MLP."""

    def __init__(self, config: T5Config, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.self_norm, self.mlp_norm = (_norm(config, param_dtype, rngs) for _ in range(2))
        self.self_attention = T5Attention(config, param_dtype, rngs)
        dim, hidden = {"dim": config.dim}, {"hidden": config.hidden_dim}
        self.up, self.down = linear(dim, hidden), linear(hidden, dim)

    def mlp(self, x: Hidden) -> Hidden:
        """The hidden states after the MLP."""
        return x + self.down(jax.nn.relu(self.up(self.mlp_norm(x))))


class T5DecoderLayer(T5EncoderLayer):
    """Attention within an answer, attention across to the text, and an MLP."""

    def __init__(self, config: T5Config, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(config, param_dtype, rngs)
        self.cross_norm = _norm(config, param_dtype, rngs)
        self.cross_attention = T5Attention(config, param_dtype, rngs)


L = TypeVar("L", bound=T5EncoderLayer)


class T5Stack(nnx.Module, Generic[L]):
    """The layers of the encoder or of the decoder. All of them have one table of biases."""

    def __init__(self, config: T5Config, layer: type[L], param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config, self.both_ways = config, layer is T5EncoderLayer
        self.distances = table({"buckets": config.buckets, "bucket_heads": config.heads}, param_dtype, rngs)
        self.layers = nnx.List([layer(config, param_dtype, rngs) for _ in range(config.layers)])
        self.norm = _norm(config, param_dtype, rngs)

    def bias(self) -> jax.tree_util.Partial:
        """What is added to the scores: a number for each head and each bucket of distances."""
        buckets = _Buckets(self.config.buckets, self.config.max_distance, self.both_ways)
        return jax.tree_util.Partial(buckets, self.distances.embedding[...])


class T5(nnx.Module):
    """T5. ``read`` a text, and :func:`generate` continues the answer with the decoder that is returned.

    ``torch_compat.models.load`` fills it with the weights of a checkpoint.

    Args:
        config: the sizes.
        param_dtype: of the weights, and of the computation.
        rngs: for random weights.

    Source: ``transformers.T5ForConditionalGeneration``, without dropout; https://arxiv.org/abs/1910.10683.

    >>> from jaxmask.flax import generate
    >>> model = T5(T5Config(64, dim=16, hidden_dim=32, layers=2, heads=2, head_dim=8), rngs=nnx.Rngs(0))
    >>> decoder = model.read(jnp.array([[5, 6, 7], [8, 9, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]]))
    >>> generate(decoder, jnp.zeros((2, 1), int), max_new_tokens=4).tokens.shape
    (2, 4)
    """

    def __init__(self, config: T5Config, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.words = table({"vocab": config.vocab_size, "dim": config.dim}, param_dtype, rngs)
        self.encoder = T5Stack(config, T5EncoderLayer, param_dtype, rngs)
        self.decoder = T5Stack(config, T5DecoderLayer, param_dtype, rngs)

    def encode(
        self, tokens: Tokens, valid: Valid | None = None, *, implementation: Implementation | None = None
    ) -> Hidden:
        """The hidden states of a text, ``[batch, length, dim]``.

        Args:
            tokens: integer ``[batch, length]``. An id outside the vocabulary makes NaN.
            valid: bool or 0/1 ``[batch, length]``, false for padding; ``None`` if there is no padding.
            implementation: as in :func:`jaxmask.attention`.

        Raises:
            ValueError: a shape does not fit.
            TypeError: an argument has the wrong type or dtype.
        """
        return self._encode(tokens, _checked(tokens, valid), implementation)

    def read(
        self, tokens: Tokens, valid: Valid | None = None, *, implementation: Implementation | None = None
    ) -> "T5Decoder":
        """The decoder of answers to a text, with the keys and values of the text in it.

        The arguments are those of :meth:`encode`. For other texts of the same shape, nothing compiles again.
        """
        is_token = _checked(tokens, valid)
        return T5Decoder(self, self._encode(tokens, is_token, implementation), is_token)

    def _encode(self, tokens: Tokens, valid: Any, implementation: Implementation | None) -> Hidden:
        x, bias = embed("tokens", tokens, self.words, valid), self.encoder.bias()
        mask = Full() if valid is None else Padding(valid)
        how: Any = {"sharding": axes.told("length"), "implementation": implementation}
        for layer in self.encoder.layers:
            normed, attend = layer.self_norm(x), layer.self_attention
            key, value = attend.keys_and_values(normed)
            attended = attention(attend.queries(normed), key, value, mask, bias=bias, scale=1.0, **how)
            x = layer.mlp(x + attend.join(attended))
        return self.encoder.norm(x)


class T5Decoder(nnx.Module):
    """The decoder of answers to a text, from tokens to logits. :meth:`T5.read` makes it.

    Args:
        model: whose decoder it is.
        encoded: the hidden states of the text, ``[batch, length, dim]``.
        valid: bool ``[batch, length]``, false for padding of the text; ``None`` if there is no padding.
    """

    def __init__(self, model: T5, encoded: Hidden, valid: Bool[Array | np.ndarray, "batch length"] | None) -> None:
        self.config, self.words, self.stack = model.config, model.words, model.decoder
        pairs = [layer.cross_attention.keys_and_values(encoded) for layer in self.stack.layers]
        # Computed once, where each step would compute them anew.
        self.text_keys = nnx.List([nnx.Cache(key) for key, _ in pairs])
        self.text_values = nnx.List([nnx.Cache(value) for _, value in pairs])
        self.text_valid = None if valid is None else nnx.Cache(jnp.asarray(valid))

    def empty_cache(self, batch: SupportsIndex, length: SupportsIndex) -> Cache:
        """A cache for ``batch`` answers of at most ``length`` tokens, where the rules of axes put it.

        It raises as :meth:`Cache.empty` does.
        """
        config, dtype = self.config, self.words.embedding.dtype
        return axes.empty_cache(batch, length, [None] * config.layers, {"heads": config.heads}, config.head_dim, dtype)

    def __call__(
        self,
        tokens: Tokens,
        valid: Valid | None = None,
        *,
        cache: Cache | None = None,
        last_only: bool = False,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "batch #q vocab"], Cache]:
        """The logits for the token after each, and the cache with these tokens.

        Args:
            tokens: an answer for each text, or its continuation if there is a cache. An answer begins with the padding
                token in the checkpoints of T5. An id outside the vocabulary makes NaN.
            valid: bool or 0/1, true for tokens, false for padding on either side; ``None`` if there is no padding.
            cache: the answer so far, from :meth:`empty_cache` or the last call; ``None`` if ``tokens`` is all of it.
            last_only: whether to return the logits after the last token of each row only, ``[batch, 1, vocab]``. A row
                of padding gives NaN.
            implementation: as in :func:`jaxmask.attention`.

        Raises:
            ValueError: shapes do not fit each other, or the cache has no room.
            TypeError: an argument has the wrong type or dtype.
        """
        is_token, texts = _checked(tokens, valid), len(self.text_keys[0])
        if cache is not None:
            config = self.config
            windows, heads = [None] * config.layers, (config.heads, config.head_dim)
            check_cache(cache, tokens, windows, heads, self.words.embedding.dtype)
        if len(tokens) != texts:
            raise ValueError(f"tokens must have a row for each of the {texts} texts, got {checks.describe(tokens)}")
        cache = self.empty_cache(*tokens.shape) if cache is None else cache
        x, bias = embed("tokens", tokens, self.words, is_token, has_cache=True), self.stack.bias()
        cache = axes.rows_beside(cache, x)
        step, layers = cache.step(tokens.shape[1], is_token), list[LayerCache]()
        how: Any = {"scale": 1.0, "implementation": implementation}
        mask: Mask = Full() if self.text_valid is None else Padding(self.text_valid[...])
        parts = self.stack.layers, cache.layers, self.text_keys, self.text_values
        for layer, old, key, value in zip(*parts, strict=True):
            normed, attend = layer.self_norm(x), layer.self_attention
            new = attend.queries(normed), *attend.keys_and_values(normed)
            old = axes.heads_beside(old, new[1])
            at = axes.told(axes.slots_of(old))
            attended, filled = old.attend(step, *new, Causal(), bias=bias, sharding=at, **how)
            layers.append(filled)
            x = x + attend.join(attended)
            cross = layer.cross_attention
            query = cross.queries(layer.cross_norm(x))
            attended = attention(query, key[...], value[...], mask, sharding=axes.told(None), **how)
            x = layer.mlp(x + cross.join(attended))
        x = self.stack.norm(last_token(x, is_token) if last_only else x)
        return project(x * self.config.dim**-0.5, self.words.embedding[...]), step.end(layers)


def _checked(tokens: Tokens, valid: Valid | None) -> Bool[Array | np.ndarray, "batch length"] | None:
    if not checks.array("tokens", tokens, "i", 2).shape[1]:
        raise ValueError(f"tokens must have at least one token in a row, got {checks.describe(tokens)}")
    return None if valid is None else as_valid(valid, tokens.shape)


def _norm(config: T5Config, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    norm = partial(nnx.RMSNorm, epsilon=config.epsilon, param_dtype=param_dtype, rngs=rngs)
    return axes.settled(norm(config.dim, scale_metadata=axes.named(norm=config.dim)))
