"""Masks drawn by matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Any
from unicodedata import category, name

import numpy as np
from jaxtyping import Int

from jaxmask import checks
from jaxmask.draw.picture import STATES, Block, Cells, Texts, View, escaped
from jaxmask.mask import KeyPositions, Mask, Offset, QueryPositions
from jaxmask.tiles import EMPTY, FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# At most so many queries, or keys, are drawn pair by pair; and at most so many examples and heads.
_MAX_PAIRS, _MAX_PANELS = 512, 32

# For EMPTY, PARTIAL and FULL: by lightness, so that every eye and every printer tells them apart.
_COLOURS = ("#eceef1", "#a5c3ec", "#2f6bc6")
_OUTLINES = ("#8a9099", "#e08a00", "#0b2f66")
_STROKES = (":", "--", "-")
_GREY = "#555555"
# Points from a line of text to the next.
_LINE = 9


def plot(
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
    ax: "Axes | None" = None,
) -> "Figure":
    """Draw a mask by matplotlib: a row for each query and a column for each key.

    A mask of more than 512 queries or keys is drawn by its tiles. Nothing of ``matplotlib.pyplot`` is used or changed.
    The title is the mask as it is written in the vocabulary; one that a function of the library made has none.

    Args:
        mask: the mask to draw, in one panel for each example and head that it tells apart, 32 panels at most.
        query_length: static.
        key_length: static; ``query_length`` where it is left out.
        offset, query_positions, key_positions: as in :meth:`Mask.dense`.
        tokens: the text of each query, which labels it in place of its position. It labels the keys, too, where they
            are the same tokens: where there are as many of them, no positions are given and no ``key_tokens``.
            Characters that no installed font has are written as escapes, and the legend says what to install.
        key_tokens: the text of each key.
        block: number of queries and keys in a tile, or one number for both. These tiles are outlined by their states.
            Where there are too many to be drawn, they are counted.
        ax: where to draw a mask of a single panel; a new figure where it is left out.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: tokens are not a list of str; or the mask is traced, as it is inside a ``jit``.
        ValueError: the number of tokens is not that of queries or keys; ``ax`` is given for several panels; or
            :meth:`Mask.tiles` raises.

    >>> from jaxmask import Causal
    >>> figure = plot(Causal(), 4, tokens=["The", "cat", "sat", "down"])
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['The', 'cat', 'sat', 'down']
    """
    positions = {"offset": offset, "query_positions": query_positions, "key_positions": key_positions}
    view = View.of(mask, query_length, key_length, **positions)
    size = checks.block(1 if block is None else block)
    cells = view.fit(size, _MAX_PAIRS)
    tiles = view.tiles(size) if block is not None and cells.block == (1, 1) else None
    asked = None if block is None else size
    *texts, families, escapes = _drawable(*view.texts(tokens, key_tokens))
    notes = [note for drawn in (cells, tiles) if drawn and drawn.block != (1, 1) for note in view.notes(asked, drawn)]
    panels, left_out = view.panels(cells, _MAX_PANELS)
    legend = _legend(cells, tiles, [*notes, *escapes, left_out])
    if ax is None:
        figure, axes = _new_figure(view, cells, len(panels), legend, texts)
    elif len(panels) == 1:
        figure, axes = ax.get_figure(root=True), [ax]
        assert figure is not None
        ax.set(xlabel="key", ylabel="query")
        if cells.block != (1, 1) or tiles is not None or escapes:
            ax.legend(**legend, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    else:
        raise ValueError(f"ax is for one panel, but {mask!r} has {len(panels)}: leave it out for a figure of them")
    for (b, h, title), panel in zip(panels, axes, strict=True):
        _draw_panel(panel, view, cells, tiles, b, h)
        _label(panel.yaxis, view.queries[b], texts[0], families, panel.bbox.height)
        _label(panel.xaxis, view.keys[b], texts[1], families, panel.bbox.width)
        if title:
            panel.set_title(shorten(title, 36, placeholder=" ..."), fontsize=8)
    return figure


def _new_figure(
    view: View, cells: Cells, count: int, legend: dict[str, Any], texts: Sequence[Texts]
) -> "tuple[Figure, list[Axes]]":
    """A figure with axes for each panel, of a size that suits them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "jaxmask[plot]"') from error

    heads = cells.states.shape[1]
    columns = min(count, heads if 1 < heads <= 8 else 4)
    rows = -(-count // columns)
    # In inches: the cells, which are not too small for the texts beside them; then their labels.
    longest = max(view.lengths)
    side = 4.2 if count == 1 else 2.2
    if any(texts):
        side = min(max(0.18 * longest, side), 12.0)
    longest_labels = texts[0] or [str(view.queries[0, -1])], texts[1] or [""]
    left, below = (0.4 + 0.06 * min(max(map(len, labels)), 24) for labels in longest_labels)
    height, width = (side * length / longest for length in view.lengths)
    width = max(columns * (left + max(width, 1.0)), 4.7)
    title = wrap(view.title, int(14 * width), max_lines=3, placeholder=" ...")
    height = rows * (below + max(height, 0.4) + 0.2 * (count > 1))
    height += 0.5 + 0.15 * len(title) + 0.15 * len(legend["title"].splitlines())

    figure = Figure((width, height), layout="constrained", dpi=110)
    if title:
        figure.suptitle("\n".join(title), family="monospace", fontsize=8, parse_math=False)
    figure.legend(**legend, loc="outside lower center", ncols=5)
    axes = [figure.add_subplot(rows, columns, panel + 1) for panel in range(count)]
    same_labels = all((positions == positions[0]).all() for positions in (view.queries, view.keys))
    for panel, ax in enumerate(axes):
        # The panels of a row, or of a column, are labelled once, if their labels are the same.
        first, lowest = panel % columns == 0, panel + columns >= count
        ax.set(xlabel="key" if lowest else "", ylabel="query" if first else "")
        if same_labels:
            ax.tick_params(labelleft=first, labelbottom=lowest)
    # Without pyplot, a notebook knows no other way to show a figure.
    setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010
    return figure, axes


def _png(figure: "Figure") -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_panel(ax: "Axes", view: View, cells: Cells, tiles: Cells | None, b: int, h: int) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import ListedColormap

    queries, keys = view.lengths
    states = cells.states[b, h]
    # In units of queries and keys, whatever the size of a cell.
    rows, columns = (np.arange(count + 1) * size - 0.5 for count, size in zip(states.shape, cells.block, strict=True))
    extent = (columns[0], columns[-1], rows[-1], rows[0])
    ax.imshow(states, cmap=ListedColormap(_COLOURS), vmin=EMPTY, vmax=FULL, extent=extent, origin="upper")
    ax.grid(visible=False)
    if max(states.shape) <= 64:
        width = min(1.2, 24 / max(states.shape))
        ax.hlines(rows, columns[0], columns[-1], color="white", linewidth=width)
        ax.vlines(columns, rows[0], rows[-1], color="white", linewidth=width)
    if tiles is not None:
        for state in STATES:
            corners = [_corners(i, j, tiles.block, view.lengths) for i, j in np.argwhere(tiles.states[b, h] == state)]
            width = max(0.6, min(1.4, 14 / max(tiles.states.shape[2:]))) * (0.7 if state == EMPTY else 1)
            outlines = PolyCollection(corners, facecolor="none", edgecolor=_OUTLINES[state], linewidth=width)
            outlines.set_linestyle(_STROKES[state])
            ax.add_collection(outlines)
    # The last tiles may reach beyond the last query and key.
    aspect = "equal" if max(queries, keys) <= 8 * min(queries, keys) else "auto"
    ax.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5), aspect=aspect)
    ax.tick_params(length=0, labelsize=7, labelcolor=_GREY)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(fontsize=8, color=_GREY)
    ax.spines[:].set_visible(False)


def _corners(
    i: int | np.integer[Any], j: int | np.integer[Any], block: Block, lengths: tuple[int, int]
) -> list[tuple[float, float]]:
    """The corners of a tile, a little inside it, so that the outlines of neighbours are seen beside each other."""
    inset = 0.04 * min(block)
    (top, bottom), (left, right) = (
        (tile * size - 0.5 + inset, min((tile + 1) * size, length) - 0.5 - inset)
        for tile, size, length in zip((i, j), block, lengths, strict=True)
    )
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _label(axis: Any, positions: Int[np.ndarray, "length"], texts: Texts, families: list[str], pixels: float) -> None:
    """Label as many of the queries or keys along an axis as have room."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    if texts is None:
        axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 4, 5, 10]))
        axis.set_major_formatter(FuncFormatter(partial(_position, positions)))
        return
    room = int(pixels * 72 / axis.get_figure(root=True).dpi / _LINE)
    ticks = range(0, len(texts), -(-len(texts) // max(1, room)))
    axis.set_major_locator(FixedLocator(ticks))
    upright = axis.axis_name == "x" and max(map(len, texts)) > 2
    axis.set_ticklabels([texts[i] for i in ticks], family=families, parse_math=False, rotation=90 if upright else 0)


def _position(positions: Int[np.ndarray, "length"], index: float, _: object) -> str:
    return str(positions[int(index)]) if index in range(len(positions)) else ""


def _drawable(texts: Texts, others: Texts) -> tuple[Texts, Texts, list[str], list[str]]:
    """Short texts, the families of fonts that have their characters, and a note on those that none has.

    These are escapes in the texts, as are those that are not printed.
    """
    from matplotlib.font_manager import FontProperties, get_font

    characters = {character for text in (texts or []) + (others or []) for character in text}
    families = list(FontProperties().get_family())
    missing = {character for character in characters if character.isprintable()}
    fonts = _fonts()
    # A font that is gone may still be listed.
    while missing and (font := next(fonts, None)):
        family, path = font
        if Path(path).is_file():
            drawable = {character for character in missing if get_font(path).get_char_index(ord(character))}
            missing -= drawable
            families += [family] if drawable and family else []
    escapes = [character for character in characters if character in missing or not character.isprintable()]

    def short(texts: Texts) -> Texts:
        texts = None if texts is None else [escaped(text, escapes) for text in texts]
        return texts and [text if len(text) <= 24 else f"{text[:21]}..." for text in texts]

    return short(texts), short(others), families, _what_to_install(missing)


def _fonts() -> Iterator[tuple[str, str]]:
    """The families and files of all fonts, the usual one first, and last those that matplotlib does not know yet."""
    from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager

    yield "", findfont(FontProperties())
    known = {font.fname for font in fontManager.ttflist}
    # A font of last resort draws a box for every character.
    yield from sorted((font.name, font.fname) for font in fontManager.ttflist if "Resort" not in font.name)
    # It lists fonts once, and keeps the list: those that were installed since then are missing.
    for path in sorted({*findSystemFonts()} - known):
        # As where it makes the list: any file may be damaged, or of a kind that it cannot draw.
        with suppress(Exception):
            fontManager.addfont(path)
            yield fontManager.ttflist[-1].name, path


def _what_to_install(missing: set[str]) -> list[str]:
    """A note on characters that no font has, or nothing."""
    fonts = {
        "Noto Emoji"
        if category(character) == "So"
        else "Noto Sans CJK"
        if name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))
        else "a font of their script"
        for character in missing
    }
    shown = [escaped(character, character) for character in sorted(missing)]
    lacking = ", ".join(shown[:6]) + ", ..." * (len(shown) > 6)
    return [f"no font has {lacking}: install {' and '.join(sorted(fonts))}"] if fonts else []


def _legend(cells: Cells, tiles: Cells | None, notes: list[str]) -> dict[str, Any]:
    """The arguments of a legend: what the colours and the outlines mean, and notes."""
    from matplotlib.patches import Patch

    names = {EMPTY: "may not attend", FULL: "may attend"} if cells.block == (1, 1) else STATES
    handles = [Patch(facecolor=_COLOURS[state], label=name) for state, name in reversed(names.items())]
    if tiles is not None:
        handles += [
            Patch(fill=False, edgecolor=_OUTLINES[state], linestyle=_STROKES[state], linewidth=1.4, label=name)
            for state, name in reversed(STATES.items())
        ]
    summaries = [drawn.summary() for drawn in (cells, tiles) if drawn is not None and drawn.block != (1, 1)]
    lines = [line for note in (*summaries, *notes) for line in wrap(note, 80)]
    sizes = {"fontsize": 8, "title_fontsize": 8, "handlelength": 1.0, "handleheight": 1.0}
    return {"handles": handles, "title": "\n".join(lines), "frameon": False, **sizes}
