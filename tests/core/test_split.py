"""What fused kernels take of a mask in their own arguments, joined to what is left over, is the mask."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from jaxmask import Causal, Chunked, Full, Mask, Padding, Prefix, Segments, SlidingWindow, Window
from jaxmask.native import Native, Split
from tests.helpers.strategies import Described, Problem, cases, problems

Drawn = tuple[Problem, list[Described]]
Bools = npt.NDArray[np.bool_]
at_indices = problems(slots=False)


def read(split: Split[Mask], query_length: int, key_length: int) -> Bools:
    """The arguments as ``jax.nn.dot_product_attention`` documents them, with neither a position nor an offset."""
    q, kv = np.arange(query_length)[:, None], np.arange(key_length)
    allowed = np.ones((1, 1, query_length, key_length), np.bool_)
    if split.is_causal:
        allowed = allowed & (kv <= q)
    if split.local_window_size is not None:
        before, after = split.local_window_size
        allowed = allowed & (q - before <= kv) & (kv <= q + after)
    if split.key_value_seq_lengths is not None:
        lengths = np.asarray(split.key_value_seq_lengths)[:, None, None, None]
        allowed = allowed & (kv < lengths)
    return allowed


@settings(max_examples=30)
@given(cases(depth=3, at=at_indices))
def test_a_split_and_its_residual_are_the_mask(case: Drawn) -> None:
    problem, [drawn] = case
    split = drawn.mask.split(*problem.lengths, offset=problem.offset)
    residual = np.asarray(split.residual.dense(*problem.lengths, offset=problem.offset))
    joined = np.broadcast_to(read(split, *problem.lengths) & residual, problem.shape)
    np.testing.assert_array_equal(joined, problem.expected(drawn.oracle))


@settings(max_examples=30)
@given(cases(depth=3, at=at_indices))
def test_a_row_has_keys_where_the_arguments_leave_any(case: Drawn) -> None:
    problem, [drawn] = case
    split = drawn.mask.split(*problem.lengths, offset=problem.offset)
    rows = read(split, *problem.lengths)[:, 0].any(-1)
    np.testing.assert_array_equal(split.has_keys(), rows)


def numbers(split: Split[Mask]) -> tuple[Any, ...]:
    lengths = split.key_value_seq_lengths
    return split.is_causal, split.local_window_size, None if lengths is None else np.asarray(lengths).tolist()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Full(), (False, None, None)),
        (Causal(), (True, None, None)),
        (SlidingWindow(3), (True, (2, 0), None)),
        (Window(2, 1), (False, (2, 1), None)),
        (Window(None, 1), (False, (8, 1), None)),
        (Window(2, None), (False, (2, 8), None)),
        (Window(None, None), (False, None, None)),
        (Window(None, 0), (True, None, None)),
        (Prefix(5), (False, None, [5])),
        (Prefix(jnp.array([5, 99])), (False, None, [5, 8])),
        (Prefix(jnp.array([5, 2])) & Prefix(3) & Causal(), (True, None, [3, 2])),
        (Window(5, 2) & Window(1, 4), (False, (1, 2), None)),
        (SlidingWindow(3) & Window(1, 4), (True, (1, 0), None)),
    ],
    ids=repr,
)
def test_arguments_that_say_all_of_a_mask(mask: Mask, says: tuple[Any, ...]) -> None:
    split = mask.split(8, 8)
    assert split.residual == Full()
    assert numbers(split) == says


@pytest.mark.parametrize("offset", [5, np.array([5, 2]), jnp.array([5, 2])], ids=["int", "numpy", "jax"])
def test_a_step_of_decoding_becomes_lengths(offset: Any) -> None:
    split = Causal().split(1, 8, offset=offset)
    assert split.residual == Full()
    assert numbers(split) == (False, None, (np.reshape(offset, -1) + 1).tolist())


@pytest.mark.parametrize(
    "left_over",
    [
        SlidingWindow(jnp.asarray(3)),
        Padding(jnp.ones((1, 8), bool)),
        Segments(jnp.zeros((1, 8), int)),
        Causal() | Prefix(2),
        ~Causal(),
    ],
    ids=repr,
)
def test_what_the_arguments_cannot_say_is_left_over(left_over: Mask) -> None:
    assert (Causal() & left_over).split(8, 8).residual is left_over


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3), Window(1, 1)], ids=repr)
def test_a_mask_of_positions_is_left_over_where_queries_begin_at_an_offset(mask: Mask) -> None:
    assert mask.split(4, 8, offset=4).residual is mask
    assert mask.split(4, 8, offset=jnp.asarray(0)).residual is mask


def test_a_window_as_wide_as_positions_go_does_not_overflow() -> None:
    split = Window(0, 2**31 - 1).split(4, 6, offset=0)
    assert split.has_keys().all()
    assert split.local_window_size == (0, 6)


INTERVALS = [
    Full(),
    Causal(),
    SlidingWindow(3),
    SlidingWindow(jnp.asarray(3)),
    Window(2, 1),
    Window(2**31 - 1, 2**31 - 1),
    Chunked(3),
    Chunked(3, np.array([1, 5])),
    Chunked(2**31 - 1, -(2**31) + 1),
    Prefix(jnp.array([5, 2])),
    Segments(np.array([[0, 0, 3, 3, 3, 1, 1, 2]]), consecutive=True),
    Segments(jnp.array([[4, 4, 7, 7, 7, 7, 7, 1], [0, 0, 0, 0, 5, 5, 5, 5]]), consecutive=True),
    Segments(jnp.array([[3, 1, 9, 0, 0, 2, 2, 2]]), jnp.array([[0, 0, 3, 3, 3, 1, 1, 2]]), consecutive=True),
]


@pytest.mark.parametrize("second", [None, *INTERVALS], ids=repr)
@pytest.mark.parametrize("first", INTERVALS, ids=repr)
def test_masks_that_are_intervals_say_the_keys_of_each_query(first: Mask, second: Mask | None) -> None:
    mask = first if second is None else first & second
    split = mask.split(8, 8, intervals=True)
    assert split.residual == Full()
    start, end = (np.asarray(x)[..., None] for x in split.key_interval)
    allowed = np.asarray(mask.dense(8, 8))[:, 0]
    said = np.broadcast_to((start <= np.arange(8)) & (np.arange(8) < end), allowed.shape)
    np.testing.assert_array_equal(said, allowed)


@pytest.mark.parametrize("mask", INTERVALS[1:-1], ids=repr)
def test_an_interval_holds_at_any_positions_of_queries(mask: Mask) -> None:
    positions = jnp.array([7, 0, 3])
    start, end = mask.split(3, 8, query_positions=positions, intervals=True).key_interval
    allowed = np.asarray(mask.dense(3, 8, query_positions=positions))[:, 0]
    said = (np.asarray(start)[..., None] <= np.arange(8)) & (np.arange(8) < np.asarray(end)[..., None])
    np.testing.assert_array_equal(np.broadcast_to(said, allowed.shape), allowed)


def test_ids_that_return_are_not_consecutive_and_are_refused() -> None:
    with pytest.raises(ValueError, match="consecutive is True, but row 1 of the ids returns to an id"):
        Segments(np.array([[0, 1, 1], [0, 1, 0]]), consecutive=True)


class Near(Mask):
    """A mask of a user, which tells kernels what it is in one method."""

    radius: int

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return abs(q - kv) <= self.radius

    def native(self) -> Native:
        return Native(left=self.radius, right=self.radius)


def test_a_mask_of_a_user_tells_kernels_what_it_is() -> None:
    split = (Near(2) & Prefix(5)).split(8, 8)
    assert split.residual == Full()
    assert numbers(split) == (False, (2, 2), [5])
