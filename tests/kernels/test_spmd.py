"""Attention whose batch and heads are sharded is that of one device, and sends nothing."""

from collections.abc import Callable
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
from jaxmask import Causal, Dense, Full, Mask, Padding, PerHead, Predicate, Prefix, Segments, SlidingWindow, spmd
from jaxmask.indices import lookup
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.dropout import Dropout
from jaxmask.mask import And
from tests.helpers.bad import bad, refusals
from tests.helpers.programs import collectives, mesh_of
from tests.kernels.test_attention import (
    BATCH,
    HEADS,
    TOLERANCE,
    Arrays,
    Case,
    arrays_of,
    attentions,
    quickly,
    random,
    with_gradients,
)
from tests.oracles.attention import assert_close, defined

# More than are too few for tiles.
LENGTH = 136
SPEC = P("data", None, "model", None)
RNG = np.random.default_rng(0)

VALID = RNG.random((4, LENGTH)) > 0.3
IDS = np.sort(RNG.integers(0, 5, (4, LENGTH)), 1)
TABLE = jnp.asarray(RNG.random(4) > 0.5)


def of_example_and_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (kv + b + 2 * h) % 3 != 0


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "padding": Causal() & Padding(jnp.asarray(VALID)),
    "documents": Causal() & Segments(jnp.asarray(IDS), consecutive=True),
    "either": SlidingWindow(8) | ~Segments(jnp.asarray(IDS)),
    "prefix": Causal() | Prefix(jnp.arange(4) * 20),
    "dense": Dense(jnp.asarray(RNG.random((4, 4, LENGTH, LENGTH)) > 0.5)),
    "heads": PerHead([Causal(), SlidingWindow(3), Full(), Prefix(11)]) & Padding(jnp.asarray(VALID)),
    "predicate": Predicate(of_example_and_head, batch=4, heads=4),
}
# How a program is told where the arrays are.
MODES = {"explicit": AxisType.Explicit, "told": AxisType.Auto, "left to XLA": AxisType.Auto}


def put(mesh: Any, x: Any, *spec: Any) -> Any:
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def put_mask(mesh: Any, mask: Mask) -> Mask:
    """Arrays with an element for each example are where the examples are."""
    return jax.tree.map(lambda x: put(mesh, x, *(("data",) if np.shape(x)[:1] == (4,) else ())), mask)


def put_all(mesh: Any, arrays: Arrays) -> Arrays:
    return {name: put(mesh, x, *SPEC) for name, x in arrays.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MASKS)
def test_batch_and_heads_stay_where_they_are(name: str, mode: str) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, batch=4)
    mesh, mask = mesh_of(MODES[mode]), MASKS[name]
    sharding = NamedSharding(mesh, SPEC) if mode == "told" else None

    @quickly
    def run(arrays: Arrays, cotangent: Any, mask: Mask) -> Arrays:
        return with_gradients(
            lambda arrays: jaxmask.attention(**arrays, mask=mask, sharding=sharding), arrays, cotangent
        )

    arguments = put_all(mesh, arrays), put(mesh, cotangent, *SPEC), put_mask(mesh, mask)
    program = run.lower(*arguments).compile()
    assert collectives(program) == []
    assert_close(program(*arguments), defined(np.asarray(mask.dense(LENGTH, LENGTH)), cotangent, **arrays), 4e-6)


@settings(max_examples=8)
@given(attentions((jnp.float32,)), st.sampled_from(["explicit", "told"]), st.sampled_from(["xla", "blocked"]))
def test_any_mask_on_a_mesh_is_what_it_is_on_one_device(case: Case, mode: str, implementation: Any) -> None:
    mesh = mesh_of(MODES[mode])
    sharding = NamedSharding(mesh, SPEC) if mode == "told" else None

    def attend(**arrays: Any) -> Any:
        return jaxmask.attention(**arrays, sharding=sharding, implementation=implementation)

    # The same keys on every device, where their heads do not divide.
    kv_heads = case.arrays["key"].shape[2]
    specs = {"query": SPEC, "key": SPEC if kv_heads > 1 else P("data"), "value": SPEC if kv_heads > 1 else P("data")}
    arrays = {name: put(mesh, x, *specs.get(name, P())) for name, x in case.arrays.items()}
    sharded = Case(case.problem, case.drawn, arrays, put(mesh, case.cotangent, *SPEC), case.logits_soft_cap)
    with jax.set_mesh(mesh):
        found = quickly(lambda: sharded.found(attend))()
    assert_close(found, case.expected(), TOLERANCE["float32"])


def on_mesh(attend: Callable[..., Any], arrays: Arrays, cotangent: Any, *, shape: tuple[int, int] = (2, 2)) -> Any:
    """Output and gradients on an explicit mesh; arrays that are not of SPEC are on every device."""
    mesh = mesh_of(AxisType.Explicit, shape)
    kv_spec = SPEC if arrays["key"].shape[2] % shape[1] == 0 else P("data")
    specs = {"query": SPEC, "key": kv_spec, "value": kv_spec}
    arrays = {name: put(mesh, x, *specs.get(name, P())) for name, x in arrays.items()}
    return quickly(with_gradients, static_argnums=0)(
        lambda arrays: attend(**arrays), arrays, put(mesh, cotangent, *SPEC)
    )


@pytest.mark.parametrize(("heads", "kv_heads", "shards"), [(4, 1, 4), (8, 2, 4), (6, 3, 2)])
def test_devices_take_the_heads_of_keys_that_their_heads_need(heads: int, kv_heads: int, shards: int) -> None:
    arrays, cotangent = arrays_of(24, 24, heads=heads, kv_heads=kv_heads)
    attend = partial(jaxmask.attention, mask=Causal())
    found = on_mesh(attend, arrays, cotangent, shape=(2, shards))
    assert_close(found, defined(np.tri(24, dtype=bool), cotangent, **arrays), TOLERANCE["float32"])


def test_a_bias_gets_the_heads_of_the_whole_and_its_arrays_their_gradients() -> None:
    arrays, cotangent = arrays_of(24, 24)
    slopes = random(7, HEADS)

    def by_slopes(slopes: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return slopes[h] * (kv - q) * (b + 1)

    def attend(slopes: Any, **arrays: Any) -> Any:
        return jaxmask.attention(**arrays, mask=Causal(), bias=Partial(by_slopes, slopes))

    found = on_mesh(attend, {**arrays, "slopes": slopes}, cotangent)
    distance = np.arange(24) - np.arange(24)[:, None]
    of_heads = distance * (np.arange(BATCH) + 1)[:, None, None, None]
    expected, scales = defined(
        np.tri(24, dtype=bool), cotangent, **arrays, bias=np.asarray(slopes)[:, None, None] * of_heads
    )
    expected["slopes"] = (expected.pop("bias") * of_heads).sum((0, 2, 3))
    scales["slopes"] = scales.pop("bias") * float(np.abs(of_heads).sum())
    assert_close(found, (expected, scales), TOLERANCE["float32"])


def test_dropout_drops_the_same_pairs_as_on_one_device() -> None:
    arrays, cotangent = arrays_of(24, 24)
    rng = jax.random.key(3)
    found = on_mesh(partial(jaxmask.attention, dropout_rate=0.4, dropout_rng=rng), arrays, cotangent)
    indices = np.ix_(*map(np.arange, (BATCH, HEADS, 24, 24)))
    factor = Dropout(jax.random.bits(rng, (2,), jnp.uint32), 0.4, False).factor(jnp.float32, *indices)
    assert_close(
        found, defined(np.ones((1, 1), bool), cotangent, **arrays, dropout=np.asarray(factor)), TOLERANCE["float32"]
    )


def test_sinks_and_the_log_sum_exp_go_with_their_heads() -> None:
    arrays, cotangent = arrays_of(24, 24)
    arrays["sinks"] = random(8, HEADS)

    def attend(**arrays: Any) -> Any:
        return jaxmask.attention(**arrays, mask=SlidingWindow(5), return_residual=True)

    mesh = mesh_of(AxisType.Explicit)
    placed = {name: put(mesh, x, *(P("model") if name == "sinks" else SPEC)) for name, x in arrays.items()}
    out, lse = jax.jit(lambda arrays: attend(**arrays))(placed)
    expected = defined(np.asarray(SlidingWindow(5).dense(24, 24)), cotangent, **arrays)
    assert_close({"out": out, "lse": lse}, expected, TOLERANCE["float32"])
    assert jax.typeof(lse).sharding.spec == P("data", None, "model")


@pytest.mark.parametrize("where", ["offset", "query_positions"])
def test_positions_of_each_example_go_with_it(where: str) -> None:
    arrays, cotangent = arrays_of(8, 24)
    first = np.array([16, 3])
    given = {"offset": jnp.asarray(first), "query_positions": jnp.asarray(first[:, None] + np.arange(8))}[where]
    found = on_mesh(partial(jaxmask.attention, mask=Causal(), **{where: given}), arrays, cotangent)
    allowed = np.arange(24) <= first[:, None, None, None] + np.arange(8)[:, None]
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


def test_a_call_outside_of_jit_follows_its_arrays() -> None:
    arrays, _ = arrays_of(LENGTH, LENGTH)
    mesh = mesh_of(AxisType.Explicit)
    out = jaxmask.attention(**put_all(mesh, arrays), mask=Causal())
    assert jax.typeof(out).sharding.spec == SPEC
    np.testing.assert_allclose(out, jaxmask.attention(**arrays, mask=Causal()), rtol=1e-5, atol=1e-6)


def test_the_mesh_of_the_context_serves_a_spec() -> None:
    arrays, _ = arrays_of(LENGTH, LENGTH)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda arrays: jaxmask.attention(**arrays, mask=Causal(), sharding=SPEC))(put_all(mesh, arrays))
    assert out.sharding.spec == SPEC
    np.testing.assert_allclose(out, jaxmask.attention(**arrays, mask=Causal()), rtol=1e-5, atol=1e-6)


# What is chosen.

WHOLE = jax.ShapeDtypeStruct((4, 512, 4, 64), jnp.bfloat16)


def test_explain_says_what_each_device_takes() -> None:
    told = jaxmask.explain(WHOLE, WHOLE, WHOLE, Causal(), sharding=NamedSharding(mesh_of(AxisType.Auto), SPEC))
    assert told.implementation == "blocked"
    assert "batch over 'data' (2), heads over 'model' (2): queries and outputs stay" in str(told)


def test_explain_says_what_is_left_to_xla() -> None:
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        left = jaxmask.explain(WHOLE, WHOLE, WHOLE, Causal() & Padding(jnp.ones((4, 512), bool)))
    assert left.implementation == "blocked"
    assert "XLA can divide" in str(left)
    assert "sharding=" in str(left)


def test_one_device_is_told_by_an_empty_spec() -> None:
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        alone = jaxmask.explain(WHOLE, WHOLE, WHOLE, Causal(), sharding=P())
    assert "XLA" not in str(alone)


# Bad input.

X = jnp.zeros((4, 8, 4, 16))
MESH = mesh_of(AxisType.Auto)


def attend(query: Any = X, key: Any = X, value: Any = X, **how: Any) -> Any:
    return jaxmask.attention(query, key, value, Causal(), **how)


def explicitly(query: P, key: P, **how: Any) -> Any:
    mesh = mesh_of(AxisType.Explicit)
    return attend(put(mesh, X, *query), put(mesh, X, *key), put(mesh, X, *key), **how)


def closing_over(what: str) -> Any:
    """On an explicit mesh, a function that closes over an array there."""
    mesh = mesh_of(AxisType.Explicit)
    table, x = put(mesh, jnp.ones(4)), put(mesh, X, *SPEC)
    if what == "bias":
        return jaxmask.attention(x, x, x, Causal(), bias=lambda b, h, q, kv: table[h] * q)
    return jaxmask.attention(x, x, x, Predicate(lambda b, h, q, kv: table[h] > kv, heads=4))


def on(*spec: Any) -> NamedSharding:
    return NamedSharding(MESH, P(*spec))


SHARDED = on(*SPEC)
BAD = [
    bad("no-spec", lambda: attend(sharding="data"), TypeError, "PartitionSpec", "'data'"),
    bad("a-tuple", lambda: attend(sharding=("data",)), TypeError, "PartitionSpec", r"\('data',\)"),
    bad("no-mesh", lambda: attend(sharding=P("data")), ValueError, "no mesh", r"set_mesh"),
    bad("dim", lambda: attend(sharding=on(None, None, None, "model")), ValueError, "divides dim", "batch, seq"),
    bad("rank", lambda: attend(sharding=P(None, None, None, None, "x")), ValueError, r"\[batch, q, heads, dim\]"),
    bad("batch", lambda: attend(X[:3], X[:3], X[:3], sharding=on("data")), ValueError, "batch into 2", "query has 3"),
    bad("heads", lambda: attend(X[:, :, :1], X[:, :, :1], X[:, :, :1], sharding=SHARDED), ValueError, "heads into 2"),
    bad("unconstrained", lambda: attend(sharding=on(P.UNCONSTRAINED)), ValueError, "must say"),
    bad("explained", lambda: jaxmask.explain(X, X, X, sharding=on(*[None] * 3, "data")), ValueError, "divides dim"),
    bad(
        "explicit-dim",
        lambda: explicitly(P(*[None] * 3, "data"), P()),
        ValueError,
        "type of query divides dim",
        "reshard",
    ),
    bad("closed-bias", lambda: closing_over("bias"), ValueError, "bias closes over float32", "Partial"),
    bad("closed-mask", lambda: closing_over("mask"), ValueError, "mask or the bias closes over float32", "Partial"),
    bad("keys-elsewhere", lambda: explicitly(P("data"), P("model")), ValueError, "key is sharded", "agree", "reshard"),
    bad(
        "told-otherwise",
        lambda: explicitly(P("data"), P("data"), sharding=P("model")),
        ValueError,
        "leave sharding out",
    ),
]


def test_an_unknown_axis_is_named() -> None:
    with jax.set_mesh(MESH), pytest.raises(ValueError, match=r"names \['batch'\].*\['data', 'model'\]"):
        attend(sharding=P("batch"))


test_bad_sharding_is_refused = refusals(BAD)


@pytest.mark.parametrize("checks", [False, True])
def test_a_kernel_of_others_says_what_it_needs_of_a_shard_map(checks: bool) -> None:
    said: list[str] = []

    @partial(jax.shard_map, mesh=MESH, in_specs=P("data"), out_specs=P("data"), check_vma=checks)
    def shard(x: Any) -> Any:
        said.append(str(jaxmask.explain(x, x, x, Causal())))
        return x

    jax.eval_shape(shard, jnp.zeros((4, 256, 2, 64)))
    assert ("not splash: it is made for TPU; inside of a shard_map it needs check_vma=False" in said[0]) == checks


def test_a_shard_of_a_mask_that_kernels_know_is_one_that_they_know() -> None:
    mask = SlidingWindow(64) & Prefix(jnp.array([100, 200, 300, 400])) & Segments(jnp.zeros((4, 512), int))
    placed, placement, _ = spmd.placed(checked_call(WHOLE, WHOLE, WHOLE, mask), NamedSharding(MESH, SPEC))
    assert placement is not None
    kinds = spmd.ask_shard(placed, placement, None, lambda part, _: [type(each) for each in part.mask.parts()])
    assert kinds == [And, SlidingWindow, Prefix, Segments]


def test_masks_of_heads_stay_as_they_are_where_heads_are_whole() -> None:
    mask = PerHead([Causal(), Full(), Full(), Full()])
    placed, placement, _ = spmd.placed(checked_call(WHOLE, WHOLE, WHOLE, mask), NamedSharding(MESH, P("data")))
    assert placement is not None
    assert isinstance(spmd.ask_shard(placed, placement, None, lambda part, _: part.mask), PerHead)


def test_functions_may_close_over_what_is_traced_where_axes_are_automatic() -> None:
    arrays, _ = arrays_of(24, 24)
    slopes, allowed = random(7, HEADS), random(9, 24) > 0

    def attend(arrays: Arrays, slopes: Any, allowed: Any, sharding: Any) -> Any:
        mask = Predicate(lambda b, h, q, kv: allowed[kv] | (kv == q))
        return jaxmask.attention(**arrays, mask=mask, bias=lambda b, h, q, kv: slopes[h] * kv, sharding=sharding)

    run = jax.jit(attend, static_argnums=3)
    found = run(put_all(MESH, arrays), slopes, allowed, NamedSharding(MESH, SPEC))
    np.testing.assert_allclose(found, run(arrays, slopes, allowed, P()), rtol=1e-5, atol=1e-5)


class UpToTheMean(Mask):
    """A mask that reads an array by its index, and all of it, too."""

    last: Any

    @property
    def shape(self) -> Any:
        return len(self.last), 1, 1

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= (lookup(self.last, b=b) + jnp.asarray(self.last).max()) // 2


class UpToTheFirst(Mask):
    """A mask that looks up its array by two indices."""

    last: Any

    @property
    def shape(self) -> Any:
        return len(self.last), 1, 1

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= jnp.minimum(lookup(self.last, b=b * 0), lookup(self.last, b=b))


@pytest.mark.parametrize("kind", [UpToTheMean, UpToTheFirst])
def test_a_mask_that_reads_an_array_in_two_ways_is_that_of_the_whole(kind: Any) -> None:
    arrays, cotangent = arrays_of(24, 24, batch=4)
    mask = kind(jnp.array([5, 9, 2, 20]))
    found = on_mesh(partial(jaxmask.attention, mask=mask), arrays, cotangent)
    assert_close(found, defined(np.asarray(mask.dense(24, 24)), cotangent, **arrays), TOLERANCE["float32"])


def test_vmap_over_an_axis_that_is_sharded() -> None:
    mesh, x = mesh_of(AxisType.Explicit), random(0, 4, 2, 24, 4, 8)
    found = jax.vmap(lambda x: jaxmask.attention(x, x, x, Causal()))(put(mesh, x, "data", None, None, "model"))
    expected = jax.vmap(lambda x: jaxmask.attention(x, x, x, Causal()))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_tracer_leaks_from_a_sharded_call() -> None:
    arrays, _ = arrays_of(24, 24, batch=4)
    mask = Causal() & Padding(jnp.asarray(VALID[:, :24]))
    with jax.checking_leaks():
        jax.jit(lambda arrays: jaxmask.attention(**arrays, mask=mask))(put_all(mesh_of(AxisType.Explicit), arrays))
