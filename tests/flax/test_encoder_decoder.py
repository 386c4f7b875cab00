"""Cross-attention over padded texts: the logits of T5 in Flax are PyTorch's, all at once, in chunks, step by step."""

# pyright: reportPrivateUsage=false

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from jaxmask import Padding, attention, expand_mask
from jaxmask.flax import T5, generate
from jaxmask.flax.models.generate import decode, prefill
from jaxmask.flax.models.t5 import bucket
from jaxmask.kernels import blocked, xla
from torch_compat import models

BATCH, LENGTH, PROMPT, STEPS = 3, 14, 9, 16
TOTAL = PROMPT + STEPS
position = np.arange(LENGTH)
PADDINGS = {
    "none": np.ones((BATCH, LENGTH), int),
    "right": (position < np.array([[14], [6], [1]])).astype(int),
    "left": (position >= np.array([[0], [5], [13]])).astype(int),
}
every_padding = pytest.mark.parametrize("valid", PADDINGS.values(), ids=PADDINGS)
rng = np.random.default_rng(0)
TEXT, ANSWER = rng.integers(0, 64, (BATCH, LENGTH)), rng.integers(0, 64, (BATCH, TOTAL))


@pytest.fixture(scope="module")
def theirs() -> T5ForConditionalGeneration:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # So few buckets, and a distance so short, that all of them are used.
        config = T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
        )
        return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def ours(theirs: Any) -> T5:
    return models.load(theirs)


def expected(theirs: Any, valid: np.ndarray) -> np.ndarray:
    tensors = (torch.from_numpy(array) for array in (TEXT, valid, ANSWER))
    with torch.no_grad():
        return theirs(**dict(zip(("input_ids", "attention_mask", "decoder_input_ids"), tensors, strict=True))).logits


def answer(ours: T5, valid: np.ndarray, pieces: list[int]) -> tuple[np.ndarray, int]:
    """The logits of the answer, read in pieces, and how often the reading of one was traced."""
    traces: list[Any] = []
    graph, state = nnx.split(ours.read(TEXT, valid))

    @jax.jit
    def step(cache: Any, tokens: jax.Array) -> Any:
        traces.append(tokens)
        return nnx.merge(graph, state)(tokens, cache=cache)

    cache, logits, offset = nnx.merge(graph, state).empty_cache(BATCH, TOTAL), list[Any](), 0
    for piece in pieces:
        some, cache = step(cache, jnp.asarray(ANSWER[:, offset : offset + piece]))
        logits.append(some)
        offset += piece
    return np.concatenate(logits, 1), len(traces)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@every_padding
def test_logits_of_a_whole_answer_are_those_of_t5(theirs: Any, ours: Any, valid: np.ndarray) -> None:
    close(answer(ours, valid, [TOTAL])[0], expected(theirs, valid))


def test_a_prompt_in_chunks_and_then_step_by_step_has_the_logits_of_t5(theirs: Any, ours: Any) -> None:
    valid = PADDINGS["left"]
    logits, traces = answer(ours, valid, [3, 3, 3, *[1] * STEPS])
    close(logits, expected(theirs, valid))
    # Once for the chunks, and once for the steps.
    assert traces == 2


def test_a_call_without_a_cache_has_the_logits_of_t5(theirs: Any, ours: Any) -> None:
    valid = PADDINGS["right"]
    close(ours.read(TEXT, valid)(ANSWER)[0], expected(theirs, valid))


def test_hidden_states_of_the_text_are_those_of_t5(theirs: Any, ours: Any) -> None:
    valid = PADDINGS["left"]
    with torch.no_grad():
        wanted = theirs.encoder(torch.from_numpy(TEXT), attention_mask=torch.from_numpy(valid)).last_hidden_state
    close(ours.encode(TEXT, valid)[valid == 1], wanted[valid == 1])


def continued(theirs: Any, valid: np.ndarray, **options: Any) -> np.ndarray:
    """The tokens that Transformers generates, after the one that begins an answer."""
    tensors = torch.from_numpy(TEXT), torch.from_numpy(valid)
    return theirs.generate(
        tensors[0],
        attention_mask=tensors[1],
        max_new_tokens=STEPS,
        do_sample=False,
        decoder_start_token_id=0,
        **options,
    )[:, 1:].numpy()


@every_padding
def test_answers_are_generated_as_by_transformers(theirs: Any, valid: np.ndarray) -> None:
    theirs = copy.deepcopy(theirs)
    # Else each token would be followed by itself.
    theirs.shared.weight.data *= 0.1
    actual = generate(models.load(theirs).read(TEXT, valid), np.zeros((BATCH, 1), int), max_new_tokens=STEPS)
    wanted = continued(theirs, valid, eos_token_id=None)
    assert len(np.unique(wanted)) > 3
    np.testing.assert_array_equal(actual.tokens, wanted)


def test_answers_to_other_texts_compile_nothing(ours: Any) -> None:
    compiled: list[Any] = [prefill, decode, blocked.attend, xla.attention]
    counts: list[list[int]] = []
    for name in ("left", "right"):
        decoder = ours.read(TEXT[::-1] if name == "left" else TEXT, PADDINGS[name])
        generate(decoder, np.zeros((BATCH, 1), int), max_new_tokens=STEPS)
        counts.append([function._cache_size() for function in compiled])
    assert counts[0] == counts[1]


def test_keys_and_values_of_the_text_are_computed_once(ours: Any) -> None:
    """So what would compute them is not looked at again."""
    decoder = nnx.clone(ours.read(TEXT))
    wanted, _ = decoder(ANSWER)
    for layer in decoder.stack.layers:
        for linear in (layer.cross_attention.key, layer.cross_attention.value):
            linear.weight[...] = jnp.full_like(linear.weight[...], jnp.nan)
    np.testing.assert_array_equal(decoder(ANSWER)[0], wanted)


def test_an_answer_padded_on_the_left_is_as_the_answer(ours: Any) -> None:
    decoder, valid = ours.read(TEXT), np.arange(TOTAL) >= np.array([[0], [4], [TOTAL - 1]])
    logits, _ = decoder(np.where(valid, ANSWER, 0), valid.astype(int))
    for row, first in enumerate((0, 4, TOTAL - 1)):
        alone = ours.read(TEXT[row : row + 1])(ANSWER[row : row + 1, first:])[0]
        close(logits[row, first:], alone[0])


def test_the_padding_matters_to_the_logits(theirs: Any, ours: Any) -> None:
    unpadded = answer(ours, PADDINGS["none"], [TOTAL])[0]
    assert np.abs(unpadded - np.asarray(expected(theirs, PADDINGS["left"])))[1:].max() > 1e-2


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (8, 12)])
def test_buckets_of_distances_are_those_of_t5(both_ways: bool, sizes: tuple[int, int]) -> None:
    distances = np.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distances), both_ways, *sizes)
    np.testing.assert_array_equal(bucket(jnp.asarray(distances), *sizes, both_ways), theirs)


@every_padding
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_expand_mask_with_a_target_length_is_the_padding_of_cross_attention(
    valid: np.ndarray, implementation: Any
) -> None:
    query, key, value = (
        jnp.asarray(rng.standard_normal((BATCH, length, 4, 8)), jnp.float32) for length in (PROMPT, LENGTH, LENGTH)
    )
    bias = expand_mask(valid, PROMPT)
    assert bias.shape == (BATCH, 1, PROMPT, LENGTH)
    by_bias = attention(query, key, value, bias=bias, implementation=implementation)
    by_mask = attention(query, key, value, Padding(valid), implementation=implementation)
    np.testing.assert_array_equal(by_bias, by_mask)
