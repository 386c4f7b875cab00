"""What lies beyond an array of a mask: an error where it is known beforehand, else it does not attend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmask import Dense, Full, Mask, Padding, Prefix, Segments, zoo

KEYS = 4
IDS, ROWS = np.array([[5, 5, 7, 7]]), np.array([[1, 0, 0, 1], [0, 1, 1, 1]], np.bool_)
VALID = np.array([[1, 0, 0, 1]])


def same(q: int, kv: int) -> bool:
    return q in range(KEYS) and kv in range(KEYS) and IDS[0, q] == IDS[0, kv]


def marked(position: int) -> bool:
    return position in range(KEYS) and bool(VALID[0, position])


@dataclass(frozen=True)
class Case:
    """A mask that holds an array of positions, and its definition: what lies beyond the array does not attend."""

    build: Callable[[Any], Mask]
    array: Any
    allows: Callable[[int, int], bool]
    # Whether the mask says what it means beyond its array, so that it is no error.
    is_defined: bool = False


CASES: dict[str, Case] = {
    "segments": Case(Segments, IDS, same),
    "segments-of-queries": Case(
        lambda ids: Segments(ids[:, 2:], ids, offset=2), IDS, lambda q, kv: q >= 2 and same(q, kv)
    ),
    "dense-rows": Case(Dense, ROWS, lambda q, kv: q in range(2) and kv in range(KEYS) and bool(ROWS[q, kv])),
    "padding-of-queries": Case(lambda valid: zoo.Transposed(Padding(valid)), VALID, lambda q, kv: marked(q)),
    "padding-of-one-query": Case(lambda valid: zoo.Transposed(Padding(valid)), VALID[:, :1], lambda q, kv: q == 0),
    "reordered-padding": Case(
        lambda order: zoo.Reordered(zoo.Transposed(Padding(VALID)), order),
        np.array([[0, 9, 3, 1]]),
        lambda q, kv: q in (0, 2) and kv in range(KEYS),
    ),
    "global_sliding_window": Case(
        lambda is_global: zoo.global_sliding_window(0, is_global),
        VALID,
        lambda q, kv: q == kv or marked(q) or marked(kv),
    ),
    "longformer": Case(
        lambda is_global: zoo.longformer(2, is_global, 2),
        VALID,
        lambda q, kv: abs(q - kv) in (0, 2) or marked(q) or marked(kv),
    ),
    "gemma3": Case(zoo.gemma3, IDS, lambda q, kv: kv <= q or same(q, kv)),
    "document": Case(lambda ids: zoo.document(Prefix(1), ids), IDS, lambda q, kv: same(q, kv) and kv % 2 == 0),
    "shared_prefix": Case(
        lambda ids: zoo.shared_prefix(ids - 5, np.zeros((1, 3), np.int32)),
        IDS,
        lambda q, kv: q in range(KEYS) and (kv <= q if same(q, kv) else q >= 2 and kv < 2),
    ),
    "reordered": Case(
        lambda order: zoo.Reordered(Full(), order),
        np.array([[0, 1, 2, 3]]),
        lambda q, kv: q in range(KEYS) and kv in range(KEYS),
        is_defined=True,
    ),
    "blocks": Case(
        lambda allowed: zoo.Blocks(allowed, 2),
        np.ones((2, 2), np.bool_),
        lambda q, kv: q in range(KEYS) and kv in range(KEYS),
        is_defined=True,
    ),
    "bigbird": Case(
        lambda blocks: zoo.bigbird(blocks, 1),
        np.array([[[0], [0]]]),
        lambda q, kv: q in (0, 3) or (q in range(KEYS) and (abs(q - kv) <= 1 or kv in (0, 3))),
        is_defined=True,
    ),
    "vsa": Case(
        lambda chosen: zoo.vsa(chosen, 2, 2),
        np.array([[[[0], [1]]]]),
        lambda q, kv: q in range(KEYS) and q // 2 == kv // 2,
        is_defined=True,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("offset", [-2, 0, 3, 50])
def test_a_traced_position_beyond_does_not_attend(case: Case, offset: int) -> None:
    read = jax.jit(lambda array, at: case.build(array).dense(3, KEYS, offset=at))
    expected = [[case.allows(offset + i, kv) for kv in range(KEYS)] for i in range(3)]
    np.testing.assert_array_equal(read(case.array, jnp.int32(offset))[0, 0], expected)


@every_case
@pytest.mark.parametrize("offset", [-2, 0, 3, 50])
def test_tiles_beyond_are_sound(case: Case, offset: int) -> None:
    tiles = jax.jit(lambda array, at: case.build(array).tiles(3, KEYS, block=(1, 4), offset=at).states)
    for i, state in enumerate(np.asarray(tiles(case.array, jnp.int32(offset)))[0, 0, :, 0]):
        row = [case.allows(offset + i, kv) for kv in range(KEYS)]
        assert state == 1 or state == (2 if all(row) else 0 if not any(row) else 1)


@every_case
def test_a_known_position_beyond_is_refused_unless_the_mask_defines_it(case: Case) -> None:
    mask = case.build(case.array)
    if case.is_defined:
        assert not mask.dense(3, KEYS, offset=KEYS).any()
        return
    with pytest.raises(ValueError, match=r"describes|ends at position|rows"):
        mask.dense(3, KEYS, offset=KEYS)


def test_an_id_without_a_prefix_continues_nothing() -> None:
    ids, prefix = jnp.array([[0, 0, 3, -1]]), jnp.zeros((1, 2), jnp.int32)
    np.testing.assert_array_equal(
        zoo.shared_prefix(ids, prefix).dense(4, 4)[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "id": (lambda: zoo.shared_prefix(np.array([[0, 3]]), np.zeros((1, 2), np.int32)), "segment_ids must be indices"),
    "negative-id": (lambda: zoo.shared_prefix(np.array([[0, -1]]), np.zeros((1, 2), np.int32)), "segment_ids must be"),
    "returning": (lambda: zoo.document(Full(), np.array([[0, 1, 0]])), "segment_ids must be consecutive.*row 0"),
    "batch-of-start": (
        lambda: zoo.Blocks(np.ones((3, 1, 2, 2), np.bool_), 1, np.array([0, 1])),
        "allowed and start must agree on the size of batch",
    ),
    "batch-of-positions": (
        lambda: zoo.Reordered(Prefix(np.array([1, 2, 3])), np.array([[0, 1], [1, 0]])),
        "positions and mask of Reordered must agree",
    ),
}


@pytest.mark.parametrize(("call", "says"), BAD.values(), ids=BAD.keys())
def test_bad_arrays_are_refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_a_document_tells_kernels_that_its_keys_are_consecutive() -> None:
    split = zoo.document(Full(), np.array([[5, 5, 7, 7]])).split(4, 4, intervals=True)
    start, end = split.key_interval
    np.testing.assert_array_equal(np.reshape(start, -1), [0, 0, 2, 2])
    np.testing.assert_array_equal(np.reshape(end, -1), [2, 2, 4, 4])
