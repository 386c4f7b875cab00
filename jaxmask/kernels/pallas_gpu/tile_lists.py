"""The tiles that a kernel walks for each tile of queries, or of keys: those that are not EMPTY, PARTIAL ones first."""

from typing import Any, NamedTuple

import numpy as np

from jaxmask.indices import library
from jaxmask.tiles import FULL, PARTIAL

# By state: PARTIAL tiles first, then FULL ones, and EMPTY ones last.
_RANK = np.array([2, 0, 1], np.int8)


class TileLists(NamedTuple):
    """For each row of tiles, which to walk, ``[batch|1, heads|1, rows]`` and ``order`` with an axis of tiles.

    Args:
        partial: how many are PARTIAL.
        walked: how many are not EMPTY.
        order: which ones, the PARTIAL ones first.
    """

    # Int32 arrays; where a kernel is called, how it gets them.
    partial: Any
    walked: Any
    order: Any

    @classmethod
    def of(cls, states: Any) -> "TileLists":
        """The lists of states ``[batch|1, heads|1, rows, tiles]``; in NumPy, where these are, no longer than needed."""
        xp = library(states)
        order = xp.argsort(xp.asarray(_RANK)[states], axis=-1, stable=True).astype(np.int32)
        partial, walked = ((states == state).sum(-1, dtype=np.int32) for state in (PARTIAL, FULL))
        walked = walked + partial
        if xp is np:
            order = order[..., : max(1, int(walked.max(initial=0)))]
        return cls(partial, walked, order)


def without_full_end(states: Any) -> Any:
    """States whose last column is not FULL: it has keys that are not there, so that its pairs must be decided."""
    xp = library(states)
    is_last = np.arange(states.shape[-1])[(None,) * 3] == states.shape[-1] - 1
    return xp.where(is_last & (states == FULL), np.int8(PARTIAL), states)


def of_groups(states: Any, group: int) -> Any:
    """The states of tiles that hold the pairs of ``group`` consecutive heads each."""
    if states.shape[1] == 1:
        return states
    xp = library(states)
    by_group = states.reshape(states.shape[0], -1, group, *states.shape[2:])
    lowest, highest = by_group.min(2), by_group.max(2)
    return xp.where(lowest == highest, lowest, np.int8(PARTIAL))
