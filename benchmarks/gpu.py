"""Attention on a GPU against its peers: cuDNN, tokamax, jax.nn, FlexAttention and SDPA. A person who has one runs this.

Bfloat16, from 2,048 to 131,072 tokens, and as many examples as make 16,384. At the shortest length, who computes
something else gets no figures. For each mask each contestant has a process of its own, which has the memory of the card
to itself. Medians; several calls are launched at once, so that the card need not wait for the next. TFLOP/s are of the
matrix products in tiles of 128 by 128 that are not EMPTY, for all alike.

A peer whose arguments do not say a mask gets it written out, before. The block mask of FlexAttention is made before,
too. This library finds its tiles in the time that is measured: the ids of documents are traced.

It needs JAX for CUDA, rich and matplotlib. Tokamax, and PyTorch for CUDA, take part where they are installed.

``--tune`` tries tiles instead, and prints rows to put into the table of ``jaxmask/kernels/pallas_gpu/blocks.py``.
``--smallest`` does either on a CPU, with the kernel interpreted, to test the program: its figures say nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import gpu_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from timing import compare

from jaxmask import EMPTY, Causal, Segments
from jaxmask.kernels import pallas_gpu
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.pallas_gpu import Block, Blocks
from jaxmask.kernels.pallas_gpu.blocks import blocks_for

LENGTHS, TOKENS, TILE = [2**i for i in range(11, 18)], 16_384, 128
# What is measured, and how many matrix products it has: two forward, and five backward.
PRODUCTS = {peers.OUTPUT: 2, peers.GRADIENTS: 7}
# TFLOP/s in dense bfloat16, by a part of the card's name, the first that fits: half of what NVIDIA's data sheets say
# "with sparsity".
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312}
Row = dict[str, Any]


def by_clock(run: peers.Run, calls: int) -> float:
    """The seconds of a call, until the last of several in a row is ready."""
    return compare(partial(peers.several, run, calls), warm_up=0, rounds=1)[0] / calls


def median_seconds(run: peers.Run, seconds: Callable[[peers.Run, int], float], rounds: int) -> float:
    """The median of rounds of as many calls as take 50 ms, after three calls that compile and warm up."""
    *_, once = (seconds(run, 1) for _ in range(3))
    calls = min(100, max(1, round(0.05 / once)))
    return statistics.median(seconds(run, calls) for _ in range(rounds if once < 1 else min(rounds, 3)))


def why(error: Exception) -> str:
    """Why there is no number, in a line."""
    line = str(error).strip().partition("\n")[0]
    return "out of memory" if "out of memory" in line.lower() else line or type(error).__name__


def without_figures(reason: str) -> Row:
    """What stands in a row where neither the output nor the gradients have figures."""
    return {what: {"why": reason} for what in PRODUCTS}


def measured(who: str, name: str, length: int, options: Any) -> Row:
    """The figures of a contestant, or why there are none."""
    row: Row = {"who": who, "work": name, "length": length}
    work, batch = peers.works(length, options.heads)[name], max(1, options.tokens // length)
    shape = batch, length, options.heads, options.dim
    try:
        take_part = peers.in_jax if who in peers.IN_JAX else peers.in_torch
        contestant = take_part(who, work, shape, "cpu" if options.smallest else "cuda")
    except Exception as error:
        return row | without_figures(why(error))
    row |= {"device": contestant.device, "is_written_out": contestant.is_written_out}
    tile = min(TILE, length)
    live = (np.asarray(work.mask.tiles(length, length, block=tile).states) != EMPTY).mean((0, 1)).sum()
    product_flops = 2 * batch * options.heads * options.dim * float(live) * tile**2
    peak = options.peak or next((peak for card, peak in PEAKS.items() if card in contestant.device), None)
    for what, run in contestant.runs.items():
        try:
            if length == options.lengths[0]:
                peers.assert_defined(contestant, run(), work.mask)
            seconds = median_seconds(run, contestant.seconds or by_clock, options.rounds)
        except Exception as error:
            row[what] = {"why": why(error)}
        else:
            rate = PRODUCTS[what] * product_flops / seconds / 1e12
            row[what] = {"seconds": seconds, "TFLOP/s": rate, "of peak": rate / peak if peak else None}
    return row


def in_a_process(who: str, name: str, options: Any) -> list[Row]:
    """The rows of a contestant, whatever becomes of its process; on a CPU it needs none."""
    if options.smallest:
        return [measured(who, name, length, options) for length in options.lengths]
    command = [sys.executable, __file__, *sys.argv[1:], "--child", who, name]
    # PyTorch gets the card, and JAX computes what is defined.
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if who in peers.IN_TORCH else {})
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{"who"')]
    last = child.stderr.strip().rpartition("\n")[2]
    lost = without_figures(f"its process ended with {child.returncode}: {last}")
    return rows + [{"who": who, "work": name, "length": length} | lost for length in options.lengths[len(rows) :]]


def table_of(name: str, rows: list[Row]) -> Table:
    """Times as ratios to those of this library's kernel, and speeds."""
    table = Table(title=f"{name} (*: the mask is written out)")
    for column in ("tokens", "who", *(f"{what}, {unit}" for what in PRODUCTS for unit in ("x pallas", "TFLOP/s"))):
        table.add_column(column, justify="left" if column == "who" else "right")
    ours = {row["length"]: row for row in rows if row["who"] == "pallas"}
    for row in sorted(rows, key=lambda row: row["length"]):
        cells = [f"{row['length']:,}", row["who"] + "*" * row.get("is_written_out", False)]
        for what in PRODUCTS:
            found, pallas = row[what], ours[row["length"]][what]
            ratio = f"{found['seconds'] / pallas['seconds']:.2f}" if "seconds" in found and "seconds" in pallas else ""
            part = f", {found['of peak']:.0%} of peak" if found.get("of peak") else ""
            cells += [ratio, found["why"] if "why" in found else f"{found['TFLOP/s']:.3g}{part}"]
        table.add_row(*cells)
    return table


def draw(rows: list[Row], to_file: Path) -> None:
    """TFLOP/s against length, a column of panels for each mask: the output above, with gradients below."""
    from matplotlib.figure import Figure

    names, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("work", "length"))
    figure = Figure(figsize=(3.2 * len(names) + 1, 6), layout="constrained")
    for what, panels in zip(PRODUCTS, figure.subplots(2, len(names), squeeze=False, sharex=True), strict=True):
        panels[0].set_ylabel(f"{what}, TFLOP/s of live tiles")
        for name, axes in zip(names, panels, strict=True):
            for who in (*peers.IN_JAX, *peers.IN_TORCH):
                mine = [row for row in rows if (row["who"], row["work"]) == (who, name) and "seconds" in row[what]]
                bold = {"linewidth": 2.5, "color": "black"} if who == "pallas" else {}
                rates = [row[what]["TFLOP/s"] for row in mine]
                axes.plot([row["length"] for row in mine], rates, marker="o", label=who, **bold)
            axes.set(xscale="log", title=name)
            axes.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(next((row["device"] for row in rows if "device" in row), ""))
    figure.savefig(to_file, dpi=120)


def around(block: Block) -> list[Block]:
    """A tile, and others that may be better on a card: half and twice as large, with other warps and stages."""
    sides = ((side, side // 2, 2 * side) for side in (block.queries, block.keys))
    tried = (Block(queries, keys, warps, stages) for queries, keys, warps, stages in product(*sides, (4, 8), (2, 3)))
    return [block, *(each for each in tried if each != block and min(each.queries, each.keys) >= 16)]


def written(block: Block) -> str:
    """As the table of tiles has it."""
    stages = f", stages={block.stages}" if block.stages != Block.stages else ""
    return f"Block({block.queries}, {block.keys}, warps={block.warps}{stages})"


def kernel_alone(kernel: str, blocks: Blocks, call: Any, cotangent: Any) -> peers.Run:
    """One of the three kernels, and the little around it: XLA leaves out a kernel whose results nobody takes."""
    jitted: Any = pallas_gpu.attend

    @jax.jit
    def attend(query: Any, key: Any, value: Any) -> Any:
        # Its own jit would trace the ids, and find the tiles each time.
        return jitted.__wrapped__(replace(call, query=query, key=key, value=value), blocks)

    inputs = call.query, call.key, call.value
    if kernel == "forward":
        return partial(attend, *inputs)
    part = slice(0, 1) if kernel == "dq" else slice(1, 3)
    _, pull_back = jax.vjp(attend, *inputs)
    return partial(jax.jit(lambda pull_back, cotangent: pull_back(cotangent)[part]), pull_back, cotangent)


def tune(options: Any) -> None:
    """The fastest tiles for packed documents, 4,096 tokens of them, as rows of the table."""
    console = Console(highlight=False, soft_wrap=True)
    length, rows = 4096, list(product((jnp.bfloat16, jnp.float32), (64, 128, 256)))
    if options.smallest:
        length, rows = 64, rows[:1]
    mask = Causal() & Segments(peers.documents(length)[None])
    for dtype, dim in rows:
        shape = max(1, options.tokens // length), length, options.heads, dim
        query, key, value, cotangent = peers.normal(shape, dtype)
        call, table = checked_call(query, key, value, mask), blocks_for(dtype, dim)
        console.print(f"    ({jnp.dtype(dtype).itemsize}, {dim}): Blocks(")
        for kernel, before in table._asdict().items():
            seconds: dict[Block, float] = {}
            for block in around(before)[: 1 if options.smallest else None]:
                try:
                    run = kernel_alone(kernel, table._replace(**{kernel: block}), call, cotangent)
                    seconds[block] = median_seconds(run, by_clock, options.rounds)
                except Exception as error:
                    print(f"{kernel}, {block}: {why(error)}", file=sys.stderr)  # noqa: T201
            best = min(seconds, key=seconds.__getitem__, default=before)
            gain = f"{seconds[before] / seconds[best]:.2f}x as fast as" if before in seconds else "no figure for"
            console.print(f"        {kernel}={written(best)},  # {gain} {written(before)}")
        console.print("    ),")


def race(options: Any) -> None:
    """All against all, mask by mask."""
    jax.config.update("jax_platforms", "cpu")  # the card is for the processes of the contestants
    console, rows = Console(width=150, highlight=False), list[Row]()
    for name in (name for name in peers.works(options.lengths[0], options.heads) if name.startswith(options.only)):
        found: list[Row] = []
        for who in (*peers.IN_JAX, *peers.IN_TORCH):
            with console.status(f"{name}: {who}"):
                found += in_a_process(who, name, options)
        console.print(table_of(name, found))
        rows += found
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    draw(rows, options.plot)
    console.print(f"wrote {options.json} and {options.plot}")


def main() -> None:
    """Measure, print, and write the figures and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try tiles")
    parser.add_argument("--smallest", action="store_true", help="on a CPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the masks whose name begins so")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS", help="the shortest first")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", type=float, metavar="TFLOP/S", help="of the card, where it is not known here")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/gpu.json"), metavar="FILE")
    parser.add_argument("--plot", type=Path, default=Path("docs/attention_gpu.png"), metavar="FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = TOKENS
    if options.smallest:
        jax.config.update("jax_platforms", "cpu")
        options.lengths, options.heads, options.dim, options.rounds, options.tokens = [64], 2, 16, 1, 1
    if options.child:
        who, name = options.child
        for length in options.lengths:
            print(json.dumps(measured(who, name, length, options)), flush=True)  # noqa: T201
    elif options.tune:
        if not options.smallest and jax.default_backend() != "gpu":
            parser.error("JAX finds no GPU, and --smallest is what runs without")
        tune(options)
    else:
        race(options)


if __name__ == "__main__":
    main()
