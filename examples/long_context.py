"""Attention to a long sequence of documents, which eight devices divide.

The mask is causal, within documents, and in a window, so that each device needs a few keys of its neighbour.
``explain`` says how many bytes by each way of sending them, before anything runs. A causal mask alone gives the last
device most of the work; ``balanced_order`` finds an order of the tokens by which all have the same, and the plot shows
both.

The devices are virtual, of one CPU. Where XLA_FLAGS is set already, add to it the flag that is below.

    python examples/long_context.py --length 131072 --plot work.png
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from jaxmask import Causal, SlidingWindow, attention, balanced_order, explain, reorder, restore, zoo

SPEC = P(None, "seq")
SHARDS = 8


def documents(length: int, window: int) -> np.ndarray:
    """Ids of documents of random lengths, ``[1, length]``."""
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, length), max(length // (4 * window), 1), replace=False))
    return np.asarray(zoo.segment_ids_from_cu_seqlens(np.concatenate(([0], ends, [length]))[None], length))


def main() -> None:
    """Attend on eight devices by each scheme, and compare with one device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--plot", type=Path, help="where to write a picture of the work of each device")
    arguments = parser.parse_args()
    length, console = arguments.length, Console(highlight=False, width=100)

    mesh = jax.make_mesh((SHARDS,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:SHARDS])
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, length, SHARDS, 32))
    ids = jnp.asarray(documents(length, arguments.window))
    mask = Causal() & zoo.packed(ids) & SlidingWindow(arguments.window)

    def put(x: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, SPEC))

    with Progress(console=console) as progress, jax.set_mesh(mesh):
        task = progress.add_task("attending", total=6)
        alone = jax.device_get(jax.jit(attention)(query, key, value, mask))
        progress.advance(task)
        shards = put(query), put(key), put(value)
        cost = explain(*shards, mask, sharding=SPEC).context_parallel
        assert cost is not None
        rows = []
        for scheme in cost.received:
            divided = jax.jit(partial(attention, mask=mask, sharding=SPEC, context_parallel=scheme))
            difference = float(np.abs(jax.device_get(divided(*shards)) - alone).max())
            rows.append(f"{scheme}: {cost.received[scheme][0]:,} bytes to a device, differs by {difference:.0e}")
            progress.advance(task)
        order = balanced_order(Causal(), length, SHARDS, block=length // (4 * SHARDS))
        arranged = [put(reorder(x, order)) for x in (query, key, value)]
        even = jax.jit(partial(attention, mask=mask, positions=order, sharding=SPEC))(*arranged)
        difference = float(np.abs(restore(jax.device_get(even), order) - alone).max())
        progress.update(task, completed=6)
    console.print(f"{length:,} tokens in {int(ids.max()) + 1} documents on {SHARDS} devices, beside one device:")
    for row in rows:
        console.print(f"  {row}")
    console.print(f"  in an order that is even under Causal(): differs by {difference:.0e}")
    console.print(f"the scheme that sends least: {cost.scheme}")
    loads = {}
    for name, positions in {"in order": None, "balanced_order": order}.items():
        planned = explain(query, key, value, Causal(), sharding=NamedSharding(mesh, SPEC), positions=positions)
        assert planned.context_parallel is not None
        loads[name] = planned.context_parallel.plan.work
        uneven = planned.context_parallel.plan.imbalance
        console.print(f"{name}, under Causal(): the busiest device does {uneven:.2f} times the mean")
    if arguments.plot:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        ax = figure.subplots()
        for i, (name, load) in enumerate(loads.items()):
            ax.bar(np.arange(SHARDS) + 0.4 * i, load, 0.4, label=name)
        ax.set(xlabel="device", ylabel="pairs", title="the work of Causal()")
        ax.legend()
        figure.savefig(arguments.plot)
        console.print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
