"""Law 3: what is known of tiles is true of every pair in them; and how much is known, at what cost."""

import tracemalloc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmask import (
    EMPTY,
    FULL,
    PARTIAL,
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
from tests.helpers.programs import collectives
from tests.helpers.strategies import (
    CAUSAL,
    Bools,
    Described,
    Problem,
    both,
    cases,
    is_within,
    paddings,
    positional,
    problems,
    segments_of_pairs,
    segments_of_positions,
)

few = settings(max_examples=12)
fewer = settings(max_examples=6)
many = settings(max_examples=200)
States = npt.NDArray[np.int8]
Drawn = tuple[Problem, list[Described]]

LENGTHS = [(9, 13), (16, 16), (1, 12), (7, 7)]
blocks = st.sampled_from([(1, 1), (2, 3), (4, 4), (5, 2), (3, 128), (128, 128)])
# Where all is static, NumPy decides at trace time; else the program does.
static = problems(LENGTHS, (np.asarray,))
traced = problems(LENGTHS, (jnp.asarray, np.asarray))


def exactly(allowed: Bools, block: tuple[int, int]) -> States:
    """The states of tiles whose pairs are known, tile by tile."""
    rows, columns = (range(0, length, size) for length, size in zip(allowed.shape[2:], block, strict=True))
    states = np.empty((*allowed.shape[:2], len(rows), len(columns)), np.int8)
    for b, h, i, j in np.ndindex(*states.shape):
        tile = allowed[b, h, rows[i] : rows[i] + block[0], columns[j] : columns[j] + block[1]]
        states[b, h, i, j] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
    return states


def at_full_size(states: Any, like: States) -> States:
    return np.broadcast_to(np.asarray(states), like.shape)


def same_bits(left: Any, right: Any) -> None:
    left, right = np.asarray(left), np.asarray(right)
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def assert_sound(tiles: TileMap, problem: Problem, drawn: Described) -> None:
    truth = exactly(problem.expected(drawn.oracle), tiles.block)
    known = at_full_size(tiles.states, truth)
    np.testing.assert_array_equal(np.where(known == PARTIAL, PARTIAL, truth), known)


# Soundness: EMPTY has no pair that may attend, FULL no other.


@many
@given(cases(at=static), blocks)
def test_tiles_of_static_masks_are_sound(case: Drawn, block: tuple[int, int]) -> None:
    problem, [drawn] = case
    tiles = problem.tiles(drawn.mask, block)
    assert isinstance(tiles.states, np.ndarray)
    assert_sound(tiles, problem, drawn)


@few
@given(cases(at=traced), blocks)
def test_tiles_of_arrays_are_sound(case: Drawn, block: tuple[int, int]) -> None:
    problem, [drawn] = case
    assert_sound(problem.tiles(drawn.mask, block), problem, drawn)


@few
@given(cases(at=static), blocks)
def test_tiles_found_by_a_program_are_those_found_at_trace_time(case: Drawn, block: tuple[int, int]) -> None:
    problem, [drawn] = case
    find: Any = jax.jit(lambda mask, where: mask.tiles(*problem.lengths, block=block, **where).states)
    found = find(drawn.mask, problem.where)
    expected = problem.tiles(drawn.mask, block).states
    assert (found.shape, found.dtype) == (expected.shape, np.int8)
    same_bits(found, expected)


@fewer
@given(cases(depth=3, at=static), blocks)
def test_tiles_under_vmap_are_those_of_each(case: Drawn, block: tuple[int, int]) -> None:
    problem, [drawn] = case

    def find(arguments: Any) -> Any:
        mask, where, _ = arguments
        return mask.tiles(*problem.lengths, block=block, **where).states

    # An index is mapped over, too, for nothing else need be an array.
    one = jax.tree.map(jnp.asarray, (drawn.mask, problem.where, 0))
    pair = [one, jax.tree.map(lambda leaf: ~leaf if leaf.dtype == jnp.bool_ else leaf + 1, one)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    same_bits(jax.vmap(find)(stacked), np.stack([find(arguments) for arguments in pair]))


# Exactness: where nothing that could be known is missed.


@st.composite
def exact_cases(draw: st.DrawFn) -> tuple[Problem, Described]:
    """What the docs call exact: a leaf alone, or under the causal mask."""
    problem = draw(problems(LENGTHS, (np.asarray,), slots=False).filter(is_within))
    packed = segments_of_positions(problem, packed=True)
    alone = st.one_of(positional(problem), packed, segments_of_pairs(problem, packed=True), paddings(problem))
    drawn = draw(alone | st.builds(both, st.just(CAUSAL), st.one_of(positional(problem), packed)))
    return problem, drawn


@many
@given(exact_cases(), blocks)
def test_tiles_are_exact(case: tuple[Problem, Described], block: tuple[int, int]) -> None:
    problem, drawn = case
    truth = exactly(problem.expected(drawn.oracle), block)
    np.testing.assert_array_equal(at_full_size(problem.tiles(drawn.mask, block).states, truth), truth)


LENGTH, BLOCK = 96, 8
PACKED = np.sort(np.random.default_rng(0).integers(0, 5, (2, LENGTH)), axis=1)
EXACT: dict[str, Mask] = {
    "causal": Causal(),
    "sliding": SlidingWindow(20),
    "window": Window(3, 17),
    "chunked": Chunked(20, np.array([0, 13])),
    "prefix": Prefix(np.array([0, 13])),
    "packed": Segments(PACKED),
    "causal & window": Causal() & Window(20, None),
    "causal & chunked": Causal() & Chunked(20),
    "causal & packed": Causal() & Segments(PACKED),
    "causal | prefix": Causal() | Prefix(13),
}


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (LENGTH - 5, LENGTH - 3), (30, LENGTH - 3)], ids=str)
@pytest.mark.parametrize("block", [BLOCK, (8, 16), (24, 7), (128, 128)], ids=str)
@pytest.mark.parametrize("mask", EXACT.values(), ids=EXACT.keys())
def test_tiles_of_longer_masks_are_exact(mask: Mask, block: int | tuple[int, int], lengths: tuple[int, int]) -> None:
    if mask.shape[2] > 1:
        mask = jax.tree.map(lambda ids: ids[:, : lengths[1]], mask)
    offset = lengths[1] - lengths[0]
    tiles = mask.tiles(*lengths, block=block, offset=offset)
    same_bits(tiles.states, exactly(np.asarray(mask.dense(*lengths, offset=offset)), tiles.block))


def test_ids_with_gaps_are_sound_and_not_exact() -> None:
    # Between the ids 0 and 2 of the queries, there may be the 1 of the keys, as far as bounds can tell.
    mask = Segments(np.array([[0, 2]]), np.array([[1, 1]]))
    assert mask.tiles(2, 2, block=2).states == PARTIAL
    assert not mask.dense(2, 2).any()


# How tight causal & padding is. At most one tile in a row of tiles is PARTIAL though it is EMPTY: that which the
# diagonal leaves through its side, where the keys up to the last query are padding, and those after it are not.


def missed(valid: Bools, block: tuple[int, int], offset: int = 0) -> Bools:
    """Which tiles of ``Causal() & Padding(valid)`` are PARTIAL, though they are EMPTY or FULL."""
    mask, length = Causal() & Padding(valid), valid.shape[1]
    truth = exactly(np.asarray(mask.dense(length - offset, length, offset=offset)), block)
    return np.asarray(mask.tiles(length - offset, length, block=block, offset=offset).states) != truth


PADDED = np.arange(48) >= np.arange(49)[:, None]
padding_blocks = pytest.mark.parametrize("block", [(8, 8), (8, 16), (16, 8), (5, 7), (1, 48), (48, 48)], ids=str)


@padding_blocks
def test_causal_and_right_padding_is_exact(block: tuple[int, int]) -> None:
    assert not missed(~PADDED, block).any()


@padding_blocks
def test_causal_and_left_padding_misses_at_most_one_tile_in_a_row_of_tiles(block: tuple[int, int]) -> None:
    assert missed(PADDED, block).sum(axis=3).max() <= 1


def test_causal_and_left_padding_misses_tiles_that_the_diagonal_cuts() -> None:
    # The example of three padded keys: the queries 0 and 1 have none before them that is valid.
    assert np.argwhere(missed(PADDED[3:4], (2, 8))).tolist() == [[0, 0, 0, 0]]


@given(st.integers(0, 2**16), st.sampled_from([(8, 8), (8, 16), (5, 7)]), st.integers(0, 9))
def test_causal_and_any_padding_misses_at_most_one_tile_in_a_row_of_tiles(
    seed: int, block: tuple[int, int], offset: int
) -> None:
    valid = np.random.default_rng(seed).random((2, 48)) < 0.2
    assert missed(valid, block, offset).sum(axis=3).max() <= 1


@given(st.integers(0, 2**16), st.sampled_from([1, 4, 8]), st.integers(0, 3))
def test_causal_and_any_padding_is_exact_where_tiles_meet_on_the_diagonal(seed: int, size: int, skipped: int) -> None:
    valid = np.random.default_rng(seed).random((2, 48)) < 0.2
    assert not missed(valid, (size, size), offset=skipped * size).any()


# Three-valued logic: minimum, maximum, flip.


@given(cases(masks=2, depth=2, at=static), blocks)
def test_and_is_the_minimum_and_or_the_maximum(case: Drawn, block: tuple[int, int]) -> None:
    problem, [left, right] = case
    a, b = (np.asarray(problem.tiles(part.mask, block).states) for part in (left, right))
    for joined, expected in ((left.mask & right.mask, np.minimum(a, b)), (left.mask | right.mask, np.maximum(a, b))):
        found = problem.tiles(joined, block).states
        same_bits(np.broadcast_to(found, expected.shape), expected)


@given(cases(depth=3, at=problems(LENGTHS, (np.asarray,), slots=False)), blocks)
def test_not_is_the_flip(case: Drawn, block: tuple[int, int]) -> None:
    problem, [drawn] = case
    same_bits(problem.tiles(~drawn.mask, block).states, 2 - problem.tiles(drawn.mask, block).states)


def test_states_are_ordered_bytes() -> None:
    assert (EMPTY, PARTIAL, FULL) == (0, 1, 2)
    for mask in (Full(), Empty(), Causal(), Prefix(jnp.asarray(1))):
        assert mask.tiles(4, 4).states.dtype == np.int8


# Offsets and positions of keys.

MASKS: dict[str, Mask] = EXACT | {
    "full": Full(),
    "padding": Padding(np.arange(LENGTH) >= np.array([[0], [13]])),
    "mixed": Segments(PACKED[:, ::-1] % 3, PACKED),
    "per-head": PerHead([Causal(), SlidingWindow(20), Prefix(4)]) & Segments(PACKED),
    "predicate": Predicate(lambda b, h, q, kv: kv < q // 2, bounds=lambda b, h, q, kv: (kv.min < q.max // 2, False)),
    "sinks": Causal() & (SlidingWindow(20) | Prefix(4)) & ~Chunked(7, 2),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@every_mask
def test_tiles_at_an_offset_are_rows_of_the_whole(mask: Mask) -> None:
    whole = mask.tiles(LENGTH, LENGTH, block=BLOCK).states
    for rows in (1, 4):
        first = 3 * BLOCK
        found = mask.tiles(rows * BLOCK, LENGTH, block=BLOCK, offset=first).states
        same_bits(found, whole[:, :, 3 : 3 + rows])
        same_bits(mask.tiles(rows * BLOCK, LENGTH, block=BLOCK, offset=jnp.asarray(first)).states, found)


@every_mask
def test_an_offset_per_example_reads_the_tiles_of_each(mask: Mask) -> None:
    starts = np.array([2, 5]) * BLOCK
    found = mask.tiles(BLOCK, LENGTH, block=BLOCK, offset=starts).states
    whole = np.broadcast_to(mask.tiles(LENGTH, LENGTH, block=BLOCK).states, (2, *found.shape[1:2], 12, 12))
    same_bits(found, np.stack([whole[0, :, 2:3], whole[1, :, 5:6]]))


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "causal & packed", "per-head", "predicate", "sinks"])
def test_tiles_of_a_part_of_the_keys_are_columns_of_the_whole(name: str) -> None:
    mask, half = MASKS[name], LENGTH // 2
    whole = mask.tiles(LENGTH, LENGTH, block=BLOCK).states
    found = mask.tiles(LENGTH, half, block=BLOCK, offset=0, key_positions=half + np.arange(half)).states
    same_bits(found, whole[..., 6:])


def test_a_tile_of_empty_slots_is_empty_and_one_with_some_is_not_full() -> None:
    positions = np.array([0, 1, 2, -1, -1, -1])
    same_bits(Full().tiles(2, 6, block=2, offset=0, key_positions=positions).states, np.array([[[[2, 1, 0]]]], np.int8))


def test_a_thousand_decode_steps_find_their_tiles_by_one_program() -> None:
    traces: list[int] = []

    def bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
        traces.append(1)
        return kv.min <= q.max, False

    mask = Predicate(lambda b, h, q, kv: kv <= q, bounds=bounds) & SlidingWindow(jnp.asarray(64))
    mask.tiles(1, 1000, block=(1, 128), offset=0)
    once = len(traces)
    for t in range(1, 1000):
        mask.tiles(1, 1000, block=(1, 128), offset=t)
    assert len(traces) == once > 0


# What it costs: nothing on the device where all is static, and never an element for each pair.


@every_mask
def test_static_masks_put_no_work_on_the_device(mask: Mask) -> None:
    def read(offset: int) -> TileMap:
        tiles = mask.tiles(BLOCK, LENGTH, block=BLOCK, offset=offset, key_positions=np.arange(LENGTH))
        found = (tiles.counts, tiles.sparsity, tiles.kv_counts, tiles.kv_indices, tiles.q_counts, tiles.q_indices)
        assert [type(array) for array in found] == [np.ndarray, np.float64, *[np.ndarray] * 4]
        return tiles

    with jax.transfer_guard("disallow_explicit"):
        assert type(read(4).states) is np.ndarray
    assert jax.make_jaxpr(lambda: read(4).states)().eqns == []


def test_the_guard_sees_work_on_the_device() -> None:
    mask = Causal() & Padding(np.ones((1, LENGTH), bool))
    with jax.transfer_guard("disallow_explicit"), pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
        mask.dense(LENGTH, LENGTH)


@pytest.mark.parametrize(
    "mask",
    [SlidingWindow(jnp.asarray(3)), Causal() & Prefix(jnp.array([1, 2])), Segments(jnp.asarray(PACKED))],
    ids=repr,
)
def test_masks_with_arrays_are_bounded_by_the_program(mask: Mask) -> None:
    tiles = mask.tiles(LENGTH, LENGTH, block=BLOCK)
    assert all(isinstance(array, jax.Array) for array in (tiles.states, tiles.counts, tiles.kv_indices))
    assert jax.make_jaxpr(lambda mask: mask.tiles(LENGTH, LENGTH, block=BLOCK).states)(mask).eqns


def test_an_offset_in_the_making_is_enough() -> None:
    find: Any = jax.jit(lambda t: Causal().tiles(BLOCK, LENGTH, block=BLOCK, offset=t).states)
    same_bits(find(16), Causal().tiles(BLOCK, LENGTH, block=BLOCK, offset=16).states)


LONG, LARGE = 131_072, 1024
IDS = np.arange(2 * LONG).reshape(2, LONG) // 5000
LONG_MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Window(4096, 4096),
    "chunked": Chunked(8192, np.array([0, 13])),
    "padding": Padding(IDS > 5),
    "segments": Segments(IDS),
    "segments-pair": Segments(IDS, IDS),
    "per-head": PerHead([Causal(), SlidingWindow(4096), Prefix(64)]),
    "dense-row": Dense((IDS > 5)[:, None, None]),
    "composed": (Causal() & SlidingWindow(4096) | Prefix(64)) & Segments(IDS) & Padding(IDS > 5) & ~Chunked(8192),
}
every_long_mask = pytest.mark.parametrize("mask", LONG_MASKS.values(), ids=LONG_MASKS.keys())


def few_bytes(states: Any) -> int:
    """Some arrays of the size of the tiles, and of the lengths. A bool for each pair is 16 GiB."""
    return 64 * (states.size + states.shape[0] * LONG)


@every_long_mask
def test_memory_at_trace_time_is_for_tiles_and_not_for_pairs(mask: Mask) -> None:
    tracemalloc.start()
    try:
        tiles = mask.tiles(LONG, LONG, block=LARGE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tiles.states.nbytes < peak < few_bytes(tiles.states)


@every_long_mask
def test_memory_of_the_program_is_for_tiles_and_not_for_pairs(mask: Mask) -> None:
    find: Any = jax.jit(lambda mask, t: mask.tiles(LONG, LONG, block=LARGE, offset=t).states)
    compiled = find.lower(mask, 0).compile()
    states = find(mask, 0)
    same_bits(states, mask.tiles(LONG, LONG, block=LARGE).states)
    assert compiled.memory_analysis().temp_size_in_bytes < few_bytes(states)


# Predicates that know their bounds.


def upper(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv >= q + h


def upper_bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv.max >= q.min + h, kv.min >= q.max + h


def test_a_predicate_without_bounds_is_partial() -> None:
    assert (np.asarray(Predicate(upper, heads=3).tiles(8, 8, block=4).states) == PARTIAL).all()


def test_bounds_of_a_predicate_are_honoured() -> None:
    mask = Predicate(upper, heads=3, bounds=upper_bounds)
    for offset in (0, jnp.asarray(0)):
        states = mask.tiles(10, 10, block=4, offset=offset).states
        same_bits(states, exactly(np.asarray(mask.dense(10, 10)), (4, 4)))


def test_bounds_that_look_at_heads_of_an_unknown_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"looks at its index of heads.*Predicate\(fn, heads"):
        Predicate(upper, bounds=upper_bounds).tiles(8, 8)


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (True, TypeError, r"bounds of Predicate must return a pair \(some, every\), got True from .*wrong"),
        (np.array([True, False]), TypeError, r"a pair \(some, every\), got bool\[2\]"),
        ((True, False, True), TypeError, r"a pair \(some, every\), got \(True, False, True\)"),
        ((1, 0), TypeError, r"bounds of Predicate must return bool, got 1 from .*wrong"),
        ((None, False), TypeError, "must return bool, got None"),
        ((np.zeros((2, 2)), False), TypeError, r"must return bool, got float64\[2, 2\]"),
        ((np.ones((5,), bool), False), ValueError, r"that of its arguments, \[1, 1, 2, 2\], got bool\[5\]"),
    ],
    ids=["bool", "array", "three", "ints", "none", "floats", "shape"],
)
def test_what_bounds_return_is_checked(returned: Any, error: type[Exception], says: str) -> None:
    def wrong(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return returned

    for offset in (0, jnp.asarray(0)):
        with pytest.raises(error, match=says):
            Predicate(lambda b, h, q, kv: kv <= q, bounds=wrong).tiles(8, 8, block=4, offset=offset)


# The map of tiles: counts and indices by slow definitions; and its pytree.


@st.composite
def maps(draw: st.DrawFn) -> TileMap:
    """Tiles in any state."""
    shape = draw(st.sampled_from([(1, 1, 3, 4), (2, 3, 2, 5), (2, 1, 1, 1)]))
    states = np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, 3, shape).astype(np.int8)
    as_array = draw(st.sampled_from([jnp.asarray, np.asarray]))
    return TileMap(as_array(states), Full(), 0, shape[2] * 2, shape[3] * 2, (2, 2))


def in_order(row: Any) -> list[int]:
    """The tiles that are not EMPTY, and then the others."""
    return [j for j, state in enumerate(row) if state != EMPTY] + [j for j, state in enumerate(row) if state == EMPTY]


@given(maps())
def test_counts_and_sparsity(tiles: TileMap) -> None:
    states = np.asarray(tiles.states).ravel().tolist()
    assert tiles.counts.dtype == np.int32
    assert tiles.counts.tolist() == [states.count(EMPTY), states.count(PARTIAL), states.count(FULL)]
    assert float(tiles.sparsity) == pytest.approx(states.count(EMPTY) / len(states))


@given(maps())
def test_counts_and_indices_of_each_row_of_tiles(tiles: TileMap) -> None:
    states = np.asarray(tiles.states)
    rows = {place: states[place] for place in np.ndindex(*states.shape[:3])}
    assert (tiles.kv_counts.shape, tiles.kv_indices.shape) == (states.shape[:3], states.shape)
    assert (tiles.kv_counts.dtype, tiles.kv_indices.dtype) == (np.int32, np.int32)
    for place, row in rows.items():
        assert int(tiles.kv_counts[place]) == sum(state != EMPTY for state in row)
        assert tiles.kv_indices[place].tolist() == in_order(row)


@given(maps())
def test_counts_and_indices_of_each_column_are_those_of_the_rows_of_the_transpose(tiles: TileMap) -> None:
    turned = TileMap(tiles.states.swapaxes(2, 3), tiles.mask, 0, tiles.key_length, tiles.query_length, (2, 2))
    same_bits(tiles.q_counts, turned.kv_counts)
    same_bits(tiles.q_indices, turned.kv_indices)


@every_mask
def test_tiles_go_through_jit_as_results_and_as_arguments(mask: Mask) -> None:
    expected = mask.tiles(LENGTH, LENGTH, block=BLOCK)
    tiles: TileMap = jax.jit(lambda mask: mask.tiles(LENGTH, LENGTH, block=BLOCK))(mask)
    same_bits(tiles.states, expected.states)
    assert (tiles.query_length, tiles.key_length, tiles.block) == (LENGTH, LENGTH, (BLOCK, BLOCK))
    read: Any = jax.jit(lambda tiles: (tiles.kv_indices, tiles.q_counts, tiles.sparsity))
    for found, known in zip(read(tiles), (expected.kv_indices, expected.q_counts, expected.sparsity), strict=True):
        np.testing.assert_allclose(found, known)


def test_a_scan_over_tiles_reads_them_one_after_another() -> None:
    layers = [SlidingWindow(jnp.asarray(size)).tiles(LENGTH, LENGTH, block=BLOCK) for size in (1, 20, LENGTH)]
    stacked: TileMap = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    _, counts = jax.lax.scan(lambda carry, tiles: (carry, tiles.counts), None, stacked)
    same_bits(counts, np.stack([tiles.counts for tiles in layers]))


def test_a_scan_carries_tiles() -> None:
    tiles = Causal().tiles(LENGTH, LENGTH, block=BLOCK)
    carried, counts = jax.lax.scan(lambda carry, _: (carry, carry.kv_counts), tiles, None, length=2)
    same_bits(carried.states, tiles.states)
    same_bits(counts, np.stack([tiles.kv_counts] * 2))


def test_tree_map_keeps_what_is_static() -> None:
    tiles = SlidingWindow(20).tiles(LENGTH, LENGTH, block=(8, 16), offset=0)
    again: TileMap = jax.tree.map(jnp.asarray, tiles)
    assert (again.query_length, again.key_length, again.block, again.mask) == (LENGTH, LENGTH, (8, 16), tiles.mask)
    assert isinstance(again.states, jax.Array)


@fewer
@given(cases(at=traced), blocks)
def test_the_mask_of_a_map_decides_its_pairs(case: Drawn, block: tuple[int, int]) -> None:
    problem, [drawn] = case
    tiles = problem.tiles(drawn.mask, block)
    first = jnp.asarray(tiles.offset).reshape(-1, 1, 1, 1)
    b, h, i, j = np.ogrid[: problem.batch, : problem.heads, : problem.query_length, : problem.key_length]
    indices = (jnp.asarray(index, jnp.int32) for index in (b, h, i + first, j))
    allowed = jax.jit(tiles.mask.allows)(*indices)
    np.testing.assert_array_equal(np.broadcast_to(allowed, problem.shape), problem.expected(drawn.oracle))


def test_one_number_is_a_block_of_both_lengths() -> None:
    tiles = Causal().tiles(LENGTH, LENGTH, block=BLOCK)
    assert tiles.block == (BLOCK, BLOCK)
    same_bits(tiles.states, Causal().tiles(LENGTH, LENGTH, block=(BLOCK, BLOCK)).states)


# On several devices: a shard knows its tiles.


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["padding", "segments", "segments-pair", "prefix"])
def test_tiles_of_a_mask_sharded_over_the_batch_are_found_without_communication(name: str, mode: AxisType) -> None:
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(mode,)), PartitionSpec("batch"))
    valid = jnp.asarray(np.arange(LENGTH) >= 3 * np.arange(8)[:, None])
    ids = jnp.asarray(np.arange(LENGTH) // np.arange(1, 9)[:, None])
    leaves = {
        "padding": Padding(valid),
        "segments": Segments(ids),
        "segments-pair": Segments(ids, ids),
        "prefix": Prefix(jnp.arange(8)),
    }
    mask = Causal() & leaves[name]
    find: Any = jax.jit(lambda mask: mask.tiles(LENGTH, LENGTH, block=BLOCK).states, out_shardings=sharding)
    sharded = jax.device_put(mask, sharding)
    expected = mask.tiles(LENGTH, LENGTH, block=BLOCK).states
    same_bits(find(sharded), expected)
    same_bits(sharded.tiles(LENGTH, LENGTH, block=BLOCK).states, expected)
    assert collectives(find.lower(sharded).compile()) == []


@every_mask
def test_tiles_of_a_shard_of_the_queries_are_those_at_its_offset(mask: Mask) -> None:
    mesh, rows = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,)), LENGTH // 8

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(None, None, "rows"))
    def shards(mask: Mask) -> jax.Array:
        first = jax.lax.axis_index("rows") * rows
        return jnp.asarray(mask.tiles(rows, LENGTH, block=4, offset=first).states)

    same_bits(shards(mask), mask.tiles(LENGTH, LENGTH, block=4).states)
