"""Text to mask and mask to picture: each is read back and compared with where it came from."""

import io
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from jaxmask import Causal, Dense, Empty, Full, Mask, Padding, Prefix, SlidingWindow, Window
from jaxmask.cli import app
from jaxmask.draw import show
from jaxmask.parse import MaskSyntaxError, parse_mask

SIZES = st.integers(0, 9)
BOUNDS = st.none() | SIZES
LEAVES: st.SearchStrategy[Mask] = st.one_of(
    st.just(Full()),
    st.just(Empty()),
    st.just(Causal()),
    st.integers(1, 9).map(SlidingWindow),
    st.builds(Window, BOUNDS, BOUNDS),
    SIZES.map(Prefix),
)


def combined(masks: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    pairs = st.tuples(masks, masks)
    return masks.map(lambda a: ~a) | pairs.map(lambda ab: ab[0] & ab[1]) | pairs.map(lambda ab: ab[0] | ab[1])


MASKS = st.recursive(LEAVES, combined, max_leaves=5)


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
        ("prefix(0x10)", Prefix(16)),
        ("  causal\n  & prefix(2)\t", Causal() & Prefix(2)),
        ("causal & (empty | ~prefix(2))", Causal() & ~Prefix(2)),
        ("causal | prefix(1) & window(0, 0)", Causal() | (Prefix(1) & Window(0, 0))),
        ("\u3000causal\u3000&\u3000prefix(2)", Causal() & Prefix(2)),
    ],
)
def test_names(text: str, mask: Mask) -> None:
    assert parse_mask(text) == mask


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


@pytest.mark.parametrize("depth", [100, 5_000])
def test_an_error_in_a_long_text_shows_what_is_around_it(depth: int) -> None:
    text = "(" * 90 + "casual" + ")" * 90 + " & full" * (depth // 100)
    with pytest.raises(MaskSyntaxError, match="did you mean 'causal'") as caught:
        parse_mask(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown[caret.index("^") :].startswith("casual")
    assert len(shown) < 90


def test_only_text_is_parsed() -> None:
    with pytest.raises(TypeError, match="text must be a str, got a Causal"):
        parse_mask(Causal())  # pyright: ignore[reportArgumentType]


# Mask to picture


def drawn(mask: Mask, *lengths: int, width: int = 120, encoding: str = "utf-8", **arguments: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    show(mask, *lengths, **arguments, console=Console(file=file, width=width, highlight=False))
    file.seek(0)
    return file.read()


def read_back(picture: str, yes: str = "■", no: str = "·") -> tuple[list[int], list[list[bool]]]:
    cells = rf"^\W*?(-?\d+)  ((?:[{re.escape(yes + no)}] ?)+)"
    rows = re.findall(cells, picture, flags=re.MULTILINE)
    return [int(label) for label, _ in rows], [[cell == yes for cell in row.replace(" ", "")] for _, row in rows]


@settings(deadline=None)
@given(MASKS, st.integers(1, 6), st.integers(1, 40), st.integers(-3, 12))
def test_a_picture_says_what_dense_says(mask: Mask, query_length: int, key_length: int, offset: int) -> None:
    picture = drawn(mask, query_length, key_length, offset=offset, width=80)
    labels, rows = read_back(picture)
    allowed = np.asarray(mask.dense(query_length, key_length, offset=offset))
    assert labels == list(range(offset, offset + query_length))
    np.testing.assert_array_equal(rows, allowed[0, 0])
    assert f"{allowed.sum()} of {allowed.size} pairs" in picture


def test_a_panel_for_each_example_and_head() -> None:
    allowed = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4) % 5 < 2
    picture = drawn(Dense(allowed), 2, 4, offset=0)
    assert [f"batch {b}, head {h}" in picture for b in range(2) for h in range(3)] == [True] * 6
    np.testing.assert_array_equal(np.reshape(read_back(picture)[1], allowed.shape), allowed)


def test_rows_are_labelled_by_the_offset_of_their_example() -> None:
    labels, rows = read_back(drawn(Causal(), 2, 12, offset=np.array([3, 10])))
    assert labels == [3, 4, 10, 11]
    assert np.sum(rows, axis=1).tolist() == [4, 5, 11, 12]
    assert "batch 1" in drawn(Padding(np.ones((2, 3), bool)), 3)


def test_columns_are_labelled_from_top_to_bottom() -> None:
    tens, units, first, *_ = drawn(Full(), 12).splitlines()
    assert (tens.split(), units.split()) == (["1", "1"], [*"012345678901"])
    assert first.index("■") == units.index("0")


def test_another_encoding_gets_other_glyphs() -> None:
    assert read_back(drawn(Causal(), 2, encoding="ascii"), "#", ".") == ([0, 1], [[True, False], [True, True]])


def test_a_picture_that_does_not_fit_is_refused() -> None:
    assert len(read_back(drawn(Causal(), 60, width=64))[1][0]) == 60
    with pytest.raises(ValueError, match="61 keys do not fit a console of 64 columns, which has room for 60"):
        drawn(Causal(), 61, width=64)


def test_alignment_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="offset is missing"):
        drawn(Causal(), 2, 3)


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.panel", None)
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
    texts = "".join(ElementTree.parse(file).getroot().itertext())
    assert "Causal() & Prefix(2)" in texts.replace("\xa0", " ")
    assert texts.count("■") == out.count("■")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["casual", "--query", "2"], "did you mean 'causal'?\n  casual\n  ^\n"),
        (["causal", "--query", "0"], "query_length must be at least 1"),
        (["causal", "--query", "2", "--key", "500"], "500 keys do not fit"),
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
    assert 'pip install "jaxmask[torch,cli]"' in err
