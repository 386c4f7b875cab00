"""Every public name is in the reference once, and every mask in the gallery."""

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import jaxmask
from jaxmask import zoo
from jaxmask.mask import Mask

DOCS = Path(__file__).parents[2] / "docs"
MODULES = [
    *("jaxmask", "jaxmask.zoo", "jaxmask.flax", "jaxmask.draw", "jaxmask.hf.masking_utils"),
    *("torch_compat", "torch_compat.models"),
]


def documented() -> list[str]:
    """The full name of whatever the reference describes."""
    found: list[str] = []
    for page in sorted(DOCS.glob("api/*.rst")):
        module = ""
        for directive, name in re.findall(r"^\.\. ([\w:]+):: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            if directive == "currentmodule":
                module = name
            elif directive in ("autoclass", "autofunction", "autoexception", "py:data"):
                found.append(name if "." in name else f"{module}.{name}")
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two names are of one thing; two of one integer are not."""
    return one is other and not isinstance(one, int)


def value(name: str) -> Any:
    """What a full name stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_the_reference_describes_nothing_twice() -> None:
    names = documented()
    assert sorted(names) == sorted(set(names))
    things = [value(name) for name in names]
    assert [name for i, name in enumerate(names) if any(same(things[i], other) for other in things[:i])] == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    names = documented()
    things = [value(name) for name in names]
    public: list[str] = importlib.import_module(module).__all__
    assert [
        name
        for name in public
        if f"{module}.{name}" not in names and not any(same(value(f"{module}.{name}"), thing) for thing in things)
    ] == []


def test_every_function_of_the_old_module_is_in_the_reference() -> None:
    module = importlib.import_module("jaxmask.hf.modeling_attn_mask_utils")
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    assert len(own) >= 6
    assert [name for name in own if f"{module.__name__}.{name}" not in documented()] == []


def test_every_mask_is_in_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    exhibits = runpy.run_path(str(DOCS / "exhibits.py"))["EXHIBITS"]
    used = {name for exhibit in exhibits for name in re.findall(r"[A-Za-z_]\w*", exhibit.code)}
    vocabulary = [
        name
        for name in jaxmask.__all__
        if name[0].isupper() and isinstance(thing := getattr(jaxmask, name), type) and issubclass(thing, Mask)
    ]
    masks = [name for name in vocabulary if name != "Mask"]
    assert len(masks) >= 12
    assert [name for name in (*masks, *zoo.__all__) if name not in used] == []
