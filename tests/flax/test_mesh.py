"""Models and caches whose examples and heads are sharded over a mesh: as on one device, and nothing is sent."""

from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmask import Causal, Segments, SlidingWindow
from jaxmask.flax import (
    T5,
    Cache,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    Encoder,
    EncoderConfig,
    T5Config,
    axis_rules,
    generate,
    left_pad,
)
from jaxmask.flax.models.axes import NAMES
from tests.helpers.bad import bad, refusals
from tests.helpers.programs import collectives, mesh_of
from tests.kernels.test_attention import random

BATCH, PROMPT, ROOM, HEADS, KV_HEADS, DIM, WINDOW = 4, 140, 200, 4, 2, 8, 30
SPEC = P("data", None, "model", None)
MODES = pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto], ids=str)
AXES: dict[str, Any] = dict.fromkeys(("vocab", "heads", "kv_heads", "hidden"), "tensor")
RULES = axis_rules(batch="data", **AXES)
# SmolLM2 has 9 heads and 3 of keys.
SHAPES = pytest.mark.parametrize(("heads", "kv_heads", "shape"), [(4, 2, (2, 2)), (9, 3, (2, 3))], ids=str)


def decoder(heads: int = 4, kv_heads: int = 2, **more: Any) -> Decoder:
    sizes: dict[str, Any] = {
        "vocab_size": 60,
        "dim": 24,
        "hidden_dim": 48,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": DIM,
    }
    layers = DecoderLayer(window=5), DecoderLayer()
    return Decoder(DecoderConfig(layers=layers, **{**sizes, **more}), rngs=nnx.Rngs(0))


def encoder() -> Encoder:
    return Encoder(EncoderConfig(60, 24, 48, layers=2, heads=4, max_length=16), rngs=nnx.Rngs(0))


def t5() -> T5:
    return T5(T5Config(60, dim=24, hidden_dim=48, layers=2, heads=4, head_dim=DIM), rngs=nnx.Rngs(0))


def on_mesh(mesh: Any, rules: Any = RULES) -> Any:
    """The context in which models are on a mesh."""
    stack = ExitStack()
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(nnx.logical_axis_rules(rules))
    return stack


PROMPTS, VALID = left_pad([[5, 6, 7, 8, 9, 1, 2, 3], [4, 3], [2, 8, 5, 1, 9, 9], [7]])


@MODES
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


EVERY: dict[str, Any] = {
    "qkv_bias": True,
    "out_bias": True,
    "hidden_bias": True,
    "qk_norm": "weighted",
    "post_norm": True,
}


@pytest.mark.parametrize("make", [decoder, lambda: decoder(tied=False, **EVERY), encoder, t5])
def test_each_dimension_of_each_parameter_has_a_name(make: Any) -> None:
    parameters = nnx.to_flat_state(nnx.state(make(), nnx.Param))
    for path, parameter in parameters:
        names = parameter.get_metadata("out_sharding")
        assert len(names) == parameter.ndim, path
        assert set(names) <= set(NAMES), path


@MODES
@pytest.mark.parametrize("make", [decoder, encoder, t5])
def test_a_model_made_under_rules_is_the_same_and_sharded(make: Any, mode: AxisType) -> None:
    with on_mesh(mesh_of(mode, (2, 2), ("data", "tensor"))):
        found = nnx.state(make())
        specs = nnx.to_flat_state(nnx.get_partition_spec(found))
    jax.tree.map(np.testing.assert_array_equal, found, nnx.state(make()))
    for (path, parameter), (_, spec) in zip(nnx.to_flat_state(found), specs, strict=True):
        assert parameter.sharding.spec == spec.get_value(), path
        is_divided = set(parameter.get_metadata("out_sharding")) & set(AXES)
        assert parameter.addressable_shards[0].data.size * (2 if is_divided else 1) == parameter.size, path


@MODES
@SHAPES
def test_a_decoder_over_data_and_tensor_generates_the_same_tokens(
    heads: int, kv_heads: int, shape: tuple[int, int], mode: AxisType
) -> None:
    expected = generate(decoder(heads, kv_heads), PROMPTS, VALID, max_new_tokens=6)
    with on_mesh(mesh_of(mode, shape, ("data", "tensor"))):
        found = generate(decoder(heads, kv_heads), PROMPTS, VALID, max_new_tokens=6)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@MODES
def test_a_decoder_over_data_and_the_slots_of_its_cache_generates_the_same_tokens(mode: AxisType) -> None:
    expected = generate(decoder(), PROMPTS, VALID, max_new_tokens=6)
    with on_mesh(mesh_of(mode, (2, 4), ("data", "seq")), axis_rules(batch="data", slots="seq")):
        model = decoder()
        cache = model.empty_cache(BATCH, 24)
        assert [layer.key.addressable_shards[0].data.shape[1] for layer in cache.layers] == [5, 24 // 4]
        found = generate(model, PROMPTS, VALID, max_new_tokens=6)  # 13 slots, and 3 more that they divide
        step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
        program = step.lower(model, jnp.ones((BATCH, 1), int), cache).compile()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert set(collectives(program)) == {"all-reduce"}


@MODES
@SHAPES
def test_a_decoder_reduces_what_shards_have_and_sends_nothing_else(
    heads: int, kv_heads: int, shape: tuple[int, int], mode: AxisType
) -> None:
    with on_mesh(mesh_of(mode, shape, ("data", "tensor"))):
        model = decoder(heads, kv_heads, tied=False, **EVERY)
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, cache, tokens, valid: nnx.merge(graph, state)(tokens, valid, cache=cache))
        cache = model.empty_cache(BATCH, 16)
        assert {x.addressable_shards[0].data.shape[2] for x in jax.tree.leaves(cache.layers)} == {kv_heads // shape[1]}
        programs = [
            run.lower(state, None, PROMPTS, jnp.asarray(VALID)),
            run.lower(state, cache, PROMPTS, jnp.asarray(VALID)),
            run.lower(state, cache, jnp.ones((BATCH, 1), int), None),
        ]
        for program in programs:
            compiled = program.compile()
            # One for the embeddings, and one each for attention and the feed-forward of a layer.
            assert collectives(compiled) == ["all-reduce"] * (1 + 2 * len(model.blocks))
            assert compiled.output_shardings[0].spec == P("data", None, "tensor")


@MODES
@pytest.mark.parametrize("how", [{"temperature": 1.0, "top_p": 0.9}, {"temperature": 2.0, "top_k": 9}], ids=str)
def test_tokens_are_drawn_on_a_mesh_as_on_one_device(how: Any, mode: AxisType) -> None:
    how = {**how, "max_new_tokens": 6, "key": jax.random.key(0), "end": [5, 9]}
    expected = generate(decoder(), PROMPTS, VALID, **how)
    with on_mesh(mesh_of(mode, (2, 2), ("data", "tensor"))):
        found = generate(decoder(), PROMPTS, VALID, **how)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@MODES
def test_an_encoder_over_data_and_tensor(mode: AxisType) -> None:
    expected = encoder()(PROMPTS, VALID)
    with on_mesh(mesh_of(mode, (2, 2), ("data", "tensor"))):
        graph, state = nnx.split(encoder())
        run = jax.jit(lambda state, tokens, valid: nnx.merge(graph, state)(tokens, valid))
        compiled = run.lower(state, PROMPTS, VALID).compile()
        assert collectives(compiled) == ["all-reduce"] * (1 + 2 * 2)
        np.testing.assert_allclose(compiled(state, PROMPTS, VALID), expected, rtol=1e-4, atol=1e-5)


@MODES
def test_t5_over_data_and_tensor_answers_the_same(mode: AxisType) -> None:
    begin = jnp.zeros((BATCH, 1), int)
    expected = generate(t5().read(PROMPTS, VALID), begin, max_new_tokens=6)
    with on_mesh(mesh_of(mode, (2, 2), ("data", "tensor"))):
        answers = t5().read(PROMPTS, VALID)
        found = generate(answers, begin, max_new_tokens=6)
        graph, state = nnx.split(answers)
        run = jax.jit(lambda state, cache, tokens: nnx.merge(graph, state)(tokens, cache=cache))
        compiled = run.lower(state, answers.empty_cache(BATCH, 8), begin).compile()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # A layer attends twice.
    assert collectives(compiled) == ["all-reduce"] * (1 + 3 * 2)


@pytest.mark.parametrize("rules", [RULES, axis_rules(dim="data", **AXES)], ids=["tensor", "dim-over-data"])
def test_types_alone_say_it_on_a_mesh_with_explicit_axes(rules: Any) -> None:
    model, mesh = decoder(**EVERY), mesh_of(AxisType.Explicit, (2, 2), ("data", "tensor"))
    expected = generate(model, PROMPTS, max_new_tokens=6)
    with nnx.logical_axis_rules(rules):
        nnx.update(model, jax.device_put(nnx.state(model), nnx.get_named_sharding(nnx.state(model), mesh)))
    with jax.set_mesh(mesh):
        found = generate(model, jax.device_put(PROMPTS, NamedSharding(mesh, P("data"))), max_new_tokens=6)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_rules_on_a_mesh_of_both_kinds_of_axes_are_refused() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit, AxisType.Auto))
    with on_mesh(mesh), pytest.raises(ValueError, match=r"all explicit or all automatic, got .*'tensor': Auto"):
        decoder()


@MODES
@pytest.mark.parametrize("last_only", [False, True])
def test_tokens_that_were_made_elsewhere_are_put_where_the_rules_say(last_only: bool, mode: AxisType) -> None:
    tokens, model = jnp.asarray(PROMPTS), decoder()
    expected = model(tokens, VALID, last_only=last_only)[0]
    with on_mesh(mesh_of(mode, (2, 2), ("data", "seq")), axis_rules(batch="data", length="seq")):
        found = model(tokens, VALID, last_only=last_only)[0]
    assert not found.is_fully_replicated
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_in_a_shard_map_of_the_user_the_rules_leave_its_axes_out() -> None:
    mesh, model = mesh_of(AxisType.Auto, (2, 2), ("data", "tensor")), decoder()
    expected = model(PROMPTS)[0]
    with on_mesh(mesh):
        run = jax.shard_map(
            lambda tokens: model(tokens)[0], in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
        )
        found = jax.jit(run)(PROMPTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@MODES
def test_weights_over_the_data_axis_are_gathered(mode: AxisType) -> None:
    expected = decoder(**EVERY)(PROMPTS, VALID)[0]
    rules = axis_rules(batch="data", dim="data", **AXES)
    mesh = mesh_of(mode, (2, 2), ("data", "tensor"))
    with on_mesh(mesh, rules):
        model = decoder(**EVERY)
        assert model.blocks[0].feed_forward.down.weight[...].sharding == NamedSharding(mesh, P("data", "tensor"))
        found = model(PROMPTS, VALID)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@MODES
def test_a_step_of_training_on_packed_texts_over_data_context_and_tensor(mode: AxisType) -> None:
    generator, length = np.random.default_rng(0), 16
    tokens, targets = generator.integers(0, 60, (2, BATCH, length))
    begins = generator.random((BATCH, length)) < 0.2
    ids = begins.cumsum(1)
    first = np.maximum.accumulate(np.where(begins, np.arange(length), 0), 1)
    arrays = tokens, targets, ids, np.arange(length) - first

    def gradients() -> Any:
        graph, state = nnx.split(decoder(), nnx.Param)

        @jax.jit
        @jax.value_and_grad
        def loss(state: Any, tokens: Any, targets: Any, ids: Any, positions: Any) -> Any:
            logits, _ = nnx.merge(graph, state)(tokens, mask=Segments(ids), positions=positions)
            return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, 60)).sum() / targets.size

        return loss(state, *arrays)

    expected = gradients()
    with on_mesh(
        mesh_of(mode, (2, 2, 2), ("data", "context", "tensor")), axis_rules(batch="data", length="context", **AXES)
    ):
        found = gradients()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)


@MODES
def test_heads_are_divided_that_share_one_head_of_keys(mode: AxisType) -> None:
    expected = decoder(4, 1)(PROMPTS, VALID)[0]
    with on_mesh(mesh_of(mode, (2, 2), ("data", "tensor")), axis_rules(batch="data", heads="tensor", hidden="tensor")):
        found = decoder(4, 1)(PROMPTS, VALID)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_on_a_mesh_is_called_under_other_rules_anew() -> None:
    model, how = decoder(), dict[str, Any](max_new_tokens=2)
    with jax.set_mesh(mesh_of(AxisType.Auto, (2, 2), ("data", "tensor"))):
        expected = generate(model, PROMPTS, VALID, **how)
        with nnx.logical_axis_rules(RULES):
            found = generate(model, PROMPTS, VALID, **how)
    assert (found.tokens.is_fully_replicated, expected.tokens.is_fully_replicated) == (False, True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


test_rules = refusals(
    [
        bad("name", lambda: axis_rules(head="tensor"), ValueError, "names of dimensions are batch, length", "got head"),
        bad("whole", lambda: axis_rules(gate_up="tensor"), ValueError, "gate_up cannot be divided", "leave it out"),
        bad("number", lambda: axis_rules(heads=2), TypeError, "heads must be an axis of the mesh", "got 2"),  # pyright: ignore[reportArgumentType]
    ]
)


@pytest.mark.parametrize(
    ("rules", "call", "says"),
    [
        (axis_rules(heads="model"), decoder, r"the rules put heads over \['model'\], but .* are \['data', 'tensor'\]"),
        (
            RULES,
            lambda: decoder(9, 3),
            "kv_heads must divide over 2 devices, those of 'tensor', .* got 3; leave kv_heads",
        ),
        (
            axis_rules(vocab=("data", "tensor")),
            lambda: decoder(4, 2, vocab_size=62),
            "vocab must .* 4 devices, .* got 62",
        ),
        (RULES, lambda: decoder()(PROMPTS[:3]), "batch must divide over 2 devices, .* got 3"),
        (RULES, lambda: decoder().empty_cache(3, 8), "batch must divide over 2 devices, .* got 3"),
        (
            axis_rules(slots="tensor", **AXES),
            lambda: decoder().empty_cache(2, 8),
            "both slots and kv_heads over 'tensor'",
        ),
        (axis_rules(batch=("data", "data")), lambda: decoder()(PROMPTS), "both batch and batch over 'data'"),
        (axis_rules(length="data"), lambda: encoder()(PROMPTS[:, :5]), "length must divide over 2 devices, .* got 5"),
    ],
)
def test_what_does_not_divide_is_named(rules: Any, call: Any, says: str) -> None:
    with on_mesh(mesh_of(AxisType.Explicit, (2, 2), ("data", "tensor")), rules), pytest.raises(ValueError, match=says):
        call()
