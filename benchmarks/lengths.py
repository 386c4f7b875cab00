"""Time and memory of attention against length, for this library and its peers: the picture in the README.

Window 512, float32, 8 heads, dim 64, the output alone. Each peer has a process of its own, so that its memory can be
told apart: what its resident memory grows by while it runs, at the peak, compiled before. Linux only.
"""

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from timeit import Timer
from typing import Any

import jax
from absl.flags import FLAGS
from attention import arrays, chunked, dense, flex, jax_nn, ours, sdpa, to_torch

from jaxmask import SlidingWindow

WINDOW = 512
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# The longest for those that write all scores or the mask out.
LONGEST = {"jax.nn": 4096, "SDPA": 8192, "tokamax": 4096}


def in_window(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """The mask, for FlexAttention."""
    return (kv <= q) & (q - kv < WINDOW)


PEERS: dict[str, Callable[[int], Callable[..., Any]]] = {
    "jaxmask": lambda length: jax.jit(ours(SlidingWindow(WINDOW))),
    "jax.nn": lambda length: jax.jit(jax_nn(is_causal=True, local_window_size=(WINDOW - 1, 0))),
    "tokamax": lambda length: jax.jit(chunked(is_causal=True, local_window_size=(WINDOW - 1, 0))),
    "SDPA": lambda length: partial(sdpa, attn_mask=dense(SlidingWindow(WINDOW), length)),
    "Flex": partial(flex, in_window),
}


def resident(field: str) -> int:
    """``VmRSS``, what this process occupies, or ``VmHWM``, its peak, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(name: str) -> list[tuple[int, float, int]]:
    """Return each length of one peer, with the median seconds and the bytes."""
    results: list[tuple[int, float, int]] = []
    for length in (length for length in LENGTHS if length <= LONGEST.get(name, length)):
        inputs: list[Any] = arrays(1, length, length, 3)
        if name in ("SDPA", "Flex"):
            inputs = [to_torch(x) for x in inputs]
        run = partial(PEERS[name](length), *inputs)
        timer = Timer(lambda run=run: jax.block_until_ready(run()))
        timer.timeit(1)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        times = [timer.timeit(1)]
        memory = resident("VmHWM") - before
        times += timer.repeat(2 if times[0] > 1 else 5, 1)
        results.append((length, statistics.median(times), memory))
    return results


def draw(results: dict[str, list[tuple[int, float, int]]], to_file: Path) -> None:
    """Two panels: seconds and memory against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, column, label in zip(figure.subplots(1, 2), (1, 2), ("seconds", "memory, MiB"), strict=True):
        for name, rows in results.items():
            values = [row[column] / (2**20 if column == 2 else 1) for row in rows]
            bold = {"linewidth": 2.5, "color": "black"} if name == "jaxmask" else {}
            axes.plot([row[0] for row in rows], values, marker="o", label=name, **bold)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Attention within a window of {WINDOW}, 8 heads of 64, float32, 2 CPU cores")
    figure.savefig(to_file, dpi=120)


def main() -> None:
    """Measure each peer in a process of its own; write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, help="only this one, and print JSON")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/lengths.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=Path("docs/attention.png"), metavar="FILE")
    options = parser.parse_args()
    FLAGS.mark_as_parsed()  # tokamax would read the command line
    if options.peer:
        print(json.dumps(measure(options.peer)))  # noqa: T201
        return
    results: dict[str, list[tuple[int, float, int]]] = {}
    for name in PEERS:
        child = subprocess.run([sys.executable, __file__, "--peer", name], check=True, capture_output=True, text=True)
        results[name] = json.loads(child.stdout.splitlines()[-1])
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, options.plot)
    print(f"wrote {options.json} and {options.plot}")  # noqa: T201


if __name__ == "__main__":
    main()
