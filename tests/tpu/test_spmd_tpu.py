"""Attention on meshes of chips, compiled ahead of time: each takes splash for its part, and is sent what it needs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmask
from jaxmask import Causal, Mask, Prefix, Segments, SlidingWindow
from tests.helpers.programs import collectives, received

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

LENGTH = 131_072
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": SlidingWindow(1024),
    "sinks": SlidingWindow(1024) | Causal() & Prefix(4),
}


def divided(
    name: str, scheme: Any, implementation: Any, *, ids: bool = False, length: int = LENGTH, chips: str = "2x4"
) -> tuple[Any, Any]:
    """Output and gradients on chips that divide a sequence; and what is said of them."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{chips}").devices
    mesh = Mesh(np.array(devices), ("seq",), axis_types=(AxisType.Auto,))
    told = NamedSharding(mesh, P(None, "seq"))

    def run(query: Any, key: Any, value: Any, cotangent: Any, ids: Any) -> Any:
        mask = MASKS[name] if ids is None else MASKS[name] & Segments(ids)
        how: dict[str, Any] = {
            "mask": mask,
            "sharding": told,
            "context_parallel": scheme,
            "implementation": implementation,
        }
        said.append(jaxmask.explain(query, key, value, **how).context_parallel)
        out, pull = jax.vjp(lambda *x: jaxmask.attention(*x, **how), query, key, value)
        return out, pull(cotangent)

    said: list[Any] = []
    query, key = (jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16, sharding=told) for heads in (32, 8))
    whole = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=NamedSharding(mesh, P())) if ids else None
    program = jax.jit(run, out_shardings=told).lower(query, key, key, query, whole).compile()
    return program, said[0]


@pytest.mark.parametrize(
    ("name", "scheme", "implementation"),
    [
        ("window", None, "splash"),
        ("sinks", None, "blocked"),
        ("causal", None, "splash"),
        ("causal", "gather", "splash"),
        ("causal", "ring", None),
    ],
)
def test_eight_chips_receive_what_is_said(name: str, scheme: Any, implementation: Any) -> None:
    program, said = divided(name, scheme, implementation)
    assert said.scheme == (scheme or {"causal": "ulysses"}.get(name, "halo"))
    found = received(program)
    assert sum(found.values()) == sum(said.received[said.scheme]), found
    # No scores, which would be gigabytes.
    assert f"{LENGTH},{LENGTH}" not in program.as_text()


def test_a_window_bounds_documents_whose_ids_are_traced() -> None:
    program, said = divided("window", None, "splash", ids=True)
    assert said.scheme == "halo"
    assert sum(received(program).values()) == sum(said.received["halo"]) == 2 * 2**22


def test_a_million_tokens_on_256_chips_are_sent_what_a_window_holds() -> None:
    program, said = divided("window", None, "splash", length=2**20, chips="16x16")
    assert sum(received(program).values()) == sum(said.received["halo"]) == 2 * 2**22
    assert program.memory_analysis().temp_size_in_bytes < 100 * 2**20
