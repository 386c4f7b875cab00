"""Attention on a mesh of four chips, compiled ahead of time: each takes splash for its part, and sends nothing."""

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
