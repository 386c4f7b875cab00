"""Imports go one way: from description to interpretation to backend, as CONTRIBUTING.md has it."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "jaxmask").rglob("*.py")
}


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its file."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names):
                yield from (name.name for name in names if name.name in FILES)
            case ast.ImportFrom(source, names) if source in FILES:
                for name in names:
                    yield f"{source}.{name.name}" if f"{source}.{name.name}" in FILES else source
            case _:
                pass


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_room_is_in_the_table() -> None:
    assert sorted({room(module) for module in FILES if module != "jaxmask"}) == sorted(ROOMS)


def test_a_room_imports_only_rooms_above_it() -> None:
    against = {
        f"{module} imports {imported}"
        for module in FILES
        if module != "jaxmask"
        for imported in imports(module)
        if imported == "jaxmask" or ROOMS.index(room(imported)) > ROOMS.index(room(module))
    }
    assert against == set()


def test_there_is_no_circle() -> None:
    graph = {module: {imported for imported in imports(module) if imported != module} for module in FILES}
    assert list(graphlib.TopologicalSorter(graph).static_order())
