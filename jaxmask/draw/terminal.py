"""Masks and tiles in the terminal, by rich."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxmask import checks
from jaxmask.draw.picture import STATES, Block, Cells, Texts, View, escaped
from jaxmask.mask import KeyPositions, Mask, Offset, QueryPositions
from jaxmask.tiles import EMPTY, FULL, TileMap

if TYPE_CHECKING:
    from rich.console import Console

# At most so many queries are drawn pair by pair, as many keys as the console has room for, and at most so many panels.
_MAX_QUERIES, _MAX_PANELS = 128, 32
# A label has at most so many columns, or rows.
_MAX_LABEL = 16

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
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    block: int | Block | None = None,
    console: "Console | None" = None,
) -> None:
    """Print a mask in the terminal: a row for each query and a column for each key, labelled by their positions.

    A mask that does not fit is drawn by its tiles, a character for each. They are as small as the console allows, and
    labelled by positions.

    Args:
        mask: the mask to draw, in one panel for each example and head that it tells apart, 32 panels at most.
        query_length: static.
        key_length: static; ``query_length`` where it is left out.
        offset, query_positions, key_positions: as in :meth:`Mask.dense`.
        tokens: the text of each query, which labels it in place of its position; Chinese and emoji, too. It labels the
            keys, too, where they are the same tokens: where there are as many of them, no positions are given and no
            ``key_tokens``.
        key_tokens: the text of each key.
        block: number of queries and keys in a tile, or one number for both. These tiles are outlined, and each outline
            says whether its tile is EMPTY, PARTIAL or FULL. Where there are too many to be drawn, they are counted.
        console: the rich console to print to.

    Raises:
        ImportError: rich is not installed.
        TypeError: the mask is traced, as it is inside a ``jit``; tokens are not a list of str.
        ValueError: the console has no room beside the labels; the number of tokens is not that of queries or keys; or
            :meth:`Mask.tiles` raises.

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
    asked = None if block is None else size
    rows, columns = (_shortened(texts, console) for texts in view.texts(tokens, key_tokens))
    upright = None if columns is None else [_graphemes(text) for text in columns]
    margin = _margin(console, view, rows)
    room = console.width - margin
    # A bar before each outlined tile and one after the last.
    bars = 0 if block is None else -(-view.lengths[1] // size[1]) + 1
    width = max([1, *(_cells(grapheme) for text in upright or [] for grapheme in text)])
    if view.lengths[0] <= _MAX_QUERIES and width * (view.lengths[1] + bars) <= room:
        tiles = None if block is None else view.tiles(size)
        _print_pairs(console, margin, view, tiles, rows, upright)
    else:
        margin = _margin(console, view, None)
        room = console.width - margin
        # A character is about twice as high as it is wide.
        cells = view.tiles(size, (max(1, room // 2), room))
        _print_tiles(console, margin, view, cells, asked)


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
    margin = _margin(console, view, None)
    room = console.width - margin
    *_, rows, columns = tiles.states.shape
    cells = Cells(np.asarray(tiles.states), tiles.block)
    if rows > _MAX_QUERIES or columns > room:
        cells = view.tiles(tiles.block, (max(1, room // 2), room))
    _print_tiles(console, margin, view, cells, tiles.block)


def _console(console: "Console | None") -> "Console":
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('show needs rich: pip install "jaxmask[cli]"') from error
    return Console() if console is None else console


def _margin(console: "Console", view: View, texts: Texts) -> int:
    """Columns for the labels of queries and a gap."""
    labels = [str(position) for position in (view.queries.min(), view.queries.max())] if texts is None else texts
    margin = max(map(_cells, labels)) + 2
    if console.width <= margin:
        what = "positions" if texts is None else "tokens"
        raise ValueError(f"a console of {console.width} columns has no room for keys beside the {what} of queries")
    return margin


def _shortened(texts: Texts, console: "Console") -> Texts:
    """Texts that are short enough for labels, in characters that the console has."""
    from rich.cells import set_cell_size

    if texts is None:
        return None
    if console.options.ascii_only:
        texts = [escaped(text, itertools.filterfalse(str.isascii, text)) for text in texts]
    return [text if _cells(text) <= _MAX_LABEL else f"{set_cell_size(text, _MAX_LABEL - 3)}..." for text in texts]


def _cells(text: str) -> int:
    """The columns that a text takes: two for a Chinese character or an emoji, none for an accent."""
    from rich.cells import cell_len

    return cell_len(text)


def _graphemes(text: str) -> list[str]:
    """What a reader takes for single characters."""
    from rich.cells import split_graphemes

    spans, _ = split_graphemes(text)
    return [text[start:end] for start, end, _ in spans]


def _print_pairs(
    console: "Console", margin: int, view: View, tiles: Cells | None, rows: Texts, upright: list[list[str]] | None
) -> None:
    """Print a character for each pair, in outlines of ``tiles``, under ``upright`` labels: the graphemes of each."""
    from rich.cells import set_cell_size

    cells, states = view.pairs(), _glyphs(console)
    no, yes = states[EMPTY], ("#" if console.options.ascii_only else "■", _STYLES[FULL])
    top, middle, bottom, dash, bar = ("+++", "+++", "+++", "-", "|") if console.options.ascii_only else _BOX
    length = view.lengths[1]
    height, width = view.lengths if tiles is None else tiles.block
    starts = range(0, length, width)
    spaced = 2 * length - 1 if tiles is None else 2 * (length + len(starts)) + 1
    gap = " " if spaced <= console.width - margin else ""

    def row(label: str, glyphs: Iterable[Fragment], bar: str) -> Line:
        line = [(" " * (margin - 2 - _cells(label)) + f"{label}  ", _DIM)]
        for j, (glyph, style) in enumerate(glyphs):
            if tiles is not None and j in starts:
                line.append((bar + gap, _DIM))
            # A wide character takes the place of the gap.
            line.append((set_cell_size(glyph + gap, 1 + len(gap)), style))
        return line if tiles is None else [*line, (bar, _DIM)]

    def rule(corners: str, marks: Iterable[Fragment]) -> Line:
        left, cross, right = corners
        line = [(" " * margin, _DIM)]
        for start, mark in zip(starts, marks, strict=True):
            size = min(width, length - start)
            line += [(cross if start else left, _DIM), mark, (dash * (size - 1 + (size + 1) * len(gap)), _DIM)]
        return [*line, (right, _DIM)]

    def panel(b: int, h: int) -> Iterator[Line]:
        # Labels of keys stand upright, a digit or a character to a row.
        labels = [list(str(key)) for key in view.keys[b]] if upright is None else upright
        longest = max(map(len, labels))
        for level in zip(*([""] * (longest - len(label)) + label for label in labels), strict=True):
            yield row("", ((character, _DIM) for character in level), " ")
        for i, query in enumerate(view.queries[b]):
            if tiles is not None and i % height == 0:
                yield rule(middle if i else top, (states[state] for state in tiles.states[b, h, i // height]))
            yield row(
                str(query) if rows is None else rows[i], (yes if state else no for state in cells.states[b, h, i]), bar
            )
        if tiles is not None:
            yield rule(bottom, [(dash, _DIM)] * len(starts))

    allowed = f" may not: {np.count_nonzero(cells.states):,} of {cells.states.size:,} pairs may attend"
    legend = [[yes, (" may attend, ", ""), no, (allowed, "")]]
    legend += [] if tiles is None else _legend(states, tiles, view.notes(tiles.block, tiles))
    _print(console, view, cells, panel, legend)


def _print_tiles(console: "Console", margin: int, view: View, tiles: Cells, asked: Block | None) -> None:
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

    _print(console, view, tiles, panel, _legend(states, tiles, view.notes(asked, tiles)))


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


def _legend(states: list[Fragment], tiles: Cells, notes: list[str]) -> list[Line]:
    names = zip(states, STATES.values(), strict=True)
    texts = [tiles.summary(), *notes]
    return [[(f"{glyph} {name}  ", style) for (glyph, style), name in names], *([(text, "")] for text in texts)]


def _print(
    console: "Console", view: View, cells: Cells, panel: Callable[[int, int], Iterable[Line]], legend: list[Line]
) -> None:
    from rich.text import Text

    lines: list[Line] = []
    panels, left_out = view.panels(cells, _MAX_PANELS)
    for b, h, title in panels:
        lines += [[(title, "bold")]] if title else []
        lines += panel(b, h)
    lines += [*legend, [("rows are positions of queries, columns of keys", _DIM)]]
    lines += [[(left_out, _DIM)]] if left_out else []
    for line in lines:
        text = Text()
        for style, run in itertools.groupby(line, key=lambda fragment: fragment[1]):
            text.append("".join(part for part, _ in run), style)
        text.rstrip()
        console.print(text)
