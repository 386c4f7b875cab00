"""Execute every notebook beside this file from a clean state, and compare its outputs with the stored ones.

python notebooks/execute.py            fails where a cell raises or a text differs
python notebooks/execute.py --write    stores the fresh outputs
"""

import argparse
import difflib
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

# What a cell shows: the kind of each output, in order, and its text; of an image, that it is there.
Shown = list[tuple[str, str]]


def main() -> int:
    """Execute the notebooks and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Execute the notebooks and compare their outputs with the stored ones."
    )
    parser.add_argument("--write", action="store_true", help="store the fresh outputs instead of comparing")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where the notebooks are")
    arguments = parser.parse_args()

    paths: list[Path] = sorted(arguments.folder.glob("*.ipynb"))
    if not paths:
        _say(f"no notebooks in {arguments.folder}")
        return 1
    good = [_check(path, write=arguments.write) for path in paths]
    return 0 if all(good) else 1


def _check(path: Path, *, write: bool) -> bool:
    """Whether the notebook runs and shows what is stored; prints what does not."""
    stored: Any = nbformat.read(path, as_version=4)
    try:
        fresh = execute(stored)
    except CellExecutionError as error:
        _say(f"{path.name}: a cell raises\n{error}")
        return False
    if write:
        nbformat.write(fresh, path)
        _say(f"{path.name}: stored")
        return True
    different = False
    for number, (cell, again) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        difference = compare(cell, again)
        if difference:
            different = True
            _say(f"{path.name}: cell {number} shows something else\n{difference}")
    if not different:
        _say(f"{path.name}: {len(stored.cells)} cells show what is stored")
    return not different


def execute(notebook: Any) -> Any:
    """A copy of the notebook with fresh outputs, run by this interpreter in an empty folder.

    Raises:
        CellExecutionError: a cell raises.
    """
    fresh: Any = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # Without folders of kernels to search there is one kernel left: ipykernel in this very interpreter.
    kernels = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels, transport_encryption="auto")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            fresh,
            km=manager,
            timeout=300,
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        # The manager is ours, so that shutting the kernel down has to be asked for.
        client.execute(env=environment, cleanup_kc=True)
    # What depends on the machine says nothing to a reader.
    fresh.metadata.pop("widgets", None)
    fresh.metadata.language_info = {"name": "python"}
    return fresh


def compare(stored: Any, fresh: Any) -> str:
    """How the outputs of a cell differ, as a diff; empty where they do not."""
    return "\n".join(difflib.unified_diff(_lines(shown(stored)), _lines(shown(fresh)), "stored", "fresh", lineterm=""))


def shown(cell: Any) -> Shown:
    """What a cell shows, in a form that is the same on every machine."""
    result: Shown = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            if result and result[-1][0] == output.name:
                result[-1] = (output.name, result[-1][1] + output.text)
            else:
                result.append((output.name, output.text))
        elif output.output_type == "error":
            result.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            images = [("image", kind) for kind in output.data if kind.startswith("image/")]
            # The text of a picture is its size, which differs with the fonts of the machine.
            text = [] if images else [(output.output_type, output.data.get("text/plain", ""))]
            result += images + text
    return result


def _lines(outputs: Iterable[tuple[str, str]]) -> list[str]:
    return [line for kind, text in outputs for line in (f"[{kind}]", *text.splitlines())]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
