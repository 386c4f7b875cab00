"""The strips of keys that each tile of queries reads: runs of consecutive keys, all of one static width.

They cover the tiles of a mask that are not EMPTY, in NumPy where these are known at trace time, else in the program.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmask import indices
from jaxmask.kernels.call import Call
from jaxmask.tiles import EMPTY, FULL


class Strips(NamedTuple):
    """The strips of keys for each tile of queries, those that the mask must decide first. All int32.

    Args:
        first: the first key of each, ``[batch|1, kv_heads|1, q_tiles, strips]``.
        decided: how many the mask must decide, ``[batch|1, kv_heads|1, q_tiles]``.
        count: how many there are, ``[batch|1, kv_heads|1, q_tiles]``.
    """

    first: Any
    decided: Any
    count: Any


def cover(states: Any, tile: int, width: int, key_length: int) -> Strips:
    """Cover the tiles of ``tile`` keys that are not EMPTY, ``[…, q_tiles, kv_tiles]``, by strips of ``width`` keys."""
    library = indices.library(states)
    kv_tiles, span = states.shape[-1], -(-width // tile)
    end = library.zeros_like(states, dtype=np.int32, shape=(*states.shape[:-1], 1))
    # From each tile on, the next that is not EMPTY; and before each tile, how many are not FULL.
    following = library.where(states == EMPTY, kv_tiles, np.arange(kv_tiles, dtype=np.int32))
    following = library.concatenate((following, end + kv_tiles), -1)
    following = library.minimum.accumulate(following[..., ::-1], axis=-1)[..., ::-1]
    partial_before = library.concatenate((end, (states != FULL).cumsum(-1, dtype=np.int32)), -1)

    def at(table: Any, tiles: Any) -> Any:
        return library.take_along_axis(table, library.minimum(tiles, kv_tiles), -1)

    def step(end: Any, _: None) -> Any:
        first = at(following, end)
        return first + span, first

    if library is np:
        found = [at(following, end)]
        while (first := at(following, found[-1] + span)).min() < kv_tiles:
            found.append(first)
        first = np.concatenate(found, -1)
    else:
        first = jnp.moveaxis(lax.scan(step, end, length=-(-kv_tiles // span))[1][..., 0], 0, -1)
    there = first < kv_tiles
    full = (
        there & (at(partial_before, first) == at(partial_before, first + span)) & (first * tile + width <= key_length)
    )
    order = library.argsort(library.where(there, full, 2), axis=-1, stable=True)
    first = library.take_along_axis(library.where(there, first * tile, 0), order, -1)
    return Strips(first.astype(np.int32), (there & ~full).sum(-1, dtype=np.int32), there.sum(-1, dtype=np.int32))


def strips_of(call: Call, block: tuple[int, int] | None = None) -> tuple[Strips, int, int]:
    """The strips for a call, the number of queries in a tile, and that of keys in a strip.

    The default is 256 queries, and strips by :func:`_width`; of 128 keys for a single query.
    """
    (_, query_length, _, _), (_, key_length, _, _) = call.query.shape, call.key.shape
    queries, keys = block or (256, None)
    queries, tile = min(queries, query_length), min(128 if keys is None or keys % 128 == 0 else keys, key_length)
    states = _states(call, (queries, tile))
    if keys is None:
        # In a step of decoding a strip is copied and read once: the narrower, the less of it is in vain.
        keys = _width(states, tile) if query_length > 1 else tile
    keys = min(keys, key_length)
    return cover(states, tile, keys, key_length), queries, keys


def _states(call: Call, block: tuple[int, int]) -> Any:
    """The states of the tiles, ``[batch|1, kv_heads|1, q_tiles, kv_tiles]``."""
    query_length, kv_heads = call.query.shape[1], call.key.shape[2]
    states = call.tiles(block).states
    if states.shape[1] > 1:
        states = _union(states.reshape(states.shape[0], kv_heads, -1, *states.shape[2:]), 2)
    if query_length == 1:  # a step of decoding, best done for all examples at once
        states = _union(states, (0, 1))[None, None]
    return states


def _union(states: Any, axis: int | tuple[int, ...]) -> Any:
    """The states of masks joined by ``|``, as far as it is FULL where each of them is."""
    some, every = (states != EMPTY).any(axis), (states == FULL).all(axis)
    return some.astype(np.int8) + every.astype(np.int8)


def _width(states: Any, tile: int) -> int:
    """How many keys are in a strip: one strip for each tile of queries, if that is known to be short enough."""
    most = 512 // tile
    if indices.is_static(states):
        there = states != EMPTY
        spans = states.shape[-1] - there.argmax(-1) - there[..., ::-1].argmax(-1)
        longest = int(np.where(there.any(-1), spans, 1).max())
        most = longest if longest * tile <= 1280 else most
    return max(most, 1) * tile
