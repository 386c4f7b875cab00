"""What a picture of a mask shows: pairs where they fit, else tiles, in a panel for each example and head.

A large mask is drawn by its tiles, so that it is never written out to be drawn in less detail.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Int8

from jaxmask import checks
from jaxmask.mask import Mask, refuse_no_mask
from jaxmask.masks import PerHead, Predicate
from jaxmask.tiles import EMPTY, FULL, PARTIAL, TileMap

Block = tuple[int, int]

STATES = {EMPTY: "EMPTY", PARTIAL: "PARTIAL", FULL: "FULL"}

# The text of each query or key, or None where its position is its label.
Texts = list[str] | None

# At most so many tiles are counted that are not drawn.
_MAX_COUNTED = 2**22


@dataclass(frozen=True)
class Cells:
    """The cells of a picture: pairs, which are EMPTY or FULL, or tiles."""

    states: Int8[np.ndarray, "batch heads rows columns"]
    block: Block

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

    @property
    def title(self) -> str:
        """The mask as a person writes it; nothing where functions of the library made it of parts of their own."""
        made = ("jaxmask.zoo.", "jaxmask.hf.")
        kinds = {type(part) for part in self.mask.parts()}
        is_written = not any(kind.__module__.startswith(made) or kind.__name__.startswith("_") for kind in kinds)
        return repr(self.mask) if is_written else ""

    def texts(self, tokens: Sequence[str] | None, key_tokens: Sequence[str] | None) -> tuple[Texts, Texts]:
        """The texts of queries and keys, checked, in characters that can be printed."""
        queries, keys = self.lengths
        if key_tokens is None and not self.given and queries == keys:
            key_tokens = tokens
        return _texts("tokens", tokens, queries, "queries"), _texts("key_tokens", key_tokens, keys, "keys")

    def panels(self, cells: Cells, most: int) -> tuple[list[tuple[int, int, str]], str]:
        """The example, the head and the title of each panel, ``most`` of them at most; a note on those left out.

        There is one for each example and head or, where these are too many, for the heads of ``PerHead`` that agree.
        """
        batch, heads = cells.states.shape[:2]
        per_head = [part.masks for part in self.mask.parts() if isinstance(part, PerHead) and len(part.masks) == heads]
        panels: list[tuple[int, int, str]] = []
        for b in range(batch):
            alike: dict[object, list[int]] = {}
            for h in range(heads):
                masks = tuple(masks[h] for masks in per_head)
                is_own = batch * heads <= most or not masks
                alike.setdefault(h if is_own else (masks, cells.states[b, h].tobytes()), []).append(h)
            for own in alike.values():
                named = (f"batch {b}", batch), (f"head{'s' * (len(own) > 1)} {_ranges(own)}", heads)
                panels.append((b, own[0], ", ".join(name for name, size in named if size > 1)))
        return panels[:most], f"the first {most} of {len(panels):,} panels" if most < len(panels) else ""

    def notes(self, asked: Block | None, drawn: Cells) -> list[str]:
        """What tiles that are drawn do not say: that others were asked for, or that nothing is known of them."""
        notes: list[str] = []
        if asked not in (None, drawn.block):
            batch, heads = drawn.states.shape[:2]
            queries, keys = (-(-length // size) for length, size in zip(self.lengths, asked, strict=True))
            if (count := math.prod((batch, heads, queries, keys))) <= _MAX_COUNTED:
                notes.append(f"asked for were {self.tiles(asked).summary()}")
            else:
                notes.append(
                    f"asked for were tiles of {asked[0]:,} queries by {asked[1]:,} keys; {count:,} are too many"
                )
        if PARTIAL in drawn.states:
            kinds = {type(part) for part in self.mask.parts() if _says_nothing_of_tiles(part)}
            notes += [
                f"{name} has no bounds, and says nothing of tiles: a PARTIAL one may be EMPTY or FULL"
                for name in sorted(kind.__name__ for kind in kinds)
            ]
        return notes

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


def _texts(name: str, tokens: object, length: int, what: str) -> Texts:
    if tokens is None:
        return None
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(
            f"{name} must be a list of str, one for each of the {length} {what}, got {checks.describe(tokens)}"
        )
    if len(tokens) != length:
        raise ValueError(f"{name} must have one str for each of the {length} {what}, got {len(tokens)}")
    # The joiner of emoji is not printed, but what it joins is.
    return [escaped(token, (c for c in token if not c.isprintable() and c != "\u200d")) for token in tokens]


def escaped(text: str, characters: Iterable[str]) -> str:
    """The text, with an escape for each of these characters."""
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in characters})


def _says_nothing_of_tiles(part: object) -> bool:
    if isinstance(part, Predicate):
        return part.bounds is None
    return isinstance(part, Mask) and type(part).tile_bounds is Mask.tile_bounds


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers in a few words: ``0-3, 7``."""
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
