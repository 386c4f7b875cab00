"""What an installation and a reader of the README rely on."""

import os
import platform
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from jaxmask import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (jaxmask .*)\n((?:(?!\$ |```).*\n)*)", README, flags=re.MULTILINE)


@pytest.mark.parametrize("module", ["torch", "transformers", "flax", "matplotlib", "rich", "typer", "torch_compat"])
def test_import_of_jaxmask_does_not_import(module: str) -> None:
    code = f"import sys, jaxmask.hf.modeling_attn_mask_utils; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["transformers", "safetensors", "gguf", "flax"])
def test_tensors_and_block_masks_need_torch_alone(module: str) -> None:
    code = f"import sys, torch_compat.bridge, torch_compat.blocks; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 1


@pytest.mark.parametrize(("command", "shown"), COMMANDS)
def test_readme_command_prints_what_is_shown(command: str, shown: str) -> None:
    name, *arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)]
    program = Path(sys.executable).parent / name
    # As a reader has it: with the optimizations that the tests do without, for a real model is slow without them.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, env=environment).stdout
    assert [line.rstrip() for line in printed.splitlines()] == [line.rstrip() for line in shown.splitlines()]


def test_a_report_says_what_is_installed_and_where_it_runs() -> None:
    command = [sys.executable, "-m", "jaxmask.report"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    for name in ("jaxmask", "jax", "jaxlib", "flax", "numpy", "torch", "transformers"):
        assert facts[name] == version(name)
    assert facts["Python"].startswith(platform.python_version())
    assert facts["backend"] == "cpu"
    assert facts["devices"] == "8 x cpu"


def test_a_report_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("jax", "no-such-package"))
    lines = report.report().splitlines()
    assert lines[0].split() == ["jax", version("jax")]
    assert lines[1].startswith("Python ")


def test_the_changelog_begins_with_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)$", changes, re.MULTILINE)[0] == project["version"]


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 160


def test_verify_says_what_to_install_where_torch_is_missing(tmp_path: Path) -> None:
    # A module that cannot be imported, found before the real one, is a machine without torch.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from jaxmask.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "verify"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'pip install "jaxmask[verify]"' in result.stderr
    assert "Traceback" not in result.stderr
