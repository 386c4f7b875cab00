"""Generation: each prompt as if alone, sampling as Transformers has it, one compilation, ends and callbacks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxmask.flax import Decoder, DecoderConfig, DecoderLayer, generate, left_pad
from jaxmask.flax.models.generate import decode, likely, prefill
from tests.helpers.tiny import tiny_llama
from torch_compat.models import load

VOCAB, NEW = 64, 10
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Decoder]:
    """A tiny Llama of Transformers, and ours with its weights."""
    model = tiny_llama(vocab_size=VOCAB, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
    return model, load(model)


@pytest.fixture(scope="module")
def model(models: tuple[Any, Decoder]) -> Decoder:
    return models[1]


def of_transformers(model: Any, prompts: list[list[int]], **options: Any) -> np.ndarray:
    tokens, valid = left_pad(prompts)
    return model.generate(
        torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(valid),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **options,
    )[:, tokens.shape[1] :].numpy()


def test_a_padded_batch_gives_the_tokens_of_transformers(models: tuple[Any, Decoder]) -> None:
    actual = generate(models[1], *left_pad(PROMPTS), max_new_tokens=NEW)
    np.testing.assert_array_equal(actual.tokens, of_transformers(models[0], PROMPTS))
    assert actual.lengths.tolist() == [NEW] * 3


def test_a_batch_gives_the_tokens_of_each_prompt_alone(model: Decoder) -> None:
    together = generate(model, *left_pad(PROMPTS), max_new_tokens=NEW).tokens
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = generate(model, np.array([prompt]), max_new_tokens=NEW).tokens[0]
        np.testing.assert_array_equal(row, alone)


def test_padding_on_the_right_gives_the_same_tokens(model: Decoder) -> None:
    width = max(map(len, PROMPTS))
    tokens = np.array([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS])
    valid = np.arange(width) < np.array([[len(prompt)] for prompt in PROMPTS])
    actual = generate(model, tokens, valid, max_new_tokens=NEW).tokens
    np.testing.assert_array_equal(actual, generate(model, *left_pad(PROMPTS), max_new_tokens=NEW).tokens)


def test_a_row_ends_at_its_end_and_the_others_go_on(models: tuple[Any, Decoder]) -> None:
    free = np.asarray(generate(models[1], *left_pad(PROMPTS), max_new_tokens=NEW).tokens)
    ends = [int(free[0, 2]), int(free[1, 5])]
    actual = generate(models[1], *left_pad(PROMPTS), max_new_tokens=NEW, end=ends)
    wanted = of_transformers(models[0], PROMPTS, eos_token_id=ends)
    np.testing.assert_array_equal(actual.tokens[:, : wanted.shape[1]], wanted)
    assert (np.asarray(actual.tokens)[:, wanted.shape[1] :] == 0).all()
    for row, length in zip(free, actual.lengths.tolist(), strict=True):
        is_end = np.isin(row, ends)
        assert length == (is_end.argmax() + 1 if is_end.any() else NEW)


def test_on_tokens_is_told_every_token_in_order(model: Decoder) -> None:
    told: list[tuple[Any, Any]] = []
    free = np.asarray(generate(model, *left_pad(PROMPTS), max_new_tokens=NEW).tokens)
    actual = generate(
        model,
        *left_pad(PROMPTS),
        max_new_tokens=NEW,
        end=[int(free[0, 2])],
        on_tokens=lambda tokens, live: told.append((np.asarray(tokens), np.asarray(live))),
    )
    jax.effects_barrier()
    tokens, live = (np.stack(parts, 1) for parts in zip(*told, strict=True))
    np.testing.assert_array_equal(tokens, actual.tokens[:, : tokens.shape[1]])
    np.testing.assert_array_equal(live.sum(1), actual.lengths)


def programs() -> list[int]:
    """How many were compiled for prompts, and for the loop."""
    compiled: list[Any] = [prefill, decode]
    return [function._cache_size() for function in compiled]


def test_other_prompts_of_the_same_shape_compile_nothing(model: Decoder) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "key": jax.random.key(0)}
    generate(model, *left_pad(PROMPTS), temperature=0.7, top_p=0.9, end=[1], pad=0, **options)
    before = programs()
    generate(model, *left_pad([[1, 2, 3], [4] * 7, [5]]), temperature=1.5, top_p=0.2, end=[7], pad=2, **options)
    assert programs() == before


def test_the_same_key_draws_the_same_and_another_does_not(model: Decoder) -> None:
    def draw(seed: int) -> Any:
        key = jax.random.key(seed)
        return generate(model, *left_pad(PROMPTS), max_new_tokens=NEW, temperature=2.0, key=key).tokens

    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()


def test_drawing_from_the_likeliest_alone_is_greedy(model: Decoder) -> None:
    greedy = generate(model, *left_pad(PROMPTS), max_new_tokens=NEW).tokens
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        options: Any = {**options, "temperature": 1.0, "key": jax.random.key(0)}
        np.testing.assert_array_equal(generate(model, *left_pad(PROMPTS), max_new_tokens=NEW, **options).tokens, greedy)


@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 5, 17]),
    st.sampled_from([None, 0.05, 0.5, 0.9, 1.0]),
)
def test_what_is_likely_is_what_transformers_draws_from(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = np.random.default_rng(seed).normal(size=(3, 17)).astype(np.float32) * 3
    scores: Any = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))  # pyright: ignore[reportArgumentType]
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)  # pyright: ignore[reportArgumentType]
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)  # pyright: ignore[reportArgumentType]
    actual = likely(jnp.asarray(logits), temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isinf(actual), np.isinf(scores.numpy()))
    np.testing.assert_allclose(actual, scores.numpy(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 2e-38])
def test_a_small_temperature_draws_the_likeliest_token(model: Decoder, temperature: float) -> None:
    prompts = left_pad(PROMPTS)
    drawn = generate(model, *prompts, max_new_tokens=3, temperature=temperature, key=jax.random.key(0))
    np.testing.assert_array_equal(drawn.tokens, generate(model, *prompts, max_new_tokens=3).tokens)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """A model that gives every text the same logits."""
    config = DecoderConfig(4, 4, 4, heads=1, kv_heads=1, head_dim=4, layers=(DecoderLayer(),), tied=False)
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert model.head is not None
    model.embedding.embedding[...] = jnp.ones((4, 4))
    model.head.weight[...] = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))[:, None] * jnp.array([1.0, 0, 0, 0])
    out = model(np.zeros((1, 1), int))[0][0, 0]
    actual = generate(model, np.zeros((500, 1), int), max_new_tokens=20, temperature=1.0, key=jax.random.key(0)).tokens
    frequencies = np.bincount(np.asarray(actual).ravel(), minlength=4) / actual.size
    np.testing.assert_allclose(frequencies, jax.nn.softmax(out), atol=0.02)


def test_a_longer_cache_changes_nothing(model: Decoder) -> None:
    actual = generate(model, *left_pad(PROMPTS), max_new_tokens=NEW, cache_length=50).tokens
    np.testing.assert_array_equal(actual, generate(model, *left_pad(PROMPTS), max_new_tokens=NEW).tokens)
