"""Code that the site shows is run: sessions by tests, here and in ``tests/test_pages.py``, commands by CI or by a test.

Benchmarks are not, but for the smallest form of each.
"""

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
# Targets that CI runs, what builds them, and those that take too long or are parts of others.
MAKEFILE, CI = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/run"))
TARGETS = {*" ".join(re.findall(r"^make (.*)", CI, re.MULTILINE)).split(), "docs", "bench", "test-fast"}
# Files that a target or a test runs, and commands whose output a test compares.
RUN = MAKEFILE + "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
SHOWN = re.findall(r"^\$ (jaxmask .*)", PAGES["README.md"], re.MULTILINE)


def is_run(command: str) -> bool:
    """Whether a target or a test runs a command."""
    first, _, rest = command.partition(" && ")
    if rest:
        return is_run(first) and is_run(rest)
    match command.split("|")[0].split():
        case ["make", *words]:
            return {word for word in words if not word.startswith("-")} <= TARGETS
        case ["python", file, *_]:
            stem = Path(file).stem
            return (ROOT / file).is_file() and (f" {file}" in RUN or bool(re.search(rf'"{stem}(\.py)?"', RUN)))
        case ["jaxmask", *_]:
            return command in SHOWN
        case [program, *_]:
            return program in ("git", "pip", "cd")
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
    assert not is_run("make lint && make coffee")
    assert not is_run("python docs/nowhere.py")
    assert not is_run("jaxmask show causal --query 1234")


def test_the_front_page_gives_what_it_shows() -> None:
    session = "\n".join(text for page, kind, text in BLOCKS if (page, kind) == ("docs/index.md", "python"))
    test = doctest.DocTestParser().get_doctest(session, {}, "index", None, 0)
    assert len(test.examples) > 5
    assert doctest.DocTestRunner().run(test).failed == 0
