"""What a picture of a mask shows: pairs where they fit, else tiles, in a panel for each example and head.

A large mask is drawn by its tiles, so that it is never written out to be drawn in less detail.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int8

from jaxmask import checks
from jaxmask.mask import Mask, refuse_no_mask
from jaxmask.tiles import EMPTY, FULL, PARTIAL, TileMap

Block = tuple[int, int]

STATES = {EMPTY: "EMPTY", PARTIAL: "PARTIAL", FULL: "FULL"}


@dataclass(frozen=True)
class Cells:
    """The cells of a picture: pairs, which are EMPTY or FULL, or tiles."""

    states: Int8[np.ndarray, "batch heads rows columns"]
    block: Block

    def panels(self, most: int) -> Iterator[tuple[int, int, str]]:
        """The example, the head and the title of each panel; ``most`` of them at most."""
        batch, heads = self.states.shape[:2]
        for b, h in itertools.islice(np.ndindex(batch, heads), most):
            named = (f"batch {b}", batch), (f"head {h}", heads)
            yield b, h, ", ".join(name for name, size in named if size > 1)

    def left_out(self, most: int) -> str:
        """A note that there are more panels, or nothing."""
        batch, heads = self.states.shape[:2]
        return f"the first {most} of {batch * heads:,} panels" if most < batch * heads else ""

    def summary(self) -> str:
        """The size of the tiles, and how many of them are EMPTY."""
        (queries, keys), empty, total = self.block, np.count_nonzero(self.states == EMPTY), self.states.size
        return f"tiles of {queries:,} queries by {keys:,} keys; {empty:,} of {total:,} are EMPTY ({empty / total:.1%})"


@dataclass(frozen=True)
class View:
    """A mask at the lengths and positions at which it is drawn."""

    mask: Mask
    lengths: tuple[int, int]
    # Those of offset, query_positions and key_positions that the caller gave.
    given: dict[str, Any]
    # The labels of the picture: the positions of queries and keys.
    queries: Int[np.ndarray, "batch q"]
    keys: Int[np.ndarray, "batch kv"]

    @classmethod
    def of(cls, mask: Mask, query_length: int, key_length: int | None, **positions: Any) -> "View":
        """The view that the arguments of :func:`jaxmask.draw.show` describe; refuses what cannot be drawn."""
        if not isinstance(mask, Mask):
            refuse_no_mask(mask, "mask must be a Mask")
        given = {name: value for name, value in positions.items() if value is not None}
        refuse_traced(mask=mask, **given)
        query_length = checks.length("query_length", query_length)
        lengths = query_length, query_length if key_length is None else checks.length("key_length", key_length)
        # A single tile, which is never computed, refuses bad positions before they become labels.
        states = jax.eval_shape(lambda: mask.tiles(*lengths, block=lengths, **given).states)
        starts = np.reshape(given.get("offset", 0), (-1, 1))
        queries = given.get("query_positions", starts + np.arange(lengths[0]))
        keys = given.get("key_positions", np.arange(lengths[1]))
        labels = (np.broadcast_to(positions, (states.shape[0], positions.shape[-1])) for positions in (queries, keys))
        return cls(mask, lengths, given, *labels)

    @classmethod
    def of_tiles(cls, tiles: TileMap) -> "View":
        """The view that tiles have of their mask."""
        refuse_traced(tiles=tiles)
        at = tiles.positions
        positions = {"offset": at.first} if at.queries is None else {"query_positions": at.queries}
        return cls.of(tiles.mask, at.query_length, at.key_length, **positions)

    def fit(self, block: Block, most: int) -> Cells:
        """Pairs, where there are at most ``most`` along each axis; else tiles."""
        return self.pairs() if max(self.lengths) <= most else self.tiles(block, (most, most))

    def pairs(self) -> Cells:
        """A cell for each pair of a query and a key."""
        with jax.ensure_compile_time_eval():
            allowed = np.asarray(self.mask.dense(*self.lengths, **self.given))
        return Cells(allowed * np.int8(FULL), (1, 1))

    def tiles(self, block: Block, most: tuple[int, int] | None = None) -> Cells:
        """A cell for each tile. Blocks are doubled along each axis until it has at most ``most`` of them."""
        sizes = zip(block, self.lengths, most or self.lengths, strict=True)
        queries, keys = (size << (-(-length // (size * limit)) - 1).bit_length() for size, length, limit in sizes)
        with jax.ensure_compile_time_eval():
            tiles = self.mask.tiles(*self.lengths, block=(queries, keys), **self.given)
        return Cells(np.asarray(tiles.states), tiles.block)


def refuse_traced(**arguments: Any) -> None:
    """Refuse arguments that hold a traced array."""
    for name, value in arguments.items():
        if any(map(checks.is_traced, jax.tree.leaves(value))):
            raise TypeError(f"{name} is being traced, and has no contents to draw yet: draw it outside of jit")
