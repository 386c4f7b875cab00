"""Masks and tiles in a notebook: HTML that needs neither rich nor matplotlib."""

import itertools
from html import escape

import numpy as np
from jaxtyping import Int8

from jaxmask.draw.picture import STATES, Cells, View
from jaxmask.mask import Mask
from jaxmask.tiles import EMPTY, FULL, PARTIAL, TileMap

# At most so many queries, or keys, are drawn pair by pair; and at most so many examples and heads.
_MAX_PAIRS, _MAX_PANELS = 64, 8
# The length at which a mask is drawn that fits any.
_DEFAULT_LENGTH = 12
# The colour and the opacity of a cell. They suit a light page and a dark one.
_PAINT = {EMPTY: ("currentColor", 0.12), PARTIAL: ("#4a86dd", 0.5), FULL: ("#4a86dd", 1)}


def html(mask: Mask) -> str:
    """The text of a mask and a small picture, for a notebook.

    The picture has the length of the mask's arrays, or else 12. A mask that cannot be drawn, because it is traced or
    fits no square, is shown by its text alone.
    """
    try:
        keys = mask.shape[2]
        view = View.of(mask, keys if keys > 1 else _DEFAULT_LENGTH, None)
        return _page(repr(mask), view, view.fit((1, 1), _MAX_PAIRS))
    except Exception:  # to look at a mask must not fail, whatever is wrong with it
        return _code(repr(mask))


def html_tiles(tiles: TileMap) -> str:
    """The call that found the tiles and a small picture of them, for a notebook."""
    text = f"{tiles.mask!r}.tiles({tiles.query_length}, {tiles.key_length}, block={tiles.block})"
    try:
        view = View.of_tiles(tiles)
        fits = max(tiles.states.shape[2:]) <= _MAX_PAIRS
        cells = Cells(np.asarray(tiles.states), tiles.block) if fits else view.fit(tiles.block, _MAX_PAIRS)
        return _page(text, view, cells)
    except Exception:  # as above
        return _code(text)


def _code(text: str) -> str:
    return f'<code style="white-space: pre-wrap; overflow-wrap: anywhere">{escape(text)}</code>'


def _page(text: str, view: View, cells: Cells) -> str:
    if cells.block == (1, 1) and PARTIAL not in cells.states:
        legend = f"{_swatch(FULL)} may attend, {_swatch(EMPTY)} may not"
    else:
        legend = ", ".join(f"{_swatch(state)} {name}" for state, name in reversed(STATES.items()))
        legend += f": {escape(cells.summary())}"
    queries, keys = view.lengths
    notes = [f"{queries:,} queries (rows), {keys:,} keys (columns)", legend, cells.left_out(_MAX_PANELS)]
    pictures = "".join(
        f"<div>{f'<small>{title}</small><br/>' if title else ''}{_svg(cells.states[b, h])}</div>"
        for b, h, title in cells.panels(_MAX_PANELS)
    )
    return (
        f"<div>{_code(text)}"
        f'<div style="display: flex; flex-wrap: wrap; gap: 1em; margin: 0.5em 0">{pictures}</div>'
        f"<small>{'<br/>'.join(filter(None, notes))}</small></div>"
    )


def _swatch(state: int) -> str:
    return f'<svg width="10" height="10" viewBox="0 0 1 1">{_path("M0 0.5h1", state)}</svg>'


def _svg(states: Int8[np.ndarray, "rows columns"]) -> str:
    """One panel. Each run of equal cells in a row is one line."""
    rows, columns = states.shape
    size = min(14.0, 224 / max(rows, columns))
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
