"""The kernel for GPU, interpreted: output and gradients are what they are defined to be, for every argument."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jaxmask
from jaxmask import Causal, Full, Mask, Padding, PerHead, Predicate, Prefix, SlidingWindow
from jaxmask.kernels import pallas_gpu
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.pallas_gpu import Block, Blocks
from tests.kernels.test_attention import (
    BATCH,
    DISTANCES,
    HEADS,
    KEYS,
    MASKS,
    OFFSET,
    QUERIES,
    SLOPES,
    TOLERANCE,
    VALID,
    Case,
    arrays_of,
    attentions,
    called,
    quickly,
    random,
    with_alibi,
    with_gradients,
    with_lse,
    written_out,
)
from tests.oracles.attention import assert_close, defined

# Several tiles of queries and of keys, and the last of each is ragged.
TILE = Block(16, 16)


def attend(query: Any, key: Any, value: Any, mask: Mask | None = None, **arguments: Any) -> Any:
    call = checked_call(query, key, value, mask, **arguments)
    assert pallas_gpu.lacks(call) == []
    return pallas_gpu.attend(call, Blocks(TILE, TILE, TILE))


@settings(max_examples=6)
@given(attentions((jnp.float32,)))
def test_output_and_gradients_are_defined_for_any_mask(case: Case) -> None:
    found = quickly(lambda: case.found(attend))()
    assert_close(found, case.expected(), TOLERANCE["float32"])


@settings(max_examples=2)
@given(attentions((jnp.bfloat16, jnp.float16)))
def test_output_and_gradients_are_defined_for_any_mask_in_half_precision(case: Case) -> None:
    found = quickly(lambda: case.found(attend))()
    assert_close(found, case.expected(), TOLERANCE[case.arrays["query"].dtype.name])


# What else attention takes.


def test_the_cap_comes_after_the_scale_and_before_the_bias() -> None:
    arrays, cotangent = arrays_of()
    arrays["bias"] = 3 * random(4, 1, HEADS, QUERIES, KEYS)
    how = {"scale": 0.9, "logits_soft_cap": 1.5}
    expected = defined(written_out(MASKS["heads"]), cotangent, **arrays, **how)
    found = called(attend, arrays, cotangent, mask=MASKS["heads"], offset=OFFSET, **how)
    assert_close(found, expected, TOLERANCE["float32"])


def test_a_scale_that_turns_the_order_of_scores_around() -> None:
    arrays, cotangent = arrays_of()
    expected = defined(written_out(MASKS["packed"]), cotangent, **arrays, scale=-0.7)
    found = called(attend, arrays, cotangent, mask=MASKS["packed"], offset=OFFSET, scale=-0.7)
    assert_close(found, expected, TOLERANCE["float32"])


def test_a_bias_of_positions_has_a_gradient_to_what_it_closes_over() -> None:
    arrays, cotangent = arrays_of()
    bias = np.asarray(SLOPES, np.float64)[:, None, None] * DISTANCES
    whole = np.broadcast_to(bias, (BATCH, HEADS, QUERIES, KEYS))
    expected, scales = defined(written_out(SlidingWindow(12)), cotangent, **arrays, bias=whole)
    expected["slopes"] = (expected["bias"] * DISTANCES).sum((0, 2, 3))
    scales["slopes"] = scales["bias"] * QUERIES * 12
    found = called(partial(with_alibi, attend), {**arrays, "slopes": SLOPES}, cotangent)
    assert_close(found, (expected, scales), TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["packed", "heads"])
def test_sinks_and_log_sum_exp_and_their_gradients(name: str) -> None:
    arrays, cotangent = arrays_of()
    if name == "heads":
        arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 30.0])
    lse_cotangent = random(5, BATCH, QUERIES, HEADS)
    how = partial(attend, mask=MASKS[name], offset=OFFSET, return_residual=True)
    found = quickly(with_lse, static_argnums=0)(lambda arrays: how(**arrays), arrays, (cotangent, lse_cotangent))
    expected = defined(written_out(MASKS[name]), cotangent, **arrays, lse_cotangent=lse_cotangent)
    assert_close(found, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("is_shared", [False, True], ids=["by head", "shared"])
def test_dropout_drops_the_same_pairs_as_the_plain_loop(is_shared: bool) -> None:
    arrays, cotangent = arrays_of()
    how = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3), "broadcast_dropout": is_shared}
    found, expected = (
        called(each, arrays, cotangent, mask=MASKS["sinks"], offset=OFFSET, **how)
        for each in (attend, partial(jaxmask.attention, implementation="xla"))
    )
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-5)


def test_queries_and_keys_attend_by_their_positions() -> None:
    arrays, cotangent = arrays_of()
    ring, order = np.roll(np.arange(KEYS), 11), np.random.default_rng(0).permutation(KEYS)[:QUERIES]
    bias = lambda b, h, q, kv: SLOPES[h] * (kv - q)  # noqa: E731
    written = np.asarray(SLOPES, np.float64)[:, None, None] * (ring - order[:, None])
    allowed = (ring <= order[:, None]) & (order[:, None] - ring < 25)
    how = {"query_positions": jnp.asarray(order), "key_positions": jnp.asarray(ring), "bias": bias}
    found = called(attend, arrays, cotangent, mask=SlidingWindow(25), **how)
    assert_close(found, defined(allowed, cotangent, **arrays, bias=written), TOLERANCE["float32"])


@pytest.mark.parametrize("dim", [24, 40, 80])
def test_dims_that_are_no_power_of_two(dim: int) -> None:
    arrays, cotangent = arrays_of(dim=dim, dim_v=2 * dim)
    found = called(attend, arrays, cotangent, mask=MASKS["sliding"], offset=OFFSET)
    assert_close(found, defined(written_out(MASKS["sliding"]), cotangent, **arrays), TOLERANCE["float32"])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_few_queries_divide_a_long_cache_over_programs(queries: int, kv_heads: int) -> None:
    arrays, cotangent = arrays_of(queries, 700, kv_heads=kv_heads)
    arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 3.0])
    lengths = jnp.array([650, 0])
    mask = PerHead([Causal(), SlidingWindow(300), Prefix(lengths), Full()]) & Prefix(lengths)
    call = checked_call(**{name: x for name, x in arrays.items() if name != "sinks"}, mask=mask, offset=600)
    assert "divided over" in pallas_gpu.launches(call)[0]
    found = called(partial(jaxmask.attention, implementation="pallas"), arrays, cotangent, mask=mask, offset=600)
    allowed = np.asarray(mask.dense(queries, 700, offset=600))
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


# What scores and keys are like.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_a_row_of_the_lowest_scores_is_the_mean(dtype: Any) -> None:
    arrays, cotangent = arrays_of(KEYS, KEYS, dim_v=8, dtype=dtype)
    lowest = jnp.finfo(dtype).min
    bias = jnp.where((np.arange(KEYS) % 3 == 0) & (np.arange(KEYS)[:, None] != 5), 0, lowest).astype(dtype)[None, None]
    found = called(attend, arrays, cotangent, bias=bias, mask=Full())
    expected = with_gradients(lambda arrays: jax.nn.dot_product_attention(**arrays, bias=bias), arrays, cotangent)
    for name, x in found.items():
        x, y = (np.asarray(x, np.float32) for x in (x, expected[name]))
        np.testing.assert_allclose(x, y, rtol=0, atol=4 * float(jnp.finfo(dtype).eps) * np.abs(y).max())


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_no_query_may_attend_to_cannot_poison(poison: float) -> None:
    arrays, cotangent = arrays_of()
    mask = Causal() & Padding(jnp.asarray(VALID))
    found = []
    for content in (0, poison):
        with_padding = {
            name: array if name == "query" else jnp.where(VALID[:, :, None, None], array, content)
            for name, array in arrays.items()
        }
        found.append(called(attend, with_padding, cotangent, mask=mask, offset=OFFSET, logits_soft_cap=2.0))
    for name, clean in found[0].items():
        np.testing.assert_array_equal(clean, found[1][name])


def test_a_key_that_is_nan_shows_in_the_queries_that_attend_to_it() -> None:
    arrays, _ = arrays_of()
    for name in ("key", "value"):
        with_nan = {**arrays, name: arrays[name].at[:, 30].set(jnp.nan)}
        out = attend(**with_nan, mask=SlidingWindow(6), offset=OFFSET)
        attends = (np.arange(QUERIES) + OFFSET >= 30) & (np.arange(QUERIES) + OFFSET < 36)
        assert np.isnan(out[:, attends]).all()
        assert not np.isnan(out[:, ~attends]).any()


# Transformations.


def test_vmap_over_arrays_and_masks() -> None:
    (one, cotangent), (other, _) = arrays_of(seed=0), arrays_of(seed=10)
    arrays = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    masks = [Causal() & Padding(jnp.asarray(VALID ^ flip)) for flip in (False, True)]

    def each(arrays: Any, mask: Mask) -> Any:
        return with_gradients(lambda arrays: attend(**arrays, mask=mask, offset=OFFSET), arrays, cotangent)

    found = quickly(jax.vmap(each))(arrays, jax.tree.map(lambda *x: jnp.stack(x), *masks))
    for i, (part, mask) in enumerate(zip((one, other), masks, strict=True)):
        expected = defined(written_out(mask), cotangent, **part)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), expected, TOLERANCE["float32"])


def test_gradient_of_jit_with_a_predicate_that_closes_over_a_traced_array() -> None:
    arrays, cotangent = arrays_of()
    table = random(7, KEYS)

    @jax.jit
    def loss(arrays: Any, table: jax.Array) -> jax.Array:
        mask = Predicate(lambda b, h, q, kv: (table[kv] > 0) | (kv == q))
        return (attend(**arrays, mask=mask, offset=OFFSET) * cotangent).sum()

    of_arrays, of_table = jax.grad(loss, argnums=(0, 1))(arrays, table)
    allowed = (np.asarray(table) > 0) | (DISTANCES == 0)
    assert_close(of_arrays, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])
    assert not of_table.any()


def test_layers_with_windows_of_their_own_are_scanned_by_one_program() -> None:
    x, windows = random(0, 2, KEYS, 4, 8), [3, KEYS, 9]

    @quickly
    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(
            lambda x, window: (x + attend(x, x, x, SlidingWindow(window)), None), x, jnp.array(windows)
        )[0]

    expected = x
    for window in windows:
        expected = expected + jaxmask.attention(
            expected, expected, expected, SlidingWindow(window), implementation="xla"
        )
    np.testing.assert_allclose(scanned(x), expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
