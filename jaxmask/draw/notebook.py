"""Masks and tiles in a notebook: HTML that needs neither rich nor matplotlib."""

import itertools
from collections.abc import Sequence
from html import escape
from unicodedata import east_asian_width

import numpy as np
from jaxtyping import Int8

from jaxmask.draw.picture import STATES, Block, Cells, Texts, View
from jaxmask.mask import Mask
from jaxmask.tiles import EMPTY, FULL, PARTIAL, TileMap

# At most so many queries, or keys, are drawn pair by pair; and at most so many examples and heads.
_MAX_PAIRS, _MAX_PANELS = 64, 8
# The length at which a mask is drawn that fits any.
_DEFAULT_LENGTH = 12
# The sizes of a cell that has a label, and of the label, in pixels.
_LABELLED_CELL, _FONT_SIZE = 14, 11
# The colour and the opacity of a cell. They suit a light page and a dark one.
_PAINT = {EMPTY: ("currentColor", 0.12), PARTIAL: ("#4a86dd", 0.5), FULL: ("#4a86dd", 1)}


def html(mask: Mask, *, tokens: Sequence[str] | None = None) -> str:
    """The text of a mask and a small picture, for a notebook.

    The picture has the length of the mask's arrays, or else 12. A mask that cannot be drawn, because it is traced or
    fits no square, is shown by its text alone.

    Args:
        mask: the mask to draw, in one panel for each example and head that it tells apart, 8 panels at most.
        tokens: the text of each query and key: the picture is as long, and labelled by them up to 64. Show it by
            ``IPython.display.HTML``.

    Raises:
        TypeError, ValueError: only where tokens are given: as :func:`jaxmask.show`.

    >>> from jaxmask import Causal
    >>> page = html(Causal(), tokens=["今", "天"])
    >>> page.count("今")
    2
    """
    try:
        keys = mask.shape[2]
        length = keys if keys > 1 else _DEFAULT_LENGTH if tokens is None else len(tokens)
        view = View.of(mask, length, None)
        return _page(view.title, view, view.fit((1, 1), _MAX_PAIRS), None, view.texts(tokens, None)[0])
    except Exception:  # to look at a mask must not fail, whatever is wrong with it
        if tokens is not None:
            raise
        return _code(repr(mask))


def html_tiles(tiles: TileMap) -> str:
    """The call that found the tiles and a small picture of them, for a notebook."""
    call = f"tiles({tiles.query_length}, {tiles.key_length}, block={tiles.block})"
    try:
        view = View.of_tiles(tiles)
        fits = max(tiles.states.shape[2:]) <= _MAX_PAIRS
        cells = Cells(np.asarray(tiles.states), tiles.block) if fits else view.fit(tiles.block, _MAX_PAIRS)
        return _page(f"{view.title}.{call}" if view.title else call, view, cells, tiles.block, None)
    except Exception:  # as above
        return _code(f"{tiles.mask!r}.{call}")


def _code(text: str) -> str:
    return f'<code style="white-space: pre-wrap; overflow-wrap: anywhere">{escape(text)}</code>'


def _page(title: str, view: View, cells: Cells, asked: Block | None, texts: Texts) -> str:
    if cells.block == (1, 1) and PARTIAL not in cells.states:
        legend = f"{_swatch(FULL)} may attend, {_swatch(EMPTY)} may not"
    else:
        legend = ", ".join(f"{_swatch(state)} {name}" for state, name in reversed(STATES.items()))
        legend += f": {escape(cells.summary())}"
    queries, keys = view.lengths
    about = f"{queries:,} queries (rows), {keys:,} keys (columns)"
    panels, left_out = view.panels(cells, _MAX_PANELS)
    notes = [about, legend, *map(escape, view.notes(asked, cells)), left_out]
    texts = texts if cells.block == (1, 1) else None
    pictures = "".join(
        f"<div>{f'<small>{title}</small><br/>' if title else ''}{_picture(cells.states[b, h], texts)}</div>"
        for b, h, title in panels
    )
    return (
        f"<div>{_code(title) if title else ''}"
        f'<div style="display: flex; flex-wrap: wrap; gap: 1em; margin: 0.5em 0">{pictures}</div>'
        f"<small>{'<br/>'.join(filter(None, notes))}</small></div>"
    )


def _picture(states: Int8[np.ndarray, "rows columns"], texts: Texts) -> str:
    """One panel, labelled by texts."""
    if texts is None:
        return svg(states)
    # Nobody knows how wide a browser draws a text: a Chinese character about as wide as it is high, others 0.6 of it.
    widths = (sum(1.0 if east_asian_width(character) in "WF" else 0.6 for character in text) for text in texts)
    margin = _FONT_SIZE * (max(widths) + 0.5)
    size = margin + len(texts) * _LABELLED_CELL
    labels = ""
    for i, text in enumerate(texts):
        middle = margin + (i + 0.5) * _LABELLED_CELL
        for x, y, angle in ((margin - 4, middle, 0), (middle, margin - 4, 90)):
            place = f'transform="translate({x:g} {y:g}) rotate({angle})" text-anchor="end"'
            labels += f'<text {place} dominant-baseline="central">{escape(text)}</text>'
    return (
        f'<svg width="{size:g}" height="{size:g}" fill="currentColor" font-family="monospace" '
        f'font-size="{_FONT_SIZE}">{labels}<svg x="{margin:g}" y="{margin:g}"'
        f"{svg(states, _LABELLED_CELL).removeprefix('<svg')}</svg>"
    )


def _swatch(state: int) -> str:
    return f'<svg width="10" height="10" viewBox="0 0 1 1">{_path("M0 0.5h1", state)}</svg>'


def svg(states: Int8[np.ndarray, "rows columns"], size: float | None = None) -> str:
    """One panel. Each run of equal cells in a row is one line."""
    rows, columns = states.shape
    size = min(14.0, 224 / max(rows, columns)) if size is None else size
    lines = dict.fromkeys(STATES, "")
    for i, row in enumerate(states):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1), columns]
        for start, end in itertools.pairwise(starts):
            lines[int(row[start])] += f"M{start} {i}.5h{end - start}"
    paths = "".join(_path(line, state) for state, line in lines.items() if line)
    return (
        f'<svg role="img" width="{columns * size:g}" height="{rows * size:g}" viewBox="0 0 {columns} {rows}">'
        f"<title>rows are queries, columns are keys</title>{paths}</svg>"
    )


def _path(lines: str, state: int) -> str:
    """Lines as thick as a cell, dashed so that the cells of a run are apart."""
    colour, opacity = _PAINT[state]
    stroke = f'stroke="{colour}" stroke-opacity="{opacity}" stroke-width="0.92" stroke-dasharray="0.92 0.08"'
    return f'<path d="{lines}" {stroke}/>'
