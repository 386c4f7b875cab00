"""Tiles of a mask: where it is empty, full or neither, known from bounds and never from the pairs themselves.

Everything here works on NumPy and on JAX arrays alike, so that a static mask is bounded at trace time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from jaxmask import checks, serialization
from jaxmask.description import Description
from jaxmask.indices import Allowed, library
from jaxmask.positions import Offset, Positions, QueryPositions
from jaxmask.spans import Bounds, Span

__all__ = ["EMPTY", "FULL", "PARTIAL", "Bounds", "Span", "TileMap", "from_bounds", "in_order"]

# What is known of a tile: no pair may attend; some may, or nothing is known; every pair may. Sorted, so that `&` of two
# masks is the minimum and `|` the maximum.
EMPTY, PARTIAL, FULL = 0, 1, 2


def from_bounds(some: Allowed, every: Allowed, shape: tuple[checks.Length, ...]) -> Int8[Array | np.ndarray, "..."]:
    """EMPTY where not ``some`` pair may attend, FULL where ``every`` pair may, else PARTIAL."""
    # NumPy knows no symbolic dimensions of `jax.export`.
    xp = jnp if any(map(jax.export.is_symbolic_dim, shape)) else library(some, every)
    return xp.broadcast_to(xp.asarray(some, np.int8) + xp.asarray(every, np.int8), shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("states", "mask", "offset", "query_positions"),
    meta_fields=("query_length", "key_length", "block"),
)
@dataclass(frozen=True, eq=False)
class TileMap:
    """The tiles of a mask, as :meth:`Mask.tiles` finds them, and the mask itself, to decide the PARTIAL ones.

    Args:
        states: int8 ``[batch|1, heads|1, q_tiles, kv_tiles]``: EMPTY (0), PARTIAL (1) or FULL (2). NumPy where the mask
            is static, else JAX.
        mask: the mask whose tiles these are, as a function of the positions of queries and the indices of keys: where
            :meth:`Mask.tiles` was given the positions of keys, they are part of it.
        offset: the position of the first query.
        query_length, key_length: static; the last tile of either may be ragged.
        block: number of queries and keys in a tile, static.
        query_positions: the position of each query, where ``offset`` does not say it.

    >>> from jaxmask import Causal
    >>> tiles = Causal().tiles(6, 6, block=4)
    >>> print(tiles.states[0, 0])
    [[1 0]
     [2 1]]
    >>> print(tiles.kv_counts[0, 0], tiles.kv_indices[0, 0, 1])
    [1 2] [0 1]
    """

    states: Int8[Array | np.ndarray, "..."]
    mask: Any  # a Mask, whose module is built on this one
    offset: Offset
    query_length: checks.Length
    key_length: checks.Length
    block: tuple[int, int]
    query_positions: QueryPositions | None = None

    # The pictures of tiles, which the package that draws gives to this class.
    show: ClassVar[Callable[..., None]]
    _repr_html_: ClassVar[Callable[..., str]]

    @classmethod
    def of(cls, states: Any, mask: Description, at: Positions, block: tuple[int, int]) -> "TileMap":
        """The tiles of a mask as a function of the indices of keys."""
        return cls(states, mask, at.start, at.query_length, at.key_length, block, at.queries)

    @property
    def positions(self) -> Positions:
        """Where the queries are, and how many keys there are."""
        return Positions(self.query_length, self.key_length, self.offset, self.query_positions, None, is_aligned=True)

    @property
    def counts(self) -> Int[Array | np.ndarray, "3"]:
        """How many tiles are EMPTY, PARTIAL and FULL, over all examples and heads."""
        xp = library(self.states)
        return xp.stack([(self.states == state).sum(dtype=np.int32) for state in (EMPTY, PARTIAL, FULL)])

    @property
    def sparsity(self) -> Float[Array | np.floating[Any], ""]:
        """The fraction of tiles that are EMPTY, between 0 and 1."""
        return (self.states == EMPTY).mean()

    @property
    def kv_counts(self) -> Int[Array | np.ndarray, "batch heads q_tiles"]:
        """For each tile of queries, how many tiles of keys are not EMPTY."""
        return (self.states != EMPTY).sum(axis=3, dtype=np.int32)

    @property
    def kv_indices(self) -> Int[Array | np.ndarray, "batch heads q_tiles kv_tiles"]:
        """For each tile of queries, the tiles of keys, those that are not EMPTY first, each part in order."""
        return in_order(self.states == EMPTY)

    @property
    def q_counts(self) -> Int[Array | np.ndarray, "batch heads kv_tiles"]:
        """For each tile of keys, how many tiles of queries are not EMPTY."""
        return (self.states != EMPTY).sum(axis=2, dtype=np.int32)

    @property
    def q_indices(self) -> Int[Array | np.ndarray, "batch heads kv_tiles q_tiles"]:
        """For each tile of keys, the tiles of queries, those that are not EMPTY first, each part in order."""
        return in_order((self.states == EMPTY).swapaxes(2, 3))


serialization.register_dataclass(
    TileMap,
    data_fields=("states", "mask", "offset", "query_positions"),
    meta_fields=("query_length", "key_length", "block"),
)


def in_order(last: Any) -> Any:
    """The indices along the last axis, those that are ``last`` last."""
    return library(last).argsort(last, axis=-1, stable=True).astype(np.int32)
