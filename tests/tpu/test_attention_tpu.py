"""Attention compiled ahead of time for a TPU v5e, forward and backward: temporary memory is O(length)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxmask
from jaxmask import Causal, Chunked, Padding, PerHead, Prefix, Segments, SlidingWindow
from jaxmask.kernels import blocked
from tests.tpu.v5e import spec, v5e

HEADS, KV_HEADS, DIM = 4, 2, 128
LENGTH = 16384
# The bytes of query and output, and of key and value, in bfloat16.
SIZE = 2 * LENGTH * (2 * HEADS + 2 * KV_HEADS) * DIM


def temporaries(attend: Callable[..., Any], length: int, *traced: jax.ShapeDtypeStruct) -> int:
    """The bytes that the output and the gradients take beside themselves."""

    def run(query: Any, key: Any, value: Any, cotangent: Any, *arguments: Any) -> Any:
        output, pull_back = jax.vjp(lambda *inputs: attend(*inputs, *arguments), query, key, value)
        return output, pull_back(cotangent)

    queries, keys = (spec(1, length, heads, DIM, dtype=jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    with jax.sharding.use_abstract_mesh(v5e().mesh.abstract_mesh):
        lowered = jax.jit(run).lower(queries, keys, keys, queries, *traced)
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes


MASKS: dict[str, tuple[Callable[..., jaxmask.Mask], list[tuple[tuple[int, ...], Any]]]] = {
    "causal": (lambda: Causal(), []),
    "window": (lambda: SlidingWindow(1024), []),
    "chunks, and a prefix for each example": (lambda length: Chunked(2048) | Prefix(length), [((1,), jnp.int32)]),
    "a traced window": (lambda size: SlidingWindow(size), [((), jnp.int32)]),
    "padding": (lambda valid: Causal() & Padding(valid), [((1, LENGTH), jnp.bool_)]),
    "packed documents": (lambda ids: Causal() & Segments(ids), [((1, LENGTH), jnp.int32)]),
    "heads of two kinds": (lambda: PerHead([Causal()] * 2 + [SlidingWindow(512)] * 2), []),
}


@pytest.mark.parametrize("name", MASKS)
def test_blocked_attention_and_its_gradients_take_memory_of_the_length(name: str) -> None:
    mask, shapes = MASKS[name]

    def attend(query: Any, key: Any, value: Any, *arguments: Any) -> Any:
        return blocked.attention(query, key, value, mask(*arguments))

    taken = temporaries(attend, LENGTH, *(spec(*shape, dtype=dtype) for shape, dtype in shapes))
    assert taken < SIZE


@pytest.mark.parametrize("name", ["causal", "a traced window", "packed documents"])
def test_attention_by_splash_takes_memory_of_the_length(name: str) -> None:
    mask, shapes = MASKS[name]

    def attend(query: Any, key: Any, value: Any, *arguments: Any) -> Any:
        return jaxmask.attention(query, key, value, mask(*arguments), implementation="splash")

    taken = temporaries(attend, LENGTH, *(spec(*shape, dtype=dtype) for shape, dtype in shapes))
    assert taken < SIZE


def test_all_scores_written_out_would_be_found() -> None:
    attend = partial(jaxmask.attention, mask=Causal(), implementation="xla")
    assert temporaries(attend, 8192) > 4 * SIZE
