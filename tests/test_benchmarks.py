"""The benchmark for GPU, at its smallest and on a CPU: what it compares is comparable, and what it prints is of use."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_peers
from jaxmask.kernels.pallas_gpu import Block, Blocks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LENGTH, HEADS = 48, 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    """As a person runs it, but without another process, which would import everything again."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smallest", *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")


@pytest.mark.parametrize("name", gpu_peers.works(LENGTH, HEADS))
def test_all_sides_of_the_gpu_benchmark_say_the_same_mask(name: str) -> None:
    work, index = gpu_peers.works(LENGTH, HEADS)[name], np.arange(LENGTH)
    shape = 1, HEADS, LENGTH, LENGTH
    allowed = np.broadcast_to(work.mask.dense(LENGTH, LENGTH), shape)
    at = 0, np.arange(HEADS)[:, None, None], index[:, None], index
    np.testing.assert_array_equal(np.broadcast_to(work.allows(*at, gpu_peers.documents(LENGTH)), shape), allowed)
    if work.native:
        x, peer = jax.random.normal(jax.random.key(0), (1, LENGTH, HEADS, 4)), jax.nn.dot_product_attention
        np.testing.assert_allclose(peer(x, x, x, **work.native), peer(x, x, x, mask=jnp.asarray(allowed)), atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_gpu_benchmark_gives_figures_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_json, to_plot = tmp_path / "gpu.json", tmp_path / "gpu.png"
    run(monkeypatch, "--only", "documents", "--json", to_json, "--plot", to_plot)
    rows = {row["who"]: row for row in json.loads(to_json.read_text())}
    assert list(rows) == [*gpu_peers.IN_JAX, *gpu_peers.IN_TORCH]
    found = {(who, what): row[what] for who, row in rows.items() for what in (gpu_peers.OUTPUT, gpu_peers.GRADIENTS)}
    reasons = {key: each["why"] for key, each in found.items() if "why" in each}
    assert list(reasons) == [("cudnn", gpu_peers.OUTPUT), ("cudnn", gpu_peers.GRADIENTS), ("Flex", gpu_peers.GRADIENTS)]
    assert "cuDNN is not detected" in reasons["cudnn", gpu_peers.OUTPUT]
    assert "backward on CPU" in reasons["Flex", gpu_peers.GRADIENTS]
    assert all(each["TFLOP/s"] > 0 for key, each in found.items() if key not in reasons)
    assert to_plot.read_bytes().startswith(b"\x89PNG")


def test_the_gpu_benchmark_prints_tiles_to_paste(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--tune")
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("x as fast as") == 3
    ((row, blocks),) = eval("{" + printed.out + "}", {"Block": Block, "Blocks": Blocks}).items()
    assert row == (2, 64)
    assert [type(block) for block in blocks] == [Block] * 3
