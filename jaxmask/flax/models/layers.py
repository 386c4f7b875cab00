"""What the models share: linear projections, token embeddings, and the checks of sizes and caches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Integer

from jaxmask import checks
from jaxmask.flax.cache import Cache


def project(x: Float[Array, "... in"], weight: Float[Array, "out in"]) -> Float[Array, "... out"]:
    """``x @ weight.T``, computed with the larger of the two on the left.

    On a CPU, XLA first copies the right operand of a product into the order in which it reads it. A decoding step has
    few tokens. With the weight on the right, copying it would take twice the time of the product itself.
    """
    if x.size // x.shape[-1] >= len(weight):
        return x @ weight.T
    return jnp.moveaxis(jnp.tensordot(weight, x, ((1,), (x.ndim - 1,))), 0, -1)


class Linear(nnx.Module):
    """A linear projection whose weight is ``[out, in]``.

    ``nnx.Linear`` has ``[in, out]``. This order makes :func:`project` fast for one token and for many, and a PyTorch
    checkpoint needs no transposing.
    """

    def __init__(self, size: int, to: int, *, use_bias: bool = True, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        initializer = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = nnx.Param(initializer(rngs.params(), (to, size), param_dtype))
        self.bias = nnx.Param(jnp.zeros(to, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        out = project(x, self.weight[...])
        return out if self.bias is None else out + jnp.expand_dims(self.bias[...], tuple(range(out.ndim - 1)))


def embed(
    name: str,
    ids: Integer[Array | np.ndarray, "batch q"],
    table: nnx.Embed,
    valid: Bool[Array | np.ndarray, "batch q"] | None,
) -> Float[Array, "batch q dim"]:
    """The embedding of each id. An id outside the table gives NaN, except at padding.

    Raises:
        ValueError: an id does not fit an int32. The message calls the ids ``name``.
    """
    checks.fits_int32(name, ids)
    ids = jnp.asarray(ids).astype(jnp.int32)
    clipped = ids.clip(0, table.num_embeddings - 1)
    is_unknown = ids != clipped
    if valid is not None:
        is_unknown = is_unknown & valid
    # On a mesh with explicit axes, the embeddings of tokens are where the tokens are.
    at = jax.typeof(clipped).sharding
    is_explicit = AxisType.Explicit in at.mesh.axis_types
    embedded = table(
        clipped, out_sharding=NamedSharding(at.mesh, PartitionSpec(*at.spec, None)) if is_explicit else None
    )
    return jnp.where(is_unknown[..., None], jnp.nan, embedded)


def last_token(
    x: Float[Array, "batch q dim"], valid: Bool[Array | np.ndarray, "batch q"] | None
) -> Float[Array, "batch 1 dim"]:
    """What is at the last token of each row; NaN for a row of padding."""
    if valid is None:
        return x[:, -1:]
    last = x.shape[1] - 1 - jnp.argmax(jnp.asarray(valid)[:, ::-1], 1)
    has_token = jnp.asarray(valid).any(1)[:, None, None]
    return jnp.where(has_token, jnp.take_along_axis(x, last[:, None, None], 1), jnp.nan)


def convert_sizes(config: object, *names: str) -> None:
    """Make these fields of a frozen dataclass Python ints of at least 1.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1.
    """
    for name in names:
        object.__setattr__(config, name, checks.integer(name, getattr(config, name), 1))


def check_cache(
    cache: Any,
    tokens: Integer[Array | np.ndarray, "batch q"],
    windows: Sequence[int | None],
    heads: tuple[int, int],
    dtype: DTypeLike,
) -> None:
    """Refuse a cache that is not one of a model: it could lack keys that a layer looks back on.

    Args:
        cache: what is checked.
        tokens: the new ones, a row for each of the cache.
        windows: how many keys each layer of the model looks back on; ``None`` for all.
        heads: the number of heads of keys, and their size.
        dtype: of the weights.

    Raises:
        TypeError: it is no cache at all.
        ValueError: it has other layers, heads, rows or another dtype.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache, as of empty_cache, got {checks.describe(cache)}")
    if len(cache.layers) != len(windows) or not all(
        (layer.key.shape[2:], layer.key.dtype) == (heads, dtype)
        and not (layer.is_ring and (window is None or window > layer.key.shape[1]))
        for window, layer in zip(windows, cache.layers, strict=True)
    ):
        raise ValueError("cache is not one of this model: begin with the one that its empty_cache returns")
    if len(cache.tokens) != len(tokens):
        raise ValueError(
            f"tokens must have as many rows as the cache, {len(cache.tokens)}, got {checks.describe(tokens)}"
        )
