"""SmolLM2 in Flax and in PyTorch: tokens per second of a prompt and of decoding, memory, compilation.

The two take turns in one process; PyTorch as Transformers runs it, with scaled-dot-product attention and its own cache.
Half of the prompts are padded on the left. Ratios carry over to other machines, tokens per second do not.
"""

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table
from timing import compare, verdict
from transformers import DynamicCache

import jaxmask
from jaxmask.flax import Cache, LayerCache
from jaxmask.flax.models.generate import decode, prefill
from torch_compat.models import load
from torch_compat.verify.smollm2 import in_pytorch

BATCH, PROMPT, NEW = 8, 512, 256
PADDING = 100

tokens = np.random.default_rng(0).integers(5, 40_000, (BATCH, PROMPT)).astype(np.int32)
valid = np.arange(PROMPT) >= np.where(np.arange(BATCH) % 2, PADDING, 0)[:, None]


@torch.no_grad()
def run_pytorch(model: Any, new: int) -> tuple[float, float, Any]:
    """The seconds of the prompt, and of ``new - 1`` steps; and the logits after the prompt."""
    ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(valid)
    start, cache = time.perf_counter(), DynamicCache(config=model.config)
    how: Any = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, **how).logits
    middle, first = time.perf_counter(), logits
    for _ in range(new - 1):
        token, positions = logits[:, -1].argmax(-1)[:, None], positions[:, -1:] + 1
        mask = torch.cat((mask, torch.ones(BATCH, 1, dtype=torch.bool)), 1)
        logits = model(token, attention_mask=mask, position_ids=positions, **how).logits
    return middle - start, time.perf_counter() - middle, first[:, -1].numpy()


def run_flax(model: Any, new: int) -> tuple[float, float, Any]:
    """The same in Flax."""
    graph, state = nnx.split(model)
    cache = model.empty_cache(BATCH, PROMPT + new)
    start = time.perf_counter()
    logits, cache = jax.block_until_ready(prefill(graph, state, cache, jnp.asarray(tokens), jnp.asarray(valid)))
    middle = time.perf_counter()
    how: Any = {"new": new, "top_k": None, "on_tokens": None}
    jax.block_until_ready(decode(graph, state, cache, logits, None, jnp.zeros(0, jnp.int32), jnp.int32(0), **how))
    return middle - start, time.perf_counter() - middle, np.asarray(logits)


def cost_of_masks(model: Any, new: int = 9, rounds: int = 100) -> float:
    """The part of a step that goes when no mask is read, in a cache that is as long as the texts."""
    graph, state = nnx.split(model)

    def without_mask(self: Any, step: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        after, seen = self.update(step, key, value)
        return jaxmask.attention(query, seen.key, seen.value, **how), after

    def program() -> Any:
        """A loop of its own, for what it is traced with is not in the keys of JAX's cache."""
        jitted: Any = decode
        loop = jax.jit(partial(jitted.__wrapped__, new=new, top_k=None, on_tokens=None), static_argnums=0)

        def run() -> Any:
            cache = Cache(model.empty_cache(BATCH, PROMPT + new).layers, jnp.full(BATCH, PROMPT, jnp.int32))
            logits = jnp.zeros((BATCH, model.config.vocab_size))
            return loop(graph, state, cache, logits, None, jnp.zeros(0, jnp.int32), jnp.int32(0))

        return run

    with_mask, without = program(), program()
    jax.block_until_ready(with_mask())
    with patch.object(LayerCache, "attend", without_mask):
        jax.block_until_ready(without())
    # What is looked for is smaller than what else the machine does, which only adds: one of the least, but not the very
    # least, for that is a matter of luck.
    seconds = compare(with_mask, without, rounds=rounds, statistic=lambda taken: statistics.quantiles(taken, n=10)[0])
    return 1 - seconds[1] / seconds[0]


def products(theirs: Any, ours: Any, count: int, layers: int) -> float:
    """How many times as fast the products of ``count`` tokens with the weights of layers are, and nothing else."""
    graph, state = nnx.split(ours)
    inputs = {size: np.ones((count, size), np.float32) for size in (ours.config.dim, ours.config.hidden_dim)}

    def linears(block: Any) -> list[Any]:
        attention, feed_forward = block.attention, block.feed_forward
        return [attention.query_key_value, attention.out, feed_forward.gate_up, feed_forward.down]

    @jax.jit
    def in_flax(state: Any, inputs: Any) -> Any:
        blocks = list(nnx.merge(graph, state).blocks)[:layers]
        of_each = [(linear, linear.weight.shape[-linear.count :]) for block in blocks for linear in linears(block)]
        return [linear(inputs[math.prod(sizes)].reshape(count, *sizes)) for linear, sizes in of_each]

    @torch.no_grad()
    def in_torch(inputs: Any) -> Any:
        blocks = theirs.model.layers[:layers]
        modules = [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]
        return [linear(inputs[linear.in_features]) for linear in modules]

    arrays, tensors = ({size: to(x) for size, x in inputs.items()} for to in (jnp.asarray, torch.from_numpy))
    seconds = compare(partial(in_torch, tensors), partial(in_flax, state, arrays), rounds=9)
    return seconds[0] / seconds[1]


def peak(library: str, new: int) -> int:
    """The most memory in bytes of a process that runs one of the two alone."""
    result = subprocess.run(
        [sys.executable, __file__, "--peak-of", library, "--new", str(new)], check=True, capture_output=True, text=True
    )
    return int(result.stdout.split()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=NEW, help="new tokens for each row")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peak-of", choices=("pytorch", "flax"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    console = Console()
    theirs = in_pytorch()
    if options.peak_of:
        run = run_pytorch if options.peak_of == "pytorch" else run_flax
        model = theirs if options.peak_of == "pytorch" else load(theirs)
        del theirs
        gc.collect()
        # To load a checkpoint takes more than to run it: the peak begins here.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        run(model, options.new)
        # VmHWM, and not ru_maxrss, which a child inherits.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        console.print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
        return
    ours = load(theirs)
    *first, logits = run_flax(ours, options.new)
    np.testing.assert_allclose(logits, run_pytorch(theirs, 2)[2], rtol=0, atol=1e-3)
    times: dict[str, list[tuple[float, float]]] = {"PyTorch": [], "Flax": []}
    for _ in range(options.rounds):
        for name, run in (("PyTorch", partial(run_pytorch, theirs)), ("Flax", partial(run_flax, ours))):
            times[name].append(run(options.new)[:2])
    seconds = {name: [statistics.median(taken) for taken in zip(*runs, strict=True)] for name, runs in times.items()}
    peaks = {"PyTorch": peak("pytorch", options.new), "Flax": peak("flax", options.new)}
    counts = int(valid.size), BATCH * (options.new - 1)
    table = Table(title=f"SmolLM2-135M, float32, {BATCH} prompts of {PROMPT} tokens, {options.new} new ones each")
    for column in ("", "prompt, tokens/s", "decoding, tokens/s", "peak memory, GiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, taken in seconds.items():
        rates = [f"{count / each:,.0f}" for count, each in zip(counts, taken, strict=True)]
        table.add_row(name, *rates, f"{peaks[name] / 2**30:.2f}")
    console.print(table)
    ratios = [theirs / ours for theirs, ours in zip(seconds["PyTorch"], seconds["Flax"], strict=True)]
    compilation = [once - later for once, later in zip(first, seconds["Flax"], strict=True)]
    console.print(verdict("prompt, Flax against PyTorch", ratios[0], 1.3))
    console.print(verdict("decoding, Flax against PyTorch", ratios[1], 1.5))
    console.print(
        f"compiled once, apart from that: the prompt in {compilation[0]:.0f} s, the loop in {compilation[1]:.0f} s"
    )
    alone = products(theirs, ours, BATCH * PROMPT, 4), products(theirs, ours, BATCH, len(ours.config.layers))
    console.print(f"the products with the weights alone: {alone[0]:.2f}x in the prompt, {alone[1]:.2f}x in decoding")
    masks = cost_of_masks(ours)
    console.print(f"masks in a step of decoding: {masks:.1%} of it, ceiling 2%: {'met' if masks <= 0.02 else 'missed'}")
    if options.json:
        figures = {"seconds": seconds, "ratios": ratios, "compilation": compilation, "peaks": peaks}
        figures |= {"products": alone, "masks": masks}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
