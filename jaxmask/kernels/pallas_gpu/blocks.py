"""The sizes of the tiles of the GPU kernel, by dtype and dim.

They are chosen by what the compiler says of the kernel for H100 and A100, for ``Causal() & Segments(ids)`` at a length
of 4,096: of the tiles that spill no register, where there are any, the one that a model of the kernel's loops puts
first on both cards. No GPU has measured them yet. ``benchmarks/gpu.py --tune`` does, and prints rows to put here.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclass(frozen=True)
class Block:
    """A tile, and how a program of the GPU runs it; static.

    Args:
        queries, keys: the sizes of a tile, powers of 2 from 16 on.
        warps: how many groups of 32 threads a program has.
        stages: how many tiles of keys are in flight.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2

    def for_lengths(self, queries: int, keys: int) -> "Block":
        """The same, but no larger than there are queries and keys."""
        return replace(self, queries=_fitting(self.queries, queries), keys=_fitting(self.keys, keys))


def _fitting(size: int, length: int) -> int:
    return min(size, max(16, pl.next_power_of_2(length)))


class Blocks(NamedTuple):
    """The tiles of the three kernels."""

    forward: Block
    dq: Block
    dkv: Block


# By the bytes of an element, and the largest dim. Beside each tile are its registers on H100 and A100.
_TABLE = {
    (2, 64): Blocks(
        forward=Block(128, 64, warps=8),  # 113, 166
        dq=Block(128, 32, warps=8),  # 118, 128
        dkv=Block(32, 64, warps=4),  # 157, 191
    ),
    (2, 128): Blocks(
        forward=Block(128, 64, warps=8),  # 173, 253
        dq=Block(128, 32, warps=8),  # 159, 189
        # A program has 64 keys or more, or Hopper's own products of matrices, of 64 rows, are out of reach.
        dkv=Block(32, 64, warps=4),
    ),
    (2, 256): Blocks(
        forward=Block(64, 64, warps=8),  # 178, 240
        dq=Block(64, 32, warps=8),  # 190, 236
        dkv=Block(32, 64, warps=8),
    ),
    (4, 64): Blocks(
        forward=Block(64, 32, warps=4),  # 153, 154
        dq=Block(32, 32, warps=4),  # 128, 156
        dkv=Block(32, 32, warps=4),  # 168, 198
    ),
    (4, 128): Blocks(
        forward=Block(128, 32, warps=8),  # 223, 180
        dq=Block(32, 32, warps=4),  # 168, 215
        dkv=Block(32, 32, warps=4),  # 253, 255
    ),
    (4, 256): Blocks(
        forward=Block(32, 32, warps=8),  # 147, 163
        dq=Block(32, 32, warps=8),  # 239, 244
        dkv=Block(32, 32, warps=8),  # spills 428 and 364 bytes, the least that was found
    ),
}


def blocks_for(dtype: Any, dim: int) -> Blocks:
    """The tiles for the larger dim of keys and values, at most 256."""
    return next(blocks for (size, most), blocks in _TABLE.items() if size == jnp.dtype(dtype).itemsize and dim <= most)


def padded(dim: int) -> int:
    """The size of a tile along a dim: Triton has powers of 2, and multiplies no fewer than 16."""
    return max(16, pl.next_power_of_2(dim))
