"""Whatever code the site shows is run: sessions by tests, here and in ``tests/test_pages.py``, and commands by CI."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md")))
    if not {"_build", "notebooks"} & set(path.parts)
}
FENCE = re.compile(r"^ *(`{3,}|:{3,})(\S[^\n]*)\n(.*?)^ *\1$", re.DOTALL | re.MULTILINE)
BLOCKS = [(page, kind, text) for page, content in PAGES.items() for _, kind, text in FENCE.findall(content)]
COMMANDS = [
    (page, line) for page, kind, text in BLOCKS if kind == "console" for line in re.findall(r"^\$ (.*)", text, re.M)
]
# A target, a file that a target or a test runs, a command whose output a test compares; and how to get there.
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
RUN = MAKEFILE + "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
SHOWN = re.findall(r"^\$ (jaxmask .*)", PAGES["README.md"], re.MULTILINE)


def is_run(command: str) -> bool:
    """Whether a target or a test runs a command."""
    match command.split():
        case ["make", *words]:
            return bool({*words} & {*TARGETS})
        case ["python", file, *_]:
            return (ROOT / file).is_file() and file.rpartition("/")[2] in RUN
        case ["jaxmask", *_]:
            return command in SHOWN
        case [program, *_]:
            return program in ("git", "pip")
        case _:
            return False


def test_blocks_are_sessions_or_commands_or_no_code() -> None:
    others = {
        (page, kind) for page, kind, _ in BLOCKS if not kind.startswith("{") and kind not in ("python", "console")
    }
    assert others == set()


@pytest.mark.parametrize("page", sorted({page for page, kind, _ in BLOCKS if kind == "python"}))
def test_python_of_a_page_is_a_session(page: str) -> None:
    assert [
        text for at, kind, text in BLOCKS if (at, kind) == (page, "python") and not text.lstrip().startswith(">>> ")
    ] == []


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_of_a_page_is_run_by_a_target_or_a_test(page: str, command: str) -> None:
    assert is_run(command), f"{page} shows `{command}`, which nothing runs"


def test_a_command_that_nothing_runs_is_found() -> None:
    assert not is_run("make coffee")
    assert not is_run("python docs/nowhere.py")
    assert not is_run("jaxmask show causal --query 1234")


def test_the_front_page_gives_what_it_shows() -> None:
    session = "\n".join(text for page, kind, text in BLOCKS if (page, kind) == ("docs/index.md", "python"))
    test = doctest.DocTestParser().get_doctest(session, {}, "index", None, 0)
    assert len(test.examples) > 5
    assert doctest.DocTestRunner().run(test).failed == 0
