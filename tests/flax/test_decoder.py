"""Tiny random models of the Llama family against Transformers: all at once, in chunks, and token by token."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jaxmask import Segments
from torch_compat.models import load

PROMPT, STEPS, WINDOW = 12, 16, 5
LENGTH = PROMPT + STEPS
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # so that positions and masks matter
}
MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
QWEN: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": True}),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "Mistral": ("Mistral", {"sliding_window": WINDOW}),
    "Mistral without a window": ("Mistral", {"sliding_window": None}),
    "Gemma": ("Gemma", {}),
    "Gemma-2": ("Gemma2", MIXED | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "Gemma-3": ("Gemma3Text", MIXED),
    "Gemma-3 with longer positions": ("Gemma3Text", MIXED | {"rope_parameters": LINEAR}),
    "Qwen2": ("Qwen2", MIXED | QWEN),
    "Qwen3": ("Qwen3", MIXED | QWEN),
    "Llama-4": ("Llama4Text", {"attention_chunk_size": WINDOW, "moe_layers": [], "no_rope_layers": [1, 0, 1]}),
}
CLASSES = {"Gemma3Text": "Gemma3", "Llama4Text": "Llama4"}


def make(name: str, **more: Any) -> Any:
    """The model of Transformers, with random weights, biases and norms included."""
    kind, arguments = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**(SIZES | arguments | more))
        model = getattr(transformers, f"{CLASSES.get(kind, kind)}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which of them are valid: three rows, two of them padded on the left."""
    tokens = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (3, LENGTH))
    valid = np.arange(LENGTH) >= np.array([[0], [3], [PROMPT - 1]])
    return np.where(valid, tokens, 0), valid


def of_transformers(model: Any, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The logits of Transformers, without a cache, with the positions that its ``generate`` gives."""
    positions = np.maximum(valid.cumsum(1) - 1, 0)
    with torch.no_grad():
        return model(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(valid), position_ids=torch.from_numpy(positions)
        ).logits.numpy()


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of Transformers, and ours with its weights."""
    model = make(request.param)
    return model, load(model)


def step_of(model: Any) -> Any:
    graph, state = nnx.split(model)
    return jax.jit(lambda cache, tokens, valid=None: nnx.merge(graph, state)(tokens, valid, cache=cache))


def test_a_padded_batch_has_the_logits_of_transformers(pair: tuple[Any, Any]) -> None:
    tokens, valid = batch()
    logits, _ = pair[1](tokens, valid)
    np.testing.assert_allclose(logits[valid], of_transformers(pair[0], tokens, valid)[valid], rtol=0, atol=1e-5)


def test_chunks_and_then_steps_have_the_logits_of_transformers(pair: tuple[Any, Any]) -> None:
    tokens, valid = batch()
    wanted = of_transformers(pair[0], tokens, valid)
    step, cache = step_of(pair[1]), pair[1].empty_cache(3, LENGTH)
    actual: list[Any] = []
    for start in range(0, PROMPT, 4):
        part = slice(start, start + 4)
        logits, cache = step(cache, tokens[:, part], valid[:, part])
        actual.append(logits)
    for at in range(PROMPT, LENGTH):
        logits, cache = step(cache, tokens[:, at : at + 1])
        actual.append(logits)
    np.testing.assert_allclose(np.concatenate(actual, 1)[valid], wanted[valid], rtol=0, atol=1e-5)


def test_padding_on_the_right_changes_nothing(pair: tuple[Any, Any]) -> None:
    """A prompt padded on the right goes on where its tokens end."""
    tokens, _ = batch()
    whole, _ = pair[1](tokens[:1])
    step, cache = step_of(pair[1]), pair[1].empty_cache(1, LENGTH)
    padded = np.pad(tokens[:1, :5], ((0, 0), (0, PROMPT - 5)))
    logits, cache = step(cache, padded, np.arange(PROMPT)[None] < 5)
    np.testing.assert_allclose(logits[:, :5], whole[:, :5], rtol=0, atol=1e-5)
    for at in range(5, 9):
        logits, cache = step(cache, tokens[:1, at : at + 1])
        np.testing.assert_allclose(logits[:, 0], whole[:, at], rtol=0, atol=1e-5)


def test_windows_and_chunks_matter(pair: tuple[Any, Any]) -> None:
    """A model whose layers look back without end gives other logits; else the tests above would say nothing."""
    config = pair[1].config
    if all(layer.looks_back is None for layer in config.layers):
        assert all(layer.window is None and layer.chunk is None for layer in config.layers)
        return
    tokens, _ = batch()
    graph, state = nnx.split(load(pair[0]))
    free = nnx.merge(graph, state)
    for block in free.blocks:
        object.__setattr__(block.attention.layer, "window", None)
        object.__setattr__(block.attention.layer, "chunk", None)
    assert np.abs(free(tokens[:1])[0] - pair[1](tokens[:1])[0])[:, WINDOW:].max() > 1e-3


def test_the_temperature_of_llama_4_follows_the_position() -> None:
    model = make("Llama-4", floor_scale=4)
    tokens, _ = batch()
    logits, _ = load(model)(tokens[:1])
    wanted = of_transformers(model, tokens[:1], np.ones_like(tokens[:1], bool))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Gemma-2", "Llama-4"])
def test_half_precision_keeps_its_dtype(name: str) -> None:
    model = load(make(name), dtype=jnp.bfloat16)
    logits, cache = model(batch()[0], cache=model.empty_cache(3, LENGTH))
    assert logits.dtype == model(batch()[0])[0].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"bfloat16"}


def test_the_scales_of_norms_are_not_rounded_to_half_precision() -> None:
    theirs: Any = make("Gemma-2")
    scale = load(theirs, dtype=jnp.bfloat16).blocks[0].attention_norm.scale[...]
    np.testing.assert_array_equal(scale, 1 + theirs.model.layers[0].input_layernorm.weight.detach())


@pytest.mark.parametrize("name", ["Gemma-2", "Llama-4"])
def test_a_checkpoint_of_half_precision_is_read_without_rounding(name: str, tmp_path: Path) -> None:
    half, model = make(name).bfloat16(), make(name)
    half.save_pretrained(tmp_path)
    model.load_state_dict({key: weight.float() for key, weight in half.state_dict().items()})
    tokens, valid = batch()
    logits = load(tmp_path)(tokens, valid)[0]
    np.testing.assert_allclose(logits[valid], of_transformers(model, tokens, valid)[valid], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Mistral", "Llama-4"])
def test_packed_documents_are_as_each_alone(name: str) -> None:
    model = load(make(name))
    tokens, lengths = batch()[0][:1], (13, 15)
    positions = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    ids = np.repeat([0, 1], lengths)[None].astype(np.int32)
    packed = model(tokens, mask=Segments(ids), positions=positions)[0]
    for part in (slice(0, 13), slice(13, 28)):
        np.testing.assert_allclose(packed[:, part], model(tokens[:, part])[0], rtol=0, atol=1e-5)


def test_gradients_of_llama_4_are_finite_where_there_is_padding() -> None:
    graph, state = nnx.split(load(make("Llama-4")))
    tokens, valid = batch()

    def loss(state: Any) -> Any:
        return jnp.where(valid[..., None], nnx.merge(graph, state)(tokens, valid)[0], 0).sum()

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(state)))
