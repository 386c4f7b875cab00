"""Masks of sequences that hold more than one text: packed documents, shared prefixes, drafts, noised copies."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Integer

from jaxmask import checks
from jaxmask.indices import inside, library
from jaxmask.mask import Mask
from jaxmask.masks import Causal, Chunked, Prefix, Segments
from jaxmask.positions import LIMIT, Scalar
from jaxmask.zoo.coordinates import Axis, Reordered
from jaxmask.zoo.tables import Blocks


def document(mask: Mask, segment_ids: Integer[Array | np.ndarray, "batch length"]) -> Mask:
    """``mask`` within each of several documents that are packed into a row, at positions that count from its start.

    Causal masks and windows read only how far a key is from a query. For these, ``mask & Segments(segment_ids)`` says
    the same and knows more tiles. A prefix or chunks need the positions. Source: attn-gym's ``generate_doc_mask_mod``,
    whose ``offsets`` are where the ids change; https://arxiv.org/abs/2107.02027; Transformers' ``masking_utils``, for
    ``position_ids`` that begin anew in each document.

    Args:
        mask: a mask of positions alone, without an element for each key.
        segment_ids: integer ``[batch, length]``, equal and consecutive within a document. This is checked in NumPy
            arrays, and trusted of others.

    Raises:
        ValueError: ``segment_ids`` returns to an id; ``mask`` holds an element for each key.

    >>> print(document(Prefix(1), np.array([[0, 0, 0, 1, 1]])).dense(5, 5)[0, 0].astype(int))
    [[1 0 0 0 0]
     [1 0 0 0 0]
     [1 0 0 0 0]
     [0 0 0 1 0]
     [0 0 0 1 0]]
    """
    ids = checks.some("segment_ids", checks.array("segment_ids", segment_ids, "i", 2), "token")
    checks.fits_int32("segment_ids", ids)
    if isinstance(ids, np.ndarray):
        for row, of_row in enumerate(ids):
            if len(np.unique(of_row)) <= np.count_nonzero(of_row[1:] != of_row[:-1]):
                raise ValueError(
                    f"segment_ids must be consecutive within a document, but row {row} returns to an id: {of_row!r}; "
                    "give each document an id of its own"
                )
    xp = library(ids)
    index = np.arange(ids.shape[1], dtype=np.int32)
    is_first = ids != xp.roll(ids, 1, axis=1)
    first = xp.maximum.accumulate(xp.where(is_first, index, 0), axis=1)
    return Segments(ids, consecutive=True) & Reordered(mask, index - first)


def shared_prefix(
    segment_ids: Integer[Array | np.ndarray, "batch length"], prefix_ids: Integer[Array | np.ndarray, "batch documents"]
) -> Mask:
    """Packed documents that continue others: causal within a document, and all of its prefix before it.

    A prompt is then stored once for all of its answers. Source: attn-gym's ``generate_shared_prefix_mask_mod``, whose
    ``prefix_document_id`` is ``prefix_ids``; Prefix Grouper, https://arxiv.org/abs/2506.05433.

    Args:
        segment_ids: integer ``[batch, length]``: the document of each token, an index of ``prefix_ids``. A traced id
            beyond continues no other document.
        prefix_ids: integer ``[batch, documents]``: the document that each continues, or itself.

    Raises:
        ValueError: the batches differ; an id, in NumPy, is not an index of ``prefix_ids``.

    >>> print(shared_prefix(np.array([[0, 0, 1, 1, 2]]), np.array([[0, 0, 0]])).dense(5, 5)[0, 0].astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]
     [1 1 1 0 0]
     [1 1 1 1 0]
     [1 1 0 0 1]]
    """
    ids = checks.array("segment_ids", segment_ids, "i", 2)
    prefix = checks.array("prefix_ids", prefix_ids, "i", 2)
    if prefix.shape[0] != ids.shape[0]:
        raise ValueError(
            f"segment_ids and prefix_ids must agree on the size of batch, got {checks.describe(ids)} and "
            f"{checks.describe(prefix)}"
        )
    count = checks.some("prefix_ids", prefix, "document").shape[1]
    if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < count:
        raise ValueError(
            f"segment_ids must be indices of the {count} documents in prefix_ids, {checks.describe(prefix)}, got ids "
            f"from {ids.min()} to {ids.max()}"
        )
    checks.in_range("prefix_ids", prefix, 0, count - 1)
    ids = checks.int32("segment_ids", ids, -checks.INT32_MAX)
    prefix = checks.int32("prefix_ids", prefix, -checks.INT32_MAX)
    xp = library(ids, prefix)
    prefix_of_token = xp.take_along_axis(prefix, ids.clip(0, count - 1), axis=1)
    same = Segments(ids)
    before = Segments(xp.where(inside(ids, count), prefix_of_token, ids), ids)
    return Causal() & same | before & ~same


def batchify(mask: Mask, batchify_size: Scalar) -> Mask:
    """``mask`` within each of several examples of one length that are laid into a row.

    Causal masks and windows read only how far a key is from a query. For these, ``Chunked(batchify_size) & mask`` says
    the same and knows more tiles. Source: attn-gym's ``batchify_mask_mod``.

    Args:
        mask: a mask of positions alone, without an element for each key.
        batchify_size: number of tokens in an example, 1 to 2**30 - 1; an int, or a traced scalar.

    >>> print(batchify(Prefix(1), 2).dense(4, 4)[0, 0].astype(int))
    [[1 0 0 0]
     [1 0 0 0]
     [0 0 1 0]
     [0 0 1 0]]
    """
    batchify_size = checks.scalar("batchify_size", batchify_size, 1, LIMIT)
    return Chunked(batchify_size) & Axis(mask, batchify_size)


def jetspec_tree(
    prefix_length: Scalar | Integer[Array | np.ndarray, "_"],
    ancestors: Bool[Array | np.ndarray, "nodes nodes"] | Bool[Array | np.ndarray, "_ heads nodes nodes"],
) -> Mask:
    """A tree of drafted tokens after a prefix: a node attends to the prefix, to its ancestors and to itself.

    Source: JetSpec, https://arxiv.org/abs/2606.18394; attn-gym's ``generate_jetspec_tree_causal_mask_mod``. The nodes
    follow the prefix: read it with ``offset=prefix_length``, where attn-gym counts queries from 0.

    Args:
        prefix_length: number of tokens, 0 to 2**30 - 1; an int, or a traced int32 ``[]`` or ``[batch]``.
        ancestors: bool ``[nodes, nodes]`` or ``[batch, 1, nodes, nodes]``, as from :func:`tree_ancestors`.

    >>> print(jetspec_tree(1, tree_ancestors([-1, 0, 0])).dense(3, 4, offset=1)[0, 0].astype(int))
    [[1 1 0 0]
     [1 1 1 0]
     [1 1 0 1]]
    """
    prefix_length = checks.scalar("prefix_length", prefix_length, 0, LIMIT, ranks=(0, 1))
    if checks.array("ancestors", ancestors, "b", 2, 4).shape[-2] != ancestors.shape[-1]:
        raise ValueError(f"ancestors must have a row and a column for each node, got {checks.describe(ancestors)}")
    return Prefix(prefix_length) | Blocks(ancestors, size=1, start=prefix_length)


def tree_ancestors(parents: Sequence[int]) -> Bool[np.ndarray, "nodes nodes"]:
    """A matrix for :func:`jetspec_tree`: ``[i, j]`` says whether node ``j`` is node ``i`` or one of its ancestors.

    Source: attn-gym's ``build_tree_ancestor_matrix``.

    Args:
        parents: the parent of each node, which comes before it. The first node is the root, whose entry is not read.

    >>> print(tree_ancestors([-1, 0, 1]).astype(int))
    [[1 0 0]
     [1 1 0]
     [1 1 1]]
    """
    ancestors = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents[1:], start=1):
        if not 0 <= checks.integer(f"parents[{node}]", parent, -checks.INT32_MAX) < node:
            raise ValueError(f"parents must come before their children, got {parent} for node {node}")
        ancestors[node] |= ancestors[parent]
    return ancestors


def jetspec_training(prefix_length: Scalar, block_size: Scalar) -> Mask:
    """Sampled blocks after a prefix: causal within a block, and all of the prefix.

    Source: JetSpec, https://arxiv.org/abs/2606.18394; attn-gym's ``generate_jetspec_training_mask_mod``. The blocks
    follow the prefix: read it with ``offset=prefix_length``, where attn-gym counts queries from 0.

    Args:
        prefix_length: number of tokens, at least 0; an int, or a traced scalar.
        block_size: number of tokens in a block, at least 1; likewise.

    >>> print(jetspec_training(1, block_size=2).dense(4, 5, offset=1)[0, 0].astype(int))
    [[1 1 0 0 0]
     [1 1 1 0 0]
     [1 0 0 1 0]
     [1 0 0 1 1]]
    """
    prefix_length = checks.scalar("prefix_length", prefix_length, minimum=0)
    block_size = checks.scalar("block_size", block_size, minimum=1)
    return Prefix(prefix_length) | Causal() & Chunked(block_size, start=prefix_length)


def block_diffusion(seq_len: Scalar, block_size: Scalar) -> Mask:
    """``seq_len`` noised tokens and then as many clean ones: each block sees itself, and the clean blocks before it.

    Source: BD3-LM, https://arxiv.org/abs/2503.09573; attn-gym's ``generate_block_diffusion_mask``.

    Args:
        seq_len: number of clean tokens, half of what is attended over, 1 to 2**30 - 1; an int, or a traced scalar.
        block_size: number of tokens in a block, at least 1; likewise.

    >>> print(block_diffusion(2, block_size=1).dense(4, 4)[0, 0].astype(int))
    [[1 0 0 0]
     [0 1 1 0]
     [0 0 1 0]
     [0 0 1 1]]
    """
    seq_len = checks.scalar("seq_len", seq_len, 1, LIMIT)
    same_block = Chunked(checks.scalar("block_size", block_size, minimum=1))
    return Chunked(seq_len) & Axis(same_block, seq_len) | ~Prefix(seq_len) & Axis(Causal() & ~same_block, seq_len)
