"""Masks as pictures: in the terminal, by matplotlib, in a notebook.

Every picture shows a :class:`TileMap`: of tiles as small as a pair where these fit, and of larger ones where they do
not, so that a mask is never written out to be drawn in less detail.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np

from jaxmask import checks
from jaxmask.mask import KeyPositions, Mask, Offset, placed, refuse_no_mask
from jaxmask.tiles import EMPTY, FULL, PARTIAL, TileMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

Block = tuple[int, int]

# As many queries, or keys, as are drawn pair by pair; the width of a terminal is another limit.
_TERMINAL_LENGTH, _PLOT_LENGTH, _NOTEBOOK_LENGTH = 128, 512, 64
# As many examples and heads as are drawn.
_PANELS, _NOTEBOOK_PANELS = 32, 8
# Read by a notebook, where no array of the mask has a length.
_DEFAULT_LENGTH = 12

# EMPTY, PARTIAL, FULL: by lightness, so that every eye and every printer tells them apart.
_COLOURS = ("#eceef1", "#a5c3ec", "#2f6bc6")
_OUTLINES = ("#8a9099", "#e08a00", "#0b2f66")
_STROKES = (":", "--", "-")
# Points from a line of text to the next.
_LINE = 9
_STATES = {EMPTY: "EMPTY", PARTIAL: "PARTIAL", FULL: "FULL"}


def show(
    mask: Mask,
    query_length: int,
    key_length: int | None = None,
    *,
    offset: Offset | None = None,
    key_positions: KeyPositions | None = None,
    block: int | Block | None = None,
    console: "Console | None" = None,
) -> None:
    """Print a mask in the terminal: a row for each query and a column for each key, both by their positions.

    A mask that does not fit is drawn by tiles, a character for each, as small as they can be.

    Args:
        mask: what to draw; one panel for each example and head that it tells apart, of which the first 32 are drawn.
        query_length: static.
        key_length: static; ``query_length`` where it is left out.
        offset, key_positions: as in :meth:`Mask.dense`, which raises where the offset is needed and missing.
        block: number of queries and keys in a tile, or one number for both. Outlines these tiles, and says which are
            EMPTY, PARTIAL or FULL.
        console: of rich; where to print.

    Raises:
        ImportError: rich is not installed.
        TypeError: the mask is being traced, as it is inside of ``jit``.
        ValueError: the console has no room beside the labels, or :meth:`Mask.tiles` raises.
    """
    console = _console(console)
    reading = _Reading.of(mask, query_length, key_length, offset, key_positions)
    size = checks.block(1 if block is None else block)
    room = _room(console, reading)
    # A line before each tile and one after the last.
    lines = 0 if block is None else -(-reading.key_length // size[1]) + 1
    if reading.query_length <= _TERMINAL_LENGTH and reading.key_length + lines <= room:
        _print_pairs(console, reading, reading.pairs(), None if block is None else reading.tiles(size))
    else:
        # A character is about twice as high as it is wide.
        _print_tiles(console, reading, reading.tiles(_fitting(size, reading.lengths, (max(1, room // 2), room))))


def show_tiles(tiles: TileMap, console: "Console | None" = None) -> None:
    """Print tiles in the terminal, a character for each; larger ones, where there are too many.

    Args:
        tiles: the states to draw; their columns are named by the indices of keys.
        console: of rich; where to print.

    Raises:
        ImportError, TypeError, ValueError: as :func:`show`.
    """
    console = _console(console)
    reading = _Reading.of_tiles(tiles)
    room = _room(console, reading)
    *_, rows, columns = tiles.states.shape
    if rows > _TERMINAL_LENGTH or columns > room:
        tiles = reading.tiles(_fitting(tiles.block, reading.lengths, (max(1, room // 2), room)))
    _print_tiles(console, reading, replace(tiles, states=np.asarray(tiles.states)))


def plot(
    mask: Mask,
    query_length: int,
    key_length: int | None = None,
    *,
    offset: Offset | None = None,
    key_positions: KeyPositions | None = None,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    block: int | Block | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """Draw a mask by matplotlib: a row for each query and a column for each key.

    A mask of more than 512 queries or keys is drawn by tiles. Nothing of ``matplotlib.pyplot`` is used or changed.

    Args:
        mask: what to draw; one panel for each example and head that it tells apart, of which the first 32 are drawn.
        query_length: static.
        key_length: static; ``query_length`` where it is left out.
        offset, key_positions: as in :meth:`Mask.dense`, which raises where the offset is needed and missing.
        tokens: the text of each query, to stand in place of its position; and of each key, where the queries are the
            keys (as many of them, no ``offset`` and no ``key_positions``) and there are no ``key_tokens``. Characters
            that no installed font has are written as escapes.
        key_tokens: the text of each key.
        block: number of queries and keys in a tile, or one number for both. Outlines these tiles by their states.
        ax: where to draw a mask of a single panel; a new figure where it is left out.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: tokens are no list of str; the mask is being traced, as it is inside of ``jit``.
        ValueError: the number of tokens is not that of queries or keys; ``ax`` for several panels; or
            :meth:`Mask.tiles` raises.

    >>> from jaxmask import Causal
    >>> figure = plot(Causal(), 4, tokens=["The", "cat", "sat", "down"])
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['The', 'cat', 'sat', 'down']
    """
    reading = _Reading.of(mask, query_length, key_length, offset, key_positions)
    size = checks.block(1 if block is None else block)
    drawn = reading.fitting(size, _PLOT_LENGTH)
    outlined = reading.tiles(size) if block is not None and drawn.block == (1, 1) else None
    if key_tokens is None and offset is None and key_positions is None and query_length == reading.key_length:
        key_tokens = tokens
    texts = (
        _tokens("tokens", tokens, reading.query_length, "queries"),
        _tokens("key_tokens", key_tokens, reading.key_length, "keys"),
    )
    panels = _panels(drawn, _PANELS)
    if ax is None:
        figure, axes = _new_figure(repr(mask), reading, drawn, outlined, texts)
    elif len(panels) == 1:
        figure, axes = ax.get_figure(root=True), [ax]
        assert figure is not None
        ax.set(xlabel="key", ylabel="query")
        if drawn.block != (1, 1) or outlined is not None:
            ax.legend(**_legend(drawn, outlined), loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    else:
        raise ValueError(f"ax is for one panel, but {mask!r} has {len(panels)}: leave it out for a figure of them")
    for (b, h, title), panel in zip(panels, axes, strict=True):
        _draw_panel(panel, reading, drawn, outlined, b, h)
        _label(panel.yaxis, reading.queries(b), texts[0], panel.bbox.height)
        _label(panel.xaxis, reading.keys(b), texts[1], panel.bbox.width)
        if title:
            panel.set_title(title, fontsize=8)
    return figure


def html(mask: Mask) -> str:
    """A mask in a notebook: its text and a small picture, at the length of its arrays, or else of 12.

    Needs neither rich nor matplotlib. A mask that cannot be drawn, for it is being traced or fits another length alone,
    is its text.
    """
    try:
        keys = mask.shape[2]
        length = keys if keys > 1 else _DEFAULT_LENGTH
        reading = _Reading.of(mask, length, length, None, None)
        return _html(repr(mask), reading.fitting((1, 1), _NOTEBOOK_LENGTH))
    except Exception:  # whatever it is, to look at a mask must not fail
        return _code(repr(mask))


def html_tiles(tiles: TileMap) -> str:
    """Tiles in a notebook, as :func:`html` shows a mask."""
    text = f"{tiles.mask!r}.tiles({tiles.query_length}, {tiles.key_length}, block={tiles.block})"
    try:
        reading = _Reading.of_tiles(tiles)
        if max(tiles.states.shape[2:]) > _NOTEBOOK_LENGTH:
            tiles = reading.fitting(tiles.block, _NOTEBOOK_LENGTH)
        return _html(text, tiles)
    except Exception:  # as above
        return _code(text)


# What is drawn


@dataclass(frozen=True)
class _Reading:
    """A mask and where it is read. What is read is in NumPy."""

    mask: Mask
    query_length: int
    key_length: int
    offset: Any
    key_positions: Any

    @classmethod
    def of(cls, mask: Mask, query_length: int, key_length: int | None, offset: Any, key_positions: Any) -> Self:
        if not isinstance(mask, Mask):
            refuse_no_mask(mask, "mask must be a Mask")
        _refuse_traced(mask=mask, offset=offset, key_positions=key_positions)
        key_length = query_length if key_length is None else key_length
        read, at = placed(mask, query_length, key_length, offset, None, key_positions)
        return cls(
            read,
            query_length,
            key_length,
            at.start,
            None if key_positions is None else np.atleast_2d(np.asarray(key_positions)),
        )

    @classmethod
    def of_tiles(cls, tiles: TileMap) -> Self:
        _refuse_traced(tiles=tiles)
        return cls(tiles.mask, tiles.query_length, tiles.key_length, tiles.offset, None)

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query_length, self.key_length

    def fitting(self, block: Block, most: int) -> TileMap:
        """Pairs, where no more than ``most`` are along an axis; else tiles."""
        return self.pairs() if max(self.lengths) <= most else self.tiles(_fitting(block, self.lengths, (most, most)))

    def pairs(self) -> TileMap:
        """Tiles of one pair each, read from ``dense``, which knows of each whether it is allowed."""
        with jax.ensure_compile_time_eval():
            allowed = np.asarray(self.mask.dense(*self.lengths, offset=self.offset))
        return TileMap(allowed * np.int8(FULL), self.mask, self.offset, *self.lengths, (1, 1))

    def tiles(self, block: Block) -> TileMap:
        with jax.ensure_compile_time_eval():
            tiles = self.mask.tiles(*self.lengths, block=block, offset=self.offset)
        return replace(tiles, states=np.asarray(tiles.states))

    def queries(self, b: int) -> Sequence[int]:
        """The position of each query of an example."""
        first = np.asarray(self.offset).reshape(-1)
        start = int(first[min(b, first.size - 1)])
        return range(start, start + self.query_length)

    def keys(self, b: int) -> Sequence[int]:
        """The position of each key of an example."""
        if self.key_positions is None:
            return range(self.key_length)
        return self.key_positions[min(b, len(self.key_positions) - 1)]


def _refuse_traced(**arguments: Any) -> None:
    for name, value in arguments.items():
        if any(map(checks.is_traced, jax.tree.leaves(value))):
            raise TypeError(f"{name} is being traced, and has no contents to draw yet: draw it outside of jit")


def _fitting(block: Block, lengths: tuple[int, int], most: tuple[int, int]) -> Block:
    """``block``, doubled along each axis until no more tiles than fit cover its length."""
    fitting = list(block)
    for axis in (0, 1):
        while -(-lengths[axis] // fitting[axis]) > most[axis]:
            fitting[axis] *= 2
    return fitting[0], fitting[1]


def _panels(tiles: TileMap, most: int) -> list[tuple[int, int, str]]:
    """The example, the head and the title of each panel that is drawn."""
    batch, heads = tiles.states.shape[:2]
    axes = (("batch", batch), ("head", heads))
    return [
        (b, h, ", ".join(f"{name} {i}" for (name, size), i in zip(axes, (b, h), strict=True) if size > 1))
        for b, h in itertools.islice(np.ndindex(batch, heads), most)
    ]


def _left_out(tiles: TileMap, drawn: int) -> str:
    batch, heads = tiles.states.shape[:2]
    return f"the first {drawn} of {batch * heads:,} panels" if drawn < batch * heads else ""


def _tile_summary(tiles: TileMap) -> str:
    queries, keys = tiles.block
    empty, total = int(tiles.counts[EMPTY]), tiles.states.size
    return f"tiles of {queries:,} queries by {keys:,} keys; {empty:,} of {total:,} are EMPTY ({empty / total:.1%})"


# In the terminal


def _console(console: "Console | None") -> "Console":
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('show needs rich: pip install "jaxmask[cli]"') from error
    return Console() if console is None else console


def _margin(reading: _Reading) -> int:
    """Columns for the positions of the queries and a gap."""
    return max(len(str(reading.queries(b)[i])) for b in range(np.size(reading.offset)) for i in (0, -1)) + 2


def _room(console: "Console", reading: _Reading) -> int:
    """Columns for keys."""
    margin = _margin(reading)
    if console.width <= margin:
        raise ValueError(f"a console of {console.width} columns has no room for keys beside the positions of queries")
    return console.width - margin


Fragment = tuple[str, str]
_DIM = "bright_black"


def _glyphs(console: "Console") -> tuple[list[Fragment], list[Fragment], tuple[str, str, str, str]]:
    """What stands for a pair that may not attend and one that may; for EMPTY, PARTIAL and FULL; and for lines.

    They are distinct without colour. A console that is not UTF-8 cannot print the better ones.
    """
    pairs, states, lines = (
        (".#", ".:#", ("+++-", "+++-", "+++-", "|"))
        if console.options.ascii_only
        else ("·■", "·▒█", ("┌┬┐─", "├┼┤─", "└┴┘─", "│"))
    )
    styles = (_DIM, "yellow", "bold cyan")
    return list(zip(pairs, styles[::2], strict=True)), list(zip(states, styles, strict=True)), lines


def _print_pairs(console: "Console", reading: _Reading, pairs: TileMap, outlined: TileMap | None) -> None:
    (no, yes), states, (top, middle, bottom, bar) = _glyphs(console)
    margin = _margin(reading)
    columns = reading.key_length
    block = reading.lengths if outlined is None else outlined.block
    tiles = -(-columns // block[1])
    spaced = 2 * columns - 1 if outlined is None else 2 * (columns + tiles) + 1
    gap = " " if spaced <= console.width - margin else ""

    def line(label: str, cells: list[Fragment], bar: str) -> list[Fragment]:
        fragments = [(f"{label:>{margin - 2}}  ", _DIM)]
        for j, (glyph, style) in enumerate(cells):
            if outlined is not None and j % block[1] == 0:
                fragments.append((bar + gap, _DIM))
            fragments.append((glyph + gap, style))
        return fragments if outlined is None else [*fragments, (bar, _DIM)]

    def rule(ends: str, marks: list[Fragment]) -> list[Fragment]:
        left, cross, right, dash = ends
        fragments = [(" " * margin, _DIM)]
        for tile, mark in enumerate(marks):
            size = min(block[1], columns - tile * block[1])
            rest = size - 1 + (size + 1) * len(gap)
            fragments += [(cross if tile else left, _DIM), mark, (dash * rest, _DIM)]
        return [*fragments, (right, _DIM)]

    for b, h, title in _panels(pairs, _PANELS):
        # Positions of keys stand upright, a digit to a row.
        keys = [str(key) for key in reading.keys(b)]
        longest = max(map(len, keys))
        digits = zip(*(key.rjust(longest) for key in keys), strict=True)
        picture = [line("", [(digit, _DIM) for digit in row], " ") for row in digits]
        for i, (query, row) in enumerate(zip(reading.queries(b), pairs.states[b, h], strict=True)):
            if outlined is not None and i % block[0] == 0:
                marks = [states[state] for state in outlined.states[b, h, i // block[0]]]
                picture.append(rule(middle if i else top, marks))
            picture.append(line(str(query), [yes if cell else no for cell in row], bar))
        if outlined is not None:
            picture.append(rule(bottom, [(bottom[-1], _DIM)] * tiles))
        _print_panel(console, title, picture)
    allowed, total = int(pairs.counts[FULL]), pairs.states.size
    _print_line(console, [yes, (" may attend, ", ""), no, (f" may not: {allowed:,} of {total:,} pairs may attend", "")])
    if outlined is not None:
        _print_legend(console, states, outlined)
    _print_axes(console, pairs)


def _print_tiles(console: "Console", reading: _Reading, tiles: TileMap) -> None:
    _, states, _ = _glyphs(console)
    margin = _margin(reading)
    room = console.width - margin
    columns = tiles.states.shape[3]
    # A character is about twice as high as it is wide: two of them are a square.
    width = 2 if 2 * columns <= room else 1
    (empty, dim), *others = states
    cells = [(empty.ljust(width), dim), *((glyph * width, style) for glyph, style in others)]
    for b, h, title in _panels(tiles, _PANELS):
        keys = [str(key) for key in reading.keys(b)[:: tiles.block[1]]]
        picture = [[(" " * margin + _ruler(keys, width, room), _DIM)]]
        for query, row in zip(reading.queries(b)[:: tiles.block[0]], tiles.states[b, h], strict=True):
            picture.append([(f"{query:>{margin - 2}}  ", _DIM), *(cells[state] for state in row)])
        _print_panel(console, title, picture)
    _print_legend(console, states, tiles)
    _print_axes(console, tiles)


def _ruler(labels: list[str], width: int, room: int) -> str:
    """As many labels as have room, at equal distances, each where its column begins."""
    step = 1
    while step * width <= max(map(len, labels)):
        step *= 2
    ruler = ""
    for column in range(0, len(labels), step):
        if column * width + len(labels[column]) <= room:
            ruler = ruler.ljust(column * width) + labels[column]
    return ruler


def _print_legend(console: "Console", states: list[Fragment], tiles: TileMap) -> None:
    named = zip(states, _STATES.values(), strict=True)
    _print_line(console, [(f"{glyph} {name}  ", style) for (glyph, style), name in named])
    _print_line(console, [(_tile_summary(tiles), "")])


def _print_panel(console: "Console", title: str, picture: list[list[Fragment]]) -> None:
    if title:
        _print_line(console, [(title, "bold")])
    for fragments in picture:
        _print_line(console, fragments)


def _print_axes(console: "Console", drawn: TileMap) -> None:
    _print_line(console, [("rows are positions of queries, columns of keys", _DIM)])
    if _left_out(drawn, _PANELS):
        _print_line(console, [(_left_out(drawn, _PANELS), _DIM)])


def _print_line(console: "Console", fragments: list[Fragment]) -> None:
    from rich.text import Text

    text = Text()
    for style, run in itertools.groupby(fragments, key=lambda fragment: fragment[1]):
        text.append("".join(part for part, _ in run), style)
    text.rstrip()
    console.print(text)


# By matplotlib


def _new_figure(
    title: str,
    reading: _Reading,
    drawn: TileMap,
    outlined: TileMap | None,
    texts: tuple[list[str] | None, list[str] | None],
) -> "tuple[Figure, list[Axes]]":
    """A figure with axes for each panel, of a size that suits them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "jaxmask[plot]"') from error

    heads = drawn.states.shape[1]
    count = len(_panels(drawn, _PANELS))
    columns = heads if 1 < heads <= 8 else min(count, 4)
    rows = -(-count // columns)
    # In inches: the cells, those that have a text not too small for it; beside them their labels.
    longest = max(reading.lengths)
    side = 4.2 if count == 1 else 2.2
    if any(texts):
        side = min(max(0.18 * longest, side), 12.0)
    last = [str(reading.queries(0)[-1])]
    left, below = (0.4 + 0.06 * min(max(map(len, text)), 24) for text in (texts[0] or last, texts[1] or [""]))
    legend = _legend(drawn, outlined)
    width = max(columns * (left + max(side * reading.key_length / longest, 1.0)), 4.7)
    lines = wrap(title, int(14 * width), max_lines=3, placeholder=" ...")
    height = rows * (below + max(side * reading.query_length / longest, 0.4) + 0.2 * (count > 1))
    height += 0.5 + 0.15 * len(lines) + 0.15 * len(legend["title"].splitlines())

    figure = Figure((width, height), layout="constrained", dpi=110)
    figure.suptitle("\n".join(lines), family="monospace", fontsize=8, parse_math=False)
    figure.legend(**legend, loc="outside lower center", ncols=5)
    axes = [figure.add_subplot(rows, columns, panel + 1) for panel in range(count)]
    same_positions = np.size(reading.offset) == 1 and (reading.key_positions is None or len(reading.key_positions) == 1)
    for panel, ax in enumerate(axes):
        # To name what the panels of a row, or of a column, share once will do.
        first, lowest = panel % columns == 0, panel + columns >= count
        ax.set(xlabel="key" if lowest else "", ylabel="query" if first else "")
        if same_positions:
            ax.tick_params(labelleft=first, labelbottom=lowest)
    # Without pyplot, a notebook knows no other way to show a figure.
    setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010
    return figure, axes


def _draw_panel(ax: "Axes", reading: _Reading, drawn: TileMap, outlined: TileMap | None, b: int, h: int) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import ListedColormap

    queries, keys = reading.lengths
    states = drawn.states[b, h]
    # In units of queries and keys, whatever the size of a cell.
    rows, columns = (np.arange(count + 1) * size - 0.5 for count, size in zip(states.shape, drawn.block, strict=True))
    extent = (columns[0], columns[-1], rows[-1], rows[0])
    ax.imshow(states, cmap=ListedColormap(_COLOURS), vmin=EMPTY, vmax=FULL, extent=extent, origin="upper")
    ax.grid(visible=False)
    if max(states.shape) <= 64:
        width = min(1.2, 24 / max(states.shape))
        ax.hlines(rows, columns[0], columns[-1], color="white", linewidth=width)
        ax.vlines(columns, rows[0], rows[-1], color="white", linewidth=width)
    if outlined is not None:
        tiles = outlined.states[b, h]
        for state in (EMPTY, PARTIAL, FULL):
            corners = [_outline(tile, outlined.block, reading.lengths) for tile in np.argwhere(tiles == state)]
            width = max(0.6, min(1.4, 14 / max(tiles.shape))) * (0.7 if state == EMPTY else 1)
            outlines = PolyCollection(corners, facecolor="none", edgecolor=_OUTLINES[state], linewidth=width)
            outlines.set_linestyle(_STROKES[state])
            ax.add_collection(outlines)
    # The last tiles may reach beyond the last query and key.
    aspect = "equal" if max(queries, keys) <= 8 * min(queries, keys) else "auto"
    ax.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5), aspect=aspect)
    ax.tick_params(length=0, labelsize=7, labelcolor="#555555")
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(fontsize=8, color="#555555")
    ax.spines[:].set_visible(False)


def _outline(tile: Any, block: Block, lengths: tuple[int, int]) -> Any:
    """The corners of a tile, a little inside of it, so that neighbours are seen beside each other."""
    inset = 0.04 * min(block)
    (top, left), (bottom, right) = tile * block, np.minimum((tile + 1) * block, lengths)
    top, left, bottom, right = top - 0.5 + inset, left - 0.5 + inset, bottom - 0.5 - inset, right - 0.5 - inset
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _label(axis: Any, positions: Sequence[int], text: list[str] | None, pixels: float) -> None:
    """Name the queries or keys along an axis, as many as have room, by text or by position."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if text is None:
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 4, 5, 10]))
        axis.set_major_formatter(FuncFormatter(partial(_position, positions)))
        return
    texts, families = _legible(text)
    room = int(pixels * 72 / axis.get_figure(root=True).dpi / _LINE)
    ticks = range(0, len(text), -(-len(text) // max(1, room)))
    axis.set_major_locator(FixedLocator(ticks))
    upright = axis.axis_name == "x" and max(map(len, texts)) > 2
    axis.set_ticklabels([texts[i] for i in ticks], family=families, parse_math=False, rotation=90 if upright else 0)


def _position(positions: Sequence[int], index: float, _: object) -> str:
    return str(positions[int(index)]) if index in range(len(positions)) else ""


def _tokens(name: str, tokens: object, length: int, of: str) -> list[str] | None:
    if tokens is None:
        return None
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(
            f"{name} must be a list of str, one for each of the {length} {of}, got {checks.describe(tokens)}"
        )
    if len(tokens) != length:
        raise ValueError(f"{name} must have one str for each of the {length} {of}, got {len(tokens)}")
    return list(tokens)


def _legible(texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts that can be drawn without a warning, and the families of fonts that have all of their characters."""
    from matplotlib import font_manager

    usual = font_manager.FontProperties()
    families = list(usual.get_family())
    characters = set("".join(texts))
    missing = {c for c in characters if c.isprintable()} - _drawable(characters, font_manager.findfont(usual))
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        # A font of last resort draws a box for every character; a font that is gone may still be listed.
        if missing and "Resort" not in font.name and Path(font.fname).is_file():
            found = _drawable(missing, font.fname)
            missing -= found
            families += [font.name] if found else []
    escapes = {ord(c): c.encode("unicode_escape").decode() for c in characters if c in missing or not c.isprintable()}
    texts = [text.translate(escapes) for text in texts]
    return [text if len(text) <= 24 else f"{text[:21]}..." for text in texts], families


def _drawable(characters: set[str], path: str) -> set[str]:
    """Those of the characters that a font has."""
    from matplotlib.font_manager import get_font

    font = get_font(path)
    return {character for character in characters if font.get_char_index(ord(character))}


def _legend(drawn: TileMap, outlined: TileMap | None) -> dict[str, Any]:
    """The arguments of a legend: what the colours and the outlines are."""
    from matplotlib.patches import Patch

    names = {EMPTY: "may not attend", FULL: "may attend"} if drawn.block == (1, 1) else _STATES
    handles = [Patch(facecolor=_COLOURS[state], label=name) for state, name in reversed(names.items())]
    if outlined is not None:
        handles += [
            Patch(fill=False, edgecolor=_OUTLINES[state], linestyle=_STROKES[state], linewidth=1.4, label=name)
            for state, name in reversed(_STATES.items())
        ]
    notes = [_tile_summary(tiles) for tiles in (drawn, outlined) if tiles is not None and tiles.block != (1, 1)]
    notes.append(_left_out(drawn, _PANELS))
    return {
        "handles": handles,
        "title": "\n".join(filter(None, notes)),
        "frameon": False,
        "fontsize": 8,
        "title_fontsize": 8,
        "handlelength": 1.0,
        "handleheight": 1.0,
    }


def _png(figure: "Figure") -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# In a notebook


def _code(text: str) -> str:
    return f'<code style="white-space: pre-wrap; overflow-wrap: anywhere">{escape(text)}</code>'


def _html(text: str, tiles: TileMap) -> str:
    panels, states = _panels(tiles, _NOTEBOOK_PANELS), np.asarray(tiles.states)
    if tiles.block == (1, 1) and PARTIAL not in states:
        legend = f"{_swatch(FULL)} may attend, {_swatch(EMPTY)} may not"
    else:
        legend = ", ".join(f"{_swatch(state)} {name}" for state, name in reversed(_STATES.items()))
        legend += f": {escape(_tile_summary(tiles))}"
    notes = [
        f"{tiles.query_length:,} queries (rows), {tiles.key_length:,} keys (columns)",
        legend,
        _left_out(tiles, len(panels)),
    ]
    pictures = "".join(
        f"<div>{f'<small>{title}</small><br/>' if title else ''}{_svg(states[b, h])}</div>" for b, h, title in panels
    )
    return (
        f"<div>{_code(text)}"
        f'<div style="display: flex; flex-wrap: wrap; gap: 1em; margin: 0.5em 0">{pictures}</div>'
        f"<small>{'<br/>'.join(filter(None, notes))}</small></div>"
    )


def _swatch(state: int) -> str:
    return f'<svg width="10" height="10" viewBox="0 0 1 1">{_cells([(0, 0, 1)], state)}</svg>'


def _svg(states: Any) -> str:
    """States as a picture that has no background, to be seen on a light page and on a dark one."""
    rows, columns = states.shape
    size = min(14.0, 224 / max(rows, columns))
    runs: dict[int, list[tuple[int, int, int]]] = {EMPTY: [], PARTIAL: [], FULL: []}
    for row, line in enumerate(states):
        starts = [0, *(np.flatnonzero(np.diff(line)) + 1), columns]
        for start, end in itertools.pairwise(starts):
            runs[int(line[start])].append((row, int(start), int(end - start)))
    cells = "".join(_cells(found, state) for state, found in runs.items() if found)
    return (
        f'<svg role="img" width="{columns * size:g}" height="{rows * size:g}" viewBox="0 0 {columns} {rows}">'
        f"<title>rows are queries, columns are keys</title>{cells}</svg>"
    )


def _cells(runs: list[tuple[int, int, int]], state: int) -> str:
    """Runs of equal cells ``(row, column, length)``: lines as thick as a cell, dashed to part the cells of a run."""
    path = "".join(f"M{column} {row}.5h{length}" for row, column, length in runs)
    colour, opacity = (("currentColor", 0.12), ("#4a86dd", 0.5), ("#4a86dd", 1))[state]
    stroke = f'stroke="{colour}" stroke-opacity="{opacity}" stroke-width="0.92" stroke-dasharray="0.92 0.08"'
    return f'<path d="{path}" {stroke}/>'


Mask._repr_html_ = html
TileMap._repr_html_ = html_tiles
TileMap.show = show_tiles
