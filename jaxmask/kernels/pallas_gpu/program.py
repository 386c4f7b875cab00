"""What a call asks of the GPU kernel: sizes, tiles, the functions of a pair, and which tiles are walked."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from jaxmask import checks
from jaxmask.indices import lookup
from jaxmask.kernels.call import Call
from jaxmask.kernels.pallas_gpu.blocks import Block, Blocks, blocks_for
from jaxmask.kernels.pallas_gpu.pairwise import trace
from jaxmask.kernels.pallas_gpu.tile_lists import TileLists, of_groups, without_full_end

LOG2E = math.log2(math.e)
# Programs that keep a GPU busy, and the fewest tiles of keys that are worth a program of their own.
_PROGRAMS, _FEWEST_TILES = 256, 4
# The lists of a static mask of so many tiles are found while tracing; beyond, by the program.
_MOST_STATIC = 2**16


class OfPair(NamedTuple):
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


@dataclass(frozen=True, eq=False)
class Program:
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
    functions: OfPair
    bias_shape: tuple[int, ...] | None
    has_sinks: bool

    @property
    def unit(self) -> float:
        """What the difference of two scores is multiplied by to be one in base 2."""
        return self.scale * LOG2E if self.has_raw_scores else LOG2E

    @property
    def has_raw_scores(self) -> bool:
        """Whether the scores are the products themselves, so that the scale is part of the unit."""
        changes = self.logits_soft_cap is not None or self.functions.bias is not None or self.has_sinks
        # The unit of a scale next to 0 would be 0, or of few digits.
        return self.scale > 1e-30 and not changes

    @property
    def tiles(self) -> int:
        """How many tiles of the forward pass an example and a head have."""
        return -(-self.rows // self.blocks.forward.queries) * -(-self.key_length // self.blocks.forward.keys)

    @property
    def rows(self) -> int:
        """How many rows the forward pass cuts into tiles: queries, or those of every head of a group."""
        return self.query_length * self.group if self.is_grouped else self.query_length


class Lists(NamedTuple):
    """Which tiles are walked: by tile of queries, forward and backward, and by tile of keys."""

    forward: TileLists
    by_query: TileLists
    by_key: TileLists


def program_of(call: Call, blocks: Blocks | None = None) -> tuple[Program, OfPair]:
    """What the kernels are specialised on, and the operands of its functions.

    Raises:
        UnsupportedError: a kernel cannot evaluate one of them.
    """
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
    functions, operands = functions_of(call)
    program = Program(
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
        bias_shape=None if call.bias is None or callable(call.bias) else call.bias.shape,
        has_sinks=call.sinks is not None,
    )
    return program, operands


def functions_of(call: Call) -> tuple[OfPair, OfPair]:
    """What is asked of a pair, and the operands that this reads: flat arrays."""
    at, bias, dropout = call.positions, call.bias, call.dropout

    def positions(b: Any, h: Any, query: Any, key: Any) -> tuple[Any, Any]:
        return at.of_queries(b, query), at.of_keys(b, key)

    def of_bias(b: Any, h: Any, q: Any, kv: Any) -> tuple[Any]:
        return (bias(b, h, q, kv) if isinstance(bias, Partial) else lookup(bias, b=b, h=h, q=q, kv=kv),)

    def factor(b: Any, h: Any, query: Any, key: Any) -> tuple[Any]:
        assert dropout is not None
        return (dropout.factor(jnp.float32, b, h, query, key),)

    def allowed(b: Any, h: Any, q: Any, key: Any) -> tuple[Any]:
        with checks.traced_function("allows"):
            return (jnp.asarray(call.mask.allows(b, h, q, key)),)

    asked = positions, None if bias is None else of_bias, None if dropout is None else factor, allowed
    traced = [(None, None) if function is None else trace(function) for function in asked]
    functions, operands = zip(*traced, strict=True)
    return OfPair(*functions), jax.tree.map(lambda x: jnp.asarray(x).reshape(-1), OfPair(*operands))


def lists_of(call: Call, program: Program) -> Lists:
    """The tiles that each kernel walks."""
    if call.positions.starts_at_zero and program.tiles > _MOST_STATIC:
        # Else the lists would be constants of the program, and longer than all the rest of it.
        call = replace(call, positions=replace(call.positions, first=lax.optimization_barrier(jnp.int32(0))))
    found: dict[tuple[int, int], Any] = {}

    def states(queries: int, keys: int) -> Any:
        if (queries, keys) not in found:
            found[queries, keys] = call.tiles((queries, keys)).states
        return found[queries, keys]

    def by_query(states: Any, block: Block) -> TileLists:
        return TileLists.of(without_full_end(states) if program.key_length % block.keys else states)

    forward, dq, dkv = program.blocks
    of_forward = states(program.query_length if program.is_grouped else forward.queries, forward.keys)
    lists = Lists(
        by_query(of_groups(of_forward, program.group) if program.is_grouped else of_forward, forward),
        by_query(states(dq.queries, dq.keys), dq),
        TileLists.of(states(dkv.queries, dkv.keys).swapaxes(2, 3)),
    )
    return jax.tree.map(jnp.asarray, lists)
