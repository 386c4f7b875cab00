"""Masks drawn by matplotlib and in notebooks: each picture is read back and compared with the mask."""

import itertools
import pickle
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from jaxmask import (
    EMPTY,
    FULL,
    PARTIAL,
    Causal,
    Dense,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    TileMap,
    zoo,
)
from jaxmask.draw import html, html_tiles, plot
from tests.draw.test_show import MASKS, TilesOnly

# Two examples, so that there is a panel for each of them and for each head.
EXAMPLES = Padding(np.arange(8)[None] >= np.array([[3], [0]]))


def states_of(figure: Figure) -> Any:
    """What the panels show: 0, 1 or 2 for each cell."""
    return np.array([np.asarray(ax.images[0].get_array()) for ax in figure.axes])


def outlines_of(ax: Axes, block: tuple[int, int], shape: tuple[int, ...]) -> Any:
    """The states that the outlines of tiles say, by the colours that the legend gives them."""
    legend = ax.get_legend() or ax.figure.legends[0]  # pyright: ignore[reportAttributeAccessIssue]
    names = {
        to_hex(handle.get_edgecolor()): text.get_text()
        for handle, text in zip(legend.get_patches(), legend.get_texts(), strict=True)
    }
    states = np.full(shape, -1)
    for outlines in ax.collections:
        if isinstance(outlines, PolyCollection):
            (colour,) = np.asarray(outlines.get_edgecolor())
            for path in outlines.get_paths():
                left, top, right, bottom = path.get_extents().extents
                i, j = int(top + 0.5) // block[0], int(left + 0.5) // block[1]
                assert i * block[0] < top + 0.5 < bottom + 0.5 < (i + 1) * block[0]
                assert j * block[1] < left + 0.5 < right + 0.5 < (j + 1) * block[1]
                states[i, j] = ("EMPTY", "PARTIAL", "FULL").index(names[to_hex(tuple(colour))])
    return states


def labels_of(figure: Figure, axis: str, panel: int = 0) -> dict[int, str]:
    """The labels of queries (y) or keys (x) that can be seen, by their indices."""
    labels = getattr(figure.axes[panel], f"get_{axis}ticklabels")()
    seen = [label for label in labels if label.get_visible() and label.get_text()]
    return {round(label.get_position()["xy".index(axis)]): label.get_text() for label in seen}


# By matplotlib


@settings(max_examples=30)
@given(MASKS, st.booleans(), st.sampled_from([(3, 8), (8, 8)]), st.integers(1, 9), st.integers(1, 9))
def test_a_plot_says_what_dense_and_tiles_say(
    mask: Mask, examples: bool, lengths: tuple[int, int], queries: int, keys: int
) -> None:
    mask = mask & EXAMPLES if examples else mask
    figure = plot(mask, *lengths, offset=2, block=(queries, keys))
    allowed = np.asarray(mask.dense(*lengths, offset=2))
    np.testing.assert_array_equal(states_of(figure).reshape(allowed.shape), allowed * FULL)
    tiles = mask.tiles(*lengths, offset=2, block=(queries, keys))
    panels = tiles.states.reshape(-1, *tiles.states.shape[2:])
    for ax, states in zip(figure.axes, panels, strict=True):
        np.testing.assert_array_equal(outlines_of(ax, (queries, keys), states.shape), states)


@settings(max_examples=30)
@given(MASKS, st.sampled_from([(1, 600), (1000, 3), (131_072, 70_000)]), st.none() | st.integers(1, 2000))
def test_a_large_mask_is_plotted_by_its_tiles(mask: Mask, lengths: tuple[int, int], block: int | None) -> None:
    figure = plot(mask, *lengths, offset=5, block=block)
    size = re.findall(r"tiles of ([\d,]+) queries by ([\d,]+) keys", figure.legends[0].get_title().get_text())[0]
    size = int(size[0].replace(",", "")), int(size[1].replace(",", ""))
    tiles = mask.tiles(*lengths, offset=5, block=size)
    np.testing.assert_array_equal(states_of(figure).reshape(tiles.states.shape), tiles.states)
    assert max(tiles.states.shape[2:]) <= 512


def test_a_large_mask_is_never_written_out() -> None:
    tracemalloc.start()
    figure = plot(TilesOnly(), 131_072)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26  # of the 2**34 pairs
    assert np.bincount(states_of(figure).reshape(-1)).tolist() == [512 * 511 // 2, 512, 512 * 511 // 2]


def test_a_panel_for_each_example_and_head() -> None:
    figure = plot(EXAMPLES & PerHead([Causal(), SlidingWindow(2), Full()]), 8)
    assert [ax.get_title() for ax in figure.axes] == [f"batch {b}, head {h}" for b in range(2) for h in range(3)]
    rows = [ax.get_subplotspec().rowspan.start for ax in figure.axes]  # pyright: ignore[reportOptionalMemberAccess]
    assert rows == [0, 0, 0, 1, 1, 1]


def test_of_many_panels_the_first_are_drawn() -> None:
    figure = plot(PerHead([SlidingWindow(size) for size in range(1, 41)]), 8)
    assert len(figure.axes) == 32
    assert "the first 32 of 40 panels" in figure.legends[0].get_title().get_text()


def test_of_too_many_heads_those_that_look_alike_are_drawn_once() -> None:
    mask = PerHead([SlidingWindow(2), Causal()] * 32)
    figure = plot(mask, 8)
    assert [ax.get_title() for ax in figure.axes] == [
        f"heads {', '.join(map(str, range(first, 64, 2)))}"[:32].rpartition(",")[0] + ", ..." for first in (0, 1)
    ]
    np.testing.assert_array_equal(states_of(figure), np.asarray(mask.dense(8, 8))[0, :2] * FULL)
    assert "heads 0, 2, 4, " in text_of(html(mask))
    assert len(read_back(html(mask))) == 2


def test_a_title_is_what_a_person_wrote() -> None:
    is_global = np.array([[1, 0, 0, 0]])
    own = Named(lambda: "own")
    for mask in (Causal() & ~Prefix(2), PerHead([Causal(), own]), Predicate(_fails, bounds=lambda *at: (True, True))):
        figure = plot(mask, 1000)
        assert figure.get_suptitle() == repr(mask)
    assert "Predicate(_fails" in repr(mask)
    for mask in (zoo.longformer(2, is_global), Causal() & zoo.document(Prefix(1), is_global)):
        assert plot(mask, 4).get_suptitle() == ""
        for page in (html(mask), html_tiles(mask.tiles(4, 4, block=2))):
            assert not re.search("Transposed|Reordered|Axis|_", text_of(page))
    tiles = Causal().tiles(2, 4, offset=0, key_positions=np.arange(4))
    assert text_of(html_tiles(tiles)).startswith("tiles(2, 4, block=(128, 128))")


def test_what_tiles_do_not_say_is_in_the_legend() -> None:
    figure = plot(Predicate(lambda b, h, q, kv: kv <= q), 131_072, block=64)
    note = figure.legends[0].get_title().get_text().replace("\n", " ")
    assert "asked for were tiles of 64 queries by 64 keys; 0 of 4,194,304 are EMPTY" in note
    assert "Predicate has no bounds, and says nothing of tiles" in note
    outlined = plot(Predicate(lambda b, h, q, kv: kv <= q), 8, block=4)
    assert "Predicate has no bounds" in outlined.legends[0].get_title().get_text()
    page = text_of(html_tiles(Predicate(lambda b, h, q, kv: kv <= q).tiles(1000, 1000, block=4)))
    assert "asked for were tiles of 4 queries by 4 keys; 0 of 62,500 are EMPTY" in page
    assert "Predicate has no bounds" in page


@pytest.mark.parametrize(
    ("offset", "positions", "queries", "keys"),
    [
        (3, None, ["3456", ""], ["01234567", "01234567"]),
        (np.array([3, 5]), None, ["3456", "5678"], ["01234567", "01234567"]),
        (3, [6, 7, 0, 1, 2, 3, 4, 5], ["3456", ""], ["67012345", "67012345"]),
        (3, [[6, 7, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]], ["3456", "3456"], ["67012345", "01234567"]),
    ],
)
def test_axes_are_labelled_by_positions(offset: Any, positions: Any, queries: list[str], keys: list[str]) -> None:
    positions = None if positions is None else jnp.array(positions)
    figure = plot(Causal() & EXAMPLES, 4, 8, offset=offset, key_positions=positions)
    for panel in range(2):
        # Every panel has labels of its own, but for those that its neighbour has.
        for axis, expected in (("y", queries[panel]), ("x", keys[panel])):
            labels = labels_of(figure, axis, panel)
            assert len(labels) > 1 or not expected
            assert all(expected[index] == label for index, label in labels.items())


def test_axes_are_labelled_by_the_positions_of_queries() -> None:
    figure = plot(Causal(), 3, 8, query_positions=jnp.array([5, 0, 7]))
    assert labels_of(figure, "y") == {0: "5", 1: "0", 2: "7"}
    np.testing.assert_array_equal(states_of(figure)[0], (np.arange(8) <= np.array([[5], [0], [7]])) * FULL)


@pytest.mark.parametrize("length", [1, 2, 9, 100, 512, 4096, 131_072])
def test_labels_do_not_overlap(length: int) -> None:
    figure = plot(Causal(), length, tokens=["text"] * length if length <= 512 else None)
    figure.draw_without_rendering()
    for axis, side in ((figure.axes[0].xaxis, 0), (figure.axes[0].yaxis, 1)):
        texts = [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_text()]
        spans = sorted(text.get_window_extent().get_points()[:, side].tolist() for text in texts)
        assert len(spans) >= min(length, 5)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_axes_are_labelled_by_tokens() -> None:
    tokens = ["<s>", "Ġthe", "$x_1$", "a\nb", "", "掩码矩阵" * 9, "$", "\\"]
    figure = plot(Causal(), 8, tokens=tokens)
    for axis in "xy":
        labels = labels_of(figure, axis)
        assert 4 not in labels
        assert [labels[index] for index in (0, 1, 2, 3, 6, 7)] == ["<s>", "Ġthe", "$x_1$", "a\\nb", "$", "\\"]
        assert len(labels[5]) == 24


def test_tokens_are_of_queries_and_of_keys_only_where_these_are_the_same() -> None:
    both = plot(Causal(), 3, tokens=["a", "b", "c"])
    assert labels_of(both, "x") == labels_of(both, "y") == {0: "a", 1: "b", 2: "c"}
    cached = plot(Causal(), 3, offset=2, tokens=["a", "b", "c"])
    assert labels_of(cached, "y") == {0: "a", 1: "b", 2: "c"}
    assert labels_of(cached, "x") == {0: "0", 1: "1", 2: "2"}
    crossed = plot(Full(), 1, 2, tokens=["a"], key_tokens=["b", "c"])
    assert (labels_of(crossed, "y"), labels_of(crossed, "x")) == ({0: "a"}, {0: "b", 1: "c"})


@settings(max_examples=30)
@given(st.lists(st.text(max_size=40), min_size=4, max_size=4))
def test_any_text_is_drawn_without_a_warning(tokens: list[str]) -> None:
    plot(Causal(), 4, tokens=tokens).draw_without_rendering()


def test_a_character_that_the_usual_font_lacks_is_taken_from_another() -> None:
    # matplotlib brings both fonts along.
    usual, other = (
        font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in ("DejaVu Sans", "STIXGeneral")
    )
    character = chr(min(code for code in other if code not in usual and chr(code).isalpha()))
    figure = plot(Causal(), 2, tokens=[character, "\U000f0000"])
    figure.draw_without_rendering()
    assert labels_of(figure, "x") == {0: character, 1: "\\U000f0000"}


def test_where_no_font_has_a_character_the_legend_says_what_to_install() -> None:
    def notes(*tokens: str) -> list[str]:
        figure = plot(Causal(), len(tokens), tokens=tokens)
        return figure.legends[0].get_title().get_text().splitlines()

    assert notes("a", "Ġ", "\n") == []
    # None of these has a glyph in the fonts of matplotlib.
    (note,) = notes("\u4eca\uac00", "\U0001fae0")
    assert note == "no font has \\u4eca, \\uac00, \\U0001fae0: install Noto Emoji and Noto Sans CJK"
    (note,) = notes("\U00013000")
    assert note == "no font has \\U00013000: install a font of their script"
    axes = Figure().subplots()
    plot(Causal(), 1, tokens=["\u4eca"], ax=axes)
    assert "install Noto Sans CJK" in axes.get_legend().get_title().get_text()  # pyright: ignore[reportOptionalMemberAccess]


def test_a_font_is_found_that_matplotlib_does_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fontTools.ttLib import TTFont  # pyright: ignore[reportMissingTypeStubs]

    # Any font, under another name, with a glyph for a character that no other has; and a file that is none.
    font: Any = TTFont(font_manager.findfont("DejaVu Sans"))
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap[0x4ECA] = "A"
    for record in font["name"].names:
        if record.nameID in (1, 4, 16):
            record.string = "Newly Installed"
    font.save(tmp_path / "new.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "X11FontDirectories", [str(tmp_path)])
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    figure = plot(Causal(), 1, tokens=["\u4eca"])
    figure.draw_without_rendering()
    assert labels_of(figure, "x") == {0: "\u4eca"}


@pytest.mark.breaks_annotations
@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"tokens": ["a"]}, ValueError, "tokens must have one str for each of the 2 queries, got 1"),
        ({"key_tokens": ["a"] * 4}, ValueError, "key_tokens must have one str for each of the 3 keys, got 4"),
        ({"tokens": "ab"}, TypeError, "tokens must be a list of str, one for each of the 2 queries, got 'ab'"),
        ({"key_tokens": [1, 2, 3]}, TypeError, "key_tokens must be a list of str, one for each of the 3 keys"),
        ({"block": 0}, ValueError, "block must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=re.escape(problem)):
        plot(Causal(), 2, 3, offset=1, **arguments)


def test_a_plot_may_be_part_of_a_figure() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot(Causal(), 8, block=4, ax=left) is figure
    plot(Causal(), 8, ax=right)
    np.testing.assert_array_equal(states_of(figure), np.tile(np.tri(8) * FULL, (2, 1, 1)))
    assert outlines_of(left, (4, 4), (2, 2)).tolist() == [[PARTIAL, EMPTY], [FULL, PARTIAL]]
    with pytest.raises(ValueError, match=r"ax is for one panel, but .* has 2"):
        plot(PerHead([Causal(), Full()]), 8, ax=left)


def test_nothing_of_pyplot_is_touched() -> None:
    from matplotlib import pyplot

    settings, figures = dict(mpl.rcParams), pyplot.get_fignums()
    figure = plot(Causal(), 8, block=4, tokens=["a"] * 8)
    figure.draw_without_rendering()
    assert (dict(mpl.rcParams), pyplot.get_fignums()) == (settings, figures)
    # A manager is what pyplot gives to its figures.
    assert figure.canvas.manager is None


def test_a_figure_shows_itself_in_a_notebook_and_is_saved(tmp_path: Path) -> None:
    from IPython.core.formatters import DisplayFormatter

    figure = plot(Causal(), 8)
    shown, _ = DisplayFormatter().format(figure)
    assert shown["image/png"].startswith(b"\x89PNG")
    figure.savefig(tmp_path / "mask.svg")
    assert "<svg" in (tmp_path / "mask.svg").read_text(encoding="utf-8")
    np.testing.assert_array_equal(states_of(pickle.loads(pickle.dumps(figure))), states_of(figure))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape('pip install "jaxmask[plot]"')):
        plot(Causal(), 2)


# In a notebook


def text_of(page: str) -> str:
    return "".join(ElementTree.fromstring(page).itertext())


def read_back(page: str) -> Any:
    """What the pictures show: 0, 1 or 2 for each cell, by the opacity of its colour."""
    panels: list[Any] = []
    for picture in ElementTree.fromstring(page).iter("svg"):
        if picture.get("role") == "img":
            columns, rows = (int(size) for size in picture.attrib["viewBox"].split()[2:])
            states = np.full((rows, columns), -1)
            for path in picture.iter("path"):
                state = ["0.12", "0.5", "1"].index(path.attrib["stroke-opacity"])
                for column, row, length in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.attrib["d"]):
                    states[int(row), int(column) : int(column) + int(length)] = state
            panels.append(states)
    return np.array(panels)


@settings(max_examples=20)
@given(MASKS, st.booleans())
def test_a_notebook_shows_what_dense_says(mask: Mask, examples: bool) -> None:
    mask, length = (mask & EXAMPLES, 8) if examples and mask.dense(8, 8).any() else (mask, 12)
    length = length if mask.shape[2] in (1, length) else mask.shape[2]
    page = html(mask)
    allowed = np.asarray(mask.dense(length, length))
    np.testing.assert_array_equal(read_back(page).reshape(allowed.shape), allowed * FULL)
    assert repr(mask) in text_of(page)
    assert f"{length} queries (rows), {length} keys (columns)" in text_of(page)
    assert html(mask) == page


@pytest.mark.parametrize(("length", "block"), [(64, 1), (65, 2), (131_072, 2048)])
def test_a_notebook_shows_a_large_mask_by_its_tiles(length: int, block: int) -> None:
    mask = Causal() & Padding(jnp.arange(length)[None] < length - 9)
    page = html(mask)
    states = mask.tiles(length, length, block=block).states
    if block == 1:
        states = mask.dense(length, length) * FULL
    else:
        assert f"tiles of {block:,} queries by {block:,} keys" in text_of(page)
    np.testing.assert_array_equal(read_back(page), np.asarray(states)[:, 0])


@settings(max_examples=30)
@given(MASKS, st.sampled_from([(12, 12), (300, 20), (5000, 131_072)]), st.integers(1, 200))
def test_a_notebook_shows_tiles(mask: Mask, lengths: tuple[int, int], block: int) -> None:
    tiles = mask.tiles(*lengths, block=block, offset=1)
    page = html_tiles(tiles)
    if max(tiles.states.shape[2:]) > 64:
        size = re.findall(r"tiles of ([\d,]+) queries by ([\d,]+) keys", text_of(page))[0]
        size = int(size[0].replace(",", "")), int(size[1].replace(",", ""))
        tiles = mask.tiles(*lengths, block=size, offset=1)
    np.testing.assert_array_equal(read_back(page).reshape(tiles.states.shape), tiles.states)


TOKENS = ["The", "今天", "😀", "a\nb", "<s>", "&", ""]


def test_a_notebook_labels_queries_and_keys_by_tokens() -> None:
    page = html(Causal() & EXAMPLES, tokens=[*TOKENS, "end"])
    root = ElementTree.fromstring(page)
    shown = [text.text or "" for text in root.iter("text")]
    # For each query and each key of both examples, from left to right.
    assert shown == [token.replace("\n", "\\n") for token in (*TOKENS, "end") for _ in "xy"] * 2
    np.testing.assert_array_equal(read_back(page)[:, :, :], read_back(html(Causal() & EXAMPLES)))
    for picture in root.iter("svg"):
        if picture.get("font-family") is not None:
            (cells,) = (child for child in picture if child.tag == "svg")
            ends = {
                float(cells.attrib[place]) + float(cells.attrib[size])
                for place, size in zip(("x", "y"), ("width", "height"), strict=True)
            }
            assert ends == {float(picture.attrib["width"])} == {float(picture.attrib["height"])}
    assert len(read_back(html(Causal(), tokens=TOKENS))[0]) == len(TOKENS)
    assert "<text" not in html(Causal(), tokens=["a"] * 65)


@pytest.mark.breaks_annotations
def test_a_notebook_refuses_bad_tokens() -> None:
    with pytest.raises(ValueError, match="tokens must have one str for each of the 8 queries, got 7"):
        html(EXAMPLES, tokens=TOKENS)
    with pytest.raises(TypeError, match="tokens must be a list of str"):
        html(Causal(), tokens="text")


def test_masks_and_tiles_show_themselves_in_a_notebook() -> None:
    from IPython.core.formatters import DisplayFormatter

    for shown, page in ((Causal(), html(Causal())), (Causal().tiles(8, 8), html_tiles(Causal().tiles(8, 8)))):
        assert DisplayFormatter().format(shown)[0]["text/html"] == page


def test_a_notebook_shows_the_first_of_many_panels() -> None:
    page = html(PerHead([SlidingWindow(size) for size in range(1, 41)]))
    assert len(read_back(page)) == 8
    assert "the first 8 of 40 panels" in text_of(page)


class Named(Mask):
    """A mask that says what it is called."""

    name: Any

    def __repr__(self) -> str:
        return f"Named({self.name()})"

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= q


@given(st.text(st.characters(exclude_categories=["C"])))
def test_text_is_escaped(name: str) -> None:
    mask = Named(lambda: name)
    assert text_of(html(mask)).startswith(repr(mask))
    assert text_of(html(Causal() & mask)).startswith(f"Causal() & {mask!r}")
    assert text_of(html_tiles(TileMap(np.zeros((1, 1), np.int8), mask, 0, 1, 1, (1, 1)))).startswith(repr(mask))


def _fails(b: Any, h: Any, q: Any, kv: Any) -> Any:
    raise RuntimeError("a mistake in the predicate")


@pytest.mark.parametrize(
    "mask",
    [
        Dense(np.ones((3, 5), bool)),
        Segments(np.zeros((1, 2), int), np.zeros((1, 5), int)),
        Causal() & Predicate(_fails),
        Predicate(lambda b, h, q, kv: h >= kv),
        jax.tree.map(lambda _: object(), Prefix(jnp.array([1, 2]))),
        jax.tree.map(lambda _: None, Causal() & Padding(np.ones((1, 2), bool))),
        jax.eval_shape(lambda: Padding(jnp.ones((1, 2), bool))),
    ],
)
def test_a_notebook_shows_the_text_of_a_mask_that_it_cannot_draw(mask: Mask) -> None:
    assert text_of(html(mask)) == repr(mask)


def test_a_notebook_shows_the_text_of_a_traced_mask() -> None:
    pages: list[str] = []

    @jax.jit
    def traced(valid: jax.Array) -> jax.Array:
        pages.extend((html(Padding(valid)), html_tiles(Padding(valid).tiles(3, 3)), html(Causal())))
        return valid

    traced(jnp.ones((1, 3), bool))
    mask, tiles, static = pages
    assert text_of(mask) == "Padding(bool[1, 3])"
    assert text_of(tiles) == "Padding(bool[1, 3]).tiles(3, 3, block=(128, 128))"
    assert static == html(Causal())


def test_a_notebook_needs_neither_rich_nor_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = html(Causal())
    for module in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    assert html(Causal()) == expected
