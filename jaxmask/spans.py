"""Positions along one axis, cut into tiles, and what is known of each tile.

Everything here works on NumPy and on JAX arrays alike, so that a static mask is bounded at trace time.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxmask import checks
from jaxmask.indices import Allowed, library, unsharded

# Whether some pair of each tile may attend, and whether every pair may.
Bounds = tuple[Allowed, Allowed]


@dataclass(frozen=True)
class Span:
    """The positions along one axis, cut into tiles: queries ``[batch|1, 1, q, 1]`` or keys ``[batch|1, 1, 1, kv]``.

    Args:
        indices: the positions, less ``first``.
        axis: 2 for queries, 3 for keys.
        size: number of positions in a tile; the last tile may be ragged.
        first: the position of index 0. It is apart, so that static indices are reduced at trace time though the first
            position is traced.
    """

    indices: Int[Array | np.ndarray, "..."]
    axis: Literal[2, 3]
    size: checks.Length
    first: Int[Array | np.ndarray, "..."] | int = 0

    def at(self, positions: Int[Array | np.ndarray, "..."]) -> "Span":
        """The same tiles, with other positions in them."""
        return Span(positions, self.axis, self.size)

    @property
    def positions(self) -> Int[Array | np.ndarray, "..."]:
        """Every position, one by one."""
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
        """The minimum in each tile of values that belong to the positions; for bools, whether all are true."""
        return self._reduce("min", values)

    def most(self, values: Any) -> Any:
        """The maximum in each tile of values that belong to the positions; for bools, whether any is true."""
        return self._reduce("max", values)

    def _reduce(self, name: str, values: Any) -> Any:
        if np.ndim(values) == 0 or values.shape[self.axis] == 1:
            return values  # the same for every position
        # The last tile may be ragged. Its last value is repeated, which changes neither minimum nor maximum. `pad`
        # would do the same, but it slices every axis, a sharded one too.
        xp, values = library(values), unsharded(values, self.axis)
        length, size = values.shape[self.axis], self.size
        if not any(map(jax.export.is_symbolic_dim, (length, size))):
            size = min(size, length)  # a tile may be far larger than all there is
        last = values[(slice(None),) * self.axis + (slice(-1, None),)]
        values = xp.concatenate((values, xp.repeat(last, -length % size, self.axis)), self.axis)
        tiled = values.reshape(*values.shape[: self.axis], -1, size, *values.shape[self.axis + 1 :])
        return getattr(xp, name)(tiled, axis=self.axis + 1)


def share(q_min: Any, q_max: Any, kv_min: Any, kv_max: Any) -> Bounds:
    """Whether some, and every, pair has equal numbers, where those of a tile are known to lie in a range."""
    return (q_min <= kv_max) & (kv_min <= q_max), (q_min == kv_max) & (q_max == kv_min)


def share_ids(q: Span, kv: Span, query_ids: Any, key_ids: Any, has_query: Any, has_key: Any) -> Bounds:
    """Whether some, and every, pair has one id, of which a query or a key may have none."""
    some, every = share(q.least(query_ids), q.most(query_ids), kv.least(key_ids), kv.most(key_ids))
    return some & q.most(has_query) & kv.most(has_key), every & q.least(has_query) & kv.least(has_key)
