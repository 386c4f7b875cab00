"""Bad input of caches, decoders and generation is refused at once, and says what to do."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmask
from jaxmask import Causal, Prefix, Segments, SlidingWindow, Window, zoo
from jaxmask.flax import (
    T5,
    Cache,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    Encoder,
    EncoderConfig,
    Llama3Scaling,
    Rope,
    T5Config,
    generate,
    left_pad,
)
from tests.helpers.bad import bad, refusals

VALUE, TYPE = ValueError, TypeError
MODEL = Decoder(
    DecoderConfig(16, 8, 16, heads=2, kv_heads=1, head_dim=4, layers=(DecoderLayer(), DecoderLayer(window=4))),
    rngs=nnx.Rngs(0),
)
CHUNKED = Decoder(
    DecoderConfig(16, 8, 16, heads=2, kv_heads=1, head_dim=4, layers=(DecoderLayer(chunk=2),)), rngs=nnx.Rngs(0)
)
BLOCKS = Decoder(dataclasses.replace(MODEL.config, blocks_exceed_window=True), rngs=nnx.Rngs(0))
TOKENS, VALID = left_pad([[1, 2, 3], [4]])


def empty(batch: Any = 2, length: Any = 8, layers: Any = (None, 4), **options: Any) -> Cache:
    options = {"kv_heads": 1, "dim": 4} | options
    return Cache.empty(batch, length, layers=layers, **options)


def update(cache: Cache, count: int, key: Any = None, value: Any = None) -> Any:
    new = jnp.zeros((2, count, 1, 4))
    return cache.layers[0].update(cache.step(count), new if key is None else key, new if value is None else value)


NEW = jnp.zeros((2, 2, 2, 4))


def attend_with(query: Any, **arguments: Any) -> Any:
    """Attention of two new tokens."""
    cache = empty()
    return cache.layers[0].attend(cache.step(2), query, NEW[:, :, :1], NEW[:, :, :1], Causal(), **arguments)


def run(tokens: Any = TOKENS, valid: Any = VALID, **options: Any) -> Any:
    options = {"max_new_tokens": 2} | options
    return generate(MODEL, tokens, valid, **options)


def config(**changed: Any) -> DecoderConfig:
    return dataclasses.replace(MODEL.config, **changed)


CACHE = [
    bad("batch", lambda: empty(0), VALUE, "batch must be at least 1", "got 0"),
    bad("positions", lambda: empty(length=2**31 - 1, layers=(4,)), VALUE, "length must be", "at most 1073741824"),
    bad("length", lambda: empty(length=2.0), TYPE, "length must be a Python int", "got 2.0"),
    bad("no-layers", lambda: empty(layers=()), VALUE, "layers must give the window of each layer"),
    bad("number-of-layers", lambda: empty(layers=3), TYPE, "layers must be a sequence of windows", "got 3"),
    bad("window", lambda: empty(layers=(None, 0)), VALUE, r"layers\[1\] must be at least 1", "got 0"),
    bad("bool", lambda: empty(batch=True), TYPE, "batch must be a Python int", "got True"),
    bad("negative", lambda: empty(length=np.int64(-1)), VALUE, "length must be at least 1", "got -1"),
    bad("window-of-floats", lambda: empty(layers=np.array([4.0])), TYPE, r"layers\[0\] must be a Python int"),
    bad("window-of-bools", lambda: empty(layers=(True,)), TYPE, r"layers\[0\] must be a Python int", "got True"),
    bad("dtype", lambda: empty(dtype=jnp.int32), TYPE, "dtype must be floating", "int32"),
    bad("count", lambda: empty().step(0), VALUE, "count must be at least 1"),
    bad("negative-count", lambda: empty().step(np.int64(-2)), VALUE, "count must be at least 1", "got -2"),
    bad("bool-count", lambda: empty().step(True), TYPE, "count must be a Python int", "got True"),
    bad("float-count", lambda: cast(Any, empty().step)(1.0), TYPE, "count must be a Python int", "got 1.0"),
    bad(
        "other-queries",
        lambda: attend_with(NEW[:, :1]),
        VALUE,
        "query must have the 2 tokens of the step",
        r"\[2, 1, 2, 4\]",
    ),
    bad("offset-of-a-step", lambda: attend_with(NEW, offset=3), VALUE, "offset must be left out", "the cache knows it"),
    bad("longer-than-the-cache", lambda: empty().step(9), VALUE, "room for 8 tokens", "got 9", "greater length"),
    bad(
        "valid-dtype",
        lambda: empty().step(3, cast(Any, VALID * 1.0)),
        TYPE,
        "valid must be bool or integer",
        r"\[2, 3\]",
    ),
    bad(
        "valid-tokens", lambda: empty().step(3, TOKENS), VALUE, "of 0 and 1", r"int32\[2, 3\] from 0 to 4", "ids != pad"
    ),
    bad("valid-negative", lambda: empty().step(3, TOKENS - 4), VALUE, "of 0 and 1", "from -4 to 0"),
    bad(
        "valid-shape", lambda: empty().step(2, VALID), VALUE, r"valid must be \[batch, q\] = \[2, 2\]", r"bool\[2, 3\]"
    ),
    bad("key-count", lambda: update(empty(), 2, key=jnp.zeros((2, 1, 1, 4))), VALUE, "key", r"\[2, 2, 1, 4\]"),
    bad("key-heads", lambda: update(empty(), 1, key=jnp.zeros((2, 1, 2, 4))), VALUE, "key", r"\[2, 1, 1, 4\]"),
    bad("value-dim", lambda: update(empty(), 1, value=jnp.zeros((2, 1, 1, 8))), VALUE, "value", r"\[2, 1, 1, 4\]"),
    bad(
        "mixed-dtypes",
        lambda: update(empty(), 1, value=jnp.zeros((2, 1, 1, 4), jnp.bfloat16)),
        TYPE,
        "value must have the dtype of the cache, float32",
        r"bfloat16\[2, 1, 1, 4\]",
    ),
]

ANOTHER = "cache is not one of this model", "its empty_cache"
DECODER = [
    bad("no-tokens", lambda: MODEL(TOKENS[:, :0]), VALUE, "tokens must have at least one token", r"int32\[2, 0\]"),
    bad("fewer-layers", lambda: MODEL(TOKENS, cache=empty(layers=(None,))), VALUE, *ANOTHER),
    bad("more-layers", lambda: MODEL(TOKENS, cache=empty(layers=(None, 4, 4))), VALUE, *ANOTHER),
    bad("other-heads", lambda: MODEL(TOKENS, cache=empty(kv_heads=2)), VALUE, *ANOTHER),
    bad("other-dim", lambda: MODEL(TOKENS, cache=empty(dim=8)), VALUE, *ANOTHER),
    bad("other-dtype", lambda: MODEL(TOKENS, cache=empty(dtype=jnp.bfloat16)), VALUE, *ANOTHER),
    bad("a-ring-for-all", lambda: MODEL(TOKENS, cache=empty(layers=(4, 4))), VALUE, *ANOTHER),
    bad("no-cache", lambda: MODEL(TOKENS, cache=cast(Any, 3)), TYPE, "cache must be a Cache", "got 3"),
    bad("a-ring-for-blocks", lambda: BLOCKS(TOKENS, cache=empty()), VALUE, *ANOTHER),
    bad("a-shorter-ring", lambda: MODEL(TOKENS, cache=empty(layers=(None, 3))), VALUE, *ANOTHER),
    bad("layers-number", lambda: config(layers=3), TYPE, "layers must be a tuple with a DecoderLayer", "got 3"),
    bad("layers-of-another", lambda: config(layers=(3,)), TYPE, "layers must be a tuple", r"got \(3,\)"),
    bad("epsilon", lambda: config(epsilon=-1e-6), VALUE, "epsilon must be at least 0", "got -1e-06"),
    bad("epsilon-text", lambda: config(epsilon="x"), TYPE, "epsilon must be a Python float", "got 'x'"),
    bad("attention-cap", lambda: config(attention_cap=-1.0), VALUE, "attention_cap must be positive", "got -1.0"),
    bad("logits-cap", lambda: config(logits_cap=0), VALUE, "logits_cap must be positive", "got 0"),
    bad("attention-scale", lambda: config(attention_scale=1e300), VALUE, "attention_scale must be finite", "1e.300"),
    bad("embedding-scale", lambda: config(embedding_scale=10**400), VALUE, "embedding_scale must be finite"),
    bad("encoder-epsilon", lambda: EncoderConfig(16, 8, 16, 1, 2, epsilon=-1.0), VALUE, "epsilon must be at least 0"),
    bad("theta", lambda: Rope(theta=0), VALUE, "theta must be positive", "got 0"),
    bad("factor", lambda: Rope(factor=-1.0), VALUE, "factor must be positive", "got -1.0"),
    bad("scaling", lambda: Rope(scaling=cast(Any, 3)), TYPE, "scaling must be a Llama3Scaling or None", "got 3"),
    bad("rope", lambda: DecoderLayer(rope=cast(Any, 1e4)), TYPE, "rope must be a Rope or None", "got 10000.0"),
    bad("floor", lambda: DecoderLayer(temperature=(0, 0.1)), VALUE, "floor of temperature must be positive", "got 0"),
    bad("scale", lambda: DecoderLayer(temperature=(1, 1e300)), VALUE, "scale of temperature must be finite"),
    bad("temperature", lambda: DecoderLayer(temperature=cast(Any, 2.0)), TYPE, r"temperature must be \(floor, scale\)"),
    bad("llama-factor", lambda: Llama3Scaling(0, 1, 4, 8), VALUE, "factor must be positive", "got 0"),
    bad("llama-frequencies", lambda: Llama3Scaling(8, 4, 4, 8), VALUE, "high_frequency_factor must be above low"),
    bad("chunk", lambda: DecoderLayer(chunk=-1), VALUE, "chunk must be at least 1", "got -1"),
    bad("pad-of-a-batch", lambda: left_pad([[1]], pad=2**40), VALUE, "pad must fit an int32", "1099511627776"),
    bad("pad", lambda: run(pad=2**40), VALUE, "pad must fit an int32", "1099511627776"),
    bad("floats", lambda: MODEL(jnp.zeros((1, 3))), TYPE, "tokens must be integer", r"float32\[1, 3\]"),
    bad(
        "positions",
        lambda: MODEL(TOKENS, positions=TOKENS[:1]),
        VALUE,
        r"positions must have the shape of tokens, \[2, 3\]",
    ),
    bad(
        "positions-without-documents",
        lambda: MODEL(np.array([[1, 2, 3]]), positions=np.array([[0, 1, 0]])),
        VALUE,
        "mask is missing",
        "row 0 at token 2",
        r"mask=Segments\(ids\)",
    ),
    bad(
        "documents-without-positions",
        lambda: CHUNKED(np.array([[1, 2, 3]]), mask=Segments(np.array([[0, 0, 1]]))),
        VALUE,
        "positions is missing",
        "chunks",
        "start of each document",
    ),
    bad("positions-of-floats", lambda: MODEL(TOKENS, positions=jnp.ones((2, 3))), TYPE, "positions must be integer"),
    bad("rank-1", lambda: MODEL(jnp.zeros(3, int)), VALUE, "tokens must have rank 2", r"tokens\[None\]"),
    bad("valid", lambda: MODEL(TOKENS, VALID[:, :2]), VALUE, r"valid must be \[batch, q\] = \[2, 3\]", r"bool\[2, 2\]"),
    bad(
        "mask-and-cache",
        lambda: MODEL(TOKENS, cache=MODEL.empty_cache(2, 8), mask=Causal()),
        VALUE,
        "mask and positions need a call without a cache",
    ),
    bad(
        "rows",
        lambda: MODEL(TOKENS, cache=MODEL.empty_cache(3, 8)),
        VALUE,
        r"as many rows as the cache, 3, got int32\[2, 3\]",
    ),
    bad("valid-tokens", lambda: MODEL(TOKENS, TOKENS), VALUE, "valid must be bool, or of 0 and 1", "from 0 to 4"),
    bad(
        "prefix",
        lambda: MODEL(TOKENS, mask=Causal() | Prefix(2)),
        VALUE,
        r"got Causal\(\) \| Prefix\(2\), which would let a token attend to later ones",
        r"block_sequence_ids, as for a prefix by jnp.where\(jnp.arange\(length\) < prefix_length, 0, -1\)\[None\]",
    ),
    bad(
        "prefix-of-documents",
        lambda: MODEL(TOKENS, mask=zoo.document(zoo.prefix_lm(1), np.array([[0, 0, 1]]))),
        VALUE,
        "attend to later ones",
    ),
    bad(
        "images",
        lambda: MODEL(TOKENS, mask=zoo.gemma3(np.array([[-1, 0, 0]]), 2)),
        VALUE,
        "attend to later ones",
        "block_sequence_ids",
    ),
    bad("both-sides", lambda: MODEL(TOKENS, mask=Window(2, 2)), VALUE, r"got Window\(2, 2\)", "attend to later ones"),
    bad(
        "blocks-shape",
        lambda: MODEL(TOKENS, block_sequence_ids=TOKENS[:1]),
        VALUE,
        r"block_sequence_ids must have the shape of tokens, \[2, 3\]",
        r"int32\[1, 3\]",
    ),
    bad(
        "blocks-bool",
        lambda: MODEL(TOKENS, block_sequence_ids=cast(Any, VALID)),
        TYPE,
        "block_sequence_ids must be integer",
    ),
    bad(
        "blocks-large",
        lambda: MODEL(TOKENS, block_sequence_ids=TOKENS.astype(np.int64) + 2**40),
        VALUE,
        "block_sequence_ids must fit an int32",
    ),
    bad(
        "embeddings-dim",
        lambda: MODEL(TOKENS, embeddings=np.zeros((2, 3, 4), np.float32)),
        VALUE,
        r"embeddings must be \[batch, q, dim\] = \[2, 3, 8\]",
        r"float32\[2, 3, 4\]",
    ),
    bad("embeddings-int", lambda: MODEL(TOKENS, embeddings=cast(Any, TOKENS)), TYPE, "embeddings must be float"),
    bad("too-long", lambda: MODEL(TOKENS, cache=MODEL.empty_cache(2, 2)), VALUE, "room for 2 tokens", "got 3"),
]

CONFIG = [
    bad("no-size", lambda: config(hidden_dim=0), VALUE, "hidden_dim must be at least 1", "got 0"),
    bad("float-size", lambda: config(dim=8.0), TYPE, "dim must be a Python int", "8.0"),
    bad("heads", lambda: config(kv_heads=3), VALUE, "kv_heads must divide heads, got 3 and 2"),
    bad("odd", lambda: config(head_dim=3), VALUE, "head_dim must be even", "got 3"),
    bad("window", lambda: DecoderLayer(window=0), VALUE, "window must be at least 1", "got 0"),
    bad("chunk", lambda: DecoderLayer(chunk=True), TYPE, "chunk must be a Python int", "got True"),
    bad("no-layers", lambda: config(layers=()), VALUE, "layers must hold a DecoderLayer for each layer"),
    bad("activation", lambda: config(activation="relu"), VALUE, "must be one of silu, gelu_tanh, got 'relu'"),
    bad("qk-norm", lambda: config(qk_norm="rms"), VALUE, "qk_norm must be 'weighted', 'plain' or None, got 'rms'"),
]

GENERATE = [
    bad("no-tokens", lambda: run(np.zeros((2, 0), int), None), VALUE, "at least one token", r"int64\[2, 0\]"),
    bad("no-prompts", lambda: run(np.zeros((0, 3), int), None), VALUE, "at least one token"),
    bad("empty-row", lambda: run(valid=VALID & [[True], [False]]), VALUE, "none in row 1"),
    bad("floats", lambda: run(TOKENS.astype(np.float32)), TYPE, "tokens must be integer"),
    bad("valid-shape", lambda: run(valid=VALID[:1]), VALUE, r"valid must be \[batch, q\] = \[2, 3\]", r"bool\[1, 3\]"),
    bad("valid-dtype", lambda: run(valid=VALID.astype(np.float32)), TYPE, "valid must be bool or integer"),
    bad("valid-tokens", lambda: run(valid=TOKENS), VALUE, "valid must be bool, or of 0 and 1", "from 0 to 4"),
    bad("holes", lambda: run(valid=np.array([[True, False, True]] * 2)), VALUE, "before or after", "not between"),
    bad("no-token", lambda: run(TOKENS + 14), VALUE, "tokens must be from 0 to 15", "got 15 to 18"),
    bad("negative-token", lambda: run(TOKENS - 2), VALUE, "tokens must be from 0 to 15", "got -1 to 2"),
    bad("none-new", lambda: run(max_new_tokens=0), VALUE, "max_new_tokens must be at least 1"),
    bad("end-text", lambda: run(end=["a"]), TYPE, r"end\[0\] must be a Python int", "'a'"),
    bad("end-float", lambda: run(end=[2, 2.0]), TYPE, r"end\[1\] must be a Python int", "2.0"),
    bad("end-large", lambda: run(end=[2**40]), VALUE, r"end\[0\]", "fit an int32"),
    bad("end-negative", lambda: run(end=[-1]), VALUE, r"end\[0\] must be at least 0", "-1"),
    bad("key-int", lambda: run(temperature=1.0, key=3), TYPE, "key must be one key", r"jax.random.key\(0\)", "got 3"),
    bad("pad-float", lambda: left_pad([[1], [2, 3]], pad=cast(Any, 1.5)), TYPE, "pad must be a Python int", "1.5"),
    bad("short-cache", lambda: run(cache_length=3), VALUE, "cache_length must be at least 4", "3 tokens and 2 new"),
    bad("temperature", lambda: run(temperature=-1.0), VALUE, "temperature must be at least 0", "got -1.0"),
    bad("temperature-nan", lambda: run(temperature=float("nan")), VALUE, "temperature must be finite", "got nan"),
    bad("temperature-tiny", lambda: run(temperature=1e-38), VALUE, "temperature must be 0 or fit a float32", "1e-38"),
    bad("temperature-huge", lambda: run(temperature=1e300), VALUE, "temperature must be finite", r"got 1e\+300"),
    bad(
        "temperature-int", lambda: run(temperature=10**400), VALUE, "temperature must be finite", "more than 40 digits"
    ),
    bad("temperature-text", lambda: run(temperature="hot"), TYPE, "temperature must be a Python float", "'hot'"),
    bad("temperature-bool", lambda: run(temperature=True), TYPE, "temperature must be a Python float", "True"),
    bad("top-p-text", lambda: run(top_p="most"), TYPE, "top_p must be a Python float", "'most'"),
    bad("top-p-nan", lambda: run(top_p=float("nan")), VALUE, "top_p must be finite", "got nan"),
    bad("no-key", lambda: run(temperature=1.0), VALUE, "key is missing", r"jax\.random\.key"),
    bad("top-k", lambda: run(top_k=0), VALUE, "top_k must be at least 1"),
    bad("top-p", lambda: run(top_p=0.0), VALUE, "top_p must be above 0 and at most 1", "got 0.0"),
    bad("one-end", lambda: run(end=5), TYPE, "end must be a sequence of tokens, got 5", r"say end=\[5\]"),
    bad("one-numpy-end", lambda: run(end=np.int64(5)), TYPE, "end must be a sequence of tokens, got 5"),
    bad("empty-prompt", lambda: left_pad([[1], []]), VALUE, "prompt 1 is empty"),
    bad("no-prompt", lambda: left_pad([]), VALUE, "there is none"),
    bad("prompt-of-floats", lambda: left_pad([[1], np.array([2.0])]), TYPE, "prompt 1 is float64"),
    bad("prompt-of-int64", lambda: left_pad([[1], [2**32]]), VALUE, "prompt 1 must fit an int32", "4294967296"),
    bad("text", lambda: left_pad(["hello"]), TYPE, "sequences of ints, but prompt 0"),  # pyright: ignore[reportArgumentType]
]

T5_MODEL = T5(T5Config(16, dim=8, hidden_dim=8, layers=1, heads=2, head_dim=4), rngs=nnx.Rngs(0))


def answer_with(**changed: Any) -> Any:
    """An answer of T5 with a cache that is like its own, but for what is changed."""
    cache = empty(**{"layers": (None,), "kv_heads": 2, **changed})
    return T5_MODEL.read(TOKENS)(TOKENS, cache=cache)


ENCODER_DECODER = [
    bad("size", lambda: T5Config(16, 8, 8, layers=0, heads=2, head_dim=4), VALUE, "layers must be at least 1", "got 0"),
    bad(
        "few-buckets",
        lambda: T5Config(16, 8, 8, layers=1, heads=2, head_dim=4, buckets=2),
        VALUE,
        "buckets must be at least 4",
        "got 2",
    ),
    bad(
        "many-buckets",
        lambda: T5Config(16, 8, 8, layers=1, heads=2, head_dim=4, buckets=32, max_distance=16),
        VALUE,
        r"less than 2 \* max_distance, 32, got 32",
    ),
    bad("text", lambda: T5_MODEL.read(cast(Any, VALID)), TYPE, "tokens must be integer", r"bool\[2, 3\]"),
    bad("valid", lambda: T5_MODEL.encode(TOKENS, VALID[:, :2]), VALUE, r"valid must be .*\[2, 3\]", r"bool\[2, 2\]"),
    bad("valid-tokens", lambda: T5_MODEL.read(TOKENS, TOKENS), VALUE, "valid must be bool, or of 0 and 1"),
    bad(
        "answers",
        lambda: T5_MODEL.read(TOKENS)(TOKENS[:1]),
        VALUE,
        "tokens must have a row for each of the 2 texts",
        r"int32\[1, 3\]",
    ),
    bad(
        "answers-generated",
        lambda: generate(T5_MODEL.read(TOKENS), TOKENS[:1], max_new_tokens=2),
        VALUE,
        "tokens must have a row for each of the 2 texts",
    ),
    bad("a-cache-of-more-layers", lambda: answer_with(layers=(None, None)), VALUE, *ANOTHER),
    bad("a-cache-of-other-heads", lambda: answer_with(kv_heads=1), VALUE, *ANOTHER),
    bad("a-cache-of-another-dim", lambda: answer_with(dim=8), VALUE, *ANOTHER),
    bad("a-cache-of-another-dtype", lambda: answer_with(dtype=jnp.bfloat16), VALUE, *ANOTHER),
    bad("a-ring", lambda: answer_with(layers=(3,)), VALUE, *ANOTHER),
    bad("a-cache-of-other-rows", lambda: answer_with(batch=3), VALUE, "as many rows as the cache, 3, got"),
    bad("epsilon", lambda: dataclasses.replace(T5_MODEL.config, epsilon=-1.0), VALUE, "epsilon must be at least 0"),
    bad(
        "no-text", lambda: T5_MODEL.read(TOKENS[:, :0]), VALUE, "tokens must have at least one token", r"int32\[2, 0\]"
    ),
    bad("no-answer", lambda: T5_MODEL.read(TOKENS)(TOKENS[:, :0]), VALUE, "tokens must have at least one token"),
]

test_bad_encoder_decoders = refusals(ENCODER_DECODER)
test_bad_caches = refusals(CACHE)
test_bad_configs = refusals(CONFIG)
test_bad_texts = refusals(DECODER)
test_bad_prompts = refusals(GENERATE)


def test_what_is_no_token_is_nan_but_where_it_is_padding() -> None:
    tokens = np.where(VALID, TOKENS, 16)
    np.testing.assert_array_equal(MODEL(tokens, VALID)[0][VALID], MODEL(TOKENS, VALID)[0][VALID])
    for token in (16, -1):
        assert jnp.isnan(MODEL(jnp.array([[3, token]]))[0][0, 1]).all()


def test_padding_between_tokens_is_refused_or_nan_where_it_is_traced() -> None:
    holes = np.array([[True, False, True], [False, True, True]])
    with pytest.raises(ValueError, match="not between them"):
        MODEL(TOKENS, holes)
    graph, state = nnx.split(MODEL)
    logits = jax.jit(lambda valid: nnx.merge(graph, state)(TOKENS, valid)[0])(holes)
    assert jnp.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1, 1:], MODEL(TOKENS[1:, 1:])[0][0], atol=1e-5)


def test_the_last_logits_of_a_row_of_padding_are_nan() -> None:
    valid = np.array([[True, True, False], [False] * 3])
    logits, _ = MODEL(TOKENS, valid, last_only=True)
    np.testing.assert_allclose(logits[0, 0], MODEL(TOKENS[:1, :2])[0][0, -1], atol=1e-5)
    assert jnp.isnan(logits[1]).all()


def test_no_text_is_no_error() -> None:
    nothing, encoder = TOKENS[:0], Encoder(EncoderConfig(16, 8, 16, layers=1, heads=2), rngs=nnx.Rngs(0))
    assert MODEL(nothing, VALID[:0], last_only=True)[0].shape == (0, 1, 16)
    assert encoder(nothing).shape == T5_MODEL.encode(nothing, VALID[:0]).shape == (0, 3, 8)


def test_a_full_cache_takes_no_more() -> None:
    cache = MODEL(TOKENS, VALID, cache=MODEL.empty_cache(2, 3))[1]
    assert cache is not None
    with pytest.raises(ValueError, match=r"room for 3 tokens in a row, got 1 new ones, which would make 4"):
        MODEL(TOKENS[:, :1], cache=cache)


@pytest.mark.parametrize("description", [None, SlidingWindow(3)])
def test_a_step_of_flax_that_is_causal_never_sees_the_first_key_alone(description: Any) -> None:
    """Flax aligns a query with the first key, where it is asked for is_causal in a step of decoding."""
    attend = jaxmask.make_attention_fn(description)
    query, key = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 6, 2, 4))
    value = jnp.arange(6.0)[None, :, None, None] * jnp.ones((1, 6, 2, 4))
    assert (nnx.dot_product_attention(query, key, value, is_causal=True) == 0).all()  # the value of key 0
    with pytest.raises(ValueError, match="offset"):
        attend(query, key, value, is_causal=True)
    at_the_end = jaxmask.make_attention_fn(description, offset=5)
    wanted = 4.0 if description is not None else 2.5
    np.testing.assert_allclose(at_the_end(query, key, value, is_causal=True), wanted)


def test_decoding_through_the_cache_of_flax_is_the_whole_text() -> None:
    """With its own cache flax masks what is not yet there; a window is told the position, and compiled once."""
    window, x = SlidingWindow(3), jax.random.normal(jax.random.key(0), (2, 7, 8))
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    layer.attention_fn = jaxmask.make_attention_fn(window)
    wanted = layer(x)
    layer.init_cache((2, 7, 8))
    graph, state = nnx.split(layer)

    def decode(state: Any, x: Any) -> Any:
        layer = nnx.merge(graph, state)
        assert layer.cache_index is not None
        layer.attention_fn = jaxmask.make_attention_fn(window, offset=layer.cache_index[...])
        return layer(x, decode=True), nnx.state(layer)

    step: Any = jax.jit(decode)
    for at in range(7):
        out, state = step(state, x[:, at : at + 1])
        np.testing.assert_allclose(out[:, 0], wanted[:, at], rtol=1e-5, atol=1e-5)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "mask",
    [Window(1, None), SlidingWindow(2), SlidingWindow(1) | Prefix(1), Segments(np.array([[0, 0, 1]])), Prefix(2)],
)
def test_a_mask_restricts_a_causal_text(mask: Any) -> None:
    """Whatever it says of later tokens: a change of these changes nothing before them."""
    one, another = (MODEL(np.array([[3, 5, last]]), mask=mask)[0][:, :2] for last in (1, 9))
    np.testing.assert_array_equal(one, another)
    assert np.abs(MODEL(np.array([[3, 5, 1]]))[0] - MODEL(np.array([[3, 5, 1]]), mask=mask)[0]).max() > 1e-4


def test_a_prefix_attends_both_ways_where_blocks_say_so() -> None:
    """As the hint of the error has it; the first layer has no window, and so the last of the prefix is seen."""
    blocks = jnp.where(jnp.arange(3) < 2, 0, -1)[None]
    logits = [MODEL(np.array([[3, last, 1]]), block_sequence_ids=blocks)[0][:, 0] for last in (5, 9)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-4


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_a_mask_of_a_tokenizer_is_as_one_of_bools(to_array: Any, dtype: Any) -> None:
    valid = to_array(VALID.astype(dtype))
    np.testing.assert_array_equal(MODEL(TOKENS, valid)[0], MODEL(TOKENS, VALID)[0])
    cached, wanted = (MODEL(TOKENS, mask, cache=MODEL.empty_cache(2, 4), last_only=True) for mask in (valid, VALID))
    jax.tree.map(np.testing.assert_array_equal, cached, wanted)
    np.testing.assert_array_equal(run(valid=valid).tokens, run(valid=VALID).tokens)
    jax.tree.map(np.testing.assert_array_equal, empty().step(3, valid), empty().step(3, VALID))
    traced = jax.jit(lambda valid: MODEL(TOKENS, valid, cache=MODEL.empty_cache(2, 4))[0])
    np.testing.assert_array_equal(traced(valid), traced(VALID))


def test_tokens_in_place_of_their_mask_are_refused_where_they_are_known() -> None:
    for call in (lambda: MODEL(TOKENS, jnp.asarray(TOKENS)), lambda: run(valid=jnp.asarray(TOKENS))):
        with pytest.raises(ValueError, match=r"of 0 and 1, got int32\[2, 3\] from 0 to 4"):
            call()


@pytest.mark.breaks_annotations
def test_sizes_of_numpy_become_python_integers() -> None:
    sizes = {"vocab_size": 16, "dim": 8, "hidden_dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 4}
    layers = (DecoderLayer(window=np.int64(3), chunk=np.int32(5)),)  # pyright: ignore[reportArgumentType]
    config = DecoderConfig(**{name: np.int64(size) for name, size in sizes.items()}, layers=layers)  # pyright: ignore[reportArgumentType]
    assert {type(getattr(config, name)) for name in sizes} == {type(layers[0].window), type(layers[0].chunk)} == {int}
