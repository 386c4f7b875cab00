"""Masks, each with an independent oracle: a slow Python function of four ints, written from the table in the design."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from jaxmask import Causal, Dense, Empty, Full, Mask, Padding, Predicate, Prefix, SlidingWindow, Window

Oracle = Callable[[int, int, int, int], bool]
Bools = npt.NDArray[np.bool_]

# A small pool, for every new shape is another compilation.
LENGTHS = [(5, 5), (1, 5), (3, 5), (4, 4)]
BATCH, HEADS = 2, 3
DEPTH = 3


@dataclass(frozen=True)
class Problem:
    """Where masks are read: sizes, the first position of each example, and the offset that says so to the library."""

    batch: int
    heads: int
    query_length: int
    key_length: int
    first: tuple[int, ...]
    offset: Any

    def dense(self, mask: Mask) -> Bools:
        """What the library says, at full size."""
        allowed = mask.dense(self.query_length, self.key_length, offset=self.offset)
        return np.broadcast_to(np.asarray(allowed), (self.batch, self.heads, self.query_length, self.key_length))

    def expected(self, oracle: Oracle) -> Bools:
        """What the oracle says, pair by pair."""
        shape = (self.batch, self.heads, self.query_length, self.key_length)
        pairs = [oracle(b, h, self.first[b] + i, j) for b, h, i, j in np.ndindex(*shape)]
        return np.array(pairs, np.bool_).reshape(shape)


@dataclass(frozen=True)
class Described:
    """A mask and what it should mean."""

    mask: Mask
    oracle: Oracle


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    query_length, key_length = draw(st.sampled_from(LENGTHS))
    position = st.sampled_from([0, key_length - query_length, 2, 7, -2])
    kinds = ["int", "scalar", "batch"] + (["missing"] if query_length == key_length else [])
    match draw(st.sampled_from(kinds)):
        case "missing":
            first, offset = (0,) * BATCH, None
        case "int":
            first = (draw(position),) * BATCH
            offset = first[0]
        case "scalar":
            first = (draw(position),) * BATCH
            offset = jnp.asarray(first[0])
        case _:
            first = tuple(draw(position) for _ in range(BATCH))
            offset = jnp.asarray(first)
    return Problem(BATCH, HEADS, query_length, key_length, first, offset)


def described(problem: Problem, depth: int = DEPTH) -> st.SearchStrategy[Described]:
    """Any mask that can be read at ``problem``: leaves, and compositions up to ``depth``."""
    leaves = st.one_of(
        _constants(),
        st.just(Described(Causal(), lambda b, h, q, kv: kv <= q)),
        _sliding_windows(),
        _windows(),
        _prefixes(problem),
        _paddings(problem),
        _denses(problem),
        st.sampled_from(PREDICATES),
    )
    if depth == 0:
        return leaves
    parts = described(problem, depth - 1)
    return st.one_of(
        leaves,
        st.builds(_both, parts, parts),
        st.builds(_either, parts, parts),
        st.builds(_neither, parts),
    )


@st.composite
def cases(draw: st.DrawFn, masks: int = 1, depth: int = DEPTH) -> tuple[Problem, list[Described]]:
    """A problem, and masks that can be read there."""
    problem = draw(problems())
    return problem, [draw(described(problem, depth)) for _ in range(masks)]


def _both(left: Described, right: Described) -> Described:
    return Described(left.mask & right.mask, lambda *pair: left.oracle(*pair) and right.oracle(*pair))


def _either(left: Described, right: Described) -> Described:
    return Described(left.mask | right.mask, lambda *pair: left.oracle(*pair) or right.oracle(*pair))


def _neither(part: Described) -> Described:
    return Described(~part.mask, lambda *pair: not part.oracle(*pair))


def _constants() -> st.SearchStrategy[Described]:
    return st.sampled_from(
        [Described(Full(), lambda b, h, q, kv: True), Described(Empty(), lambda b, h, q, kv: False)],
    )


def _spelled(value: int) -> st.SearchStrategy[Any]:
    """The number as static structure, or as an array that can be traced."""
    return st.sampled_from([value, jnp.asarray(value), np.asarray(value)])


@st.composite
def _sliding_windows(draw: st.DrawFn) -> Described:
    size = draw(st.integers(1, 6))
    return Described(SlidingWindow(draw(_spelled(size))), lambda b, h, q, kv: q - size < kv <= q)


@st.composite
def _windows(draw: st.DrawFn) -> Described:
    reach = st.none() | st.integers(0, 4)
    left, right = draw(reach), draw(reach)

    def oracle(b: int, h: int, q: int, kv: int) -> bool:
        return (left is None or q - left <= kv) and (right is None or kv <= q + right)

    mask = Window(
        None if left is None else draw(_spelled(left)),
        None if right is None else draw(_spelled(right)),
    )
    return Described(mask, oracle)


@st.composite
def _prefixes(draw: st.DrawFn, problem: Problem) -> Described:
    length = st.integers(0, problem.key_length + 1)
    if draw(st.booleans()):
        lengths = [draw(length) for _ in range(problem.batch)]
        return Described(Prefix(jnp.asarray(lengths)), lambda b, h, q, kv: kv < lengths[b])
    same = draw(length)
    return Described(Prefix(draw(_spelled(same))), lambda b, h, q, kv: kv < same)


@st.composite
def _paddings(draw: st.DrawFn, problem: Problem) -> Described:
    batch = draw(st.sampled_from([1, problem.batch]))
    rows = [[draw(st.integers(0, 2)) for _ in range(problem.key_length)] for _ in range(batch)]
    dtype = draw(st.sampled_from([np.bool_, np.int32, np.int8]))
    as_array = draw(st.sampled_from([jnp.asarray, np.asarray]))
    valid: Any = as_array(np.array(rows, dtype))
    return Described(Padding(valid), lambda b, h, q, kv: bool(rows[b if batch > 1 else 0][kv]))


@st.composite
def _denses(draw: st.DrawFn, problem: Problem) -> Described:
    # Rows from `start` on that reach to the last query of every example; or one row, which serves every query.
    start = draw(st.sampled_from([min(problem.first), min(0, *problem.first)]))
    count = draw(st.sampled_from([1, max(problem.first) + problem.query_length - start]))
    keys = draw(st.sampled_from([1, problem.key_length]))
    batch, heads = draw(
        st.sampled_from([(0, 0), (1, 1), (problem.batch, 1), (1, problem.heads), (problem.batch, problem.heads)])
    )
    shape = (count, keys) if batch == 0 else (batch, heads, count, keys)
    allowed = np.random.default_rng(draw(st.integers(0, 2**16))).random(shape) < 0.5

    def oracle(b: int, h: int, q: int, kv: int) -> bool:
        row = 0 if count == 1 else q - start
        if not 0 <= row < count:
            return False
        column = kv if keys > 1 else 0
        if batch == 0:
            return bool(allowed[row, column])
        return bool(allowed[b if batch > 1 else 0, h if heads > 1 else 0, row, column])

    return Described(Dense(jnp.asarray(allowed), draw(_spelled(start))), oracle)


def _diagonals(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 2 == 0


def _per_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv >= h + b


# What a predicate does with the batch and the heads shows only where another mask says how many there are.
SIZES = Dense(jnp.ones((BATCH, HEADS, 1, 1), jnp.bool_))
PREDICATES = [
    Described(Predicate(_diagonals), lambda b, h, q, kv: (q + kv) % 2 == 0),
    Described(Predicate(_per_head) & SIZES, lambda b, h, q, kv: kv >= h + b),
]
