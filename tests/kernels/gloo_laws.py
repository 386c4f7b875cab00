"""One of two processes with four devices each, over which a sequence is divided; it fails where a law does not hold.

python -m tests.kernels.gloo_laws PROCESS PORT
"""

import sys
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmask
from jaxmask import Causal, Mask, Padding, Segments, SlidingWindow

PROCESSES, DEVICES, BATCH, LENGTH, HEADS, DIM = 2, 4, 2, 64, 8, 8
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 5, (BATCH, LENGTH)), 1)
VALID = RNG.random((BATCH, LENGTH)) > 0.3
MASKS: dict[str, Mask] = {
    "window": SlidingWindow(20),
    "documents": Causal() & Segments(IDS),
    "padding": Causal() & Padding(VALID),
}
# Every scheme with every mask would be as many programs again, and say no more of what is between processes.
CALLS = [
    *((name, "halo") for name in MASKS),
    ("window", "gather"),
    ("padding", "ulysses"),
    ("documents", "ring"),
    ("padding", "merge"),
]


@partial(jax.jit, static_argnums=(0, 1))
def run(name: str, scheme: Any, cotangent: Any, *arrays: Any) -> Any:
    """Output and gradients."""
    attend = partial(jaxmask.attention, mask=MASKS[name], context_parallel=scheme)
    out, pull = jax.vjp(attend, *arrays)
    return out, *pull(cotangent)


def main(process: int, port: int) -> None:
    """Output and gradients of every call, on the devices of both processes and on one device of this one."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    assert jax.device_count() == PROCESSES * DEVICES
    assert jax.local_device_count() == DEVICES
    mesh = jax.make_mesh((PROCESSES * DEVICES,), ("seq",), axis_types=(AxisType.Explicit,))
    # The same in both processes.
    query, key, value, cotangent = RNG.standard_normal((4, BATCH, LENGTH, HEADS, DIM)).astype(np.float32)

    def divided(x: Any, spec: P) -> Any:
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    for name, scheme in CALLS:
        whole = scheme == "merge"
        queries, keys = P() if whole else P(None, "seq"), P(None, "seq")

        arrays = [divided(x, spec) for x, spec in ((cotangent, queries), (query, queries), (key, keys), (value, keys))]
        found = run(name, scheme, *arrays)
        expected = jax.tree.map(np.asarray, run(name, None, cotangent, query, key, value))
        for one, other in zip(found, expected, strict=True):
            for shard in one.addressable_shards:
                np.testing.assert_allclose(shard.data, other[shard.index], rtol=1e-4, atol=1e-4)
    sys.stdout.write(f"{len(CALLS)} calls hold\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
