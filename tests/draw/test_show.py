"""Text to mask and mask to picture: each is read back and compared with where it came from."""

import io
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from jaxmask import (
    Causal,
    Chunked,
    Dense,
    Empty,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    SlidingWindow,
    Window,
)
from jaxmask.cli import app
from jaxmask.draw import show, show_tiles
from jaxmask.parse import MaskSyntaxError, parse_mask

SIZES = st.integers(0, 9)
BOUNDS = st.none() | SIZES
SINGLE: st.SearchStrategy[Mask] = st.one_of(
    st.just(Full()),
    st.just(Empty()),
    st.just(Causal()),
    st.integers(1, 9).map(SlidingWindow),
    st.builds(Window, BOUNDS, BOUNDS),
    st.builds(Chunked, st.integers(1, 9), SIZES),
    SIZES.map(Prefix),
)
# Two heads each, for masks with different numbers of heads do not combine.
PER_HEAD = st.tuples(SINGLE, SINGLE).map(PerHead)


def combined(masks: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    pairs = st.tuples(masks, masks)
    return masks.map(lambda a: ~a) | pairs.map(lambda ab: ab[0] & ab[1]) | pairs.map(lambda ab: ab[0] | ab[1])


MASKS = st.recursive(SINGLE | PER_HEAD, combined, max_leaves=5)


# Text to mask


@given(MASKS)
def test_what_a_mask_prints_is_read_back(mask: Mask) -> None:
    assert parse_mask(repr(mask)) == mask


@given(st.text() | st.text("causl window(0123,None)&|~ -#'\"\n").filter(bool))
def test_any_other_text_is_refused_and_nothing_else_is_raised(text: str) -> None:
    lines = 3
    try:
        parse_mask(text)
    except MaskSyntaxError as error:
        lines = len(str(error).split("\n"))
    assert lines == 3


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("full", Full()),
        ("Full()", Full()),
        ("empty", Empty()),
        ("causal", Causal()),
        ("causal()", Causal()),
        ("sliding_window(3)", SlidingWindow(3)),
        ("SlidingWindow(3)", SlidingWindow(3)),
        ("window(None, 2)", Window(None, 2)),
        ("window(1, None)", Window(1, None)),
        ("chunked(4)", Chunked(4)),
        ("chunked(4, 2)", Chunked(4, 2)),
        ("prefix(0x10)", Prefix(16)),
        ("per_head(causal, ~prefix(2) & full)", PerHead([Causal(), ~Prefix(2)])),
        ("PerHead((Causal(), Full()))", PerHead([Causal(), Full()])),
        ("  causal\n  & prefix(2)\t", Causal() & Prefix(2)),
        ("causal & (empty | ~prefix(2))", Causal() & ~Prefix(2)),
        ("causal | prefix(1) & window(0, 0)", Causal() | (Prefix(1) & Window(0, 0))),
        ("\u3000causal\u3000&\u3000prefix(2)", Causal() & Prefix(2)),
    ],
)
def test_names(text: str, mask: Mask) -> None:
    assert parse_mask(text) == mask


@pytest.mark.breaks_annotations
@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("", 0, "empty text"),
        (" \n ", 0, "empty text"),
        ("casual", 0, "did you mean 'causal'"),
        ("causal & slidingwindow(3)", 9, "did you mean 'sliding_window'"),
        ("causal & xyzzy", 9, "there are full, empty"),
        ("causal &", 8, "invalid syntax"),
        ("(causal", 0, "never closed"),
        ("causal & )", 9, "unmatched ')'"),
        ("causal\0", 6, r"'\x00'"),
        ("causal \ud800", 7, r"'\ud800'"),
        ("causal # & full", 7, "'#'"),
        ("causal and full", 7, "&, | and ~"),
        ("(causal) + full", 9, "&, | and ~"),
        ("causal < full", 7, "&, | and ~"),
        ("full & (not causal)", 8, "&, | and ~"),
        ("full & -causal", 7, "&, | and ~"),
        ("full & 3", 7, "expected a mask"),
        ("full & a.b(1)", 7, "expected a mask"),
        ("full & (lambda: 1)()", 7, "expected a mask"),
        ("__import__('os')", 0, "unknown mask '__import__'"),
        ("full & sliding_window", 7, "sliding_window(size), got no"),
        ("full & sliding_window(1, 2)", 7, "sliding_window(size), got 2"),
        ("causal(1)", 0, "causal(), got 1"),
        ("sliding_window(size=3)", 15, "by position"),
        ("sliding_window(**3)", 15, "by position"),
        ("sliding_window(*3)", 15, "expected an integer, got *3"),
        ("sliding_window(True)", 15, "expected an integer, got True"),
        ("sliding_window(3.0)", 15, "expected an integer, got 3.0"),
        ("prefix('字')", 7, "expected an integer, got '字'"),
        ("full & sliding_window(0)", 7, "size must be at least 1"),
        ("full & sliding_window(None)", 7, "size must be a Python int"),
        ("full & prefix(99999999999)", 7, "fit an int32"),
        ("window(1, 2) & window(-1, 2)", 15, "left must be at least 0"),
        ("causal & padding([1])", 9, "build it in Python"),
        ("Dense", 0, "build it in Python"),
        ("full & Predicate(f)", 7, "build it in Python"),
        # Two columns for each Chinese character, none for an accent.
        ("掩码", 0, "unknown mask '掩码'"),
        ("掩码(1\uff0c2)", 6, "invalid character '\uff0c'"),
        ("full & x掩码", 7, "unknown mask"),
        ("full & prefix('掩码') + full", 22, "&, | and ~"),
        ("prefix('e\u0301') + full", 12, "&, | and ~"),
        ("~" * 50_000 + "causal", 0, "nested too deeply"),
        ("causal & " * 50_000 + "causal", 0, "nested too deeply"),
    ],
)
def test_an_error_points_at_its_column(text: str, column: int, problem: str) -> None:
    with pytest.raises(MaskSyntaxError) as caught:
        parse_mask(text)
    message, shown, caret = str(caught.value).split("\n")
    assert problem in message
    assert caret == "  " + " " * column + "^"
    assert shown.startswith("  " + re.sub(r"\s", " ", text).strip()[: column // 2].replace("\0", "\ufffd"))


def test_a_chain_is_not_nested() -> None:
    assert repr(parse_mask(" | ".join(["causal", "prefix(2)"] * 500))) == " | ".join(["Causal()", "Prefix(2)"] * 500)
    assert repr(parse_mask("causal & full & empty | prefix(2)")) == "Prefix(2)"


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "x" * 10**6 + "(1)", "prefix(" + "x" * 10**6 + ")", "x" * 10**6 + "(a=1)"]
)
def test_a_long_name_is_not_echoed(text: str) -> None:
    with pytest.raises(MaskSyntaxError, match=r"x{50}…") as caught:
        parse_mask(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("depth", [100, 5_000])
def test_an_error_in_a_long_text_shows_what_is_around_it(depth: int) -> None:
    text = "(" * 90 + "casual" + ")" * 90 + " & full" * (depth // 100)
    with pytest.raises(MaskSyntaxError, match="did you mean 'causal'") as caught:
        parse_mask(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^") :].startswith("casual")
    assert len(shown) < 90


@pytest.mark.breaks_annotations
def test_only_text_is_parsed() -> None:
    with pytest.raises(TypeError, match="text must be a str, got a Causal"):
        parse_mask(Causal())  # pyright: ignore[reportArgumentType]


# Mask to picture


def printed(draw: Any, *arguments: Any, width: int = 120, encoding: str = "utf-8", **named: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    draw(*arguments, **named, console=Console(file=file, width=width, highlight=False))
    file.seek(0)
    picture = file.read()
    assert max(map(len, picture.splitlines())) <= width
    return picture


def drawn(mask: Mask, *lengths: int, **arguments: Any) -> str:
    return printed(show, mask, *lengths, **arguments)


def read_back(picture: str, yes: str = "■", no: str = "·") -> tuple[list[int], list[list[bool]]]:
    cells = rf"^ *(-?\d+)  ((?:[{re.escape(yes + no)}] ?)+)$"
    # Lines between tiles are no part of the cells.
    rows = re.findall(cells, re.sub(r"[│|] ?", "", picture), flags=re.MULTILINE)
    return [int(label) for label, _ in rows], [[cell == yes for cell in row.replace(" ", "")] for _, row in rows]


def read_tiles(picture: str, key_length: int, states: str = "·▒█") -> tuple[tuple[int, int], list[int], Any]:
    """The size of the tiles, the labels of their rows, and their states."""
    size = re.search(r"tiles\s+of\s+([\d,]+)\s+queries\s+by\s+([\d,]+)\s+keys", picture)
    assert size is not None
    queries, keys = (int(number.replace(",", "")) for number in size.groups())
    rows = re.findall(rf"^ *(-?\d+)  ((?:[{re.escape(states)}] ?)+)$", picture, flags=re.MULTILINE)
    # One character for a tile or two, the second of which may be a space, cut off at the end of a line.
    step = -(-max(len(row) for _, row in rows) // -(-key_length // keys))
    found = [[states.index(state) for state in row[::step]] for _, row in rows]
    return (queries, keys), [int(label) for label, _ in rows], np.array(found)


def read_outlines(picture: str) -> list[list[int]]:
    rules = [line for line in picture.splitlines() if re.match(r" +[┌├]", line)]
    return [["·▒█".index(mark) for mark in re.findall(r"[┌├┬┼](.)", rule)] for rule in rules]


class TilesOnly(Mask):
    """Causal, for who does not ask for pairs."""

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        raise AssertionError("pairs were asked for")

    def tile_bounds(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return Causal().tile_bounds(b, h, q, kv)


@settings(deadline=None)
@given(MASKS, st.integers(1, 6), st.integers(1, 40), st.integers(-3, 12))
def test_a_picture_says_what_dense_says(mask: Mask, query_length: int, key_length: int, offset: int) -> None:
    picture = drawn(mask, query_length, key_length, offset=offset, width=80)
    labels, rows = read_back(picture)
    allowed = np.asarray(mask.dense(query_length, key_length, offset=offset))
    panels = allowed.shape[1]
    assert labels == list(range(offset, offset + query_length)) * panels
    np.testing.assert_array_equal(np.reshape(rows, allowed.shape), allowed)
    assert f"{allowed.sum()} of {allowed.size} pairs" in picture


@settings(max_examples=30)
@given(MASKS, st.sampled_from([(5, 11), (8, 40)]), st.integers(1, 9), st.integers(1, 9))
def test_outlines_say_what_tiles_say(mask: Mask, lengths: tuple[int, int], queries: int, keys: int) -> None:
    picture = drawn(mask, *lengths, offset=2, block=(queries, keys))
    allowed = np.asarray(mask.dense(*lengths, offset=2))
    np.testing.assert_array_equal(np.reshape(read_back(picture)[1], allowed.shape), allowed)
    tiles = mask.tiles(*lengths, offset=2, block=(queries, keys))
    np.testing.assert_array_equal(np.reshape(read_outlines(picture), tiles.states.shape), tiles.states)
    assert f"{tiles.counts[0]} of {tiles.states.size} are EMPTY" in picture


@given(
    MASKS,
    st.sampled_from([(1, 500), (300, 4), (129, 129), (1000, 3000), (70_000, 131_072)]),
    st.integers(-3, 999),
    st.none() | st.integers(1, 700),
    st.integers(10, 200),
)
def test_a_large_mask_is_drawn_by_its_tiles(
    mask: Mask, lengths: tuple[int, int], offset: int, block: int | None, width: int
) -> None:
    picture = drawn(mask, *lengths, offset=offset, block=block, width=width)
    size, labels, states = read_tiles(picture, lengths[1])
    tiles = mask.tiles(*lengths, offset=offset, block=size)
    np.testing.assert_array_equal(states.reshape(tiles.states.shape), tiles.states)
    assert labels == [*range(offset, offset + lengths[0], size[0])] * tiles.states.shape[1]
    if block is not None:
        assert [math.log2(part / block) % 1 for part in size] == [0, 0]


def test_a_large_mask_is_never_written_out() -> None:
    size, _, states = read_tiles(drawn(TilesOnly(), 131_072, width=80), 131_072)
    assert size == (4096, 2048)
    assert np.bincount(states.reshape(-1)).tolist() == [992, 64, 992]


def test_columns_of_tiles_are_labelled_where_they_begin() -> None:
    ruler, first, *_ = drawn(Full(), 4096, width=80).splitlines()
    columns = {int(label): ruler.index(label) - first.index("█") for label in ruler.split()}
    assert len(columns) > 5
    assert all(column * 64 == label for label, column in columns.items())


def test_tiles_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    tiles = (Causal() & Padding(jnp.arange(60)[None] >= jnp.array([[33], [0]]))).tiles(60, 60, block=(8, 16))
    tiles.show()
    size, labels, states = read_tiles(capsys.readouterr().out, 60)
    assert size == (8, 16)
    assert labels == [*range(0, 60, 8)] * 2
    np.testing.assert_array_equal(states.reshape(tiles.states.shape), tiles.states)


@given(MASKS, st.sampled_from([(1, 5000), (5000, 4), (2000, 2000)]), st.integers(1, 20), st.integers(10, 90))
def test_too_many_tiles_are_shown_larger(mask: Mask, lengths: tuple[int, int], block: int, width: int) -> None:
    picture = printed(show_tiles, mask.tiles(*lengths, block=block, offset=0), width=width)
    size, _, states = read_tiles(picture, lengths[1])
    tiles = mask.tiles(*lengths, block=size, offset=0)
    np.testing.assert_array_equal(states.reshape(tiles.states.shape), tiles.states)


def test_a_panel_for_each_example_and_head() -> None:
    allowed = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4) % 5 < 2
    picture = drawn(Dense(allowed), 2, 4, offset=0)
    assert [f"batch {b}, head {h}" in picture for b in range(2) for h in range(3)] == [True] * 6
    np.testing.assert_array_equal(np.reshape(read_back(picture)[1], allowed.shape), allowed)


@pytest.mark.parametrize("length", [2, 1000])
def test_of_many_panels_the_first_are_drawn(length: int) -> None:
    picture = drawn(PerHead([SlidingWindow(size) for size in range(1, 41)]), length)
    assert "the first 32 of 40 panels" in picture
    assert re.findall(r"head (\d+)", picture) == [str(head) for head in range(32)]


@pytest.mark.parametrize("length", [4, 1000])
def test_of_too_many_heads_those_that_look_alike_are_drawn_once(length: int) -> None:
    window, causal = SlidingWindow(2), Causal()
    picture = drawn(PerHead([window] * 30 + [causal] * 3 + [window] * 31) & Full(), length)
    assert re.findall(r"heads? .*", picture) == ["heads 0-29, 33-63", "heads 30-32"]
    if length == 4:
        np.testing.assert_array_equal(
            np.reshape(read_back(picture)[1], (2, 4, 4)), [window.dense(4, 4)[0, 0], causal.dense(4, 4)[0, 0]]
        )


def test_tiles_that_are_too_many_to_be_drawn_are_counted() -> None:
    picture = drawn(Causal(), 131_072, block=512)
    empty = int(Causal().tiles(131_072, 131_072, block=512).counts[0])
    assert f"asked for were tiles of 512 queries by 512 keys; {empty:,} of 65,536 are EMPTY" in picture.replace(
        "\n", ""
    )
    assert "tiles of 1 queries by 1 keys; 17,179,869,184 are too many" in drawn(Causal(), 131_072, block=1)
    tiles = Causal().tiles(1000, 1000, block=2)
    assert f"asked for were tiles of 2 queries by 2 keys; {tiles.counts[0]:,} of" in printed(show_tiles, tiles)
    assert "asked for" not in drawn(Causal(), 131_072) + drawn(Causal(), 131_072, block=4096) + drawn(
        Causal(), 8, block=2
    )


def test_a_block_that_is_larger_than_the_mask_is_one_tile() -> None:
    picture = drawn(Causal(), 4, block=2_000_000_000)
    assert read_outlines(picture) == [[1]]
    assert "tiles of 2,000,000,000 queries" in picture


class Unbounded(Mask):
    """Causal, and nothing is said of tiles."""

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= q


@pytest.mark.parametrize("arguments", [{}, {"block": 100}])
def test_a_mask_that_says_nothing_of_tiles_is_named(arguments: Any) -> None:
    known = Predicate(lambda b, h, q, kv: kv <= q, bounds=lambda b, h, q, kv: (kv.min <= q.max, False))
    unknown = Predicate(lambda b, h, q, kv: kv <= q)
    for mask, named in (
        (Causal() & known, []),
        (Causal() & ~unknown, ["Predicate"]),
        (PerHead([Unbounded(), unknown]), ["Predicate", "Unbounded"]),
        (Empty() & unknown, []),
    ):
        assert re.findall(r"(\w+) has no bounds, and says nothing of tiles", drawn(mask, 1000, **arguments)) == named
    assert "Predicate has no bounds" in drawn(unknown, 8, block=4)
    assert "has no bounds" not in drawn(unknown, 8)


def test_tokens_label_queries_and_keys() -> None:
    assert drawn(Causal(), 4, tokens=["The", "今天", "😀", "a\nb"]).splitlines()[:8] == [
        "            a",
        "      T     \\",
        "      h 今  n",
        "      e 天😀b",
        " The  ■ · · ·",
        "今天  ■ ■ · ·",
        "  😀  ■ ■ ■ ·",
        "a\\nb  ■ ■ ■ ■",
    ]
    # A column of nothing but an accent is as wide as any.
    assert "tiles of" in drawn(Full(), 1, 90, tokens=["a"], key_tokens=["\u0301"] * 90, width=60)
    # An emoji of several characters is one, an accent takes no column, and an empty text is nothing.
    family = "👨\u200d👩\u200d👧"
    assert drawn(Full(), 1, 3, tokens=["a"], key_tokens=[family, "e\u0301", ""]).splitlines()[:2] == [
        f"   {family}e\u0301",
        "a  ■ ■ ■",
    ]


@given(st.lists(st.text(max_size=40), min_size=4, max_size=4))
def test_any_tokens_keep_the_cells_in_their_columns(tokens: list[str]) -> None:
    for encoding, yes in (("utf-8", "■"), ("ascii", "#")):
        lines = drawn(Causal(), 4, tokens=tokens, encoding=encoding).splitlines()
        rows = lines[-6:-2]
        assert [[cell == yes for cell in row[-7::2]] for row in rows] == np.tri(4, dtype=bool).tolist()
        (width,) = {cell_len(row) for row in rows}
        # No label stands beside its column.
        assert all(cell_len(line) <= width + 1 for line in lines[:-6])


def test_tokens_are_of_queries_and_of_keys_only_where_these_are_the_same() -> None:
    assert drawn(Causal(), 2, 3, offset=1, tokens=["a", "b"]).splitlines()[:3] == ["   0 1 2", "a  ■ ■ ·", "b  ■ ■ ■"]
    assert drawn(Causal(), 2, key_tokens=["a", "b"]).splitlines()[:2] == ["   a b", "0  ■ ·"]


def test_wide_tokens_need_twice_the_room() -> None:
    assert len(read_back(re.sub("[今a]", "0", drawn(Causal(), 30, tokens=["a"] * 29 + ["今"], width=64)))[1]) == 30
    assert read_tiles(drawn(Causal(), 31, tokens=["a"] * 30 + ["今"], width=64), 31)[0] == (2, 1)
    assert len(read_back(re.sub("a", "0", drawn(Causal(), 31, tokens=["a"] * 31, width=64)))[1]) == 31


@pytest.mark.breaks_annotations
def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must have one str for each of the 3 queries, got 1"):
        drawn(Causal(), 3, tokens=["a"])
    with pytest.raises(TypeError, match="key_tokens must be a list of str, one for each of the 3 keys, got 'abc'"):
        drawn(Causal(), 3, key_tokens="abc")


def test_rows_are_labelled_by_the_offset_of_their_example() -> None:
    labels, rows = read_back(drawn(Causal(), 2, 12, offset=np.array([3, 10])))
    assert labels == [3, 4, 10, 11]
    assert np.sum(rows, axis=1).tolist() == [4, 5, 11, 12]
    assert "batch 1" in drawn(Padding(np.ones((2, 3), bool)), 3)


@pytest.mark.parametrize("positions", [[7, 0, -2], [[7, 0, -2], [3, 4, 100]]])
def test_rows_are_labelled_by_the_positions_of_their_queries(positions: Any) -> None:
    labels, rows = read_back(drawn(Causal(), 3, 9, query_positions=jnp.array(positions)))
    assert labels == np.ravel(positions).tolist()
    np.testing.assert_array_equal(rows, np.arange(9) <= np.reshape(positions, (-1, 1)))


def test_tiles_are_labelled_by_the_positions_of_their_first_queries() -> None:
    positions = np.arange(1000)[::-1]
    size, labels, states = read_tiles(drawn(Causal(), 1000, query_positions=positions), 1000)
    assert labels == positions[:: size[0]].tolist()
    tiles = Causal().tiles(1000, 1000, block=size, query_positions=positions)
    np.testing.assert_array_equal(states.reshape(tiles.states.shape), tiles.states)


def test_tiles_know_the_positions_of_their_queries(capsys: pytest.CaptureFixture[str]) -> None:
    Causal().tiles(4, 4, block=2, query_positions=jnp.array([5, 3, 9, -1])).show()
    assert read_tiles(capsys.readouterr().out, 4)[1] == [5, 9]


def test_offset_and_positions_of_queries_are_refused_together() -> None:
    with pytest.raises(ValueError, match="offset and query_positions"):
        drawn(Causal(), 2, 3, offset=1, query_positions=jnp.array([1, 2]))


def test_columns_are_labelled_from_top_to_bottom() -> None:
    tens, units, first, *_ = drawn(Full(), 12).splitlines()
    assert (tens.split(), units.split()) == (["1", "1"], [*"012345678901"])
    assert first.index("■") == units.index("0")


def test_columns_are_labelled_by_the_positions_of_their_keys() -> None:
    positions = jnp.array([[8, 9, -1, 7], [4, 15, 2, 3]])
    picture = drawn(Causal(), 2, 4, offset=8, key_positions=positions)
    tens, units, *_ = picture.splitlines()[1:]
    assert (tens.split(), units.split()) == (["-"], ["8", "9", "1", "7"])
    tens, units, *_ = picture.partition("batch 1\n")[2].splitlines()
    assert (tens.split(), units.split()) == (["1"], ["4", "5", "2", "3"])
    np.testing.assert_array_equal(
        np.reshape(read_back(picture)[1], (2, 1, 2, 4)), Causal().dense(2, 4, offset=8, key_positions=positions)
    )


def test_another_encoding_gets_other_glyphs() -> None:
    assert read_back(drawn(Causal(), 2, encoding="ascii"), "#", ".") == ([0, 1], [[True, False], [True, True]])
    outlined = drawn(Causal(), 2, block=1, encoding="ascii").splitlines()
    assert outlined[1:6] == ["   +#--+.--+", "0  | # | . |", "   +#--+#--+", "1  | # | # |", "   +---+---+"]
    _, _, states = read_tiles(drawn(Causal(), 2000, encoding="ascii"), 2000, ".:#")
    assert {*states.reshape(-1)} == {0, 1, 2}


def test_pairs_are_drawn_where_they_fit() -> None:
    assert len(read_back(drawn(Causal(), 60, width=64))[1][0]) == 60
    assert read_tiles(drawn(Causal(), 61, width=64), 61)[0] == (4, 2)
    assert len(read_outlines(drawn(Causal(), 12, block=4, width=20))) == 3
    assert read_tiles(drawn(Causal(), 12, block=4, width=19), 12)[0] == (4, 4)


def test_a_console_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a console of 6 columns has no room"):
        drawn(Causal(), 1, offset=1000, width=6)


@pytest.mark.breaks_annotations
@pytest.mark.parametrize("name", ["offset", "key_positions"])
def test_bad_positions_are_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        drawn(Causal(), 2, **{"offset": 0, name: "zero"})


def test_alignment_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="offset is missing"):
        drawn(Causal(), 2, 3)


@pytest.mark.breaks_annotations
@pytest.mark.parametrize("block", [0, (4, 0), (4, 4, 4), "4"])
def test_a_block_that_is_none_is_refused(block: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="block must be"):
        drawn(Causal(), 8, block=block)


@pytest.mark.breaks_annotations
def test_only_masks_are_drawn() -> None:
    with pytest.raises(TypeError, match=re.escape("mask must be a Mask, got bool[3, 3]; wrap it in Dense")):
        show(jnp.ones((3, 3), bool), 3)  # pyright: ignore[reportArgumentType]


def test_a_traced_mask_has_no_picture_and_another_has_one_inside_of_jit() -> None:
    pictures: list[str] = []

    @jax.jit
    def traced(valid: jax.Array) -> jax.Array:
        pictures.append(drawn(Causal() & Padding(np.ones((1, 3), bool)), 3))
        with pytest.raises(TypeError, match="mask is being traced, and has no contents"):
            drawn(Padding(valid), 3)
        with pytest.raises(TypeError, match="offset is being traced"):
            drawn(Causal(), 3, offset=valid.sum())
        with pytest.raises(TypeError, match="query_positions is being traced"):
            drawn(Causal(), 3, query_positions=valid[0].astype(int))
        with pytest.raises(TypeError, match="tiles is being traced"):
            Padding(valid).tiles(3, 3).show()
        return valid

    traced(jnp.ones((1, 3), bool))
    assert pictures == [drawn(Causal(), 3)]


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=re.escape('pip install "jaxmask[cli]"')):
        show(Causal(), 2)


# The command


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command_show() -> None:
    status, out, err = run("show", "causal & sliding_window(3)", "--query", "6")
    assert (status, err) == (0, "")
    assert "Causal() & SlidingWindow(3)" in out
    np.testing.assert_array_equal(read_back(out)[1], SlidingWindow(3).dense(6, 6)[0, 0])


@pytest.mark.parametrize(("options", "first"), [([], 2), (["--offset", "0"], 0), (["--offset", "-1"], -1)])
def test_command_show_says_how_it_aligns(options: list[str], first: int) -> None:
    status, out, _ = run("show", "causal", "--query", "6", "--key", "8", *options)
    assert status == 0
    assert read_back(out)[0] == list(range(first, first + 6))
    assert ("offset 2: the last query is at the last key" in out) == (not options)


def test_command_show_writes_svg(tmp_path: Path) -> None:
    file = tmp_path / "mask.svg"
    status, out, _ = run("show", "causal & prefix(2)", "--query", "3", "--svg", str(file))
    assert status == 0
    figure = file.read_text(encoding="utf-8")
    kinds = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(figure).iter()}
    # Its letters are paths: no font is fetched, and no window of a terminal is around it.
    assert {"image", "path"} <= kinds
    assert "text" not in kinds
    assert "@font-face" not in figure
    assert "<!-- Causal() &amp; Prefix(2) -->" in figure
    assert "■" in out


def test_command_show_outlines_tiles_and_draws_large_masks_by_them() -> None:
    status, out, _ = run("show", "causal & chunked(4)", "--query", "8", "--block", "4")
    assert status == 0
    assert read_outlines(out) == [[1, 0], [0, 1]]
    status, out, _ = run("show", "per_head(causal, full)", "--query", "131072")
    assert status == 0
    size, _, states = read_tiles(out, 131_072)
    tiles = PerHead([Causal(), Full()]).tiles(131_072, 131_072, block=size)
    np.testing.assert_array_equal(states.reshape(tiles.states.shape), tiles.states)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["casual", "--query", "2"], "did you mean 'causal'?\n  casual\n  ^\n"),
        (["per_head(" * 180 + "causal" + ")" * 180, "--query", "2"], "nested too deeply"),
        (
            ["causal", "--query", "2147483647"],
            "query must be at most 16777216, to be drawn in seconds, got 2147483647\n",
        ),
        (["causal", "--query", "2", "--key", "2147483647"], "key must be at most 16777216"),
        (["causal", "--query", "0"], "query_length must be at least 1"),
        (["causal", "--query", "2", "--block", "0"], "block must be at least 1"),
        (["causal", "--query", "2", "--offset", "99999999999"], "fit an int32"),
        (["causal", "--query", "2", "--svg", "/nowhere/at/all.svg"], "/nowhere/at/all.svg"),
        (["causal"], "--query"),
        (["causal", "--query", "two"], "--query"),
    ],
)
def test_command_show_refuses(arguments: list[str], problem: str) -> None:
    status, _, err = run("show", *arguments)
    assert status == 2
    assert problem in err


@pytest.mark.parametrize(
    "text", [" | ".join(["sliding_window(3)"] * 1_000), "per_head(" * 49 + "causal" + ")" * 49, "~" * 49 + "causal"]
)
def test_command_show_draws_a_long_chain_and_a_deep_nest(text: str) -> None:
    assert run("show", text, "--query", "4")[0] == 0


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("a\nb"), 2, "jaxmask: a\\nb\n"),
        (OSError("disk \x1b[2J"), 2, "jaxmask: disk \\x1b[2J\n"),
        (RecursionError("deep"), 1, "jaxmask: RecursionError: deep\n"),
        (KeyError("lost"), 1, "jaxmask: KeyError: 'lost'\n"),
        (AssertionError("a bug"), 1, "jaxmask: AssertionError: a bug\n"),
    ],
)
def test_every_error_of_a_command_is_a_line_and_a_status(
    error: Exception, status: int, said: str, verification: "Verification", monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> int:
        raise error

    monkeypatch.setattr(verification, "run", fail)
    assert run("verify") == (status, "", said)


class Verification(ModuleType):
    """Stands in for ``torch_compat.verify``, which has tests of its own."""

    def __init__(self) -> None:
        super().__init__("torch_compat.verify")
        self.received: dict[str, object] = {}

    def run(self, **arguments: object) -> int:
        self.received = arguments
        if arguments["dtypes"] == ["float8"]:
            raise ValueError("no dtype float8")
        return 1


@pytest.fixture
def verification(monkeypatch: pytest.MonkeyPatch) -> Verification:
    import torch_compat

    module = Verification()
    monkeypatch.setitem(sys.modules, "torch_compat.verify", module)
    monkeypatch.setattr(torch_compat, "verify", module, raising=False)
    return module


def test_command_verify_hands_over_its_options_and_status(verification: Verification) -> None:
    assert run("verify")[0] == 1
    nothing = dict.fromkeys(("cases", "operations", "dtypes", "oracles", "report"))
    assert verification.received == nothing | {"seed": 0}
    run("verify", "--cases", "3", "--seed", "1", "--op", "a", "--op", "b", "--oracle", "c", "--report", "r.md")
    assert verification.received == {
        "cases": 3,
        "seed": 1,
        "operations": ["a", "b"],
        "dtypes": None,
        "oracles": ["c"],
        "report": Path("r.md"),
    }


def test_command_verify_refuses(verification: Verification) -> None:
    assert run("verify", "--dtype", "float8") == (2, "", "jaxmask: no dtype float8\n")
    assert verification.received["dtypes"] == ["float8"]


def test_command_verify_refuses_a_report_that_cannot_be_written_before_it_works(tmp_path: Path) -> None:
    status, out, err = run("verify", "--report", str(tmp_path / "missing" / "report.json"))
    assert (status, out) == (2, "")
    assert str(tmp_path / "missing" / "report.json") in err


def test_command_verify_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_compat

    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch_compat.verify":
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.delattr(torch_compat, "verify", raising=False)
    monkeypatch.delitem(sys.modules, "torch_compat.verify", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    status, _, err = run("verify")
    assert status == 2
    assert 'pip install "jaxmask[verify]"' in err
