"""Splash attention reads the mask that ``dense`` writes out: its tiles, its kernels, and what it refuses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    make_splash_mha_single_device,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
    MaskInfo,
    process_mask,
    process_mask_dkv,
)
from jax.sharding import Mesh, PartitionSpec

from jaxmask import (
    EMPTY,
    Causal,
    Chunked,
    Dense,
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
from jaxmask.indices import lookup
from jaxmask.kernels.splash import SplashAttention, to_splash

Bools = npt.NDArray[np.bool_]

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 2, 1, 256, 384, 64
OFFSET = KEYS - QUERIES
BLOCKS = BlockSizes(block_q=128, block_kv=128, block_q_dkv=128, block_kv_dkv=128, block_q_dq=128, block_kv_dq=128)
# The backward pass with other tiles than the forward pass.
MIXED = BlockSizes(block_q=128, block_kv=128, block_q_dkv=256, block_kv_dkv=128, block_q_dq=128, block_kv_dq=128)

RANDOM = np.random.default_rng(0)
VALID = RANDOM.random((BATCH, KEYS)) < 0.7
LEFT_PADDED = np.arange(KEYS) >= np.array([[0], [30]])
DOCUMENTS = np.sort(RANDOM.integers(-1, 5, (BATCH, KEYS)), axis=1).astype(np.int32)
SHUFFLED = RANDOM.integers(0, 3, (BATCH, KEYS)).astype(np.int32)
TABLE = RANDOM.random((600, 600)) < 0.5


def array(*shape: int) -> Any:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY, COTANGENT = array(BATCH, HEADS, QUERIES, DIM) / 8, array(BATCH, HEADS, QUERIES, DIM)
KEY, VALUE = array(BATCH, KV_HEADS, KEYS, DIM), array(BATCH, KV_HEADS, KEYS, DIM)


def thirds(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q + kv) % 3 != 0


def natten(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (jnp.abs(jnp.clip(q // 16, 1, 14) - kv // 16) <= 1) & (jnp.abs(q % 16 - kv % 16) <= 2)


def looked_up(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.asarray(TABLE)[q, kv]


def chosen(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.where(q % 2 == 0, q >= kv, kv < 100)


REACH = jnp.asarray(90)


def within_reach(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q - kv < REACH


class Chosen(Mask):
    """A mask of one's own: queries that may attend, read from a table of all positions."""

    table: Any

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return lookup(self.table, q=q)


class Kept(Mask):
    """A mask of one's own: keys that may be attended to, for each example."""

    keys: Any

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return lookup(self.keys, b=b, kv=kv)


class Sloped(Mask):
    """A mask of one's own that holds a number that is no integer."""

    slope: Any

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv < self.slope * q


def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv >= q - 30 * (h + 1)


def by_example(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv >= q - 30 * (b + 1)


def written_out(mask: Mask, offset: Any) -> Bools:
    return np.broadcast_to(np.asarray(mask.dense(QUERIES, KEYS, offset=offset)), (BATCH, HEADS, QUERIES, KEYS))


def reference(allowed: Any, query: Any, key: Any, value: Any, soft_cap: float | None = None) -> Any:
    """Attention by the mask written out, in which a row without keys is zero."""
    key, value = (jnp.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key)
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    scores = jnp.where(allowed, scores, -1e9)
    weights = jnp.where(allowed, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return jnp.einsum("bhqk,bhkd->bhqd", weights / jnp.where(total == 0, 1, total), value)


@partial(jax.jit, static_argnums=0)
def with_gradients(attend: Callable[..., Any], mask: Any, query: Any, key: Any, value: Any) -> tuple[Any, ...]:
    output, pull_back = jax.vjp(partial(attend, mask), query, key, value)
    return output, *pull_back(COTANGENT)


def call(attention: SplashAttention, query: Any, key: Any, value: Any) -> Any:
    return attention(query, key, value)


def assert_attends_as(
    attention: SplashAttention, allowed: Bools, soft_cap: float | None = None, inputs: Any = (QUERY, KEY, VALUE)
) -> None:
    found = with_gradients(call, attention, *inputs)
    expected = with_gradients(partial(reference, soft_cap=soft_cap), allowed, *inputs)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=5e-5)


# What the kernels are told, tile by tile.


def told(attention: SplashAttention, info: MaskInfo, block: tuple[int, int], by_key: bool) -> Bools:
    """The pairs that a kernel of splash attention attends to, from what it is told, as the kernel reads it."""
    *_, query_length, key_length = attention.shape
    batch, heads = BATCH, HEADS
    mask_function = attention.kernel.kwargs["mask_function"]
    allowed = np.zeros((batch, heads, query_length, key_length), np.bool_)

    def of(values: Any, b: int) -> Any:
        return np.asarray(values)[b if len(values) > 1 else 0]

    for b, h in np.ndindex(batch, heads):
        states, columns = of(info.block_mask, b).astype(int), of(info.data_next, b).astype(int)
        h_told = h if len(states) > 1 else 0
        for i, j in np.ndindex(*states.shape[1:]):
            state, column = states[h_told, i, j], columns[h_told, i, j]
            if state == EMPTY:
                continue
            q_tile, kv_tile = (column, j) if by_key else (i, column)
            q = slice(q_tile * block[0], (q_tile + 1) * block[0])
            kv = slice(kv_tile * block[1], (kv_tile + 1) * block[1])
            assert not allowed[b, h, q, kv].any(), "no tile runs twice"
            tile = np.ones(block, np.bool_)
            if mask_function is not None:
                rows = np.broadcast_to(of(info.q_sequence, b)[q, None], block)
                keys = np.broadcast_to(np.arange(key_length, dtype=np.int32)[None, kv], block)
                pairs = map(jnp.asarray, (rows.T, keys.T) if by_key else (rows, keys))
                tile = np.asarray(mask_function(*pairs))
                tile = tile.T if by_key else tile
            elif info.partial_mask_blocks is not None and state == 1:
                tile = of(info.partial_mask_blocks, b)[of(info.mask_next, b)[h_told, i, j]]
                tile = tile.T if by_key else tile
            allowed[b, h, q, kv] = tile
        if attention.segment_ids is not None:
            query_ids, key_ids = attention.segment_ids
            allowed[b, h] &= of(query_ids, b)[:, None] == of(key_ids, b)[None]
    return allowed


def assert_told(attention: SplashAttention, expected: Bools) -> None:
    kernel: Any = attention.kernel
    sizes: Any = kernel.kwargs["block_sizes"]
    for info, block, by_key in (
        (kernel.fwd_mask_info, (sizes.block_q, sizes.block_kv), False),
        (kernel.dq_mask_info, (sizes.block_q_dq, sizes.block_kv_dq), False),
        (kernel.dkv_mask_info, (sizes.block_q_dkv, sizes.block_kv_dkv), True),
    ):
        np.testing.assert_array_equal(told(attention, info, block, by_key), expected)


as_array = st.sampled_from([jnp.asarray, np.asarray])
sizes = st.sampled_from([1, 40, 130, 1000])


def spelled(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Numbers as static structure, or as arrays."""
    return st.one_of(values, st.builds(lambda convert, value: convert(value, np.int32), as_array, values))


numbers = spelled(sizes)
of_examples = numbers | st.builds(
    lambda convert, first, second: convert([first, second], np.int32), as_array, sizes, sizes
)
leaves = st.one_of(
    st.just(Causal()),
    st.builds(SlidingWindow, numbers),
    st.builds(Window, st.none() | numbers, st.none() | numbers),
    st.builds(Chunked, numbers, of_examples),
    st.builds(Prefix, of_examples),
    st.builds(lambda convert: Padding(convert(VALID)), as_array),
    st.builds(lambda convert, ids: Segments(convert(ids)), as_array, st.sampled_from([DOCUMENTS, SHUFFLED])),
    st.builds(lambda convert: Dense(convert(TABLE[: KEYS + 20, :KEYS])), as_array),
    st.sampled_from([Predicate(thirds), Predicate(natten), Predicate(looked_up), Predicate(by_head, heads=HEADS)]),
    st.builds(lambda first, second: PerHead([first, second]), st.builds(SlidingWindow, numbers), st.just(Causal())),
)
compositions = st.recursive(
    leaves,
    lambda parts: (
        st.builds(lambda a, b: a & b, parts, parts)
        | st.builds(lambda a, b: a | b, parts, parts)
        | parts.map(lambda part: ~part)
    ),
    max_leaves=4,
)
offsets = st.sampled_from([0, 7, OFFSET]) | st.sampled_from([jnp.asarray(OFFSET), jnp.array([OFFSET, 3])])


@settings(max_examples=10)
@given(compositions, offsets)
def test_kernels_are_told_the_mask(mask: Mask, offset: Any) -> None:
    assert_told(to_splash(mask, QUERIES, KEYS, offset=offset, block_sizes=BLOCKS), written_out(mask, offset))


@pytest.mark.parametrize(
    "sizes", [BlockSizes(128, 384, 128, 256, 128, 128, 128, 128), None], ids=["of each kernel", "default"]
)
@pytest.mark.parametrize("mask", [SlidingWindow(100), Dense(jnp.asarray(TABLE[:KEYS, :KEYS]))], ids=repr)
def test_blocks_of_kernels_may_differ(mask: Mask, sizes: BlockSizes | None) -> None:
    assert_told(to_splash(mask, QUERIES, KEYS, offset=OFFSET, block_sizes=sizes), written_out(mask, OFFSET))


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize(
    ("mask", "theirs"),
    [
        (Causal(), CausalMask),
        (SlidingWindow(200), lambda shape: LocalMask(shape, (199, 0), 0)),
        (Window(300, 100), lambda shape: LocalMask(shape, (300, 100), 0)),
        (Window(None, 7), lambda shape: LocalMask(shape, (None, 7), 0)),
    ],
    ids=["causal", "sliding window", "window", "window to the right"],
)
def test_static_mask_is_told_as_splash_tells_its_own(mask: Mask, theirs: Callable[..., Any], length: int) -> None:
    kernel: Any = to_splash(mask, length, length, block_sizes=MIXED).kernel
    full = MultiHeadMask([theirs((length, length))])
    infos: Any = (
        (kernel.fwd_mask_info, process_mask(full, (128, 128))[0]),
        (kernel.dkv_mask_info, process_mask_dkv(full, (256, 128))[0]),
    )
    for mine, expected in infos:
        runs = expected.block_mask != EMPTY
        np.testing.assert_array_equal(mine.block_mask[0], expected.block_mask)
        np.testing.assert_array_equal(mine.data_next[0][runs], expected.data_next[runs])
        np.testing.assert_array_equal(mine.q_sequence[0], expected.q_sequence)
        assert (mine.block_mask.dtype, mine.data_next.dtype) == (expected.block_mask.dtype, expected.data_next.dtype)


def test_written_tiles_are_held_once_as_splash_holds_them() -> None:
    length = 1024
    masks = PerHead([Causal(), SlidingWindow(200), Causal()])
    theirs = MultiHeadMask(
        [CausalMask((length, length)), LocalMask((length, length), (199, 0), 0), CausalMask((length, length))]
    )
    kernel: Any = to_splash(masks, length, length, block_sizes=BLOCKS).kernel
    [mine] = kernel.fwd_mask_info.partial_mask_blocks
    expected: Any = process_mask(theirs, (128, 128))
    expected = expected[0].partial_mask_blocks
    assert sorted(block.tobytes() for block in mine) == sorted(block.tobytes() for block in expected)


def test_steps_that_do_not_run_fetch_what_runs_next() -> None:
    kernel: Any = to_splash(SlidingWindow(300), 1024, 1024, block_sizes=BLOCKS).kernel
    for info, by_key in ((kernel.fwd_mask_info, False), (kernel.dkv_mask_info, True)):
        states, fetched = (x[0, 0].T.ravel() if by_key else x[0, 0].ravel() for x in (info.block_mask, info.data_next))
        steps = range(len(states))
        runs_next = [next(k for k in [*steps[step:], *steps] if states[k] != EMPTY) for step in steps]
        assert (states == EMPTY).any()
        np.testing.assert_array_equal(fetched, fetched[runs_next])


def test_queries_beyond_the_ids_attend_to_nothing() -> None:
    mask, offset = Segments(jnp.asarray(DOCUMENTS)) & Padding(jnp.asarray(VALID)), traced(KEYS - 100)
    written = written_out(mask, offset)
    assert not written[:, :, 100:].any()
    assert_told(to_splash(mask, QUERIES, KEYS, offset=offset, block_sizes=BLOCKS), written)


# Attention itself, and its gradients.


def traced(first: int, *others: int) -> Any:
    return jnp.asarray([first, *others] if others else first, jnp.int32)


WAYS: dict[str, tuple[Mask, Any]] = {
    "computed": (Causal() & (SlidingWindow(40) | Prefix(5)), traced(OFFSET, -60)),
    "segment ids": (Causal() & Segments(jnp.asarray(DOCUMENTS)) & Padding(jnp.asarray(VALID)), OFFSET),
    "numbers": (Causal() & (SlidingWindow(traced(40)) | Prefix(traced(5, 150))), OFFSET),
    "written": (PerHead([Causal(), SlidingWindow(40)]) & Padding(jnp.asarray(VALID)), OFFSET),
}


@pytest.mark.parametrize(("mask", "offset"), WAYS.values(), ids=WAYS)
def test_attention_and_gradients_are_those_of_the_dense_mask(mask: Mask, offset: Any) -> None:
    attention = to_splash(mask, QUERIES, KEYS, offset=offset, block_sizes=BLOCKS, interpret=True)
    assert_attends_as(attention, written_out(mask, offset))


def test_soft_cap_and_the_fused_backward_pass_are_those_of_splash() -> None:
    sizes = BlockSizes(128, 128, 128, 128, 384, 128, use_fused_bwd_kernel=True)
    mask = SlidingWindow(100) & Padding(jnp.asarray(VALID))
    options: Any = {"offset": OFFSET, "block_sizes": sizes, "attn_logits_soft_cap": 3.0, "interpret": True}
    assert_attends_as(to_splash(mask, QUERIES, KEYS, **options), written_out(mask, OFFSET), soft_cap=3.0)


def test_query_without_keys_gives_zero_and_zero_gradients() -> None:
    # The first tile of queries comes before all keys, and so do some queries of the second.
    mask, offset = Causal() & Padding(jnp.asarray(LEFT_PADDED)), -140
    attention = to_splash(mask, QUERIES, KEYS, offset=offset, block_sizes=BLOCKS, interpret=True)
    found = with_gradients(call, attention, QUERY, KEY, VALUE)
    alone: Bools = ~np.any(written_out(mask, offset), axis=-1)
    assert alone[:, :, :140].all()
    for of_queries in found[:2]:
        assert (np.asarray(of_queries)[alone] == 0).all()
    assert all(np.isfinite(part).all() for part in found)


def test_one_example_under_vmap_is_splash_itself() -> None:
    key, value = KEY[:, :, :QUERIES], VALUE[:, :, :QUERIES]
    full = MultiHeadMask([CausalMask((QUERIES, QUERIES))] * HEADS)
    theirs = make_splash_mha_single_device(full, block_sizes=BLOCKS, interpret=True)
    mine = to_splash(Causal(), QUERIES, QUERIES, block_sizes=BLOCKS, interpret=True)
    np.testing.assert_array_equal(*(jax.jit(jax.vmap(attend))(QUERY, key, value) for attend in (mine, theirs)))


def test_windows_of_layers_are_scanned_by_one_kernel() -> None:
    windows = jnp.array([30, KEYS, 100])

    def layer(query: Any, window: Any) -> tuple[Any, None]:
        mask = SlidingWindow(window) & Segments(jnp.asarray(DOCUMENTS))
        attention = to_splash(mask, QUERIES, KEYS, offset=OFFSET, block_sizes=BLOCKS, interpret=True)
        return query + attention(query, KEY, VALUE), None

    expected = QUERY
    for window in windows.tolist():
        mask = SlidingWindow(window) & Segments(jnp.asarray(DOCUMENTS))
        expected = expected + reference(written_out(mask, OFFSET), expected, KEY, VALUE)
    found, _ = jax.jit(partial(jax.lax.scan, layer))(QUERY, windows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-5)


def test_other_arrays_and_equal_masks_do_not_compile_again() -> None:
    traces: list[int] = []

    @jax.jit
    def attend(attention: SplashAttention) -> Any:
        traces.append(len(traces))
        return attention(QUERY, KEY, VALUE)

    for window, offset in ((40, 0), (70, 5), (KEYS, OFFSET)):
        mask = Causal() & (SlidingWindow(traced(window)) | Prefix(3)) & Segments(jnp.asarray(DOCUMENTS))
        offset = traced(offset)
        attention = to_splash(mask, QUERIES, KEYS, offset=offset, block_sizes=BLOCKS, interpret=True)
        expected = reference(written_out(mask, offset), QUERY, KEY, VALUE)
        np.testing.assert_allclose(attend(attention), expected, rtol=1e-4, atol=5e-5)
    assert traces == [0]


def test_shards_of_queries_attend_as_the_whole() -> None:
    mask = Causal() & Segments(jnp.asarray(DOCUMENTS[:1, :QUERIES]))
    mesh, rows = Mesh(np.array(jax.devices()[:2]), ("q",)), PartitionSpec(None, None, "q")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    def shard(query: Any) -> Any:
        length = query.shape[2]
        offset = jax.lax.axis_index("q") * length
        attention = to_splash(mask, length, QUERIES, offset=offset, block_sizes=BLOCKS, interpret=True)
        return attention(query, KEY[:, :, :QUERIES], VALUE[:, :, :QUERIES])

    allowed = mask.dense(QUERIES, QUERIES)
    expected = reference(allowed, QUERY, KEY[:, :, :QUERIES], VALUE[:, :, :QUERIES])
    np.testing.assert_allclose(shard(QUERY), expected, rtol=1e-4, atol=5e-5)


# Which way pairs are decided, and what it holds.


def kernel_of(mask: Mask, offset: Any = OFFSET, partial_tiles: int | None = None) -> SplashAttention:
    return to_splash(mask, QUERIES, KEYS, offset=offset, block_sizes=MIXED, partial_tiles=partial_tiles)


@pytest.mark.parametrize(
    "mask",
    [
        Predicate(looked_up) & Causal(),
        Predicate(within_reach),
        Chosen(jnp.asarray(TABLE[0])) & Causal(),
        Sloped(jnp.asarray(0.7)),
        Predicate(chosen),
        Predicate(by_head) & PerHead([Full(), Full()]),
        Predicate(by_example) & Padding(jnp.asarray(VALID)),
        Predicate(by_example, batch=BATCH) & SlidingWindow(traced(90)),
        Segments(jnp.asarray(DOCUMENTS)) & Segments(jnp.asarray(SHUFFLED)),
    ],
    ids=[
        "table",
        "captured number",
        "table of one's own",
        "float",
        "bools chosen",
        "heads",
        "examples",
        "examples beside numbers",
        "two segments",
    ],
)
def test_what_a_kernel_cannot_compute_is_written_out(mask: Mask) -> None:
    attention = kernel_of(mask)
    assert attention.kernel.fwd_mask_info.partial_mask_blocks is not None
    assert_told(attention, written_out(mask, OFFSET))


def test_masks_of_keys_alone_are_segment_ids_whatever_their_class() -> None:
    mask = Causal() & ~Kept(jnp.asarray(VALID)) & Dense(jnp.asarray(LEFT_PADDED[:, None, None]))
    attention = kernel_of(mask)
    assert attention.segment_ids is not None
    assert attention.kernel.fwd_mask_info.partial_mask_blocks is None
    assert_told(attention, written_out(mask, OFFSET))


@pytest.mark.parametrize(
    ("mask", "sizes"), [(Predicate(by_head), {"heads": HEADS}), (Predicate(by_example), {"batch": BATCH})], ids=repr
)
def test_numbers_of_examples_and_heads_may_be_told(mask: Mask, sizes: Any) -> None:
    attention = to_splash(mask, QUERIES, KEYS, offset=OFFSET, block_sizes=MIXED, **sizes)
    written = mask.dense(QUERIES, KEYS, offset=OFFSET, **sizes)
    assert_told(attention, np.broadcast_to(np.asarray(written), (BATCH, HEADS, QUERIES, KEYS)))


def test_table_traced_in_the_closure_of_a_predicate_is_written_out() -> None:
    @jax.jit
    def attend(table: Any) -> Any:
        mask = Predicate(lambda b, h, q, kv: table[q, kv]) & Causal()
        return to_splash(mask, QUERIES, KEYS, offset=OFFSET, block_sizes=MIXED)

    assert_told(attend(TABLE), written_out(Predicate(looked_up) & Causal(), OFFSET))


def test_partial_tiles_bound_what_is_held_and_an_example_that_has_more_is_nan() -> None:
    # The first example has a document for each tile of queries. In the second, the documents of one tile are mixed.
    ids = jnp.asarray(np.stack([np.arange(KEYS) // 128, np.where(np.arange(KEYS) < 128, np.arange(KEYS) % 2, 1)]))
    mask = ~Segments(ids)
    written = written_out(mask, 0)
    found: Any = kernel_of(mask, 0, partial_tiles=3)
    info: Any = found.kernel.fwd_mask_info
    assert info.partial_mask_blocks.shape[1] == 3
    np.testing.assert_array_equal(np.isnan(found.no_key), [False, True])
    np.testing.assert_array_equal(told(found, info, (128, 128), by_key=False)[0], written[0])


def test_missed_partial_tiles_are_nan() -> None:
    @jax.jit
    def attend(ids: Any) -> Any:
        options: Any = {"offset": 0, "block_sizes": BLOCKS, "partial_tiles": 1, "interpret": True}
        return to_splash(~Segments(ids), QUERIES, KEYS, **options)(QUERY, KEY, VALUE)

    assert np.isnan(attend(SHUFFLED)).all()


LONG = 65536
IDS = jax.ShapeDtypeStruct((1, LONG), jnp.int32)


@pytest.mark.parametrize(
    ("mask", "spec"),
    [
        (lambda ids: SlidingWindow(4096) & Causal(), IDS),
        (lambda ids: Causal() & Segments(ids), IDS),
        (lambda ids: SlidingWindow(1024) & Padding(ids), IDS),
        (lambda window: SlidingWindow(window) | Prefix(4), jax.ShapeDtypeStruct((), jnp.int32)),
        (lambda lengths: Causal() | Prefix(lengths), jax.ShapeDtypeStruct((1,), jnp.int32)),
        (lambda ids: PerHead([Causal(), SlidingWindow(4096)]) & Segments(ids), IDS),
    ],
    ids=["static", "segments", "padding", "window", "prefix", "heads"],
)
def test_what_is_held_grows_with_the_length_alone(mask: Callable[[Any], Mask], spec: jax.ShapeDtypeStruct) -> None:
    held = jax.eval_shape(lambda argument: to_splash(mask(argument), LONG, LONG), spec)
    assert sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(held)) < 64 * LONG


def test_tiles_between_documents_do_not_run() -> None:
    mask = Causal() & Segments(jnp.arange(KEYS)[None] // 128)
    info: Any = kernel_of(mask).kernel.fwd_mask_info
    tiles = mask.tiles(QUERIES, KEYS, offset=OFFSET)
    assert (info.block_mask != EMPTY).sum() == (tiles.states != EMPTY).sum() < tiles.states.size


def test_grid_is_as_wide_as_the_window_whatever_is_traced() -> None:
    held = jax.eval_shape(lambda ids: to_splash(SlidingWindow(4096) & Segments(ids), LONG, LONG), IDS)
    assert held.kernel.fwd_mask_info.block_mask.shape == (1, 1, LONG // 512, 4096 // 512 + 1)


# Bad input.


def run(mask: Any = None, query: Any = QUERY, key: Any = KEY, value: Any = VALUE) -> Any:
    return to_splash(Causal() if mask is None else mask, QUERIES, KEYS, offset=0, block_sizes=BLOCKS)(query, key, value)


def build(*lengths: Any, **options: Any) -> Any:
    return to_splash(Causal(), *lengths, **options)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "ragged queries": (lambda: build(200, 256, offset=0), ValueError, "query_length .* 128, .* 200: pad to 256"),
    "ragged keys": (lambda: build(256, 300, offset=0), ValueError, r"key_length .* 300: pad to 384, .* Prefix\(300\)"),
    "ragged block": (
        lambda: build(256, 256, block_sizes=BlockSizes(128, 384)),
        ValueError,
        "key_length must be a multiple of block_kv of block_sizes, .* 256 and 384: pad to 384",
    ),
    "small block": (
        lambda: build(256, 256, block_sizes=BlockSizes(128, 64)),
        ValueError,
        "block_kv of block_sizes must be a multiple of 128, got 64",
    ),
    "ragged compute block": (
        lambda: build(256, 256, block_sizes=BlockSizes(128, 256, 384)),
        ValueError,
        "block_kv must be a multiple of block_kv_compute",
    ),
    "number for blocks": (lambda: build(256, 256, block_sizes=128), TypeError, "block_sizes must be .* got 128"),
    "array for mask": (
        lambda: run(jnp.ones((QUERIES, KEYS), jnp.bool_)),
        TypeError,
        r"mask must be a mask, got bool\[256, 384\]; wrap it in Dense",
    ),
    "no offset": (lambda: build(256, 384), ValueError, "offset is missing"),
    "batch of another size": (
        lambda: run(Padding(jnp.ones((3, KEYS), jnp.bool_))),
        ValueError,
        r"query must be \[3, heads, 256, dim\], as the mask is, got float32\[2, 2, 256, 64\]",
    ),
    "one example for several": (
        lambda: run(Padding(jnp.asarray(VALID)), QUERY[0], KEY[0], VALUE[0]),
        ValueError,
        r"query must be \[2, heads, 256, dim\]",
    ),
    "heads of the mask": (
        lambda: run(PerHead([Causal()] * 3)),
        ValueError,
        r"query must have the 3 heads that the mask has, got float32\[2, 2, 256, 64\]",
    ),
    "heads of keys": (
        lambda: run(key=jnp.ones((BATCH, 3, KEYS, DIM))),
        ValueError,
        r"key must be \[2, kv_heads, 384, dim\], where kv_heads divides 2, got float32\[2, 3, 384, 64\]",
    ),
    "length of queries": (lambda: run(query=QUERY[:, :, :128]), ValueError, "query must be .* 256, dim"),
    "length of values": (lambda: run(value=VALUE[:, :, :128]), ValueError, r"value must be \[2, kv_heads, 384"),
}


@pytest.mark.breaks_annotations
@pytest.mark.parametrize(("call", "error", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        jax.eval_shape(call)


@pytest.mark.breaks_annotations
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("query_length", lambda traced: build(traced, 256)),
        ("key_length", lambda traced: build(256, traced)),
        ("partial_tiles", lambda traced: build(256, 256, partial_tiles=traced)),
        ("attn_logits_soft_cap", lambda traced: build(256, 256, attn_logits_soft_cap=traced)),
        ("block_q of block_sizes", lambda traced: build(256, 256, block_sizes=BlockSizes(traced, 128))),
    ],
)
def test_traced_value_where_a_static_one_is_needed_is_refused(argument: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=f"{argument} (is a shape and )?must be a Python"):
        jax.jit(call)(128)
