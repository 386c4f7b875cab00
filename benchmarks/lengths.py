"""CPU time and memory of attention against length, for this library and its peers, as ``docs/attention.py`` draws them.

Window 512, float32, 8 heads, dim 64, the output alone. Each peer has a process of its own for its time, and another for
its memory: that of the output and of all between, which XLA says of a compiled program. For PyTorch it is what resident
memory grows by while it runs, at the peak (JAX keeps what it has freed, so that this says little of it). Linux only.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
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


def cpu_seconds(run: Callable[..., Any], inputs: list[Any]) -> float:
    """The least of three runs, over all cores: another process that takes its turn on a core does not count."""

    def once() -> float:
        start = time.process_time()
        jax.block_until_ready(run(*inputs))
        return time.process_time() - start

    once()
    return min(once() for _ in range(3))


def peak_bytes(run: Any, inputs: list[Any]) -> int:
    """How much memory is occupied at the peak, beside the inputs."""
    if isinstance(inputs[0], jax.Array):
        memory = run.lower(*inputs).compile().memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes
    run(*inputs)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    run(*inputs)
    return resident("VmHWM") - before


def measure(name: str, of: Callable[[Callable[..., Any], list[Any]], float]) -> list[tuple[int, float]]:
    """Each length of one peer, with what is measured of a run."""
    results: list[tuple[int, float]] = []
    for length in (length for length in LENGTHS if length <= LONGEST.get(name, length)):
        inputs: list[Any] = arrays(1, length, length, 3)
        if name in ("SDPA", "Flex"):
            inputs = [to_torch(x) for x in inputs]
        results.append((length, of(PEERS[name](length), inputs)))
    return results


def main() -> None:
    """Measure each peer in processes of its own, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, help="only this one, and print JSON")
    parser.add_argument("--of", choices=("time", "memory"), default="time", help="what to measure of that one")
    parser.add_argument("--json", type=Path, default=Path("docs/attention.json"), metavar="FILE")
    options = parser.parse_args()
    FLAGS.mark_as_parsed()  # tokamax would read the command line
    if options.peer:
        print(json.dumps(measure(options.peer, cpu_seconds if options.of == "time" else peak_bytes)))  # noqa: T201
        return
    # What PyTorch frees is then free at once: else the memory of a run may be that of the run before.
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    results: dict[str, dict[str, Any]] = {"time": {}, "memory": {}}
    for name, of in itertools.product(PEERS, results):
        command = [sys.executable, __file__, "--peer", name, "--of", of]
        child = subprocess.run(command, check=True, capture_output=True, text=True, env=at_once)
        results[of][name] = json.loads(child.stdout.splitlines()[-1])
    # Only ratios carry over to other machines.
    unit = results["time"]["jaxmask"][0][1]
    results["time"] = {
        name: [[length, round(seconds / unit, 2)] for length, seconds in rows] for name, rows in results["time"].items()
    }
    options.json.write_text(json.dumps(results) + "\n")
    print(f"wrote {options.json}; python docs/attention.py draws it")  # noqa: T201


if __name__ == "__main__":
    main()
