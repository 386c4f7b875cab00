"""What a user's test may ask of a model: whether the documents in a row are separate."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Integer, Shaped

from jaxmask import checks


def assert_documents_are_separate(
    model: Callable[[Any], Any],
    inputs: Shaped[Array | np.ndarray, "batch length *rest"],
    segment_ids: Integer[Array | np.ndarray, "batch length"],
    *,
    tolerance: float = 0.0,
) -> None:
    """Change each document in turn, and assert that the output at every other document stays as it was.

    Args:
        model: a function from inputs to outputs ``[batch, length, ...]``, the same function at each call: without
            dropout.
        inputs: tokens, integers ``[batch, length]``, or embeddings, floats ``[batch, length, ...]``. A changed token is
            the one after it in the row, so that no new token appears.
        segment_ids: integer ``[batch, length]``, negative for padding.
        tolerance: how far an output may move; 0 as masked weights are 0 exactly.

    Raises:
        AssertionError: an output at another document moved; the message names row, documents and positions.
        ValueError: the outputs are not ``[batch, length, ...]``.

    >>> import jax.numpy as jnp
    >>> from jaxmask import Causal, Segments, attention
    >>> ids = np.array([[0, 0, 0, 1, 1]])
    >>> x = np.random.default_rng(0).standard_normal((1, 5, 2, 8), np.float32)
    >>> assert_documents_are_separate(lambda x: attention(x, x, x, Causal() & Segments(ids)), x, ids)
    >>> assert_documents_are_separate(lambda x: attention(x, x, x, Causal()), x, ids)
    Traceback (most recent call last):
    AssertionError: row 0: tokens of document 1 see document 0, at [3, 4]
    """
    ids = np.asarray(checks.array("segment_ids", segment_ids, "i", 2))
    inputs = np.asarray(inputs)
    before = _output(model, inputs, ids)
    is_float = np.issubdtype(inputs.dtype, np.floating)
    for row, of_row in enumerate(ids):
        for document in np.unique(of_row[of_row >= 0]):
            is_changed = of_row == document
            changed = inputs.copy()
            if is_float:
                changed[row, is_changed] = -2 * changed[row, is_changed] + 1
            else:
                # Tokens of the row, so that no id is beyond the vocabulary.
                changed[row, is_changed] = np.roll(inputs[row], -1, 0)[is_changed]
            moved = np.abs(_output(model, changed, ids) - before)[row]
            moved = moved.reshape(len(of_row), -1).max(1) > tolerance
            for other in np.unique(of_row[of_row >= 0]):
                at = np.flatnonzero(moved & (of_row == other))
                if other != document and at.size:
                    raise AssertionError(
                        f"row {row}: tokens of document {other} see document {document}, at {at.tolist()}"
                    )


def _output(model: Callable[[Any], Any], inputs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    found = jax.device_get(model(inputs))
    if found.shape[:2] != ids.shape:
        raise ValueError(
            f"the output of model must be [batch, length, ...] = {[*ids.shape, '...']}, got {checks.describe(found)}"
        )
    return np.asarray(found, np.float64)
