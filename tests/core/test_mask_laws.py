"""The laws of the design that concern a mask alone: meaning, algebra, offsets, tracing, no retrace; and its pytree."""

import importlib.util
import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmask
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
    Window,
)
from jaxmask.parse import parse_mask
from tests.helpers.programs import collectives
from tests.helpers.strategies import BATCH, HEADS, Described, Problem, array_free, cases, problems

few = settings(max_examples=12)
fewer = settings(max_examples=6)
Drawn = tuple[Problem, list[Described]]
at_indices = problems(slots=False)

LENGTH = 16
VALID = np.arange(LENGTH) >= np.array([[0], [3]])
# Documents packed one after another; and ids in no order.
PACKED = np.arange(LENGTH) // np.array([[3], [5]])
MIXED = np.arange(LENGTH) ** 2 % np.array([[3], [5]])


def even_keys(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv % 2 == 0


def same_third(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + h) % 3 == kv % 3


def chessboard() -> Mask:
    rows, columns = np.indices((LENGTH, LENGTH))
    return Dense(jnp.asarray((rows + columns) % 3 == 0))


MASKS: dict[str, Mask] = {
    "full": Full(),
    "empty": Empty(),
    "causal": Causal(),
    "sliding": SlidingWindow(3),
    "sliding-array": SlidingWindow(jnp.asarray(3)),
    "window": Window(1, 2),
    "window-array": Window(jnp.asarray(1), None),
    "prefix": Prefix(4),
    "prefix-batch": Prefix(jnp.array([2, 5])),
    "chunked": Chunked(5),
    "chunked-batch": Chunked(jnp.asarray(5), jnp.array([0, 3])),
    "segments": Segments(jnp.asarray(PACKED)),
    "segments-numpy": Segments(PACKED),
    "segments-pair": Segments(jnp.asarray(MIXED), jnp.asarray(PACKED)),
    "per-head": PerHead([Causal(), SlidingWindow(jnp.asarray(3)), Causal() & Chunked(4)]),
    "padding": Padding(jnp.asarray(VALID)),
    "padding-int": Padding(jnp.asarray(VALID, jnp.int32)),
    "dense": chessboard(),
    "predicate": Predicate(even_keys),
    "predicate-heads": Predicate(same_third, heads=HEADS),
    "not": ~SlidingWindow(3),
    "padded-causal": Causal() & Padding(jnp.asarray(VALID)),
    "prefix-lm": (Causal() | Prefix(jnp.array([2, 5]))) & Padding(jnp.asarray(VALID)),
    "packed-heads": PerHead([Causal(), Full(), Prefix(2)]) & Segments(jnp.asarray(PACKED)) & ~Chunked(2, 1),
    "streaming": (SlidingWindow(jnp.asarray(4)) | Prefix(2)) & Causal() & ~chessboard(),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@contextmanager
def compilations() -> Generator[list[str]]:
    """The events of XLA compilations that happen inside."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def same_bits(left: Any, right: Any) -> None:
    left, right = np.asarray(left), np.asarray(right)
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


# Law 1: one meaning.


@given(cases())
def test_dense_is_what_the_table_says(case: Drawn) -> None:
    problem, [drawn] = case
    np.testing.assert_array_equal(problem.dense(drawn.mask), problem.expected(drawn.oracle))


@few
@given(cases(depth=2, at=at_indices))
def test_dense_is_allows_at_the_offset(case: Drawn) -> None:
    problem, [drawn] = case
    b, h, i, j = np.ogrid[: problem.batch, : problem.heads, : problem.query_length, : problem.key_length]
    q = np.asarray(problem.first)[b] + i
    indices = (jnp.asarray(index, jnp.int32) for index in (b, h, q, j))
    allowed = jax.jit(drawn.mask.allows)(*indices)
    np.testing.assert_array_equal(problem.dense(drawn.mask), np.broadcast_to(np.asarray(allowed), problem.shape))


@few
@given(cases(at=at_indices))
def test_allows_takes_python_integers(case: Drawn) -> None:
    problem, [drawn] = case
    b, h, i, j = problem.batch - 1, problem.heads - 1, problem.query_length - 1, problem.key_length - 2
    q = problem.first[b] + i
    assert bool(drawn.mask.allows(b, h, q, j)) == drawn.oracle(b, h, q, j, j)


@few
@given(cases())
def test_shape_says_the_sizes_of_dense(case: Drawn) -> None:
    problem, [drawn] = case
    batch, heads, kv = drawn.mask.shape
    allowed = drawn.mask.dense(*problem.lengths, **problem.where)
    # Positions of keys join a mask by `&`, and an empty mask absorbs them.
    positions = () if drawn.mask == Empty() else np.shape(problem.key_positions)
    if np.ndim(problem.offset) == 1 or positions[:-1] == (problem.batch,):
        batch = problem.batch
    assert allowed.shape == (batch, heads, problem.query_length, problem.key_length)
    assert kv in (1, problem.key_length)


def lower_head_first(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv >= h


def test_a_predicate_that_looks_at_the_head_is_not_read_at_head_zero_for_all() -> None:
    try:
        allowed = Predicate(lower_head_first).dense(4, 4)
    except ValueError:
        return  # nothing says how many heads there are, and a refusal would be as good
    assert allowed.shape[1] > 1


def test_a_predicate_is_read_at_every_head_that_another_mask_has() -> None:
    heads = Dense(jnp.ones((1, HEADS, 1, 1), bool))
    allowed = np.asarray((Predicate(lower_head_first) & heads).dense(4, 4))
    np.testing.assert_array_equal(allowed[0, :, 0], np.arange(4) >= np.arange(HEADS)[:, None])


def test_heads_of_per_head_may_share_a_mask() -> None:
    allowed = PerHead([Causal(), Full(), Causal()]).dense(4, 4)
    same_bits(allowed[0], np.stack([np.tri(4, dtype=bool), np.ones((4, 4), bool), np.tri(4, dtype=bool)]))


def test_a_position_without_an_id_attends_to_nothing() -> None:
    allowed = Segments(jnp.zeros((1, 3), int)).dense(2, 3, offset=jnp.asarray(2))
    same_bits(allowed, np.array([[[[True] * 3, [False] * 3]]]))


# Law 1 where keys have positions of their own: in a ring buffer, or in a part of the keys.

RING = (np.arange(LENGTH) + 5) % LENGTH
# What arrays hold of the keys, they hold in the order of the keys at hand.
BY_POSITION = [
    "causal",
    "sliding",
    "window-array",
    "chunked-batch",
    "prefix-batch",
    "segments",
    "per-head",
    "predicate-heads",
    "packed-heads",
]


@every_mask
def test_positions_that_are_the_indices_change_nothing(mask: Mask) -> None:
    allowed = mask.dense(4, LENGTH, offset=7, key_positions=jnp.arange(LENGTH))
    same_bits(allowed, mask.dense(4, LENGTH, offset=7))


@pytest.mark.parametrize("name", BY_POSITION)
def test_a_key_is_read_at_its_position(name: str) -> None:
    allowed = MASKS[name].dense(4, LENGTH, offset=7, key_positions=RING)
    same_bits(allowed, np.asarray(MASKS[name].dense(4, LENGTH, offset=7))[..., RING])


@pytest.mark.parametrize("mask", [MASKS["padding"], MASKS["dense"], MASKS["segments-pair"]], ids=repr)
def test_arrays_with_an_element_for_each_key_are_read_at_its_slot(mask: Mask) -> None:
    same_bits(mask.dense(4, LENGTH, offset=7, key_positions=RING), mask.dense(4, LENGTH, offset=7))


@every_mask
def test_no_query_attends_to_an_empty_slot(mask: Mask) -> None:
    for negated in (mask, ~mask):
        allowed = np.asarray(negated.dense(4, LENGTH, offset=7, key_positions=jnp.where(RING > 9, -1, RING)))
        assert not allowed[..., RING > 9].any()
        whole = np.asarray(negated.dense(4, LENGTH, offset=7, key_positions=RING))
        same_bits(allowed[..., RING <= 9], whole[..., RING <= 9])


def test_the_bias_reads_positions_of_keys() -> None:
    positions = jnp.array([4, 5, -1, 3])
    additive = SlidingWindow(3).bias(1, 4, jnp.float16, offset=5, key_positions=positions)
    low = np.finfo(np.float16).min
    same_bits(additive, np.array([[[[0, 0, low, 0]]]], np.float16))


def test_positions_of_few_bits_do_not_overflow() -> None:
    positions = jnp.array([100, 101, 102, 103], jnp.int8)
    allowed = (Prefix(300) & Chunked(4, -100)).dense(1, 4, offset=101, key_positions=positions)
    same_bits(allowed, np.ones((1, 1, 1, 4), bool))


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "segments", "per-head"])
def test_a_ring_buffer_is_the_end_of_the_whole(name: str) -> None:
    slots, whole = 8, np.asarray(MASKS[name].dense(LENGTH, LENGTH))

    @jax.jit
    def step(mask: Mask, t: jax.Array) -> jax.Array:
        # The position that each slot holds last; below 0 before it holds one.
        positions = t - (t - jnp.arange(slots)) % slots
        return mask.dense(1, slots, offset=t, key_positions=positions)

    for t in range(LENGTH):
        last = np.arange(t - slots + 1, t + 1)
        row = np.asarray(step(MASKS[name], jnp.asarray(t)))[:, :, 0]
        same_bits(row[..., last % slots], np.where(last >= 0, whole[:, :, t, last], False))


# Law 2: Boolean algebra, folding included.

A = Mask
ALGEBRA: dict[str, tuple[Callable[[A, A, A], A], Callable[[A, A, A], A]]] = {
    "and-commutes": (lambda a, b, c: a & b, lambda a, b, c: b & a),
    "or-commutes": (lambda a, b, c: a | b, lambda a, b, c: b | a),
    "and-associates": (lambda a, b, c: (a & b) & c, lambda a, b, c: a & (b & c)),
    "or-associates": (lambda a, b, c: (a | b) | c, lambda a, b, c: a | (b | c)),
    "and-distributes": (lambda a, b, c: a & (b | c), lambda a, b, c: (a & b) | (a & c)),
    "or-distributes": (lambda a, b, c: a | (b & c), lambda a, b, c: (a | b) & (a | c)),
    "and-absorbs": (lambda a, b, c: a & (a | b), lambda a, b, c: a),
    "or-absorbs": (lambda a, b, c: a | (a & b), lambda a, b, c: a),
    "and-idempotent": (lambda a, b, c: a & a, lambda a, b, c: a),
    "or-idempotent": (lambda a, b, c: a | a, lambda a, b, c: a),
    "de-morgan-and": (lambda a, b, c: ~(a & b), lambda a, b, c: ~a | ~b),
    "de-morgan-or": (lambda a, b, c: ~(a | b), lambda a, b, c: ~a & ~b),
    "excluded-middle": (lambda a, b, c: a | ~a, lambda a, b, c: Full()),
    "contradiction": (lambda a, b, c: a & ~a, lambda a, b, c: Empty()),
}


@pytest.mark.parametrize(("left", "right"), ALGEBRA.values(), ids=ALGEBRA.keys())
@fewer
@given(case=cases(masks=3, depth=1))
def test_boolean_algebra(case: Drawn, left: Callable[..., Mask], right: Callable[..., Mask]) -> None:
    problem, drawn = case
    a, b, c = (part.mask for part in drawn)
    np.testing.assert_array_equal(problem.dense(left(a, b, c)), problem.dense(right(a, b, c)))


@given(cases())
def test_constants_and_double_negation_fold_away(case: Drawn) -> None:
    a = case[1][0].mask
    assert (a & Full(), Full() & a, a | Empty(), Empty() | a, ~~a) == (a, a, a, a, a)


@given(cases())
def test_absorbing_constants_fold_to_themselves(case: Drawn) -> None:
    a = case[1][0].mask
    assert (a & Empty(), Empty() & a, a | Full(), Full() | a) == (Empty(), Empty(), Full(), Full())


def test_the_constants_negate_each_other() -> None:
    assert (~Full(), ~Empty()) == (Empty(), Full())


@pytest.mark.parametrize("join", [lambda x, y: x & y, lambda x, y: x | y], ids=["and", "or"])
def test_combinations_flatten(join: Callable[[Mask, Mask], Mask]) -> None:
    a, b, c, d = Causal(), Prefix(1), Window(1, 1), SlidingWindow(2)
    assert join(join(a, b), join(c, d)) == join(a, join(join(b, c), d))


# Law 4: an offset is slicing.


@pytest.mark.parametrize("spelled", [int, jnp.asarray, lambda t: jnp.full(BATCH, t)], ids=["static", "traced", "batch"])
@every_mask
def test_a_decode_step_is_a_row_of_the_whole(mask: Mask, spelled: Callable[[int], Any]) -> None:
    whole = np.asarray(mask.dense(LENGTH, LENGTH))
    for t in (0, 1, 7, LENGTH - 1):
        row = np.asarray(mask.dense(1, LENGTH, offset=spelled(t)))
        np.testing.assert_array_equal(row, np.broadcast_to(whole[:, :, t : t + 1], row.shape))


@fewer
@given(cases())
def test_each_query_alone_is_its_row(case: Drawn) -> None:
    problem, [drawn] = case
    whole = problem.dense(drawn.mask)
    for i in range(problem.query_length):
        where: dict[str, Any] = problem.where | {"offset": jnp.asarray(problem.first) + i}
        row = drawn.mask.dense(1, problem.key_length, **where)
        same_bits(np.broadcast_to(row, whole[:, :, :1].shape), whole[:, :, i : i + 1])


@every_mask
def test_a_chunk_of_queries_is_a_slice_of_the_whole(mask: Mask) -> None:
    same_bits(mask.dense(4, LENGTH, offset=5), mask.dense(LENGTH, LENGTH)[:, :, 5:9])


def test_an_offset_per_example_reads_each_at_its_own_row() -> None:
    whole = np.asarray(MASKS["prefix-lm"].dense(LENGTH, LENGTH))
    rows = MASKS["prefix-lm"].dense(1, LENGTH, offset=jnp.array([2, 9]))
    same_bits(rows, np.stack([whole[0, :, 2:3], whole[1, :, 9:10]]))


# Law 5: static, traced, batched, sharded: the same bits.


@few
@given(cases())
def test_jit_with_the_mask_as_an_argument(case: Drawn) -> None:
    problem, [drawn] = case
    jitted: Any = jax.jit(lambda mask, where: mask.dense(*problem.lengths, **where))
    same_bits(np.broadcast_to(jitted(drawn.mask, problem.where), problem.shape), problem.expected(drawn.oracle))


@few
@given(cases())
def test_jit_with_the_mask_closed_over(case: Drawn) -> None:
    problem, [drawn] = case
    jitted = jax.jit(lambda: drawn.mask.dense(*problem.lengths, **problem.where))
    same_bits(np.broadcast_to(jitted(), problem.shape), problem.expected(drawn.oracle))


@settings(max_examples=8)
@given(cases(depth=1))
def test_without_jit(case: Drawn) -> None:
    problem, [drawn] = case
    with jax.disable_jit():
        np.testing.assert_array_equal(problem.dense(drawn.mask), problem.expected(drawn.oracle))


@fewer
@given(cases(depth=3))
def test_vmap_with_the_mask_as_an_argument(case: Drawn) -> None:
    problem, [drawn] = case

    def read(arguments: Any) -> jax.Array:
        mask, where, _ = arguments
        return mask.dense(*problem.lengths, **where)

    # An index is mapped over, too, for nothing else need be an array.
    one = jax.tree.map(jnp.asarray, (drawn.mask, problem.where, 0))
    pair = [one, jax.tree.map(another, one)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair)
    same_bits(jax.vmap(read)(stacked), np.stack([read(arguments) for arguments in pair]))


def another(leaf: Any) -> Any:
    """Another array of the same shape and dtype."""
    return ~leaf if leaf.dtype == jnp.bool_ else leaf + 1


STACKS: dict[str, list[Mask]] = {
    "sliding": [SlidingWindow(jnp.asarray(n)) for n in (1, 3, 16)],
    "window": [Window(jnp.asarray(n), 1) for n in (0, 2, 5)],
    "prefix": [Prefix(jnp.asarray(n)) for n in (0, 2, 16)],
    "prefix-batch": [Prefix(jnp.array([n, 4])) for n in (0, 2, 16)],
    "chunked": [Chunked(jnp.asarray(n), jnp.asarray(n - 3)) for n in (1, 3, 16)],
    "padding": [Padding(jnp.asarray(VALID ^ flip)) for flip in (False, True)],
    "segments": [Segments(jnp.asarray(ids), jnp.asarray(PACKED)) for ids in (PACKED, MIXED)],
    "per-head": [PerHead([Causal(), Prefix(jnp.asarray(n))]) for n in (0, 2, 16)],
    "dense": [Dense(jnp.asarray(VALID[:1].T ^ flip)) for flip in (False, True)],
    "composed": [(Causal() | Prefix(jnp.asarray(n))) & ~Padding(jnp.asarray(VALID)) for n in (1, 2, 3)],
}


@pytest.mark.parametrize("masks", STACKS.values(), ids=STACKS.keys())
def test_vmap_over_stacked_masks(masks: list[Mask]) -> None:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    read = lambda mask: mask.dense(LENGTH, LENGTH)  # noqa: E731
    same_bits(jax.vmap(read)(stacked), np.stack([read(mask) for mask in masks]))


@every_mask
def test_vmap_over_offsets(mask: Mask) -> None:
    read = lambda t: mask.dense(2, LENGTH, offset=t)  # noqa: E731
    offsets = jnp.array([0, 3, 14])
    same_bits(jax.vmap(read)(offsets), np.stack([read(t) for t in offsets]))


def test_scan_over_a_window_per_layer_traces_one_layer() -> None:
    traces: list[int] = []

    @jax.jit
    def stack(sizes: jax.Array, valid: jax.Array) -> Any:
        def layer(carry: None, size: jax.Array) -> Any:
            traces.append(1)
            mask = SlidingWindow(size) & Padding(valid)
            return carry, (mask.dense(LENGTH, LENGTH), mask.tiles(LENGTH, LENGTH, block=4).states)

        return jax.lax.scan(layer, None, sizes)[1]

    # Sliding layers and full ones in turn; and then another pattern, by the same program.
    stack(jnp.array([1, LENGTH, 4, LENGTH]), jnp.asarray(VALID))
    with compilations() as seen:
        dense, tiles = stack(jnp.array([LENGTH, 2, LENGTH + 1, 4]), jnp.asarray(VALID))
    layers = [mask & Padding(VALID) for mask in (Causal(), SlidingWindow(2), Causal(), SlidingWindow(4))]
    same_bits(dense, np.stack([mask.dense(LENGTH, LENGTH) for mask in layers]))
    same_bits(tiles, np.stack([mask.tiles(LENGTH, LENGTH, block=4).states for mask in layers]))
    assert (len(traces), seen) == (1, [])


@pytest.mark.parametrize("size", [LENGTH, LENGTH + 1, 2**31 - 1])
def test_a_window_of_the_key_length_or_more_is_no_window(size: int) -> None:
    for spelled in (size, jnp.asarray(size)):
        same_bits(SlidingWindow(spelled).dense(LENGTH, LENGTH), Causal().dense(LENGTH, LENGTH))


def test_scan_carries_a_mask() -> None:
    def step(mask: Mask, _: None) -> tuple[Mask, jax.Array]:
        return jax.tree.map(lambda size: size + 1, mask), mask.dense(LENGTH, LENGTH)

    _, seen = jax.lax.scan(step, SlidingWindow(jnp.asarray(1)) & Causal(), None, length=3)
    same_bits(seen, np.stack([SlidingWindow(size).dense(LENGTH, LENGTH) for size in (1, 2, 3)]))


def test_scan_carries_every_kind_of_mask() -> None:
    masks = list(MASKS.values())
    carried, _ = jax.lax.scan(lambda carry, _: (carry, None), masks, None, length=2)
    for mask, again in zip(masks, carried, strict=True):
        assert jax.tree.structure(mask) == jax.tree.structure(again)
        same_bits(again.dense(LENGTH, LENGTH), mask.dense(LENGTH, LENGTH))


@every_mask
def test_a_shard_of_query_rows_is_an_offset(mask: Mask) -> None:
    devices = jax.device_count()
    assert devices == 8
    rows = LENGTH // devices

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=jax.make_mesh((devices,), ("rows",)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(None, None, "rows"),
    )
    def shards(mask: Mask) -> jax.Array:
        return mask.dense(rows, LENGTH, offset=jax.lax.axis_index("rows") * rows)

    # shard_map takes arrays only, and a mask without any is none the worse for an empty argument.
    same_bits(shards(mask), mask.dense(LENGTH, LENGTH))


def test_a_shard_of_the_batch_is_a_mask_of_fewer_examples() -> None:
    valid = jnp.asarray(np.arange(LENGTH) >= np.arange(8)[:, None])
    ids = jnp.asarray(np.arange(LENGTH) // np.arange(1, 9)[:, None])
    chunks = PerHead([Full(), Chunked(4, jnp.arange(8))])
    mask = (Causal() | Prefix(jnp.arange(8))) & Padding(valid) & Segments(ids) & chunks
    batch = PartitionSpec("batch")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    shards: Any = jax.shard_map(lambda m: m.dense(LENGTH, LENGTH), mesh=mesh, in_specs=batch, out_specs=batch)
    same_bits(jax.jit(shards)(mask), mask.dense(LENGTH, LENGTH))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["padding", "prefix", "chunked", "segments", "segments-pair", "per-head", "dense"])
def test_a_mask_sharded_over_the_batch_is_read_without_communication(name: str, mode: AxisType) -> None:
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(mode,)), PartitionSpec("batch"))
    valid = jnp.asarray(np.arange(LENGTH) >= np.arange(8)[:, None])
    ids = jnp.asarray(np.arange(LENGTH) // np.arange(1, 9)[:, None])
    leaves = {
        "padding": Padding(valid),
        "prefix": Prefix(jnp.arange(8)),
        "chunked": Chunked(4, jnp.arange(8)),
        "segments": Segments(ids),
        "segments-pair": Segments(ids, ids),
        "per-head": PerHead([Full(), Prefix(jnp.arange(8))]),
        "dense": Dense(valid[:, None, None]),
    }
    mask = leaves[name]
    read: Any = jax.jit(lambda m: (m & Causal()).dense(LENGTH, LENGTH), out_shardings=sharding)
    sharded = jax.device_put(mask, sharding)
    same_bits(read(sharded), (mask & Causal()).dense(LENGTH, LENGTH))
    assert collectives(read.lower(sharded).compile()) == []


@pytest.mark.parametrize("name", ["padding", "segments", "segments-pair", "dense"])
def test_a_mask_sharded_over_the_sequence_is_read(name: str) -> None:
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Explicit,))
    valid = jnp.asarray(np.arange(LENGTH) >= np.arange(2)[:, None])
    ids = jnp.asarray(np.arange(LENGTH) // np.array([[3], [5]]))
    leaves = {
        "padding": Padding(valid),
        "segments": Segments(ids),
        "segments-pair": Segments(ids, ids),
        "dense": Dense(jnp.asarray(np.random.default_rng(0).random((2, 1, LENGTH, LENGTH)) > 0.5)),
    }
    mask = leaves[name] & Causal()

    def put(x: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 1), "sequence")))

    sharded = jax.tree.map(put, mask)
    same_bits(sharded.dense(LENGTH, LENGTH), mask.dense(LENGTH, LENGTH))
    same_bits(sharded.tiles(LENGTH, LENGTH, block=5).states, mask.tiles(LENGTH, LENGTH, block=5).states)


def test_an_exported_program_serves_any_batch() -> None:
    def program(valid: jax.Array, offset: jax.Array) -> jax.Array:
        return (SlidingWindow(3) & Padding(valid)).bias(4, LENGTH, jnp.float32, offset=offset)

    (batch,) = jax.export.symbolic_shape("batch")
    arguments = (jax.ShapeDtypeStruct((batch, LENGTH), jnp.bool_), jax.ShapeDtypeStruct((batch,), jnp.int32))
    loaded = jax.export.export(jax.jit(program), platforms=["cpu"])(*arguments)
    if importlib.util.find_spec("flatbuffers"):  # which jax serialises by, and does not require
        loaded = jax.export.deserialize(loaded.serialize())
    for size in (1, 2, 5):
        valid, offset = jnp.asarray(np.arange(LENGTH) >= np.arange(size)[:, None]), jnp.arange(size)
        same_bits(loaded.call(valid, offset), program(valid, offset))


def test_an_exported_program_serves_any_length() -> None:
    def program(valid: jax.Array) -> jax.Array:
        return (Causal() & Padding(valid)).dense(valid.shape[1], valid.shape[1])

    shape = jax.export.symbolic_shape("batch, length")
    exported = jax.export.export(jax.jit(program), platforms=["cpu"])(jax.ShapeDtypeStruct(shape, jnp.bool_))
    same_bits(exported.call(jnp.asarray(VALID)), program(jnp.asarray(VALID)))


# Law 8: no retrace.


# One read calls a predicate for itself, and to see that it looks at neither example nor head. Two reads call it more.
TRACES = 3


def counted() -> tuple[Mask, list[int]]:
    """A mask that allows what Causal does, and the traces of it so far."""
    traces: list[int] = []

    def fn(b: Any, h: Any, q: Any, kv: Any) -> Any:
        traces.append(1)
        return kv <= q

    return Predicate(fn), traces


@pytest.mark.parametrize("spelled", [int, np.int32, np.asarray, jnp.asarray], ids=["int", "np.int32", "numpy", "jax"])
def test_a_thousand_decode_steps_trace_once(spelled: Callable[[int], Any]) -> None:
    mask, traces = counted()
    for t in range(1000):
        mask.dense(1, 1000, offset=spelled(t))
    assert len(traces) <= TRACES


def test_a_thousand_decode_steps_compile_once() -> None:
    mask, _ = counted()
    jax.block_until_ready(mask.bias(1, 1000, jnp.float16, offset=0))
    with compilations() as seen:
        for t in range(1, 1000):
            mask.bias(1, 1000, jnp.float16, offset=t)
    assert seen == []


DECODED = 1000
IDS = jnp.arange(DECODED)[None] // 7


@pytest.mark.parametrize(
    "mask",
    [
        Causal() & Chunked(64),
        Causal() & Chunked(64, jnp.array([0, 3])),
        Causal() & Segments(IDS),
        Segments(IDS, IDS),
        PerHead([Causal(), SlidingWindow(64)]),
    ],
    ids=repr,
)
def test_a_thousand_decode_steps_compile_once_for_every_kind_of_mask(mask: Mask) -> None:
    jax.block_until_ready(mask.dense(1, DECODED, offset=0))
    with compilations() as seen:
        for t in range(1, DECODED):
            mask.dense(1, DECODED, offset=t)
    assert seen == []


@pytest.mark.parametrize("mask", [SlidingWindow(64), Causal() & Chunked(64), Segments(IDS)], ids=repr)
def test_a_thousand_decode_steps_in_a_ring_buffer_compile_once(mask: Mask) -> None:
    slots = 64
    rings = [t - (t - np.arange(slots)) % slots for t in range(DECODED)]
    jax.block_until_ready(mask.dense(1, slots, offset=0, key_positions=rings[0]))
    with compilations() as seen:
        for t in range(1, DECODED):
            mask.dense(1, slots, offset=t, key_positions=rings[t])
    assert seen == []


def test_the_counter_of_compilations_sees_another_length() -> None:
    mask, _ = counted()
    with compilations() as seen:
        mask.dense(1, 1000, offset=0)
    assert len(seen) >= 1


def test_another_padding_of_the_same_shape_traces_nothing() -> None:
    mask, traces = counted()
    for flip in (False, True):
        (mask & Padding(jnp.asarray(VALID ^ flip))).dense(LENGTH, LENGTH)
    assert len(traces) <= TRACES


def test_an_equal_static_integer_traces_nothing() -> None:
    mask, traces = counted()
    for _ in range(2):
        (mask & SlidingWindow(3)).dense(LENGTH, LENGTH)
    assert len(traces) <= TRACES


def test_another_window_array_traces_nothing() -> None:
    mask, traces = counted()
    for size in (2, 3):
        (mask & SlidingWindow(jnp.asarray(size))).dense(LENGTH, LENGTH)
    assert len(traces) <= TRACES


# The bias.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16, jnp.float64], ids=lambda d: d.__name__)
@every_mask
def test_bias_is_positive_zero_or_the_minimum(mask: Mask, dtype: Any) -> None:
    with jax.enable_x64(True):
        additive = np.asarray(mask.bias(LENGTH, LENGTH, dtype))
        allowed = np.asarray(mask.dense(LENGTH, LENGTH))
        low = np.asarray(jnp.finfo(dtype).min, dtype)
    assert additive.dtype == dtype
    expected = np.where(allowed, np.zeros((), dtype), low)
    assert additive.tobytes() == expected.tobytes()


def test_bias_is_float32_unless_said_otherwise() -> None:
    assert Causal().bias(2, 2).dtype == jnp.float32


@every_mask
def test_gradients_survive_rows_with_nothing_to_attend_to(mask: Mask) -> None:
    def loss(scores: jax.Array) -> jax.Array:
        weights = jax.nn.softmax(scores + mask.bias(LENGTH, LENGTH), axis=-1)
        return jnp.sum(weights * jnp.arange(LENGTH))

    gradient = jax.grad(loss)(jnp.linspace(-3, 3, BATCH * LENGTH * LENGTH).reshape(BATCH, 1, LENGTH, LENGTH))
    assert bool(jnp.isfinite(gradient).all())


def test_no_gradient_reaches_a_masked_score() -> None:
    gradient = jax.grad(lambda s: jax.nn.softmax(s + Causal().bias(4, 4), axis=-1)[..., 0].sum())(
        jnp.ones((1, 1, 4, 4))
    )
    same_bits(gradient[0, 0] != 0, np.tri(4, dtype=np.bool_) & (np.arange(4) > 0)[:, None])


# The pytree.


@pytest.mark.parametrize(
    "build",
    [
        Full,
        Causal,
        lambda: SlidingWindow(3),
        lambda: Window(None, 2),
        lambda: Predicate(even_keys),
        lambda: Chunked(3, 1),
        lambda: PerHead([Causal(), Full()]),
        lambda: (Causal() | Prefix(2)) & ~Window(1, None),
    ],
    ids=["full", "causal", "sliding", "window", "predicate", "chunked", "per-head", "composed"],
)
def test_masks_of_equal_static_structure_are_equal_and_hash_alike(build: Callable[[], Mask]) -> None:
    assert build() == build()
    assert hash(build()) == hash(build())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Full(), Empty()),
        (SlidingWindow(3), SlidingWindow(4)),
        (SlidingWindow(3), SlidingWindow(jnp.asarray(3))),
        (Window(1, None), Window(None, 1)),
        (Window(0, None), Window(None, None)),
        (Chunked(3), Chunked(3, 1)),
        (Chunked(3), Chunked(3, jnp.asarray(0))),
        (PerHead([Causal(), Full()]), PerHead([Full(), Causal()])),
        (Segments(MIXED), Segments(MIXED, MIXED)),
        (Predicate(even_keys), Predicate(even_keys, heads=2)),
        (Causal() & Prefix(1), Causal() | Prefix(1)),
        (Causal() & Prefix(1), Prefix(1) & Causal()),
        (Causal(), ~Causal()),
        (Padding(jnp.ones((1, 2), bool)), Padding(jnp.ones((1, 2), bool))),
        (Causal(), 1),
    ],
    ids=repr,
)
def test_masks_of_other_structure_or_other_arrays_differ(left: Mask, right: object) -> None:
    assert left != right


def test_a_mask_equals_one_of_the_very_same_array() -> None:
    valid = jnp.ones((1, 2), bool)
    assert Causal() & Padding(valid) == Causal() & Padding(valid)


def test_a_mask_is_a_static_argument() -> None:
    traces: list[Mask] = []

    def read(mask: Mask) -> jax.Array:
        traces.append(mask)
        return mask.dense(4, 4)

    jitted = jax.jit(read, static_argnums=0)
    for size in (2, 2, 3, 2):
        same_bits(jitted(SlidingWindow(size)), SlidingWindow(size).dense(4, 4))
    assert traces == [SlidingWindow(2), SlidingWindow(3)]


def test_static_integers_are_no_leaves() -> None:
    heads = PerHead([Chunked(3), Predicate(even_keys)])
    assert jax.tree.leaves((SlidingWindow(3) | Prefix(2)) & ~Window(1, None) & heads) == []


def test_arrays_are_leaves() -> None:
    size, length, valid, ids = jnp.asarray(3), jnp.array([1, 2]), jnp.ones((2, 4), bool), jnp.ones((2, 4), int)
    heads = PerHead([Chunked(size, length), Full()])
    leaves = jax.tree.leaves((SlidingWindow(size) | Prefix(length)) & Padding(valid) & Segments(ids) & heads)
    assert [id(leaf) for leaf in leaves] == [id(array) for array in (size, length, valid, ids, size, length)]


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (Padding(VALID), [".valid"]),
        (Segments(MIXED, PACKED, jnp.asarray(0)), [".query_ids", ".key_ids", ".offset"]),
        (PerHead([Causal(), Prefix(jnp.asarray(1))]), [".masks[1].length"]),
        (~(Causal() & Prefix(jnp.asarray(1))), [".mask.masks[1].length"]),
    ],
    ids=repr,
)
def test_leaves_are_named_by_their_fields(mask: Mask, names: list[str]) -> None:
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mask)] == names


def test_tree_map_reaches_every_array() -> None:
    mask = PerHead([Prefix(jnp.asarray(1)), Causal()]) & Chunked(jnp.asarray(3), jnp.array([0, 1]))
    added = jax.tree.map(lambda leaf: leaf + 1, mask)
    expected = PerHead([Prefix(2), Causal()]) & Chunked(4, jnp.array([1, 2]))
    same_bits(added.dense(LENGTH, LENGTH), expected.dense(LENGTH, LENGTH))


def test_a_mask_is_donated() -> None:
    mask = Causal() & Padding(jnp.asarray(VALID)) & SlidingWindow(jnp.asarray(3))
    expected = np.asarray((Causal() & Padding(~VALID) & SlidingWindow(4)).dense(LENGTH, LENGTH))
    arrays = jax.tree.leaves(mask)
    donated: Any = jax.jit(partial(jax.tree.map, another), donate_argnums=0)(mask)
    assert all(array.is_deleted() for array in arrays)
    same_bits(donated.dense(LENGTH, LENGTH), expected)


class NnxLayer(nnx.Module):
    """A layer with masks in its state: variables that a step may change."""

    def __init__(self, mask: Mask, window: Mask) -> None:
        self.mask = nnx.Variable(mask)
        self.window = nnx.Variable(window)

    def __call__(self) -> jax.Array:
        self.window.set_value(jax.tree.map(lambda size: size + 1, self.window.get_value()))
        return (self.mask.get_value() & self.window.get_value()).dense(LENGTH, LENGTH)


class LinenLayer(linen.Module):
    """The same in linen, where the state is a collection."""

    @linen.compact
    def __call__(self) -> jax.Array:
        mask = self.variable("cache", "mask", lambda: Padding(jnp.asarray(VALID)))
        window = self.variable("cache", "window", lambda: SlidingWindow(jnp.asarray(1)))
        window.value = jax.tree.map(lambda size: size + 1, window.value)
        return (mask.value & window.value).dense(LENGTH, LENGTH)


def padded_window(size: int) -> jax.Array:
    return (Padding(VALID) & SlidingWindow(size)).dense(LENGTH, LENGTH)


def test_masks_are_nnx_state() -> None:
    layer = NnxLayer(Padding(jnp.asarray(VALID)), SlidingWindow(jnp.asarray(1)))
    graph, state = nnx.split(layer)
    assert len(jax.tree.leaves(state)) == 2
    merged = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
    read: Any = nnx.jit(lambda layer: layer())
    for size in (2, 3):
        same_bits(read(merged), padded_window(size))


def test_masks_are_linen_state() -> None:
    allowed, state = LinenLayer().init_with_output(jax.random.key(0))
    same_bits(allowed, padded_window(2))
    for size in (3, 4):
        allowed, state = jax.jit(lambda state: LinenLayer().apply(state, mutable=["cache"]))(state)
        same_bits(allowed, padded_window(size))


@every_mask
def test_arrays_are_saved_by_name_and_restored_without_pickle(mask: Mask) -> None:
    file = io.BytesIO()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(mask)}
    np.savez(file, allow_pickle=False, **leaves)
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        restored: Mask = jax.tree.unflatten(jax.tree.structure(mask), [saved[path] for path in leaves])
    same_bits(restored.dense(LENGTH, LENGTH), mask.dense(LENGTH, LENGTH))


@every_mask
@pytest.mark.parametrize("sentinel", [None, object(), 0, "leaf"], ids=["none", "object", "int", "str"])
def test_a_tree_of_sentinels_keeps_the_structure(mask: Mask, sentinel: object) -> None:
    leaves, structure = jax.tree.flatten(mask)
    replaced: Any = jax.tree.unflatten(structure, [sentinel] * len(leaves))
    is_leaf: Any = lambda leaf: leaf is sentinel  # noqa: E731
    found, again = jax.tree.flatten(replaced, is_leaf=is_leaf)
    assert again == structure
    assert found == [sentinel] * len(leaves)


@every_mask
def test_flattening_round_trips(mask: Mask) -> None:
    leaves, structure = jax.tree.flatten(mask)
    assert jax.tree.unflatten(structure, leaves) == mask


@every_mask
def test_masks_are_immutable(mask: Mask) -> None:
    with pytest.raises(AttributeError):
        mask.size = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Causal(), "Causal()"),
        (SlidingWindow(3), "SlidingWindow(3)"),
        (Window(None, 2), "Window(None, 2)"),
        (Padding(jnp.ones((2, 4), bool)), "Padding(bool[2, 4])"),
        (Chunked(3), "Chunked(3)"),
        (Chunked(jnp.asarray(3), -2), "Chunked(int32[], -2)"),
        (Segments(MIXED), "Segments(int64[2, 16])"),
        (Segments(jnp.asarray(MIXED), MIXED, 2), "Segments(int32[2, 16], int64[2, 16], 2)"),
        (PerHead([Causal(), ~Full()]), "PerHead((Causal(), Empty()))"),
        ((Causal() | Prefix(2)) & Window(1, 1), "(Causal() | Prefix(2)) & Window(1, 1)"),
        ((Causal() & Prefix(2)) | Window(1, 1), "Causal() & Prefix(2) | Window(1, 1)"),
        (~Causal(), "~Causal()"),
        (~(Causal() & Prefix(2)), "~(Causal() & Prefix(2))"),
    ],
    ids=str,
)
def test_repr_is_how_the_mask_is_written(mask: Mask, text: str) -> None:
    assert repr(mask) == text


@given(array_free())
def test_repr_of_array_free_masks_evaluates_to_the_mask(mask: Mask) -> None:
    assert eval(repr(mask), dict(vars(jaxmask))) == mask


@given(array_free())
def test_repr_of_array_free_masks_is_a_text_that_describes_the_mask(mask: Mask) -> None:
    assert parse_mask(repr(mask)) == mask


@given(array_free(), st.integers(0, 4))
def test_a_mask_restored_from_its_repr_reads_alike(mask: Mask, offset: int) -> None:
    same_bits(
        parse_mask(repr(mask)).tiles(3, 7, block=(2, 3), offset=offset).states,
        mask.tiles(3, 7, block=(2, 3), offset=offset).states,
    )


# The offset's rule.

POSITIONAL = {
    "causal": Causal(),
    "sliding": SlidingWindow(3),
    "window": Window(1, 1),
    "predicate": Predicate(even_keys),
    "chunked": Chunked(3),
    "segments": Segments(jnp.asarray(PACKED)),
    "per-head": PerHead([Full(), Causal()]),
    "and": Prefix(2) & Causal(),
    "or": Prefix(2) | Causal(),
    "not": ~Causal(),
}


@pytest.mark.parametrize("mask", POSITIONAL.values(), ids=POSITIONAL.keys())
def test_an_alignment_is_not_guessed(mask: Mask) -> None:
    with pytest.raises(ValueError, match=r"offset=0 .*top-left.*offset=12 .*bottom-right"):
        mask.dense(4, LENGTH)


@pytest.mark.parametrize("name", ["full", "empty", "prefix", "prefix-batch", "padding"])
def test_masks_that_ignore_positions_need_no_offset(name: str) -> None:
    mask = MASKS[name]
    same_bits(mask.dense(4, LENGTH), mask.dense(4, LENGTH, offset=3))


def test_equal_lengths_start_at_zero() -> None:
    same_bits(Causal().dense(4, 4), Causal().dense(4, 4, offset=0))


def test_heads_of_a_mask_are_kept() -> None:
    allowed = jnp.asarray(np.arange(HEADS)[:, None, None] == np.arange(4)[None, None])[None]
    same_bits((Full() & Dense(allowed)).dense(1, 4, offset=0), allowed)


# Integers wider than JAX holds without 64-bit mode.


def test_a_numpy_window_beyond_int32_is_no_window_of_nothing() -> None:
    try:
        mask = SlidingWindow(np.array(2**32))  # pyright: ignore[reportArgumentType]
    except ValueError:
        return  # a refusal is as good
    same_bits(mask.dense(4, 4), Causal().dense(4, 4))


def test_a_numpy_padding_beyond_int32_is_not_cut_in_half() -> None:
    valid: Any = np.array([[2**32, 1, 0]])
    same_bits(Padding(valid).dense(1, 3), np.array([[[[True, True, False]]]]))


def test_a_deep_nest_is_built_in_as_many_steps_as_it_is_deep() -> None:
    reads: list[int] = []

    class Sized(Mask):
        @property
        def shape(self) -> tuple[int, int, int]:
            reads.append(1)
            return 1, 1, 1

    mask: Mask = Sized()
    for i in range(12):
        mask = (mask | Prefix(i)) & SlidingWindow(3 + i)
    # Each of the 24 combinations asks what is in it once; more than once would double at every level.
    assert len(reads) <= 24
