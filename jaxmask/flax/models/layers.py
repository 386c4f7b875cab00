"""What the models share: linear projections, token embeddings, and the checks of sizes and caches."""

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Integer

from jaxmask import checks
from jaxmask.flax.cache import Cache
from jaxmask.flax.models import axes


def project(x: Float[Array, "..."], weight: Float[Array, "..."], count: int = 1) -> Float[Array, "..."]:
    """The product of ``[*rows, *in]`` and ``[*out, *in]``, ``[*rows, *out]``, where ``in`` has ``count`` dimensions.

    The larger of the two is on the left. On a CPU, XLA first copies the right operand of a product into the order in
    which it reads it. A decoding step has few tokens. With the weight on the right, copying it would take twice the
    time of the product itself.
    """
    rows, out = x.ndim - count, weight.ndim - count
    of_x, of_weight = tuple(range(rows, x.ndim)), tuple(range(out, weight.ndim))
    if (mesh := axes.explicit_mesh(x, weight)) is not None:
        x, weight = axes.agree(mesh, x, weight, count)

    def at(*specs: tuple[Any, ...]) -> NamedSharding | None:
        return None if mesh is None else NamedSharding(mesh, PartitionSpec(*chain(*specs)))

    if prod(x.shape[:rows]) >= prod(weight.shape[:out]):
        sharding = at(axes.spec(x)[:rows], axes.spec(weight)[:out])
        return jnp.tensordot(x, weight, (of_x, of_weight), out_sharding=sharding)
    sharding = at(axes.spec(weight)[:out], axes.spec(x)[:rows])
    product = jnp.tensordot(weight, x, (of_weight, of_x), out_sharding=sharding)
    return jnp.moveaxis(product, range(out), range(rows, rows + out))


class Linear(nnx.Module):
    """A linear projection whose weight is ``[*out, *in]``, where each dimension has a name.

    ``nnx.Linear`` has ``[in, out]``. This order makes :func:`project` fast for one token and for many, and a PyTorch
    checkpoint needs no transposing. What is sharded is a dimension of its own, so that a part of it is whole heads.

    Args:
        size, to: the names and sizes of the dimensions of inputs and outputs, as in :mod:`jaxmask.flax.models.axes`.
    """

    def __init__(
        self,
        size: dict[str, int],
        to: dict[str, int],
        *,
        use_bias: bool = True,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        sizes, self.count = {**to, **size}, len(size)
        out, all_of = range(len(to)), range(len(sizes))
        initializer = jax.nn.initializers.lecun_normal(in_axis=all_of[len(to) :], out_axis=out)
        self.weight = nnx.Param(initializer(rngs.params(), tuple(sizes.values()), param_dtype), **axes.named(**sizes))
        self.bias = nnx.Param(jnp.zeros(tuple(to.values()), param_dtype), **axes.named(**to)) if use_bias else None
        axes.settled(self)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        out = project(x, self.weight[...], self.count)
        return out if self.bias is None else out + axes.beside(self.bias[...], out)


def table(size: dict[str, int], param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of embeddings, whose two dimensions have these names and sizes."""
    names = axes.named(**size)
    return axes.settled(nnx.Embed(*size.values(), param_dtype=param_dtype, embedding_metadata=names, rngs=rngs))


def embed(
    name: str,
    ids: Integer[Array | np.ndarray, "batch q"],
    table: nnx.Embed,
    valid: Bool[Array | np.ndarray, "batch q"] | None,
    *,
    has_cache: bool = False,
) -> Float[Array, "batch q dim"]:
    """The embedding of each id. An id outside the table gives NaN, except at padding.

    Embeddings are where the rules of axes put tokens, of which a step of decoding has too few to divide them.

    Raises:
        ValueError: an id does not fit an int32. The message calls the ids ``name``.
    """
    checks.fits_int32(name, ids)
    ids = axes.placed(jnp.asarray(ids).astype(jnp.int32), "batch", None if has_cache else "length")
    clipped = ids.clip(0, table.num_embeddings - 1)
    is_unknown = ids != clipped
    if valid is not None:
        is_unknown = is_unknown & valid
    # On a mesh with explicit axes, the embeddings of tokens are where the tokens are.
    mesh = axes.explicit_mesh(clipped, table.embedding[...])
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes.spec(clipped), None))
    embedded = table(clipped, out_sharding=sharding)
    return jnp.where(is_unknown[..., None], jnp.nan, embedded)


def last_token(
    x: Float[Array, "batch q dim"], valid: Bool[Array | np.ndarray, "batch q"] | None
) -> Float[Array, "batch 1 dim"]:
    """What is at the last token of each row; NaN for a row of padding."""
    if (mesh := axes.explicit_mesh(x)) is not None:
        # The last token of a row may be on any device that has a part of it.
        x = axes.put(x, mesh, axes.spec(x)[0], None, axes.spec(x)[2])
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
