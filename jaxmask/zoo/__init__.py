"""The masks of the literature, made of the vocabulary: one small function each.

What is a word of the vocabulary already has no function here: causal attention is ``Causal()``, a sliding window
``SlidingWindow(size)``, chunks ``Causal() & Chunked(size)``, packed documents ``Causal() & Segments(ids)``. The leaves
at the head of this file say what the vocabulary cannot: the functions are made of both.

Masks that are in attn-gym, too (https://github.com/meta-pytorch/attention-gym), agree with its ``mask_mod`` on every
pair. Arguments that cannot be meant are refused by a ``TypeError`` or ``ValueError`` that names them.

>>> from jaxmask import zoo
>>> zoo.streaming_llm(start_size=2, recent_size=64).tiles(4096, 4096).sparsity.round(2)
np.float64(0.91)
"""

import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from jaxmask import checks
from jaxmask.description import is_beyond
from jaxmask.indices import Allowed, Index, by_example, common, inside, library, lookup
from jaxmask.mask import Mask
from jaxmask.masks import Causal, Chunked, Padding, Prefix, Segments, SlidingWindow, Window, refuse_other_keys
from jaxmask.positions import LIMIT, Extent, Scalar, clipped
from jaxmask.spans import Bounds, Span


class Axis(Mask):
    """A mask of one coordinate: of ``(position - start) // stride % size`` in place of the position.

    In a grid whose tokens are stored row by row, that is the coordinate on an axis of ``size``, along which neighbours
    are ``stride`` tokens apart. With a ``stride`` of 1 it is the position within a period of ``size``. Of a tile that
    reaches over the end of an axis no more is known than that it has both ends.

    Args:
        mask: of positions alone, without an element for each key.
        size, stride: numbers of positions, at least 1; ints, or traced scalars.
        start: the position of the first token of the grid, likewise.

    Raises:
        ValueError: ``size`` or ``stride`` is less than 1; ``mask`` holds an element for each key.

    >>> columns = Axis(Window(0, 0), size=2)  # of a grid two tokens wide
    >>> print(columns.dense(4, 4)[0, 0].astype(int))
    [[1 0 1 0]
     [0 1 0 1]
     [1 0 1 0]
     [0 1 0 1]]
    """

    mask: Mask
    size: Scalar
    stride: Scalar = 1
    start: Scalar = 0

    shape_is_complete = True

    def __post_init__(self) -> None:
        _check_positional("Axis", self.mask)
        self._set(
            size=checks.scalar("size", self.size, minimum=1),
            stride=checks.scalar("stride", self.stride, minimum=1),
            start=checks.scalar("start", self.start, -LIMIT, LIMIT),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.mask.shape

    def check(self, extent: Extent) -> None:
        super().check(extent)
        coordinates = None if checks.is_array(self.size) else (0, self.size - 1)
        self.mask.check(extent._replace(queries=coordinates, keys=coordinates, key_length=None, is_aligned=True))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, self._coordinate(q), self._coordinate(kv))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(b, h, q.at(self._coordinate(q.positions)), kv.at(self._coordinate(kv.positions)))

    def _coordinate(self, position: Any) -> Any:
        return (position - clipped(self.start)) // self.stride % self.size


class Reordered(Mask):
    """A mask of other positions: of ``positions[b, position]`` in place of the position.

    So a mask of an image stored row by row serves one that is stored tile by tile, and a mask of documents serves them
    packed into a row. What lies outside ``positions`` may not attend.

    Args:
        mask: of positions alone, without an element for each key.
        positions: integer ``[batch, length]``.

    Raises:
        TypeError: ``positions`` is no array of integers.
        ValueError: ``positions`` has another rank; ``mask`` holds an element for each key.

    >>> print(Reordered(Causal(), np.array([[2, 0, 1]])).dense(3, 3)[0, 0].astype(int))
    [[1 1 1]
     [0 1 0]
     [0 1 1]]
    """

    mask: Mask
    positions: Int[Array | np.ndarray, "batch length"]

    shape_is_complete = True

    def __post_init__(self) -> None:
        _check_positional("Reordered", self.mask)
        # As int32, for in fewer bits a difference of positions could overflow.
        positions = checks.array("positions", self.positions, "i", 2)
        self._set(positions=checks.int32("positions", positions, -LIMIT, LIMIT))

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _ = self.mask.shape
        return common(batch, self.positions.shape[0]), heads, 1

    def check(self, extent: Extent) -> None:
        super().check(extent)
        self.mask.check(extent._replace(queries=None, keys=None, key_length=None, is_aligned=True))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        moved = self.mask.allows(b, h, lookup(self.positions, b=b, q=q), lookup(self.positions, b=b, kv=kv))
        return moved & self._has(q) & self._has(kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        queries, keys = lookup(self.positions, b=b, q=q.positions), lookup(self.positions, b=b, kv=kv.positions)
        some, every = self.mask.tile_bounds(b, h, q.at(queries), kv.at(keys))
        has_query, has_key = self._has(q.positions), self._has(kv.positions)
        return some & q.most(has_query) & kv.most(has_key), every & q.least(has_query) & kv.least(has_key)

    def _has(self, position: Index) -> Allowed:
        return inside(position, self.positions.shape[1])


class Transposed(Mask):
    """A mask with queries and keys in each other's place: whether the key would attend to the query.

    ``Prefix(n) | Transposed(Prefix(n))`` makes the first tokens global: all attend to them, and they to all.

    Args:
        mask: where it has an element for each key, that is now for each position of a query.

    Raises:
        ValueError: when the mask is read, at queries of which it has no element.

    >>> print(Transposed(Prefix(1)).dense(2, 2)[0, 0].astype(int))
    [[1 1]
     [0 0]]
    """

    mask: Mask

    shape_is_complete = True

    def __post_init__(self) -> None:
        _check_mask("Transposed", self.mask)

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _ = self.mask.shape
        return batch, heads, 1

    def check(self, extent: Extent) -> None:
        super().check(extent)
        given = self.mask.shape[2]
        if given != 1 and is_beyond(extent.queries, given):
            raise ValueError(
                f"{self!r} describes {given} positions of queries, but queries up to position "
                f"{extent.queries and extent.queries[1]} were asked for"
            )
        self.mask.check(extent._replace(queries=extent.keys, keys=None, key_length=None, is_aligned=True))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, kv, q)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(b, h, kv, q)


class Blocks(Mask):
    """Blocks of queries attend to blocks of keys: ``allowed[b, h, (q - start) // size, (kv - start) // size]``.

    The layout of block-sparse attention. What lies outside the table may not attend. Its tiles are exact, whatever the
    size of blocks.

    Args:
        allowed: bool, ``[q_blocks, kv_blocks]`` or ``[batch, heads, q_blocks, kv_blocks]``, where a batch or a number
            of heads of 1 serves every index.
        size: number of positions in a block, at least 1; an int, or a traced scalar.
        start: position of the first block, where it is not 0; an int, or a traced int32 ``[]`` or ``[batch]``.

    Raises:
        TypeError: ``allowed`` is not bool.
        ValueError: ``allowed`` has another rank; ``size`` is less than 1.

    >>> Blocks(np.array([[True, False], [True, True]]), size=2).dense(3, 3)
    Array([[[[ True,  True, False],
             [ True,  True, False],
             [ True,  True,  True]]]], dtype=bool)
    """

    allowed: Bool[Array | np.ndarray, "q_blocks kv_blocks"] | Bool[Array | np.ndarray, "batch heads q_blocks kv_blocks"]
    size: Scalar
    start: Scalar | Int[Array | np.ndarray, "batch"] = 0

    shape_is_complete = True

    def __post_init__(self) -> None:
        checks.array("allowed", self.allowed, "b", 2, 4)
        self._set(
            size=checks.scalar("size", self.size, minimum=1),
            start=checks.scalar("start", self.start, -LIMIT, LIMIT, ranks=(0, 1)),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, *_ = (1, 1, *self.allowed.shape)[-4:]
        return common(batch, np.size(self.start)), heads, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        q, kv = self._block(b, q), self._block(b, kv)
        q_blocks, kv_blocks = self.allowed.shape[-2:]
        return lookup(self.allowed, b=b, h=h, q=q, kv=kv) & inside(q, q_blocks) & inside(kv, kv_blocks)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        # A tile is a rectangle of the table, and the sums over all that is above and to the left of its four corners
        # say how many of its blocks are allowed.
        sums = self.allowed.cumsum(-2).cumsum(-1)

        def above_left(q: Any, kv: Any) -> Any:
            return lookup(sums, b=b, h=h, q=q - 1, kv=kv - 1) * ((q > 0) & (kv > 0))

        top, bottom = self._block(b, q.min), self._block(b, q.max) + 1
        left, right = self._block(b, kv.min), self._block(b, kv.max) + 1
        found = above_left(bottom, right) - above_left(top, right) - above_left(bottom, left) + above_left(top, left)
        return found > 0, found == (bottom - top) * (right - left)

    def _block(self, b: Index, position: Any) -> Any:
        return (position - by_example(clipped(self.start), b)) // self.size


class Between(Mask):
    """A key serves an interval of queries: ``start[b, kv] <= q < end[b, kv]``.

    Source: a column of FlashMask (https://arxiv.org/abs/2410.01359).

    Args:
        start, end: integer ``[batch, kv]``: the position of the first query that attends to a key, and of the first
            after these that does not.

    Raises:
        TypeError: they are no arrays of integers.
        ValueError: they have another rank, or differ in shape.

    >>> print(Between(np.array([[0, 1]]), np.array([[3, 2]])).dense(3, 2, offset=0)[0, 0].astype(int))
    [[1 0]
     [1 1]
     [1 0]]
    """

    start: Int[Array | np.ndarray, "batch kv"]
    end: Int[Array | np.ndarray, "batch kv"]

    keys_by_index, shape_is_complete = True, True

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            ends = checks.array(name, getattr(self, name), "i", 2)
            self._set(**{name: checks.int32(name, ends, -checks.INT32_MAX)})
        if self.start.shape != self.end.shape:
            raise ValueError(
                f"start and end must have the same shape, got {checks.describe(self.start)} and "
                f"{checks.describe(self.end)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.start.shape[0], 1, self.start.shape[1]

    def check(self, extent: Extent) -> None:
        refuse_other_keys(self, "start", self.start, extent)
        super().check(extent)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        served = (lookup(self.start, b=b, kv=kv) <= q) & (q < lookup(self.end, b=b, kv=kv))
        return served & inside(kv, self.start.shape[1])

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        start, end = lookup(self.start, b=b, kv=kv.positions), lookup(self.end, b=b, kv=kv.positions)
        has_key = inside(kv.positions, self.start.shape[1])
        some = (kv.least(start) <= q.max) & (q.min < kv.most(end))
        every = (kv.most(start) <= q.min) & (q.max < kv.least(end))
        return some & kv.most(has_key), every & kv.least(has_key)


def prefix_lm(prefix_length: Scalar | Int[Array | np.ndarray, "batch"]) -> Mask:
    """A prefix that all attend to, and causal attention after it.

    Source: T5, https://arxiv.org/abs/1910.10683; attn-gym's ``generate_prefix_lm_mask``.

    Args:
        prefix_length: number of tokens, at least 0; an int, or a traced int32 ``[]`` or ``[batch]``.

    >>> print(prefix_lm(2).dense(3, 3)[0, 0].astype(int))
    [[1 1 0]
     [1 1 0]
     [1 1 1]]
    """
    checks.scalar("prefix_length", prefix_length, minimum=0, ranks=(0, 1))
    return Causal() | Prefix(prefix_length)


def streaming_llm(start_size: Scalar, recent_size: Scalar) -> Mask:
    """Attention sinks and a window: the first ``start_size`` tokens, and the last ``recent_size``, itself included.

    Source: StreamingLLM, https://arxiv.org/abs/2309.17453. Its cache holds these tokens and no other, of which
    :meth:`Mask.dense` is told by ``key_positions``; :func:`ring_positions` are those of the window.

    Args:
        start_size, recent_size: numbers of tokens, at least 0 and 1; ints, or traced scalars.

    >>> print(streaming_llm(1, 2).dense(5, 5)[0, 0].astype(int))
    [[1 0 0 0 0]
     [1 1 0 0 0]
     [1 1 1 0 0]
     [1 0 1 1 0]
     [1 0 0 1 1]]
    """
    checks.scalar("start_size", start_size, minimum=0)
    checks.scalar("recent_size", recent_size, minimum=1)
    return Causal() & (Prefix(start_size) | SlidingWindow(recent_size))


def ring_positions(
    size: int, length: Scalar | Int[Array | np.ndarray, "batch"]
) -> Int[Array, "size"] | Int[Array, "batch size"]:
    """The ``key_positions`` of a ring buffer of ``size`` slots, into which ``length`` tokens were written in turn.

    Source: the rolling buffer cache of Mistral, https://arxiv.org/abs/2310.06825: token ``i`` is in slot ``i % size``.

    Args:
        size: number of slots, static.
        length: number of tokens so far, the newest included; an int, or a traced int32 ``[]`` or ``[batch]``.

    Returns:
        int32 ``[size]`` or ``[batch, size]``, negative where a slot is still empty.

    >>> ring_positions(4, length=6)
    Array([4, 5, 2, 3], dtype=int32)
    >>> SlidingWindow(3).dense(1, 4, offset=5, key_positions=ring_positions(4, length=6))
    Array([[[[ True,  True, False,  True]]]], dtype=bool)
    """
    checks.integer("size", size, minimum=1)
    checks.scalar("length", length, minimum=0, ranks=(0, 1))
    last = jnp.asarray(length)[..., None] - 1
    return (last - (last - np.arange(size)) % size).astype(jnp.int32)


def dilated_sliding_window(window_size: Scalar, dilation: Scalar) -> Mask:
    """Every ``dilation``-th key up to ``window_size`` before and after: ``|q - kv| <= window_size``, a multiple.

    Source: Longformer, https://arxiv.org/abs/2004.05150; attn-gym's ``generate_dilated_sliding_window``.

    Args:
        window_size: number of positions to one side, at least 0; an int, or a traced scalar.
        dilation: the step between keys, at least 1; likewise.

    >>> print(dilated_sliding_window(2, 2).dense(4, 4)[0, 0].astype(int))
    [[1 0 1 0]
     [0 1 0 1]
     [1 0 1 0]
     [0 1 0 1]]
    """
    checks.scalar("window_size", window_size, minimum=0)
    checks.scalar("dilation", dilation, minimum=1)
    # No further than the last key that is a multiple away, so that the tiles beyond it are known to be empty.
    reach = window_size - window_size % dilation
    return Window(reach, reach) & Axis(Chunked(1), size=dilation)


def global_sliding_window(window_size: Scalar, is_global: Shaped[Array | np.ndarray, "batch length"]) -> Mask:
    """A window to both sides, and global tokens: all attend to them, and they to all.

    Source: Longformer, https://arxiv.org/abs/2004.05150; attn-gym's ``generate_global_sliding_window``.

    Args:
        window_size: number of positions to one side, at least 0; an int, or a traced scalar.
        is_global: bool or 0/1 ``[batch, length]``.

    >>> print(global_sliding_window(1, np.array([[1, 0, 0, 0]])).dense(4, 4)[0, 0].astype(int))
    [[1 1 1 1]
     [1 1 1 0]
     [1 1 1 1]
     [1 0 1 1]]
    """
    checks.scalar("window_size", window_size, minimum=0)
    checks.array("is_global", is_global, "bi", 2)
    return Window(window_size, window_size) | _both_ways(Padding(is_global))


def longformer(
    attention_window: int, is_global: Shaped[Array | np.ndarray, "batch length"], dilation: Scalar = 1
) -> Mask:
    """A window, dilated in the upper layers, and global tokens: all attend to them, and they to all.

    Source: Longformer, https://arxiv.org/abs/2004.05150, and its ``LongformerConfig`` and ``global_attention_mask`` in
    Transformers. Heads of different dilation are :class:`PerHead` of these.

    Args:
        attention_window: number of keys besides its own, half of them to each side: even, at least 2, static.
        is_global: bool or 0/1 ``[batch, length]``.
        dilation: the step between the keys of the window, at least 1; an int, or a traced scalar.

    >>> print(longformer(2, np.array([[1, 0, 0, 0, 0]]), dilation=2).dense(5, 5)[0, 0].astype(int))
    [[1 1 1 1 1]
     [1 1 0 1 0]
     [1 0 1 0 1]
     [1 1 0 1 0]
     [1 0 1 0 1]]
    """
    if checks.integer("attention_window", attention_window, minimum=2) % 2:
        raise ValueError(f"attention_window must be even, half of it to each side, got {attention_window}")
    checks.scalar("dilation", dilation, minimum=1)
    checks.array("is_global", is_global, "bi", 2)
    return dilated_sliding_window(attention_window // 2 * dilation, dilation) | _both_ways(Padding(is_global))


def bigbird(random_blocks: Int[Array | np.ndarray, "heads middle_blocks random"], block_size: Scalar) -> Mask:
    """Blocks that attend to their neighbours, to the first, to the last, and to some at random; the ends, to all.

    Source: BigBird, https://arxiv.org/abs/2007.14062, and ``bigbird_block_sparse_attention`` in Transformers, where the
    random blocks are ``rand_attn``.

    Args:
        random_blocks: the blocks of keys given to each block of queries but the first and the last, for each head; as
            from :func:`bigbird_random_blocks`.
        block_size: number of tokens in a block, at least 1; an int, or a traced scalar.

    >>> random_blocks = np.array([[[3], [5], [1], [2], [3]]])
    >>> print(bigbird(random_blocks, block_size=1).dense(7, 7)[0, 0].astype(int))
    [[1 1 1 1 1 1 1]
     [1 1 1 1 0 0 1]
     [1 1 1 1 0 1 1]
     [1 1 1 1 1 0 1]
     [1 0 1 1 1 1 1]
     [1 0 0 1 1 1 1]
     [1 1 1 1 1 1 1]]
    """
    checks.fits_int32("random_blocks", checks.array("random_blocks", random_blocks, "i", 3))
    checks.scalar("block_size", block_size, minimum=1)
    blocks = random_blocks.shape[1] + 2
    q, kv = np.indices((blocks, blocks))
    given = (abs(q - kv) <= 1) | np.isin(q, (0, blocks - 1)) | np.isin(kv, (0, blocks - 1))
    # The first and the last block of queries have no row of their own, and attend to all whatever it says.
    rows = random_blocks[:, np.clip(np.arange(blocks) - 1, 0, blocks - 3)]
    return Blocks((given | (rows[..., None] == np.arange(blocks)).any(2))[None], block_size)


def bigbird_random_blocks(
    seed: int, heads: int, blocks: int, count: int
) -> Int[np.ndarray, "heads middle_blocks count"]:
    """``count`` blocks of keys at random for each block of queries that has no global attention, for :func:`bigbird`.

    Source: BigBird, https://arxiv.org/abs/2007.14062: they are neither neighbours nor global, and all different.

    Args:
        seed: of NumPy's generator; the same blocks for the same seed.
        heads, blocks: numbers of heads and of blocks in the sequence.
        count: number of random blocks, at most ``blocks - 5``.

    >>> bigbird_random_blocks(seed=0, heads=1, blocks=7, count=2).tolist()
    [[[4, 5], [5, 4], [5, 1], [2, 1], [2, 3]]]
    """
    checks.integer("heads", heads, minimum=1)
    if checks.integer("count", count, minimum=1) > checks.integer("blocks", blocks, minimum=3) - 5:
        raise ValueError(
            f"count must be at most blocks - 5, for neighbours and global blocks are attended to anyway, got {count} "
            f"of {blocks} blocks"
        )
    random, middle = np.random.default_rng(seed), np.arange(1, blocks - 1)
    far = [middle[abs(middle - block) > 1] for block in middle]
    return np.array([[random.choice(others, count, replace=False) for others in far] for _ in range(heads)], np.int32)


def gemma3(block_sequence_ids: Int[Array | np.ndarray, "batch length"], sliding_window: Scalar | None = None) -> Mask:
    """Text that attends causally, and images within which every token attends to every other.

    Source: Gemma 3, https://arxiv.org/abs/2503.19786, and ``blockwise_overlay`` in Transformers' ``masking_utils``.

    Args:
        block_sequence_ids: integer ``[batch, length]``: the image to which a token belongs, negative for text.
        sliding_window: number of keys of a local layer, at least 1; an int, or a traced scalar. ``None`` for a global
            layer.

    >>> print(gemma3(np.array([[-1, 0, 0, -1]])).dense(4, 4)[0, 0].astype(int))
    [[1 0 0 0]
     [1 1 1 0]
     [1 1 1 0]
     [1 1 1 1]]
    """
    checks.fits_int32("block_sequence_ids", checks.array("block_sequence_ids", block_sequence_ids, "i", 2))
    if sliding_window is not None:
        checks.scalar("sliding_window", sliding_window, minimum=1)
    text = Causal() if sliding_window is None else SlidingWindow(sliding_window)
    # Of queries, which have positions, and not of keys, which a ring buffer holds in another order.
    return text | Segments(block_sequence_ids) & Transposed(Padding(block_sequence_ids >= 0))


def document(mask: Mask, segment_ids: Int[Array | np.ndarray, "batch length"]) -> Mask:
    """``mask`` within each of several documents that are packed into a row, at positions that count from its start.

    Causal masks and windows see only how far a key is from a query: of them ``mask & Segments(segment_ids)`` says the
    same, and more of the tiles. A prefix or chunks need the positions. Source: attn-gym's ``generate_doc_mask_mod``,
    whose ``offsets`` are where the ids change; https://arxiv.org/abs/2107.02027.

    Args:
        mask: of positions alone, without an element for each key.
        segment_ids: integer ``[batch, length]``, equal and consecutive within a document.

    >>> print(document(prefix_lm(2), np.array([[0, 0, 0, 1, 1]])).dense(5, 5)[0, 0].astype(int))
    [[1 1 0 0 0]
     [1 1 0 0 0]
     [1 1 1 0 0]
     [0 0 0 1 1]
     [0 0 0 1 1]]
    """
    ids = checks.array("segment_ids", segment_ids, "i", 2)
    xp = library(ids)
    index = np.arange(ids.shape[1], dtype=np.int32)
    is_first = ids != xp.roll(ids, 1, axis=1)
    first = xp.maximum.accumulate(xp.where(is_first, index, 0), axis=1)
    return Segments(ids) & Reordered(mask, index - first)


def shared_prefix(
    segment_ids: Int[Array | np.ndarray, "batch length"], prefix_ids: Int[Array | np.ndarray, "batch documents"]
) -> Mask:
    """Packed documents that continue others: causal within a document, and all of its prefix before it.

    So a prompt is there once for all of its answers. Source: attn-gym's ``generate_shared_prefix_mask_mod``, whose
    ``prefix_document_id`` is ``prefix_ids``; Prefix Grouper, https://arxiv.org/abs/2506.05433.

    Args:
        segment_ids: integer ``[batch, length]``: the document of each token, from 0 on.
        prefix_ids: integer ``[batch, documents]``: the document that each continues, or itself.

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
    own = Segments(ids)
    before = Segments(library(ids, prefix).take_along_axis(prefix, ids, axis=1), ids)
    return Causal() & own | before & ~own


def vision_cross_attention(intervals: Int[Array | np.ndarray, "batch images 2"], image_token_length: int) -> Mask:
    """Cross attention from text to images, each of which serves an interval of the text.

    Source: Flamingo, https://arxiv.org/abs/2204.14198; attn-gym's ``generate_vision_cross_attention_mask_mod``. Read it
    with ``offset=0``, for text and images are of different lengths.

    Args:
        intervals: integer ``[batch, images, 2]``: for each image, the first position of its text and the first after.
        image_token_length: number of tokens in an image, at least 1, static.

    >>> mask = vision_cross_attention(np.array([[[0, 2], [1, 3]]]), image_token_length=2)
    >>> print(mask.dense(3, 4, offset=0)[0, 0].astype(int))
    [[1 1 0 0]
     [1 1 1 1]
     [0 0 1 1]]
    """
    checks.fits_int32("intervals", checks.array("intervals", intervals, "i", 3))
    if intervals.shape[2] != 2:
        raise ValueError(f"intervals must be [batch, images, 2], got {checks.describe(intervals)}")
    checks.integer("image_token_length", image_token_length, minimum=1)
    start, end = (intervals[..., side].repeat(image_token_length, axis=1) for side in (0, 1))
    return Between(start, end)


def natten(canvas: Sequence[int], kernel: Sequence[int]) -> Mask:
    """Neighbourhood attention: in an image stored row by row, the ``kernel`` around a token, moved inside at the edges.

    Source: https://arxiv.org/abs/2204.07143; attn-gym's ``generate_natten``, where an even kernel has one token more.
    In several images, or frames, one after the other: ``Chunked(math.prod(canvas)) & natten(canvas, kernel)``.

    Args:
        canvas, kernel: sizes in tokens on each axis, such as ``(height, width)``, at least 1, static.

    >>> print(natten((4,), (3,)).dense(4, 4)[0, 0].astype(int))
    [[1 1 1 0]
     [1 1 1 0]
     [0 1 1 1]
     [0 1 1 1]]
    """
    _check_axes(canvas=canvas, kernel=kernel)
    return _neighbours(canvas, [size // 2 * 2 + 1 for size in kernel])


def tiled_natten(canvas: Sequence[int], kernel: Sequence[int], tile: Sequence[int]) -> Mask:
    """Neighbourhood attention in an image stored tile by tile, of which blocks of tokens are the whole of few tiles.

    Source: https://arxiv.org/abs/2403.04690; attn-gym's ``generate_tiled_natten``.

    Args:
        canvas, kernel, tile: sizes in tokens on each axis, such as ``(height, width)``, at least 1, static; whole
            tiles fill the canvas.

    >>> print(tiled_natten((2, 4), (1, 3), tile=(2, 2)).dense(8, 8)[0, 0].astype(int))
    [[1 1 0 0 1 0 0 0]
     [1 1 0 0 1 0 0 0]
     [0 0 1 1 0 0 1 0]
     [0 0 1 1 0 0 1 0]
     [0 1 0 0 1 1 0 0]
     [0 1 0 0 1 1 0 0]
     [0 0 0 1 0 0 1 1]
     [0 0 0 1 0 0 1 1]]
    """
    _check_axes(canvas=canvas, kernel=kernel, tile=tile)
    _check_fills(canvas=canvas, tile=tile)
    split = [size for sides in zip(_divided(canvas, tile), tile, strict=True) for size in sides]
    order = np.arange(math.prod(canvas), dtype=np.int32).reshape(split)
    tiles_first = order.transpose(*range(0, order.ndim, 2), *range(1, order.ndim, 2))
    return Reordered(natten(canvas, kernel), tiles_first.reshape(1, -1))


def morton_natten(canvas: tuple[int, int], kernel: tuple[int, int]) -> Mask:
    """Neighbourhood attention in an image stored along a Morton curve, of which every block of tokens is compact.

    Source: attn-gym's ``generate_morton_natten``; https://arxiv.org/abs/2204.07143.

    Args:
        canvas: ``(height, width)`` in tokens: powers of 2, the width as much as the height or twice that, for no other
            canvas is filled by the curve; static.
        kernel: ``(height, width)`` in tokens, at least 1, static.

    >>> print(morton_natten((2, 4), (1, 3)).dense(8, 8)[0, 0].astype(int))
    [[1 1 0 0 1 0 0 0]
     [1 1 0 0 1 0 0 0]
     [0 0 1 1 0 0 1 0]
     [0 0 1 1 0 0 1 0]
     [0 1 0 0 1 1 0 0]
     [0 1 0 0 1 1 0 0]
     [0 0 0 1 0 0 1 1]
     [0 0 0 1 0 0 1 1]]
    """
    _check_axes(canvas=canvas, kernel=kernel)
    # The bits of a position are those of the column and of the row in turn, from the lowest on.
    index = np.arange(math.prod(canvas), dtype=np.int32)
    zero = np.zeros_like(index)
    row, column = (sum(((index >> 2 * bit + odd & 1) << bit for bit in range(16)), start=zero) for odd in (1, 0))
    if row.max() >= canvas[0] or column.max() >= canvas[1]:
        raise ValueError(
            "canvas must be filled by a Morton curve: powers of 2, the width as much as the height or twice that, got "
            f"{canvas}"
        )
    return Reordered(natten(canvas, kernel), (row * canvas[1] + column)[None])


def sta(canvas: Sequence[int], kernel: Sequence[int], tile: Sequence[int], text_seq_len: int = 0) -> Mask:
    """Sliding tile attention: neighbourhood attention of whole tiles, in a video, or an image, stored tile by tile.

    After it there may be text, which attends to all and to which all attend. Source: https://arxiv.org/abs/2502.04507;
    attn-gym's ``generate_sta_mask_mod_2d`` and ``_3d``.

    Args:
        canvas, kernel, tile: sizes in tokens on each axis, such as ``(time, height, width)``, at least 1, static; whole
            tiles fill canvas and kernel.
        text_seq_len: number of tokens of text, static.

    >>> print(sta((4,), (2,), (1,), text_seq_len=1).dense(5, 5)[0, 0].astype(int))
    [[1 1 0 0 1]
     [1 1 0 0 1]
     [0 1 1 0 1]
     [0 0 1 1 1]
     [1 1 1 1 1]]
    """
    _check_axes(canvas=canvas, kernel=kernel, tile=tile)
    _check_fills(canvas=canvas, tile=tile)
    _check_fills(kernel=kernel, tile=tile)
    checks.integer("text_seq_len", text_seq_len, minimum=0)
    vision, text = Prefix(math.prod(canvas)), math.prod(canvas) + text_seq_len
    near = _neighbours(_divided(canvas, tile), _divided(kernel, tile), stride=math.prod(tile))
    return (near | _both_ways(~vision)) & Prefix(text)


def svg_spatial_head(
    prompt_length: int, token_per_frame: int, width: int, attn_sink: bool = False, round_width: int = 128
) -> Mask:
    """A window of ``width`` frames of a video, after a prompt that attends to all and to which all attend.

    Source: Sparse VideoGen, https://arxiv.org/abs/2502.01776; attn-gym's ``generate_spatial_head_mask_mod``.

    Args:
        prompt_length, token_per_frame: numbers of tokens.
        width: number of frames.
        attn_sink: whether all attend to the first frame, too.
        round_width: the window is rounded down to a multiple of it, in tokens.

    >>> print(svg_spatial_head(1, token_per_frame=2, width=1, round_width=1).dense(5, 5)[0, 0].astype(int))
    [[1 1 1 1 1]
     [1 1 1 0 0]
     [1 1 1 1 0]
     [1 0 1 1 1]
     [1 0 0 1 1]]
    """
    checks.integer("prompt_length", prompt_length, minimum=0)
    checks.integer("token_per_frame", token_per_frame, minimum=1)
    checks.integer("round_width", round_width, minimum=1)
    near = checks.integer("width", width, minimum=1) * token_per_frame // round_width * round_width
    checks.integer("width * token_per_frame, rounded down to a multiple of round_width,", near, minimum=1)
    prompt, sink = Prefix(prompt_length), Prefix(prompt_length + token_per_frame * attn_sink)
    return sink | Transposed(prompt) | Window(near - 1, near - 1)


def svg_temporal_head(prompt_length: int, num_frames: int, token_per_frame: int, width: int) -> Mask:
    """The same place in all frames of a video, and nearby, after a prompt as of :func:`svg_spatial_head`.

    Source: Sparse VideoGen, https://arxiv.org/abs/2502.01776; attn-gym's ``generate_temporal_head_mask_mod``.

    Args:
        prompt_length, token_per_frame: numbers of tokens.
        num_frames, width: numbers of frames: ``width * token_per_frame // num_frames`` tokens are near.

    >>> print(svg_temporal_head(1, num_frames=2, token_per_frame=2, width=1).dense(5, 5)[0, 0].astype(int))
    [[1 1 1 1 1]
     [1 1 0 1 0]
     [1 0 1 0 1]
     [1 1 0 1 0]
     [1 0 1 0 1]]
    """
    checks.integer("prompt_length", prompt_length, minimum=0)
    checks.integer("num_frames", num_frames, minimum=1)
    checks.integer("token_per_frame", token_per_frame, minimum=1)
    near = checks.integer("width", width, minimum=1) * token_per_frame // num_frames
    checks.integer("width * token_per_frame // num_frames", near, minimum=1)
    frames = Axis(Window(near - 1, near - 1), token_per_frame, start=prompt_length)
    return _both_ways(Prefix(prompt_length)) | frames


def jetspec_tree(
    prefix_length: Scalar | Int[Array | np.ndarray, "batch"],
    ancestors: Bool[Array | np.ndarray, "nodes nodes"] | Bool[Array | np.ndarray, "batch heads nodes nodes"],
) -> Mask:
    """A tree of drafted tokens after a prefix: a node attends to the prefix, to its ancestors and to itself.

    Source: JetSpec, https://arxiv.org/abs/2606.18394; attn-gym's ``generate_jetspec_tree_causal_mask_mod``. The nodes
    follow the prefix: read it with ``offset=prefix_length``, where attn-gym counts queries from 0.

    Args:
        prefix_length: number of tokens, at least 0; an int, or a traced int32 ``[]`` or ``[batch]``.
        ancestors: bool ``[nodes, nodes]`` or ``[batch, 1, nodes, nodes]``, as from :func:`tree_ancestors`.

    >>> print(jetspec_tree(1, tree_ancestors([-1, 0, 0])).dense(3, 4, offset=1)[0, 0].astype(int))
    [[1 1 0 0]
     [1 1 1 0]
     [1 1 0 1]]
    """
    checks.scalar("prefix_length", prefix_length, minimum=0, ranks=(0, 1))
    checks.array("ancestors", ancestors, "b", 2, 4)
    return Prefix(prefix_length) | Blocks(ancestors, size=1, start=prefix_length)


def tree_ancestors(parents: Sequence[int]) -> Bool[np.ndarray, "nodes nodes"]:
    """Whether ``[i, j]`` of a tree, node ``j`` is an ancestor of node ``i``, or itself: for :func:`jetspec_tree`.

    Source: attn-gym's ``build_tree_ancestor_matrix``.

    Args:
        parents: the parent of each node, which comes before it; that of the first, the root, is not looked at.

    >>> print(tree_ancestors([-1, 0, 1]).astype(int))
    [[1 0 0]
     [1 1 0]
     [1 1 1]]
    """
    ancestors = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents[1:], start=1):
        if not 0 <= parent < node:
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
    checks.scalar("prefix_length", prefix_length, minimum=0)
    checks.scalar("block_size", block_size, minimum=1)
    return Prefix(prefix_length) | Causal() & Chunked(block_size, start=prefix_length)


def block_diffusion(seq_len: Scalar, block_size: Scalar) -> Mask:
    """``seq_len`` noised tokens and then as many clean ones: each block sees itself, and the clean blocks before it.

    Source: BD3-LM, https://arxiv.org/abs/2503.09573; attn-gym's ``generate_block_diffusion_mask``.

    Args:
        seq_len: number of clean tokens, half of what is attended over, at least 1; an int, or a traced scalar.
        block_size: number of tokens in a block, at least 1; likewise.

    >>> print(block_diffusion(2, block_size=1).dense(4, 4)[0, 0].astype(int))
    [[1 0 0 0]
     [0 1 1 0]
     [0 0 1 0]
     [0 0 1 1]]
    """
    checks.scalar("seq_len", seq_len, minimum=1)
    checks.scalar("block_size", block_size, minimum=1)
    itself, before = Chunked(block_size), Causal() & ~Chunked(block_size)
    return Chunked(seq_len) & Axis(itself, seq_len) | ~Prefix(seq_len) & Axis(before, seq_len)


def batchify(mask: Mask, batchify_size: Scalar) -> Mask:
    """``mask`` within each of several examples of one length that are laid into a row.

    Causal masks and windows see only how far a key is from a query: of them ``Chunked(batchify_size) & mask`` says the
    same, and more of the tiles. Source: attn-gym's ``batchify_mask_mod``.

    Args:
        mask: of positions alone, without an element for each key.
        batchify_size: number of tokens in an example, at least 1; an int, or a traced scalar.

    >>> print(batchify(Prefix(1), 2).dense(4, 4)[0, 0].astype(int))
    [[1 0 0 0]
     [1 0 0 0]
     [0 0 1 0]
     [0 0 1 0]]
    """
    checks.scalar("batchify_size", batchify_size, minimum=1)
    return Chunked(batchify_size) & Axis(mask, batchify_size)


def vsa(
    topk_indices: Int[Array | np.ndarray, "batch heads q_tiles top_k"],
    tile_numel: int,
    num_kv_tiles: int,
    variable_block_sizes: Int[Array | np.ndarray, "batch kv_tiles"] | None = None,
) -> Mask:
    """Video sparse attention: each tile of queries attends to the tiles of keys that were chosen for it.

    Source: https://arxiv.org/abs/2505.13389; attn-gym's ``generate_vsa_mask_mod``.

    Args:
        topk_indices: integer ``[batch, heads, q_tiles, top_k]``: the tiles chosen, which may be traced.
        tile_numel: number of tokens in a tile, at least 1, static.
        num_kv_tiles: number of tiles of keys, static.
        variable_block_sizes: integer ``[batch, kv_tiles]``: how many tokens of a tile are no padding.

    >>> print(vsa(np.array([[[[1], [0]]]]), tile_numel=2, num_kv_tiles=2).dense(4, 4)[0, 0].astype(int))
    [[0 0 1 1]
     [0 0 1 1]
     [1 1 0 0]
     [1 1 0 0]]
    """
    checks.fits_int32("topk_indices", checks.array("topk_indices", topk_indices, "i", 4))
    checks.integer("tile_numel", tile_numel, minimum=1)
    checks.integer("num_kv_tiles", num_kv_tiles, minimum=1)
    chosen = Blocks((topk_indices[..., None] == np.arange(num_kv_tiles)).any(3), tile_numel)
    if variable_block_sizes is None:
        return chosen
    sizes = checks.array("variable_block_sizes", variable_block_sizes, "i", 2)
    if sizes.shape[1] != num_kv_tiles:
        raise ValueError(
            f"variable_block_sizes must have a size for each of {num_kv_tiles} tiles of keys, got "
            f"{checks.describe(sizes)}"
        )
    return chosen & Padding((np.arange(tile_numel) < sizes[..., None]).reshape(sizes.shape[0], -1))


def _both_ways(mask: Mask) -> Mask:
    """A mask of the keys that all attend to, and these, as queries, attend to all."""
    return mask | Transposed(mask)


def _neighbours(canvas: Sequence[int], kernel: Sequence[int], stride: int = 1) -> Mask:
    """Neighbours on every axis of a canvas stored row by row, of elements of ``stride`` tokens."""
    strides = [stride * math.prod(canvas[axis + 1 :]) for axis in range(len(canvas))]
    axes = (Axis(_near(*sizes), sizes[0], step) for *sizes, step in zip(canvas, kernel, strides, strict=True))
    return reduce(operator.and_, axes)


def _near(size: int, kernel: int) -> Mask:
    """On one axis, the ``kernel`` around a coordinate: moved inside, where it would reach over an edge."""
    kernel = min(kernel, size)
    not_before = Window(kernel // 2, None) | ~Prefix(size - kernel)
    not_after = Window(None, (kernel - 1) // 2) | Prefix(kernel)
    return not_before & not_after


def _divided(sizes: Sequence[int], by: Sequence[int]) -> list[int]:
    return [size // divisor for size, divisor in zip(sizes, by, strict=True)]


def _check_mask(name: str, mask: Any) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask of {name} must be a mask, got {checks.describe(mask)}")


def _check_positional(name: str, mask: Any) -> None:
    _check_mask(name, mask)
    if mask.shape[2] != 1:
        raise ValueError(
            f"mask of {name} must be one of positions, got {mask!r}, which has an element for each of {mask.shape[2]} "
            "keys: combine that one with the result, by &"
        )


def _check_axes(**sizes: Sequence[int]) -> None:
    """Refuse sizes of a grid that are not positive ints, and as many as those of the first."""
    first = next(iter(sizes))
    for name, value in sizes.items():
        if not isinstance(value, tuple | list) or len(value) != len(sizes[first]) or not value:
            raise ValueError(f"{name} must have a size for each axis of {first}, got {value!r} for {sizes[first]!r}")
        for axis, size in enumerate(value):
            checks.integer(f"{name}[{axis}]", size, minimum=1)


def _check_fills(**sizes: Sequence[int]) -> None:
    (name, whole), (part, parts) = sizes.items()
    if any(size % divisor for size, divisor in zip(whole, parts, strict=True)):
        raise ValueError(f"{name} must be filled by whole {part}s, got {tuple(whole)} and {tuple(parts)}")
