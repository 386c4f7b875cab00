"""When real models are said to agree. The comparisons themselves take minutes, and `make verify` runs them."""

from typing import Any

import numpy as np
import pytest

from torch_compat.verify.minilm import compare_embeddings
from torch_compat.verify.smollm2 import NEW, compare_generation, until_ties

EMBEDDINGS = np.random.default_rng(0).standard_normal((4, 8))


@pytest.mark.parametrize(
    ("changed", "agrees"),
    [
        ({}, True),
        ({"ours": EMBEDDINGS + 2e-6}, True),
        ({"ours": EMBEDDINGS + 2e-5}, False),
        ({"ours": EMBEDDINGS * np.nan}, False),
        ({"unmasked": EMBEDDINGS + 2e-6}, False),
    ],
)
def test_embeddings_agree_within_every_limit_and_no_further(changed: dict[str, Any], agrees: bool) -> None:
    arguments = {"ours": EMBEDDINGS, "unmasked": EMBEDDINGS + 1, "expected": EMBEDDINGS, **changed}
    assert compare_embeddings("a model", **arguments).agrees == agrees


def test_embeddings_of_another_direction_do_not_agree_however_small() -> None:
    small = EMBEDDINGS * 1e-6
    assert not compare_embeddings("a model", small + 1e-6, small + 1, small).agrees


TOKENS = np.zeros((3, NEW), int)
ONE_WRONG = np.where(np.arange(3 * NEW).reshape(3, NEW) == 7, 1, 0)


@pytest.mark.parametrize(
    ("changed", "agrees"),
    [
        ({}, True),
        ({"ours": ONE_WRONG}, False),
        ({"alone": ONE_WRONG}, False),
        ({"difference": 3e-4}, False),
        ({"difference": float("nan")}, False),
        ({"without_mask": 1e-4}, False),
        (dict.fromkeys(("ours", "alone", "expected"), TOKENS[:0]), False),
    ],
)
def test_generation_agrees_within_every_limit_and_no_further(changed: dict[str, Any], agrees: bool) -> None:
    logits = np.zeros((3, NEW, 4))
    logits[..., 0] = 2.0
    arguments: dict[str, Any] = {
        "ours": TOKENS,
        "alone": TOKENS,
        "expected": TOKENS,
        "difference": 1.4e-4,
        "without_mask": 21.0,
    }
    assert compare_generation("a model", logits=logits, **{**arguments, **changed}).agrees == agrees


def test_a_tie_ends_a_row_and_any_other_difference_does_not() -> None:
    expected = np.zeros((5, NEW), int)
    ours, logits = expected.copy(), np.zeros((5, NEW, 4))
    logits[..., 0] = 2.0
    ours[1, 5:] = 1
    logits[1, 5, 1] = 2.0 - 5e-5
    ours[2, 7:] = 1
    logits[2, 7, 1] = 2.0 - 2e-4
    # Two others tie, and ours is a third one, or none at all.
    for row, token in ((3, 2), (4, -1)):
        ours[row, 9:] = token
        logits[row, 9, 1] = 2.0 - 5e-5
    counts, ties = until_ties(ours, expected, logits)
    assert counts == [NEW, 5, NEW, NEW, NEW]
    assert [tie[:2] for tie in ties] == [(1, 5)]
    check = compare_generation("a model", ours[:2], ours[:2], expected[:2], logits[:2], 0.0, 21.0)
    assert check.agrees
    assert check.notes == ("a tie in prompt 1, token 5: 2.00000 and 1.99995",)
