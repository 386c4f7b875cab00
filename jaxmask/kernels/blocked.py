"""Attention over the tiles of a mask that are not EMPTY, in plain JAX, on any platform.

The queries are cut into tiles. For each of them, strips of consecutive keys, all of one static width, cover the keys
that it may attend to. In a strip whose tiles are all FULL the scores are used as they are; in any other, the mask
decides in place. Softmax is computed online (https://arxiv.org/abs/1805.02867), and the backward pass computes the
weights again from the log-sum-exp (https://arxiv.org/abs/2205.14135), so that memory is O(length) both ways.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from jaxmask import checks, indices
from jaxmask.indices import iota
from jaxmask.kernels import scores
from jaxmask.kernels.call import Bias, Call, checked_call
from jaxmask.kernels.key_ranges import Strips, strips_of
from jaxmask.mask import Mask
from jaxmask.positions import KeyPositions, Offset, QueryPositions


class _Place(NamedTuple):
    """The first example, head of keys, query and key of a step."""

    example: Any
    kv_head: Any
    query: Any
    key: Any


@dataclass(frozen=True)
class _Program:
    """What the compiled program is specialised on.

    A step takes some examples, heads of keys, queries and keys. Queries that share a head of keys are a group.
    """

    examples: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    # The axes of key and value.
    key: str
    value: str
    # Factors of the query and of its products with the keys, together the scale: the first is faster, the other exact.
    before: float
    after: float
    # The products and a part of the bias to what softmax takes: where the mask must decide, and where it need not.
    decided: Callable[..., Any]
    full: Callable[..., Any]

    def part(self, axes: str, x: Any, at: _Place) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Where the part of ``x`` begins that a step takes, and its sizes. A size of 1 serves all."""
        whole = {
            "b": (at.example, self.examples),
            "n": (at.kv_head, self.kv_heads),
            "h": (at.kv_head * self.group, self.kv_heads * self.group),
            "q": (at.query, self.queries),
            "k": (at.key, self.keys),
        }
        parts = [whole.get(axis, (0, size)) if size > 1 else (0, 1) for axis, size in zip(axes, x.shape, strict=True)]
        # Of one type all, in 64-bit mode too.
        return tuple(jnp.asarray(start, jnp.int32) for start, _ in parts), tuple(size for _, size in parts)

    def take(self, axes: str, x: Any, at: _Place) -> Any:
        return lax.dynamic_slice(x, *self.part(axes, x, at), allow_negative_indices=False)

    def put(self, axes: str, total: Any, part: Any, at: _Place) -> Any:
        return lax.dynamic_update_slice(total, part, self.part(axes, total, at)[0], allow_negative_indices=False)

    def add(self, axes: str, total: Any, part: Any, at: _Place) -> Any:
        return self.put(axes, total, self.take(axes, total, at) + part, at)

    def rows(self, x: Any, at: _Place) -> Any:
        """A tile of queries, or of what there is for each, as ``[examples, kv_heads, group * queries, …]``.

        An axis of its own for the group would make XLA copy all scores.
        """
        x = self.take("bqhd"[: x.ndim], x, at)
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.kv_heads, self.group, *x.shape[3:]), 1, 3)
        return x.reshape(*x.shape[:2], self.group * self.queries, *x.shape[4:])

    def put_rows(self, total: Any, rows: Any, at: _Place) -> Any:
        rows = rows.reshape(self.examples, -1, self.queries, *rows.shape[3:]).swapaxes(1, 2).astype(total.dtype)
        return self.put("bqhd"[: total.ndim], total, rows, at)


def _arrange(x: Any, axes: str, to: str) -> Any:
    return x.transpose([axes.index(axis) for axis in to])


def _multiply(axes: str, a: Any, b: Any) -> Any:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _for_each_tile(program: _Program, strips: Strips, step: Callable[..., Any], carry: Any) -> Any:
    """Fold ``step(carry, at, own strips)`` over the tiles of queries."""
    shape = strips.count.shape

    def body(i: Any, carry: Any) -> Any:
        # int32 in 64-bit mode too, as the first keys of the strips are.
        example, kv_head, tile = (x.astype(jnp.int32) for x in jnp.unravel_index(i, shape))
        at = _Place(example * program.examples, kv_head * program.kv_heads, tile * program.queries, 0)
        return step(carry, at, Strips(*(x[example, kv_head, tile] for x in strips)))

    return lax.fori_loop(0, int(np.prod(shape)), body, carry)


def _for_each_strip(own: Strips, step: Callable[..., Any], carry: Any) -> Any:
    """Fold ``step(carry, first key, must decide)`` over the strips of a tile of queries."""
    if own.first.shape[0] == 1:
        return step(carry, own.first[0], True)
    carry = lax.fori_loop(0, own.decided, lambda j, carry: step(carry, own.first[j], True), carry)
    return lax.fori_loop(own.decided, own.count, lambda j, carry: step(carry, own.first[j], False), carry)


def _scores(program: _Program, inputs: Any, at: _Place, rows: Any, first: Any, must_decide: bool) -> Any:
    """Of a strip: its place, its key, and the function to its scores, ``[…, queries, keys]``, with its arguments."""
    key, bias, arrays = inputs
    length = key.shape[program.key.index("k")]
    at = at._replace(key=jnp.minimum(first, length - program.keys))
    k = program.take(program.key, key, at)
    products = _multiply(f"bnqd,{program.key}->bnqk", rows, k) * program.after
    part = None if bias is None else program.take("bhqk", bias, at)
    call = program.decided if must_decide else program.full
    floats, others = arrays[must_decide]
    # Varying over the axes of a shard_map, as those for which the call was traced.
    nothing = jnp.zeros_like(products, jnp.int32, ())
    where = [index + nothing for index in (*at, first)]

    def change(products: Any, part: Any, floats: Any) -> Any:
        flat = products.reshape(program.examples, -1, program.queries, program.keys)
        return call(floats, others, flat, part, *where).reshape(products.shape)

    return at, k, change, (products, part, floats)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    program: _Program, query: Any, key: Any, value: Any, bias: Any, sinks: Any, arrays: Any, strips: Strips
) -> Any:
    """The output and the log-sum-exp, ``[batch, q, heads(, dim)]``.

    ``arrays`` is what the functions of the program close over, by whether the mask must decide: floats, and others.
    """
    return _forward(program, query, key, value, bias, sinks, arrays, strips)[0]


def _forward(
    program: _Program, query: Any, key: Any, value: Any, bias: Any, sinks: Any, arrays: Any, strips: Strips
) -> Any:
    accumulated = jnp.promote_types(query.dtype, jnp.float32)

    def tile(carry: Any, at: _Place, own: Strips) -> Any:
        rows = program.rows(query, at) * query.dtype.type(program.before)

        def step(carry: Any, first: Any, must_decide: bool) -> Any:
            there, _, change, parts = _scores(program, (key, bias, arrays), at, rows, first, must_decide)
            s, v = change(*parts), program.take(program.value, value, there)
            most, *sums = carry
            new = jnp.maximum(most, s.max(-1))
            weights = jnp.exp(s - new[..., None])
            found = weights.sum(-1), _multiply(f"bnqk,{program.value}->bnqd", weights.astype(v.dtype), v)
            if sums:
                decay = jnp.exp(most - new)
                found = sums[0] * decay + found[0], sums[1] * decay[..., None] + found[1]
            return new, *found

        most = jnp.full_like(rows, scores.LOWEST, accumulated, rows.shape[:-1])
        sums = jnp.zeros_like(most), jnp.zeros_like(rows, accumulated, (*most.shape, value.shape[-1]))
        # One strip needs no sums of those before.
        most, total, out = _for_each_strip(own, step, (most, *(sums if own.first.shape[0] > 1 else ())))
        if sinks is not None:
            sink = program.take("h", sinks, at).reshape(1, program.kv_heads, program.group)
            sink = jnp.repeat(sink, program.queries, -1)
            new = jnp.maximum(most, sink)
            decay = jnp.exp(most - new)
            most, total, out = new, total * decay + jnp.exp(sink - new), out * decay[..., None]
        there = total > 0
        out = out / jnp.where(there, total, 1)[..., None]
        # Of a row with no keys it is infinite here, so that the backward pass finds weights of 0.
        lse = jnp.where(there, most + jnp.log(jnp.where(there, total, 1)), jnp.inf)
        return program.put_rows(carry[0], out, at), program.put_rows(carry[1], lse, at)

    shape = query.shape[:3]
    start = jnp.zeros_like(query, accumulated, (*shape, value.shape[3])), jnp.zeros_like(query, accumulated, shape)
    out, lse = _for_each_tile(program, strips, tile, start)
    # The backward pass has the output as it was before it is rounded, or gradients of half precision would suffer.
    return (out.astype(value.dtype), lse), (query, key, value, bias, sinks, arrays, strips, out, lse)


def _backward(program: _Program, residuals: Any, cotangents: Any) -> Any:
    query, key, value, bias, sinks, arrays, strips, out, lse = residuals
    dout, dlse = cotangents
    accumulated = lse.dtype
    # A product, for on a CPU XLA takes tens of times as long for a sum over the last axis of an array of this shape.
    delta = jnp.einsum("bqhd,bqhd->bqh", dout.astype(accumulated), out, precision="highest") - dlse

    def tile(carry: Any, at: _Place, own: Strips) -> Any:
        rows = program.rows(query, at) * query.dtype.type(program.before)
        drows, row_lse, row_delta = (program.rows(x, at) for x in (dout, lse, delta))
        # The large one of these products is on the right as it is: on the left, it would have to be transposed.
        rows_across, drows_across = rows.astype(accumulated).swapaxes(2, 3), drows.swapaxes(2, 3)

        def step(carry: Any, first: Any, must_decide: bool) -> Any:
            dq, dk, dv, dbias, dfloats = carry
            there, k, change, parts = _scores(program, (key, bias, arrays), at, rows, first, must_decide)
            v = program.take(program.value, value, there)
            s, pull = jax.vjp(change, *parts)
            weights = jnp.exp(s - row_lse[..., None])
            dweights = _multiply(f"bnqd,{program.value}->bnqk", drows, v)
            ds, dpart, dpart_floats = pull(weights * (dweights - row_delta[..., None]))
            ds = ds * program.after
            if bias is not None:
                dbias = program.add("bhqk", dbias, dpart, there)
            dfloats = {**dfloats, must_decide: jax.tree.map(jnp.add, dfloats[must_decide], dpart_floats)}
            dq = dq + _multiply(f"bnqk,{program.key}->bnqd", ds, k.astype(ds.dtype))
            weights = weights.astype(dout.dtype)
            dk = program.add("bndk", dk, _multiply("bndq,bnqk->bndk", rows_across, ds), there)
            dv = program.add("bndk", dv, _multiply("bndq,bnqk->bndk", drows_across, weights), there)
            return dq, dk, dv, dbias, dfloats

        total, *sums = carry
        dq, *sums = _for_each_strip(own, step, (jnp.zeros_like(rows, accumulated), *sums))
        return program.put_rows(total, dq * program.before, at), *sums

    def zeros(x: Any) -> Any:
        return jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))

    of_program = {must_decide: floats for must_decide, (floats, _) in arrays.items()}
    across = _arrange(key, program.key, "bndk"), _arrange(value, program.value, "bndk")
    start = jnp.zeros_like(query), *jax.tree.map(zeros, (*across, bias, of_program))
    dq, dk, dv, *sums = _for_each_tile(program, strips, tile, start)
    dk, dv = _arrange(dk, "bndk", program.key), _arrange(dv, "bndk", program.value)
    dsinks = None if sinks is None else -(jnp.exp(sinks - lse) * delta).sum((0, 1))
    inputs = key, value, bias, of_program, sinks
    cotangents = dk, dv, *sums, dsinks
    dk, dv, dbias, dfloats, dsinks = jax.tree.map(lambda x, like: x.astype(like.dtype), cotangents, inputs)
    return dq, dk, dv, dbias, dsinks, {must_decide: (dfloats[must_decide], None) for must_decide in arrays}, None


_run.defvjp(_forward, _backward)


def _close(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], Any]:
    """A function of the arrays that ``function`` closes over, and those arrays: floats, and others.

    For a mask or a bias may close over arrays, of the program around it too, and differentiation must see them.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in closed.consts]
    floats, others = (
        [x for x, yes in zip(closed.consts, is_float, strict=True) if yes == kind] for kind in (True, False)
    )

    def call(floats: Any, others: Any, *arguments: Any) -> Any:
        left = {True: iter(floats), False: iter(others)}
        consts = [next(left[yes]) for yes in is_float]
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(arguments))[0]

    return call, (floats, others)


def attention(
    query: Float[Array | np.ndarray, "batch q heads dim"],
    key: Float[Array | np.ndarray, "batch kv kv_heads dim"],
    value: Float[Array | np.ndarray, "batch kv kv_heads dim_v"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    sinks: Float[Array | np.ndarray, "heads"] | None = None,
    scale: float | None = None,
    offset: Offset | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    block: int | tuple[int, int] | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention in time O(tiles that are not EMPTY) and memory O(length), with gradients.

    Args:
        query, key, value, mask, bias, scale, offset, query_positions, key_positions, logits_soft_cap: as in
            :func:`jaxmask.attention`.
        sinks: a logit for each head that takes part in softmax beside those of the keys, and has no value: the
            attention sinks of gpt-oss (``modeling_gpt_oss.eager_attention_forward`` in Transformers).
        block: how many queries are in a tile, and how many keys in a strip, or one number for both; static. The default
            is 256 queries, few enough that a narrow window wastes little, and all the keys that they may attend to
            where that is known to be at most 1,280, else 512 at a time; for a single query, 128 at a time.
        return_residual: whether to return the log-sum-exp too, by which partial results over several sets of keys are
            joined: ring attention, split keys. Differentiable as well. Sinks belong to one of the parts only.

    Returns:
        ``[batch, q, heads, dim_v]`` in the dtype of the values. With ``return_residual`` also float32 (or float64)
        ``[batch, q, heads]``, the layout of ``jax.nn.dot_product_attention``; of a query that attends to nothing, and
        without sinks, it is ``-inf``.

    >>> from jaxmask import Causal
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> out, lse = attention(x, x, x, Causal(), scale=0.0, return_residual=True)
    >>> print(out.shape, jnp.exp(lse)[0, :, 0])
    (1, 4, 2, 8) [1. 2. 3. 4.]
    """
    call = checked_call(query, key, value, mask, bias, scale, offset, query_positions, key_positions, logits_soft_cap)
    if sinks is not None and checks.array("sinks", sinks, "f").shape != (query.shape[2],):
        raise ValueError(
            f"sinks must have one logit for each of the {query.shape[2]} heads, got {checks.describe(sinks)}"
        )
    out, lse = _attention(call, sinks, None if block is None else checks.block(block))
    return (out, lse) if return_residual else out


def attend(call: Call) -> Any:
    """The output alone, of a call that is checked."""
    return _attention(call, None, None)[0]


@partial(jax.jit, static_argnames="block")
def _attention(call: Call, sinks: Any, block: tuple[int, int] | None) -> Any:
    call, sinks = _vary_alike((call, sinks))
    query, key, value, bias = call.query, call.key, call.value, call.bias
    (batch, query_length, heads, _), kv_heads = query.shape, key.shape[2]
    group = heads // kv_heads
    strips, queries, keys = strips_of(call, block)
    many = strips.count.shape[2] > 1
    # On a CPU, the scores of one example at a time stay in the cache.
    apart = strips.count.shape[0] > 1 or (query_length > 1 and call.platform == "cpu")
    lists = batch if apart else 1, strips.count.shape[1]
    strips = Strips(*(jnp.broadcast_to(x, (*lists, *x.shape[2:])) for x in strips))
    examples, kv_heads_each = batch // lists[0], kv_heads // lists[1]

    def change(products: Any, part: Any, *where: Any, must_decide: bool) -> Any:
        example, kv_head, query, key, first_key = where
        b = example + iota(examples, 0) if apart else iota(batch, 0)
        h = kv_head * group + iota(group, 1) if lists[1] > 1 else iota(heads, 1)
        # Of rows that only fill a tile, the last query: a bias may have nothing to say beyond it.
        q = call.positions.of_queries(b, jnp.minimum(query + iota(queries, 2), query_length - 1))
        kv = key + iota(keys, 3)
        if callable(bias):
            part = bias(b, h, q, call.positions.of_keys(b, kv))
        allowed = None
        if must_decide:
            allowed = call.mask.allows(b, h, q, kv)
            if strips.first.shape[-1] > 1:
                allowed = allowed & (kv >= first_key)  # the last strip may overlap with the one before
        return scores.finish(products, call.logits_soft_cap, part, allowed).astype(products.dtype)

    shape = examples, kv_heads_each * group, queries, keys
    products = jnp.zeros_like(query, jnp.promote_types(query.dtype, jnp.float32), shape)
    array = part = None
    if bias is not None and not callable(bias):
        array = indices.as_4d(bias)
        sizes = tuple(size if length > 1 else 1 for size, length in zip(shape, array.shape, strict=True))
        part = jnp.zeros_like(array, shape=sizes)
        if array.shape[2] > 1:
            array = jnp.pad(array, ((0, 0), (0, 0), (0, -query_length % queries), (0, 0)))
    calls: dict[bool, Any] = {}
    arrays: dict[bool, Any] = {}
    for must_decide in (False, True):
        where = [jnp.zeros_like(query, jnp.int32, ())] * 5
        calls[must_decide], arrays[must_decide] = _close(
            partial(change, must_decide=must_decide), products, part, *where
        )

    is_exact = query.dtype.itemsize >= 4
    program = _Program(
        examples=examples,
        kv_heads=kv_heads_each,
        group=group,
        queries=queries,
        keys=keys,
        # Where many tiles of queries read them, transposed once. One tile may read but a small part of a cache.
        key="bndk" if many else "bknd",
        value="bnkd" if many else "bknd",
        before=call.scale if is_exact else 1.0,
        after=1.0 if is_exact else call.scale,
        decided=calls[True],
        full=calls[False],
    )
    query = jnp.pad(query, ((0, 0), (0, -query_length % queries), (0, 0), (0, 0)))
    key, value = _arrange(key, "bknd", program.key), _arrange(value, "bknd", program.value)
    results: tuple[Any, Any] = _run(program, query, key, value, array, sinks, arrays, strips)
    out, lse = (x[:, :query_length] for x in results)
    return out, jnp.where(lse == jnp.inf, -jnp.inf, lse)


def _vary_alike(arrays: Any) -> Any:
    """Arrays that all vary over the axes of a ``shard_map`` over which any does, for loops will add them up."""
    nothing = sum((jnp.zeros_like(leaf, jnp.int32, ()) for leaf in jax.tree.leaves(arrays)), start=jnp.int32(0))
    return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), arrays)
