"""What devices send each other where a sequence is divided over them: known from the mask before anything runs.

A plan is the tile map of a mask, its tiles gathered by shards of queries and of keys. It is made of what is known
while tracing: Python ints and NumPy arrays. A part of the mask that holds a JAX array is taken for unknown. What is
static beside it bounds the plan: ``SlidingWindow(longest)`` does in ``Causal() & Segments(ids) &
SlidingWindow(longest)``, where ``longest`` is a number of tokens that no document exceeds.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jaxmask import checks, reading
from jaxmask.indices import is_static
from jaxmask.kernels.call import Call
from jaxmask.mask import Unknown, without_arrays
from jaxmask.tiles import EMPTY

Scheme = Literal["halo", "gather", "ulysses", "ring", "merge"]

# The most tiles whose states are looked at; beyond, tiles of queries grow.
MOST_TILES = 2**24


class Traffic(NamedTuple):
    """How many bytes the busiest device receives in the forward pass, and how many more in the backward pass."""

    forward: int
    backward: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Which tiles of keys of each shard the queries of each shard need.

    Args:
        queries, keys: how many of them are in a shard.
        needed: bool ``[shards, shards, tiles]``, for each shard of queries, each shard of keys, and each tile of it;
            ``[1, shards, tiles]`` where every device has all queries.
        pairs: float64 ``[shards, shards]``, or ``[1, shards]``, how many pairs of a query and a key are in tiles that
            are not EMPTY, on the mean of examples and heads.
        is_exact: whether all of the mask and of the positions was known.

    Two plans are equal where the same is sent: a program that is compiled for one serves the other.
    """

    queries: int
    keys: int
    needed: npt.NDArray[np.bool_]
    pairs: npt.NDArray[np.float64]
    is_exact: bool

    @property
    def shards(self) -> int:
        """How many devices divide the sequence."""
        return self.needed.shape[1]

    @property
    def tile(self) -> int:
        """How many keys are in a tile."""
        return self.keys // self.needed.shape[2]

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.queries, self.keys, self.needed.shape, np.packbits(self.needed).tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """How many tiles each shard needs of the shard that is ``shift`` before it, around: ``[shift, shard]``."""
        shard = np.arange(self.shards)
        return np.stack([self.needed[shard, shard - shift].sum(-1) for shift in range(self.shards)])

    @cached_property
    def shifts(self) -> list[int]:
        """Shards how many before its own, around, some shard needs keys of; not its own."""
        return [shift for shift in range(1, self.shards) if self.counts[shift].any()]

    @cached_property
    def fetched(self) -> int:
        """How many keys a device receives that receives what is needed."""
        return int(sum(self.counts[shift].max() for shift in self.shifts)) * self.tile

    @cached_property
    def band(self) -> tuple[int, int] | None:
        """How many keys before and after its own a shard needs, where it receives all of these and no more for it.

        ``None`` where what is needed is no such band, or where shards would wait for others in both directions for what
        they receive at once otherwise.
        """
        tiles = self.needed.shape[2]
        found = self.needed.reshape(self.shards, -1)
        first, end = found.argmax(1), found.shape[1] - found[:, ::-1].argmax(1)
        own = np.arange(self.shards) * tiles
        is_some = found.any(1)
        before, after = (int(max(0, *np.where(is_some, x, 0))) for x in (own - first, end - own - tiles))
        return (before * self.tile, after * self.tile) if (before + after) * self.tile <= self.fetched else None

    @property
    def work(self) -> npt.NDArray[np.float64]:
        """How many pairs each device has: those of its queries, or of its keys where it has all queries."""
        return self.pairs.sum(1 if len(self.pairs) > 1 else 0)

    @property
    def imbalance(self) -> float:
        """How many pairs the device with the most has, by the mean of all."""
        work = self.work
        return float(work.max() / work.mean()) if work.any() else 1.0

    def table(self, shift: int) -> npt.NDArray[np.int32]:
        """For each shard the tiles that it receives of the one ``shift`` before it, ``[shard, tiles]``; -1 is none."""
        shard = np.arange(self.shards)
        needed = self.needed[shard, shard - shift]
        count = int(self.counts[shift].max())
        order = np.argsort(~needed, axis=1, kind="stable")[:, :count]
        return np.where(np.take_along_axis(needed, order, 1), order, -1).astype(np.int32)

    def received(self, query: Any, key: Any, value: Any, *, divides_heads: bool) -> dict[Scheme, Traffic]:
        """The bytes that a device receives by each scheme that can do it, by :class:`Traffic`.

        Args:
            query, key, value: the arrays of one device, or their shapes.
            divides_heads: whether the heads can be divided over the devices.
        """
        (batch, queries, heads, dim), kv_heads = query.shape, key.shape[2]
        others, stops, itemsize = self.shards - 1, len(self.shifts), key.dtype.itemsize
        # A key and its value.
        row = batch * kv_heads * (dim + value.shape[3]) * itemsize
        around = stops * self.keys * row
        # Their gradients go around in at least float32, but home as they are returned.
        gradients = around * checks.at_least_float32(key.dtype).itemsize // itemsize + self.keys * row
        found: dict[Scheme, Traffic] = {
            "halo": Traffic(self.fetched * row, self.fetched * row),
            "gather": Traffic(others * self.keys * row, others * self.keys * row),
            "ring": Traffic(around, around + gradients if stops else 0),
        }
        if divides_heads:
            copies = max(1, self.shards // kv_heads)
            vectors = batch * (queries * heads + self.keys * kv_heads * copies)
            size = others * vectors * (dim + value.shape[3]) * itemsize // self.shards
            found["ulysses"] = Traffic(size, size)
        return found

    def merged(self, query: Any, value: Any) -> Traffic:
        """The bytes that a device receives where every one has all queries, and what they find is merged."""
        (batch, queries, heads, dim), precise = query.shape, checks.at_least_float32(query.dtype)
        # What is summed up over devices comes twice, but for their own share: once in parts, and once as a whole.
        shares, rows = 2 * (self.shards - 1), batch * queries * heads
        # Each row sends its highest score, the sum of its weights, and its output; then the gradient of the query.
        forward = shares * rows * (2 + value.shape[3]) * precise.itemsize // self.shards
        return Traffic(forward, shares * rows * dim * query.dtype.itemsize // self.shards)


def plan_of(call: Call, shards: int, *, has_all_queries: bool = False) -> Plan:
    """The plan of a call whose queries and keys are divided over so many devices.

    Args:
        call: of the whole sequence, whose arrays may be those of one device, or their shapes.
        shards: how many devices there are; it divides the lengths.
        has_all_queries: whether keys alone are divided, and every device has all queries.
    """
    at, parts = call.positions, 1 if has_all_queries else shards
    queries, keys = at.query_length // parts, at.key_length // shards
    least, tile = tile_of(queries), tile_of(keys)
    known = without_arrays(call.mask) if is_static(at) else Unknown()
    batch, heads, _ = known.shape
    kv_tiles = at.key_length // tile
    rows = divisor_near(queries, max(least, -(-at.query_length * kv_tiles * batch * heads // MOST_TILES)))
    with jax.ensure_compile_time_eval():
        where = at if is_static(at) else replace(at, first=None, queries=None, keys=None)
        states: Any = reading.states(known, where, (rows, tile), (call.query.shape[0], call.query.shape[2]))
    is_exact = is_static(call.mask, at) and not checks.is_traced(states)
    if checks.is_traced(states):
        # A function in the mask looks at what is traced.
        states = np.ones((1, 1, at.query_length // rows, kv_tiles), np.int8)
    found = (np.asarray(states) != EMPTY).reshape(-1, parts, queries // rows, shards, keys // tile)
    pairs = found.sum((2, 4)).mean(0) * rows * tile
    return Plan(queries, keys, found.any((0, 2)), pairs, is_exact)


def tile_of(size: int) -> int:
    """How many tokens of a shard are looked at together: few in small shards, of which one tile would be much."""
    return divisor_near(size, min(128, -(-size // 8)))


def divisor_near(size: int, near: int) -> int:
    """A divisor of a size: the largest up to ``near``; where that would be a small part of it, the next above."""
    divisors = [part for part in range(1, size + 1) if size % part == 0]
    below = max(part for part in divisors if part <= near)
    return below if below * 8 > min(near, size) else min(part for part in divisors if part > near)
