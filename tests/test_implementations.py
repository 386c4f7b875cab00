"""The table in the docs of what each implementation takes is what the code says now."""

import os
import re
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


def test_a_kernel_whose_gradients_write_all_pairs_is_said_to() -> None:
    program = """
import implementations as docs
import jaxmask
docs.H100.compute_capability, docs.H100.device_kind = "8.0", "NVIDIA A100-SXM4-40GB"
x = docs.jax.ShapeDtypeStruct((2, 1024, 4, 64), docs.jnp.float16)
with docs.simulated("tokamax"):
    for mask in (jaxmask.Prefix(100), jaxmask.Window(10, 10)):
        print(jaxmask.explain(x, x, x, mask))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    of_prefix, of_window = re.split(r"^(?=\w)", printed, flags=re.MULTILINE)[1:]
    assert "all pairs" not in of_prefix
    assert of_window.startswith("pallas:")
    assert "not tokamax: its gradients write an array of all pairs" in of_window


def test_a_gpu_that_the_kernel_is_not_for_has_another() -> None:
    program = """
import implementations as docs
import jaxmask
for capability, dim in (("9.0", 256), ("8.9", 128), ("8.9", 256), ("7.5", 64)):
    docs.H100.compute_capability = capability
    x = docs.jax.ShapeDtypeStruct((2, 1024, 4, dim), docs.jnp.bfloat16)
    with docs.simulated("pallas"):
        explanation = jaxmask.explain(x, x, x, jaxmask.Causal() | jaxmask.Prefix(9))
    print(explanation.implementation, explanation.lacks.get("pallas"))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'docs'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [
        "pallas None",
        "pallas None",
        "blocked ['its tiles of a dim of 256 in bfloat16 need more shared memory than this GPU has']",
        "blocked ['it needs a GPU of compute capability 8.0, and this one has 7.5']",
    ]
