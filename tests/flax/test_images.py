"""Texts with images and prefixes, whose tokens attend to each other both ways: PaliGemma and Gemma 3."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import blockwise_overlay

from jaxmask import EMPTY, PARTIAL
from jaxmask.flax import generate
from jaxmask.flax.models.blockwise import Blockwise
from jaxmask.flax.models.generate import decode, prefill
from tests.flax.test_decoder import MIXED, PROMPT, SIZES, step_of
from torch_compat import models

ROWS, STEPS, IMAGE_TOKEN = 3, 8, 63
LENGTH = PROMPT + STEPS
# An image is four patches, which become four tokens.
VISION: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 4,
        "patch_size": 2,
        "vision_use_head": False,
    }
}
GEMMA = SIZES | {"model_type": "gemma"}
GEMMA2 = SIZES | MIXED | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "model_type": "gemma2"}
GEMMA3 = SIZES | MIXED | {"model_type": "gemma3_text"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "PaliGemma": ("PaliGemma", {"text_config": GEMMA, "projection_dim": 32, "image_token_index": IMAGE_TOKEN}),
    "PaliGemma 2": ("PaliGemma", {"text_config": GEMMA2, "projection_dim": 32, "image_token_index": IMAGE_TOKEN}),
    "Gemma 3": ("Gemma3", {"text_config": GEMMA3, "mm_tokens_per_image": 4, "image_token_id": IMAGE_TOKEN}),
}
PADDING = np.array([[0], [3], [1]])
# For each row the tokens of each image: beyond a window of 5, and one next to another.
IMAGES = [[(1, 9)], [], [(2, 5), (6, 12)]]
PREFIXES = np.array([[10], [12], [7]])


def make(name: str) -> Any:
    """The model of Transformers, with random weights, norms included."""
    kind, arguments = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**VISION, **arguments)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1 or (parameter == 0).all():
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model of Transformers, and ours with its weights."""
    model = make(request.param)
    return model, models.load(model)


def kinds(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """The types of the tokens, as Transformers has them, and the blocks that these stand for."""
    if model.config.model_type == "paligemma":
        is_prefix = np.arange(LENGTH) < PREFIXES
        return np.where(is_prefix, 0, 1), np.where(is_prefix, 0, -1)
    blocks = np.full((ROWS, LENGTH), -1)
    for row, images in enumerate(IMAGES):
        for image, (start, end) in enumerate(images):
            blocks[row, start:end] = image
    return np.where(blocks >= 0, 1, 0), blocks


def batch(ours: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, which of them are valid, and their embeddings, some of which no token has."""
    rng = np.random.default_rng(0)
    tokens, valid = rng.integers(1, IMAGE_TOKEN, (ROWS, LENGTH)), np.arange(LENGTH) >= PADDING
    embeddings = np.array(ours.embed(tokens))
    embeddings[:, 2:5] = rng.normal(size=embeddings[:, 2:5].shape) * embeddings.std()
    return tokens, valid, embeddings


def of_transformers(model: Any, embeddings: np.ndarray, valid: np.ndarray, types: np.ndarray) -> np.ndarray:
    """The logits of the prompt, and then of each step through the cache."""
    mask, all_types = torch.from_numpy(valid), torch.from_numpy(types)
    positions, inputs = (mask.cumsum(1) - 1).clip(0), torch.from_numpy(embeddings)
    logits, cache = [], transformers.DynamicCache(config=model.config.get_text_config())
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))]:
        # As `generate` of Gemma 3 does, which leaves the types out after the first call.
        has_types = start == 0 or model.config.model_type == "paligemma"
        with torch.no_grad():
            out = model(
                inputs_embeds=inputs[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                token_type_ids=all_types[:, start:end] if has_types else None,
                cache=cache,
                use_cache=True,
            )
        logits.append(out.logits.numpy())
    return np.concatenate(logits, 1)


def close(actual: Any, wanted: Any) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)


def test_a_whole_text_has_the_logits_of_transformers(pair: tuple[Any, Any]) -> None:
    tokens, valid, embeddings = batch(pair[1])
    types, blocks = kinds(pair[0])
    logits, _ = pair[1](tokens, valid, block_sequence_ids=blocks, embeddings=embeddings)
    close(logits[valid], of_transformers(pair[0], embeddings, valid, types)[valid])


def test_a_prompt_and_then_steps_have_the_logits_of_transformers(pair: tuple[Any, Any]) -> None:
    tokens, valid, embeddings = batch(pair[1])
    types, blocks = kinds(pair[0])
    prompt, cache = slice(0, PROMPT), pair[1].empty_cache(ROWS, LENGTH)
    logits, cache = pair[1](
        *(tokens[:, prompt], valid[:, prompt]),
        block_sequence_ids=blocks[:, prompt],
        embeddings=embeddings[:, prompt],
        cache=cache,
    )
    actual, step = [logits], step_of(pair[1])
    # The steps embed their tokens themselves.
    for at in range(PROMPT, LENGTH):
        logits, cache = step(cache, tokens[:, at : at + 1])
        actual.append(logits)
    assert step._cache_size() == 1
    close(np.concatenate(actual, 1)[valid], of_transformers(pair[0], embeddings, valid, types)[valid])


def test_an_image_in_a_later_call_is_as_in_the_whole_text(pair: tuple[Any, Any]) -> None:
    tokens, valid, embeddings = batch(pair[1])
    blocks = np.full((ROWS, LENGTH), -1)
    blocks[:, 8:15] = 0
    whole, _ = pair[1](tokens, valid, block_sequence_ids=blocks, embeddings=embeddings)
    actual, cache = [], pair[1].empty_cache(ROWS, LENGTH)
    for part in (slice(0, 6), slice(6, 16), slice(16, LENGTH)):
        logits, cache = pair[1](
            *(tokens[:, part], valid[:, part]),
            block_sequence_ids=blocks[:, part],
            embeddings=embeddings[:, part],
            cache=cache,
        )
        actual.append(logits)
    close(np.concatenate(actual, 1)[valid], whole[valid])


def test_blocks_matter(pair: tuple[Any, Any]) -> None:
    tokens, valid, embeddings = batch(pair[1])
    with_blocks, without = (
        pair[1](tokens, valid, block_sequence_ids=blocks, embeddings=embeddings)[0]
        for blocks in (kinds(pair[0])[1], None)
    )
    assert np.abs(with_blocks - without)[0].max() > 1e-2


def test_images_are_continued_with_the_tokens_of_transformers(pair: tuple[Any, Any]) -> None:
    """The image is read by the model of Transformers; what comes of it are the embeddings of ours."""
    theirs, ours = pair
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, IMAGE_TOKEN, (2, 9))
    tokens[:, 2:6] = IMAGE_TOKEN
    pixels = torch.from_numpy(rng.normal(size=(2, 3, 4, 4)).astype(np.float32))
    is_image, is_first = tokens == IMAGE_TOKEN, theirs.config.model_type == "paligemma"
    wanted = theirs.generate(
        torch.from_numpy(tokens),
        pixel_values=pixels,
        attention_mask=torch.ones(2, 9, dtype=torch.int64),
        token_type_ids=torch.from_numpy(np.where(is_image, 0 if is_first else 1, 0)),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
    )[:, 9:]
    with torch.no_grad():
        features = theirs.get_image_features(pixels).pooler_output.numpy()
    embeddings = np.array(ours.embed(tokens))
    embeddings[is_image] = features.reshape(-1, features.shape[-1])
    # The prompt of PaliGemma is a prefix as a whole.
    blocks = np.zeros((2, 9), int) if is_first else np.where(is_image, 0, -1)
    actual = generate(ours, tokens, max_new_tokens=STEPS, block_sequence_ids=blocks, embeddings=embeddings)
    np.testing.assert_array_equal(actual.tokens, wanted)


def test_other_images_compile_nothing(pair: tuple[Any, Any]) -> None:
    tokens, valid, embeddings = (array[:, :PROMPT] for array in batch(pair[1]))
    compiled: list[Any] = [prefill, decode]
    counts: list[list[int]] = []
    for first in (2, 4):
        blocks = np.where((np.arange(PROMPT) >= first) & (np.arange(PROMPT) < 9), 0, -1) * np.ones((ROWS, 1), int)
        images: dict[str, Any] = {"block_sequence_ids": blocks, "embeddings": embeddings * first}
        generate(pair[1], tokens, valid, max_new_tokens=3, **images)
        counts.append([function._cache_size() for function in compiled])
    assert counts[0] == counts[1]


@given(st.lists(st.integers(-1, 2), min_size=1, max_size=9), st.integers(-3, 3), st.integers(1, 4))
def test_blocks_are_those_of_transformers_wherever_they_begin(ids: list[int], start: int, block: int) -> None:
    """In two rows, of which one begins elsewhere; and no tile says what is not so."""
    both = np.stack([ids, ids[::-1]])
    mask, starts = Blockwise(jnp.asarray(both), jnp.array([start, 0])), np.array([start, 0])
    pairs = np.zeros((2, 1, 12, 12), bool)
    overlay = blockwise_overlay(torch.from_numpy(both))
    for row, q, kv in np.ndindex(2, 12, 12):
        at = q - starts[row], kv - starts[row]
        pairs[row, 0, q, kv] = all(0 <= i < len(ids) for i in at) and bool(overlay(row, 0, *at))
    np.testing.assert_array_equal(mask.dense(12, 12), pairs)
    for (row, _, q, kv), state in np.ndenumerate(np.asarray(mask.tiles(12, 12, block=block).states)):
        tile = pairs[row, 0, q * block : (q + 1) * block, kv * block : (kv + 1) * block]
        assert not tile.any() if state == EMPTY else tile.all() or state == PARTIAL
