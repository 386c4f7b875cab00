"""When real models are said to agree. The comparisons themselves take minutes, and `make verify` runs them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from torch_compat.real_models import EmbeddingsCheck
from torch_compat.smollm2 import NEW, GenerationCheck, until_ties

EMBEDDINGS = EmbeddingsCheck(
    64, (3, 193), lowest_cosine=0.9999999, largest_difference=2e-6, difference_without_mask=0.3
)
GENERATION = GenerationCheck(
    prompts=16,
    lengths=(2, 193),
    compared=1024,
    equal=1024,
    ties=(),
    same_alone=16,
    largest_difference=1.4e-4,
    difference_without_mask=21.0,
)


@pytest.mark.parametrize(
    "worse", [{"lowest_cosine": 0.99999}, {"largest_difference": 2e-5}, {"difference_without_mask": 2e-6}]
)
def test_embeddings_agree_within_every_limit_and_no_further(worse: dict[str, Any]) -> None:
    assert EMBEDDINGS.agrees
    assert not replace(EMBEDDINGS, **worse).agrees


@pytest.mark.parametrize(
    "worse",
    [
        {"equal": 1023},
        {"compared": 0, "equal": 0},
        {"same_alone": 15},
        {"largest_difference": 3e-4},
        {"largest_difference": float("nan")},
        {"difference_without_mask": 1e-4},
    ],
)
def test_generation_agrees_within_every_limit_and_no_further(worse: dict[str, Any]) -> None:
    assert GENERATION.agrees
    assert not replace(GENERATION, **worse).agrees


def test_a_tie_ends_a_row_and_any_other_difference_does_not() -> None:
    wanted = np.zeros((5, NEW), int)
    found, logits = wanted.copy(), np.zeros((5, NEW, 4))
    logits[..., 0] = 2.0
    found[1, 5:] = 1
    logits[1, 5, 1] = 2.0 - 5e-5
    found[2, 7:] = 1
    logits[2, 7, 1] = 2.0 - 2e-4
    # Two others tie, and ours is a third one, or none at all.
    for row, token in ((3, 2), (4, -1)):
        found[row, 9:] = token
        logits[row, 9, 1] = 2.0 - 5e-5
    counts, ties = until_ties(found, wanted, logits)
    assert counts == [NEW, 5, NEW, NEW, NEW]
    assert [tie[:2] for tie in ties] == [(1, 5)]
