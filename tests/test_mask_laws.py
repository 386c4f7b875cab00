"""The laws of the design that concern a mask alone: meaning, algebra, offsets, tracing, no retrace; and its pytree."""

import importlib.util
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmask import Causal, Dense, Empty, Full, Mask, Padding, Predicate, Prefix, SlidingWindow, Window
from tests.strategies import BATCH, HEADS, Described, Problem, cases

few = settings(max_examples=12)
Drawn = tuple[Problem, list[Described]]

LENGTH = 16
VALID = np.arange(LENGTH) >= np.array([[0], [3]])


def even_keys(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv % 2 == 0


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
    "padding": Padding(jnp.asarray(VALID)),
    "padding-int": Padding(jnp.asarray(VALID, jnp.int32)),
    "dense": chessboard(),
    "predicate": Predicate(even_keys),
    "not": ~SlidingWindow(3),
    "padded-causal": Causal() & Padding(jnp.asarray(VALID)),
    "prefix-lm": (Causal() | Prefix(jnp.array([2, 5]))) & Padding(jnp.asarray(VALID)),
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
@given(cases(depth=2))
def test_dense_is_allows_at_the_offset(case: Drawn) -> None:
    problem, [drawn] = case
    b, h, i, j = np.ogrid[: problem.batch, : problem.heads, : problem.query_length, : problem.key_length]
    q = np.asarray(problem.first)[b] + i
    allowed = drawn.mask.allows(*(jnp.asarray(index, jnp.int32) for index in (b, h, q, j)))
    np.testing.assert_array_equal(
        problem.dense(drawn.mask), np.broadcast_to(np.asarray(allowed), problem.dense(Full()).shape)
    )


@few
@given(cases())
def test_allows_takes_python_integers(case: Drawn) -> None:
    problem, [drawn] = case
    b, h, i, j = problem.batch - 1, problem.heads - 1, problem.query_length - 1, problem.key_length - 2
    q = problem.first[b] + i
    assert bool(drawn.mask.allows(b, h, q, j)) == drawn.oracle(b, h, q, j)


@few
@given(cases())
def test_shape_says_the_sizes_of_dense(case: Drawn) -> None:
    problem, [drawn] = case
    batch, heads, kv = drawn.mask.shape
    allowed = drawn.mask.dense(problem.query_length, problem.key_length, offset=problem.offset)
    if np.ndim(problem.offset) == 1:
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
@settings(max_examples=6)
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
    jitted: Any = jax.jit(lambda mask: mask.dense(problem.query_length, problem.key_length, offset=problem.offset))
    same_bits(np.broadcast_to(jitted(drawn.mask), problem.dense(Full()).shape), problem.expected(drawn.oracle))


@few
@given(cases())
def test_jit_with_the_mask_closed_over(case: Drawn) -> None:
    problem, [drawn] = case
    jitted = jax.jit(lambda: drawn.mask.dense(problem.query_length, problem.key_length, offset=problem.offset))
    same_bits(np.broadcast_to(jitted(), problem.dense(Full()).shape), problem.expected(drawn.oracle))


@settings(max_examples=8)
@given(cases(depth=1))
def test_without_jit(case: Drawn) -> None:
    problem, [drawn] = case
    with jax.disable_jit():
        np.testing.assert_array_equal(problem.dense(drawn.mask), problem.expected(drawn.oracle))


STACKS: dict[str, list[Mask]] = {
    "sliding": [SlidingWindow(jnp.asarray(n)) for n in (1, 3, 16)],
    "window": [Window(jnp.asarray(n), 1) for n in (0, 2, 5)],
    "prefix": [Prefix(jnp.asarray(n)) for n in (0, 2, 16)],
    "prefix-batch": [Prefix(jnp.array([n, 4])) for n in (0, 2, 16)],
    "padding": [Padding(jnp.asarray(VALID ^ flip)) for flip in (False, True)],
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

    def layer(carry: None, size: jax.Array) -> tuple[None, jax.Array]:
        traces.append(1)
        return carry, SlidingWindow(size).dense(LENGTH, LENGTH)

    sizes = [1, 4, LENGTH, 2]
    _, layers = jax.lax.scan(layer, None, jnp.array(sizes))
    same_bits(layers, np.stack([SlidingWindow(size).dense(LENGTH, LENGTH) for size in sizes]))
    assert len(traces) == 1


def test_a_window_of_the_key_length_is_no_window() -> None:
    same_bits(SlidingWindow(jnp.asarray(LENGTH)).dense(LENGTH, LENGTH), Causal().dense(LENGTH, LENGTH))


def test_scan_carries_a_mask() -> None:
    def step(mask: Mask, _: None) -> tuple[Mask, jax.Array]:
        return jax.tree.map(lambda size: size + 1, mask), mask.dense(LENGTH, LENGTH)

    _, seen = jax.lax.scan(step, SlidingWindow(jnp.asarray(1)), None, length=3)
    same_bits(seen, np.stack([SlidingWindow(size).dense(LENGTH, LENGTH) for size in (1, 2, 3)]))


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
    mask = (Causal() | Prefix(jnp.arange(8))) & Padding(valid)
    batch = PartitionSpec("batch")
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    shards: Any = jax.shard_map(lambda m: m.dense(LENGTH, LENGTH), mesh=mesh, in_specs=batch, out_specs=batch)
    same_bits(jax.jit(shards)(mask), mask.dense(LENGTH, LENGTH))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", ["padding", "prefix", "dense"])
def test_a_mask_sharded_over_the_batch_is_read_without_communication(name: str, mode: AxisType) -> None:
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(mode,)), PartitionSpec("batch"))
    valid = jnp.asarray(np.arange(LENGTH) >= np.arange(8)[:, None])
    leaves = {"padding": Padding(valid), "prefix": Prefix(jnp.arange(8)), "dense": Dense(valid[:, None, None])}
    mask = leaves[name]
    read: Any = jax.jit(lambda m: (m & Causal()).dense(LENGTH, LENGTH), out_shardings=sharding)
    sharded = jax.device_put(mask, sharding)
    same_bits(read(sharded), (mask & Causal()).dense(LENGTH, LENGTH))
    program = read.lower(sharded).compile().as_text()
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert [name for name in collectives if name in program] == []


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
        lambda: (Causal() | Prefix(2)) & ~Window(1, None),
    ],
    ids=["full", "causal", "sliding", "window", "predicate", "composed"],
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
    assert jax.tree.leaves((SlidingWindow(3) | Prefix(2)) & ~Window(1, None) & Predicate(even_keys)) == []


def test_arrays_are_leaves() -> None:
    size, length, valid = jnp.asarray(3), jnp.array([1, 2]), jnp.ones((2, 4), bool)
    leaves = jax.tree.leaves((SlidingWindow(size) | Prefix(length)) & Padding(valid))
    assert [id(leaf) for leaf in leaves] == [id(size), id(length), id(valid)]


def test_leaves_are_named_by_their_fields() -> None:
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(Padding(jnp.ones((1, 2), bool)))
    assert jax.tree_util.keystr(path) == ".valid"


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
        ((Causal() | Prefix(2)) & Window(1, 1), "(Causal() | Prefix(2)) & Window(1, 1)"),
        ((Causal() & Prefix(2)) | Window(1, 1), "Causal() & Prefix(2) | Window(1, 1)"),
        (~Causal(), "~Causal()"),
        (~(Causal() & Prefix(2)), "~(Causal() & Prefix(2))"),
    ],
    ids=str,
)
def test_repr_is_how_the_mask_is_written(mask: Mask, text: str) -> None:
    assert repr(mask) == text


@pytest.mark.parametrize(
    "mask", [Causal(), SlidingWindow(3), (Causal() | Prefix(2)) & Window(1, 1), ~(Causal() & Prefix(2))], ids=repr
)
def test_repr_of_static_masks_evaluates_to_the_mask(mask: Mask) -> None:
    assert eval(repr(mask)) == mask


# The offset's rule.

POSITIONAL = {
    "causal": Causal(),
    "sliding": SlidingWindow(3),
    "window": Window(1, 1),
    "predicate": Predicate(even_keys),
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
