"""Masks and tiles in the terminal, by rich."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxmask import checks
from jaxmask.draw.picture import STATES, Block, Cells, View
from jaxmask.mask import KeyPositions, Mask, Offset, QueryPositions
from jaxmask.tiles import EMPTY, FULL, TileMap

if TYPE_CHECKING:
    from rich.console import Console

# At most so many queries are drawn pair by pair, as many keys as the console has room for, and at most so many panels.
_MAX_QUERIES, _MAX_PANELS = 128, 32

# A text and its style.
Fragment = tuple[str, str]
Line = list[Fragment]

_DIM = "bright_black"
# For EMPTY, PARTIAL and FULL.
_STYLES = (_DIM, "yellow", "bold cyan")
_BOX = "┌┬┐", "├┼┤", "└┴┘", "─", "│"


def show(
    mask: Mask,
    query_length: int,
    key_length: int | None = None,
    *,
    offset: Offset | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    block: int | Block | None = None,
    console: "Console | None" = None,
) -> None:
    """Print a mask in the terminal: a row for each query and a column for each key, labelled by their positions.

    A mask that does not fit is drawn by its tiles, a character for each. They are as small as the console allows.

    Args:
        mask: the mask to draw, in one panel for each example and head that it tells apart, 32 panels at most.
        query_length: static.
        key_length: static; ``query_length`` where it is left out.
        offset, query_positions, key_positions: as in :meth:`Mask.dense`.
        block: number of queries and keys in a tile, or one number for both. These tiles are outlined, and each outline
            says whether its tile is EMPTY, PARTIAL or FULL.
        console: the rich console to print to.

    Raises:
        ImportError: rich is not installed.
        TypeError: the mask is traced, as it is inside a ``jit``.
        ValueError: the console has no room beside the labels, or :meth:`Mask.tiles` raises.

    >>> from rich.console import Console
    >>> from jaxmask import Causal
    >>> show(Causal(), 2, console=Console(width=80))
       0 1
    0  ■ ·
    1  ■ ■
    ■ may attend, · may not: 3 of 4 pairs may attend
    rows are positions of queries, columns of keys
    """
    console = _console(console)
    positions = {"offset": offset, "query_positions": query_positions, "key_positions": key_positions}
    view = View.of(mask, query_length, key_length, **positions)
    size = checks.block(1 if block is None else block)
    margin = _margin(console, view)
    room = console.width - margin
    # A bar before each outlined tile and one after the last.
    bars = 0 if block is None else -(-view.lengths[1] // size[1]) + 1
    if view.lengths[0] <= _MAX_QUERIES and view.lengths[1] + bars <= room:
        _print_pairs(console, margin, view, None if block is None else view.tiles(size))
    else:
        # A character is about twice as high as it is wide.
        _print_tiles(console, margin, view, view.tiles(size, (max(1, room // 2), room)))


def show_tiles(tiles: TileMap, console: "Console | None" = None) -> None:
    """Print tiles in the terminal, a character for each. Where there are too many, larger tiles are printed.

    Args:
        tiles: the tiles to draw. Columns are labelled by the indices of keys.
        console: the rich console to print to.

    Raises:
        ImportError, TypeError, ValueError: as :func:`show`.
    """
    console = _console(console)
    view = View.of_tiles(tiles)
    margin = _margin(console, view)
    room = console.width - margin
    *_, rows, columns = tiles.states.shape
    cells = Cells(np.asarray(tiles.states), tiles.block)
    if rows > _MAX_QUERIES or columns > room:
        cells = view.tiles(tiles.block, (max(1, room // 2), room))
    _print_tiles(console, margin, view, cells)


def _console(console: "Console | None") -> "Console":
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('show needs rich: pip install "jaxmask[cli]"') from error
    return Console() if console is None else console


def _margin(console: "Console", view: View) -> int:
    """Columns for the positions of queries and a gap."""
    margin = max(len(str(position)) for position in (view.queries.min(), view.queries.max())) + 2
    if console.width <= margin:
        raise ValueError(f"a console of {console.width} columns has no room for keys beside the positions of queries")
    return margin


def _print_pairs(console: "Console", margin: int, view: View, tiles: Cells | None) -> None:
    """Print a character for each pair, in outlines of ``tiles``."""
    cells, states = view.pairs(), _glyphs(console)
    no, yes = states[EMPTY], ("#" if console.options.ascii_only else "■", _STYLES[FULL])
    top, middle, bottom, dash, bar = ("+++", "+++", "+++", "-", "|") if console.options.ascii_only else _BOX
    length = view.lengths[1]
    height, width = view.lengths if tiles is None else tiles.block
    starts = range(0, length, width)
    spaced = 2 * length - 1 if tiles is None else 2 * (length + len(starts)) + 1
    gap = " " if spaced <= console.width - margin else ""

    def row(label: str, glyphs: Iterable[Fragment], bar: str) -> Line:
        line = [(f"{label:>{margin - 2}}  ", _DIM)]
        for j, (glyph, style) in enumerate(glyphs):
            if tiles is not None and j in starts:
                line.append((bar + gap, _DIM))
            line.append((glyph + gap, style))
        return line if tiles is None else [*line, (bar, _DIM)]

    def rule(corners: str, marks: Iterable[Fragment]) -> Line:
        left, cross, right = corners
        line = [(" " * margin, _DIM)]
        for start, mark in zip(starts, marks, strict=True):
            size = min(width, length - start)
            line += [(cross if start else left, _DIM), mark, (dash * (size - 1 + (size + 1) * len(gap)), _DIM)]
        return [*line, (right, _DIM)]

    def panel(b: int, h: int) -> Iterator[Line]:
        # Positions of keys stand upright, a digit to a row.
        labels = [str(key) for key in view.keys[b]]
        longest = max(map(len, labels))
        for digits in zip(*(label.rjust(longest) for label in labels), strict=True):
            yield row("", ((digit, _DIM) for digit in digits), " ")
        for i, query in enumerate(view.queries[b]):
            if tiles is not None and i % height == 0:
                yield rule(middle if i else top, (states[state] for state in tiles.states[b, h, i // height]))
            yield row(str(query), (yes if state else no for state in cells.states[b, h, i]), bar)
        if tiles is not None:
            yield rule(bottom, [(dash, _DIM)] * len(starts))

    allowed = f" may not: {np.count_nonzero(cells.states):,} of {cells.states.size:,} pairs may attend"
    legend = [[yes, (" may attend, ", ""), no, (allowed, "")]]
    _print(console, cells, panel, legend if tiles is None else [*legend, *_legend(states, tiles)])


def _print_tiles(console: "Console", margin: int, view: View, tiles: Cells) -> None:
    """Print a character for each tile or, where there is room, two of them, which make a square."""
    states, room = _glyphs(console), console.width - margin
    width = 2 if 2 * tiles.states.shape[3] <= room else 1
    # An empty tile remains a single dot.
    glyphs = [(glyph * width if state else glyph.ljust(width), style) for state, (glyph, style) in enumerate(states)]

    def panel(b: int, h: int) -> Iterator[Line]:
        queries, keys = view.queries[b, :: tiles.block[0]], view.keys[b, :: tiles.block[1]]
        yield [(" " * margin + _ruler([str(key) for key in keys], width, room), _DIM)]
        for query, row in zip(queries, tiles.states[b, h], strict=True):
            yield [(f"{query:>{margin - 2}}  ", _DIM), *(glyphs[state] for state in row)]

    _print(console, tiles, panel, _legend(states, tiles))


def _glyphs(console: "Console") -> list[Fragment]:
    """The characters for EMPTY, PARTIAL and FULL, which differ even without colour. Not every console has UTF-8."""
    return list(zip(".:#" if console.options.ascii_only else "·▒█", _STYLES, strict=True))


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


def _legend(states: list[Fragment], tiles: Cells) -> list[Line]:
    names = zip(states, STATES.values(), strict=True)
    return [[(f"{glyph} {name}  ", style) for (glyph, style), name in names], [(tiles.summary(), "")]]


def _print(console: "Console", cells: Cells, panel: Callable[[int, int], Iterable[Line]], legend: list[Line]) -> None:
    from rich.text import Text

    lines: list[Line] = []
    for b, h, title in cells.panels(_MAX_PANELS):
        lines += [[(title, "bold")]] if title else []
        lines += panel(b, h)
    lines += [*legend, [("rows are positions of queries, columns of keys", _DIM)]]
    left_out = cells.left_out(_MAX_PANELS)
    lines += [[(left_out, _DIM)]] if left_out else []
    for line in lines:
        text = Text()
        for style, run in itertools.groupby(line, key=lambda fragment: fragment[1]):
            text.append("".join(part for part, _ in run), style)
        text.rstrip()
        console.print(text)
