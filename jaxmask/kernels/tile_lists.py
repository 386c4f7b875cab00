"""The tiles that a kernel walks for each tile of queries, or of keys: those that are not EMPTY, PARTIAL ones first."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxmask.indices import library
from jaxmask.tiles import EMPTY, FULL, PARTIAL

# By state: PARTIAL tiles first, then FULL ones, and EMPTY ones last.
_RANK = np.array([2, 0, 1], np.int8)


class TileLists(NamedTuple):
    """For each row of tiles, which to walk. An axis of size 1 serves every example or head.

    Args:
        partial: how many are PARTIAL.
        count: how many are not EMPTY.
        order: which ones, the PARTIAL ones first.
    """

    partial: Int[Array | np.ndarray, "batch heads rows"]
    count: Int[Array | np.ndarray, "batch heads rows"]
    order: Int[Array | np.ndarray, "batch heads rows tiles"]

    @classmethod
    def of(cls, states: Any) -> "TileLists":
        """The lists of states ``[batch|1, heads|1, rows, tiles]``; in NumPy, where these are, no longer than needed."""
        xp = library(states)
        order = xp.argsort(xp.asarray(_RANK)[states], axis=-1, stable=True).astype(np.int32)
        partial, count = ((states == PARTIAL).sum(-1, dtype=np.int32), (states != EMPTY).sum(-1, dtype=np.int32))
        if xp is np:
            order = order[..., : max(1, int(count.max(initial=0)))]
        return cls(partial, count, order)


def without_full_end(states: Any) -> Any:
    """States whose last column is not FULL: it has keys that are not there, so that its pairs must be decided."""
    xp = library(states)
    is_last = np.arange(states.shape[-1]) == states.shape[-1] - 1
    return xp.where(is_last & (states == FULL), np.int8(PARTIAL), states)


def of_groups(states: Any, group: int) -> Any:
    """The states of tiles that hold the pairs of ``group`` consecutive heads each."""
    if states.shape[1] == 1:
        return states
    xp = library(states)
    by_group = states.reshape(states.shape[0], -1, group, *states.shape[2:])
    lowest, highest = by_group.min(2), by_group.max(2)
    return xp.where(lowest == highest, lowest, np.int8(PARTIAL))
