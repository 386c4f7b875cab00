"""Print the table of what each implementation of attention takes, as the functions that decide it say.

python docs/implementations.py > docs/implementations.md
"""

import re
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from textwrap import shorten
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxmask import Causal, Chunked, Dense, Padding, PerHead, Predicate, Prefix, Segments, SlidingWindow, Window, zoo
from jaxmask.dispatch import FUSED, LACKS, RUN, drawbacks
from jaxmask.kernels.call import checked_call

BATCH, LENGTH, HEADS, DIM = 2, 256, 4, 64
lengths = np.array([200, 256], np.int32)
valid = np.arange(LENGTH) < lengths[:, None]
ids = np.arange(LENGTH, dtype=np.int32)[None] // 100
positions = np.arange(LENGTH, dtype=np.int32)
bias = np.zeros((1, HEADS, LENGTH, LENGTH), np.float32)
keys_and_values = {name: jax.ShapeDtypeStruct((BATCH, LENGTH, 2, DIM), jnp.bfloat16) for name in ("key", "value")}


def strided(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """A predicate."""
    return kv % 2 == 0


def alibi(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """A bias that is a function."""
    return (kv - q) * 2.0**-h


# What is asked for, and the arguments of attention that ask for it.
ASKED: dict[str, dict[str, Any]] = {
    "`Causal()`": {"mask": Causal()},
    "`SlidingWindow(size)`": {"mask": SlidingWindow(32)},
    "`Window(left, right)`": {"mask": Window(16, 16)},
    "`Chunked(size)`": {"mask": Chunked(64)},
    "`Prefix(length)`": {"mask": Prefix(100)},
    "`Prefix(lengths)`": {"mask": Prefix(lengths)},
    "`Padding(valid)`": {"mask": Padding(valid)},
    "`Segments(ids)`": {"mask": Segments(ids)},
    "`zoo.packed(ids)`": {"mask": zoo.packed(ids)},
    "`Dense(allowed)`": {"mask": Dense(valid[:, None, None] & np.tri(LENGTH, dtype=bool))},
    "`Predicate(function)`": {"mask": Predicate(strided)},
    "`PerHead(masks)`": {"mask": PerHead([Causal(), SlidingWindow(32)] * 2)},
    "`Causal() & Prefix(lengths)`": {"mask": Causal() & Prefix(lengths)},
    "`Causal() & Segments(ids)`": {"mask": Causal() & Segments(ids)},
    "`Causal() | Prefix(length)`": {"mask": Causal() | Prefix(100)},
    "`bias`, an array": {"bias": bias},
    "`bias`, a function": {"bias": alibi},
    "`logits_soft_cap`": {"logits_soft_cap": 50.0},
    "`logits_soft_cap` and `bias`": {"logits_soft_cap": 50.0, "bias": bias},
    "`sinks`": {"sinks": np.zeros(HEADS, np.float32)},
    "`dropout_rate`": {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
    "`return_residual`": {"return_residual": True},
    "`offset`, with `Causal()`": {"mask": Causal(), "offset": 64},
    "`offset` for each example": {"mask": Causal(), "offset": np.array([0, 64])},
    "`query_positions`": {"mask": Causal(), "query_positions": positions},
    "`key_positions`": {"mask": Causal(), "offset": 0, "key_positions": positions},
    "fewer heads of keys": keys_and_values,
    "another dim of values": {"value": jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, 128), jnp.bfloat16)},
    "bfloat16": {},
    "float16": {"dtype": jnp.float16},
    "float32": {"dtype": jnp.float32},
    "float64": {"dtype": jnp.float64},
    "inside a `shard_map`": {"mask": Causal(), "check_vma": True},
    "inside a `shard_map(check_vma=False)`": {"mask": Causal(), "check_vma": False},
    "batch and heads sharded, by the type of the query or `sharding=`": {"mask": Causal()},
    "batch and heads sharded, and left to XLA": {"mask": Causal(), "left_to_xla": True},
}
ABOUT = """# What each implementation of `attention` takes

`python docs/implementations.py > docs/implementations.md` writes this table. It asks the functions that decide which
implementation `jaxmask.attention` takes, for queries of bfloat16 `[2, 256, 4, 64]`; cuDNN and tokamax as on an H100,
and for gradients, too. What is not "yes" is the reason that `jaxmask.explain` gives.
"""


class H100:
    """What JAX and tokamax ask of a GPU."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H100 80GB HBM3", "9.0", 132
    platform_version = "cuda"

    @property
    def client(self) -> "H100":
        """What knows the version of the platform."""
        return self


@contextmanager
def simulated(name: str) -> Generator[None]:
    """The GPU that a kernel is made for, as far as tracing asks for one."""
    of_cudnn, gpu = "jax._src.cudnn.fused_attention_stablehlo", H100()
    with ExitStack() as patches:
        if name in FUSED["gpu"]:
            for what, value in (
                ("jax.devices", lambda: [gpu]),
                ("jax.default_backend", lambda: "gpu"),
                ("jax.extend.backend.get_default_device", lambda: gpu),
                (f"{of_cudnn}.check_cudnn_version", lambda: 91200),
                (f"{of_cudnn}.check_compute_capability", lambda needed: float(needed) <= 9.0),
                (f"{of_cudnn}.is_cuda_compute_capability_equal", lambda other: other == "9.0"),
            ):
                patches.enter_context(patch(what, value))
        yield


def lacks(
    name: str, *, dtype: Any = jnp.bfloat16, check_vma: bool | None = None, left_to_xla: bool = False, **arguments: Any
) -> list[str]:
    """What an implementation lacks to do a call of attention, on the platform that it is made for."""
    found: list[str] = []

    def ask(shape: Any) -> Any:
        given: dict[str, Any] = {"query": shape, "key": shape, "value": shape, "mask": None, **arguments}
        call = replace(checked_call(**given), is_left_to_xla=left_to_xla)
        found.extend(LACKS[name](call) or drawbacks(name, call) if name in LACKS else [])
        return shape

    shape = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, DIM), dtype)
    with simulated(name), jax.enable_x64(dtype == jnp.float64):
        if check_vma is None:
            ask(shape)
        else:
            spec, mesh = PartitionSpec("data"), jax.sharding.AbstractMesh((1,), ("data",), (AxisType.Auto,))
            jax.eval_shape(jax.shard_map(ask, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma), shape)
    return found


def answer(name: str, arguments: dict[str, Any]) -> str:
    """The cell of a table."""
    reasons = (re.sub("do not say .*", "do not say it", lack) for lack in lacks(name, **arguments))
    return shorten("; ".join(reasons), 90, placeholder=" ...").replace("|", "\\|") or "yes"


def table() -> str:
    """The table in Markdown."""
    made_for = (", ".join(at.upper() for at, names in FUSED.items() if name in names) or "any" for name in RUN)
    rows = [["", *(f"`{name}`" for name in RUN)], ["---"] * (1 + len(RUN)), ["made for", *made_for]]
    rows += [[what.replace("|", "\\|"), *(answer(name, how) for name in RUN)] for what, how in ASKED.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(f"{ABOUT}\n{table()}\n")
