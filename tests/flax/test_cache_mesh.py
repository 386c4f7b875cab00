"""A cache whose slots are divided over devices: as on one, each writes its own slots, and no key is sent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmask
from jaxmask import Causal, Mask, SlidingWindow
from jaxmask.flax import Cache
from tests.flax.test_cache import chunked_rows
from tests.helpers.programs import collectives, mesh_of, received
from tests.kernels.test_attention import random

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 24
SLOTS, QUERIES = P("data", "seq", "model"), P("data", None, "model")
# A window for the cache, and the mask: a layer that keeps all, a ring, and one with more slots than its mask needs.
LAYERS: list[tuple[int | None, Mask]] = [(None, Causal()), (8, Causal()), (12, SlidingWindow(5))]
MODES = {"explicit": AxisType.Explicit, "told": AxisType.Auto}


def put(mesh: Any, x: Any, *spec: Any) -> Any:
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def empty(batch: int, length: int = LENGTH, layers: Any = LAYERS) -> Cache:
    return Cache.empty(batch, length, layers=[window for window, _ in layers], kv_heads=KV_HEADS, dim=DIM)


def divided(mesh: Any, cache: Cache) -> Cache:
    return jax.tree.map(lambda x: put(mesh, x, *(SLOTS if x.ndim == 4 else ("data",))), cache)


def run(cache: Cache, new: Any, valid: Any = None, *, sharding: Any = None, **how: Any) -> tuple[list[Any], Cache]:
    """The output of every layer for the same new tokens, and its log-sum-exp."""
    query, key, value = new
    step = cache.step(query.shape[1], valid)
    results = [
        layer.attend(step, query, key, value, mask, sharding=sharding, return_residual=True, **how)
        for layer, (_, mask) in zip(cache.layers, LAYERS, strict=False)
    ]
    return [out for out, _ in results], step.end([layer for _, layer in results])


on_one = jax.jit(run)


def text(seed: int, batch: int, length: int) -> tuple[Any, Any, Any]:
    """Query, key and value."""
    query, key, value = (random(seed + i, batch, length, n, DIM) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    return query, key, value


@settings(max_examples=6)
@given(chunked_rows(), st.sampled_from(list(MODES)))
def test_chunks_with_any_padding_are_as_on_one_device(chunks: list[list[tuple[int, int, int]]], mode: str) -> None:
    mesh = mesh_of(MODES[mode], (1, 4, 2), ("data", "seq", "model"))
    sharding = NamedSharding(mesh, SLOTS) if mode == "told" else None
    sinks = jnp.array([0.0, 1.0, -1.0, 2.0])
    on_many = jax.jit(lambda cache, new, valid: run(cache, new, valid, sharding=sharding, sinks=sinks))
    cache = empty(3)
    many = divided(mesh, cache)
    for i, rows in enumerate(chunks):
        width = sum(rows[0])
        valid = np.array([[0] * left + [1] * tokens + [0] * right for left, tokens, right in rows], bool)
        new = text(10 * i, 3, width)
        # Without room rows are NaN, here as there; what padding gets has no meaning.
        expected, cache = on_one(cache, new, valid, sinks=sinks)
        found, many = on_many(many, tuple(put(mesh, x, *QUERIES) for x in new), put(mesh, valid, "data"))
        assert many.tokens.tolist() == cache.tokens.tolist()
        is_token = valid | ~(cache.tokens <= LENGTH)[:, None]
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(np.asarray(other)[is_token], np.asarray(one)[is_token], rtol=2e-5, atol=2e-5)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(many), jax.tree.leaves(cache))
    for layer in many.layers:
        assert layer.key.sharding.shard_shape(layer.key.shape)[1] == layer.key.shape[1] // 4


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_sends_what_each_device_has_found_and_no_key(mode: str, count: int) -> None:
    mesh = mesh_of(MODES[mode], (1, 8, 1), ("data", "seq", "model"))
    sharding = NamedSharding(mesh, SLOTS) if mode == "told" else None
    layers: Any = [(None, Causal()), (512, Causal())]
    cache = divided(mesh, empty(2, 2**16, layers))
    new = tuple(put(mesh, x, *QUERIES) for x in text(0, 2, count))

    def step(cache: Cache, new: Any) -> Any:
        return run(cache, new, sharding=sharding)

    program = jax.jit(step, donate_argnums=0).lower(cache, new).compile()
    assert set(collectives(program)) == {"all-reduce"}
    # The highest score, the sum of weights and the output of each query and head, by both layers.
    key = cache.layers[0].key
    how: Any = {"sharding": sharding, "context_parallel": "merge"}
    cost = jaxmask.explain(new[0], key, key, Causal(), offset=0, **how).context_parallel
    assert cost is not None
    assert sum(received(program).values()) == 2 * cost.received["merge"].forward
    # The position of each slot, and no array of the size of a shard of the long layer but the write in place.
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2**16 * 4 + cache.layers[0].key.nbytes / 8 / 4


def test_a_prompt_divided_as_its_slots_attends_by_halo_or_whatever_sends_least() -> None:
    mesh = mesh_of(AxisType.Explicit, (1, 4, 1), ("data", "seq", "model"))
    cache, whole = empty(2), text(3, 2, 16)
    expected, _ = run(cache, whole)
    found, _ = jax.jit(run)(divided(mesh, cache), tuple(put(mesh, x, *SLOTS) for x in whole))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)


def test_gradients_flow_through_divided_slots() -> None:
    mesh = mesh_of(AxisType.Explicit, (1, 4, 1), ("data", "seq", "model"))
    whole, ring = text(9, 2, 4), empty(2, layers=LAYERS[1:2])

    @jax.jit
    def gradients(whole: Any, cache: Cache) -> Any:
        def loss(whole: Any) -> Any:
            one, begun = run(cache, tuple(x[:, :3] for x in whole))
            other, _ = run(begun, tuple(x[:, 3:] for x in whole))
            return sum((out**2).sum() for out, _ in (*one, *other))

        return jax.grad(loss)(whole)

    found = gradients(tuple(put(mesh, x, *QUERIES) for x in whole), divided(mesh, ring))
    for one, other in zip(gradients(whole, ring), found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "length", "sharding", "says"),
    [
        (2, 22, SLOTS, "the 22 slots of the layer do not divide over 4 devices: leave them whole"),
        (3, LENGTH, SLOTS, "the 3 rows of the layer do not divide over 2 devices"),
        (
            2,
            LENGTH,
            P("data", "sequence"),
            r"names \['sequence'\], but the axes of the mesh are \['data', 'seq', 'model'\]",
        ),
        (2, LENGTH, P("seq", "seq"), r"names \['seq'\] twice"),
    ],
)
def test_what_does_not_divide_a_layer_is_refused(batch: int, length: int, sharding: P, says: str) -> None:
    mesh = mesh_of(AxisType.Auto, (2, 4, 1), ("data", "seq", "model"))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=says):
        run(empty(batch, length), text(0, batch, 1), sharding=sharding)


def test_a_division_without_a_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no mesh"):
        run(empty(2), text(0, 2, 1), sharding=P(None, "seq"))
