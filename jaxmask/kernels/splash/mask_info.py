"""Splash attention's ``MaskInfo`` from the tiles of a mask: which tiles run, in which order, and their pairs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Int

from jaxmask import reading
from jaxmask.indices import by_batch, common, iota, is_static, library
from jaxmask.kernels.splash.decide import MaskFunction
from jaxmask.mask import Full, Mask, without_arrays
from jaxmask.positions import Positions
from jaxmask.tiles import EMPTY, FULL, PARTIAL


@dataclass(frozen=True)
class TiledMask:
    """A mask at its positions, the remainder beside segment ids, and how the pairs of the remainder are decided.

    Args:
        mask, remainder: the remainder is what segment ids do not say of the mask.
        at: positions of the queries and keys.
        sizes: numbers of examples and heads.
        remainder_sizes: how many of them the remainder tells apart.
        q_sequence, mask_function: splash's own, where the remainder is computed in the kernel.
        is_traced: whether the remainder, or a function in it, holds arrays whose contents are not known.
        partial_tiles: how many PARTIAL tiles an example has at most, if the user says so.
    """

    mask: Mask
    remainder: Mask
    at: Positions
    sizes: tuple[int, int]
    remainder_sizes: tuple[int, int]
    q_sequence: Int[Array | np.ndarray, "batch q"] | None
    mask_function: MaskFunction | None
    is_traced: bool
    partial_tiles: int | None

    def states(self, block: tuple[int, int], *, remainder: bool = False, static: bool = False) -> Any:
        """The states of tiles, ``[batch|1, heads|1, q_tiles, kv_tiles]``; in NumPy where they are static.

        Args:
            block: number of queries and keys in a tile.
            remainder: whether they are of the remainder, for all examples and heads that it tells apart.
            static: whether to take JAX arrays for unknown, so that the states are static.
        """
        mask = self.remainder if remainder else self.mask
        mask = without_arrays(mask) if static else mask
        if static and not is_static(self.at):
            tiles = self.at.query_length // block[0], self.at.key_length // block[1]
            states: Any = np.full((1, 1, *tiles), PARTIAL, np.int8)
        elif is_static(mask, self.at):
            # A predicate may compute its bounds by JAX, in the middle of a trace.
            with jax.ensure_compile_time_eval():
                states = np.asarray(reading.states(mask, self.at, block, self.sizes))
        else:
            states = reading.states(mask, self.at, block, self.sizes)
        if not remainder:
            return states
        sizes = map(common, states.shape, self.remainder_sizes)
        return library(states).broadcast_to(states, (*sizes, *states.shape[2:]))


def mask_info(
    tiled: TiledMask, block_q: int | None, block_kv: int | None, *, by_key: bool = False, shrink: bool = True
) -> tuple[MaskInfo, Bool[Array | np.ndarray, "batch"]]:
    """What a kernel of splash attention asks of a mask, and which examples have more PARTIAL tiles than there is room.

    The kernels for the output and for ``dq`` go by tiles of queries, over the tiles of keys of each. The kernel for
    ``dk`` and ``dv`` goes by tiles of keys, over the tiles of queries of each. Here all go by rows, over columns.

    Args:
        tiled: the mask.
        block_q, block_kv: number of queries and keys in a tile.
        by_key: whether rows are tiles of keys.
        shrink: whether the grid is only as wide as the longest row of tiles that may run.

    Returns:
        Splash's own dataclass, whose arrays have a leading axis ``[batch|1]``, and a bool for each example.
    """
    assert block_q is not None
    assert block_kv is not None
    block = block_q, block_kv

    def turned(tiles: Any) -> Any:
        return tiles.swapaxes(2, 3) if by_key else tiles

    runs = turned(tiled.states(block)) != EMPTY
    # The grid is static, so that it holds every tile that may run.
    may_run = turned((tiled.states(block, static=True) != EMPTY).any(0, keepdims=True))
    remainder = turned(tiled.states(block, remainder=True))
    xp = library(runs, remainder)
    # Segment ids are compared in every tile that runs, so that the remainder alone makes a tile PARTIAL.
    states = xp.where(runs, remainder, EMPTY)

    # The columns of each row that run, in order, to the left or, by key, to the right: as splash has them.
    columns = states.shape[3]
    width = max(1, int(may_run.sum(3).max())) if shrink else columns
    if not shrink:
        order = xp.broadcast_to(np.arange(columns), states.shape)
    elif by_key:
        order = xp.argsort(states != EMPTY, axis=3, stable=True)[..., columns - width :]
    else:
        order = xp.argsort(states == EMPTY, axis=3, stable=True)[..., :width]
    states = xp.take_along_axis(states, order, 3)
    # A step that does not run fetches what the next one that does will need.
    needed = xp.take_along_axis(order, xp.argmax(states != EMPTY, axis=3, keepdims=True), 3)
    data_next = xp.where(states != EMPTY, order, needed if by_key else xp.roll(needed, -1, axis=2))

    mask_next = blocks = None
    overflows: Any = np.zeros(1, np.bool_)
    if tiled.mask_function is None and not isinstance(tiled.remainder, Full):
        is_partial = may_run & (remainder == PARTIAL)
        if tiled.is_traced or not is_static(tiled.at):
            may_be = may_run & (turned(tiled.states(block, remainder=True, static=True)) == PARTIAL)
            room = max(1, min(tiled.partial_tiles or may_be.size, int(may_be.sum((1, 2, 3)).max())))
            blocks, numbers, overflows = _traced_blocks(tiled, is_partial, block, by_key, room)
        else:
            blocks, numbers = _static_blocks(tiled, is_partial, block, by_key)
        mask_next = turned(_small(xp.take_along_axis(numbers, order, 3), blocks.shape[1]))
    q_sequence: Any = tiled.q_sequence
    data_next, block_mask = turned(_small(data_next, columns)), turned(_small(states, FULL + 1))
    return MaskInfo(data_next, mask_next, block_mask, blocks, q_sequence), overflows


def _static_blocks(tiled: TiledMask, is_partial: Any, block: tuple[int, int], by_key: bool) -> tuple[Any, Any]:
    """The pairs of the PARTIAL tiles, equal ones once, ``[1, count, *block]``, and the number of each tile's block.

    ``is_partial`` and the numbers are ``[batch|1, heads|1, rows, columns]``. A tile that is not PARTIAL has the number
    of the next one that is, because splash fetches it early.
    """
    blocks: dict[bytes, tuple[int, Any]] = {}
    numbers: list[int] = []
    with jax.ensure_compile_time_eval():
        mask, first = jax.tree.map(jnp.asarray, (tiled.remainder, by_batch(tiled.at.start)))
        for coordinates in np.argwhere(is_partial):
            pairs = np.asarray(_pairs(mask, first, coordinates, block, by_key))
            number, _ = blocks.setdefault(pairs.tobytes(), (len(blocks), pairs))
            numbers.append(number)
    if not blocks:
        return np.zeros((1, 1, *(block[::-1] if by_key else block)), np.bool_), np.zeros(is_partial.shape, np.int32)
    ranks = _ranks(is_partial.ravel(), len(numbers)).reshape(is_partial.shape)
    return np.stack([pairs for _, pairs in blocks.values()])[None], np.array(numbers)[ranks]


def _traced_blocks(
    tiled: TiledMask, is_partial: Any, block: tuple[int, int], by_key: bool, room: int
) -> tuple[Any, Any, Any]:
    """As :func:`_static_blocks`, with ``room`` for the tiles of each example, and which examples have more."""
    batch, *shape = is_partial.shape
    first = by_batch(tiled.at.start)

    def of_example(b: Any, is_partial: Any) -> tuple[Any, Any, Any]:
        tiles = jnp.argsort(~is_partial, stable=True)[:room]
        coordinates = jnp.stack([jnp.full(room, b), *jnp.unravel_index(tiles, shape)], axis=1)
        blocks = jax.vmap(lambda tile: _pairs(tiled.remainder, first, tile, block, by_key))(coordinates)
        return blocks, _ranks(is_partial, room).reshape(shape), is_partial.sum() > room

    return jax.vmap(of_example)(np.arange(batch), jnp.asarray(is_partial).reshape(batch, -1))


@partial(jax.jit, static_argnames=("block", "by_key"))
def _pairs(
    mask: Mask, first: Any, coordinates: Any, block: tuple[int, int], by_key: bool
) -> Bool[Array, "rows columns"]:
    """The pairs of the tile at ``(b, h, row, column)``."""
    b, h, row, column = coordinates
    q_tile, kv_tile = (column, row) if by_key else (row, column)
    q = first[jnp.minimum(b, first.shape[0] - 1)] + q_tile * block[0] + iota(block[0], 2)
    kv = kv_tile * block[1] + iota(block[1], 3)
    allowed = mask.allows(b.reshape(1, 1, 1, 1), h.reshape(1, 1, 1, 1), q, kv)
    pairs = jnp.broadcast_to(allowed, (1, 1, *block)).reshape(block)
    return pairs.T if by_key else pairs


def _ranks(is_partial: Any, count: int) -> Any:
    """For each tile in order, how many PARTIAL ones come before it, and at most ``count - 1``."""
    return library(is_partial).minimum(is_partial.cumsum() - is_partial, count - 1)


def _small(numbers: Any, count: int) -> Any:
    """Numbers less than ``count`` in the smallest type, because splash keeps them in its little scalar memory."""
    return numbers.astype(np.min_scalar_type(-count))
