"""The pictures of the site are what their scripts draw now."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("script", "picture"),
    [("picture", "masks"), ("terminal", "show"), ("ratios", "ratios"), ("attention", "attention")],
)
def test_picture_is_what_its_script_draws(script: str, picture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    drawn = runpy.run_path(str(DOCS / f"{script}.py"))["page"]()
    assert drawn == (DOCS / f"{picture}.svg").read_text(encoding="utf-8"), f"python docs/{script}.py"
