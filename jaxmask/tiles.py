"""Tiles of a mask: where it is empty, full or neither, known from bounds and never from the pairs themselves.

Everything here works on NumPy and on JAX arrays alike, so that a static mask is bounded at trace time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from jaxmask.indices import Allowed, library

if TYPE_CHECKING:
    from jaxmask.mask import Mask, Offset

# What is known of a tile: no pair may attend, some may or nothing is known, every pair may. Sorted, so that `&` of two
# masks is the minimum and `|` the maximum.
EMPTY, PARTIAL, FULL = 0, 1, 2

# Whether some pair of each tile may attend, and whether every pair does.
Bounds = tuple[Allowed, Allowed]


@dataclass(frozen=True)
class Span:
    """The positions along one axis, cut into tiles: queries ``[batch|1, 1, q, 1]`` or keys ``[batch|1, 1, 1, kv]``."""

    indices: Int[Array | np.ndarray, "..."]
    axis: Literal[2, 3]
    size: int
    # The position of index 0. Apart from the indices, which are reduced at trace time where the first is traced.
    first: Int[Array | np.ndarray, "..."] | int = 0

    def at(self, positions: Int[Array | np.ndarray, "..."]) -> "Span":
        """The same tiles, of other positions."""
        return Span(positions, self.axis, self.size)

    @property
    def positions(self) -> Int[Array | np.ndarray, "..."]:
        """All of them, one by one."""
        return self.indices + self.first

    @cached_property
    def min(self) -> Int[Array | np.ndarray, "..."]:
        """The lowest position in each tile."""
        return self.least(self.indices) + self.first

    @cached_property
    def max(self) -> Int[Array | np.ndarray, "..."]:
        """The highest position in each tile."""
        return self.most(self.indices) + self.first

    def least(self, values: Any) -> Any:
        """The minimum of each tile, over values that the positions have; of bools, whether all are true."""
        return self._reduce("min", values)

    def most(self, values: Any) -> Any:
        """The maximum of each tile, over values that the positions have; of bools, whether any is true."""
        return self._reduce("max", values)

    def _reduce(self, name: str, values: Any) -> Any:
        length = values.shape[self.axis]
        if length == 1:
            return values  # one for all
        # The last tile may be ragged: to repeat its last value changes neither minimum nor maximum. Not by `pad`, which
        # slices every axis, a sharded one too.
        xp = library(values)
        last = values[(slice(None),) * self.axis + (slice(-1, None),)]
        values = xp.concatenate((values, xp.repeat(last, -length % self.size, self.axis)), self.axis)
        tiled = values.reshape(*values.shape[: self.axis], -1, self.size, *values.shape[self.axis + 1 :])
        return getattr(xp, name)(tiled, axis=self.axis + 1)


def from_bounds(some: Allowed, every: Allowed, shape: tuple[int, int, int, int]) -> Int8[Array | np.ndarray, "..."]:
    """EMPTY where not ``some`` pair may attend, FULL where ``every`` pair may, else PARTIAL."""
    # NumPy knows no symbolic dimensions of `jax.export`.
    xp = jnp if any(map(jax.export.is_symbolic_dim, shape)) else library(some, every)
    return xp.broadcast_to(xp.asarray(some, np.int8) + xp.asarray(every, np.int8), shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("states", "mask", "offset"),
    meta_fields=("query_length", "key_length", "block"),
)
@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles of a mask, as :meth:`Mask.tiles` finds them, and the mask itself, to decide the PARTIAL ones.

    Args:
        states: int8 ``[batch|1, heads|1, q_tiles, kv_tiles]``: EMPTY (0), PARTIAL (1) or FULL (2). NumPy where the mask
            is static, else JAX.
        mask: whose pairs are ``mask.allows(b, h, offset + i, j)``, for query ``i`` and key ``j``.
        offset: the position of the first query.
        query_length, key_length: static; the last tile of either may be ragged.
        block: number of queries and keys in a tile, static.

    >>> from jaxmask import Causal
    >>> tiles = Causal().tiles(6, 6, block=4)
    >>> print(tiles.states[0, 0])
    [[1 0]
     [2 1]]
    >>> print(tiles.kv_counts[0, 0], tiles.kv_indices[0, 0, 1])
    [1 2] [0 1]
    """

    states: Int8[Array | np.ndarray, "batch heads q_tiles kv_tiles"]
    mask: "Mask"
    offset: "Offset"
    query_length: int
    key_length: int
    block: tuple[int, int]

    @property
    def counts(self) -> Int[Array | np.ndarray, "3"]:
        """How many tiles are EMPTY, PARTIAL and FULL, over all examples and heads."""
        xp = library(self.states)
        return xp.stack([(self.states == state).sum(dtype=np.int32) for state in (EMPTY, PARTIAL, FULL)])

    @property
    def sparsity(self) -> Float[Array | np.ndarray, ""]:
        """The fraction of tiles that are EMPTY, between 0 and 1."""
        return (self.states == EMPTY).mean()

    @property
    def kv_counts(self) -> Int[Array | np.ndarray, "batch heads q_tiles"]:
        """For each tile of queries, how many tiles of keys are not EMPTY."""
        return (self.states != EMPTY).sum(axis=3, dtype=np.int32)

    @property
    def kv_indices(self) -> Int[Array | np.ndarray, "batch heads q_tiles kv_tiles"]:
        """For each tile of queries, the tiles of keys: those that are not EMPTY first, each part in order."""
        return in_order(self.states == EMPTY)

    @property
    def q_counts(self) -> Int[Array | np.ndarray, "batch heads kv_tiles"]:
        """For each tile of keys, how many tiles of queries are not EMPTY."""
        return (self.states != EMPTY).sum(axis=2, dtype=np.int32)

    @property
    def q_indices(self) -> Int[Array | np.ndarray, "batch heads kv_tiles q_tiles"]:
        """For each tile of keys, the tiles of queries: those that are not EMPTY first, each part in order."""
        return in_order((self.states == EMPTY).swapaxes(2, 3))

    # The package that draws gives these to the class.
    show: ClassVar[Callable[..., None]]
    _repr_html_: ClassVar[Callable[..., str]]


def in_order(last: Any) -> Any:
    """The indices along the last axis, those that are ``last`` last."""
    return library(last).argsort(last, axis=-1, stable=True).astype(np.int32)
