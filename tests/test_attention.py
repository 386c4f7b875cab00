"""Attention is what its definition says, by every implementation: output and gradients, masks, dtypes, biases, sinks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmask
from jaxmask import Causal, Dense, Full, Mask, Padding, PerHead, Prefix, Segments, SlidingWindow, Window
from jaxmask.kernels import blocked, fused
from jaxmask.kernels.call import checked_call
from tests.definition import assert_close, defined, errors
from tests.strategies import Described, Problem, described, problems

Arrays = dict[str, Any]
Attend = Callable[..., Any]

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM, DIM_V = 2, 4, 2, 19, 40, 8, 6
OFFSET = KEYS - QUERIES
# Several tiles of queries and strips of keys, and the last of each is ragged.
BLOCK = (8, 16)

by_blocks = partial(blocked.attention, block=BLOCK)
by_xla = partial(jaxmask.attention, implementation="xla")
OURS: dict[str, Attend] = {"blocked": by_blocks, "xla": by_xla}
ours = pytest.mark.parametrize("attend", OURS.values(), ids=OURS)

# What rounding may add up to, relative to the scale of each array.
TOLERANCE = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}

VALID = np.arange(KEYS) >= np.array([[0], [7]])
DOCUMENTS = np.arange(KEYS) // np.array([[9], [13]])
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
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


def called(attend: Attend, arrays: Arrays, cotangent: Any, **how: Any) -> Arrays:
    return jax.jit(with_gradients, static_argnums=0)(lambda arrays: attend(**arrays, **how), arrays, cotangent)


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
    # Many programs, each run once, need not be fast.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def found() -> list[Arrays]:
        return [case.found(attend) for attend in OURS.values()]

    expected = case.expected()
    for each in found():
        assert_close(each, expected, TOLERANCE[case.arrays["query"].dtype.name])


@settings(max_examples=14)
@given(attentions((jnp.float32,)))
def test_output_and_gradients_are_defined_for_any_mask(case: Case) -> None:
    assert_ours_are_defined(case)


@settings(max_examples=8)
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
