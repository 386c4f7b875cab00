"""What the pages of words show is what happens: their sessions, their links, their tables of keywords."""

# pyright: reportMissingTypeStubs=false

import doctest
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
import tokamax
import torch
from flax import linen, nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from torch.nn.attention import flex_attention as flex
from transformers.masking_utils import create_causal_mask

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *sorted(ROOT.glob("docs/guide/*.md")),
        *sorted(ROOT.glob("docs/howto/*.md")),
    )
}
SESSIONS = {page: "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) for page, text in PAGES.items()}
# The signature of this one is in its docstring alone.
SDPA = (torch.nn.functional.scaled_dot_product_attention.__doc__ or "").split("(", 1)[1].split(")", 1)[0].split(",")
CALLS: dict[str, Callable[..., Any]] = {
    "FlexAttention": flex.flex_attention,
    "create_block_mask": flex.create_block_mask,
    "jax.nn": jax.nn.dot_product_attention,
    "tokamax": tokamax.dot_product_attention,
    "splash": splash._make_splash_attention,  # pyright: ignore[reportPrivateUsage]
    "create_causal_mask": create_causal_mask,
    "linen": linen.dot_product_attention,
    "nnx": nnx.dot_product_attention,
}
# The heading of the section that has their rows.
SECTIONS = {
    "SDPA": "PyTorch: `scaled_dot_product_attention`",
    "FlexAttention": "PyTorch: FlexAttention",
    "create_block_mask": "PyTorch: FlexAttention",
    "jax.nn": "JAX: `jax.nn.dot_product_attention`",
    "tokamax": "tokamax: `dot_product_attention`",
    "splash": "splash attention",
    "create_causal_mask": "Transformers 5: `create_causal_mask`",
    "linen": "Flax: `MultiHeadAttention`",
    "nnx": "Flax: `MultiHeadAttention`",
}
KEYWORDS = {"SDPA": [keyword.split("=")[0].strip() for keyword in SDPA]} | {
    name: list(inspect.signature(call).parameters) for name, call in CALLS.items()
}


@pytest.mark.parametrize("page", [page for page, session in SESSIONS.items() if session])
def test_sessions_of_a_page_give_what_they_show(page: str) -> None:
    test = doctest.DocTestParser().get_doctest(SESSIONS[page], {}, page, page, 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_has_a_row_in_the_page_on_porting(name: str) -> None:
    assert len(KEYWORDS[name]) >= 8
    section = PAGES["docs/howto/port.md"].split(f"\n## {SECTIONS[name]}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert [keyword for keyword in KEYWORDS[name] if keyword not in named] == []


def test_every_test_that_security_names_is_there() -> None:
    text = PAGES["SECURITY.md"]
    files = "".join((ROOT / path).read_text(encoding="utf-8") for path in re.findall(r"`(tests/[\w/]+\.py)", text))
    named = re.findall(r"\btest_\w+(?!\w*\.py)\b", re.sub(r"tests/[\w/]+\.py", "", text))
    assert len(named) >= 8
    assert [name for name in named if not re.search(rf"^(def {name}\(|{name} = )", files, re.MULTILINE)] == []
