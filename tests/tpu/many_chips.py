"""Programs of attention to sequences that chips divide, compiled ahead of time, and what is said of them."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmask
from jaxmask import Causal, Mask, Prefix, Segments, SlidingWindow
from jaxmask.spmd import Cost
from tests.helpers.programs import received

HEADS, KV_HEADS, DIM = 32, 8, 128
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": SlidingWindow(1024),
    # The ids of documents are added where a program has them as an argument.
    "window, documents": SlidingWindow(1024),
    "sinks and window": SlidingWindow(1024) | Causal() & Prefix(4),
    "one query, causal": Causal(),
}


class Row(NamedTuple):
    """A program of the table.

    Args:
        chips: a topology of libtpu.
        length: the number of tokens.
        mask: its name.
        scheme: which is asked for; ``None`` chooses.
        implementation: the same.
        is_tested: whether the tests compile it, too.
    """

    chips: str
    length: int
    mask: str
    scheme: Any = None
    implementation: Any = "splash"
    is_tested: bool = True


ROWS = [
    Row("v5e:2x4", 2**17, "window"),
    Row("v5e:2x4", 2**17, "window", "gather", is_tested=False),
    Row("v5e:2x4", 2**17, "window", "ulysses", is_tested=False),
    Row("v5e:2x4", 2**17, "window", "ring", None, is_tested=False),
    Row("v5e:2x4", 2**17, "window, documents"),
    Row("v5e:2x4", 2**17, "sinks and window", None, "blocked"),
    Row("v5e:2x4", 2**17, "causal"),
    Row("v5e:2x4", 2**17, "causal", "gather"),
    Row("v5e:2x4", 2**17, "causal", "ring", None),
    Row("v5e:2x4", 2**17, "one query, causal", None, None),
    Row("v5e:16x16", 2**20, "window"),
    Row("v5e:16x16", 2**20, "causal", "gather"),
    Row("v5e:16x16", 2**20, "causal", "ring", None),
    Row("v5e:16x16", 2**20, "one query, causal", None, None),
    Row("v5p:8x8x4", 2**20, "window"),
    Row("v5p:16x16x16", 2**20, "window"),
]


class Program(NamedTuple):
    """What the compiler makes of a row.

    Args:
        chips: how many there are.
        said: what ``explain`` says.
        expected: the bytes that a chip receives, as it says.
        received: the bytes that a chip receives, by the kind of communication.
        temporaries: bytes on each chip.
        instructions: how long the program is.
        writes_scores: whether an array of all pairs is in it.
    """

    chips: int
    said: Cost
    expected: int
    received: dict[str, int]
    temporaries: int
    instructions: int
    writes_scores: bool


@cache
def compiled(row: Row) -> Program:
    """Compile a row: output and gradients; of one query the output alone."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=row.chips).devices
    mesh = Mesh(np.array(devices), ("seq",), axis_types=(AxisType.Explicit,))
    whole, divided = (NamedSharding(mesh, spec) for spec in (P(), P(None, "seq")))
    is_step = row.mask.startswith("one query")
    said: list[Any] = []

    def run(query: Any, key: Any, value: Any, cotangent: Any, ids: Any, offset: Any) -> Any:
        mask = MASKS[row.mask] if ids is None else MASKS[row.mask] & Segments(ids)
        how: Any = {
            "mask": mask,
            "offset": offset,
            "context_parallel": row.scheme,
            "implementation": row.implementation,
        }
        said.append(jaxmask.explain(query, key, value, **how).context_parallel)
        if cotangent is None:
            return jaxmask.attention(query, key, value, **how)
        out, pull = jax.vjp(lambda *x: jaxmask.attention(*x, **how), query, key, value)
        return out, pull(cotangent)

    def shape(sharding: Any, *sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    key = shape(divided, 1, row.length, KV_HEADS, DIM)
    query = shape(whole, 1, 1, HEADS, DIM) if is_step else shape(divided, 1, row.length, HEADS, DIM)
    ids = shape(whole, 1, row.length, dtype=jnp.int32) if "documents" in row.mask else None
    offset = shape(whole, dtype=jnp.int32) if is_step else None
    program = jax.jit(run).lower(query, key, key, None if is_step else query, ids, offset).compile()
    text, memory, cost = program.as_text() or "", program.memory_analysis(), said[0]
    assert memory is not None
    traffic = cost.received[cost.scheme]
    return Program(
        len(devices),
        cost,
        traffic.forward if is_step else sum(traffic),
        received(program),
        memory.temp_size_in_bytes,
        text.count(" = "),
        f"{row.length},{row.length}" in text,
    )


def line(row: Row) -> str:
    """The row, as the table in the docs has it."""
    program = compiled(row)

    def mebibytes(size: int) -> str:
        return f"{size / 2**20:,.0f}" if size >= 2**20 else f"{size / 2**20:.3f}"

    kinds = ", ".join(f"{kind} {mebibytes(size)}" for kind, size in sorted(program.received.items()))
    cells = (
        row.chips.replace(":", " "),
        f"{program.chips:,}",
        f"{row.length:,}",
        row.mask,
        program.said.scheme + ("" if row.scheme is None else ", asked for"),
        mebibytes(program.expected),
        kinds,
        mebibytes(program.temporaries),
        f"{program.said.imbalance:.2f}",
        f"{program.instructions:,}",
    )
    return f"| {' | '.join(cells)} |"
