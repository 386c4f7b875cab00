"""The uses with which the original converter was first published, each against its meaning in PyTorch, bit for bit."""

# pyright: reportPrivateUsage=false

import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from jaxmask import AttentionMaskConverter, Causal, Padding, Prefix, prepare_4d_causal_attention_mask, unmask_unattended
from torch_compat import to_jax, to_torch
from torch_compat.reference import AttentionMaskConverter as TorchConverter
from torch_compat.verify import compare
from torch_compat.weights import minilm_folder

LOW = float(np.finfo(np.float32).min)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The attention mask API under", FutureWarning)
        yield


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """The mask of the two texts, left-padded into one batch by a real tokenizer, without its special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    batch = tokenizer(
        ["我爱你", "你也爱我"], padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    )
    return batch["attention_mask"].to(torch.int32)


def test_the_shorter_text_is_padded_on_the_left(texts: torch.Tensor) -> None:
    assert texts.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("query_length", [4, 2, 1])
def test_forward_and_continuations_of_the_batch(texts: torch.Tensor, query_length: int) -> None:
    ours = AttentionMaskConverter(True).to_4d(to_jax(texts), query_length, 4)
    theirs = TorchConverter(True).to_4d(texts, query_length, torch.float32, key_value_length=4)
    assert compare(ours, theirs) is None


def test_a_full_forward_without_padding() -> None:
    ours = AttentionMaskConverter(True).to_causal_4d(2, 4, 4)
    assert compare(ours, TorchConverter(True).to_causal_4d(2, 4, 4, torch.float32)) is None


def test_a_continuation_by_two_tokens_sees_the_past() -> None:
    ours = AttentionMaskConverter(True).to_causal_4d(1, 2, 6)
    assert compare(ours, TorchConverter(True).to_causal_4d(1, 2, 6, torch.float32)) is None
    assert ours is not None
    assert (np.asarray(ours[0, 0]) == 0).sum(axis=1).tolist() == [5, 6]


def test_a_continuation_by_one_token_needs_no_mask() -> None:
    assert AttentionMaskConverter(True).to_causal_4d(1, 1, 5) is None
    assert TorchConverter(True).to_causal_4d(1, 1, 5, torch.float32) is None


def test_prompts_of_p_tuning_are_visible_to_all_through_to_causal_4d() -> None:
    ours = AttentionMaskConverter(True).to_causal_4d(2, 4, 6)
    assert compare(ours, TorchConverter(True).to_causal_4d(2, 4, 6, torch.float32)) is None
    assert ours is not None
    assert (np.asarray(ours)[..., :2] == 0).all()


def test_prompts_of_p_tuning_are_visible_to_all_through_to_4d(texts: torch.Tensor) -> None:
    mask = torch.cat([torch.ones(2, 2, dtype=torch.int32), texts], dim=1)
    ours = AttentionMaskConverter(True).to_4d(to_jax(mask), 4, 6)
    assert compare(ours, TorchConverter(True).to_4d(mask, 4, torch.float32, key_value_length=6)) is None
    assert (np.asarray(ours)[..., :2] == 0).all()


def test_prompts_of_p_tuning_are_a_description(texts: torch.Tensor) -> None:
    mask = jnp.concatenate([jnp.ones((2, 2), jnp.int32), to_jax(texts)], axis=1)
    described = ((Causal() | Prefix(2)) & Padding(mask)).bias(4, 6, offset=2)
    assert jnp.array_equal(described, AttentionMaskConverter(True).to_4d(mask, 4, 6))


def test_a_window_of_one_hides_most_prompts() -> None:
    ours = AttentionMaskConverter(True, sliding_window=1).to_causal_4d(1, 4, 6)
    assert compare(ours, TorchConverter(True, sliding_window=1).to_causal_4d(1, 4, 6, torch.float32)) is None
    assert ours is not None
    # The first query sees the second prompt, for the window lets sliding_window + 1 keys through; no other sees any.
    assert (np.asarray(ours[0, 0, :, :2]) == 0).tolist() == [[False, True], *[[False, False]] * 3]


def test_a_bidirectional_converter_masks_padding_alone(texts: torch.Tensor) -> None:
    ours = AttentionMaskConverter(False).to_4d(to_jax(texts), 4)
    assert compare(ours, TorchConverter(False).to_4d(texts, 4, torch.float32)) is None


def test_a_4d_mask_by_hand_gives_what_the_2d_one_gives(texts: torch.Tensor) -> None:
    mask = to_jax(texts)
    by_hand = np.tril(np.ones((4, 4), np.int32)) * np.asarray(mask)[:, None, None, :]
    embeds = jnp.zeros((2, 4, 8))
    from_4d = prepare_4d_causal_attention_mask(by_hand, (2, 4), embeds, 0)
    from_2d = prepare_4d_causal_attention_mask(mask, (2, 4), embeds, 0)
    assert from_4d is not None
    assert from_2d is not None
    assert np.asarray(from_4d).tobytes() == np.asarray(from_2d).tobytes()


def test_the_row_of_padding_is_unmasked_with_minus_zero(texts: torch.Tensor) -> None:
    bias = AttentionMaskConverter(True).to_4d(to_jax(texts), 4, 4)
    unmasked = unmask_unattended(bias)
    assert compare(unmasked, TorchConverter._unmask_unattended(to_torch(bias), LOW)) is None
    row = np.asarray(unmasked)[0, 0, 0]
    assert (row == 0).all()
    assert np.signbit(row).all()


@pytest.fixture(scope="module")
def scores_and_values() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (1, 4, 2, 8)), jax.random.normal(keys[1], (1, 4, 2, 8))


def attend(query: jax.Array, value: jax.Array, bias: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Scaled-dot-product attention in JAX and in PyTorch, ``[batch, length, heads, dim]``."""
    ours = jax.nn.dot_product_attention(query, query, value, bias=bias)
    q, v = (to_torch(array).transpose(1, 2) for array in (query, value))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, q, v, attn_mask=to_torch(bias)).transpose(1, 2)
    return np.asarray(ours), theirs.numpy()


def test_a_fully_masked_row_gives_the_mean_of_the_values_in_both(
    texts: torch.Tensor, scores_and_values: tuple[jax.Array, jax.Array]
) -> None:
    query, value = scores_and_values
    bias = AttentionMaskConverter(True).to_4d(to_jax(texts), 4, 4)[:1]
    ours, theirs = attend(query, value, bias)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_allclose(ours[:, 0], value.mean(axis=1), atol=2e-6)


def test_minus_infinity_in_place_of_the_minimum_gives_nan(scores_and_values: tuple[jax.Array, jax.Array]) -> None:
    query, value = scores_and_values
    ours = jax.nn.dot_product_attention(query, query, value, bias=jnp.full((1, 1, 4, 4), -jnp.inf))
    assert jnp.isnan(ours).all()


def test_unmask_unattended_changes_the_fully_masked_row_alone(
    texts: torch.Tensor, scores_and_values: tuple[jax.Array, jax.Array]
) -> None:
    query, value = scores_and_values
    bias = AttentionMaskConverter(True).to_4d(to_jax(texts), 4, 4)[:1]
    masked, _ = attend(query, value, bias)
    ours, theirs = attend(query, value, unmask_unattended(bias))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert np.array_equal(ours[:, 1:], masked[:, 1:])
    free, _ = attend(query, value, jnp.zeros_like(bias))
    np.testing.assert_allclose(ours[:, 0], free[:, 0], atol=2e-6)
