"""Attention is what its definition says, by every implementation: output, gradients, dtypes, biases, sinks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmask
from jaxmask import (
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    explanation,
)
from jaxmask.kernels import blocked, fused, pallas_gpu
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.pallas_gpu import Block, Blocks
from tests.helpers.strategies import Described, Problem, described, problems
from tests.oracles.attention import assert_close, defined

Arrays = dict[str, Any]
Attend = Callable[..., Any]

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, DIM_V = 2, 4, 2, 19, 40, 8, 6
OFFSET = KEYS - QUERIES
# Several tiles of queries and ranges of keys, and the last of each is ragged.
BLOCK = (8, 16)

by_blocks = partial(blocked.attention, block=BLOCK)
by_xla = partial(jaxmask.attention, implementation="xla")
OURS: dict[str, Attend] = {"blocked": by_blocks, "xla": by_xla}
ours = pytest.mark.parametrize("attend", OURS.values(), ids=OURS)


def by_pallas(query: Any, key: Any, value: Any, mask: Mask | None = None, **arguments: Any) -> Any:
    """By the kernel for GPU, interpreted, with several tiles of queries and of keys, the last of each ragged."""
    call, tile = checked_call(query, key, value, mask, **arguments), Block(16, 16)
    assert pallas_gpu.lacks(call) == []
    return pallas_gpu.attend(call, Blocks(tile, tile, tile))


# Interpreted, the kernel for GPU takes long to compile: it has tests of its own in test_pallas.py, and a few of these.
ours_and_pallas = pytest.mark.parametrize("attend", [*OURS.values(), by_pallas], ids=[*OURS, "pallas"])

# What rounding may add up to, relative to the scale of each array.
TOLERANCE = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}

VALID = np.arange(KEYS) >= np.array([[0], [7]])
DOCUMENTS = np.arange(KEYS) // np.array([[9], [13]])
MASKS: dict[str, Mask] = {
    "sliding": SlidingWindow(6),
    "window": Window(3, 2),
    "sinks": Causal() & (SlidingWindow(jnp.asarray(5)) | Prefix(2)),
    "packed": Causal() & Segments(jnp.asarray(DOCUMENTS)) & Padding(jnp.asarray(VALID)),
    # Heads that share keys have masks of their own.
    "heads": PerHead([Causal(), SlidingWindow(3), Full(), Prefix(jnp.asarray(11))]),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def random(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    # In float32 first, for these are to be the same numbers in every dtype.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32).astype(dtype)


def arrays_of(
    queries: int = QUERIES,
    keys: int = KEYS,
    *,
    batch: int = BATCH,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    dim_v: int = DIM_V,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> tuple[Arrays, jax.Array]:
    """Query, key and value, and a cotangent of the output."""
    make = partial(random, dtype=dtype)
    arrays = {
        "query": make(seed, batch, queries, heads, dim),
        "key": make(seed + 1, batch, keys, kv_heads, dim),
        "value": make(seed + 2, batch, keys, kv_heads, dim_v),
    }
    return arrays, make(seed + 3, batch, queries, heads, dim_v)


def with_gradients(attend: Callable[[Arrays], Any], arrays: Arrays, cotangent: Any) -> Arrays:
    """The output, and the gradient for each array."""
    out, pull = jax.vjp(attend, arrays)
    return {"out": out, **pull(cotangent)[0]}


# Many programs, each run once, need not be fast.
quickly = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def called(attend: Attend, arrays: Arrays, cotangent: Any, **how: Any) -> Arrays:
    return quickly(with_gradients, static_argnums=0)(lambda arrays: attend(**arrays, **how), arrays, cotangent)


def written_out(mask: Mask) -> Any:
    return np.asarray(mask.dense(QUERIES, KEYS, offset=OFFSET))


# Ours, by the definition.


@dataclass(frozen=True)
class Case:
    problem: Problem
    drawn: Described
    arrays: Arrays
    cotangent: Any
    logits_soft_cap: float | None

    def expected(self) -> Any:
        allowed = self.problem.expected(self.drawn.oracle)
        return defined(allowed, self.cotangent, **self.arrays, logits_soft_cap=self.logits_soft_cap)

    def found(self, attend: Attend) -> Arrays:
        how = {"mask": self.drawn.mask, "logits_soft_cap": self.logits_soft_cap, **self.problem.where}
        return with_gradients(lambda arrays: attend(**arrays, **how), self.arrays, self.cotangent)


@st.composite
def attentions(draw: st.DrawFn, dtypes: tuple[Any, ...]) -> Case:
    """Any mask, at any lengths and positions, and arrays to attend by it: MHA, GQA and MQA."""
    problem = draw(problems([(QUERIES, KEYS), (KEYS, KEYS), (1, KEYS)], heads=HEADS))
    drawn = draw(described(problem, depth=3))
    dtype, kv_heads, seed = draw(st.sampled_from(dtypes)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 99))
    arrays, cotangent = arrays_of(*problem.lengths, kv_heads=kv_heads, dtype=dtype, seed=seed)
    bias = draw(st.sampled_from([None, (HEADS, 1, KEYS), (BATCH, 1, problem.query_length, KEYS)]))
    if bias is not None:
        arrays["bias"] = random(seed + 4, *bias, dtype=dtype)
    return Case(problem, drawn, arrays, cotangent, draw(st.sampled_from([None, 2.0])))


def assert_ours_are_defined(case: Case) -> None:
    @quickly
    def found() -> list[Arrays]:
        return [case.found(attend) for attend in OURS.values()]

    expected = case.expected()
    for each in found():
        assert_close(each, expected, TOLERANCE[case.arrays["query"].dtype.name])


@settings(max_examples=7)
@given(attentions((jnp.float32,)))
def test_output_and_gradients_are_defined_for_any_mask(case: Case) -> None:
    assert_ours_are_defined(case)


@settings(max_examples=3)
@given(attentions((jnp.bfloat16, jnp.float16)))
def test_output_and_gradients_are_defined_for_any_mask_in_half_precision(case: Case) -> None:
    assert_ours_are_defined(case)


@ours
@every_mask
def test_every_kind_of_mask_with_grouped_queries(attend: Attend, mask: Mask) -> None:
    arrays, cotangent = arrays_of()
    expected = defined(written_out(mask), cotangent, **arrays)
    assert_close(called(attend, arrays, cotangent, mask=mask, offset=OFFSET), expected, TOLERANCE["float32"])


@ours
def test_float64_is_computed_in_float64(attend: Attend) -> None:
    mask = MASKS["packed"]
    with jax.enable_x64(True):
        arrays, cotangent = arrays_of(dtype=jnp.float64)
        found = called(attend, arrays, cotangent, mask=mask, offset=OFFSET)
        assert {x.dtype for x in found.values()} == {np.dtype(np.float64)}
    assert_close(found, defined(written_out(mask), cotangent, **arrays), TOLERANCE["float64"])


# Half precision.


def jax_nn(query: Any, key: Any, value: Any, mask: Mask, offset: Any = None) -> Any:
    allowed = mask.dense(query.shape[1], key.shape[1], offset=offset)
    return jax.nn.dot_product_attention(query, key, value, mask=allowed, implementation="xla")


@ours
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_half_precision_is_no_worse_than_that_of_jax_nn(attend: Attend, dtype: Any) -> None:
    arrays, cotangent = arrays_of(KEYS, KEYS, dim=32, dim_v=32, dtype=dtype)
    mask = SlidingWindow(20)
    expected, _ = defined(np.asarray(mask.dense(KEYS, KEYS)), cotangent, **arrays)

    def mean_errors(found: Arrays) -> dict[str, float]:
        return {name: float(np.abs(np.asarray(x, np.float64) - expected[name]).mean()) for name, x in found.items()}

    ours = mean_errors(called(attend, arrays, cotangent, mask=mask))
    # Not in a jit, where jax.nn asks for a product of float16 that a CPU does not have.
    theirs = mean_errors(with_gradients(lambda arrays: jax_nn(**arrays, mask=mask), arrays, cotangent))
    # The same to the last digits that matter.
    assert {name: error / theirs[name] for name, error in ours.items() if error > 1.01 * theirs[name]} == {}


# Kernels of others, where they take the call.


def by_jax_nn(query: Any, key: Any, value: Any, mask: Mask, offset: Any = None) -> Any:
    return fused.by_jax_nn(checked_call(query, key, value, mask, offset=offset), "xla")


THEIRS: dict[str, Attend] = {
    "tokamax": partial(jaxmask.attention, implementation="tokamax"),
    "splash": partial(jaxmask.attention, implementation="splash"),
    "jax.nn": by_jax_nn,
}
# Queries from 132 on have no keys within the window, nor has the second example any key at all.
LONE = SlidingWindow(5) & Prefix(jnp.array([128, 0]))


@pytest.mark.parametrize("attend", [*THEIRS.values(), by_blocks, by_xla], ids=[*THEIRS, *OURS])
def test_every_implementation_gives_zeros_where_there_is_nothing_to_attend_to(attend: Attend) -> None:
    arrays, cotangent = arrays_of(256, 256, heads=2, kv_heads=1, dim=64, dim_v=64)
    found = called(attend, arrays, cotangent, mask=LONE)
    for name in ("out", "query"):
        assert not found[name][0, 132:].any()
        assert not found[name][1].any()
    for name in ("key", "value"):
        assert not found[name][0, 128:].any()
        assert not found[name][1].any()
    # Splash and tokamax have their own order of sums.
    allowed = np.asarray(LONE.dense(256, 256))
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


@pytest.mark.parametrize("attend", [THEIRS["tokamax"], by_jax_nn], ids=["tokamax", "jax.nn"])
@pytest.mark.parametrize("mask", [Causal(), Window(3, 2), SlidingWindow(6) & Prefix(jnp.array([30, 2]))], ids=repr)
def test_arguments_of_others_say_the_mask(attend: Attend, mask: Mask) -> None:
    arrays, cotangent = arrays_of(KEYS, KEYS, dim_v=DIM)
    expected = defined(np.asarray(mask.dense(KEYS, KEYS)), cotangent, **arrays)
    assert_close(called(attend, arrays, cotangent, mask=mask), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("attend", [THEIRS["tokamax"], by_jax_nn], ids=["tokamax", "jax.nn"])
def test_arguments_of_others_say_the_mask_of_fewer_queries_from_the_first_key_on(attend: Attend) -> None:
    arrays, cotangent = arrays_of(QUERIES, KEYS, dim_v=DIM)
    expected = defined(np.asarray(Causal().dense(QUERIES, KEYS, offset=0)), cotangent, **arrays)
    found = called(attend, arrays, cotangent, mask=Causal(), offset=0)
    assert_close(found, expected, TOLERANCE["float32"])


# Soft cap, bias, sinks.


@ours_and_pallas
def test_the_cap_comes_after_the_scale_and_before_the_bias(attend: Attend) -> None:
    arrays, cotangent = arrays_of()
    arrays["bias"] = 3 * random(4, HEADS, QUERIES, KEYS)
    how = {"scale": 0.9, "logits_soft_cap": 1.5}
    expected = defined(written_out(MASKS["heads"]), cotangent, **arrays, **how)
    found = called(attend, arrays, cotangent, mask=MASKS["heads"], offset=OFFSET, **how)
    assert_close(found, expected, TOLERANCE["float32"])


BIASES = [
    (),
    (KEYS,),
    (HEADS, 1, 1),
    (1, HEADS, QUERIES, KEYS),
    (BATCH, 1, 1, KEYS),
    (BATCH, HEADS, QUERIES, 1),
]


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_a_bias_of_every_shape_that_broadcasts_has_a_gradient_of_its_own_shape(shape: tuple[int, ...]) -> None:
    arrays, cotangent = arrays_of()
    arrays["bias"] = random(4, *shape)
    expected = defined(written_out(MASKS["packed"]), cotangent, **arrays)
    for attend in OURS.values():
        found = called(attend, arrays, cotangent, mask=MASKS["packed"], offset=OFFSET)
        assert_close(found, expected, TOLERANCE["float32"])


DISTANCES = np.arange(KEYS) - (OFFSET + np.arange(QUERIES)[:, None])
SLOPES = jnp.array([0.5, -0.25, 0.125, 0.0625])


def with_alibi(attend: Attend, query: Any, key: Any, value: Any, slopes: Any) -> Any:
    """Learned slopes, one for each head: https://arxiv.org/abs/2108.12409."""
    bias = lambda b, h, q, kv: slopes[h] * (kv - q)  # noqa: E731
    return attend(query, key, value, SlidingWindow(12), bias=bias, offset=OFFSET)


@ours_and_pallas
def test_a_bias_of_positions_has_a_gradient_to_what_it_closes_over(attend: Attend) -> None:
    arrays, cotangent = arrays_of()
    bias = np.asarray(SLOPES, np.float64)[:, None, None] * DISTANCES
    whole = np.broadcast_to(bias, (BATCH, HEADS, QUERIES, KEYS))
    expected, scales = defined(written_out(SlidingWindow(12)), cotangent, **arrays, bias=whole)
    expected["slopes"] = (expected["bias"] * DISTANCES).sum((0, 2, 3))
    scales["slopes"] = scales["bias"] * QUERIES * 12
    found = called(partial(with_alibi, attend), {**arrays, "slopes": SLOPES}, cotangent)
    assert_close(found, (expected, scales), TOLERANCE["float32"])


@ours
def test_a_bias_of_positions_is_differentiated_inside_and_outside_of_jit(attend: Attend) -> None:
    arrays, cotangent = arrays_of()

    def loss(slopes: Any) -> Any:
        return (with_alibi(attend, **arrays, slopes=slopes) * cotangent).sum()

    inside, outside = jax.jit(jax.grad(loss))(SLOPES), jax.grad(jax.jit(loss))(SLOPES)
    assert np.abs(inside).min() > 0.1
    np.testing.assert_allclose(inside, outside, rtol=1e-5)


@ours
def test_a_bias_of_positions_is_read_at_the_positions_of_keys(attend: Attend) -> None:
    arrays, cotangent = arrays_of()
    ring = np.roll(np.arange(KEYS), 11)
    bias = lambda b, h, q, kv: SLOPES[h] * (kv - q)  # noqa: E731
    written = np.asarray(SLOPES, np.float64)[:, None, None] * (ring - OFFSET - np.arange(QUERIES)[:, None])
    expected, scales = defined(written_out(Causal())[..., ring], cotangent, **arrays, bias=written)
    found = called(attend, arrays, cotangent, mask=Causal(), bias=bias, offset=jnp.asarray(OFFSET), key_positions=ring)
    assert_close(found, (expected, scales), TOLERANCE["float32"])


def test_a_bias_of_a_method_is_that_of_the_arrays_of_today() -> None:
    class Slope:
        slope = jnp.float32(0.5)

        def __call__(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return self.slope * (kv - q)

    arrays, _ = arrays_of()
    bias = Slope()
    first = by_blocks(**arrays, mask=Causal(), offset=OFFSET, bias=bias)
    bias.slope = jnp.float32(0.25)
    second = by_blocks(**arrays, mask=Causal(), offset=OFFSET, bias=bias)
    fresh = by_blocks(**arrays, mask=Causal(), offset=OFFSET, bias=lambda b, h, q, kv: jnp.float32(0.25) * (kv - q))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, fresh)


def test_a_wider_bias_does_not_change_the_dtype_of_the_sums() -> None:
    arrays, _ = arrays_of()
    with jax.enable_x64(True):
        bias = jnp.asarray(np.random.default_rng(0).standard_normal((QUERIES, KEYS)))
        assert bias.dtype == np.float64
        found = by_blocks(**arrays, mask=Causal(), offset=OFFSET, bias=bias)
        expected = by_xla(**arrays, mask=Causal(), offset=OFFSET, bias=bias)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@ours
def test_a_bias_of_a_table_is_read_at_positions_of_queries_alone(attend: Attend) -> None:
    # A tile that is not whole has rows without a query; read beyond its end, this table gives NaN.
    arrays, cotangent = arrays_of()
    arrays["table"] = random(4, KEYS)

    def with_table(query: Any, key: Any, value: Any, table: Any) -> Any:
        bias = lambda b, h, q, kv: table.at[q].get(mode="fill", fill_value=jnp.nan)  # noqa: E731
        return attend(query, key, value, bias=bias, mask=Full(), offset=OFFSET)

    found = called(with_table, arrays, cotangent)
    assert all(np.isfinite(x).all() for x in found.values())


@ours
@pytest.mark.parametrize("mask", [SlidingWindow(6), MASKS["packed"], PerHead([Full(), Causal(), Prefix(0), Full()])])
def test_sinks_take_part_in_softmax_without_a_value(attend: Attend, mask: Mask) -> None:
    arrays, cotangent = arrays_of()
    arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 30.0])
    expected = defined(written_out(mask), cotangent, **arrays)
    found = called(attend, arrays, cotangent, mask=mask, offset=OFFSET)
    assert_close(found, expected, TOLERANCE["float32"])


def test_splash_takes_sinks() -> None:
    arrays, cotangent = arrays_of(256, 256, heads=2, kv_heads=1, dim=64, dim_v=64)
    arrays["sinks"] = jnp.array([0.5, -2.0])
    expected = defined(np.asarray(LONE.dense(256, 256)), cotangent, **arrays)
    assert_close(called(THEIRS["splash"], arrays, cotangent, mask=LONE), expected, TOLERANCE["float32"])


# What the scores are like.


@ours_and_pallas
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_a_row_of_the_lowest_scores_is_the_mean_as_in_jax_nn(attend: Attend, dtype: Any) -> None:
    arrays, cotangent = arrays_of(KEYS, KEYS, dim_v=DIM, dtype=dtype)
    # An additive mask, whose sixth row has nothing to attend to.
    lowest = jnp.finfo(dtype).min
    bias = jnp.where((np.arange(KEYS) % 3 == 0) & (np.arange(KEYS)[:, None] != 5), 0, lowest).astype(dtype)[None, None]
    found = called(attend, arrays, cotangent, bias=bias, mask=Full())
    expected = with_gradients(lambda arrays: jax.nn.dot_product_attention(**arrays, bias=bias), arrays, cotangent)
    for name, x in found.items():
        x, y = (np.asarray(x, np.float32) for x in (x, expected[name]))
        np.testing.assert_allclose(x, y, rtol=0, atol=4 * float(jnp.finfo(dtype).eps) * np.abs(y).max())


@ours_and_pallas
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("logits_soft_cap", [None, 2.0])
def test_keys_that_no_query_may_attend_to_cannot_poison(
    attend: Attend, poison: float, logits_soft_cap: float | None
) -> None:
    arrays, cotangent = arrays_of()
    mask = Causal() & Padding(jnp.asarray(VALID))
    found = []
    for content in (0, poison):
        with_padding = {
            name: array if name == "query" else jnp.where(VALID[:, :, None, None], array, content)
            for name, array in arrays.items()
        }
        how = {"mask": mask, "offset": OFFSET, "logits_soft_cap": logits_soft_cap}
        found.append(called(attend, with_padding, cotangent, **how))
    for name, clean in found[0].items():
        np.testing.assert_array_equal(clean, found[1][name])


# Where there is no pair.


@pytest.mark.parametrize("implementation", [None, "xla", "blocked"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_without_examples_queries_or_keys_the_output_is_that_of_jax_nn(shape: Any, implementation: Any) -> None:
    batch, queries, keys = shape
    arrays, cotangent = arrays_of(queries, keys, batch=batch, dim_v=DIM)
    attend = partial(jaxmask.attention, implementation=implementation, offset=0, mask=Causal())
    found = with_gradients(lambda arrays: attend(**arrays), arrays, cotangent)
    assert {name: x.shape for name, x in found.items()} == {"out": cotangent.shape} | {
        name: x.shape for name, x in arrays.items()
    }
    assert not any(np.asarray(x).any() for x in found.values())
    _, lse = attend(**arrays, return_residual=True)
    np.testing.assert_array_equal(lse, np.full((batch, queries, HEADS), -np.inf))
    explained = jaxmask.explain(**arrays, mask=Causal(), offset=0, implementation=implementation)
    assert "there is no pair of a query and a key" in str(explained)


def test_without_keys_a_sink_is_all() -> None:
    arrays, _ = arrays_of(QUERIES, 0)
    sinks = jnp.array([0.0, 1.0, 2.0, 3.0])
    out, lse = jaxmask.attention(**arrays, sinks=sinks, return_residual=True)
    assert not out.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))


# The log-sum-exp.


def with_lse(attend: Callable[[Arrays], Any], arrays: Arrays, cotangents: Any) -> Arrays:
    (out, lse), pull = jax.vjp(attend, arrays)
    return {"out": out, "lse": lse, **pull(cotangents)[0]}


@ours
@pytest.mark.parametrize("name", ["packed", "heads"])
def test_log_sum_exp_and_its_gradient(attend: Attend, name: str) -> None:
    arrays, cotangent = arrays_of()
    arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 30.0])
    if name == "packed":
        del arrays["sinks"]  # so that a row may be empty, and its log-sum-exp infinite
    lse_cotangent = random(5, BATCH, QUERIES, HEADS)
    attend = partial(attend, mask=MASKS[name], offset=OFFSET, return_residual=True)
    found = quickly(with_lse, static_argnums=0)(lambda arrays: attend(**arrays), arrays, (cotangent, lse_cotangent))
    expected = defined(written_out(MASKS[name]), cotangent, **arrays, lse_cotangent=lse_cotangent)
    assert_close(found, expected, TOLERANCE["float32"])


@ours
def test_log_sum_exp_of_an_empty_row_is_minus_infinity(attend: Attend) -> None:
    arrays, _ = arrays_of()
    _, lse = attend(**arrays, mask=Prefix(jnp.array([3, 0])), return_residual=True)
    assert np.isfinite(lse[0]).all()
    assert (lse[1] == -np.inf).all()


def in_halves(attend: Attend, query: Any, key: Any, value: Any) -> Any:
    """Attention to two halves of the keys, joined by what each says of its log-sum-exp."""
    half = KEYS // 2
    attend = partial(attend, offset=8, return_residual=True, mask=Causal())
    parts = (slice(half), slice(half, None))
    return jaxmask.merge_attention(
        [attend(query, key[:, part], value[:, part], key_positions=np.arange(KEYS)[part]) for part in parts]
    )


@ours
def test_parts_of_the_keys_are_merged_by_their_log_sum_exp(attend: Attend) -> None:
    # The first queries attend to no key of the second half.
    arrays, cotangent = arrays_of()
    lse_cotangent = random(5, BATCH, QUERIES, HEADS)
    found = with_lse(lambda arrays: in_halves(attend, **arrays), arrays, (cotangent, lse_cotangent))
    allowed = np.asarray(Causal().dense(QUERIES, KEYS, offset=8))
    assert_close(found, defined(allowed, cotangent, **arrays, lse_cotangent=lse_cotangent), TOLERANCE["float32"])


def test_parts_without_keys_merge_to_zeros() -> None:
    arrays, cotangent = arrays_of()
    attend = partial(by_xla, mask=Prefix(jnp.array([3, 0])), return_residual=True)

    def merged(arrays: Arrays) -> Any:
        return jaxmask.merge_attention([attend(**arrays), attend(**arrays)])

    (out, lse), pull = jax.vjp(merged, arrays)
    assert not out[1].any()
    assert (lse[1] == -np.inf).all()
    np.testing.assert_allclose(out[0], attend(**arrays)[0][0], atol=1e-6)
    gradients = pull((cotangent, jnp.zeros_like(lse)))[0]
    assert all(np.isfinite(x).all() for x in gradients.values())


# Positions of keys.


@ours
def test_keys_of_a_ring_buffer_are_the_same_keys_in_order(attend: Attend) -> None:
    arrays, cotangent = arrays_of()
    ring = np.roll(np.arange(KEYS), 11)
    expected, scales = defined(written_out(SlidingWindow(9)), cotangent, **arrays)
    for name in ("key", "value"):
        arrays[name] = arrays[name][:, ring]
        expected[name] = expected[name][:, ring]
    found = called(attend, arrays, cotangent, mask=SlidingWindow(9), offset=OFFSET, key_positions=jnp.asarray(ring))
    assert_close(found, (expected, scales), TOLERANCE["float32"])


# Positions of queries.

# Two shards of the zigzag order of ring attention: the first and the last quarter of the tokens, then the others.
ZIGZAG = np.split(np.r_[0:10, 30:40, 10:30], 2)
QUERY_POSITIONS = {"one order": ZIGZAG[0], "an order for each example": np.stack(ZIGZAG)}


@ours
@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray], ids=["static", "traced"])
@pytest.mark.parametrize("positions", QUERY_POSITIONS.values(), ids=QUERY_POSITIONS)
def test_queries_attend_by_their_positions(attend: Attend, positions: Any, to_array: Callable[..., Any]) -> None:
    arrays, cotangent = arrays_of(20, KEYS)
    mask = Causal() & SlidingWindow(12) & Padding(jnp.asarray(VALID))
    q, kv = positions.reshape(-1, 1, 20, 1), np.arange(KEYS)
    allowed = (kv <= q) & (kv > q - 12) & VALID[:, None, None]
    found = called(attend, arrays, cotangent, mask=mask, query_positions=to_array(positions))
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


@ours
def test_zigzag_shards_are_the_rows_of_the_whole(attend: Attend) -> None:
    arrays, _ = arrays_of(KEYS, KEYS)
    whole = attend(**arrays, mask=SlidingWindow(12))
    for positions in ZIGZAG:
        shard = {**arrays, "query": arrays["query"][:, positions]}
        out = attend(**shard, mask=SlidingWindow(12), query_positions=positions)
        np.testing.assert_allclose(out, whole[:, positions], atol=1e-6)


@ours
def test_a_bias_of_positions_is_read_at_the_positions_of_queries(attend: Attend) -> None:
    arrays, cotangent = arrays_of(20, KEYS)
    bias = lambda b, h, q, kv: SLOPES[h] * (kv - q)  # noqa: E731
    written = np.asarray(SLOPES, np.float64)[:, None, None] * (np.arange(KEYS) - ZIGZAG[1][:, None])
    allowed = np.arange(KEYS) <= ZIGZAG[1][:, None]
    expected = defined(allowed, cotangent, **arrays, bias=written)
    found = called(attend, arrays, cotangent, mask=Causal(), bias=bias, query_positions=ZIGZAG[1])
    assert_close(found, expected, TOLERANCE["float32"])


# What a mask knows of the heads.


def test_the_bounds_of_a_predicate_may_look_at_the_head_at_any_length() -> None:
    # A window of its own for each head, and nothing but the arrays to say how many heads there are.
    def window(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (q - kv < 40 * (h + 1))

    def bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
        some = (kv.min <= q.max) & (q.min - kv.max < 40 * (h + 1))
        return some, (kv.max <= q.min) & (q.max - kv.min < 40 * (h + 1))

    arrays, cotangent = arrays_of(600, 600)
    mask = Predicate(window, bounds=bounds)
    by_tiles, by_scores = (
        called(partial(jaxmask.attention, implementation=name), arrays, cotangent, mask=mask)
        for name in ("blocked", "xla")
    )
    allowed = np.stack([np.asarray(SlidingWindow(40 * (head + 1)).dense(600, 600))[0, 0] for head in range(HEADS)])
    expected = defined(allowed, cotangent, **arrays)
    assert_close(by_tiles, expected, TOLERANCE["float32"])
    assert_close(by_scores, expected, TOLERANCE["float32"])
    assert jaxmask.explain(**arrays, mask=mask).sparsity == mask.tiles(600, 600, heads=HEADS).sparsity > 0.4


def test_an_array_of_numpy_is_explained_as_one_of_jax_for_the_program_has_it_as_an_argument() -> None:
    x = jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32)
    valid = np.arange(2048)[None] < 600
    by_numpy, by_jax = (jaxmask.explain(x, x, x, Padding(array)) for array in (valid, jnp.asarray(valid)))
    assert by_numpy == by_jax


def test_a_mask_of_many_heads_is_explained_by_a_part_of_its_tiles_and_a_pair_of_each_head() -> None:
    asked: dict[str, int] = {"pairs": 0, "tiles": 0}

    class Counted(Mask):
        """A window that counts what it is asked."""

        size: int

        def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            asked["pairs"] += math.prod(np.broadcast_shapes(*map(np.shape, (b, h, q, kv))))
            return (kv <= q) & (q - kv < self.size)

        def tile_bounds(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            asked["tiles"] += math.prod(np.broadcast_shapes(*map(np.shape, (q.min, kv.min))))
            return SlidingWindow(self.size).tile_bounds(b, h, q, kv)

    heads, length = 128, 131_072
    x = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    mask = PerHead([Causal() & (Counted(64 * head + 64) | Prefix(head)) for head in range(heads)])
    found = jaxmask.explain(x, x, x, mask)
    # Splash, traced for this mask, would ask for all pairs of the tiles that are PARTIAL; our kernel for GPU traces it
    # for one. All tiles are 2**27.
    assert asked["pairs"] <= heads
    assert asked["tiles"] < 2**23
    # The windows alone, of 128 heads: their area, and half a tile at either end.
    read = sum((64 * head + 64 + 128) * (length - 32 * head) for head in range(heads)) / (heads * length**2)
    assert found.sparsity is not None
    assert abs(1 - found.sparsity - read) < 0.01
    assert found.flops is not None
    assert read < found.flops / found.dense_flops < read + 0.02


def test_what_is_explained_of_some_queries_is_near_to_what_is_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.ShapeDtypeStruct((2, 8192, 4, 64), jnp.float32)
    starts = jnp.array([0, 100])
    for mask in (Causal(), SlidingWindow(700), Causal() & Prefix(3000), ~Causal() | Chunked(1000, starts)):
        everything = jaxmask.explain(x, x, x, mask)
        with monkeypatch.context() as patch:
            patch.setattr(explanation, "_MOST_TILES", 2048)
            part = jaxmask.explain(x, x, x, mask)
        assert part.sparsity == pytest.approx(everything.sparsity, abs=0.02)
        assert part.flops == pytest.approx(everything.flops, rel=0.1)
        assert part.bytes == pytest.approx(everything.bytes, rel=0.1)
        assert part.implementation == everything.implementation


def test_splash_takes_any_mask_and_not_any_shape() -> None:
    x = jnp.ones((1, 256, 4, 64))
    for mask in (Dense(np.eye(256, dtype=bool)), PerHead([Causal(), Full(), Prefix(3), SlidingWindow(jnp.array(2))])):
        assert fused.splash_lacks(checked_call(x, x, x, mask)) == []
    ragged = checked_call(x[:, :200], x, x, Causal(), offset=0)
    assert "query_length must be a multiple of 128" in fused.splash_lacks(ragged)[0]
