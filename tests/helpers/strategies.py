"""Masks, each with an independent oracle: a slow Python function of five ints, written from the table in the design."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from jaxmask import (
    Causal,
    Chunked,
    Dense,
    Empty,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    TileMap,
    Window,
)

# Takes an example, a head, the position of a query, that of a key, and the slot of this key: its index among the keys
# at hand. Slot and position differ where `key_positions` says so.
Oracle = Callable[[int, int, int, int, int], bool]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
ToArray = Callable[[Any], Any]

# A small pool, for every new shape is another compilation.
LENGTHS = [(5, 5), (1, 5), (3, 5), (4, 4)]
BATCH, HEADS = 2, 3
DEPTH = 4


@dataclass(frozen=True)
class Problem:
    """Where masks are read: sizes, the positions of queries and keys, and what says so to the library."""

    batch: int
    heads: int
    query_length: int
    key_length: int
    first: tuple[int, ...]
    offset: Any
    positions: Ints
    key_positions: Any
    to_array: tuple[ToArray, ...]

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query_length, self.key_length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.query_length, self.key_length

    @property
    def where(self) -> dict[str, Any]:
        """The arguments that say where the queries and the keys are."""
        return {"offset": self.offset, "key_positions": self.key_positions}

    def dense(self, mask: Mask) -> Bools:
        """What the library says, at full size."""
        return np.broadcast_to(np.asarray(mask.dense(*self.lengths, **self.where)), self.shape)

    def tiles(self, mask: Mask, block: int | tuple[int, int]) -> TileMap:
        """What the library knows of the tiles."""
        return mask.tiles(*self.lengths, block=block, **self.where)

    def expected(self, oracle: Oracle) -> Bools:
        """What the oracle says, pair by pair. A negative position is an empty slot."""
        pairs = [
            bool(self.key_positions is None or self.positions[b, j] >= 0)
            and oracle(b, h, self.first[b] + i, int(self.positions[b, j]), j)
            for b, h, i, j in np.ndindex(*self.shape)
        ]
        return np.array(pairs, np.bool_).reshape(self.shape)


@dataclass(frozen=True)
class Described:
    """A mask and what it should mean."""

    mask: Mask
    oracle: Oracle


@st.composite
def problems(
    draw: st.DrawFn,
    lengths: list[tuple[int, int]] = LENGTHS,
    to_array: tuple[ToArray, ...] = (jnp.asarray, np.asarray),
    slots: bool = True,
    heads: int = HEADS,
) -> Problem:
    """Sizes, offsets and, where ``slots``, keys in another order than that of their positions."""
    query_length, key_length = draw(st.sampled_from(lengths))
    slotted = slots and draw(st.integers(0, 2)) == 0
    position = st.sampled_from([0, key_length - query_length, 2, 7, -2])
    kinds = ["int", "scalar", "batch"] + (["missing"] if query_length == key_length and not slotted else [])
    as_array = draw(st.sampled_from(to_array))
    match draw(st.sampled_from(kinds)):
        case "missing":
            first, offset = (0,) * BATCH, None
        case "int":
            first = (draw(position),) * BATCH
            offset = first[0]
        case "scalar":
            first = (draw(position),) * BATCH
            offset = as_array(first[0])
        case _:
            first = tuple(draw(position) for _ in range(BATCH))
            offset = as_array(first)
    positions, key_positions = np.tile(np.arange(key_length), (BATCH, 1)), None
    if slotted:
        positions = draw(_positions([start + query_length for start in first], key_length))
        dtype = draw(st.sampled_from([np.int32, np.int8]))
        key_positions = draw(st.sampled_from(to_array))(positions.astype(dtype))
        positions = np.broadcast_to(positions, (BATCH, key_length))
    return Problem(BATCH, heads, query_length, key_length, first, offset, positions, key_positions, to_array)


@st.composite
def _positions(draw: st.DrawFn, totals: list[int], key_length: int) -> Ints:
    """The position of each key, ``[kv]`` or ``[batch, kv]``: of a ring buffer, or in no order at all."""
    slots = np.arange(key_length)
    rows = draw(st.sampled_from([1, len(totals)]))
    if draw(st.booleans()):
        # What each slot holds last, after as many tokens as an example has; a slot not yet written to is below 0.
        lasts = np.array(totals if rows > 1 else [max(totals)])[:, None] - 1
        positions = lasts - (lasts - slots) % key_length
    else:
        positions = np.random.default_rng(draw(st.integers(0, 2**16))).integers(-3, 12, (rows, key_length))
    return positions if rows > 1 or draw(st.booleans()) else positions[0]


def described(problem: Problem, depth: int = DEPTH) -> st.SearchStrategy[Described]:
    """Any mask that can be read at ``problem``: leaves, and compositions up to ``depth``."""
    one_head = st.one_of(
        _constants(),
        positional(problem),
        paddings(problem),
        *([segments_of_positions(problem)] if is_within(problem) else []),
        segments_of_pairs(problem),
        _denses(problem, heads=[1]),
        st.sampled_from(PREDICATES),
    )
    leaves = st.one_of(
        one_head,
        _denses(problem, heads=[1, problem.heads]),
        st.sampled_from(_predicates_of_heads(problem)),
        _per_heads(problem, _composed(one_head, min(depth, 1))),
    )
    return _composed(leaves, depth)


def positional(problem: Problem) -> st.SearchStrategy[Described]:
    """Any mask that is made of nothing but positions."""
    return st.one_of(
        st.just(CAUSAL), _sliding_windows(problem), _windows(problem), _chunks(problem), _prefixes(problem)
    )


@st.composite
def cases(
    draw: st.DrawFn, masks: int = 1, depth: int = DEPTH, at: st.SearchStrategy[Problem] | None = None
) -> tuple[Problem, list[Described]]:
    """A problem, and masks that can be read there."""
    problem = draw(problems() if at is None else at)
    return problem, [draw(described(problem, depth)) for _ in range(masks)]


def array_free(depth: int = DEPTH) -> st.SearchStrategy[Mask]:
    """Any mask that holds neither an array nor a function."""
    reach = st.none() | st.integers(0, 9)
    leaves = st.one_of(
        st.sampled_from([Full(), Empty(), Causal()]),
        st.builds(SlidingWindow, st.integers(1, 9)),
        st.builds(Window, reach, reach),
        st.builds(Chunked, st.integers(1, 9), st.integers(-9, 9)),
        st.builds(Prefix, st.integers(0, 9)),
    )
    parts = _joined(leaves, min(depth, 1))
    heads = st.builds(PerHead, st.lists(parts, min_size=HEADS, max_size=HEADS) | parts.map(lambda part: (part,)))
    return _joined(leaves | heads, depth)


@st.composite
def _joined(draw: st.DrawFn, leaves: st.SearchStrategy[Mask], depth: int) -> Mask:
    part = leaves if depth == 0 else _joined(leaves, depth - 1)
    match draw(st.sampled_from(JOINTS)) if depth else "leaf":
        case "and":
            return draw(part) & draw(part)
        case "or":
            return draw(part) | draw(part)
        case "not":
            return ~draw(part)
        case _:
            return draw(leaves)


# Drawn, and not left to `one_of`, which would choose among all leaves and these alike, and compose next to nothing.
JOINTS = ["leaf", "and", "or", "not"]


@st.composite
def _composed(draw: st.DrawFn, leaves: st.SearchStrategy[Described], depth: int) -> Described:
    part = leaves if depth == 0 else _composed(leaves, depth - 1)
    match draw(st.sampled_from(JOINTS)) if depth else "leaf":
        case "and":
            return both(draw(part), draw(part))
        case "or":
            return _either(draw(part), draw(part))
        case "not":
            return _neither(draw(part))
        case _:
            return draw(leaves)


def both(left: Described, right: Described) -> Described:
    return Described(left.mask & right.mask, lambda *pair: left.oracle(*pair) and right.oracle(*pair))


def _either(left: Described, right: Described) -> Described:
    return Described(left.mask | right.mask, lambda *pair: left.oracle(*pair) or right.oracle(*pair))


def _neither(part: Described) -> Described:
    return Described(~part.mask, lambda *pair: not part.oracle(*pair))


def _constants() -> st.SearchStrategy[Described]:
    return st.sampled_from(
        [Described(Full(), lambda b, h, q, kv, slot: True), Described(Empty(), lambda b, h, q, kv, slot: False)],
    )


@st.composite
def _spelled(draw: st.DrawFn, problem: Problem, value: int) -> Any:
    """The number as static structure, or as an array."""
    return draw(st.sampled_from([int, *problem.to_array]))(value)


@st.composite
def _spelled_by_example(draw: st.DrawFn, problem: Problem, value: st.SearchStrategy[int]) -> tuple[Any, list[int]]:
    """A number for all or one for each example, as the library takes it; and as a list."""
    if draw(st.booleans()):
        numbers = [draw(value) for _ in range(problem.batch)]
        return draw(st.sampled_from(problem.to_array))(numbers), numbers
    number = draw(value)
    return draw(_spelled(problem, number)), [number] * problem.batch


@st.composite
def _sliding_windows(draw: st.DrawFn, problem: Problem) -> Described:
    size = draw(st.integers(1, 6))
    return Described(SlidingWindow(draw(_spelled(problem, size))), lambda b, h, q, kv, slot: q - size < kv <= q)


@st.composite
def _windows(draw: st.DrawFn, problem: Problem) -> Described:
    reach = st.none() | st.integers(0, 4)
    left, right = draw(reach), draw(reach)

    def oracle(b: int, h: int, q: int, kv: int, slot: int) -> bool:
        return (left is None or q - left <= kv) and (right is None or kv <= q + right)

    mask = Window(
        None if left is None else draw(_spelled(problem, left)),
        None if right is None else draw(_spelled(problem, right)),
    )
    return Described(mask, oracle)


@st.composite
def _chunks(draw: st.DrawFn, problem: Problem) -> Described:
    size = draw(st.integers(1, 6))
    start, starts = draw(_spelled_by_example(problem, st.integers(-4, 9)))

    def oracle(b: int, h: int, q: int, kv: int, slot: int) -> bool:
        return (q - starts[b]) // size == (kv - starts[b]) // size

    return Described(Chunked(draw(_spelled(problem, size)), start), oracle)


@st.composite
def _prefixes(draw: st.DrawFn, problem: Problem) -> Described:
    length, lengths = draw(_spelled_by_example(problem, st.integers(0, problem.key_length + 1)))
    return Described(Prefix(length), lambda b, h, q, kv, slot: kv < lengths[b])


@st.composite
def paddings(draw: st.DrawFn, problem: Problem) -> Described:
    batch = draw(st.sampled_from([1, problem.batch]))
    rows = _random(draw, 3, (batch, problem.key_length))
    dtype = draw(st.sampled_from([np.bool_, np.int32, np.int8]))
    valid = draw(st.sampled_from(problem.to_array))(rows.astype(dtype))
    return Described(Padding(valid), lambda b, h, q, kv, slot: bool(_row(rows, b)[slot]))


@st.composite
def segments_of_positions(draw: st.DrawFn, problem: Problem, packed: bool = False) -> Described:
    """Segments by one array of ids; where ``packed``, documents one after another."""
    ids = _ids(draw, problem, problem.key_length, packed)
    mask = Segments(_as_ids(draw, problem, ids))
    return Described(mask, lambda b, h, q, kv, slot: _same_id(_row(ids, b), q, _row(ids, b), kv))


@st.composite
def segments_of_pairs(draw: st.DrawFn, problem: Problem, packed: bool = False) -> Described:
    """Segments by the ids of queries and those of the keys at hand."""
    start, count = _rows_given(draw, problem)
    query_ids, key_ids = (_ids(draw, problem, size, packed) for size in (count, problem.key_length))
    mask = Segments(_as_ids(draw, problem, query_ids), _as_ids(draw, problem, key_ids), draw(_spelled(problem, start)))
    return Described(mask, lambda b, h, q, kv, slot: _same_id(_row(query_ids, b), q - start, _row(key_ids, b), slot))


def is_within(problem: Problem) -> bool:
    """Whether every query has a position among those of the keys, as far as the library can tell."""
    known = problem.key_positions is None and isinstance(problem.offset, int)
    return not known or 0 <= problem.offset <= problem.key_length - problem.query_length


def _ids(draw: st.DrawFn, problem: Problem, count: int, packed: bool) -> Ints:
    """Ids of segments, ``[batch|1, count]``: in order and consecutive, or in no order."""
    ids = _random(draw, 3, (draw(st.sampled_from([1, problem.batch])), count))
    return np.cumsum(ids == 0, 1) if packed or draw(st.booleans()) else ids - 1


def _as_ids(draw: st.DrawFn, problem: Problem, ids: Ints) -> Any:
    return draw(st.sampled_from(problem.to_array))(ids.astype(draw(st.sampled_from([np.int32, np.int8]))))


def _same_id(query_ids: Ints, q: int, key_ids: Ints, kv: int) -> bool:
    return 0 <= q < len(query_ids) and 0 <= kv < len(key_ids) and bool(query_ids[q] == key_ids[kv])


@st.composite
def _denses(draw: st.DrawFn, problem: Problem, heads: list[int]) -> Described:
    start, count = draw(st.just((0, 1))) if draw(st.booleans()) else _rows_given(draw, problem)
    keys = draw(st.sampled_from([1, problem.key_length]))
    sizes = [(batch, head) for batch in (1, problem.batch) for head in heads]
    shape = (*draw(st.sampled_from([(), *sizes])), count, keys)
    allowed = _random(draw, 2, shape) > 0
    whole = allowed[(None,) * (4 - allowed.ndim)]

    def oracle(b: int, h: int, q: int, kv: int, slot: int) -> bool:
        row = 0 if count == 1 else q - start
        return 0 <= row < count and bool(_row(_row(whole, b), h)[row, slot if keys > 1 else 0])

    as_array = draw(st.sampled_from(problem.to_array))
    return Described(Dense(as_array(allowed), draw(_spelled(problem, start))), oracle)


def _rows_given(draw: st.DrawFn, problem: Problem) -> tuple[int, int]:
    """The position of the first query, and a number of them that reaches to the last query of every example."""
    start = draw(st.sampled_from([min(problem.first), min(0, *problem.first)]))
    return start, max(problem.first) + problem.query_length - start


def _random(draw: st.DrawFn, below: int, shape: tuple[int, ...]) -> Ints:
    return np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, below, shape)


def _row(array: npt.NDArray[Any], index: int) -> npt.NDArray[Any]:
    """A row, or the one that serves every index."""
    return array[index if len(array) > 1 else 0]


@st.composite
def _per_heads(draw: st.DrawFn, problem: Problem, part: st.SearchStrategy[Described]) -> Described:
    parts = [draw(part) for _ in range(draw(st.sampled_from([1, problem.heads])))]
    if draw(st.booleans()):
        parts[-1] = parts[0]
    as_sequence = draw(st.sampled_from([tuple, list]))
    mask = PerHead(as_sequence(part.mask for part in parts))
    return Described(mask, lambda b, h, *pair: parts[h if len(parts) > 1 else 0].oracle(b, h, *pair))


CAUSAL = Described(Causal(), lambda b, h, q, kv, slot: kv <= q)


def _diagonals(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 2 == 0


def _first_half(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv < q // 2


def _first_half_bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv.min < q.max // 2, kv.max < q.min // 2


def _some_first_half_bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv.min < q.max // 2, False


def _later(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv >= h + b


def _later_bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv.max >= h + b, kv.min >= h + b


PREDICATES = [
    Described(Predicate(_diagonals), lambda b, h, q, kv, slot: (q + kv) % 2 == 0),
    Described(Predicate(_first_half, bounds=_first_half_bounds), lambda b, h, q, kv, slot: kv < q // 2),
    Described(Predicate(_first_half, bounds=_some_first_half_bounds), lambda b, h, q, kv, slot: kv < q // 2),
]


def _predicates_of_heads(problem: Problem) -> list[Described]:
    # What a predicate does with the batch and the heads shows only where something says how many there are.
    sizes = Dense(np.ones((problem.batch, problem.heads, 1, 1), np.bool_))
    return [
        Described(Predicate(_later) & sizes, lambda b, h, q, kv, slot: kv >= h + b),
        Described(
            Predicate(_later, problem.batch, problem.heads, _later_bounds), lambda b, h, q, kv, slot: kv >= h + b
        ),
    ]
