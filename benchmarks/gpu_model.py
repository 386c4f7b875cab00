"""A model of the GPU kernel on cards that are not here; part of no test of speed, for no GPU has checked it.

Run it in ``.venv-gpu``, which ``make test-gpu`` makes. Each kernel is compiled for the card. The instructions in its
loops over PARTIAL and over FULL tiles say what a tile takes of each unit of a multiprocessor, its registers and shared
memory say how many blocks hide each other's waiting, and the mask says how many tiles there are.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmask import Causal, Mask, PerHead, Predicate, Prefix, Segments, SlidingWindow, attention
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.key_ranges import key_ranges_of
from jaxmask.kernels.pallas_gpu import Block, Blocks, attend
from jaxmask.kernels.pallas_gpu.blocks import blocks_for
from jaxmask.tiles import FULL, PARTIAL
from tests.gpu.calls import KERNELS
from tests.gpu.target import CARDS, Card, Kernel, compile_for

BATCH, LENGTH, HEADS, KV_HEADS = 2, 8192, 16, 4
# Assumed: cycles from a tile's first load to its last sum that only other blocks can fill, where loads are ahead.
LATENCY = 700
# Assumed: what loads get of the 5,120 bytes per cycle that the A100's white paper says of its second-level cache.
CACHE = 2 / 3 * 5120
# Assumed: seconds from one launch of a kernel to the next.
LAUNCH = 3e-6


def dilated(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Each head looks back in steps of its own."""
    return (kv <= q) & ((q - kv) % (h + 1) == 0)


documents = np.sort(np.random.default_rng(0).integers(0, 32, (BATCH, LENGTH)), axis=1).astype(np.int32)
WORKS: dict[str, Mask | None] = {
    "no mask": None,
    "causal": Causal(),
    "window 1,024": SlidingWindow(1024),
    "32 documents": Causal() & Segments(documents),
    "prefix 2,048": Causal() | Prefix(2048),
    "window or causal by head": PerHead([Causal(), SlidingWindow(1024)] * (HEADS // 2)),
    "a user's predicate": Predicate(dilated, heads=HEADS),
}


def spent(loop: Counter[str], kernel: Kernel, card: Card) -> dict[str, float]:
    """The cycles of each unit of a multiprocessor that one block takes for one tile."""
    warps = kernel.threads / 32
    found: dict[str, float] = dict.fromkeys(("matrix", "issue", "float32", "special", "cache"), 0.0)
    rate = card.matrix_rate / (2 if any("tf32" in name for name in loop) else 1)
    found["matrix"] = 2 * kernel.products(loop) / rate
    for name, times in loop.items():
        # A multiprocessor issues an instruction of four warps in a cycle.
        found["issue"] += times * warps / 4
        if name.startswith("ex2"):
            found["special"] += times * warps * 32 / card.special_lanes
        elif name.endswith(".f32") and not name.startswith(("ld", "st", "wgmma", "mma")):
            found["float32"] += times * warps * 32 / card.fma_lanes
        elif name.startswith("cp.async.cg"):
            found["cache"] += times * kernel.threads * 16 * card.multiprocessors / CACHE
    return found


def cycles(loop: Counter[str], kernel: Kernel, card: Card) -> tuple[float, str]:
    """The cycles in which a multiprocessor does a tile, and what it waits for."""
    units = spent(loop, kernel, card)
    # The groups of four warps of a block wait together, and each does its part of the tile.
    computing = units["matrix"] + max(units["issue"], units["float32"], units["special"])
    units["waiting"] = (computing / (kernel.threads / 128) + LATENCY) / max(1, kernel.resident(card))
    most = max(units, key=units.__getitem__)
    return units[most], most


def shapes(dim: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    """Of query, key and value."""
    return [jax.ShapeDtypeStruct((BATCH, LENGTH, heads, dim), dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def compiled(mask: Mask | None, dim: int, dtype: Any, card: Card, blocks: Blocks) -> dict[str, Kernel]:
    """The three kernels."""

    def run(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        output, pull_back = jax.vjp(lambda q, k, v: attend(checked_call(q, k, v, mask), blocks), query, key, value)
        return output, pull_back(cotangent)

    arrays = shapes(dim, dtype)
    return {kernel.name: kernel for kernel in compile_for(card, run, *arrays, arrays[0]).kernels}


@dataclass(frozen=True)
class Estimate:
    """What one kernel takes for a mask.

    Args:
        read: the part of all tiles that it reads.
        partial: the part of these that are PARTIAL.
        seconds: of the card.
        operations: of matrices, in the tiles that it reads.
        waits_for: the unit that takes the longest in the more frequent kind of tile.
        slowdown: how much longer a PARTIAL tile takes than a FULL one.
    """

    read: float
    partial: float
    seconds: float
    operations: float
    waits_for: str
    slowdown: float


def estimate(kernel: Kernel, block: Block, mask: Mask | None, dim: int, card: Card) -> Estimate:
    """What a kernel takes that was compiled for a card, and for tiles of these sizes."""
    query, key, value = shapes(dim, jnp.bfloat16)
    states = np.asarray(checked_call(query, key, value, mask).tiles((block.queries, block.keys)).states)
    states = np.broadcast_to(states, (BATCH, HEADS, *states.shape[2:]))
    some, full = int((states == PARTIAL).sum()), int((states == FULL).sum())
    loops = kernel.over_tiles()
    (in_partial, _), (in_full, _) = (cycles(loop, kernel, card) for loop in loops)
    return Estimate(
        read=(some + full) / states.size,
        partial=some / (some + full),
        seconds=(some * in_partial + full * in_full) / card.clock / card.multiprocessors,
        operations=2 * kernel.products(loops[1]) * (some + full),
        waits_for=cycles(loops[full > some], kernel, card)[1],
        slowdown=in_partial / in_full,
    )


def by_blocked(mask: Mask | None, dim: int, card: Card) -> float:
    """The seconds that the launches of ``"blocked"`` take, forward."""
    query, key, value = shapes(dim, jnp.bfloat16)
    depths = compile_for(card, partial(attention, mask=mask, implementation="blocked"), query, key, value).depths
    ranges, _, _ = key_ranges_of(checked_call(query, key, value, mask))
    found = np.asarray(ranges.range_count).max((0, 1))
    return LAUNCH * (depths[0] + found.size * depths[1] + int(found.sum()) * depths[2])


def table(rows: Iterator[list[str]]) -> None:
    """Print rows in Markdown, the first of them as the head."""
    for i, row in enumerate(rows):
        print(f"| {' | '.join(row)} |", flush=True)  # noqa: T201
        if i == 0:
            print("|" + " --- |" * len(row))  # noqa: T201


def works(card: Card, dim: int) -> Iterator[list[str]]:
    """What each mask takes."""
    yield [
        *("mask", "tiles read", "PARTIAL of them", "forward ms", "of peak", "waits for", "PARTIAL over FULL"),
        *("with gradients ms", "of peak", "dense at peak / forward", 'launches of "blocked" / forward'),
    ]
    blocks = blocks_for(jnp.bfloat16, dim)
    peak = card.clock * card.multiprocessors * card.matrix_rate
    dense = 4 * BATCH * HEADS * LENGTH * LENGTH * dim / peak
    for name, mask in WORKS.items():
        kernels = compiled(mask, dim, jnp.bfloat16, card, blocks)
        found = [
            estimate(kernels[kernel], block, mask, dim, card) for kernel, block in zip(KERNELS, blocks, strict=True)
        ]
        forward, seconds = found[0], sum(each.seconds for each in found)
        yield [
            *(name, f"{forward.read:.0%}", f"{forward.partial:.0%}", f"{1e3 * forward.seconds:.2f}"),
            *(f"{forward.operations / forward.seconds / peak:.0%}", forward.waits_for, f"{forward.slowdown:.2f}"),
            *(f"{1e3 * seconds:.2f}", f"{sum(each.operations for each in found) / seconds / peak:.0%}"),
            *(f"{dense / forward.seconds:.1f}", f"{by_blocked(mask, dim, card) / forward.seconds:.0f}"),
        ]


def sizes(card: Card, dim: int, dtype: Any) -> Iterator[list[str]]:
    """Sizes of tiles, for a mask of documents, best first; those that spill last."""
    yield [
        *("kernel", "queries", "keys", "warps", "stages", "registers", "bytes spilled", "KiB of shared memory"),
        *("blocks", "warps at once", "of peak in FULL tiles", "in PARTIAL ones"),
    ]
    found: dict[str, list[tuple[bool, float, list[str]]]] = {name: [] for name in KERNELS}
    peak = card.matrix_rate * (1 if jnp.dtype(dtype).itemsize == 2 else 0.5)
    for queries, keys, stages in itertools.product((32, 64, 128), (32, 64, 128), (2, 3)):
        warps = 8 if 128 in (queries, keys) else 4
        block = Block(queries, keys, warps, stages)
        try:
            kernels = compiled(WORKS["32 documents"], dim, dtype, card, Blocks(block, block, block))
        except jax.errors.JaxRuntimeError:  # too much shared memory
            continue
        for products, name in zip((2, 3, 4), KERNELS, strict=True):
            kernel, work = kernels[name], products * 2 * queries * keys * dim / peak
            in_partial, in_full = (work / cycles(loop, kernel, card)[0] for loop in kernel.over_tiles())
            resident = kernel.resident(card)
            cells = [kernel.registers, kernel.spilled, round(kernel.shared_memory / 1024), resident, resident * warps]
            row = [name, *map(str, (queries, keys, warps, stages, *cells)), f"{in_full:.0%}", f"{in_partial:.0%}"]
            found[name].append((kernel.spilled > 0, -in_full, row))
    for rows in found.values():
        yield from (row for _, _, row in sorted(rows))


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", choices=CARDS, action="append", help="only this")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--blocks", metavar="DTYPE", help="sizes of tiles, in place of masks")
    options = parser.parse_args()
    for name in options.card or CARDS:
        print(f"\n{name}, a model: {BATCH} x {LENGTH:,} tokens, {HEADS} heads over {KV_HEADS}, dim {options.dim}\n")  # noqa: T201
        if options.blocks:
            table(sizes(CARDS[name], options.dim, jnp.dtype(options.blocks)))
        else:
            table(works(CARDS[name], options.dim))


if __name__ == "__main__":
    main()
