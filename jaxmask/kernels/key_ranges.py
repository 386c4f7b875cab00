"""The ranges of keys that each tile of queries reads: consecutive keys, the same static number in every range.

They cover the tiles of a mask that are not EMPTY, in NumPy where these are known at trace time, else in the program.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Int8

from jaxmask import indices
from jaxmask.kernels.call import Call
from jaxmask.mask import Unknown, without_arrays
from jaxmask.tiles import EMPTY, FULL

Ints = Int[Array | np.ndarray, "..."]
States = Int8[Array | np.ndarray, "batch heads q_tiles kv_tiles"]


class KeyRanges(NamedTuple):
    """The ranges of keys for each tile of queries, those with a tile that is not FULL first. All int32.

    Args:
        starts: the first key of each range, ``[batch|1, kv_heads|1, q_tiles, ranges]``.
        partial_count: how many ranges have a tile that is not FULL, ``[batch|1, kv_heads|1, q_tiles]``. There the mask
            must decide pair by pair.
        range_count: how many ranges there are, ``[batch|1, kv_heads|1, q_tiles]``.
    """

    starts: Ints
    partial_count: Ints
    range_count: Ints


def cover(states: States, tile: int, width: int, key_length: int) -> KeyRanges:
    """Cover the tiles of ``tile`` keys that are not EMPTY by ranges of ``width`` keys."""
    xp = indices.library(states)
    kv_tiles, tiles_in_range = states.shape[-1], -(-width // tile)
    zero = xp.zeros_like(states, dtype=np.int32, shape=(*states.shape[:-1], 1))
    # From each tile on, the next that is not EMPTY; and before each tile, how many are not FULL.
    following = xp.where(states == EMPTY, kv_tiles, np.arange(kv_tiles, dtype=np.int32))
    following = xp.concatenate((following, zero + kv_tiles), -1)
    following = xp.minimum.accumulate(following[..., ::-1], axis=-1)[..., ::-1]
    partial_before = xp.concatenate((zero, (states != FULL).cumsum(-1, dtype=np.int32)), -1)

    def look_up(table: Any, tiles: Any) -> Any:
        return xp.take_along_axis(table, xp.minimum(tiles, kv_tiles), -1)

    def next_range(after: Any, _: None) -> tuple[Any, Any]:
        first = look_up(following, after)
        return first + tiles_in_range, first

    if xp is np:
        ranges = [look_up(following, zero)]
        while (first := look_up(following, ranges[-1] + tiles_in_range)).min() < kv_tiles:
            ranges.append(first)
        first = np.concatenate(ranges, -1)
    else:
        first = jnp.moveaxis(lax.scan(next_range, zero, length=-(-kv_tiles // tiles_in_range))[1][..., 0], 0, -1)
    exists = first < kv_tiles
    has_partial = look_up(partial_before, first) < look_up(partial_before, first + tiles_in_range)
    is_full = exists & ~has_partial & (first * tile + width <= key_length)
    order = xp.argsort(xp.where(exists, is_full.astype(np.int8), 2), axis=-1, stable=True)
    starts = xp.take_along_axis(xp.where(exists, first * tile, 0), order, -1)
    return KeyRanges(
        starts.astype(np.int32), (exists & ~is_full).sum(-1, dtype=np.int32), exists.sum(-1, dtype=np.int32)
    )


def key_ranges_of(call: Call, block: tuple[int, int] | None = None) -> tuple[KeyRanges, int, int]:
    """The ranges of keys for a call, the number of queries in a tile, and the number of keys in a range.

    The default is 256 queries, and the number of keys by :func:`_width`; for a single query it is 128 keys.
    """
    query_length, key_length = call.query.shape[1], call.key.shape[1]
    queries, keys = block or (256, None)
    queries, tile = min(queries, query_length), min(128 if keys is None or keys % 128 == 0 else keys, key_length)
    states = _states(call, (queries, tile))
    if keys is None:
        # In a step of decoding, a range is copied and read once: a narrow one has fewer keys that nobody attends to.
        keys = _width(states, tile) if query_length > 1 else tile
    keys = min(keys, key_length)
    return cover(states, tile, keys, key_length), queries, keys


def _states(call: Call, block: tuple[int, int]) -> States:
    """The states of the tiles, ``[batch|1, kv_heads|1, q_tiles, kv_tiles]``."""
    query_length, kv_heads = call.query.shape[1], call.key.shape[2]
    if call.is_left_to_xla:
        # Every device walks the tiles of all examples and heads: those that are known without looking at their arrays.
        at = call.positions
        is_known = at.queries is None and at.keys is None and np.ndim(at.start) == 0
        call = replace(call, mask=without_arrays(call.mask) if is_known else Unknown())
        return _union(call.tiles(block).states, (0, 1))[None, None]
    states: Any = call.tiles(block).states
    if states.shape[1] > 1:
        states = _union(states.reshape(states.shape[0], kv_heads, -1, *states.shape[2:]), 2)
    if query_length == 1:  # a step of decoding, best done for all examples at once
        states = _union(states, (0, 1))[None, None]
    return states


def _union(states: Any, axis: int | tuple[int, ...]) -> Any:
    """The states of masks joined by ``|``: FULL only where all of them are."""
    some, every = (states != EMPTY).any(axis), (states == FULL).all(axis)
    return some.astype(np.int8) + every.astype(np.int8)


def _width(states: States, tile: int) -> int:
    """How many keys are in a range: all for a tile of queries, if that is known to be at most 1,280, else 512."""
    most = 512 // tile
    if indices.is_static(states):
        is_read = np.asarray(states != EMPTY)
        spans = is_read.shape[-1] - is_read.argmax(-1) - is_read[..., ::-1].argmax(-1)
        longest = int(np.where(is_read.any(-1), spans, 1).max())
        most = longest if longest * tile <= 1280 else most
    return max(most, 1) * tile
