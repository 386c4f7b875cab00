"""The sizes of the tiles of the GPU kernel, by dtype and dim."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


def blocks_for(dtype: Any, dim: int) -> Blocks:
    """The tiles for the larger dim of keys and values."""
    return Blocks(Block(64, 64), Block(64, 64), Block(64, 64))
