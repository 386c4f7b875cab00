"""Ids of packed documents, from what data pipelines say of them; padding has negative ids.

The ids are consecutive by construction: equal within a document, and no two documents share one.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Int32, Integer

from jaxmask import checks
from jaxmask.indices import library
from jaxmask.mask import Mask
from jaxmask.masks import Causal, Padding, Segments
from jaxmask.zoo.coordinates import Reordered

Ids = Int32[Array | np.ndarray, "batch length"]


def packed(segment_ids: Integer[Array | np.ndarray, "batch length"]) -> Mask:
    """Documents that are packed into rows: a query attends to the keys of its own document, and padding to nothing.

    Kernels are told that the ids are consecutive, so that the mask is an interval of keys for each query.

    Args:
        segment_ids: integer ``[batch, length]``, equal and consecutive within a document, negative for padding, as from
            the functions of this module. This is checked in NumPy arrays, and trusted of others.

    Raises:
        ValueError: an id returns after another.

    >>> mask = Causal() & packed(segment_ids_from_lengths(np.array([[2, 1]]), 4))
    >>> print(mask.dense(4, 4)[0, 0].astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [0 0 1 0]
     [0 0 0 0]]
    """
    ids = checks.array("segment_ids", segment_ids, "i", 2)
    return Segments(ids, consecutive=True) & Padding(ids >= 0)


def ordered_groups(group_ids: Integer[Array | np.ndarray, "batch length"]) -> Mask:
    """A query attends to its own group and to all before it: ``group_ids[kv] <= group_ids[q]``.

    Attention is bidirectional within a group and causal from group to group: the frames of a world model, and the
    image, state and actions of pi0 (https://arxiv.org/abs/2410.24164, where ``make_attn_mask`` of openpi sums up
    ``mask_ar`` to such ids; ``PI0Model`` in Transformers).

    Args:
        group_ids: integer ``[batch, length]``.

    >>> print(ordered_groups(np.array([[0, 0, 1, 1]])).dense(4, 4)[0, 0].astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [1 1 1 1]
     [1 1 1 1]]
    """
    return Reordered(Causal(), checks.some("group_ids", checks.array("group_ids", group_ids, "i", 2), "id"))


def segment_ids_from_lengths(lengths: Integer[Array | np.ndarray, "batch documents"], length: int) -> Ids:
    """Ids from the number of tokens in each document of a row; what is left of the row is padding.

    Args:
        lengths: integer ``[batch, documents]``; 0 for a row that has fewer documents than others.
        length: the number of tokens in a row, padding included; static.

    Returns:
        int32 ``[batch, length]``.

    Raises:
        ValueError: in NumPy, a length is negative, or the documents are longer than the row. A traced document that is
            longer is cut.

    >>> segment_ids_from_lengths(np.array([[2, 1], [3, 0]]), 4)
    array([[ 0,  0,  1, -1],
           [ 0,  0,  0, -1]], dtype=int32)
    """
    checks.some("lengths", checks.array("lengths", lengths, "i", 2), "document")
    lengths = checks.int32("lengths", lengths, 0)
    return _between(lengths.cumsum(1, dtype=np.int32), checks.length("length", length))


def segment_ids_from_cu_seqlens(cu_seqlens: Integer[Array | np.ndarray, "batch ends"], length: int) -> Ids:
    """Ids from the cumulative lengths that FlashAttention's variable-length functions take; the rest is padding.

    Args:
        cu_seqlens: integer ``[batch, documents + 1]``, from 0 on and never falling; for a single row ``[None]``. A row
            that has fewer documents repeats the last.
        length: the number of tokens in a row, padding included; static.

    Returns:
        int32 ``[batch, length]``.

    Raises:
        ValueError: in NumPy, a row does not begin with 0, falls, or ends beyond ``length``.

    >>> segment_ids_from_cu_seqlens(np.array([[0, 2, 3]]), 4)
    array([[ 0,  0,  1, -1]], dtype=int32)
    """
    ends = checks.int32("cu_seqlens", checks.array("cu_seqlens", cu_seqlens, "i", 2), 0)
    if ends.shape[1] < 2:
        raise ValueError(
            f"cu_seqlens must have at least two ends, that of a document after 0, got {checks.describe(ends)}"
        )
    if isinstance(ends, np.ndarray) and ((ends[:, :1] != 0).any() or (np.diff(ends) < 0).any()):
        raise ValueError(f"cu_seqlens must begin with 0 and never fall, got {ends!r}")
    return _between(ends[:, 1:], checks.length("length", length))


def segment_ids_from_position_ids(position_ids: Integer[Array | np.ndarray, "batch length"]) -> Ids:
    """Ids from positions that begin anew with 0 in each document, as Transformers' collators give them.

    Args:
        position_ids: integer ``[batch, length]``; a document begins where a position is not the one after the last.

    Returns:
        int32 ``[batch, length]``.

    Raises:
        ValueError: in NumPy, a document begins at another position than 0.

    Source: ``find_packed_sequence_indices`` in Transformers' ``masking_utils``.

    >>> segment_ids_from_position_ids(np.array([[0, 1, 0, 1, 2]]))
    array([[0, 0, 1, 1, 1]], dtype=int32)
    """
    positions = checks.int32("position_ids", checks.array("position_ids", position_ids, "i", 2), 0)
    xp = library(positions)
    begins = xp.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
    if isinstance(positions, np.ndarray):
        wrong = (begins | (np.arange(positions.shape[1]) == 0)) & (positions != 0)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"position_ids must begin with 0 in each document, but row {row} goes on with {positions[row, column]} "
                f"at {column}: {positions[row]!r}"
            )
    return begins.cumsum(1, dtype=np.int32)


def segment_ids_from_pad_id(tokens: Integer[Array | np.ndarray, "batch length"], pad_id: int) -> Ids:
    """Ids of rows that hold one document and padding: 0 for tokens, -1 for padding before them and -2 for that after.

    Args:
        tokens: integer ``[batch, length]``.
        pad_id: the id of padding; static.

    Returns:
        int32 ``[batch, length]``.

    Raises:
        ValueError: in NumPy, there is padding between tokens.

    >>> segment_ids_from_pad_id(np.array([[7, 7, 5, 9], [3, 7, 7, 7]]), 7)
    array([[-1, -1,  0,  0],
           [ 0, -2, -2, -2]], dtype=int32)
    """
    is_token = checks.array("tokens", tokens, "i", 2) != checks.integer("pad_id", pad_id, -checks.INT32_MAX)
    if isinstance(is_token, np.ndarray):
        for row, of_row in enumerate(is_token):
            if np.count_nonzero(np.diff(of_row.astype(np.int8), prepend=0) > 0) > 1:
                raise ValueError(f"tokens must have no padding between them, but row {row} has: {tokens[row]!r}")
    xp = library(is_token)
    return xp.where(is_token, 0, xp.where(is_token.cumsum(1, dtype=np.int32) > 0, -2, -1)).astype(np.int32)


def _between(ends: Any, length: int) -> Any:
    """The number of documents that end at or before each position; -1 after the last of them."""
    if isinstance(ends, np.ndarray) and ends.size and ends.max() > length:
        raise ValueError(f"length must hold all documents of a row, which end at {ends.max()}, got {length}")
    xp = library(ends)
    position = np.arange(length, dtype=np.int32)
    ids = (ends[:, None] <= position[None, :, None]).sum(2, dtype=np.int32)
    return xp.where(position[None] < ends[:, -1:], ids, -1).astype(np.int32)
