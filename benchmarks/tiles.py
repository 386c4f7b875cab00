"""Tiles against those who evaluate every pair: splash attention and FlexAttention; part of ``make bench``.

All find the same tiles (which is asserted) of one mask, causal within a sliding window, and take turns. Medians; ratios
carry over to other machines, milliseconds do not.
"""

import argparse
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_info
from rich.console import Console
from rich.table import Table
from timing import compare, verdict
from torch.nn.attention.flex_attention import create_block_mask

import jaxmask

WINDOW = 1024
mask = jaxmask.Causal() & jaxmask.SlidingWindow(WINDOW)
traced = jax.jit(
    lambda window, length, block: (jaxmask.Causal() & jaxmask.SlidingWindow(window)).tiles(length, length, block=block),
    static_argnums=(1, 2),
)


def by_us(length: int, block: int) -> Any:
    """With everything static: NumPy."""
    return mask.tiles(length, length, block=block).states


def by_us_traced(length: int, block: int) -> Any:
    """With a traced window, inside ``jit``."""
    return traced(jnp.int32(WINDOW), length, block).states


def by_splash(length: int, block: int) -> Any:
    """As splash attention prepares its kernel."""
    splash_info.process_mask.func.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    both = splash.CausalMask((length, length)) & splash.LocalMask((length, length), (WINDOW - 1, 0), 0)
    return splash_info.process_mask(splash.MultiHeadMask([both]), (block, block))[0].block_mask


def in_window(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """The mask, for FlexAttention."""
    return (kv <= q) & (q - kv < WINDOW)


def by_flex(length: int, block: int) -> Any:
    """As FlexAttention prepares its kernel, in eager mode."""
    return create_block_mask(in_window, 1, 1, length, length, "cpu", block)


compiled_flex = torch.compile(create_block_mask)


def by_compiled_flex(length: int, block: int) -> Any:
    """As FlexAttention prepares its kernel, compiled; the time to compile is not counted."""
    return compiled_flex(in_window, 1, 1, length, length, "cpu", block)


def states_of(block_mask: Any) -> Any:
    """The states in a ``BlockMask``."""
    partial = (block_mask.kv_num_blocks, block_mask.kv_indices)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    states = np.zeros(block_mask.kv_indices.shape, np.int8)
    for state, (counts, indices) in ((jaxmask.PARTIAL, partial), (jaxmask.FULL, full)):
        for where in np.ndindex(*counts.shape):
            states[where][indices[where][: counts[where]]] = state
    return states


def main() -> None:
    """Compare, print, and say which floors are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the ratios there")
    to_file: Path | None = parser.parse_args().json
    console = Console(width=100)
    table = Table(title=f"tiles of Causal() & SlidingWindow({WINDOW:,}), medians")
    for column in ("length", "tile", "who", "ms", "x jaxmask"):
        table.add_column(column, justify="left" if column == "who" else "right", no_wrap=True)
    seconds: dict[tuple[int, str], float] = {}

    def race(length: int, block: int, rounds: int, **contestants: Callable[[int, int], Any]) -> None:
        runs = {"jaxmask": by_us, "jaxmask, traced": by_us_traced, **contestants}
        medians = compare(*(lambda run=run: run(length, block) for run in runs.values()), warm_up=1, rounds=rounds)
        for name, median in zip(runs, medians, strict=True):
            seconds[length, name] = median
            table.add_row(f"{length:,}", f"{block}", name, f"{1e3 * median:,.2f}", f"{median / medians[0]:,.1f}")

    ours = by_us(16_384, 128)
    assert np.array_equal(by_us_traced(16_384, 128), ours)
    assert np.array_equal(states_of(by_flex(16_384, 128)), ours)
    assert np.array_equal(states_of(by_compiled_flex(16_384, 128)), ours)
    # Splash leaves out columns: what remains of each row are the tiles that are not empty.
    for row, theirs in zip(by_us(16_384, 512)[0, 0], by_splash(16_384, 512)[0], strict=True):
        assert row[row > 0].tolist() == theirs[theirs > 0].tolist()

    flex, compiled, prepare = "FlexAttention, create_block_mask", "the same, compiled", "splash, process_mask"
    race(16_384, 128, 3, **{flex: by_flex, compiled: by_compiled_flex})
    race(16_384, 512, 3, **{prepare: by_splash})
    race(65_536, 512, 2, **{prepare: by_splash})
    race(1_048_576, 512, 5)
    console.print(table)

    ratios = {
        "65,536 tokens, against splash": (seconds[65_536, prepare] / seconds[65_536, "jaxmask"], 1000),
        "16,384 tokens, against FlexAttention": (seconds[16_384, flex] / seconds[16_384, "jaxmask"], 100),
        "16,384 tokens, against FlexAttention compiled": (seconds[16_384, compiled] / seconds[16_384, "jaxmask"], 100),
        "1,048,576 tokens, against splash at 16,384": (seconds[16_384, prepare] / seconds[1_048_576, "jaxmask"], 1),
    }
    for what, (ratio, floor) in ratios.items():
        console.print(verdict(what, ratio, floor))
    tracemalloc.start()
    states = by_us(131_072, 128)
    peak = tracemalloc.get_traced_memory()[1] / states.nbytes
    console.print(f"131,072 tokens, tile 128: peak memory {peak:.1f} bytes for each tile")
    if to_file is not None:
        results = {what: ratio for what, (ratio, _) in ratios.items()} | {"bytes per tile": peak}
        to_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
