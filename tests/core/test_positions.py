"""The positions of queries, one by one, in place of an offset."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmask import (
    EMPTY,
    FULL,
    Causal,
    Chunked,
    Dense,
    Mask,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    attention,
    explain,
)

LENGTH = 12
IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3]], np.int32)
VALID = np.arange(LENGTH)[None] > 1
MASKS: list[Mask] = [
    Causal(),
    SlidingWindow(3),
    Window(2, 1),
    Chunked(5, 2),
    Prefix(4),
    Segments(IDS),
    Padding(VALID),
    Dense(np.random.default_rng(0).random((LENGTH, LENGTH)) < 0.5),
    Causal() & Padding(VALID) | Prefix(2) & ~Segments(IDS),
]
every_mask = pytest.mark.parametrize("mask", MASKS, ids=repr)
orders = st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=LENGTH)


@every_mask
@given(order=orders, is_traced=st.booleans())
def test_rows_at_positions_are_the_rows_of_the_whole(mask: Mask, order: list[int], is_traced: bool) -> None:
    positions = jnp.array(order) if is_traced else np.array(order)
    whole = mask.dense(LENGTH, LENGTH)
    rows = mask.dense(len(order), LENGTH, query_positions=positions)
    np.testing.assert_array_equal(rows, whole[:, :, np.array(order)])
    bias = mask.bias(len(order), LENGTH, query_positions=positions)
    np.testing.assert_array_equal(bias == 0, rows)


@every_mask
@given(order=orders)
def test_tiles_at_positions_are_sound(mask: Mask, order: list[int]) -> None:
    positions = np.array(order)
    allowed = np.asarray(mask.dense(len(order), LENGTH, query_positions=positions))[0, 0]
    states = np.asarray(mask.tiles(len(order), LENGTH, block=(2, 3), query_positions=positions).states)[0, 0]
    for (i, j), state in np.ndenumerate(states):
        tile = allowed[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
        assert not (state == EMPTY and tile.any())
        assert not (state == FULL and not tile.all())


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3), Window(2, 1), Prefix(4)], ids=repr)
def test_tiles_are_exact_where_positions_in_a_tile_are_consecutive(mask: Mask) -> None:
    zigzag = np.array([8, 9, 2, 3, 10, 11, 0, 1])
    allowed = np.asarray(mask.dense(8, LENGTH, query_positions=zigzag))[0, 0].reshape(4, 2, 6, 2)
    expected = allowed.any((1, 3)).astype(int) + allowed.all((1, 3))
    np.testing.assert_array_equal(mask.tiles(8, LENGTH, block=2, query_positions=zigzag).states[0, 0], expected)


def test_examples_may_have_positions_of_their_own() -> None:
    positions = jnp.array([[0, 5, 3], [11, 1, 2]])
    rows = Causal().dense(3, LENGTH, query_positions=positions)
    np.testing.assert_array_equal(rows[:, 0], np.arange(LENGTH) <= np.asarray(positions)[..., None])


def test_other_positions_trace_nothing() -> None:
    traces: list[int] = []

    @jax.jit
    def dense(positions: Any) -> Any:
        traces.append(1)
        return Causal().dense(2, LENGTH, query_positions=positions)

    for positions in ([0, 1], [7, 3]):
        dense(jnp.array(positions))
    assert traces == [1]


@pytest.mark.parametrize("read", ["dense", "bias", "tiles", "split"])
def test_an_offset_beside_positions_is_refused(read: str) -> None:
    with pytest.raises(ValueError, match="offset and query_positions both say where the queries are"):
        getattr(Causal(), read)(2, 4, offset=1, query_positions=np.array([1, 2]))


def test_positions_for_another_number_of_queries_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"query_positions must give the position of each of the 2 queries, got int32\[3\]"
    ):
        Causal().dense(2, 4, query_positions=np.array([1, 2, 3]))


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_attention_in_zigzag_order_is_the_whole_in_that_order(implementation: Any) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 16, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    zigzag = np.array([0, 1, 2, 3, 12, 13, 14, 15])
    mask = Causal() & SlidingWindow(6)

    def part(query: Any, positions: Any) -> Any:
        return attention(query, key, value, mask, query_positions=positions, implementation=implementation)

    whole, pull = jax.vjp(lambda query: attention(query, key, value, mask, implementation="xla"), query)
    out, pull_part = jax.vjp(lambda query: jax.jit(part)(query[:, zigzag], jnp.asarray(zigzag)), query)
    np.testing.assert_allclose(out, whole[:, zigzag], atol=1e-5)
    cotangent = jnp.zeros_like(whole).at[:, zigzag].set(1)
    np.testing.assert_allclose(pull_part(cotangent[:, zigzag])[0], pull(cotangent)[0], atol=1e-5)


def test_explain_says_who_takes_no_positions() -> None:
    x = jax.ShapeDtypeStruct((1, 256, 8, 64), jnp.bfloat16)
    explanation = explain(x, x, x, Causal(), query_positions=np.arange(256)[::-1])
    assert explanation.implementation == "blocked"
    assert any("query_positions" in lack for lack in explanation.lacks["splash"])


def test_a_mask_is_computed_in_the_program_and_is_no_constant_of_it() -> None:
    jaxpr = jax.make_jaxpr(lambda: Causal().dense(64, 64))()
    inner = [equation.params["jaxpr"] for equation in jaxpr.eqns if "jaxpr" in equation.params]
    assert max(np.size(const) for program in (jaxpr, *inner) for const in (0, *program.consts)) <= 64
