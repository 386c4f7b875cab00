"""The arguments of one call of attention, checked, as every kernel takes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmask import checks, indices
from jaxmask.indices import Index
from jaxmask.mask import Full, Mask, placed, refuse_no_mask
from jaxmask.native import Split
from jaxmask.positions import KeyPositions, Offset, Positions, QueryPositions
from jaxmask.reading import states
from jaxmask.tiles import TileMap

# An array that broadcasts to [batch, heads, q, kv], or a function of positions, to be evaluated where it is needed.
Bias = Float[Array | np.ndarray, "..."] | Callable[[Index, Index, Index, Index], Float[Array, "..."]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("query", "key", "value", "mask", "bias", "positions"),
    meta_fields=("scale", "logits_soft_cap"),
)
@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of :func:`jaxmask.attention`, checked. A pytree.

    Args:
        query, key, value: the arrays.
        mask: a function of the positions of queries and the indices of keys.
        bias: an array of rank 4, or a function that is a pytree.
        positions: of queries and keys. Position 0 of the first query is static, so that the tiles of a static mask are
            found at trace time.
        scale, logits_soft_cap: of the scores.
    """

    query: Any
    key: Any
    value: Any
    mask: Mask
    bias: Bias | None
    positions: Positions
    scale: float
    logits_soft_cap: float | None

    def split(self) -> Split[Mask]:
        """What of the mask a kernel can take in its own arguments."""
        return self.mask.split_at(self.positions)

    def tiles(self, block: tuple[int, int]) -> TileMap:
        """The tiles of the mask, for the examples and heads of the arrays."""
        sizes = self.query.shape[0], self.query.shape[2]
        return TileMap.of(states(self.mask, self.positions, block, sizes), self.mask, self.positions, block)

    @property
    def platform(self) -> str:
        """Where JAX runs by default: ``cpu``, ``gpu``, ``tpu``."""
        return jax.default_backend()


def checked_call(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None,
    bias: Any,
    scale: float | None,
    offset: Offset | None,
    query_positions: QueryPositions | None,
    key_positions: KeyPositions | None,
    logits_soft_cap: float | None,
) -> Call:
    """The arguments, when they are found to fit each other."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        checks.array(name, array, "f")
    shapes = ", ".join(f"{name} {checks.describe(x)}" for name, x in (("query", query), ("key", key), ("value", value)))
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"query, key and value must be [batch, length, heads, dim], got {shapes}; for a single example, give each "
            "[None]"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {shapes}; cast them by astype")
    batch, query_length, heads, dim = query.shape
    key_length, kv_heads = key.shape[1:3]
    if (key.shape[0], value.shape[0], key.shape[3]) != (batch, batch, dim) or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "query, key and value must agree: one batch, the dim of query and key, the length and heads of key and "
            f"value; got {shapes}"
        )
    if not all(query.shape + key.shape + value.shape):
        raise ValueError(f"query, key and value must not be empty, got {shapes}")
    if heads % kv_heads:
        raise ValueError(
            f"the heads of key and value must divide those of query, got {kv_heads} and {heads}: {shapes}; heads are "
            "the third axis"
        )
    if mask is not None and not isinstance(mask, Mask):
        refuse_no_mask(mask, expected="mask must be a jaxmask.Mask")
    mask = Full() if mask is None else mask
    mask, at = placed(mask, query_length, key_length, offset, query_positions, key_positions)
    if at.starts_at_zero:
        at = replace(at, first=None)
    for name, what, size, given in (
        *(("batch", what, batch, given) for what, given in at.batches.items()),
        ("batch", "mask", batch, mask.shape[0]),
        ("heads", "mask", heads, mask.shape[1]),
    ):
        if given not in (1, size):
            raise ValueError(f"{what} is for {given} {name}, but the arrays have {size}: {shapes}")
    factor = dim**-0.5 if scale is None else _finite("scale", scale)
    logits_soft_cap = None if logits_soft_cap is None else _finite("logits_soft_cap", logits_soft_cap)
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"logits_soft_cap must be positive, got {logits_soft_cap}; None is no cap")
    if bias is not None and not callable(bias):
        checks.array("bias", bias, "f", hint="; a bool mask is Dense(allowed), joined to the mask by &")
        if not checks.broadcasts_to(bias.shape, (batch, heads, query_length, key_length)):
            raise ValueError(
                f"bias must broadcast to [batch, heads, q, kv] = {[batch, heads, query_length, key_length]}, got "
                f"{checks.describe(bias)}"
            )
        bias = indices.as_4d(bias)
    return Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        bias=_as_pytree(bias) if callable(bias) else bias,
        positions=at,
        scale=factor,
        logits_soft_cap=logits_soft_cap,
    )


def _as_pytree(bias: Callable[..., Any]) -> jax.tree_util.Partial:
    """A function as a pytree. Those that close over arrays are never the same twice, for their arrays may not be."""
    if isinstance(bias, jax.tree_util.Partial):
        return bias
    closes_over = jax.make_jaxpr(bias)(*[jnp.zeros((1, 1, 1, 1), jnp.int32)] * 4).consts
    return jax.tree_util.Partial((lambda *at: bias(*at)) if closes_over else bias)


def _finite(name: str, value: Any) -> float:
    if checks.is_array(value) or isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        hint = "; multiply the query by an array instead" if name == "scale" and checks.is_array(value) else ""
        raise TypeError(f"{name} must be a Python float, got {checks.describe(value)}{hint}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, or every output is NaN, got {value}")
    return float(value)
