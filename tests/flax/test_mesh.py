"""Models and caches whose examples and heads are sharded over a mesh: as on one device, and nothing is sent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmask import Causal, SlidingWindow
from jaxmask.flax import Cache
from jaxmask.flax.models.decoder import Decoder, DecoderConfig, DecoderLayer
from tests.helpers.programs import collectives, mesh_of
from tests.kernels.test_attention import random

BATCH, PROMPT, ROOM, HEADS, KV_HEADS, DIM, WINDOW = 4, 140, 200, 4, 2, 8, 30
SPEC = P("data", None, "model", None)


@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_decoding_on_a_long_cache_sends_nothing(mode: AxisType) -> None:
    mesh = mesh_of(mode)
    sharding = NamedSharding(mesh, SPEC) if mode == AxisType.Auto else None

    def run(cache: Cache, query: Any, new: Any, sharding: Any) -> tuple[Any, Cache]:
        step, layers = cache.step(query.shape[1]), []
        for layer, mask in zip(cache.layers, (Causal(), SlidingWindow(WINDOW)), strict=True):
            query, layer = layer.attend(step, query, new, new, mask, sharding=sharding)
            layers.append(layer)
        return query, step.end(layers)

    def put(x: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, SPEC if x.ndim == 4 else P("data")))

    cache = Cache.empty(BATCH, ROOM, layers=[None, WINDOW], kv_heads=KV_HEADS, dim=DIM)
    sharded, decode = jax.tree.map(put, cache), jax.jit(run, static_argnums=3)
    for seed, count in enumerate([PROMPT, 1, 1]):
        query, new = (random(seed, BATCH, count, heads, DIM) for heads in (HEADS, KV_HEADS))
        expected, cache = run(cache, query, new, None)
        program = decode.lower(sharded, put(query), put(new), sharding).compile()
        assert collectives(program) == []
        found, sharded = program(sharded, put(query), put(new))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_follows_its_tokens_and_sends_gradients_alone() -> None:
    layers = DecoderLayer(window=WINDOW), DecoderLayer()
    model = Decoder(DecoderConfig(64, 32, 48, HEADS, KV_HEADS, DIM, layers), rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (BATCH, PROMPT)))

    def loss(state: Any, tokens: Any) -> Any:
        logits, _ = nnx.merge(graph, state)(tokens)
        return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(tokens, 64)).sum() / tokens.size

    mesh = mesh_of(AxisType.Explicit)
    arguments = jax.device_put(state, NamedSharding(mesh, P())), jax.device_put(tokens, NamedSharding(mesh, P("data")))
    step = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    assert set(collectives(step)) == {"all-reduce"}
    found, expected = step(*arguments), jax.jit(jax.value_and_grad(loss))(state, tokens)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)
