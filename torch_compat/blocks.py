"""Tiles of a mask as the ``BlockMask`` of PyTorch's FlexAttention."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Array, Bool, Int
from torch.nn.attention.flex_attention import BlockMask

from jaxmask import EMPTY, FULL, PARTIAL, Mask, TileMap, checks
from jaxmask.indices import by_example, iota, is_static, library
from jaxmask.mask import Offset
from jaxmask.tiles import in_order

# The number of tiles that are written out at once: 8 MiB of bools in tiles of 128 by 128.
_TILES_AT_ONCE = 512


def to_block_mask(tiles: TileMap, mask_mod: Callable[..., torch.Tensor] | None = None) -> BlockMask:
    """The ``BlockMask`` that ``create_block_mask`` makes of the same mask, in less time.

    ``create_block_mask`` looks at all pairs of every tile, this function only at those of PARTIAL tiles. A ragged last
    tile is never full in either.

    Args:
        tiles: what :meth:`jaxmask.Mask.tiles` returns, not traced.
        mask_mod: the mask as a function of PyTorch, which kernels call in partial tiles. By default it looks pairs up
            in a tensor of the partial tiles, which takes ``block[0] * block[1]`` bytes for each of them.

    Returns:
        A ``BlockMask`` on the CPU. ``to(device)`` moves it.

    Raises:
        TypeError: ``tiles`` is not a ``TileMap``, or it is traced.

    >>> from jaxmask import Causal
    >>> to_block_mask(Causal().tiles(256, 256)).full_kv_num_blocks
    tensor([[[0, 1]]], dtype=torch.int32)
    """
    if not isinstance(tiles, TileMap):
        raise TypeError(f"tiles must be a TileMap, as of mask.tiles(...), got {checks.describe(tiles)}")
    if any(map(checks.is_traced, jax.tree.leaves(tiles))):
        raise TypeError("tiles are traced and have no contents to hand over: call to_block_mask outside of jit")
    states = np.array(tiles.states)
    undecided = np.argwhere(states == PARTIAL)
    patterns = _written_out(tiles, undecided)
    allowed = patterns.sum(axis=(1, 2))
    states[tuple(undecided.T)] = np.where(allowed == 0, EMPTY, np.where(allowed == np.prod(tiles.block), FULL, PARTIAL))
    full = (states == FULL) & _is_whole(tiles)
    if mask_mod is None:
        mask_mod = _lookup(tiles, states, undecided, patterns)
    return BlockMask.from_kv_blocks(
        *_counted((states != EMPTY) & ~full),
        *_counted(full),
        BLOCK_SIZE=tiles.block,
        mask_mod=mask_mod,
        seq_lengths=(tiles.query_length, tiles.key_length),
    )


def _counted(chosen: Bool[np.ndarray, "batch heads q_tiles kv_tiles"]) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of chosen tiles in each row, and the tiles of each row with the chosen ones first."""
    return torch.from_numpy(chosen.sum(axis=3, dtype=np.int32)), torch.from_numpy(in_order(~chosen))


def _is_whole(tiles: TileMap) -> Bool[np.ndarray, "q_tiles kv_tiles"]:
    """The tiles that have as many queries and keys as a tile can have."""
    whole = [
        (np.arange(count) + 1) * size <= length
        for count, size, length in zip(
            tiles.states.shape[2:], tiles.block, (tiles.query_length, tiles.key_length), strict=True
        )
    ]
    return whole[0][:, None] & whole[1]


def _written_out(tiles: TileMap, places: Int[np.ndarray, "tiles 4"]) -> Bool[np.ndarray, "tiles q kv"]:
    """The pairs of the tiles at ``places``. Pairs beyond the last query or key are not allowed."""
    written = [np.zeros((0, *tiles.block), np.bool_)]
    static = is_static(tiles.mask, tiles.offset)
    lengths = tiles.query_length, tiles.key_length
    for start in range(0, len(places), _TILES_AT_ONCE):
        part = places[start : start + _TILES_AT_ONCE].astype(np.int32)
        # Few sizes, since each is another compilation.
        padding = 0 if static else max(8, 1 << (len(part) - 1).bit_length()) - len(part)
        padded = np.pad(part, ((0, padding), (0, 0)))
        pairs = (_pairs if static else _traced_pairs)(tiles.mask, tiles.offset, padded, lengths, tiles.block)
        written.append(np.asarray(pairs)[: len(part)])
    return np.concatenate(written)


def _pairs(
    mask: Mask,
    offset: Offset,
    places: Int[Array | np.ndarray, "tiles 4"],
    lengths: tuple[int, int],
    block: tuple[int, int],
) -> Bool[Array | np.ndarray, "tiles q kv"]:
    """Whether each pair of some tiles may attend. NumPy computes it where nothing is a JAX array."""
    b, h, q_tile, kv_tile = (place.reshape(-1, 1, 1, 1) for place in places.T)
    row = q_tile * block[0] + iota(block[0], 2)
    kv = kv_tile * block[1] + iota(block[1], 3)
    allowed = mask.allows(b, h, row + by_example(offset, b), kv) & (row < lengths[0]) & (kv < lengths[1])
    return library(allowed).broadcast_to(allowed, (len(places), 1, *block))[:, 0]


_traced_pairs = jax.jit(_pairs, static_argnums=(3, 4))


def _lookup(tiles: TileMap, states: Any, undecided: Any, patterns: Any) -> Callable[..., torch.Tensor]:
    """A ``mask_mod`` that looks pairs up in the pattern of their tile."""
    # Patterns 0 and 1 are those of EMPTY and FULL tiles. Each PARTIAL tile has its own.
    is_partial = states[tuple(undecided.T)] == PARTIAL
    all_patterns = np.concatenate(
        [np.zeros((1, *tiles.block), np.bool_), np.ones((1, *tiles.block), np.bool_), patterns[is_partial]]
    )
    which = (states == FULL).astype(np.int32)
    which[tuple(undecided[is_partial].T)] = 2 + np.arange(is_partial.sum())
    table, place = torch.from_numpy(all_patterns), torch.from_numpy(which)
    queries, keys = tiles.block
    batch, heads = which.shape[:2]

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        pattern = place[b % batch, h % heads, q_idx // queries, kv_idx // keys]
        return table[pattern, q_idx % queries, kv_idx % keys]

    return mask_mod
