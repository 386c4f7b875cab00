"""Ids of packed documents are those of a loop over the documents, and what cannot be such ids is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from jaxmask import Causal, Prefix, zoo
from jaxmask.testing import assert_documents_are_separate
from tests.helpers.bad import bad, refusals

LENGTH = 9
# The documents of two rows, which have as many.
rows = st.integers(1, 3).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(0, 4), min_size=count, max_size=count).filter(lambda row: sum(row) <= LENGTH),
        min_size=2,
        max_size=2,
    )
)


def ids_of(lengths: list[list[int]]) -> Any:
    ids = np.full((len(lengths), LENGTH), -1, np.int32)
    for row, of_row in enumerate(lengths):
        start = 0
        for document, length in enumerate(of_row):
            ids[row, start : start + length] = document
            start += length
    return ids


@given(rows)
def test_ids_are_those_of_a_loop(lengths: list[list[int]]) -> None:
    expected = ids_of(lengths)
    ends = np.cumsum(np.pad(lengths, ((0, 0), (1, 0))), 1)
    for to_array in (np.asarray, jnp.asarray):
        found = zoo.segment_ids_from_lengths(to_array(lengths), LENGTH)
        np.testing.assert_array_equal(found, expected, strict=True)
        np.testing.assert_array_equal(zoo.segment_ids_from_cu_seqlens(to_array(ends), LENGTH), expected, strict=True)


@given(rows)
def test_ids_from_positions_are_those_of_transformers(lengths: list[list[int]]) -> None:
    # Padding is a document of its own, as collators have it.
    positions = np.array([[i for length in (*row, LENGTH - sum(row)) for i in range(length)] for row in lengths])
    found = zoo.segment_ids_from_position_ids(positions)
    expected = find_packed_sequence_indices(torch.tensor(positions))
    if expected is None:  # nothing is packed
        expected = torch.zeros(positions.shape)
    np.testing.assert_array_equal(found, expected.numpy().astype(np.int32), strict=True)
    np.testing.assert_array_equal(jax.jit(zoo.segment_ids_from_position_ids)(positions), found)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
def test_padding_on_both_sides_has_ids_of_its_own(to_array: Any) -> None:
    tokens = to_array([[0, 0, 5, 6, 0], [7, 8, 9, 1, 2], [0, 0, 0, 0, 0]])
    ids = zoo.segment_ids_from_pad_id(tokens, 0)
    assert ids.tolist() == [[-1, -1, 0, 0, -2], [0] * 5, [-1] * 5]
    allowed = zoo.packed(ids).dense(5, 5)
    is_token = np.asarray(tokens) != 0
    np.testing.assert_array_equal(allowed[:, 0], is_token[:, :, None] & is_token[:, None])


@given(rows)
def test_packed_documents_attend_to_themselves_and_padding_to_nothing(lengths: list[list[int]]) -> None:
    ids = ids_of(lengths)
    for to_array in (np.asarray, jnp.asarray):
        mask = Causal() & zoo.packed(to_array(ids))
        same = (ids[:, :, None] == ids[:, None]) & (ids[:, None] >= 0)
        np.testing.assert_array_equal(mask.dense(LENGTH, LENGTH)[:, 0], np.tril(same))
        states = np.asarray(mask.tiles(LENGTH, LENGTH, block=1).states)[:, 0]
        np.testing.assert_array_equal(states == 2, np.tril(same))
    # Kernels are told an interval, and the padding besides.
    assert (Causal() & zoo.packed(ids)).split(LENGTH, LENGTH, intervals=True).key_interval is not None


def test_ordered_groups_are_the_mask_of_pi0() -> None:
    begins = np.array([[1, 0, 0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 1]])
    ids = np.cumsum(begins, 1)
    expected = ids[:, None, :] <= ids[:, :, None]  # make_attn_mask of openpi
    for to_array in (np.asarray, jnp.asarray):
        mask = zoo.ordered_groups(to_array(ids))
        np.testing.assert_array_equal(mask.dense(8, 8)[:, 0], expected)
        np.testing.assert_array_equal(np.asarray(mask.tiles(8, 8, block=1).states)[:, 0] == 2, expected)


def embed(mask: Any) -> Any:
    """A model of one layer, where every token has what it attends to summed up."""
    return lambda x: jnp.einsum("bqk,bkd->bqd", mask.dense(LENGTH, LENGTH)[:, 0] * 1.0, x)


IDS = ids_of([[4, 3], [2, 5]])
TEXT = np.random.default_rng(0).standard_normal((2, LENGTH, 3)).astype(np.float32)


def test_documents_that_are_separate_pass() -> None:
    assert_documents_are_separate(embed(Causal() & zoo.packed(IDS)), TEXT, IDS)
    tokens = np.arange(2 * LENGTH).reshape(2, LENGTH)
    assert_documents_are_separate(lambda tokens: embed(zoo.packed(IDS))(tokens[..., None] * 1.0), tokens, IDS)


@pytest.mark.parametrize("mask", [Causal(), zoo.packed(IDS) | Prefix(1)], ids=repr)
def test_a_leak_is_found_and_its_documents_are_named(mask: Any) -> None:
    with pytest.raises(AssertionError, match=r"row 0: tokens of document 1 see document 0, at \[4, 5, 6\]"):
        assert_documents_are_separate(embed(mask), TEXT, IDS)


VALUE, TYPE = ValueError, TypeError
FROM_PAD_ID: Any = zoo.segment_ids_from_pad_id
test_what_is_no_packing_is_refused = refusals(
    [
        bad("lengths-negative", lambda: zoo.segment_ids_from_lengths(np.array([[2, -1]]), 4), VALUE, "lengths", "-1"),
        bad(
            "lengths-too-long", lambda: zoo.segment_ids_from_lengths(np.array([[2, 3]]), 4), VALUE, "end at 5", "got 4"
        ),
        bad(
            "lengths-float", lambda: zoo.segment_ids_from_lengths(np.array([[2.0]]), 4), TYPE, "lengths must be integer"
        ),
        bad("lengths-rank", lambda: zoo.segment_ids_from_lengths(np.array([2, 1]), 4), VALUE, r"lengths\[None\]"),
        bad("cu-start", lambda: zoo.segment_ids_from_cu_seqlens(np.array([[1, 3]]), 4), VALUE, "begin with 0"),
        bad("cu-falls", lambda: zoo.segment_ids_from_cu_seqlens(np.array([[0, 3, 2]]), 4), VALUE, "never fall"),
        bad("cu-too-long", lambda: zoo.segment_ids_from_cu_seqlens(np.array([[0, 5]]), 4), VALUE, "end at 5", "got 4"),
        bad(
            "positions-start",
            lambda: zoo.segment_ids_from_position_ids(np.array([[0, 1, 3]])),
            VALUE,
            "begin with 0 in each document",
            "row 0 goes on with 3 at 2",
        ),
        bad("pad-between", lambda: zoo.segment_ids_from_pad_id(np.array([[1, 0, 1]]), 0), VALUE, "no padding between"),
        bad("pad-id", lambda: FROM_PAD_ID(np.array([[1, 0]]), 0.0), TYPE, "pad_id must be a Python int"),
        bad("packed-returns", lambda: zoo.packed(np.array([[0, 1, 0]])), VALUE, "returns to an id"),
        bad("packed-float", lambda: zoo.packed(np.array([[0.0]])), TYPE, "segment_ids must be integer"),
        bad("groups-rank", lambda: zoo.ordered_groups(np.array([0, 1])), VALUE, r"group_ids\[None\]"),
        bad(
            "separate-shapes",
            lambda: assert_documents_are_separate(lambda x: x[:, :1], TEXT, IDS),
            VALUE,
            r"\[batch, length, \.\.\.\]",
            r"float32\[2, 1, 3\]",
        ),
    ]
)
