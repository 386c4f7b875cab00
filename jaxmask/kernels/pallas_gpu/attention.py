"""Attention with any mask in a Pallas kernel for GPU, by Triton: block-sparse, forward and backward.

Each program takes a tile of queries, a head and an example. It walks the tiles of keys that are not EMPTY, the PARTIAL
ones first, and in these the mask decides pair by pair, in the kernel. Softmax is online, in base 2. The backward pass
has a program for each tile of queries, which gives ``dq``, and one for each tile of keys, which gives ``dk`` and ``dv``
and sums over the queries' heads that share a head of keys. No array of all pairs is written.

Source: FlashAttention-2 (https://arxiv.org/abs/2307.08691), and its walk of lists of tiles FlexAttention
(https://arxiv.org/abs/2412.05496). Few queries divide their keys over programs: FlashDecoding
(https://pytorch.org/blog/flash-decoding).

It is differentiable once, in reverse. Lists of tiles take ``(length / tile) ** 2`` int32 for each example and head that
the mask tells apart, where it is traced. An export for a CPU and a GPU at once is refused by JAX, which says that only
the interpreter runs on a CPU: export for each by itself.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.tree_util import Partial
from jaxtyping import Array

from jaxmask.kernels import blocked
from jaxmask.kernels.call import Call
from jaxmask.kernels.pallas_gpu.blocks import Block, Blocks, padded
from jaxmask.kernels.pallas_gpu.kernels import Residuals, dkv_kernel, dq_kernel, forward_kernel
from jaxmask.kernels.pallas_gpu.pairwise import UnsupportedError
from jaxmask.kernels.pallas_gpu.program import LOG2E, Lists, OfPair, Program, functions_of, lists_of, program_of
from jaxmask.kernels.pallas_gpu.tile_lists import TileLists

# The largest number of elements that an int32 can address.
_ADDRESSABLE = 2**31 - 1
_MOST_DIM = 256
# The compute capabilities of GPUs with 99 KiB of shared memory for a block, where others have 163 and more.
_LITTLE_MEMORY = 8.6, 8.9, 12.0, 12.1


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
    found = [limit for limit, holds in limits.items() if holds] + _card_lacks(call)
    if found:
        return found
    sizes = {"query": call.query.shape, "key": call.key.shape, "value": call.value.shape}
    try:
        operands = jax.tree.leaves(jax.eval_shape(lambda call: functions_of(call)[1], call))
    except UnsupportedError as error:
        return [str(error)]
    sizes |= {f"an array of the mask or the bias, {x.dtype},": x.shape for x in operands}
    return [
        f"{name} has {prod(shape):,} elements, and it can address {_ADDRESSABLE:,}"
        for name, shape in sizes.items()
        if prod(shape) > _ADDRESSABLE
    ]


def _card_lacks(call: Call) -> list[str]:
    """What keeps the GPU that is here from it, where there is one."""
    if not call.platform == jax.default_backend() == "gpu":
        return []
    card: Any = jax.devices()[0]
    if "rocm" in card.client.platform_version:
        return ["it is for NVIDIA's GPUs"]
    capability, dim = float(card.compute_capability), max(call.query.shape[3], call.value.shape[3])
    if capability < 8:
        return [f"it needs a GPU of compute capability 8.0, and this one has {capability}"]
    if capability in _LITTLE_MEMORY and dim * call.query.dtype.itemsize > 256:
        return [f"its tiles of a dim of {dim} in {call.query.dtype} need more shared memory than this GPU has"]
    return []


def launches(call: Call) -> list[str]:
    """The kernels that a call launches, forward and backward, in words."""
    programs: list[Program] = []
    jax.eval_shape(lambda call: programs.append(program_of(call)[0]), call)
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
    program, operands = program_of(call, blocks)
    sinks = None if call.sinks is None else jnp.asarray(call.sinks, jnp.float32)
    leaves, structure = jax.tree.flatten(replace(call, bias=None, sinks=None))
    results: Any = _run(program, structure, leaves, sinks, operands, lists_of(call, program))
    out, lse = results
    return (out, lse) if call.return_residual else out


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(program: Program, structure: Any, leaves: list[Any], sinks: Any, operands: OfPair, lists: Lists) -> Any:
    """The output and the log-sum-exp of a call, whose leaves begin with query, key and value."""
    return _forward(program, structure, leaves, sinks, operands, lists)[0]


def _forward(program: Program, structure: Any, leaves: list[Any], sinks: Any, operands: OfPair, lists: Lists) -> Any:
    call: Call = jax.tree.unflatten(structure, leaves)
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
        partial(forward_kernel, program),
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
            _spec((None, None, block.queries, None, padded(dim_v)), lambda i, h, b: (b, i % splits, i // splits, h, 0)),
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
    lse = jnp.where(has_keys, highest * (program.unit / LOG2E) + log_total / LOG2E, -jnp.inf)
    out = out.astype(value.dtype)
    residuals = out, Residuals(highest, log_total)
    return (out, lse.swapaxes(1, 2)), (leaves, sinks, operands, lists, *residuals)


def _merge(program: Program, out: Array, highest: Array, log_total: Array) -> tuple[Array, Array, Array]:
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


def _backward(program: Program, structure: Any, saved: Any, cotangents: Any) -> Any:
    leaves, sinks, operands, lists, out, residuals = saved
    dout, dlse = cotangents
    query, key, value, *others = leaves
    (batch, query_length, heads, dim), (_, key_length, kv_heads, dim_v) = query.shape, value.shape
    delta = jnp.einsum("bqhd,bqhd->bhq", dout, out, preferred_element_type=jnp.float32, precision="highest")
    delta = delta - dlse.swapaxes(1, 2)
    group = program.group
    functions = jax.tree.map(lambda _: pl.no_block_spec, operands)
    block, of_row = program.blocks.dq, _spec((None, None, program.blocks.dq.queries), lambda i, h, b: (b, h, i))
    dq = _call(
        partial(dq_kernel, program),
        (pl.cdiv(query_length, block.queries), heads, batch),
        [
            *_list_specs(lists.by_query),
            _tile_spec(block.queries, dim, _of_tile),
            _whole_spec(key_length, dim, group),
            _whole_spec(key_length, dim_v, group),
            functions,
            _tile_spec(block.queries, dim_v, _of_tile),
            Residuals(of_row, of_row),
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
        partial(dkv_kernel, program),
        (pl.cdiv(key_length, block.keys), kv_heads, batch),
        [
            *_list_specs(lists.by_key, group=group),
            _spec((None, query_length, group, padded(dim)), lambda i, h, b: (b, 0, h, 0)),
            _tile_spec(block.keys, dim, _of_tile),
            _tile_spec(block.keys, dim_v, _of_tile),
            functions,
            _spec((None, query_length, group, padded(dim_v)), lambda i, h, b: (b, 0, h, 0)),
            Residuals(of_group, of_group),
            of_group,
        ],
        [_tile_spec(block.keys, dim, _of_tile), _tile_spec(block.keys, dim_v, _of_tile)],
        [jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
        block,
        "jaxmask_dkv",
    )(lists.by_key, query, key, value, operands, dout, residuals, delta)
    dsinks = None
    if sinks is not None:
        at_sink = jnp.exp(sinks[None, :, None] - residuals.highest) * jnp.exp2(-residuals.log_total)
        dsinks = -(jnp.where(residuals.highest < jnp.inf, at_sink, 0) * delta).sum((0, 2))
    doperands = jax.tree.map(_no_gradient, operands)
    if operands.bias:
        call = replace(jax.tree.unflatten(structure, leaves), sinks=sinks, return_residual=True)
        doperands = doperands._replace(bias=_of_bias(program, call, operands, cotangents))
    return [dq, dk, dv, *map(_no_gradient, others)], dsinks, doperands, jax.tree.map(_no_gradient, lists)


_run.defvjp(_forward, _backward)


def _no_gradient(x: Any) -> Any:
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jnp.zeros_like(x) if is_float else np.zeros(np.shape(x), jax.dtypes.float0)


def _of_bias(program: Program, call: Call, operands: OfPair, cotangents: Any) -> Any:
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
        return blocked.attend(replace(call, bias=bias))

    _, pull = jax.vjp(attend, [x for x, yes in zip(operands.bias, is_float, strict=True) if yes])
    found = iter(pull(cotangents)[0])
    return [next(found) if yes else _no_gradient(x) for x, yes in zip(operands.bias, is_float, strict=True)]


# Blocks of arrays in the memory of a program.


def _spec(shape: tuple[int | None, ...], at: Callable[..., Any]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, at)


def _tile_spec(length: int, dim: int, at: Callable[..., Any]) -> pl.BlockSpec:
    """A tile of ``[batch, length, heads, dim]``."""
    return _spec((None, length, None, padded(dim)), lambda i, h, b: (*at(i, h, b), 0))


def _of_tile(i: Any, h: Any, b: Any) -> tuple[Any, ...]:
    return b, i, h


def _whole_spec(length: int, dim: int, group: int) -> pl.BlockSpec:
    """All keys or values of a head, which a group of programs shares."""
    return _spec((None, length, None, padded(dim)), lambda i, h, b: (b, 0, h // group, 0))


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
