"""Arrays of masks are read in one place: by broadcast, by slice, by gather, or by themselves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmask import Causal, Chunked, Dense, Mask, Padding, PerHead, Predicate, Prefix, Segments, SlidingWindow, Window
from jaxmask.indices import Run, iota, lookup

LENGTH = 9


def numbers(jaxpr: Any, name: str) -> int:
    """How many operations of a name are in a program, those of inner programs included."""
    inner = [getattr(value, "jaxpr", value) for equation in jaxpr.eqns for value in equation.params.values()]
    own = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    return own + sum(numbers(program, name) for program in inner if hasattr(program, "eqns"))


@given(st.integers(-12, 12), st.integers(1, 12), st.integers(-5, 5), st.booleans())
def test_a_run_reads_what_its_positions_read(start: int, size: int, shift: int, is_traced: bool) -> None:
    array = jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    run = Run(jnp.int32(start) if is_traced else start, size, 3) + shift
    assert isinstance(run, Run)
    positions = np.clip(np.arange(size) + start + shift, 0, LENGTH - 1)
    found = lookup(array, b=iota(2, 0), kv=run)
    np.testing.assert_array_equal(np.asarray(found)[:, 0, 0], np.asarray(array)[:, positions])


def test_a_run_takes_a_slice_and_gathers_nothing() -> None:
    def read(array: Any, start: Any) -> Any:
        return lookup(array, b=iota(2, 0), kv=Run(start, 3, 3) - 1)

    jaxpr = jax.make_jaxpr(read)(jnp.ones((2, LENGTH)), jnp.int32(2)).jaxpr
    assert numbers(jaxpr, "gather") == 0
    assert numbers(jaxpr, "dynamic_slice") > 0


@pytest.mark.parametrize(
    "operate",
    [
        lambda x: x <= 3,
        lambda x: x >= 3,
        lambda x: jnp.arange(4) - x,
        lambda x: np.int32(7) - x,
        lambda x: x // 2 % 3,
        lambda x: x == x,
        lambda x: x + iota(4, 2),
        abs,
    ],
)
@pytest.mark.parametrize("start", [2, jnp.int32(2)], ids=["static", "traced"])
def test_a_run_is_its_positions_in_arithmetic(operate: Callable[[Any], Any], start: Any) -> None:
    run = Run(start, 4, 3)
    np.testing.assert_array_equal(operate(run), operate(run.positions))


class Memory:
    """An array that can only be read element by element, as in a kernel."""

    def __init__(self, array: Any) -> None:
        self.array = jnp.asarray(array)
        self.shape, self.ndim, self.size = self.array.shape, self.array.ndim, self.array.size
        self.reads = 0

    def lookup(self, **indices: Any) -> Any:
        self.reads += 1
        assert len(indices) == self.ndim
        at = (
            0 if size == 1 else jnp.clip(jnp.asarray(index), 0, size - 1)
            for size, index in zip(self.shape, indices.values(), strict=True)
        )
        return self.array[tuple(at)]


IDS = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 3, 3, 3, 3, 3]], np.int32)
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    "mask",
    [
        Padding(IDS > 0),
        Segments(IDS),
        Segments(IDS[:, 3:], IDS, offset=3),
        Dense(RANDOM.random((LENGTH, LENGTH)) < 0.5),
        Dense(RANDOM.random((2, 3, LENGTH, LENGTH)) < 0.5),
        Prefix(np.array([3, 5])),
        Chunked(3, np.array([1, 2])),
        Causal() & Padding(IDS > 0) | ~Segments(IDS),
        PerHead([Causal(), Padding(IDS > 0), Segments(IDS)]),
        Predicate(lambda b, h, q, kv: kv <= q) & Window(3, 2) & Segments(IDS),
        SlidingWindow(4) & Segments(IDS).at_keys(np.arange(LENGTH)[::-1].astype(np.int32)),
    ],
    ids=repr,
)
def test_a_mask_reads_arrays_that_read_themselves(mask: Mask) -> None:
    views: list[Memory] = []

    def view(array: Any) -> Memory:
        views.append(Memory(array))
        return views[-1]

    in_memory = jax.tree.map(view, mask)
    b, h, q, kv = iota(2, 0), iota(3, 1), iota(LENGTH - 3, 2) + 3, iota(LENGTH, 3)
    np.testing.assert_array_equal(in_memory.allows(b, h, q, kv), mask.allows(b, h, q, kv))
    assert all(memory.reads for memory in views)
