"""Masks against the converter of Transformers 5.23, the last that has it, and against filling memory: ``make bench``.

Each operation, PyTorch's twin of it and a jitted ``jnp.full`` of the result's shape take turns, so that what else the
machine does falls on all alike; each makes, finishes and frees a fresh array. Medians after warm-up. Ratios carry over
to other machines, milliseconds do not.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import compare

import jaxmask

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
from transformers import modeling_attn_mask_utils as hf  # noqa: E402 # pyright: ignore[reportAttributeAccessIssue]

BATCH, LENGTH, WINDOW = 4, 2048, 256
ROUNDS = 24

valid_np = np.ones((BATCH, LENGTH), np.int32)
valid_np[:, : LENGTH // 8] = 0  # padded on the left, so that there are rows with nothing to attend to
valid, valid_pt = jnp.asarray(valid_np), torch.from_numpy(valid_np)  # pyright: ignore[reportUnknownMemberType]
embeds, embeds_pt = jnp.zeros((BATCH, LENGTH, 1)), torch.zeros((BATCH, LENGTH, 1))
shape, size = (BATCH, LENGTH), (BATCH, LENGTH, LENGTH)
f32 = torch.float32

ours, theirs = jaxmask.AttentionMaskConverter(True, WINDOW), hf.AttentionMaskConverter(True, WINDOW)
unwindowed, unwindowed_pt = jaxmask.AttentionMaskConverter(True), hf.AttentionMaskConverter(True)
bias = ours.to_4d(valid, LENGTH, LENGTH)
bias_pt = theirs.to_4d(valid_pt, LENGTH, f32, LENGTH)

# Name: what jaxmask does, and what PyTorch does for it.
OPERATIONS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "to_4d": (
        lambda: ours.to_4d(valid, LENGTH, LENGTH),
        lambda: theirs.to_4d(valid_pt, LENGTH, f32, LENGTH),
    ),
    "to_4d, no window": (
        lambda: unwindowed.to_4d(valid, LENGTH, LENGTH),
        lambda: unwindowed_pt.to_4d(valid_pt, LENGTH, f32, LENGTH),
    ),
    "to_causal_4d": (lambda: ours.to_causal_4d(*size), lambda: theirs.to_causal_4d(*size, f32)),
    "make_causal_mask": (
        lambda: jaxmask.make_causal_mask(shape, 0, WINDOW),
        lambda: theirs._make_causal_mask(torch.Size(shape), f32, torch.device("cpu"), 0, WINDOW),  # pyright: ignore
    ),
    "expand_mask": (lambda: jaxmask.expand_mask(valid), lambda: theirs._expand_mask(valid_pt, f32)),  # pyright: ignore
    "unmask_unattended": (
        lambda: jaxmask.unmask_unattended(bias),
        lambda: theirs._unmask_unattended(bias_pt, torch.finfo(f32).min),  # pyright: ignore
    ),
    "prepare_4d_causal_attention_mask": (
        lambda: jaxmask.prepare_4d_causal_attention_mask(valid, shape, embeds, 0, WINDOW),
        lambda: hf._prepare_4d_causal_attention_mask(valid_pt, shape, embeds_pt, 0, WINDOW),  # pyright: ignore
    ),
    "prepare_4d_causal_attention_mask_for_sdpa": (
        lambda: jaxmask.prepare_4d_causal_attention_mask_for_sdpa(valid, shape, embeds, 0, WINDOW),
        lambda: hf._prepare_4d_causal_attention_mask_for_sdpa(valid_pt, shape, embeds_pt, 0, WINDOW),  # pyright: ignore
    ),
    "create_4d_causal_attention_mask": (
        lambda: jaxmask.create_4d_causal_attention_mask(shape, 0, WINDOW),
        lambda: hf._create_4d_causal_attention_mask(shape, f32, torch.device("cpu"), 0, WINDOW),  # pyright: ignore
    ),
    "prepare_4d_attention_mask_for_sdpa": (
        lambda: jaxmask.prepare_4d_attention_mask_for_sdpa(valid),
        lambda: hf._prepare_4d_attention_mask_for_sdpa(valid_pt, f32),  # pyright: ignore
    ),
}
# The value is traced, or XLA would fold the array into the program.
full = jax.jit(lambda value: jnp.full((BATCH, 1, LENGTH, LENGTH), value, jnp.float32))  # pyright: ignore


def main() -> None:
    """Compare, print, and say which floors are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the ratios there")
    to_file: Path | None = parser.parse_args().json
    console = Console(width=100)
    table = Table(title=f"batch {BATCH}, length {LENGTH}, window {WINDOW}, float32, medians of {ROUNDS}")
    for column in ("operation", "ms", "x jnp.full", "PyTorch / jaxmask"):
        table.add_column(column, justify="left" if column == "operation" else "right", no_wrap=True)
    results: dict[str, dict[str, float]] = {}
    for name, (run, run_pt) in OPERATIONS.items():
        assert np.array_equal(run(), run_pt().expand(BATCH, 1, LENGTH, LENGTH)), f"{name} differs from PyTorch"
        seconds, seconds_pt, seconds_full = compare(run, run_pt, lambda: full(0.5), rounds=ROUNDS)
        results[name] = {"ms": 1e3 * seconds, "full": seconds / seconds_full, "torch": seconds_pt / seconds}
        table.add_row(name, *(f"{value:.2f}" for value in results[name].values()))
    console.print(table)
    floor, speed = results["to_4d"]["full"], results["to_4d"]["torch"]
    console.print(f"to_4d within 1.15x of jnp.full: {floor:.2f}x {'met' if floor <= 1.15 else 'missed'}")
    console.print(f"to_4d at least 5x faster than PyTorch: {speed:.2f}x {'met' if speed >= 5 else 'missed'}")
    if to_file is not None:
        to_file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
