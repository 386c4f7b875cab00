"""Keys that are divided over devices which have all queries: each attends to its own, and what they find is merged."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import jaxmask
from jaxmask import Causal, Mask, Padding, SlidingWindow
from jaxmask.kernels.dropout import Dropout
from tests.helpers.programs import collectives, received
from tests.kernels.test_attention import TOLERANCE, Arrays, Case, arrays_of, quickly, random, with_gradients
from tests.kernels.test_context import MODES, cases, mesh_of, put
from tests.oracles.attention import assert_close, defined

KEYS = P("data", "seq", "model")
QUERIES = P("data", None, "model")
SPECS = {"query": QUERIES, "key": KEYS, "value": KEYS, "cotangent": QUERIES}
every_mode = pytest.mark.parametrize("mode", MODES)


def merged(arrays: Arrays, cotangent: Any, mode: str, **how: Any) -> Arrays:
    """Output and gradients on eight devices, of which each has half of the keys, of the examples and of the heads."""
    mesh = mesh_of(mode, data=2, seq=2, model=2)
    placed = {name: put(mesh, x, *SPECS.get(name, P())) for name, x in arrays.items()}
    if mode == "told":
        how |= {"sharding": NamedSharding(mesh, KEYS), "context_parallel": "merge"}

    @quickly
    def run(arrays: Arrays, cotangent: Any) -> Arrays:
        return with_gradients(lambda arrays: jaxmask.attention(**arrays, **how), arrays, cotangent)

    return run(placed, put(mesh, cotangent, *QUERIES))


@settings(max_examples=12)
@given(cases([(40, 40), (1, 40), (6, 40)]), st.sampled_from(list(MODES)))
def test_any_mask_is_what_it_is_on_one_device(case: Case, mode: str) -> None:
    if case.arrays["key"].shape[2] == 1:
        case.arrays.update({name: jnp.repeat(case.arrays[name], 2, 2) for name in ("key", "value")})
    found = merged(
        case.arrays,
        case.cotangent,
        mode,
        mask=case.drawn.mask,
        logits_soft_cap=case.logits_soft_cap,
        **case.problem.where,
    )
    assert_close(found, case.expected(), TOLERANCE["float32"])


@every_mode
@pytest.mark.parametrize("implementation", ["xla", "blocked", "pallas"])
def test_a_query_that_finds_nothing_on_some_devices_or_on_all_is_as_on_one(mode: str, implementation: Any) -> None:
    arrays, cotangent = arrays_of(3, 32, kv_heads=4, dim=16, dim_v=16)
    # The first query has nothing, and the others have keys of one device alone.
    mask = SlidingWindow(4) & Padding(jnp.arange(32)[None] >= 10)
    found = merged(arrays, cotangent, mode, mask=mask, offset=9, implementation=implementation)
    allowed = np.asarray(mask.dense(3, 32, offset=9))
    assert not allowed[:, :, 0].any()
    assert allowed[:, :, 1:].any()
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


def test_bias_sinks_dropout_and_the_log_sum_exp_are_those_of_the_whole() -> None:
    arrays, cotangent = arrays_of(5, 32, heads=8, kv_heads=4)
    arrays |= {"sinks": random(8, 8), "slopes": random(7, 8)}
    rng, mask = jax.random.key(3), Causal()
    mesh = mesh_of("explicit", data=2, seq=2, model=2)

    def by_slopes(slopes: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return slopes[h] * (kv - q) * (b + 1) + kv / 9

    def attend(arrays: Arrays) -> Any:
        arrays = dict(arrays)
        bias = Partial(by_slopes, arrays.pop("slopes"))
        how: Any = {"dropout_rate": 0.3, "dropout_rng": rng, "logits_soft_cap": 3.0, "return_residual": True}
        return jaxmask.attention(**arrays, mask=mask, bias=bias, offset=20, **how)

    @quickly
    def run(arrays: Arrays, cotangent: Any, lse_cotangent: Any) -> Arrays:
        (out, lse), pull = jax.vjp(attend, arrays)
        return {"out": out, "lse": lse, **pull((cotangent, lse_cotangent))[0]}

    lse_cotangent = random(11, 2, 5, 8)
    placed = {name: put(mesh, x, *{**SPECS, "sinks": P("model")}.get(name, P())) for name, x in arrays.items()}
    found = run(placed, put(mesh, cotangent, *QUERIES), put(mesh, lse_cotangent, *QUERIES))
    slopes = arrays.pop("slopes")
    factor = Dropout(jax.random.bits(rng, (2,), jnp.uint32), 0.3, False).factor(
        jnp.float32, *np.ix_(*map(np.arange, (2, 8, 5, 32)))
    )
    distance = (np.arange(32) - np.arange(20, 25)[:, None]) * np.array([1, 2])[:, None, None, None]
    expected, scales = defined(
        np.asarray(mask.dense(5, 32, offset=20)),
        cotangent,
        **arrays,
        bias=np.asarray(slopes)[:, None, None] * distance + np.arange(32) / 9,
        dropout=np.asarray(factor),
        logits_soft_cap=3.0,
        lse_cotangent=lse_cotangent,
    )
    dbias = expected.pop("bias")
    expected["slopes"] = (dbias * distance).sum((0, 2, 3))
    scales["slopes"] = float(np.abs(dbias * distance).sum((0, 2, 3)).max())
    assert_close(found, (expected, scales), 5 * TOLERANCE["float32"])


@pytest.mark.parametrize("checks", [True, False])
def test_inside_of_a_shard_map_types_say_that_queries_are_whole_or_the_scheme_does(checks: bool) -> None:
    arrays, cotangent = arrays_of(3, 32, kv_heads=4)
    mesh, mask = mesh_of("told", seq=4), Causal() & Padding(jnp.arange(32)[None] % 5 > 0)
    specs = {"query": P(), "key": P(None, "seq"), "value": P(None, "seq")}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=checks)
    def shard(arrays: Arrays, mask: Mask) -> Any:
        how: Any = {} if checks else {"context_parallel": "merge"}
        return jaxmask.attention(**arrays, mask=mask, offset=20, axis_name="seq", **how)

    found = quickly(partial(with_gradients, lambda arrays: shard(arrays, mask)))(arrays, cotangent)
    assert_close(found, defined(np.asarray(mask.dense(3, 32, offset=20)), cotangent, **arrays), TOLERANCE["float32"])


@every_mode
def test_half_precision_is_as_exact_as_on_one_device(mode: str) -> None:
    arrays, cotangent = arrays_of(3, 64, kv_heads=4, dtype=jnp.bfloat16)
    found = merged(arrays, cotangent, mode, mask=Causal(), offset=50)
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, defined(np.tri(3, 64, 50, dtype=bool), cotangent, **arrays), TOLERANCE["bfloat16"])


def test_nothing_to_attend_to_is_zero_and_nothing_is_sent() -> None:
    mesh = mesh_of("explicit", seq=4)
    query, key = put(mesh, jnp.ones((1, 3, 2, 8))), put(mesh, jnp.ones((1, 0, 2, 8)), None, "seq")
    program = jax.jit(jaxmask.attention).lower(query, key, key).compile()
    assert collectives(program) == []
    np.testing.assert_array_equal(program(query, key, key), 0)


@every_mode
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_the_compiled_program_receives_what_is_said(mode: str, implementation: Any) -> None:
    mesh = mesh_of(mode, seq=8)
    query, key = (
        jax.ShapeDtypeStruct((2, length, heads, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
        for length, heads, spec in ((4, 8, P()), (1024, 4, P(None, "seq")))
    )
    how: Any = {"mask": Causal(), "offset": 1000, "implementation": implementation}
    if mode == "told":
        how |= {"sharding": NamedSharding(mesh, P(None, "seq")), "context_parallel": "merge"}

    def with_gradients(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(partial(jaxmask.attention, **how), query, key, value)
        return out, pull(cotangent)

    outs = NamedSharding(mesh, P()), tuple(x.sharding for x in (query, key, key))
    said = jaxmask.explain(query, key, key, **how).context_parallel
    assert said is not None
    assert said.scheme == "merge"
    forward, backward = said.received["merge"]
    # An output of 16 and two numbers beside it, in float32, twice seven eighths of it.
    assert (forward, backward) == (2 * 7 * 64 * 18 * 4 // 8, 2 * 7 * 64 * 16 * 4 // 8)
    attend = quickly(partial(jaxmask.attention, **how), out_shardings=outs[0])
    for program, expected in (
        (attend.lower(query, key, key).compile(), forward),
        (quickly(with_gradients, out_shardings=outs).lower(query, key, key, query).compile(), forward + backward),
    ):
        assert set(collectives(program)) == {"all-reduce"}
        assert sum(received(program).values()) == expected


def test_a_plan_of_divided_keys_is_said_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    told = NamedSharding(mesh_of("told", seq=4), P(None, "seq"))
    query, key = (jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32) for length in (1, 1024))
    found = jaxmask.explain(query, key, key, SlidingWindow(100), offset=700, sharding=told, context_parallel="merge")
    assert "keys over 'seq' (4)" in str(found)
    assert "by 'merge', a device receives 216 bytes, and 192 more for gradients\n" in str(found)
    cost = found.context_parallel
    assert cost is not None
    # All of the window is on the third device.
    assert cost.imbalance == 4
    cost.show()
    assert "3 of 4 are EMPTY" in capsys.readouterr().out
