"""The encoder has the hidden states of Transformers' BERT, whatever is padding, and its mean is of what is valid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import BertConfig, BertModel

from jaxmask import Padding
from jaxmask.flax import Encoder, EncoderConfig, mean_pool
from torch_compat import models

BATCH, LENGTH = 4, 12
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
}
ONE_LAYER = EncoderConfig(vocab_size=64, dim=32, hidden_dim=48, layers=1, heads=4, max_length=160)
position = np.arange(LENGTH)
PADDINGS = {
    "none": np.ones((BATCH, LENGTH), bool),
    "right": position < np.array([[12], [7], [1], [3]]),
    "left": position >= np.array([[0], [5], [11], [9]]),
    "holes": np.random.default_rng(0).random((BATCH, LENGTH)) < 0.6,
}
every_padding = pytest.mark.parametrize("valid", PADDINGS.values(), ids=PADDINGS)
every_implementation = pytest.mark.parametrize("implementation", ["xla", "blocked"])


@pytest.fixture(scope="module")
def bert() -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Weights so large that every token matters to every other.
        return BertModel(BertConfig(**SIZES, initializer_range=0.3)).eval()


def texts(length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 64, (BATCH, length)), rng.integers(0, 2, (BATCH, length))


def states(bert: BertModel, tokens: np.ndarray, valid: np.ndarray, types: np.ndarray) -> list[np.ndarray]:
    """The hidden states of all layers, the embeddings first."""
    with torch.no_grad():
        outputs = bert(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(valid.astype(int)),
            token_type_ids=torch.from_numpy(types),
            output_hidden_states=True,
        )
    return [state.numpy() for state in outputs.hidden_states]


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@every_padding
@every_implementation
def test_hidden_states_are_those_of_bert(bert: BertModel, valid: np.ndarray, implementation: Any) -> None:
    tokens, types = texts()
    # What stands at padding is compared, too: padding is no key, but a query.
    expected = states(bert, tokens, valid, types)[-1]
    close(models.load(bert)(tokens, valid, types, implementation=implementation), expected)


def test_every_layer_is_that_of_bert(bert: BertModel) -> None:
    tokens, types = texts()
    encoder, valid = models.load(bert), PADDINGS["left"]
    hidden = states(bert, tokens, valid, types)
    for layer, before, after in zip(encoder.layers, hidden, hidden[1:], strict=False):
        close(layer(jnp.asarray(before), Padding(valid)), after)


def test_texts_that_are_cut_into_tiles_have_the_states_of_bert(bert: BertModel) -> None:
    tokens, types = texts(160)
    valid = np.arange(160) >= np.array([[0], [150], [31], [130]])
    close(models.load(bert)(tokens, valid, types), states(bert, tokens, valid, types)[-1])


def test_token_types_are_zeros_unless_given(bert: BertModel) -> None:
    tokens, types = texts()
    close(models.load(bert)(tokens), states(bert, tokens, PADDINGS["none"], np.zeros_like(types))[-1])


@every_implementation
def test_a_row_of_padding_is_finite_and_leaves_the_others_alone(bert: BertModel, implementation: Any) -> None:
    tokens, types = texts()
    valid = PADDINGS["right"].copy()
    valid[2] = False
    actual = models.load(bert)(tokens, valid, types, implementation=implementation)
    assert np.isfinite(actual).all()
    others = np.array([0, 1, 3])
    close(actual[others], states(bert, tokens, valid, types)[-1][others])


def test_what_is_no_token_is_nan_but_where_it_is_padding(bert: BertModel) -> None:
    encoder, (tokens, types), valid = models.load(bert), texts(), PADDINGS["right"]
    wanted = encoder(tokens, valid, types)[valid]
    strange = np.where(valid, tokens, 99), valid, np.where(valid, types, -1)
    np.testing.assert_array_equal(encoder(*strange)[valid], wanted)
    for token, kind in ((64, 0), (-1, 0), (3, 2), (3, -1)):
        assert jnp.isnan(encoder(np.array([[token]]), None, np.array([[kind]]))).all()


def test_gradients_are_finite_where_a_row_is_padding() -> None:
    encoder, (tokens, types) = Encoder(ONE_LAYER, rngs=nnx.Rngs(0)), texts()
    valid = jnp.asarray(PADDINGS["right"]).at[2].set(False)

    @nnx.jit
    @nnx.grad
    def gradients(encoder: Any) -> Any:
        return (mean_pool(encoder(tokens, valid, types), valid) ** 2).sum()

    leaves = jax.tree.leaves(gradients(encoder))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)
    assert any((leaf != 0).any() for leaf in leaves)


def test_a_batch_has_the_embeddings_of_each_text_alone(bert: BertModel) -> None:
    encoder, (tokens, _), valid = models.load(bert), texts(), PADDINGS["right"]
    batch = mean_pool(encoder(tokens, valid), valid)
    for row in (1, 2):
        alone = tokens[row, valid[row]][None]
        close(batch[row], mean_pool(encoder(alone), np.ones_like(alone))[0])


def test_small_integers_are_tokens_too(bert: BertModel) -> None:
    tokens, types = texts()
    encoder = models.load(bert)
    np.testing.assert_array_equal(encoder(tokens.astype(np.uint8), None, types), encoder(tokens, None, types))


def test_the_mean_is_of_what_is_valid_and_zeros_where_nothing_is() -> None:
    hidden = jnp.array([[[1.0], [3.0], [jnp.nan]], [[5.0], [6.0], [7.0]], [[1.0], [1.0], [1.0]]])
    valid = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(mean_pool(hidden, valid), [[2.0], [6.0], [0.0]])


def test_the_mean_of_a_long_text_in_half_precision_is_summed_in_float32() -> None:
    hidden = jnp.ones((1, 4096, 1), jnp.bfloat16)
    actual = mean_pool(hidden, jnp.ones((1, 4096), bool))
    assert actual.dtype == jnp.bfloat16
    assert actual.item() == 1
