"""Compiled ahead of time for a TPU v5e, on a machine without one. A missing libtpu is a failure and no skip."""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmask import (
    AttentionMaskConverter,
    Causal,
    Chunked,
    Dense,
    Mask,
    Padding,
    PerHead,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    create_4d_causal_attention_mask,
    expand_mask,
    make_causal_mask,
    prepare_4d_attention_mask,
    prepare_4d_attention_mask_for_sdpa,
    prepare_4d_causal_attention_mask,
    prepare_4d_causal_attention_mask_for_sdpa,
    unmask_unattended,
)
from tests.tpu.v5e import spec

BATCH, HEADS, LENGTH = 2, 4, 8192
SCORES = jax.ShapeDtypeStruct((BATCH, HEADS, LENGTH, LENGTH), jnp.float32)
VALID = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.bool_)

WINDOWED = AttentionMaskConverter(True, 64)
SHORT = (2, 256)
SHORT_VALID = jax.ShapeDtypeStruct(SHORT, jnp.bool_)
SHORT_EMBEDS = jax.ShapeDtypeStruct((*SHORT, 8), jnp.bfloat16)
SHORT_BIAS = jax.ShapeDtypeStruct((2, 1, 256, 256), jnp.float32)


def ids_of(valid: jax.Array) -> jax.Array:
    """Ids of segments, a new one after each gap in the padding."""
    return jnp.cumsum(~valid, axis=1, dtype=jnp.int32)


Operation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array | None]
OPERATIONS: dict[str, Operation] = {
    "dense": lambda valid, x, bias: ((Causal() | Prefix(3)) & Padding(valid) & ~Window(1, 1)).dense(256, 256),
    "dense, packed documents": lambda valid, x, bias: (Causal() & Segments(ids_of(valid)) & Chunked(64)).dense(
        256, 256
    ),
    "dense, heads": lambda valid, x, bias: PerHead([Causal(), Padding(valid)]).dense(256, 256),
    "dense, ring buffer": lambda valid, x, bias: (SlidingWindow(64) & Padding(valid)).dense(
        1, 256, offset=300, key_positions=jnp.arange(256) + 45
    ),
    "bias": lambda valid, x, bias: (SlidingWindow(64) & Dense(bias == 0)).bias(256, 256, jnp.bfloat16),
    "to_causal_4d": lambda valid, x, bias: WINDOWED.to_causal_4d(2, 256, 256),
    "to_4d": lambda valid, x, bias: WINDOWED.to_4d(valid, 256, 256),
    "make_causal_mask": lambda valid, x, bias: make_causal_mask(SHORT, 0, 64),
    "expand_mask": lambda valid, x, bias: expand_mask(valid),
    "unmask_unattended": lambda valid, x, bias: unmask_unattended(bias),
    "create_4d_causal_attention_mask": lambda valid, x, bias: create_4d_causal_attention_mask(SHORT),
    "prepare_4d_causal_attention_mask, 2D": lambda valid, x, bias: prepare_4d_causal_attention_mask(valid, SHORT, x, 0),
    "prepare_4d_causal_attention_mask, 4D": lambda valid, x, bias: prepare_4d_causal_attention_mask(
        bias == 0, SHORT, x, 0
    ),
    "prepare_4d_causal_attention_mask_for_sdpa": lambda valid, x, bias: prepare_4d_causal_attention_mask_for_sdpa(
        valid, SHORT, x, 0
    ),
    "prepare_4d_attention_mask": lambda valid, x, bias: prepare_4d_attention_mask(valid),
    "prepare_4d_attention_mask_for_sdpa": lambda valid, x, bias: prepare_4d_attention_mask_for_sdpa(valid),
}

MASKS: dict[str, Callable[[jax.Array], Mask]] = {
    "Causal": lambda valid: Causal(),
    "SlidingWindow": lambda valid: SlidingWindow(128),
    "Padding": lambda valid: Padding(valid),
    "Causal & Padding": lambda valid: Causal() & Padding(valid),
    "Causal & Chunked": lambda valid: Causal() & Chunked(128),
    "Causal & Segments": lambda valid: Causal() & Segments(ids_of(valid)),
}

# At a length of which a bool for each pair would take 16 GiB.
LONG, BLOCK = 131_072, 1024
LONG_VALID = jax.ShapeDtypeStruct((BATCH, LONG), jnp.bool_)
WINDOW = jax.ShapeDtypeStruct((), jnp.int32)
TILED: dict[str, Callable[[jax.Array, jax.Array], Mask]] = {
    "window per layer": lambda valid, window: SlidingWindow(window),
    "padding": lambda valid, window: Causal() & Padding(valid),
    "packed documents": lambda valid, window: Causal() & Segments(ids_of(valid)),
    "chunks": lambda valid, window: Causal() & Chunked(window, jnp.sum(~valid, axis=1)),
    "heads": lambda valid, window: PerHead([Causal(), SlidingWindow(window) | Prefix(4)]) & ~Padding(valid),
}


def compiled_for_tpu(function: Callable[..., Any], *specs: jax.ShapeDtypeStruct) -> Any:
    """The program that ``function`` becomes on a TPU."""
    placed = [spec(*each.shape, dtype=each.dtype) for each in specs]
    return jax.jit(function).lower(*placed).compile()


def compile_for_tpu(function: Callable[..., Any], *specs: jax.ShapeDtypeStruct) -> str:
    """The same, as text."""
    text = compiled_for_tpu(function, *specs).as_text()
    assert text is not None
    return text


def written(program: str) -> Counter[tuple[str, int]]:
    """The dtypes and sizes of the arrays of at least ``[q, kv]`` that a program computes and keeps in memory.

    Those are the results of what it runs outside fusions, in HBM or VMEM. The sum of temporaries would not do: a mask
    hides in VMEM, which does not count, or in memory that the softmax has not taken yet. A bitcast or a tuple writes
    nothing.
    """
    found: Counter[tuple[str, int]] = Counter()
    for computation in re.split(r"\n\n+", program):
        if not computation.lstrip().startswith("ENTRY"):
            continue
        for result, operation in re.findall(r"= (.+?) ([\w\-]+)\(", computation):
            if operation in ("parameter", "bitcast", "tuple", "get-tuple-element"):
                continue
            for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]+)\]", result):
                if (size := math.prod(map(int, dims.split(",")))) >= LENGTH * LENGTH:
                    found[dtype, size] += 1
    return found


@cache
def written_by_softmax() -> Counter[tuple[str, int]]:
    return written(compile_for_tpu(lambda scores: jax.nn.softmax(scores), SCORES))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operation_compiles_for_tpu(operation: Operation) -> None:
    assert "ENTRY" in compile_for_tpu(operation, SHORT_VALID, SHORT_EMBEDS, SHORT_BIAS)


@pytest.mark.parametrize("mask", TILED.values(), ids=TILED)
def test_tiles_of_a_traced_mask_take_memory_for_tiles_and_not_for_pairs(
    mask: Callable[[jax.Array, jax.Array], Mask],
) -> None:
    def program(valid: jax.Array, window: jax.Array, offset: jax.Array) -> tuple[Any, ...]:
        tiles = mask(valid, window).tiles(LONG, LONG, block=BLOCK, offset=offset)
        return tiles.states, tiles.kv_counts, tiles.kv_indices

    memory = compiled_for_tpu(program, LONG_VALID, WINDOW, WINDOW).memory_analysis()
    # Some arrays of the size of the lengths. Ids that are gathered at a traced offset take a row of 128 lanes each.
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 128 * 8 * LONG < LONG * LONG / 100


def masked_softmax(scores: jax.Array, mask: Mask) -> jax.Array:
    """A softmax whose query positions have the shape of the scores, so that no broadcast comes after the mask."""
    b, h, _, kv = (
        jax.lax.broadcasted_iota(jnp.int32, [n if i == a else 1 for i, n in enumerate(scores.shape)], a)
        for a in range(4)
    )
    q = jax.lax.broadcasted_iota(jnp.int32, (*scores.shape[:3], 1), 2)
    return jax.nn.softmax(jnp.where(mask.allows(b, h, q, kv), scores, jnp.finfo(scores.dtype).min))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_mask_read_at_the_scores_shape_is_not_written_out(mask: Callable[[jax.Array], Mask]) -> None:
    program = compile_for_tpu(lambda scores, valid: masked_softmax(scores, mask(valid)), SCORES, VALID)
    assert written(program) == written_by_softmax()


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(128)], ids=repr)
def test_bias_added_to_the_scores_of_one_head_is_not_written_out(mask: Mask) -> None:
    # With several heads XLA for TPU does write it out, once for all of them: a broadcast ends its fusion.
    one_head = jax.ShapeDtypeStruct((1, 1, LENGTH, LENGTH), jnp.float32)
    program = compile_for_tpu(lambda scores: jax.nn.softmax(scores + mask.bias(LENGTH, LENGTH)), one_head)
    assert written(program) == written(compile_for_tpu(lambda scores: jax.nn.softmax(scores), one_head))


def test_padding_bias_added_to_scores_is_not_written_out() -> None:
    program = compile_for_tpu(
        lambda scores, valid: jax.nn.softmax(scores + Padding(valid).bias(LENGTH, LENGTH)), SCORES, VALID
    )
    assert written(program) == written_by_softmax()


def test_mask_behind_a_barrier_is_seen_as_written_out() -> None:
    def control(scores: jax.Array) -> jax.Array:
        return jax.nn.softmax(scores + jax.lax.optimization_barrier(Causal().bias(LENGTH, LENGTH)))

    assert written(compile_for_tpu(control, SCORES)) - written_by_softmax() == {("f32", LENGTH * LENGTH): 1}


def test_mask_that_is_returned_too_is_seen_as_written_out() -> None:
    def control(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        mask = Causal().dense(LENGTH, LENGTH)
        return jax.nn.softmax(jnp.where(mask, scores, -1e30)), mask

    assert ("pred", LENGTH * LENGTH) in written(compile_for_tpu(control, SCORES)) - written_by_softmax()
