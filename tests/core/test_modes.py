"""The public surface in every checking mode of JAX: no error, and the very same results."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmask
from jaxmask import Causal, Chunked, Dense, Padding, PerHead, Predicate, Prefix, Segments, SlidingWindow, Window, zoo
from jaxmask.flax import Cache
from jaxmask.flax.models.decoder import Decoder, DecoderConfig, DecoderLayer
from jaxmask.flax.models.encoder import Encoder, EncoderConfig
from jaxmask.hf import masking_utils

MODES: dict[str, Callable[[], Any]] = {
    "strict promotion of dtypes": partial(jax.numpy_dtype_promotion, "strict"),
    "no promotion of ranks": partial(jax.numpy_rank_promotion, "raise"),
    "NaN raises": partial(jax.debug_nans, True),
    "infinity raises": partial(jax.debug_infs, True),
    "leaked tracers raise": jax.checking_leaks,
    "checks of JAX itself": partial(jax.enable_checks, True),
    "no transfer": partial(jax.transfer_guard, "disallow"),
    "without jit": jax.disable_jit,
}

VALID = np.array([[False, True, True, True, True, True], [True, True, True, True, False, False]])
IDS = np.array([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]])
MASKS = {
    "causal": Causal(),
    "window": SlidingWindow(3),
    "traced window": SlidingWindow(jnp.asarray(3)),
    "both sides": Window(1, 2),
    "chunks": Chunked(2),
    "prefix": Prefix(jnp.array([3, 0])),
    "padding": Padding(jnp.asarray(VALID)),
    "padding of bytes": Padding(jnp.asarray(VALID, jnp.int8)),
    "segments": Segments(jnp.asarray(IDS, jnp.int32)),
    "segments of words": Segments(jnp.asarray(IDS, jnp.uint16)),
    "dense": Dense(jnp.ones((6, 6), bool)),
    "heads": PerHead([Causal(), Prefix(2)]),
    "predicate": Predicate(lambda b, h, q, kv: (q - kv) % 2 == 0),
    "many": Causal() & Segments(jnp.asarray(IDS, jnp.int32)) & Padding(jnp.asarray(VALID)) | Prefix(jnp.array([2, 1])),
    "zoo": zoo.longformer(2, jnp.asarray(VALID)) & zoo.document(Prefix(1), jnp.asarray(IDS, jnp.int32)),
}


def random(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32).astype(dtype)


ZEROS = jnp.zeros((1, 128, 1, 64))
X, HALF, LONG = random(2, 6, 2, 8), random(2, 6, 2, 8, dtype=jnp.bfloat16), random(1, 150, 2, 8)
SINKS, KEY = random(2), jax.random.key(0)
EMBEDS, HF_VALID = random(2, 6, 4), jnp.asarray(VALID)
DECODER = Decoder(
    DecoderConfig(
        vocab_size=11,
        dim=8,
        hidden_dim=8,
        heads=2,
        kv_heads=1,
        head_dim=4,
        layers=(DecoderLayer(), DecoderLayer(window=3)),
    ),
    rngs=nnx.Rngs(0),
)
ENCODER = Encoder(EncoderConfig(vocab_size=11, dim=8, hidden_dim=8, layers=1, heads=2, max_length=6), rngs=nnx.Rngs(0))
TOKENS = jnp.asarray(IDS, jnp.int32)


def read() -> Any:
    return [(mask.dense(6, 6), mask.bias(6, 6), mask.tiles(6, 6, block=4).states) for mask in MASKS.values()]


def attended(implementation: Any) -> Any:
    def loss(x: jax.Array, mask: jaxmask.Mask) -> Any:
        out: Any = jaxmask.attention(x, x, x, mask, implementation=implementation)
        return out.sum(), out

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return [gradient(X, MASKS[name]) for name in ("traced window", "padding", "segments", "heads", "many")]


def linear(slopes: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return slopes[h] * (kv - q).astype(jnp.float32)


def with_everything(implementation: Any, x: jax.Array) -> Any:
    def loss(x: jax.Array, sinks: jax.Array) -> Any:
        parts = jaxmask.attention(
            *(x, x, x, Causal()),
            # An array in a closure would be a tracer that the cache of a program holds.
            bias=jax.tree_util.Partial(linear, sinks),
            sinks=sinks,
            logits_soft_cap=3.0,
            dropout_rate=0.25,
            dropout_rng=KEY,
            return_residual=True,
            implementation=implementation,
        )
        out, lse = jaxmask.merge_attention([parts, parts])
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, SINKS)


@jax.jit
def cached(x: jax.Array) -> Any:
    cache, outs = Cache.empty(2, 8, layers=[None, 3], kv_heads=2, dim=8), []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        step = cache.step(end - start)
        new = x[:, start:end]
        results = [layer.attend(step, new, new, new, Causal()) for layer in cache.layers]
        outs += [out for out, _ in results]
        cache = step.end([layer for _, layer in results])
    return outs


@jax.jit
def as_transformers(valid: jax.Array) -> Any:
    converter = jaxmask.AttentionMaskConverter(True, sliding_window=3)
    of_integers = valid.astype(jnp.int32)
    config = SimpleNamespace(_attn_implementation="eager", sliding_window=3)
    return (
        converter.to_4d(of_integers, 6, dtype=jnp.float32, key_value_length=6),
        jaxmask.prepare_4d_causal_attention_mask_for_sdpa(of_integers, (2, 6), EMBEDS, 0),
        masking_utils.sdpa_mask(2, 6, 6, attention_mask=valid, allow_is_causal_skip=False),
        masking_utils.create_sliding_window_causal_mask(config, EMBEDS, valid, None, None),
    )


SURFACE: dict[str, Callable[[], Any]] = {
    "readings of every mask": read,
    "xla": partial(attended, "xla"),
    "blocked": partial(attended, "blocked"),
    **{
        f"{implementation}, all arguments, {x.dtype}": partial(with_everything, implementation, x)
        for implementation in ("xla", "blocked")
        for x in (X, HALF)
    },
    "long": lambda: jaxmask.attention(LONG, LONG, LONG, SlidingWindow(7)),
    "encoder": lambda: nnx.jit(lambda model, tokens, valid: model(tokens, valid))(ENCODER, TOKENS, HF_VALID),
    "splash": lambda: jax.jit(partial(jaxmask.attention, mask=Causal(), implementation="splash"))(ZEROS, ZEROS, ZEROS),
    "cache": lambda: cached(X),
    "decoder": lambda: nnx.jit(lambda model, tokens: model(tokens)[0])(DECODER, TOKENS),
    "Transformers": lambda: as_transformers(HF_VALID),
}
_EXPECTED: dict[str, Any] = {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SURFACE)
def test_the_surface_in_every_mode(name: str, mode: str) -> None:
    call = SURFACE[name]
    if name not in _EXPECTED:
        _EXPECTED[name] = jax.device_get(call())
    # Else a program that was traced without the mode would answer.
    jax.clear_caches()
    with MODES[mode]():
        found = call()
        jax.block_until_ready(found)
    for x, expected in zip(jax.tree.leaves(found), jax.tree.leaves(_EXPECTED[name]), strict=True):
        if expected.dtype == bool or expected.dtype == np.int8:
            np.testing.assert_array_equal(x, expected)
        else:
            x, expected = (np.asarray(array, np.float32) for array in (x, expected))
            np.testing.assert_allclose(x, expected, rtol=0, atol=0.05 if "bfloat16" in name else 1e-5)


def test_the_surface_in_threads_at_once() -> None:
    expected = {name: jax.device_get(call()) for name, call in SURFACE.items()}
    jax.clear_caches()
    with ThreadPoolExecutor(4) as threads:
        found = dict(zip(SURFACE, threads.map(lambda call: jax.device_get(call()), SURFACE.values()), strict=True))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
