"""Attention with any mask in a Pallas kernel for GPU, by Triton: block-sparse, forward and backward.

Each program takes a tile of queries, a head and an example. It walks the tiles of keys that are not EMPTY, the PARTIAL
ones first, and in these the mask decides pair by pair, in the kernel. Softmax is online, in base 2. The backward pass
has a program for each tile of queries, which gives ``dq``, and one for each tile of keys, which gives ``dk`` and ``dv``
and sums over the queries' heads that share a head of keys. No array of all pairs is written.

Source: FlashAttention-2 (https://arxiv.org/abs/2307.08691), and its walk of lists of tiles FlexAttention
(https://arxiv.org/abs/2412.05496). Few queries divide their keys over programs: FlashDecoding
(https://pytorch.org/blog/flash-decoding).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.tree_util import Partial
from jaxtyping import Array

from jaxmask import checks
from jaxmask.indices import lookup
from jaxmask.kernels import blocked, scores
from jaxmask.kernels.call import Call
from jaxmask.kernels.gpu_blocks import Block, Blocks, blocks_for
from jaxmask.kernels.pairwise import UnsupportedError, trace
from jaxmask.kernels.tile_lists import TileLists, of_groups, without_full_end

_LOG2E = math.log2(math.e)
# What the maximum of a row starts from, so that a masked score has a weight of exactly 0.
_LOWEST = scores.lowest(jnp.float32)
# Programs that keep a GPU busy, and the fewest tiles of keys that are worth a program of their own.
_PROGRAMS, _FEWEST_TILES = 256, 4
# The largest number of elements that an int32 can address.
_ADDRESSABLE = 2**31
_MOST_DIM = 256


@dataclass(frozen=True, eq=False)
class _Program:
    """What the kernels are specialised on. It holds no array.

    Args:
        query_length, key_length, dim, dim_v: the sizes of the arrays.
        group: how many heads of queries share a head of keys.
        is_grouped: whether the forward pass has a group of heads in each tile of queries, because queries are few.
        splits: over how many programs the forward pass divides the keys of a tile of queries.
        scale, logits_soft_cap: of the scores.
        blocks: the sizes of tiles.
        functions: what is asked of a pair.
        bias_shape: of a bias that is an array.
        has_sinks: whether a row has a score without a key.
    """

    query_length: int
    key_length: int
    dim: int
    dim_v: int
    group: int
    is_grouped: bool
    splits: int
    scale: float
    logits_soft_cap: float | None
    blocks: Blocks
    functions: "_OfPair"
    bias_shape: tuple[int, ...] | None
    has_sinks: bool

    @property
    def unit(self) -> float:
        """What the difference of two scores is multiplied by to be one in base 2."""
        return self.scale * _LOG2E if self.has_raw_scores else _LOG2E

    @property
    def has_raw_scores(self) -> bool:
        """Whether the scores are the products themselves, so that the scale is part of the unit."""
        changes = self.logits_soft_cap is not None or self.functions.bias is not None or self.has_sinks
        return self.scale > 0 and not changes

    @property
    def rows(self) -> int:
        """How many rows the forward pass cuts into tiles: queries, or those of every head of a group."""
        return self.query_length * self.group if self.is_grouped else self.query_length


class _OfPair(NamedTuple):
    """What is asked of a pair: functions of its indices, or the operands of these, or their answers; ``None`` if not.

    Args:
        positions: of the query and the key.
        bias: of a bias that is a function, at the positions; of an array, at the indices.
        factor: of dropout, at the indices.
        allowed: by the mask, at the position of the query and the index of the key.
    """

    positions: Any
    bias: Any
    factor: Any
    allowed: Any


class _Lists(NamedTuple):
    """Which tiles are walked: by tile of queries, forward and backward, and by tile of keys."""

    forward: TileLists
    by_query: TileLists
    by_key: TileLists


class _Residuals(NamedTuple):
    """Both parts of the log-sum-exp in base 2, float32 ``[batch, heads, q]``: the sum would lose the second.

    Args:
        highest: the maximum of the scores, in their own unit; infinite in a row without keys.
        log_total: the base-2 logarithm of the sum of weights.
    """

    highest: Array
    log_total: Array


def lacks(call: Call) -> list[str]:
    """What keeps this kernel from doing a call, in words."""
    dims = {"query and key": call.query.shape[3], "the values": call.value.shape[3]}
    limits = {
        f"it computes in float32, not in {call.query.dtype}": call.query.dtype == jnp.float64,
        "its tiles need lengths that are known: these are symbolic": any(
            jax.export.is_symbolic_dim(size) for size in (*call.query.shape, *call.key.shape)
        ),
        **{
            f"the dim of {what} is {dim}, and it takes at most {_MOST_DIM}": dim > _MOST_DIM
            for what, dim in dims.items()
        },
        "inside of a shard_map it needs check_vma=False": (
            isinstance(call.query, jax.Array) and bool(jax.typeof(call.query).manual_axis_type.varying)
        ),
    }
    found = [limit for limit, holds in limits.items() if holds]
    if found:
        return found
    sizes = {"query": call.query.shape, "key": call.key.shape, "value": call.value.shape}
    try:
        operands = jax.tree.leaves(jax.eval_shape(lambda call: _functions(call)[1], call))
    except UnsupportedError as error:
        return [str(error)]
    sizes |= {f"an array {x.dtype}{[x.size]} of the mask or the bias": x.shape for x in operands}
    return [
        f"{name} has {math.prod(shape):,} elements, and it can address {_ADDRESSABLE:,}"
        for name, shape in sizes.items()
        if math.prod(shape) >= _ADDRESSABLE
    ]


def launches(call: Call) -> list[str]:
    """The kernels that a call launches, forward and backward, in words."""
    programs: list[_Program] = []
    jax.eval_shape(lambda call: programs.append(_program(call)[0]), call)
    (program,) = programs
    batch, heads, blocks = call.query.shape[0], call.query.shape[2], program.blocks
    forward_heads, kv_heads = heads // (program.group if program.is_grouped else 1), heads // program.group
    counts = (
        program.splits * pl.cdiv(program.rows, blocks.forward.queries) * forward_heads,
        pl.cdiv(program.query_length, blocks.dq.queries) * heads,
        pl.cdiv(program.key_length, blocks.dkv.keys) * kv_heads,
    )
    found = [
        f"{name}: {batch * count:,} programs of {block.warps} warps, tiles of {block.queries} queries and {block.keys} "
        f"keys, {block.stages} of them in flight"
        for name, count, block in zip(
            ("forward", "gradient of queries", "gradients of keys"), counts, blocks, strict=True
        )
    ]
    if program.splits > 1:
        found[0] += f", each row of keys divided over {program.splits} programs"
    if program.functions.bias is not None:
        found.append("gradients of what the bias reads, where they are asked for: by the loop of blocked")
    return found


@partial(jax.jit, static_argnames="blocks")
def attend(call: Call, blocks: Blocks | None = None) -> Any:
    """What a call asks for that the kernel does not lack, with tiles of these sizes, or those of the table."""
    program, operands = _program(call, blocks)
    sinks = None if call.sinks is None else jnp.asarray(call.sinks, jnp.float32)
    arrays = replace(call, bias=None, dropout=None, sinks=None)
    out, lse = _run(program, arrays, call.dropout, sinks, operands, _lists(call, program))
    return (out, lse) if call.return_residual else out


def _program(call: Call, blocks: Blocks | None = None) -> tuple[_Program, _OfPair]:
    (batch, query_length, heads, dim), (_, key_length, kv_heads, dim_v) = call.query.shape, call.value.shape
    blocks = blocks_for(call.query.dtype, max(dim, dim_v)) if blocks is None else blocks
    group = heads // kv_heads
    is_grouped = group > 1 and query_length * group <= blocks.forward.queries
    rows = query_length * group if is_grouped else query_length
    blocks = Blocks(
        blocks.forward.for_lengths(rows, key_length),
        blocks.dq.for_lengths(query_length, key_length),
        blocks.dkv.for_lengths(query_length, key_length),
    )
    splits = 1
    if rows <= blocks.forward.queries:
        programs, tiles = batch * (kv_heads if is_grouped else heads), -(-key_length // blocks.forward.keys)
        splits = max(1, min(_PROGRAMS // programs, tiles // _FEWEST_TILES))
    functions, operands = _functions(call)
    program = _Program(
        query_length=query_length,
        key_length=key_length,
        dim=dim,
        dim_v=dim_v,
        group=group,
        is_grouped=is_grouped,
        splits=splits,
        scale=call.scale,
        logits_soft_cap=call.logits_soft_cap,
        blocks=blocks,
        functions=functions,
        bias_shape=None if call.bias is None or isinstance(call.bias, Partial) else call.bias.shape,
        has_sinks=call.sinks is not None,
    )
    return program, operands


def _lists(call: Call, program: _Program) -> _Lists:
    found: dict[tuple[int, int], Any] = {}

    def states(queries: int, keys: int) -> Any:
        if (queries, keys) not in found:
            found[queries, keys] = call.tiles((queries, keys)).states
        return found[queries, keys]

    def by_query(states: Any, block: Block) -> TileLists:
        return TileLists.of(without_full_end(states) if program.key_length % block.keys else states)

    forward, dq, dkv = program.blocks
    of_forward = states(program.query_length if program.is_grouped else forward.queries, forward.keys)
    lists = _Lists(
        by_query(of_groups(of_forward, program.group) if program.is_grouped else of_forward, forward),
        by_query(states(dq.queries, dq.keys), dq),
        TileLists.of(states(dkv.queries, dkv.keys).swapaxes(2, 3)),
    )
    return jax.tree.map(jnp.asarray, lists)


def _functions(call: Call) -> tuple[_OfPair, _OfPair]:
    """What is asked of a pair, and the operands that this reads: flat arrays."""
    at, bias, dropout = call.positions, call.bias, call.dropout

    def positions(b: Any, h: Any, query: Any, key: Any) -> tuple[Any, Any]:
        return at.of_queries(b, query), at.of_keys(b, key)

    def of_bias(b: Any, h: Any, q: Any, kv: Any) -> tuple[Any]:
        return (bias(b, h, q, kv) if isinstance(bias, Partial) else lookup(bias, b=b, h=h, q=q, kv=kv),)

    def factor(b: Any, h: Any, query: Any, key: Any) -> tuple[Any]:
        return (call.dropout.factor(jnp.float32, b, h, query, key),)

    def allowed(b: Any, h: Any, q: Any, key: Any) -> tuple[Any]:
        with checks.traced_function("allows"):
            return (jnp.asarray(call.mask.allows(b, h, q, key)),)

    asked = positions, None if bias is None else of_bias, None if dropout is None else factor, allowed
    traced = [(None, None) if function is None else trace(function) for function in asked]
    functions, operands = zip(*traced, strict=True)
    return _OfPair(*functions), jax.tree.map(lambda x: jnp.asarray(x).reshape(-1), _OfPair(*operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(program: _Program, call: Call, dropout: Any, sinks: Any, operands: _OfPair, lists: _Lists) -> Any:
    return _forward(program, call, dropout, sinks, operands, lists)[0]


def _forward(program: _Program, call: Call, dropout: Any, sinks: Any, operands: _OfPair, lists: _Lists) -> Any:
    query, key, value, block = call.query, call.key, call.value, program.blocks.forward
    (batch, query_length, heads, dim), dim_v = query.shape, value.shape[3]
    kv_heads, splits, rows = key.shape[2], program.splits, program.rows
    programs = heads
    if program.is_grouped:
        # [batch, group * q, kv_heads, dim]: a group of heads is a tile.
        query = query.reshape(batch, query_length, kv_heads, program.group, dim).transpose(0, 3, 1, 2, 4)
        query, programs = query.reshape(batch, rows, kv_heads, dim), kv_heads
    group = heads // kv_heads if programs == heads else 1
    of_row = _spec((None, None, None, block.queries), lambda i, h, b: (b, i % splits, h, i // splits))
    out_dtype = value.dtype if splits == 1 else jnp.float32
    out, highest, log_total = _call(
        partial(_forward_kernel, program),
        (splits * pl.cdiv(rows, block.queries), programs, batch),
        [
            *_list_specs(lists.forward, splits),
            _tile_spec(block.queries, dim, lambda i, h, b: (b, i // splits, h)),
            _whole_spec(program.key_length, dim, group),
            _whole_spec(program.key_length, dim_v, group),
            None if sinks is None else pl.no_block_spec,
            jax.tree.map(lambda _: pl.no_block_spec, operands),
        ],
        [
            _spec(
                (None, None, block.queries, None, _padded(dim_v)), lambda i, h, b: (b, i % splits, i // splits, h, 0)
            ),
            of_row,
            of_row,
        ],
        [
            jax.ShapeDtypeStruct((batch, splits, rows, programs, dim_v), out_dtype),
            *[jax.ShapeDtypeStruct((batch, splits, programs, rows), jnp.float32)] * 2,
        ],
        block,
        "jaxmask_forward",
    )(lists.forward, query, key, value, sinks, operands)
    if splits == 1:
        out, highest, log_total = out[:, 0], highest[:, 0], log_total[:, 0]
    else:
        out, highest, log_total = _merge(program, out, highest, log_total)
    if program.is_grouped:
        parts = (batch, program.group, query_length, kv_heads)
        out = out.reshape(*parts, dim_v).transpose(0, 2, 3, 1, 4).reshape(batch, query_length, heads, dim_v)
        highest, log_total = (
            x.reshape(batch, heads, query_length) for x in (highest, log_total)
        )  # the rows of a group are its heads, one after the other
    has_keys = highest < jnp.inf
    lse = jnp.where(has_keys, (highest * program.unit + log_total) / _LOG2E, -jnp.inf)
    out = out.astype(value.dtype)
    residuals = out, _Residuals(highest, log_total)
    return (out, lse.swapaxes(1, 2)), (call, dropout, sinks, operands, lists, *residuals)


def _merge(program: _Program, out: Array, highest: Array, log_total: Array) -> tuple[Array, Array, Array]:
    """The results of all keys, from those of their parts along axis 1."""
    has_keys = highest < jnp.inf
    top = jnp.where(has_keys, highest, -jnp.inf).max(1)
    is_there = top > -jnp.inf
    weights = jnp.where(
        has_keys, jnp.exp2((highest - jnp.where(is_there, top, 0)[:, None]) * program.unit + log_total), 0
    )
    total = weights.sum(1)
    safe = jnp.where(total > 0, total, 1)
    share = (weights / safe[:, None]).swapaxes(2, 3)[..., None]
    return (out * share).sum(1), jnp.where(is_there, top, jnp.inf), jnp.log2(safe)


def _backward(program: _Program, saved: Any, cotangents: Any) -> Any:
    call, dropout, sinks, operands, lists, out, residuals = saved
    dout, dlse = cotangents
    query, key, value = call.query, call.key, call.value
    (batch, query_length, heads, dim), (_, key_length, kv_heads, dim_v) = query.shape, value.shape
    delta = jnp.einsum("bqhd,bqhd->bhq", dout, out, preferred_element_type=jnp.float32, precision="highest")
    delta = delta - dlse.swapaxes(1, 2)
    group = program.group
    functions = jax.tree.map(lambda _: pl.no_block_spec, operands)
    block, of_row = program.blocks.dq, _spec((None, None, program.blocks.dq.queries), lambda i, h, b: (b, h, i))
    dq = _call(
        partial(_dq_kernel, program),
        (pl.cdiv(query_length, block.queries), heads, batch),
        [
            *_list_specs(lists.by_query),
            _tile_spec(block.queries, dim, _of_tile),
            _whole_spec(key_length, dim, group),
            _whole_spec(key_length, dim_v, group),
            functions,
            _tile_spec(block.queries, dim_v, _of_tile),
            _Residuals(of_row, of_row),
            of_row,
        ],
        _tile_spec(block.queries, dim, _of_tile),
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        block,
        "jaxmask_dq",
    )(lists.by_query, query, key, value, operands, dout, residuals, delta)
    block = program.blocks.dkv
    of_group = _spec((None, group, query_length), lambda i, h, b: (b, h, 0))
    dk, dv = _call(
        partial(_dkv_kernel, program),
        (pl.cdiv(key_length, block.keys), kv_heads, batch),
        [
            *_list_specs(lists.by_key, group=group),
            _spec((None, query_length, group, _padded(dim)), lambda i, h, b: (b, 0, h, 0)),
            _tile_spec(block.keys, dim, _of_tile),
            _tile_spec(block.keys, dim_v, _of_tile),
            functions,
            _spec((None, query_length, group, _padded(dim_v)), lambda i, h, b: (b, 0, h, 0)),
            _Residuals(of_group, of_group),
            of_group,
        ],
        [_tile_spec(block.keys, dim, _of_tile), _tile_spec(block.keys, dim_v, _of_tile)],
        [jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
        block,
        "jaxmask_dkv",
    )(lists.by_key, query, key, value, operands, dout, residuals, delta)
    dsinks = None
    if sinks is not None:
        at_sink = jnp.exp2((sinks[:, None] - residuals.highest) * _LOG2E - residuals.log_total)
        dsinks = -(jnp.where(residuals.highest < jnp.inf, at_sink, 0) * delta).sum((0, 2))
    doperands = jax.tree.map(_no_gradient, operands)
    if operands.bias:
        doperands = doperands._replace(bias=_of_bias(program, call, dropout, sinks, operands, cotangents))
    dcall = replace(jax.tree.map(_no_gradient, call), query=dq, key=dk, value=dv)
    return dcall, jax.tree.map(_no_gradient, dropout), dsinks, doperands, jax.tree.map(_no_gradient, lists)


_run.defvjp(_forward, _backward)


def _no_gradient(x: Any) -> Any:
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jnp.zeros_like(x) if is_float else np.zeros(np.shape(x), jax.dtypes.float0)


def _of_bias(program: _Program, call: Call, dropout: Any, sinks: Any, operands: _OfPair, cotangents: Any) -> Any:
    """The gradients of the arrays that a bias reads, by the loop in plain JAX: a sum over pairs that go anywhere.

    XLA leaves it out where nobody asks for them.
    """
    function = program.functions.bias
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in operands.bias]

    def whole(operands: list[Any], b: Any, h: Any, q: Any, kv: Any) -> Any:
        return function(lambda i, at: operands[i][at], b, h, q, kv)[0]

    def attend(floats: list[Any]) -> Any:
        rest = iter(floats)
        arrays = [next(rest) if yes else x for x, yes in zip(operands.bias, is_float, strict=True)]
        bias = arrays[0].reshape(program.bias_shape) if program.bias_shape else Partial(whole, arrays)
        return blocked.attend(replace(call, bias=bias, dropout=dropout, sinks=sinks, return_residual=True))

    _, pull = jax.vjp(attend, [x for x, yes in zip(operands.bias, is_float, strict=True) if yes])
    found = iter(pull(cotangents)[0])
    return [next(found) if yes else _no_gradient(x) for x, yes in zip(operands.bias, is_float, strict=True)]


# Blocks of arrays in the memory of a program.


def _padded(dim: int) -> int:
    """The size of a tile along a dim: Triton has powers of 2, and multiplies no fewer than 16."""
    return max(16, pl.next_power_of_2(dim))


def _spec(shape: tuple[int | None, ...], at: Callable[..., Any]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, at)


def _tile_spec(length: int, dim: int, at: Callable[..., Any]) -> pl.BlockSpec:
    """A tile of ``[batch, length, heads, dim]``."""
    return _spec((None, length, None, _padded(dim)), lambda i, h, b: (*at(i, h, b), 0))


def _of_tile(i: Any, h: Any, b: Any) -> tuple[Any, ...]:
    return b, i, h


def _whole_spec(length: int, dim: int, group: int) -> pl.BlockSpec:
    """All keys or values of a head, which a group of programs shares."""
    return _spec((None, length, None, _padded(dim)), lambda i, h, b: (b, 0, h // group, 0))


def _list_specs(lists: TileLists, splits: int = 1, group: int | None = None) -> TileLists:
    """The lists of a row of tiles; those of a group of heads have an axis for it."""
    batch, heads, _, width = lists.order.shape
    of_heads = None if group is None else 1 if heads == 1 else group

    def at(i: Any, h: Any, b: Any) -> tuple[Any, ...]:
        return b if batch > 1 else 0, h if heads > 1 else 0, i // splits

    count = _spec((None, of_heads, None), at)
    return TileLists(count, count, _spec((None, of_heads, None, width), lambda i, h, b: (*at(i, h, b), 0)))


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    in_specs: list[Any],
    out_specs: Any,
    out_shape: Any,
    block: Block,
    name: str,
) -> Callable[..., Any]:
    """A kernel, compiled for CUDA, and interpreted on every other platform: XLA knows which, not this process."""

    def run(*arguments: Any, interpret: bool) -> Any:
        # The lists are three arguments of the kernel, whatever they are here.
        lists, *others = arguments
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
            interpret=interpret,
            name=name,
        )(*lists, *others)

    return lambda *arguments: lax.platform_dependent(
        *arguments, cuda=partial(run, interpret=False), default=partial(run, interpret=True)
    )


# The kernels. Arguments that end in _ref are arrays in the memory of the GPU.


def _ask(program: _Program, operands: _OfPair, is_masked: bool, b: Any, h: Any, query: Any, key: Any) -> _OfPair:
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
    return _OfPair((q, kv), bias, factor, allowed)


def _load(ref: Any, size: int, dim: int, is_there: Any) -> Array:
    """Rows ``[size, dim]``, zero where they are not there and in the columns that only fill the tile."""
    mask, padded = None if is_there is None else is_there[:, None], _padded(dim)
    if padded > dim:
        is_column = (jnp.arange(padded, dtype=jnp.int32) < dim)[None]
        mask = is_column if mask is None else mask & is_column
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, (size, padded)), other=0.0)


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


def _multiply(a: Array, b: Array) -> Array:
    return plgpu.dot(a, b)


def _scores(
    program: _Program, products: Array, pair: _OfPair, in_range: Any, poison: Any = None
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
    """By the exponential, which is a single instruction."""
    e = jnp.exp2(-2 * _LOG2E * jnp.abs(x))
    return jnp.sign(x) * (1 - e) / (1 + e)


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


def _forward_kernel(
    program: _Program,
    partial_ref: Any,
    count_ref: Any,
    order_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    sinks_ref: Any,
    operands: _OfPair,
    out_ref: Any,
    highest_ref: Any,
    log_total_ref: Any,
) -> None:
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
        k = _load(k_ref.at[pl.ds(start, block.keys), slice(None)], block.keys, program.dim, is_key)
        pair = _ask(program, operands, is_masked, b, h, query, keys[None])
        v, poison = _load(v_ref.at[pl.ds(start, block.keys), slice(None)], block.keys, program.dim_v, is_key), None
        if is_masked:
            poison = _not_finite(v)
            v = _without(v, poison)
        s, _ = _scores(program, _multiply(q, k.T), pair, None if is_key is None else is_key[None], poison)
        new_highest = jnp.maximum(highest, s.max(1))
        decay = jnp.exp2((highest - new_highest) * program.unit)
        weights = jnp.exp2((s - new_highest[:, None]) * program.unit)
        total = total * decay + weights.sum(1)
        if pair.factor is not None:
            weights = weights * pair.factor
        return out * decay[:, None] + _multiply(weights.astype(v.dtype), v), new_highest, total

    out = jnp.zeros((block.queries, out_ref.shape[-1]), jnp.float32)
    highest = jnp.full((block.queries,), _LOWEST, jnp.float32)
    count, part = count_ref[...], place % splits
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


def _dq_kernel(
    program: _Program,
    partial_ref: Any,
    count_ref: Any,
    order_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    operands: _OfPair,
    dout_ref: Any,
    residuals: _Residuals,
    delta_ref: Any,
    dq_ref: Any,
) -> None:
    block = program.blocks.dq
    h, b = pl.program_id(1), pl.program_id(2)
    rows, is_row = _rows(pl.program_id(0) * block.queries, block.queries, program.query_length)
    q = _load(q_ref, block.queries, program.dim, is_row)
    dout = _load(dout_ref, block.queries, program.dim_v, is_row)
    highest, log_total, delta = (
        plgpu.load(ref, mask=is_row, other=None if is_row is None else 0.0)[:, None] for ref in (*residuals, delta_ref)
    )

    def step(j: Any, dq: Array, is_masked: bool) -> Array:
        start = order_ref[j] * block.keys
        keys, is_key = _rows(start, block.keys, program.key_length)
        is_key = is_key if is_masked else None
        k = _load(k_ref.at[pl.ds(start, block.keys), slice(None)], block.keys, program.dim, is_key)
        v = _load(v_ref.at[pl.ds(start, block.keys), slice(None)], block.keys, program.dim_v, is_key)
        pair = _ask(program, operands, is_masked, b, h, rows[:, None], keys[None])
        s, slope = _scores(program, _multiply(q, k.T), pair, None if is_key is None else is_key[None])
        ds, _ = _dscores(program, s, slope, pair, _multiply(dout, v.T), (highest, log_total, delta))
        if is_masked:
            k = _without(k, _not_finite(k))
        return dq + _multiply(ds.astype(k.dtype), k)

    dq = _walk(partial_ref[...], jnp.int32(0), count_ref[...], step, jnp.zeros(q.shape, jnp.float32))
    _store(dq_ref, dq * program.scale, program.dim, is_row)


def _dkv_kernel(
    program: _Program,
    partial_ref: Any,
    count_ref: Any,
    order_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    operands: _OfPair,
    dout_ref: Any,
    residuals: _Residuals,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
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
            others = (np.inf, 0.0, 0.0)
            of_rows = tuple(
                plgpu.load(ref.at[g, span], mask=is_row, other=None if is_row is None else other)[None]
                for ref, other in zip((*residuals, delta_ref), others, strict=True)
            )
            pair = _ask(program, operands, is_masked, b, kv_head * program.group + g, rows[None], keys[:, None])
            s, slope = _scores(program, _multiply(k, q.T), pair, None)
            ds, weights = _dscores(program, s, slope, pair, _multiply(v, dout.T), of_rows)
            return (
                dk + _multiply(ds.astype(q.dtype), q),
                dv + _multiply(weights.astype(dout.dtype), dout),
            )

        return _walk(partial_ref[of_list], jnp.int32(0), count_ref[of_list], step, carry)

    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    # A loop of one round is none.
    dk, dv = of_head(jnp.int32(0), carry) if program.group == 1 else lax.fori_loop(0, program.group, of_head, carry)
    _store(dk_ref, dk * program.scale, program.dim, is_key)
    _store(dv_ref, dv, program.dim_v, is_key)


def _dscores(
    program: _Program, s: Array, slope: Array | None, pair: _OfPair, dweights: Array, of_rows: tuple[Any, Any, Any]
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
