"""Attention on meshes of chips, compiled ahead of time: each takes splash for its part, and is sent what it needs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmask
from jaxmask import Causal, Segments
from tests.helpers.programs import collectives
from tests.tpu.many_chips import ROWS, Row, line
from tests.tpu.many_chips import compiled as compiled_row

SPEC = P("data", None, "model", None)


def compiled(mode: AxisType, sharding: bool, implementation: Any) -> Any:
    """Output and gradients of packed documents, on two shards of examples and two of heads."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(mode,) * 2)
    told = NamedSharding(mesh, SPEC) if sharding else None

    def run(query: Any, key: Any, cotangent: Any, ids: Any) -> Any:
        def attend(query: Any, key: Any) -> Any:
            mask = Causal() & Segments(ids)
            return jaxmask.attention(query, key, key, mask, sharding=told, implementation=implementation)

        out, pull = jax.vjp(attend, query, key)
        return out, pull(cotangent)

    def spec(*shape: int, dtype: Any = jnp.bfloat16, at: P = SPEC) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, at))

    query, key = spec(2, 2048, 8, 128), spec(2, 2048, 4, 128)
    return jax.jit(run).lower(query, key, query, spec(2, 2048, dtype=jnp.int32, at=P("data"))).compile()


@pytest.mark.parametrize(("mode", "sharding"), [(AxisType.Explicit, False), (AxisType.Auto, True)], ids=str)
def test_each_chip_runs_splash_on_its_part(mode: AxisType, sharding: bool) -> None:
    program = compiled(mode, sharding, "splash")
    assert collectives(program) == []
    assert "splash" in program.as_text()


def test_what_is_left_to_xla_is_divided_without_a_gather() -> None:
    # No kernel of Mosaic, which XLA cannot divide, and nothing sent.
    program = compiled(AxisType.Auto, False, None)
    assert collectives(program) == []
    assert "tpu_custom_call" not in program.as_text()


# A long sequence, divided.

TESTED = [row for row in ROWS if row.is_tested]


@pytest.mark.parametrize("row", TESTED, ids=lambda row: "-".join(map(str, row[:4])))
def test_chips_receive_what_is_said_and_write_no_scores(row: Row) -> None:
    program = compiled_row(row)
    assert sum(program.received.values()) == program.expected, program.received
    # They would be gigabytes, and of a million tokens terabytes.
    assert not program.writes_scores


@pytest.mark.parametrize("row", TESTED, ids=lambda row: "-".join(map(str, row[:4])))
def test_the_table_in_the_docs_is_of_these_programs(row: Row) -> None:
    assert line(row) in Path("docs/many_chips.md").read_text("utf-8").splitlines()


def test_what_sends_least_is_chosen() -> None:
    chosen = {row.mask: compiled_row(row).said.scheme for row in TESTED if row.scheme is None}
    assert chosen == {
        "window": "halo",
        "window, documents": "halo",
        "sinks and window": "halo",
        "causal": "ulysses",
        "one query, causal": "merge",
    }


def test_a_window_over_a_million_tokens_takes_little_memory() -> None:
    # On a v5p, what splash writes beside its output stays in HBM, 64 MiB of it.
    limits = {"v5e:16x16": 100, "v5p:8x8x4": 128, "v5p:16x16x16": 100}
    for row in TESTED:
        if row.mask == "window" and row.chips in limits:
            assert compiled_row(row).temporaries < limits[row.chips] * 2**20
            # Two heads of keys and their values, of 1,024 tokens, and as much for their gradients.
            assert compiled_row(row).expected == 2 * 2**22


@pytest.mark.parametrize(
    ("few", "many", "mask"),
    [
        ("v5e:2x4", "v5e:16x16", "window"),
        ("v5p:8x8x4", "v5p:16x16x16", "window"),
        ("v5e:2x4", "v5e:16x16", "causal"),
        ("v5e:2x4", "v5e:16x16", "one query, causal"),
    ],
)
def test_a_program_is_as_long_for_few_chips_as_for_many(few: str, many: str, mask: str) -> None:
    scheme = "ring" if mask == "causal" else None
    lengths = [
        compiled_row(row).instructions
        for chips in (few, many)
        for row in TESTED
        if (row.chips, row.mask, row.scheme) == (chips, mask, scheme)
    ]
    assert len(lengths) == 2
    assert lengths[1] < 1.05 * lengths[0]
