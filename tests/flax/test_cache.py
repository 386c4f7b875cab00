"""A cache step by step gives what attention over the whole text gives, whatever the chunks, the padding, the rings."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxmask
from jaxmask import Causal, Chunked, Mask, SlidingWindow
from jaxmask.flax import Cache, KeysAndValues, LayerCache, Seen, Step

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 24
# A window for the cache, and the mask of a layer that looks no further back.
LAYERS: list[tuple[int | None, Mask]] = [
    (None, Causal()),
    (5, Causal() & SlidingWindow(5)),
    (8, Causal() & SlidingWindow(5)),
    (6, Causal() & Chunked(6)),
    (1, Causal() & SlidingWindow(1)),
]


def text(seed: int, batch: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (
        jax.random.normal(k, (batch, length, heads, DIM)) for k, heads in zip(keys, shapes, strict=True)
    )
    return query, key, value


def part(whole: Any, start: int, end: int) -> tuple[Any, Any, Any]:
    query, key, value = (x[:, start:end] for x in whole)
    return query, key, value


def empty(batch: int, length: int = LENGTH) -> Cache:
    return Cache.empty(batch, length, layers=[window for window, _ in LAYERS], kv_heads=KV_HEADS, dim=DIM)


def run(cache: Cache, new: Any, valid: Any = None) -> tuple[list[jax.Array], Cache]:
    """The output of every layer for the same new tokens."""
    query, key, value = new
    step = cache.step(query.shape[1], valid)
    results = [
        layer.attend(step, query, key, value, mask) for layer, (_, mask) in zip(cache.layers, LAYERS, strict=True)
    ]
    return [out for out, _ in results], step.end([layer for _, layer in results])


jitted = jax.jit(run)


@st.composite
def chunked_rows(draw: Any) -> list[list[tuple[int, int, int]]]:
    """Chunks of three rows: for each row the padding on the left, the tokens, the padding on the right."""
    chunks = []
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.sampled_from((1, 4, 9)))
        rows = []
        for _ in range(3):
            left = draw(st.integers(0, width))
            tokens = draw(st.integers(0, width - left))
            rows.append((left, tokens, width - left - tokens))
        chunks.append(rows)
    return chunks


@given(chunked_rows())
def test_chunks_with_any_padding_are_as_the_whole_text(chunks: list[list[tuple[int, int, int]]]) -> None:
    lengths = [sum(rows[row][1] for rows in chunks) for row in range(3)]
    if max(lengths) > LENGTH:
        return
    whole = text(0, 3, LENGTH)
    wanted = [jaxmask.attention(*whole, mask) for _, mask in LAYERS]
    cache, done = empty(3), [0, 0, 0]
    for rows in chunks:
        width = sum(rows[0])
        valid = np.zeros((3, width), bool)
        new = [np.full((3, width, *x.shape[2:]), 1e3, np.float32) for x in whole]
        for row, (left, tokens, _) in enumerate(rows):
            valid[row, left : left + tokens] = True
            for padded, x in zip(new, whole, strict=True):
                padded[row, left : left + tokens] = x[row, done[row] : done[row] + tokens]
        outputs, cache = jitted(cache, new, valid)
        for out, right in zip(outputs, wanted, strict=True):
            for row, (left, tokens, _) in enumerate(rows):
                np.testing.assert_allclose(
                    out[row, left : left + tokens], right[row, done[row] : done[row] + tokens], rtol=2e-6, atol=2e-6
                )
        done = [count + rows[row][1] for row, count in enumerate(done)]
        assert cache.tokens.tolist() == done


def test_a_thousand_steps_compile_once() -> None:
    traces = 0

    @jax.jit
    def step(cache: Cache, new: Any) -> Any:
        nonlocal traces
        traces += 1
        return run(cache, new)

    cache = empty(2, 1000)
    query, key, value = text(1, 2, 1000)
    wanted = [jaxmask.attention(query, key, value, mask)[:, -1] for _, mask in LAYERS]
    outputs: list[jax.Array] = []
    for at in range(1000):
        outputs, cache = step(cache, [x[:, at : at + 1] for x in (query, key, value)])
    assert traces == 1
    for out, right in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(out[:, 0], right, rtol=2e-6, atol=2e-6)


def test_steps_in_a_scan_are_as_steps_one_by_one() -> None:
    new = text(2, 2, 12)

    def step(cache: Cache, token: Any) -> Any:
        outputs, cache = run(cache, [x[:, None] for x in token])
        return cache, outputs

    _, outputs = jax.lax.scan(step, empty(2), [x.swapaxes(0, 1) for x in new])
    for out, (_, mask) in zip(outputs, LAYERS, strict=True):
        np.testing.assert_allclose(out[:, :, 0].swapaxes(0, 1), jaxmask.attention(*new, mask), rtol=2e-6, atol=2e-6)


def test_rings_without_a_full_layer_have_no_end() -> None:
    mask = Causal() & SlidingWindow(4)
    cache = Cache.empty(1, 8, layers=[4], kv_heads=KV_HEADS, dim=DIM)
    whole = text(3, 1, 30)
    outputs = []
    for start, end in ((0, 11), (11, 12), (12, 13), (13, 30)):
        step = cache.step(end - start)
        out, layer = cache.layers[0].attend(step, *part(whole, start, end), mask)
        cache = step.end([layer])
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), jaxmask.attention(*whole, mask), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("before", [20, 24, 30])
def test_a_compiled_step_without_room_is_nan_in_that_row_alone(before: int) -> None:
    cache = Cache.empty(2, LENGTH, layers=[None, 4], kv_heads=KV_HEADS, dim=DIM)
    new = text(4, 2, 5)

    @jax.jit
    def step(tokens: Any) -> Any:
        step = Cache(cache.layers, tokens).step(5)
        return [layer.attend(step, *new, Causal() & SlidingWindow(4))[0] for layer in cache.layers]

    for out in step(jnp.array([before, 0], jnp.int32)):
        assert jnp.isnan(out[0]).any() == (before + 5 > LENGTH)
        assert jnp.isfinite(out[1]).all()


def test_every_step_after_the_last_that_had_room_is_nan() -> None:
    """Also where the mask reaches no slot that was written in vain, and its tiles are skipped."""
    cache = Cache.empty(1, 512, layers=[None], kv_heads=KV_HEADS, dim=DIM)
    cache = Cache(cache.layers, jnp.array([510], jnp.int32))
    new = text(4, 1, 1)

    @jax.jit
    def step(cache: Cache) -> Any:
        step = cache.step(1)
        out, layer = cache.layers[0].attend(step, *new, Causal() & SlidingWindow(2))
        return jnp.isnan(out).all(), step.end([layer])

    actual = []
    for _ in range(6):
        is_nan, cache = step(cache)
        actual.append(bool(is_nan))
    assert actual == [False, False, True, True, True, True]


def test_a_ring_never_shows_what_is_before_its_window() -> None:
    """Be it given in one step, in which all of it is at hand, or in several."""
    whole = text(10, 1, 9)
    wanted = jaxmask.attention(*whole, Causal() & SlidingWindow(2))
    for cuts in ((0, 9), (0, 4, 9), tuple(range(10))):
        cache, outputs = Cache.empty(1, 9, layers=[2], kv_heads=KV_HEADS, dim=DIM), []
        for start, end in itertools.pairwise(cuts):
            step = cache.step(end - start)
            out, layer = cache.layers[0].attend(step, *part(whole, start, end), Causal())
            cache = step.end([layer])
            outputs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outputs, 1), wanted, rtol=2e-6, atol=2e-6)


def test_a_compiled_step_with_padding_between_tokens_is_nan() -> None:
    new = text(5, 3, 3)
    outputs, _ = jax.jit(run)(empty(3), new, jnp.array([[True, False, True], [True, True, True], [False, True, True]]))
    for out in outputs:
        assert jnp.isnan(out[0]).any()
        assert jnp.isfinite(out[1:]).all()


def test_a_row_begins_anew_when_its_tokens_are_none() -> None:
    new = text(6, 2, 7)
    wanted, _ = run(empty(2), new)
    _, used = run(empty(2), text(7, 2, 9))
    outputs, _ = run(Cache(used.layers, used.tokens.at[1].set(0)), new)
    for out, right in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(out[1], right[1], rtol=2e-6, atol=2e-6)


def test_a_step_of_decoding_writes_only_its_own_slots() -> None:
    """No operation of the compiled step makes an array of the size of the cache but the write in place."""
    length = 16384
    cache = Cache.empty(2, length, layers=[None], kv_heads=KV_HEADS, dim=DIM)
    new = text(8, 2, 1)

    def step(cache: Cache) -> Any:
        step = cache.step(1)
        out, layer = cache.layers[0].attend(step, *new, Causal())
        return out, step.end([layer])

    memory: Any = jax.jit(step, donate_argnums=0).lower(cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < cache.layers[0].key.nbytes / 4


def test_gradients_flow_through_the_cache() -> None:
    whole = text(9, 1, 8)

    def loss(whole: Any, cuts: tuple[int, ...]) -> Any:
        cache, total = Cache.empty(1, 8, layers=[4], kv_heads=KV_HEADS, dim=DIM), 0
        for start, end in zip((0, *cuts), (*cuts, 8), strict=True):
            step = cache.step(end - start)
            out, layer = cache.layers[0].attend(step, *part(whole, start, end), Causal() & SlidingWindow(4))
            cache, total = step.end([layer]), total + (out**2).sum()
        return total

    for cut, right in zip(jax.grad(loss)(whole, (3, 4, 7)), jax.grad(loss)(whole, ()), strict=True):
        np.testing.assert_allclose(cut, right, rtol=1e-5, atol=1e-5)


def test_a_layer_takes_the_arguments_of_attention() -> None:
    query, key, value = text(0, 2, 12)
    sinks = jnp.array([0.0, 1.0, -1.0, 2.0])
    how: dict[str, Any] = {"sinks": sinks, "return_residual": True}
    expected, expected_lse = jaxmask.attention(query, key, value, Causal() & SlidingWindow(5), **how)
    cache, found = empty(2), []
    for start, end in ((0, 7), (7, 8), (8, 12)):
        step = cache.step(end - start)
        results = [
            layer.attend(step, *part((query, key, value), start, end), SlidingWindow(5), **how)
            for layer in cache.layers
        ]
        found.append(results[1][0])
        cache = step.end([layer for _, layer in results])
    outs, lses = zip(*found, strict=True)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=2e-6)
    np.testing.assert_allclose(jnp.concatenate(lses, 1), expected_lse, atol=2e-6)


def test_a_layer_drops_the_pairs_of_its_key() -> None:
    query, key, value = text(0, 2, 12)
    how: dict[str, Any] = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    step = empty(2, 12).step(12)
    found, _ = empty(2, 12).layers[0].attend(step, query, key, value, Causal(), **how)
    np.testing.assert_allclose(found, jaxmask.attention(query, key, value, Causal(), **how), atol=2e-6)


def test_queries_of_a_draft_tree_attend_by_their_own_positions() -> None:
    """Two drafts of the next token, both read at position 6, attend to the seven tokens before, not to each other."""
    query, key, value = text(0, 1, 9)
    cache = Cache.empty(1, LENGTH, layers=[None], kv_heads=KV_HEADS, dim=DIM)
    step = cache.step(7)
    _, layer = cache.layers[0].attend(step, *part((query, key, value), 0, 7), Causal())
    cache = step.end([layer])
    positions = jnp.array([6, 6])
    found, _ = cache.layers[0].attend(
        cache.step(2), *part((query, key, value), 7, 9), Causal(), query_positions=positions
    )
    expected = jaxmask.attention(query[:, 7:], key[:, :7], value[:, :7], Causal(), query_positions=positions)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_padding_cannot_poison_a_ring_nor_a_layer_that_keeps_all(poison: float) -> None:
    whole = text(0, 2, 9)
    valid = np.arange(9) >= np.array([[0], [4]])
    found = []
    for content in (0, poison):
        query, key, value = (jnp.where(valid[:, :, None, None], x, content) for x in whole)
        query = jnp.where(valid[:, :, None, None], query, 0)  # a query of padding is its own affair
        outs, cache = run(empty(2), part((query, key, value), 0, 6), valid[:, :6])
        more, _ = run(cache, part((query, key, value), 6, 9), valid[:, 6:])
        found.append([*outs, *more])
    for clean, poisoned in zip(*found, strict=True):
        np.testing.assert_array_equal(clean, poisoned)


def test_positions_are_those_of_what_is_kept() -> None:
    layer = LayerCache(jnp.zeros((3, 4, 1, 1)), jnp.zeros((3, 4, 1, 1)), is_ring=True)
    assert layer.positions(jnp.array([0, 3, 6])).tolist() == [[-4, -3, -2, -1], [0, 1, 2, -1], [4, 5, 2, 3]]


def test_a_step_says_the_positions_of_its_tokens() -> None:
    step: Step = Cache.empty(2, 8, layers=[None], kv_heads=1, dim=1).step(3, np.array([[0, 1, 1], [1, 1, 0]], bool))
    assert step.positions.tolist() == [[-1, 0, 1], [0, 1, 2]]


def test_the_shapes_of_a_cache_larger_than_any_memory_are_known() -> None:
    cache = jax.eval_shape(lambda: Cache.empty(1024, 2**20, layers=[None, 4096] * 32, kv_heads=64, dim=128))
    assert [layer.key.shape[1] for layer in cache.layers] == [2**20, 4096] * 32
    assert {layer.value.dtype for layer in cache.layers} == {jnp.dtype(jnp.float32)}
    assert cache.tokens.shape == (1024,)


def test_numpy_integers_become_python_integers() -> None:
    size = np.int64(4)
    cache = Cache.empty(size, size, layers=[None, np.int32(2)], kv_heads=size, dim=size)
    expected = Cache.empty(4, 4, layers=[None, 2], kv_heads=4, dim=4)
    assert jax.tree.structure(cache) == jax.tree.structure(expected)
    assert [x.shape for x in jax.tree.leaves(cache)] == [x.shape for x in jax.tree.leaves(expected)]
    assert type(cache.step(np.int64(1)).count) is int
    assert Cache.empty(1, 8, layers=np.array([2, 4]), kv_heads=1, dim=1).layers[1].key.shape[1] == 4


def test_the_old_name_of_keys_and_values_still_works() -> None:
    assert Seen is KeysAndValues


def test_a_cache_may_be_an_argument_of_a_saved_program() -> None:
    cache = Cache.empty(2, 8, layers=[None, 4], kv_heads=1, dim=4)
    valid = jnp.array([[False, False, True], [True, True, True]])

    def run(cache: Cache, x: jax.Array, valid: jax.Array) -> Any:
        step, layers, seen = cache.step(x.shape[1], valid), [], []
        for layer in cache.layers:
            layer, keys = layer.update(step, x, x)
            layers.append(layer)
            seen.append(keys)
        return step.end(layers), step, seen

    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 1, 4)), jnp.float32)
    exported = jax.export.export(jax.jit(run))(cache, x, valid)
    found = jax.export.deserialize(exported.serialize()).call(cache, x, valid)
    expected = jax.jit(run)(cache, x, valid)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
