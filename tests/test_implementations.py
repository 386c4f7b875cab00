"""The table in the docs of what each implementation takes is what the code says now."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_in_the_docs_is_what_the_code_says() -> None:
    # In a process of its own, for it traces as if there were a GPU.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "docs" / "implementations.py")]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "implementations.md").read_text(encoding="utf-8"), (
        "python docs/implementations.py > docs/implementations.md"
    )
