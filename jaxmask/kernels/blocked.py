"""Attention over the tiles of a mask that are not EMPTY, in plain JAX, on any platform.

The queries are cut into tiles. For each tile, ranges of consecutive keys cover the keys that it may attend to. All
ranges have the same static number of keys. In a range whose tiles are all FULL, the scores are used as they are. In any
other, the mask decides pair by pair. Softmax is computed online (https://arxiv.org/abs/1805.02867), and the backward
pass computes the weights again from the log-sum-exp (https://arxiv.org/abs/2205.14135), so that memory is O(length)
both ways.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.tree_util import Partial
from jaxtyping import Array, Float

from jaxmask import checks
from jaxmask.indices import Index, as_4d, iota
from jaxmask.kernels import scores
from jaxmask.kernels.call import Arguments, Call, checked_call
from jaxmask.kernels.dropout import Dropout
from jaxmask.kernels.key_ranges import Ints, KeyRanges, key_ranges_of
from jaxmask.kernels.linear import Linear
from jaxmask.mask import Mask

Carry = TypeVar("Carry")
Tree = TypeVar("Tree")
# What a function closes over: arrays of floats, which have gradients, and others.
Closure = tuple[list[Any], list[Any]]
# By whether the function applies the mask.
Closures = dict[bool, Closure]
# Whether the mask is applied, known at trace time or in the program.
IsMasked = bool | Array


class _Place(NamedTuple):
    """The first example, head of keys, query and key of a step."""

    example: Index
    kv_head: Index
    query: Index
    key: Index


@dataclass(frozen=True)
class _Program:
    """What the compiled program is specialised on.

    A step takes so many examples, heads of keys, queries and keys. The query heads that share a head of keys are a
    group.
    """

    examples: int
    kv_heads: int
    group: int
    queries: int
    keys: int
    # The axes of key and value.
    key: str
    value: str
    # Factors of the query and of its products with the keys. Together they are the scale. The first is faster, the
    # second is exact in half precision.
    before: float
    after: float
    # Functions of the products and a part of the bias that return what softmax takes, and which keys are read: with the
    # mask, and without it.
    masked: Callable[..., Any]
    unmasked: Callable[..., Any]
    # Whether these change no product but those that they mask, so that there is nothing to differentiate.
    only_masks: bool
    # Whether its loops are of static length, so that JAX can differentiate them in reverse.
    is_sloped: bool = False

    def part(self, axes: str, x: Array, place: _Place) -> tuple[tuple[Array, ...], tuple[int, ...]]:
        """The start and the sizes of the part of ``x`` that a step takes. An axis of size 1 serves every index."""
        whole = {
            "b": (place.example, self.examples),
            "n": (place.kv_head, self.kv_heads),
            "h": (place.kv_head * self.group, self.kv_heads * self.group),
            "q": (place.query, self.queries),
            "k": (place.key, self.keys),
        }
        parts = [whole.get(axis, (0, size)) if size > 1 else (0, 1) for axis, size in zip(axes, x.shape, strict=True)]
        # All of one type, in 64-bit mode too.
        return tuple(jnp.asarray(start, jnp.int32) for start, _ in parts), tuple(size for _, size in parts)

    def take(self, axes: str, x: Array, place: _Place) -> Array:
        return lax.dynamic_slice(x, *self.part(axes, x, place), allow_negative_indices=False)

    def put(self, axes: str, total: Array, part: Array, place: _Place) -> Array:
        return lax.dynamic_update_slice(total, part, self.part(axes, total, place)[0], allow_negative_indices=False)

    def add(self, axes: str, total: Array, part: Array, place: _Place) -> Array:
        return self.put(axes, total, self.take(axes, total, place) + part, place)

    def rows(self, x: Array, place: _Place) -> Array:
        """A tile of queries, or of an array with a row for each query, as ``[examples, kv_heads, group * queries, …]``.

        An axis of its ranges for the group would make XLA copy all scores.
        """
        x = self.take("bqhd"[: x.ndim], x, place)
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.kv_heads, self.group, *x.shape[3:]), 1, 3)
        return x.reshape(*x.shape[:2], self.group * self.queries, *x.shape[4:])

    def factor(self, dropout: Dropout, dtype: Any, place: _Place) -> Array:
        """What dropout multiplies the weights of a step by, ``[examples, kv_heads, group * queries, keys]``."""
        heads = self.kv_heads * self.group
        starts = place.example, place.kv_head * self.group, place.query, place.key
        sizes = self.examples, heads, self.queries, self.keys
        b, h, q, kv = (start + iota(size, axis) for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)))
        factor = jnp.broadcast_to(dropout.factor(dtype, b, h, q, kv), sizes)
        return factor.reshape(self.examples, self.kv_heads, self.group * self.queries, self.keys)

    def put_rows(self, total: Array, rows: Array, place: _Place) -> Array:
        rows = rows.reshape(self.examples, -1, self.queries, *rows.shape[3:]).swapaxes(1, 2).astype(total.dtype)
        return self.put("bqhd"[: total.ndim], total, rows, place)


def _arrange(x: Array, axes: str, to: str) -> Array:
    return x.transpose([axes.index(axis) for axis in to])


def _multiply(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, preferred_element_type=checks.at_least_float32(a.dtype))


def _for_each_tile(
    program: _Program, ranges: KeyRanges, step: Callable[[Carry, _Place, KeyRanges], Carry], carry: Carry
) -> Carry:
    """Fold ``step(carry, place, ranges of the tile)`` over the tiles of queries."""
    shape = ranges.range_count.shape
    at = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    flat = KeyRanges(*(x.reshape(-1, *x.shape[3:]) for x in ranges))

    def body(i: Any, carry: Carry) -> Carry:
        of_tile = KeyRanges(*(at(x, i) for x in flat))
        # int32 in 64-bit mode too, as the starts of the ranges are.
        rest, steps = jnp.asarray(i, jnp.int32), list[Index]()
        for size in reversed(shape):
            # An axis of size 1 costs the compiler nothing.
            steps.append(0 if size == 1 else lax.rem(rest, np.int32(size)))
            rest = rest if size == 1 else lax.div(rest, np.int32(size))
        tile, kv_head, example = steps
        place = _Place(example * program.examples, kv_head * program.kv_heads, tile * program.queries, 0)
        return step(carry, place, of_tile)

    return lax.fori_loop(0, math.prod(shape), body, carry)


def _for_each_range(
    program: _Program, ranges: KeyRanges, step: Callable[[Carry, Ints, IsMasked], Carry], carry: Carry
) -> Carry:
    """Fold ``step(carry, start, is_masked)`` over the ranges of keys of a tile of queries."""
    starts, partial_count, range_count = ranges
    if starts.shape[0] == 1:
        return step(carry, starts[0], True)
    at = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)

    def body(i: Any, carry: Carry) -> Carry:
        return step(carry, at(starts, i), i < partial_count)

    if not program.is_sloped:
        return lax.fori_loop(0, range_count, body, carry)

    @jax.checkpoint
    def maybe(i: Any, carry: Carry) -> Carry:
        return lax.cond(i < range_count, body, lambda _, carry: carry, i, carry)

    return lax.fori_loop(0, starts.shape[0], maybe, carry)


def _scores(
    program: _Program,
    key: Array,
    value: Array,
    bias: Array | None,
    arrays: Closures,
    tile_place: _Place,
    rows: Array,
    start: Ints,
    is_masked: IsMasked,
) -> tuple[_Place, Callable[..., tuple[Array, tuple[Array, Array]]], tuple[Any, ...]]:
    """Return the range's position, a scoring function and its arguments.

    The function returns the scores ``[examples, kv_heads, group * queries, keys]``, which are differentiated in its
    arguments, and the keys and values of the range, zero where no query of the tile may attend: a weight of 0 would not
    take NaN away.
    """
    length = key.shape[program.key.index("k")]
    # A range that would end beyond the last key begins earlier. The mask leaves out the keys before its start.
    place = tile_place._replace(key=jnp.minimum(start, length - program.keys))
    keys, values = program.take(program.key, key, place), program.take(program.value, value, place)
    products = _multiply(f"bnqd,{program.key}->bnqk", rows, keys) * program.after
    part = None if bias is None else program.take("bhqk", bias, place)
    # Varying over the axes of a shard_map, as those for which the function was traced.
    zero = jnp.zeros_like(products, jnp.int32, ())
    indices = [index + zero for index in (*place, start)]

    def score(products: Array, part: Array | None, floats: dict[bool, list[Any]]) -> Any:
        def finish(products: Array, keys: Array, values: Array, *, is_masked: bool) -> Any:
            function, (_, others) = program.masked if is_masked else program.unmasked, arrays[is_masked]
            flat = products.reshape(program.examples, -1, program.queries, program.keys)
            finished, is_read = function(floats[is_masked], others, flat, part, *indices)
            if is_masked:
                keys, values = (
                    jnp.where(_arrange(is_read[..., None], "bnkd", axes), x, 0)
                    for axes, x in ((program.key, keys), (program.value, values))
                )
            return finished.reshape(products.shape), (keys, values)

        masked, unmasked = (partial(finish, is_masked=yes) for yes in (True, False))
        if is_masked is True:
            return masked(products, keys, values)
        # One loop with a branch compiles faster than two loops.
        return lax.cond(is_masked, masked, unmasked, products, keys, values)

    return place, score, (products, part, {yes: floats for yes, (floats, _) in arrays.items()})


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(program: _Program, *operands: Any) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """The output and the log-sum-exp, ``[batch, q, heads(, dim)]``, of the operands of :func:`_forward`.

    Beside them is what the backward pass needs beside the operands. It has no derivative of its own: it follows from
    the operands, and the definitions that are differentiated again compute it again.
    """
    return _forward(program, *operands)


@_run.defjvp
def _differentiate(program: _Program, operands: Any, tangents: Any) -> Any:
    results, residuals = _run(program, *operands)
    leaves, structure = jax.tree.flatten(operands)
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    moving = [t for t, yes in zip(jax.tree.leaves(tangents), is_float, strict=True) if yes]
    # The functions below outlive this trace, and may hold none of its arrays.
    count, sloped = len(leaves), replace(program, is_sloped=True)

    def floats(leaves: Any) -> list[Any]:
        return [x for x, yes in zip(leaves, is_float, strict=True) if yes]

    def run(program: _Program, constants: Any) -> Callable[..., Any]:
        def of_floats(*values: Array) -> Any:
            rest = iter(values)
            merged = [next(rest) if yes else x for x, yes in zip(constants, is_float, strict=False)]
            return _forward(program, *jax.tree.unflatten(structure, merged))[0]

        return of_floats

    def forward(program: _Program, constants: Any, arrays: Any) -> Any:
        return jax.jvp(run(program, constants), floats(constants[:count]), list(arrays))[1]

    def backward(constants: Any, cotangents: Any) -> Any:
        operands = jax.tree.unflatten(structure, constants[:count])
        found = _backward(program, (*operands, *constants[count:]), cotangents)
        return jax.tree.leaves(found)

    def backward_again(constants: Any, cotangents: Any) -> Any:
        return jax.vjp(run(sloped, constants), *floats(constants[:count]))[1](tuple(cotangents))

    linear = Linear(partial(forward, program), backward, partial(forward, sloped), backward_again)
    dresults = tuple(linear((*leaves, *residuals), moving, results))
    return (results, residuals), (dresults, tuple(jnp.zeros_like(x) for x in residuals))


def _forward(
    program: _Program,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    sinks: Array | None,
    dropout: Dropout | None,
    arrays: Closures,
    ranges: KeyRanges,
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    """The results, and what the backward pass needs beside the operands.

    ``arrays`` is what the functions of the program close over, by whether they apply the mask.
    """
    accumulated = checks.at_least_float32(query.dtype)

    def tile(carry: Any, tile_place: _Place, ranges: KeyRanges) -> Any:
        rows = program.rows(query, tile_place) * query.dtype.type(program.before)

        def step(carry: Any, start: Ints, is_masked: IsMasked) -> Any:
            place, score, arguments = _scores(program, key, value, bias, arrays, tile_place, rows, start, is_masked)
            s, (_, v) = score(*arguments)
            highest, *sums = carry
            new_highest = jnp.maximum(highest, s.max(-1))
            weights = jnp.exp(s - new_highest[..., None])
            total = weights.sum(-1)
            if dropout is not None:
                weights = weights * program.factor(dropout, weights.dtype, place)
            new_sums = total, _multiply(f"bnqk,{program.value}->bnqd", weights.astype(v.dtype), v)
            if sums:
                decay = jnp.exp(highest - new_highest)
                new_sums = sums[0] * decay + new_sums[0], sums[1] * decay[..., None] + new_sums[1]
            return new_highest, *new_sums

        highest = jnp.full_like(rows, scores.lowest(accumulated), accumulated, rows.shape[:-1])
        sums = jnp.zeros_like(highest), jnp.zeros_like(rows, accumulated, (*highest.shape, value.shape[-1]))
        # A single range needs no sums of those before.
        highest, total, out = _for_each_range(
            program, ranges, step, (highest, *(sums if ranges.starts.shape[0] > 1 else ()))
        )
        if sinks is not None:
            sink = program.take("h", sinks, tile_place).reshape(1, program.kv_heads, program.group)
            sink = jnp.repeat(sink, program.queries, -1)
            new_highest = jnp.maximum(highest, sink)
            decay = jnp.exp(highest - new_highest)
            highest, total, out = new_highest, total * decay + jnp.exp(sink - new_highest), out * decay[..., None]
        out = out / jnp.where(total > 0, total, 1)[..., None]
        results = zip(carry, (out, highest, total), strict=True)
        return tuple(program.put_rows(of_all, rows, tile_place) for of_all, rows in results)

    of_rows = jnp.zeros_like(query, accumulated, query.shape[:3])
    out = jnp.zeros_like(query, accumulated, (*of_rows.shape, value.shape[3]))
    out, highest, total = _for_each_tile(program, ranges, tile, (out, of_rows, of_rows))
    has_keys = total > 0
    log_total = jnp.log(jnp.where(has_keys, total, 1))
    lse = jnp.where(has_keys, highest + log_total, -jnp.inf)
    # The backward pass has the output as it was before it is rounded, or gradients of half precision would suffer. It
    # has both parts of the log-sum-exp, for the sum would lose the second where the first is a large number.
    return (out.astype(value.dtype), lse), (out, highest, log_total)


def _backward(program: _Program, residuals: Any, cotangents: Any) -> Any:
    query, key, value, bias, sinks, dropout, arrays, ranges, out, highest, log_total = residuals
    dout, dlse = cotangents
    accumulated = log_total.dtype
    # A product, for on a CPU XLA takes tens of times as long for a sum over the last axis of an array of this shape.
    delta = jnp.einsum("bqhd,bqhd->bqh", dout.astype(accumulated), out, precision="highest") - dlse

    def tile(carry: Any, tile_place: _Place, ranges: KeyRanges) -> Any:
        rows = program.rows(query, tile_place) * query.dtype.type(program.before)
        drows, row_delta, row_highest, row_log_total = (
            program.rows(x, tile_place) for x in (dout, delta, highest, log_total)
        )
        # The large one of these products is on the right as it is: on the left, it would have to be transposed.
        rows_across, drows_across = rows.astype(accumulated).swapaxes(2, 3), drows.swapaxes(2, 3)

        def step(carry: Any, start: Ints, is_masked: IsMasked) -> Any:
            dq, dk, dv, dbias, dfloats = carry
            place, score, arguments = _scores(program, key, value, bias, arrays, tile_place, rows, start, is_masked)
            pull = None
            if program.only_masks:
                s, (k, v) = score(*arguments)
            else:
                s, pull, (k, v) = jax.vjp(score, *arguments, has_aux=True)
            weights = jnp.exp(s - row_highest[..., None] - row_log_total[..., None])
            dweights = _multiply(f"bnqd,{program.value}->bnqk", drows, v)
            dropped = weights
            if dropout is not None:
                factor = program.factor(dropout, weights.dtype, place)
                dropped, dweights = weights * factor, dweights * factor
            # What is masked gets no gradient, though the cotangent of a row without keys be NaN.
            ds = jnp.where(weights != 0, weights * (dweights - row_delta[..., None]), 0)
            if pull is not None:
                ds, dpart, dpart_floats = pull(ds)
                dfloats = jax.tree.map(jnp.add, dfloats, dpart_floats)
                if bias is not None:
                    dbias = program.add("bhqk", dbias, dpart, place)
            ds = ds * program.after
            dq = dq + _multiply(f"bnqk,{program.key}->bnqd", ds, k.astype(ds.dtype))
            dropped = dropped.astype(dout.dtype)
            dk = program.add("bndk", dk, _multiply("bndq,bnqk->bndk", rows_across, ds), place)
            dv = program.add("bndk", dv, _multiply("bndq,bnqk->bndk", drows_across, dropped), place)
            return dq, dk, dv, dbias, dfloats

        total, *sums = carry
        dq, *sums = _for_each_range(program, ranges, step, (jnp.zeros_like(rows, accumulated), *sums))
        return program.put_rows(total, dq * program.before, tile_place), *sums

    def zeros(x: Array) -> Array:
        return jnp.zeros_like(x, checks.at_least_float32(x.dtype))

    of_program = {is_masked: floats for is_masked, (floats, _) in arrays.items()}
    across = _arrange(key, program.key, "bndk"), _arrange(value, program.value, "bndk")
    carry = jnp.zeros_like(query), *jax.tree.map(zeros, (*across, bias, of_program))
    dq, dk, dv, *sums = _for_each_tile(program, ranges, tile, carry)
    dk, dv = _arrange(dk, "bndk", program.key), _arrange(dv, "bndk", program.value)
    dsinks = None if sinks is None else -(jnp.exp(sinks[None, None] - highest - log_total) * delta).sum((0, 1))
    inputs = key, value, bias, of_program, sinks
    cotangents = dk, dv, *sums, dsinks
    dk, dv, dbias, dfloats, dsinks = jax.tree.map(lambda x, like: x.astype(like.dtype), cotangents, inputs)
    return dq, dk, dv, dbias, dsinks, None, {is_masked: (dfloats[is_masked], None) for is_masked in arrays}, None


def _close(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], Closure]:
    """Return ``function`` as one that takes the arrays it closes over, and these arrays.

    A mask or a bias may close over arrays of the program around it, which differentiation must see.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    consts = [jnp.asarray(const) for const in closed.consts]
    jaxpr = closed.jaxpr  # without its constants, which may be tracers that nothing may hold
    is_float = [jnp.issubdtype(const.dtype, jnp.floating) for const in consts]
    floats, others = ([x for x, yes in zip(consts, is_float, strict=True) if yes == kind] for kind in (True, False))

    def call(floats: list[Any], others: list[Any], *arguments: Any) -> Any:
        remaining = {True: iter(floats), False: iter(others)}
        consts = [next(remaining[yes]) for yes in is_float]
        return tuple(jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*jax.tree.leaves(arguments)))

    return call, (floats, others)


def attention(
    query: Float[Array | np.ndarray, "batch q heads dim"],
    key: Float[Array | np.ndarray, "batch kv kv_heads dim"],
    value: Float[Array | np.ndarray, "batch kv kv_heads dim_v"],
    mask: Mask,
    *,
    block: int | tuple[int, int] | None = None,
    **arguments: Unpack[Arguments],
) -> Any:
    """Attention in time O(tiles that are not EMPTY) and memory O(length), with gradients.

    Args:
        query, key, value, mask: as in :func:`jaxmask.attention`.
        block: how many queries are in a tile, and how many keys in a range, or one number for both; static. The default
            is 256 queries, few enough that a narrow window wastes little, and all the keys that they may attend to
            where that is known to be at most 1,280, else 512 at a time; for a single query, 128 at a time.
        **arguments: the others of :func:`jaxmask.attention`.

    Returns:
        As :func:`jaxmask.attention`.

    >>> from jaxmask import Causal
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> out, lse = attention(x, x, x, Causal(), scale=0.0, return_residual=True)
    >>> print(out.shape, jnp.exp(lse)[0, :, 0])
    (1, 4, 2, 8) [1. 2. 3. 4.]
    """
    return attend(checked_call(query, key, value, mask, **arguments), None if block is None else checks.block(block))


@partial(jax.jit, static_argnames="block")
def attend(call: Call, block: tuple[int, int] | None = None) -> Any:
    """What a call whose arguments are checked asks for."""
    program, operands = _prepared(call, block)
    results: tuple[Array, Array]
    results, _ = _run(program, *operands)
    out, lse = (x[:, : call.query.shape[1]] for x in results)
    return (out, lse) if call.return_residual else out


def sums(call: Call) -> tuple[Array, Array, Array]:
    """Attention to a part of the keys, for a caller that joins it to others and has a derivative of its own.

    Returns:
        The output, in at least float32, and the two parts of the log-sum-exp: the highest score of each query, and the
        logarithm of the sum of ``exp(score - highest)``; that is ``-inf`` where a query attends to no key.
    """
    program, operands = _prepared(call, None)
    (_, lse), residuals = _forward(program, *operands)
    out, highest, log_total = (x[:, : call.query.shape[1]] for x in residuals)
    return out, highest, jnp.where(jnp.isneginf(lse[:, : call.query.shape[1]]), -jnp.inf, log_total)


def pulled_back(
    to_call: Callable[[Tree], Call], floats: Tree, results: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
) -> Tree:
    """The gradients of attention to all keys by way of a part of them. The weights follow from ``results``.

    Args:
        to_call: the call of the part, from arrays of floats.
        floats: these arrays.
        results: as :func:`sums` has them, of all keys, where a query without any has a logarithm of 0.
        cotangents: of the output and of the log-sum-exp, for all keys.
    """
    program, operands = _prepared(to_call(floats), None)
    rows = operands[0].shape[1] - results[0].shape[1]
    # In rows that only fill a tile every weight is 0.
    fills = 0, float(jnp.finfo(results[1].dtype).max), 0
    filled = (_fill(x, rows, value) for x, value in zip(results, fills, strict=True))
    gradients = _backward(program, (*operands, *filled), tuple(_fill(x, rows) for x in cotangents))
    _, pull = jax.vjp(lambda floats: _floats(_prepared(to_call(floats), None)[1]), floats)
    return pull(_floats(gradients))[0]


def _fill(x: Array, rows: int, value: float = 0) -> Array:
    """An array ``[batch, q, …]`` with so many more queries."""
    return jnp.pad(x, [(0, rows if axis == 1 else 0) for axis in range(x.ndim)], constant_values=value)


def _floats(operands: Any) -> Any:
    """The operands of :func:`_forward` that have gradients, or these."""
    *arrays, _, closures, _ = operands
    return arrays, {is_masked: floats for is_masked, (floats, _) in closures.items()}


def _prepared(call: Call, block: tuple[int, int] | None) -> tuple[_Program, tuple[Any, ...]]:
    """The program of a call, and the operands of :func:`_forward`."""
    call = vary_alike(call)
    query, key, value, bias = call.query, call.key, call.value, call.bias
    (batch, query_length, heads, _), kv_heads = query.shape, key.shape[2]
    group = heads // kv_heads
    ranges, queries, keys = key_ranges_of(call, block)
    has_many_tiles = ranges.range_count.shape[2] > 1
    # On a CPU, the scores of one example at a time stay in the cache.
    by_example = ranges.range_count.shape[0] > 1 or (
        query_length > 1 and call.platform == "cpu" and not call.is_left_to_xla
    )
    by_head = ranges.range_count.shape[1] > 1
    # How many steps the examples and the heads of keys take, and how many of them are in a step.
    steps = batch if by_example else 1, kv_heads if by_head else 1
    examples, kv_heads_in_step = batch // steps[0], kv_heads // steps[1]
    ranges = KeyRanges(*(jnp.broadcast_to(x, (*steps, *x.shape[2:])) for x in ranges))

    def finish(products: Array, part: Array | None, *indices: Array, is_masked: bool) -> tuple[Array, Array]:
        example, kv_head, first_query, first_key, start = indices
        b = example + iota(examples, 0) if by_example else iota(batch, 0)
        h = kv_head * group + iota(group, 1) if by_head else iota(heads, 1)
        # Rows that only fill a tile are read as the last query: a bias may have nothing to say beyond it.
        q = call.positions.of_queries(b, jnp.minimum(first_query + iota(queries, 2), query_length - 1))
        kv = first_key + iota(keys, 3)
        if isinstance(bias, Partial):
            part = bias(b, h, q, call.positions.of_keys(b, kv))
        allowed, is_read = None, jnp.ones((1, 1, 1), bool)
        if is_masked:
            allowed = as_4d(jnp.asarray(call.mask.allows(b, h, q, kv)))
            if ranges.starts.shape[-1] > 1:
                allowed = allowed & (kv >= start)  # the last range may overlap with the one before
            is_read = scores.read_keys(allowed, kv_heads_in_step)
        return scores.finish(products, call.logits_soft_cap, part, allowed).astype(products.dtype), is_read

    shape = examples, kv_heads_in_step * group, queries, keys
    products = jnp.zeros_like(query, checks.at_least_float32(query.dtype), shape)
    array = part = None
    if bias is not None and not isinstance(bias, Partial):
        array = jnp.asarray(bias)
        sizes = tuple(size if length > 1 else 1 for size, length in zip(shape, array.shape, strict=True))
        part = jnp.zeros_like(array, shape=sizes)
        if array.shape[2] > 1:
            array = jnp.pad(array, ((0, 0), (0, 0), (0, -query_length % queries), (0, 0)))
    zeros = [jnp.zeros_like(query, jnp.int32, ())] * 5
    unmasked, masked = (_close(partial(finish, is_masked=yes), products, part, *zeros) for yes in (False, True))

    is_exact = query.dtype.itemsize >= 4
    program = _Program(
        examples=examples,
        kv_heads=kv_heads_in_step,
        group=group,
        queries=queries,
        keys=keys,
        # Where many tiles of queries read them, they are transposed once. One tile may read a small part of a cache.
        key="bndk" if has_many_tiles else "bknd",
        value="bnkd" if has_many_tiles else "bknd",
        before=call.scale if is_exact else 1.0,
        after=1.0 if is_exact else call.scale,
        masked=masked[0],
        unmasked=unmasked[0],
        only_masks=call.logits_soft_cap is None and bias is None,
    )
    query = _fill(query, -query_length % queries)
    key, value = _arrange(key, "bknd", program.key), _arrange(value, "bknd", program.value)
    arrays = {False: unmasked[1], True: masked[1]}
    sinks = None if call.sinks is None else jnp.asarray(call.sinks, products.dtype)
    return program, (query, key, value, array, sinks, call.dropout, arrays, ranges)


def vary_alike(tree: Tree) -> Tree:
    """Make all arrays vary over the axes of a ``shard_map`` over which any does, because loops will add them up."""
    zero = sum((jnp.zeros_like(leaf, jnp.int32, ()) for leaf in jax.tree.leaves(tree)), start=jnp.int32(0))
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)
