"""The three kernels, as one program of the GPU runs them: a tile of queries, or of keys, of a head and an example.

Arguments that end in ``_ref`` are arrays in the memory of the GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from jaxmask.kernels import scores
from jaxmask.kernels.pallas_gpu.blocks import padded
from jaxmask.kernels.pallas_gpu.program import OfPair, Program

# What the maximum of a row starts from, so that a masked score has a weight of exactly 0.
_LOWEST = scores.lowest(jnp.float32)


class Residuals(NamedTuple):
    """Both parts of the log-sum-exp in base 2, float32 ``[batch, heads, q]``: the sum would lose the second.

    Args:
        highest: the maximum of the scores, in their own unit; infinite in a row without keys.
        log_total: the base-2 logarithm of the sum of weights.
    """

    # Arrays; where a kernel is called, how it gets them.
    highest: Any
    log_total: Any


def _ask(program: Program, operands: OfPair, is_masked: bool, b: Any, h: Any, query: Any, key: Any) -> OfPair:
    """What the functions say of the pairs of a tile."""
    functions = program.functions

    def answer(name: str, *indices: Any) -> Any:
        refs = getattr(operands, name)
        return getattr(functions, name)(lambda i, at: plgpu.load(refs[i].at[at]), *indices)

    q, kv = answer("positions", b, h, query, key)
    bias = factor = allowed = None
    if functions.bias is not None:
        (bias,) = answer("bias", b, h, *((q, kv) if program.bias_shape is None else (query, key)))
    if functions.factor is not None:
        (factor,) = answer("factor", b, h, query, key)
    if is_masked:
        (allowed,) = answer("allowed", b, h, q, key)
    return OfPair((q, kv), bias, factor, allowed)


def _load(ref: Any, size: int, dim: int, is_there: Any) -> Array:
    """Rows ``[size, dim]``, zero where they are not there and in the columns that only fill the tile."""
    mask, columns = None if is_there is None else is_there[:, None], padded(dim)
    if columns > dim:
        is_column = (jnp.arange(columns, dtype=jnp.int32) < dim)[None]
        mask = is_column if mask is None else mask & is_column
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, (size, columns)), other=0.0)


def _load_from(ref: Any, start: Any, size: int, dim: int, is_there: Any) -> Array:
    """So many rows of an array ``[length, dim]``, from one on."""
    return _load(ref.at[pl.ds(start, size), slice(None)], size, dim, is_there)


def _load_rows(ref: Any, is_there: Any, other: float) -> Array:
    """A number for each row."""
    return plgpu.load(ref, mask=is_there, other=None if is_there is None else other)


def _store(ref: Any, tile: Array, dim: int, is_there: Any) -> None:
    mask = None if is_there is None else is_there[:, None]
    if tile.shape[1] > dim:
        is_column = (jnp.arange(tile.shape[1], dtype=jnp.int32) < dim)[None]
        mask = is_column if mask is None else mask & is_column
    plgpu.store(ref, tile.astype(ref.dtype), mask=None if mask is None else jnp.broadcast_to(mask, tile.shape))


def _rows(first: Any, size: int, length: int) -> tuple[Array, Array | None]:
    """The numbers of the rows of a tile, none beyond the last, and which are there, where some may not be."""
    rows = first + jnp.arange(size, dtype=jnp.int32)
    if length % size == 0:
        return rows, None
    return jnp.minimum(rows, length - 1), rows < length


def _scores(
    program: Program, products: Array, pair: OfPair, in_range: Any, poison: Any = None
) -> tuple[Array, Array | None]:
    """The scores in the unit of the program, and the slope of the cap."""
    allowed = pair.allowed
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed if in_range is None else allowed & in_range, products.shape)
    slope = None
    if not program.has_raw_scores:
        products = products * program.scale
    if program.logits_soft_cap is not None:
        if allowed is not None:
            # The slope of tanh at NaN is NaN, whatever it is multiplied by.
            products = jnp.where(allowed, products, 0.0)
        capped = _tanh(products / program.logits_soft_cap)
        products, slope = capped * program.logits_soft_cap, 1 - capped * capped
    if pair.bias is not None:
        products = products + pair.bias.astype(jnp.float32)
    if poison is not None:
        products = products + poison[None]
    return (products if allowed is None else jnp.where(allowed, products, scores.MASKED)), slope


def _tanh(x: Array) -> Array:
    """By ``expm1``, which keeps the digits of what is small: Triton has no other ``tanh`` for all GPUs."""
    e = jnp.expm1(-2 * jnp.abs(x))
    return -jnp.sign(x) * e / (2 + e)


def _not_finite(x: Array) -> Array:
    """NaN for each row of a tile that holds NaN or an infinity, else 0; ``[rows]``."""
    return (x.astype(jnp.float32) * 0).sum(1)


def _without(x: Array, poison: Array) -> Array:
    """The rows of a tile that are finite, and zeros: a weight of 0 would not take NaN away."""
    return jnp.where((poison == 0)[:, None], x, jnp.zeros_like(x))


def _walk(partial_count: Any, first: Any, end: Any, step: Callable[..., Any], carry: Any) -> Any:
    """Fold ``step(place in the list, carry, is_masked)`` over the tiles of a list from the first on."""
    carry = lax.fori_loop(first, jnp.minimum(partial_count, end), partial(step, is_masked=True), carry)
    return lax.fori_loop(jnp.maximum(partial_count, first), end, partial(step, is_masked=False), carry)


def forward_kernel(
    program: Program,
    partial_ref: Any,
    walked_ref: Any,
    order_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    sinks_ref: Any,
    operands: OfPair,
    out_ref: Any,
    highest_ref: Any,
    log_total_ref: Any,
) -> None:
    """The output of a tile of queries, or of a part of their keys, and its residuals."""
    block, splits = program.blocks.forward, program.splits
    place, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, is_row = _rows(place // splits * block.queries, block.queries, program.rows)
    query = rows[:, None]
    if program.is_grouped:
        h, query = h * program.group + query // program.query_length, query % program.query_length
    q = _load(q_ref, block.queries, program.dim, is_row)

    def step(j: Any, carry: Any, is_masked: bool) -> Any:
        out, highest, total = carry
        start = order_ref[j] * block.keys
        keys, is_key = _rows(start, block.keys, program.key_length)
        # Only the last tile may have keys that are not there, and it is never FULL.
        is_key = is_key if is_masked else None
        k = _load_from(k_ref, start, block.keys, program.dim, is_key)
        pair = _ask(program, operands, is_masked, b, h, query, keys[None])
        v, poison = _load_from(v_ref, start, block.keys, program.dim_v, is_key), None
        if is_masked:
            poison = _not_finite(v)
            v = _without(v, poison)
        s, _ = _scores(program, plgpu.dot(q, k.T), pair, None if is_key is None else is_key[None], poison)
        new_highest = jnp.maximum(highest, s.max(1))
        decay = jnp.exp2((highest - new_highest) * program.unit)
        weights = jnp.exp2((s - new_highest[:, None]) * program.unit)
        total = total * decay + weights.sum(1)
        if pair.factor is not None:
            weights = weights * pair.factor
        return out * decay[:, None] + plgpu.dot(weights.astype(v.dtype), v), new_highest, total

    out = jnp.zeros((block.queries, out_ref.shape[-1]), jnp.float32)
    highest = jnp.full((block.queries,), _LOWEST, jnp.float32)
    count, part = walked_ref[...], place % splits
    first, end = count * part // splits, count * (part + 1) // splits
    carry = out, highest, jnp.zeros_like(highest)
    out, highest, total = _walk(partial_ref[...], first, end, step, carry)
    if sinks_ref is not None:
        sink = plgpu.load(sinks_ref.at[h])
        sink = jnp.broadcast_to(sink.reshape(-1) if program.is_grouped else sink, highest.shape)
        # One part of the keys has the sink, whose scores have the unit 1.
        sink = jnp.where(part == 0, sink, scores.MASKED)
        new_highest = jnp.maximum(highest, sink)
        decay = jnp.exp2((highest - new_highest) * program.unit)
        total = total * decay + jnp.exp2((sink - new_highest) * program.unit)
        out, highest = out * decay[:, None], new_highest
    has_keys = total > 0
    safe = jnp.where(has_keys, total, 1.0)
    _store(out_ref, out / safe[:, None], program.dim_v, is_row)
    plgpu.store(highest_ref, jnp.where(has_keys, highest, jnp.inf), mask=is_row)
    plgpu.store(log_total_ref, jnp.log2(safe), mask=is_row)


def dq_kernel(
    program: Program,
    partial_ref: Any,
    walked_ref: Any,
    order_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    operands: OfPair,
    dout_ref: Any,
    residuals: Residuals,
    delta_ref: Any,
    dq_ref: Any,
) -> None:
    """The gradient of a tile of queries."""
    block = program.blocks.dq
    h, b = pl.program_id(1), pl.program_id(2)
    rows, is_row = _rows(pl.program_id(0) * block.queries, block.queries, program.query_length)
    q = _load(q_ref, block.queries, program.dim, is_row)
    dout = _load(dout_ref, block.queries, program.dim_v, is_row)
    highest = _load_rows(residuals.highest, is_row, np.inf)[:, None]
    log_total = _load_rows(residuals.log_total, is_row, 0.0)[:, None]
    delta = _load_rows(delta_ref, is_row, 0.0)[:, None]

    def step(j: Any, dq: Array, is_masked: bool) -> Array:
        start = order_ref[j] * block.keys
        keys, is_key = _rows(start, block.keys, program.key_length)
        is_key = is_key if is_masked else None
        k = _load_from(k_ref, start, block.keys, program.dim, is_key)
        v = _load_from(v_ref, start, block.keys, program.dim_v, is_key)
        pair = _ask(program, operands, is_masked, b, h, rows[:, None], keys[None])
        s, slope = _scores(program, plgpu.dot(q, k.T), pair, None if is_key is None else is_key[None])
        ds, _ = _dscores(program, s, slope, pair, plgpu.dot(dout, v.T), (highest, log_total, delta))
        if is_masked:
            k = _without(k, _not_finite(k))
        return dq + plgpu.dot(ds.astype(k.dtype), k)

    dq = _walk(partial_ref[...], jnp.int32(0), walked_ref[...], step, jnp.zeros(q.shape, jnp.float32))
    _store(dq_ref, dq * program.scale, program.dim, is_row)


def dkv_kernel(
    program: Program,
    partial_ref: Any,
    walked_ref: Any,
    order_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    operands: OfPair,
    dout_ref: Any,
    residuals: Residuals,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    """The gradients of a tile of keys and values, which a group of heads shares."""
    # Tiles are [keys, queries] here, so that no product has to turn one.
    block = program.blocks.dkv
    kv_head, b = pl.program_id(1), pl.program_id(2)
    keys, is_key = _rows(pl.program_id(0) * block.keys, block.keys, program.key_length)
    k = _load(k_ref, block.keys, program.dim, is_key)
    v = _load(v_ref, block.keys, program.dim_v, is_key)

    def of_head(g: Any, carry: Any) -> Any:
        # One list may serve all heads.
        of_list = 0 if order_ref.shape[0] == 1 else g

        def step(i: Any, carry: Any, is_masked: bool) -> Any:
            dk, dv = carry
            start = order_ref[of_list, i] * block.queries
            rows, is_row = _rows(start, block.queries, program.query_length)
            span = pl.ds(start, block.queries)
            q = _load(q_ref.at[span, g, slice(None)], block.queries, program.dim, is_row)
            dout = _load(dout_ref.at[span, g, slice(None)], block.queries, program.dim_v, is_row)
            # A row that is not there has no keys.
            highest = _load_rows(residuals.highest.at[g, span], is_row, np.inf)[None]
            log_total = _load_rows(residuals.log_total.at[g, span], is_row, 0.0)[None]
            delta = _load_rows(delta_ref.at[g, span], is_row, 0.0)[None]
            pair = _ask(program, operands, is_masked, b, kv_head * program.group + g, rows[None], keys[:, None])
            s, slope = _scores(program, plgpu.dot(k, q.T), pair, None)
            ds, weights = _dscores(program, s, slope, pair, plgpu.dot(v, dout.T), (highest, log_total, delta))
            return (
                dk + plgpu.dot(ds.astype(q.dtype), q),
                dv + plgpu.dot(weights.astype(dout.dtype), dout),
            )

        return _walk(partial_ref[of_list], jnp.int32(0), walked_ref[of_list], step, carry)

    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    # A loop of one round is none.
    dk, dv = of_head(jnp.int32(0), carry) if program.group == 1 else lax.fori_loop(0, program.group, of_head, carry)
    _store(dk_ref, dk * program.scale, program.dim, is_key)
    _store(dv_ref, dv, program.dim_v, is_key)


def _dscores(
    program: Program, s: Array, slope: Array | None, pair: OfPair, dweights: Array, of_rows: tuple[Any, Any, Any]
) -> tuple[Array, Array]:
    """The gradient of the products before the scale, and the weights as they multiply the values."""
    highest, log_total, delta = of_rows
    weights = jnp.exp2((s - highest) * program.unit - log_total)
    dropped = weights
    if pair.factor is not None:
        dropped, dweights = weights * pair.factor, dweights * pair.factor
    ds = weights * (dweights - delta)
    if slope is not None:
        ds = ds * slope
    if pair.allowed is not None:
        # What is masked gets no gradient, though the cotangent of a row without keys be NaN.
        ds = jnp.where(weights != 0, ds, 0.0)
    return ds, dropped
