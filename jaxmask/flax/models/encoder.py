"""An encoder of the BERT family, and the mean that makes its hidden states the embedding of a text."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Integer

from jaxmask import checks
from jaxmask.dispatch import Implementation, attention
from jaxmask.flax.cache import Valid
from jaxmask.flax.models import axes
from jaxmask.flax.models.layers import Linear, convert_sizes, embed, table
from jaxmask.mask import Full, Mask
from jaxmask.masks import Padding

Tokens = Integer[Array | np.ndarray, "batch length"]
Hidden = Float[Array, "batch length dim"]


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an :class:`Encoder`.

    Args:
        vocab_size: the number of tokens.
        dim, hidden_dim: the width of the hidden states, and the width inside the MLP.
        layers, heads: the number of layers, and of heads in each; ``heads`` divides ``dim``.
        max_length: the number of trained positions.
        token_types: the number of token types. BERT has one for each of two sentences.
        epsilon: added to the variance by layer norms.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1, or ``heads`` does not divide ``dim``.
    """

    vocab_size: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    max_length: int = 512
    token_types: int = 2
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        convert_sizes(self, "vocab_size", "dim", "hidden_dim", "layers", "heads", "max_length", "token_types")
        checks.real("epsilon", self.epsilon, 0)
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got {self.heads} heads and dim {self.dim}")


class EncoderLayer(nnx.Module):
    """Attention, then an MLP. Each adds to its input, and a norm follows."""

    def __init__(self, config: EncoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = partial(Linear, param_dtype=param_dtype, rngs=rngs)
        dim, hidden = {"dim": config.dim}, {"hidden": config.hidden_dim}
        heads = {"heads": config.heads, "head_dim": config.dim // config.heads}
        self.query, self.key, self.value = (linear(dim, heads) for _ in range(3))
        self.out = linear(heads, dim)
        self.attention_norm = _norm(config, param_dtype, rngs)
        self.up, self.down = linear(dim, hidden), linear(hidden, dim)
        self.mlp_norm = _norm(config, param_dtype, rngs)

    def __call__(self, hidden: Hidden, mask: Mask, implementation: Implementation | None = None) -> Hidden:
        query, key, value = (project(hidden) for project in (self.query, self.key, self.value))
        sharding = axes.told("length")
        attended = attention(query, key, value, mask, sharding=sharding, implementation=implementation)
        hidden = self.attention_norm(hidden + self.out(attended))
        return self.mlp_norm(hidden + self.down(jax.nn.gelu(self.up(hidden), approximate=False)))


class Encoder(nnx.Module):
    """BERT without its heads: embeddings of words, positions and token types, then the layers.

    ``torch_compat.models.load`` fills it with the weights of a checkpoint.

    Args:
        config: the sizes.
        param_dtype: of the weights, and of the computation.
        rngs: for random weights.

    Source: ``transformers.BertModel``, without its pooler and its dropout.

    >>> config = EncoderConfig(vocab_size=64, dim=16, hidden_dim=32, layers=2, heads=2)
    >>> tokens, valid = jnp.array([[5, 6, 7], [8, 9, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]])
    >>> hidden = Encoder(config, rngs=nnx.Rngs(0))(tokens, valid)
    >>> hidden.shape, mean_pool(hidden, valid).shape
    ((2, 3, 16), (2, 16))
    """

    def __init__(self, config: EncoderConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        sizes = {"vocab": config.vocab_size, "positions": config.max_length, "token_types": config.token_types}
        self.words, self.positions, self.types = (
            table({name: size, "dim": config.dim}, param_dtype, rngs) for name, size in sizes.items()
        )
        self.norm = _norm(config, param_dtype, rngs)
        self.layers = nnx.List([EncoderLayer(config, param_dtype, rngs) for _ in range(config.layers)])

    def __call__(
        self,
        tokens: Tokens,
        valid: Valid | None = None,
        token_types: Tokens | None = None,
        *,
        implementation: Implementation | None = None,
    ) -> Hidden:
        """The hidden states after the last layer.

        Args:
            tokens: integer ``[batch, length]``. An id outside the vocabulary makes NaN. As in Transformers, positions
                count from the first column, with padding on either side.
            valid: bool or 0/1 ``[batch, length]``, false for padding; ``None`` if there is no padding.
            token_types: integer ``[batch, length]``; ``None`` for zeros.
            implementation: as in :func:`jaxmask.attention`.

        Returns:
            ``[batch, length, dim]``, in the dtype of the weights. Hidden states at padding are finite and mean nothing.

        Raises:
            ValueError: a shape does not fit, or the text is longer than ``max_length``.
            TypeError: an argument has the wrong type or dtype.
        """
        checks.array("tokens", tokens, "i", 2)
        length = tokens.shape[1]
        if not 0 < length <= self.config.max_length:
            raise ValueError(
                f"tokens must have a length from 1 to max_length, {self.config.max_length}, got "
                f"{checks.describe(tokens)}; cut the text"
            )
        types = jnp.zeros_like(tokens) if token_types is None else _like(tokens, "token_types", token_types, "i")
        is_token = None if valid is None else checks.bools("valid", _like(tokens, "valid", valid, "bi"))
        mask = Full() if is_token is None else Padding(is_token)
        embedded = embed("tokens", tokens, self.words, is_token) + embed("token_types", types, self.types, is_token)
        hidden = self.norm(embedded + self.positions(jnp.arange(length)[None]))
        for layer in self.layers:
            hidden = layer(hidden, mask, implementation)
        return hidden


def mean_pool(hidden: Float[Array | np.ndarray, "batch length dim"], valid: Valid) -> Float[Array, "batch dim"]:
    """The mean of the hidden states that are not padding: the embedding of a text.

    Args:
        hidden: ``[batch, length, dim]``.
        valid: bool or 0/1 ``[batch, length]``.

    Returns:
        ``[batch, dim]``, in the dtype of the hidden states. A row of padding gives zeros, and zero gradients.

    Raises:
        ValueError: the shapes do not fit each other.
        TypeError: a dtype is wrong.

    Source: ``sentence_transformers``' mean pooling.

    >>> mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]]))
    Array([[2.]], dtype=float32)
    """
    checks.array("hidden", hidden, "f", 3)
    counted = jnp.asarray(checks.bools("valid", _like(hidden[..., 0], "valid", valid, "bi")))[..., None]
    # In float32 at least: bfloat16 holds no exact count, and no long sum.
    total = jnp.where(counted, hidden, 0).sum(1, dtype=checks.at_least_float32(hidden.dtype))
    return (total / jnp.maximum(counted.sum(1), 1)).astype(hidden.dtype)


def _like(tokens: Array | np.ndarray, name: str, array: Valid, kinds: str) -> Valid:
    """``array``, which must have an element for each token."""
    if checks.array(name, array, kinds, 2).shape != tokens.shape:
        raise ValueError(f"{name} must have the shape of tokens, {list(tokens.shape)}, got {checks.describe(array)}")
    return array


def _norm(config: EncoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, a difference of two means, loses digits that PyTorch keeps.
    norm = partial(nnx.LayerNorm, epsilon=config.epsilon, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)
    names = axes.named(norm=config.dim)
    return axes.settled(norm(config.dim, scale_metadata=names, bias_metadata=names))
