"""Attention to a sequence that is divided over devices is that of one device, and sends what the plan says."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import jaxmask
from jaxmask import (
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Padding,
    PerHead,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    spmd,
    zoo,
)
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.dropout import Dropout
from jaxmask.spmd.plan import plan_of
from tests.helpers import programs
from tests.helpers.programs import collectives, received
from tests.helpers.strategies import Described, described, problems
from tests.kernels.test_attention import (
    TOLERANCE,
    Arrays,
    Case,
    arrays_of,
    quickly,
    random,
    with_gradients,
)
from tests.oracles.attention import assert_close, defined

SHARDS, LENGTH = 4, 64
SCHEMES = "halo", "gather", "ulysses", "ring"
MODES = {"explicit": AxisType.Explicit, "told": AxisType.Auto}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)

RNG = np.random.default_rng(0)
VALID = RNG.random((2, LENGTH)) > 0.3
IDS = np.sort(RNG.integers(0, 5, (2, LENGTH)), 1)
# As many as there are ways to cut what is sent: a band before, on both sides, none, tiles here and there, all.
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "sliding": SlidingWindow(20),
    "window": Window(10, 5),
    "own": Causal() & Chunked(16),
    "sinks": SlidingWindow(9) | Causal() & Prefix(4),
    "documents": Causal() & Segments(IDS),
    "bounded": Causal() & Segments(jnp.asarray(IDS)) & SlidingWindow(30) & Padding(jnp.asarray(VALID)),
    "heads": PerHead([Causal(), SlidingWindow(3), Full(), Prefix(11)]) & Padding(jnp.asarray(VALID)),
    "dense": Dense(jnp.asarray(RNG.random((2, 1, LENGTH, LENGTH)) > 0.5)),
}


def mesh_of(mode: str, **axes: int) -> Any:
    return programs.mesh_of(MODES[mode], tuple(axes.values()), tuple(axes))


def put(mesh: Any, x: Any, *spec: Any) -> Any:
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def on_mesh(arrays: Arrays, cotangent: Any, mode: str, *, spec: P, axes: dict[str, int], **how: Any) -> Arrays:
    """Output and gradients; arrays beside query, key and value are on every device."""
    mesh = mesh_of(mode, **axes)
    divided = {name: put(mesh, x, *spec) for name, x in arrays.items() if name in ("query", "key", "value")}
    whole = {name: put(mesh, x) for name, x in arrays.items() if name not in divided}
    sharding = NamedSharding(mesh, spec) if mode == "told" else None

    @quickly
    def run(arrays: Arrays, cotangent: Any) -> Arrays:
        return with_gradients(lambda arrays: jaxmask.attention(**arrays, sharding=sharding, **how), arrays, cotangent)

    return run({**divided, **whole}, put(mesh, cotangent, *spec))


@pytest.mark.parametrize(
    ("name", "scheme"),
    # Gathered keys and whole heads are the same call for every mask, and a ring is for every mask that skips as much.
    [
        *((name, "halo") for name in MASKS),
        *((name, "ring") for name in ("window", "sinks", "bounded", "heads")),
        ("heads", "gather"),
        ("heads", "ulysses"),
    ],
)
def test_a_divided_sequence_is_that_of_one_device(name: str, scheme: Any) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, kv_heads=2)
    # Every other mask by types, the others by what is told.
    mode = list(MODES)[(list(MASKS).index(name) + SCHEMES.index(scheme)) % 2]
    found = on_mesh(
        arrays,
        cotangent,
        mode,
        spec=P(None, "seq"),
        axes={"seq": SHARDS},
        mask=MASKS[name],
        context_parallel=scheme,
    )
    allowed = np.asarray(MASKS[name].dense(LENGTH, LENGTH))
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


ZOO: dict[str, Mask] = {
    "streaming-llm": zoo.streaming_llm(4, 9),
    "prefix-lm": zoo.prefix_lm(11),
    "dilated": zoo.dilated_sliding_window(4, 2) & Causal(),
    "longformer": zoo.longformer(16, np.arange(LENGTH)[None] % 31 == 0),
    "bigbird": zoo.bigbird(zoo.bigbird_random_blocks(0, 4, 8, 1), 8),
    "natten": zoo.natten((8, 8), (3, 3)),
    "sta": zoo.sta((4, 4, 4), (2, 2, 2), (2, 2, 2)),
    "ordered-groups": zoo.ordered_groups(IDS),
    "shared-prefix": zoo.shared_prefix(IDS, np.arange(10).reshape(2, 5) % 2),
    "gemma3": zoo.gemma3(np.where(IDS % 2, IDS, -1), 20),
    "svg": zoo.svg_temporal_head(4, 4, 15, 2),
    "block-diffusion": zoo.block_diffusion(LENGTH // 2, 8),
}


@pytest.mark.parametrize("name", ZOO)
def test_masks_of_the_literature_are_those_of_one_device(name: str) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, kv_heads=2)
    index, mask = list(ZOO).index(name), ZOO[name]
    scheme, mode = ("halo", "ring", None)[index % 3], list(MODES)[index % 2]
    found = on_mesh(
        arrays, cotangent, mode, spec=P(None, "seq"), axes={"seq": SHARDS}, mask=mask, context_parallel=scheme
    )
    assert_close(found, defined(np.asarray(mask.dense(LENGTH, LENGTH)), cotangent, **arrays), TOLERANCE["float32"])


@given(st.sampled_from(list(ZOO)), st.sampled_from([2, 4, 8]))
def test_a_plan_misses_no_pair_of_a_mask_of_the_literature(name: str, shards: int) -> None:
    query = jax.ShapeDtypeStruct((2, LENGTH, 4, 8), jnp.float32)
    plan = plan_of(checked_call(query, query, query, ZOO[name]), shards)
    allowed = np.asarray(ZOO[name].dense(LENGTH, LENGTH)).any((0, 1))
    needed = np.repeat(np.repeat(plan.needed.reshape(shards, -1), plan.tile, 1), LENGTH // shards, 0)
    assert not (allowed & ~needed).any()


@st.composite
def cases(draw: st.DrawFn, lengths: list[tuple[int, int]]) -> Case:
    """Any mask, at any positions of so many queries and 40 keys."""
    problem = draw(problems(lengths, heads=4))
    drawn: Described = draw(described(problem, depth=3))
    arrays, cotangent = arrays_of(
        *problem.lengths, kv_heads=draw(st.sampled_from([1, 2, 4])), seed=draw(st.integers(0, 9))
    )
    bias = draw(st.sampled_from([None, (4, 1, 40), (2, 1, problem.query_length, 40)]))
    if bias is not None:
        arrays["bias"] = random(4, *bias)
    return Case(problem, drawn, arrays, cotangent, draw(st.sampled_from([None, 2.0])))


@settings(max_examples=12)
@given(
    cases([(40, 40), (8, 40)]),
    st.sampled_from([None, *SCHEMES]),
    st.sampled_from(list(MODES)),
    st.sampled_from(["seq", "both"]),
)
def test_any_mask_by_any_scheme_is_what_it_is_on_one_device(case: Case, scheme: Any, mode: str, axes: str) -> None:
    if mode == "told" and case.problem.query_length != case.problem.key_length:
        scheme = None  # the keys are whole then
    if scheme == "ulysses" and "bias" in case.arrays and case.arrays["bias"].ndim == 4:
        scheme = None
    sizes, spec = {"seq": ({"seq": 4}, P(None, "seq")), "both": ({"data": 2, "seq": 4}, P("data", "seq"))}[axes]
    found = on_mesh(
        case.arrays,
        case.cotangent,
        mode,
        spec=spec,
        axes=sizes,
        mask=case.drawn.mask,
        logits_soft_cap=case.logits_soft_cap,
        context_parallel=scheme,
        **case.problem.where,
    )
    assert_close(found, case.expected(), TOLERANCE["float32"])


@every_scheme
def test_bias_sinks_dropout_and_the_log_sum_exp_are_those_of_the_whole(scheme: Any) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, heads=8, kv_heads=4)
    arrays |= {"sinks": random(8, 8), "slopes": random(7, 8)}
    rng, mask = jax.random.key(3), SlidingWindow(20)
    mesh, spec = mesh_of("explicit", data=2, seq=2, model=2), P("data", "seq", "model")

    def by_slopes(slopes: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return slopes[h] * (kv - q) * (b + 1) + kv / 9

    def attend(arrays: Arrays) -> Any:
        arrays = dict(arrays)
        bias = Partial(by_slopes, arrays.pop("slopes"))
        return jaxmask.attention(
            **arrays,
            mask=mask,
            bias=bias,
            dropout_rate=0.3,
            dropout_rng=rng,
            logits_soft_cap=3.0,
            return_residual=True,
            context_parallel=scheme,
        )

    @quickly
    def run(arrays: Arrays, cotangent: Any, lse_cotangent: Any) -> Arrays:
        (out, lse), pull = jax.vjp(attend, arrays)
        return {"out": out, "lse": lse, **pull((cotangent, lse_cotangent))[0]}

    lse_cotangent = random(11, 2, LENGTH, 8)
    places = {"sinks": P("model"), "slopes": P()}
    placed = {name: put(mesh, x, *places.get(name, spec)) for name, x in arrays.items()}
    found = run(placed, put(mesh, cotangent, *spec), put(mesh, lse_cotangent, *spec))
    slopes = arrays.pop("slopes")
    factor = Dropout(jax.random.bits(rng, (2,), jnp.uint32), 0.3, False).factor(
        jnp.float32, *np.ix_(*map(np.arange, (2, 8, LENGTH, LENGTH)))
    )
    distance = (np.arange(LENGTH) - np.arange(LENGTH)[:, None]) * np.array([1, 2])[:, None, None, None]
    expected, scales = defined(
        np.asarray(mask.dense(LENGTH, LENGTH)),
        cotangent,
        **arrays,
        bias=np.asarray(slopes)[:, None, None] * distance + np.arange(LENGTH) / 9,
        dropout=np.asarray(factor),
        logits_soft_cap=3.0,
        lse_cotangent=lse_cotangent,
    )
    dbias = expected.pop("bias")
    expected["slopes"] = (dbias * distance).sum((0, 2, 3))
    scales["slopes"] = float(np.abs(dbias * distance).sum((0, 2, 3)).max())
    assert_close(found, (expected, scales), 5 * TOLERANCE["float32"])


@every_scheme
def test_half_precision_is_as_exact_as_on_one_device(scheme: Any) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, kv_heads=4, dtype=jnp.bfloat16)
    found = on_mesh(
        arrays, cotangent, "explicit", spec=P(None, "seq"), axes={"seq": SHARDS}, mask=Causal(), context_parallel=scheme
    )
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}
    allowed = np.tri(LENGTH, dtype=bool)
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("scheme", "checks"), [("halo", False), ("gather", True), ("ulysses", False), ("ring", True), ("ring", False)]
)
def test_inside_of_a_shard_map_the_mask_is_of_the_whole(scheme: Any, checks: bool) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, kv_heads=4)
    mode = "explicit" if scheme == "gather" else "told"
    mesh, spec, mask = mesh_of(mode, data=2, seq=SHARDS), P("data", "seq"), MASKS["bounded"]
    arrays = {name: put(mesh, x, *spec) for name, x in arrays.items()}

    @partial(jax.shard_map, mesh=mesh, in_specs=(spec, P("data")), out_specs=spec, check_vma=checks)
    def shard(arrays: Arrays, mask: Mask) -> Any:
        return jaxmask.attention(**arrays, mask=mask, axis_name="seq", context_parallel=scheme)

    placed = jax.tree.map(lambda x: put(mesh, x, *(("data",) if np.ndim(x) else ())), mask)
    run = quickly(lambda arrays, mask, cotangent: with_gradients(lambda arrays: shard(arrays, mask), arrays, cotangent))
    found = run(arrays, placed, put(mesh, cotangent, *spec))
    expected = defined(np.asarray(mask.dense(LENGTH, LENGTH)), cotangent, **arrays)
    assert_close(found, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["sliding", "sinks"])
def test_the_kernel_for_gpu_takes_keys_that_were_sent(name: str) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, kv_heads=2, dim=16, dim_v=16)
    found = on_mesh(
        arrays,
        cotangent,
        "told",
        spec=P(None, "seq"),
        axes={"seq": SHARDS},
        mask=MASKS[name],
        context_parallel="halo",
        implementation="pallas",
    )
    allowed = np.asarray(MASKS[name].dense(LENGTH, LENGTH))
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


@pytest.mark.parametrize("mode", MODES)
def test_queries_alone_are_divided_without_communication(mode: str) -> None:
    arrays, cotangent = arrays_of(16, 40, kv_heads=2)
    mesh, mask = mesh_of(mode, seq=SHARDS), Causal()
    sharding = NamedSharding(mesh, P(None, "seq")) if mode == "told" else None
    placed = {name: put(mesh, x, *((None, "seq") if name == "query" else ())) for name, x in arrays.items()}

    @quickly
    def run(arrays: Arrays) -> Any:
        return jaxmask.attention(**arrays, mask=mask, offset=24, sharding=sharding)

    program = run.lower(placed).compile()
    assert collectives(program) == []
    expected, scales = defined(np.tri(16, 40, 24, dtype=bool), cotangent, **arrays)
    assert_close({"out": program(placed)}, (expected, scales), TOLERANCE["float32"])


# What is sent.


def shapes(length: int, *, batch: int = 2, heads: int = 8, kv_heads: int = 4) -> Any:
    # A CPU sends half precision as float32.
    query = jax.ShapeDtypeStruct((batch, length, heads, 16), jnp.float32)
    return query, jax.ShapeDtypeStruct((batch, length, kv_heads, 16), jnp.float32)


def planned(mask: Mask, length: int, shards: int, **how: Any) -> spmd.Plan:
    query, key = shapes(length)
    return plan_of(checked_call(query, key, key, mask, **how), shards)


@pytest.mark.parametrize(
    ("name", "scheme", "has_gradients"),
    [
        *((name, scheme, True) for name in ("window", "sinks") for scheme in ("halo", "gather", "ulysses")),
        ("sinks", "ring", True),
        # Without a loop, a CPU keeps what came around for the backward pass, for it takes no barrier.
        ("window", "ring", False),
    ],
)
def test_the_compiled_program_receives_what_the_plan_says(name: str, scheme: Any, has_gradients: bool) -> None:
    mesh, (query, key), mask = mesh_of("told", seq=8), shapes(1024), MASKS[name]
    sharding = NamedSharding(mesh, P(None, "seq"))
    attend = partial(jaxmask.attention, mask=mask, sharding=sharding, context_parallel=scheme)

    def with_gradients(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(cotangent)

    told = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in (query, key, key, query)]
    run, arguments = (with_gradients, told) if has_gradients else (attend, told[:3])
    program = quickly(run, out_shardings=sharding).lower(*arguments).compile()
    local, keys = shapes(1024 // 8)
    traffic = planned(mask, 1024, 8).received(local, keys, keys, divides_heads=True)[scheme]
    assert sum(received(program).values()) == (sum(traffic) if has_gradients else traffic.forward)


@given(st.sampled_from(list(MASKS)), st.sampled_from([2, 4, 8]))
def test_a_halo_receives_no_more_than_what_is_gathered(name: str, shards: int) -> None:
    query, key = (jax.ShapeDtypeStruct((2, LENGTH, heads, 16), jnp.float32) for heads in (4, 2))
    plan = plan_of(checked_call(query, key, key, MASKS[name]), shards)
    local, keys = shapes(LENGTH // shards)
    traffic = plan.received(local, keys, keys, divides_heads=False)
    assert traffic["halo"] <= traffic["gather"]
    assert traffic["halo"] <= traffic["ring"]


@given(st.data(), st.sampled_from([2, 4]))
def test_every_pair_that_may_attend_is_in_a_tile_that_is_needed(data: st.DataObject, shards: int) -> None:
    problem = data.draw(problems([(16, 16), (8, 16)]))
    drawn: Described = data.draw(described(problem, depth=3))
    arrays, _ = arrays_of(*problem.lengths, heads=3, kv_heads=3)
    plan = plan_of(checked_call(**arrays, mask=drawn.mask, **problem.where), shards)
    allowed = problem.expected(drawn.oracle).any((0, 1))
    needed = np.repeat(np.repeat(plan.needed.reshape(shards, -1), plan.tile, 1), problem.query_length // shards, 0)
    assert not (allowed & ~needed).any()


@pytest.mark.parametrize("length", [2**14, 2**17, 2**20])
def test_a_window_receives_as_much_whatever_the_length(length: int) -> None:
    plan = planned(SlidingWindow(1000), length, 8)
    assert plan.fetched == 1024
    assert plan.band == (1024, 0)


def test_what_is_static_bounds_what_is_traced() -> None:
    ids = jnp.zeros((2, 4096), int)
    assert planned(Causal() & Segments(ids), 4096, 8).fetched == 7 * 512
    assert planned(Causal() & Segments(ids) & SlidingWindow(300), 4096, 8).fetched == 320


def test_the_work_is_as_even_as_the_mask_is() -> None:
    assert planned(Full(), 4096, 8).imbalance == 1
    assert planned(Causal(), 4096, 8).imbalance == pytest.approx(15 / 8, rel=0.02)


def test_what_sends_least_is_chosen() -> None:
    def chosen(mask: Mask, **how: int) -> str | None:
        local, keys = shapes(128, **how)
        call = checked_call(local, keys, keys, Full())
        return spmd.Sequence(("seq",), planned(mask, 1024, 8), None).scheme(call)

    assert chosen(SlidingWindow(100)) == "halo"
    assert chosen(Causal()) == "ulysses"
    assert chosen(Causal(), heads=4) == "gather"


def test_tiles_are_static_on_every_device_where_a_mask_is_of_differences() -> None:
    mesh, (query, key) = mesh_of("told", seq=8), shapes(4096)
    told = NamedSharding(mesh, P(None, "seq"))
    call, placement, sequence = spmd.placed(checked_call(query, key, key, SlidingWindow(100)), told)
    assert placement is not None

    def known(part: Any, _: Any) -> Any:
        return part.mask.masks[0], part.positions.first

    assert spmd.ask_shard(call, placement, sequence, known) == (SlidingWindow(100), 128)


# What is said.


def test_explain_says_what_a_device_receives_and_computes() -> None:
    told = NamedSharding(mesh_of("told", seq=8), P(None, "seq"))
    query, key = shapes(4096)
    found = jaxmask.explain(query, key, key, SlidingWindow(100), sharding=told)
    cost = found.context_parallel
    assert cost is not None
    # Keys and values of two examples, four heads and a dim of 16, in float32.
    assert (cost.scheme, cost.received["halo"]) == ("halo", (128 * 2 * 4 * 2 * 16 * 4,) * 2)
    # Four heads of keys are sent to eight devices, each to two.
    assert set(cost.received) == set(SCHEMES)
    assert "sequence over 'seq' (8)" in str(found)
    assert "by 'halo', a device receives 131,072 bytes, and 131,072 more for gradients" in str(found)
    assert "JAX arrays" not in str(found)


def test_explain_says_what_bounds_a_plan() -> None:
    told = NamedSharding(mesh_of("told", seq=8), P(None, "seq"))
    query, key = shapes(1024)
    for ids, is_told in ((jnp.zeros((2, 1024), int), True), (np.zeros((2, 1024), int), False)):
        found = jaxmask.explain(query, key, key, Causal() & Segments(ids), sharding=told)
        assert ("& SlidingWindow(longest)" in str(found)) == is_told


def test_explain_inside_of_a_shard_map_is_that_of_whole_arrays() -> None:
    said: list[Any] = []
    mesh = mesh_of("told", seq=8)

    @partial(jax.shard_map, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
    def shard(x: Any) -> Any:
        said.append(jaxmask.explain(x, x, x, SlidingWindow(100), axis_name="seq"))
        return x

    x = jnp.zeros((1, 4096, 2, 16))
    jax.eval_shape(shard, x)
    told = jaxmask.explain(x, x, x, SlidingWindow(100), sharding=NamedSharding(mesh, P(None, "seq")))
    assert said[0].context_parallel.received == told.context_parallel.received  # pyright: ignore[reportOptionalMemberAccess]
    assert (said[0].flops, said[0].sparsity) == (told.flops, told.sparsity)


def test_a_plan_is_drawn_by_shards(capsys: pytest.CaptureFixture[str]) -> None:
    told = NamedSharding(mesh_of("told", seq=4), P(None, "seq"))
    x = shapes(1024)[1]
    cost = jaxmask.explain(x, x, x, Causal(), sharding=told).context_parallel
    assert cost is not None
    cost.show()
    assert "6 of 16 are EMPTY" in capsys.readouterr().out
