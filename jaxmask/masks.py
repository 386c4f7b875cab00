"""The vocabulary: the masks that others are made of.

Each says what it means in ``allows``, for pairs, and again in ``tile_bounds``, for tiles of pairs.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxmask import checks
from jaxmask.description import is_beyond
from jaxmask.indices import Allowed, Index, by_example, common, inside, lookup
from jaxmask.mask import Mask, common_shape
from jaxmask.native import Native
from jaxmask.positions import LIMIT, Extent, KeyPositions, Scalar, clipped
from jaxmask.spans import Bounds, Span


class Causal(Mask):
    """A query attends to the keys up to its own position: ``kv <= q``.

    Source: ``causal_mask_function`` in Transformers' ``masking_utils``.

    >>> Causal().dense(2, 2)
    Array([[[[ True, False],
             [ True,  True]]]], dtype=bool)
    """

    shape_is_complete = True

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv <= q

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return kv.min <= q.max, kv.max <= q.min

    def native(self) -> Native:
        return Native(right=0)


class SlidingWindow(Mask):
    """A query attends to the last ``size`` keys, its own included: ``q - size < kv <= q``.

    Source: ``sliding_window_causal_mask_function`` in Transformers' ``masking_utils``, and Mistral
    (https://arxiv.org/abs/2310.06825). The older ``AttentionMaskConverter(True, sliding_window)`` lets one key more
    through: ``SlidingWindow(sliding_window + 1)``.

    Args:
        size: number of keys, at least 1; an int, or a traced scalar, for which ``key_length`` means "no window".

    Raises:
        ValueError: ``size`` is less than 1.

    >>> SlidingWindow(2).dense(3, 3)
    Array([[[[ True, False, False],
             [ True,  True, False],
             [False,  True,  True]]]], dtype=bool)
    """

    size: Scalar

    shape_is_complete = True

    def __post_init__(self) -> None:
        self._set(size=checks.scalar("size", self.size, minimum=1))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return (kv <= q) & (q - kv < self.size)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        nearest, farthest = q.min - kv.max, q.max - kv.min
        return (farthest >= 0) & (nearest < self.size), (nearest >= 0) & (farthest < self.size)

    def native(self) -> Native:
        return Native(left=self.size - 1, right=0)


class Window(Mask):
    """A query attends to ``left`` keys before its position, itself, and ``right`` keys after.

    That is ``q - left <= kv <= q + right``; ``None`` is unbounded. Source: ``local_window_size`` of
    ``jax.nn.dot_product_attention``, ``window_size`` of FlashAttention (whose ``-1`` is ``None`` here).

    Args:
        left, right: number of keys, at least 0; an int, a traced scalar, or ``None``.

    Raises:
        ValueError: ``left`` or ``right`` is negative.

    >>> Window(0, 1).dense(3, 3)
    Array([[[[ True,  True, False],
             [False,  True,  True],
             [False, False,  True]]]], dtype=bool)
    """

    left: Scalar | None
    right: Scalar | None

    shape_is_complete = True

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                self._set(**{name: checks.scalar(name, getattr(self, name), minimum=0)})

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        # Differences, and not `q + right`, which could overflow.
        near_left = True if self.left is None else q - kv <= self.left
        near_right = True if self.right is None else kv - q <= self.right
        return near_left & near_right

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        some, every = True, True
        if self.left is not None:
            some, every = q.min - kv.max <= self.left, q.max - kv.min <= self.left
        if self.right is not None:
            some, every = some & (kv.min - q.max <= self.right), every & (kv.max - q.min <= self.right)
        return some, every

    def native(self) -> Native:
        return Native(left=self.left, right=self.right)


class Chunked(Mask):
    """A query attends to the keys in its own chunk: ``(q - start) // size == (kv - start) // size``.

    Llama 4's chunked attention is ``Causal() & Chunked(size)``. Source: ``chunked_overlay`` in Transformers'
    ``masking_utils``, whose ``left_padding`` is ``start``.

    Args:
        size: number of positions in a chunk, at least 1; an int, or a traced scalar.
        start: position of the first token, where it is not 0, as after left padding; an int, or a traced int32 ``[]``
            or ``[batch]``.

    Raises:
        ValueError: ``size`` is less than 1.

    >>> Chunked(2).dense(3, 3)
    Array([[[[ True,  True, False],
             [ True,  True, False],
             [False, False,  True]]]], dtype=bool)
    """

    size: Scalar
    start: Scalar | Int[Array | np.ndarray, "batch"] = 0

    shape_is_complete = True

    def __post_init__(self) -> None:
        self._set(
            size=checks.scalar("size", self.size, minimum=1),
            start=checks.scalar("start", self.start, minimum=-checks.INT32_MAX, ranks=(0, 1)),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        return np.size(self.start), 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self._chunk(b, q) == self._chunk(b, kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return _share(*(self._chunk(b, position) for position in (q.min, q.max, kv.min, kv.max)))

    def native(self) -> Native:
        def interval(b: Index, q: Index) -> tuple[Any, Any]:
            before = (q % self.size - by_example(self.start, b) % self.size) % self.size
            # Summed from the right, for no part of it may exceed an int32.
            return q - before, q + jnp.minimum(self.size - before, LIMIT)

        return Native(interval=interval)

    def _chunk(self, b: Index, position: Any) -> Any:
        """``(position - start) // size``, up to a number that is the same for all positions, and without overflow."""
        start = by_example(self.start, b) % self.size
        chunk = position // self.size
        return chunk if isinstance(start, int) and start == 0 else chunk - (position % self.size < start)


class Prefix(Mask):
    """Every query attends to the first ``length`` keys: ``kv < length``.

    With ``|`` it opens a prefix to a causal mask: a prefix language model (https://arxiv.org/abs/1910.10683), the
    prompts of p-tuning v2 (https://arxiv.org/abs/2110.07602), attention sinks (https://arxiv.org/abs/2309.17453).

    Args:
        length: number of keys, at least 0; an int, or a traced int32 ``[]`` or ``[batch]``.

    Raises:
        ValueError: ``length`` is negative.

    >>> (Causal() | Prefix(2)).dense(3, 3)
    Array([[[[ True,  True, False],
             [ True,  True, False],
             [ True,  True,  True]]]], dtype=bool)
    """

    length: Scalar | Int[Array | np.ndarray, "batch"]

    reads_queries, shape_is_complete = False, True

    def __post_init__(self) -> None:
        self._set(length=checks.scalar("length", self.length, minimum=0, ranks=(0, 1)))

    @property
    def shape(self) -> tuple[int, int, int]:
        return np.size(self.length), 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv < by_example(self.length, b)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        length = by_example(self.length, b)
        return kv.min < length, kv.max < length

    def native(self) -> Native:
        return Native(length=self.length)


class Padding(Mask):
    """A query attends to the keys that are valid: ``valid[b, kv]``.

    Source: ``padding_mask_function`` in Transformers' ``masking_utils``.

    Args:
        valid: bool or integer ``[batch, kv]``; true, or not zero, where there is a token and no padding.

    Raises:
        TypeError: ``valid`` is no array of bools or integers (an additive bias, a torch tensor).
        ValueError: ``valid`` has another rank.

    >>> Padding(jnp.array([[0, 1, 1]])).dense(1, 3)
    Array([[[[False,  True,  True]]]], dtype=bool)
    """

    valid: Bool[Array | np.ndarray, "batch kv"] | Int[Array | np.ndarray, "batch kv"]

    reads_queries, keys_by_index, shape_is_complete = False, True, True

    def __post_init__(self) -> None:
        hint = "; make it bool by `valid != 0` from a 0/1 mask, or by `valid == 0` from an additive bias"
        checks.array("valid", self.valid, "bi", 2, hint=hint)
        if isinstance(self.valid, np.ndarray):
            # Before JAX, without 64-bit mode, cuts an int64 in half.
            self._set(valid=self.valid != 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.valid.shape[0], 1, self.valid.shape[1]

    def check(self, extent: Extent) -> None:
        refuse_other_keys(self, "valid", self.valid, extent)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return (lookup(self.valid, b=b, kv=kv) != 0) & inside(kv, self.valid.shape[1])

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        valid = self.allows(b, h, 0, kv.positions)
        return kv.most(valid), kv.least(valid)


class Segments(Mask):
    """A query attends to the keys of its own segment: to those that have its id. Packed documents.

    Source: ``packed_sequence_mask_function`` in Transformers' ``masking_utils``, ``SegmentIds`` of splash attention.

    Args:
        query_ids: integer ``[batch, length]``: the id of each position, of queries and of keys. A position beyond the
            array has no id, and does not attend.
        key_ids: integer ``[batch, kv]``, where the keys are others than the queries, or not in the order of their
            positions: the id of each key. Then ``query_ids`` are of queries alone.
        offset: position of the first query that ``query_ids`` describes, where it is not 0; an int, or a traced scalar.
        consecutive: whether keys with one id stand next to each other, as packed documents do; static. Kernels may then
            take the mask as an interval of keys for each query. This is checked in NumPy arrays, and trusted of others.

    Raises:
        TypeError: ids are not arrays of integers.
        ValueError: ids have another rank, or do not fit an int32; two batches differ in size; an ``offset`` without
            ``key_ids``; ids that are said to be consecutive are not.

    >>> Segments(jnp.array([[0, 0, 1]])).dense(3, 3)
    Array([[[[ True,  True, False],
             [ True,  True, False],
             [False, False,  True]]]], dtype=bool)
    """

    query_ids: Int[Array | np.ndarray, "batch q"]
    key_ids: Int[Array | np.ndarray, "batch kv"] | None = None
    offset: Scalar = 0
    consecutive: bool = False

    shape_is_complete = True

    def __post_init__(self) -> None:
        hint = "; ids of segments are integers, such as jnp.cumsum of the starts of documents"
        for name in ("query_ids", "key_ids"):
            if name == "query_ids" or self.key_ids is not None:
                ids = checks.array(name, getattr(self, name), "i", 2, hint=hint)
                checks.fits_int32(name, ids)
        self._set(offset=checks.scalar("offset", self.offset, -LIMIT, LIMIT))
        if self.key_ids is None:
            if checks.is_array(self.offset) or self.offset != 0:
                raise ValueError(
                    f"offset of Segments is the position of the first of query_ids and needs key_ids, got offset="
                    f"{checks.describe(self.offset)} and no key_ids: one array of ids is read from position 0 on"
                )
        elif 1 != self.query_ids.shape[0] != self.key_ids.shape[0] != 1:
            raise ValueError(
                f"query_ids and key_ids must agree on the size of batch, got {checks.describe(self.query_ids)} and "
                f"{checks.describe(self.key_ids)}"
            )
        if self.consecutive and isinstance(self._keys, np.ndarray):
            for row, ids in enumerate(self._keys):
                if len(np.unique(ids)) <= np.count_nonzero(np.diff(ids)):
                    raise ValueError(f"consecutive is True, but row {row} of the ids returns to an id: {ids!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return common(self.query_ids.shape[0], self._keys.shape[0]), 1, self._keys.shape[1]

    def check(self, extent: Extent) -> None:
        if self.key_ids is None:
            super().check(extent)
        refuse_other_keys(self, "query_ids" if self.key_ids is None else "key_ids", self._keys, extent)
        count = self.query_ids.shape[1]
        if extent.queries is not None and is_beyond(extent.queries, count, self.offset):
            raise ValueError(
                f"query_ids of Segments describes the queries at {self.offset} to {self.offset + count - 1}, but "
                f"{extent.query_length} queries from {extent.queries[0]} on were asked for: where these are the ids of "
                "just these queries, say Segments(query_ids, key_ids, offset=<position of the first>)"
            )

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return super().at_keys(key_positions) if self.key_ids is None else self

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        same = self._query_ids(b, q) == lookup(self._keys, b=b, kv=kv)
        return same & self._has_query(q) & inside(kv, self._keys.shape[1])

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        query_ids, key_ids = self._query_ids(b, q.positions), lookup(self._keys, b=b, kv=kv.positions)
        some, every = _share(q.least(query_ids), q.most(query_ids), kv.least(key_ids), kv.most(key_ids))
        has_query, has_key = self._has_query(q.positions), inside(kv.positions, self._keys.shape[1])
        return some & q.most(has_query) & kv.most(has_key), every & q.least(has_query) & kv.least(has_key)

    def native(self) -> Native | None:
        return Native(interval=self._interval) if self.consecutive else None

    def segment_ids(self, b: Index, q: Index, kv: Index) -> tuple[Any, Any]:
        """The ids of queries and keys as splash attention has them: equal where a pair may attend, int32."""
        query_ids, key_ids = jnp.asarray(self._query_ids(b, q)), jnp.asarray(lookup(self._keys, b=b, kv=kv))
        # Ids that no other has, for positions beyond the arrays.
        key_ids = jnp.where(inside(kv, self._keys.shape[1]), key_ids, query_ids.min() - 1)
        return jnp.where(self._has_query(q), query_ids, key_ids.max() + 1), key_ids

    @property
    def _keys(self) -> Any:
        """The ids of the keys."""
        return self.query_ids if self.key_ids is None else self.key_ids

    def _query_ids(self, b: Index, q: Index) -> Any:
        return lookup(self.query_ids, b=b, q=q - clipped(self.offset))

    def _has_query(self, q: Index) -> Allowed:
        return inside(q - clipped(self.offset), self.query_ids.shape[1])

    def _interval(self, b: Index, q: Index) -> tuple[Any, Any]:
        """The first key with the id of the query, and the first after the last."""
        ids = jnp.asarray(self._query_ids(b, q))
        keys = jnp.broadcast_to(self._keys, (max(len(ids), len(self._keys)), self._keys.shape[1]))
        rows = jnp.broadcast_to(ids[:, 0, :, 0], (len(keys), ids.shape[2]))

        def of_example(keys: Array, ids: Array) -> tuple[Array, Array]:
            order = jnp.argsort(keys, stable=True)
            first, end = (jnp.searchsorted(keys[order], ids, side=side) for side in ("left", "right"))
            is_key = first < end
            start = jnp.where(is_key, order.at[first].get(mode="clip"), 0)
            return start, start + (end - first)

        start, end = (x[:, None, :, None].astype(jnp.int32) for x in jax.vmap(of_example)(keys, rows))
        return start, jnp.where(self._has_query(q), end, start)


class Dense(Mask):
    """The pairs that are given: ``allowed[b, h, q - offset, kv]``.

    Rows that are not given may not attend.

    Args:
        allowed: bool, ``[q, kv]`` or ``[batch, heads, q, kv]``, where a size of 1 serves every index.
        offset: position of the first row given, for an array that describes just the queries at hand and is combined
            with masks that know absolute positions; an int, or a traced scalar.

    Raises:
        TypeError: ``allowed`` is not bool.
        ValueError: ``allowed`` has another rank; a rank of 3 could mean batch or heads, and is not guessed.

    >>> (Causal() & Dense(jnp.array([[True, False, True]]))).dense(1, 3, offset=2)
    Array([[[[ True, False,  True]]]], dtype=bool)
    """

    allowed: Bool[Array | np.ndarray, "q kv"] | Bool[Array | np.ndarray, "batch heads q kv"]
    offset: Scalar = 0

    keys_by_index, shape_is_complete = True, True

    def __post_init__(self) -> None:
        hint = "; make it bool by `allowed != 0` from a 0/1 mask, or by `allowed == 0` from an additive bias"
        checks.array("allowed", self.allowed, "b", 2, 4, hint=hint)
        self._set(offset=checks.scalar("offset", self.offset, -LIMIT, LIMIT))

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _, kv = (1, 1, *self.allowed.shape)[-4:]
        return batch, heads, kv

    def check(self, extent: Extent) -> None:
        *_, rows, kv = self.allowed.shape
        if kv != 1:
            refuse_other_keys(self, "allowed", self.allowed, extent)
        if rows == 1:
            return
        start = extent.queries[0] if extent.queries else None
        if (not extent.is_aligned and rows != extent.query_length) or is_beyond(extent.queries, rows, self.offset):
            raise ValueError(
                f"allowed of Dense has {rows} rows, for the queries at {self.offset} to {self.offset + rows - 1}, but "
                f"{extent.query_length} queries from {start} on were asked for: where the rows are just these queries, "
                "say Dense(allowed, offset=<position of the first>)"
            )

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        *_, rows, keys = self.allowed.shape
        row = q - clipped(self.offset)
        # A size of 1 serves every index.
        is_given = (True if rows == 1 else inside(row, rows)) & (True if keys == 1 else inside(kv, keys))
        return lookup(self.allowed, b=b, h=h, q=row, kv=kv) & is_given

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        # All that is known of these pairs is what was given for each.
        allowed = self.allows(b, h, q.positions, kv.positions)
        return kv.most(q.most(allowed)), kv.least(q.least(allowed))


class Predicate(Mask):
    """The pairs for which a function returns true: ``fn(b, h, q, kv)``.

    The ``mask_mod`` of PyTorch's FlexAttention.

    Args:
        fn: takes four int32 arrays that broadcast against each other (batch, head, query position, key position), and
            returns a bool array that broadcasts with them. It is part of the mask's static structure, compared by
            identity: define it once, for another function is another compilation.
        batch, heads: the sizes of the axes that ``fn`` looks at, where no mask beside it has them; static.
        bounds: what ``fn`` is on tiles, for :meth:`Mask.tiles`, to which every tile is PARTIAL without it. Takes ``b``
            and ``h`` as ``fn`` does, and ``q`` and ``kv`` as ranges with ``min`` and ``max``; returns two bools, or
            bool arrays that broadcast with them: whether some pair of a tile may attend, and whether every pair does.
            Where it is not known, ``some`` is true and ``every`` false.

    Raises:
        TypeError: ``fn`` or ``bounds`` is not callable or, when the mask is read, does not return bools.
        ValueError: when the mask is read, one returns a shape that does not broadcast to its arguments.

    >>> def strided(b, h, q, kv):
    ...     return kv % 2 == 0
    >>> (Causal() & Predicate(strided)).dense(1, 4, offset=3)
    Array([[[[ True, False,  True, False]]]], dtype=bool)
    >>> tenth = Predicate(lambda b, h, q, kv: kv < q // 10, bounds=lambda b, h, q, kv: (kv.min < q.max // 10, False))
    >>> print(tenth.tiles(100, 100, block=25).states[0, 0])
    [[1 0 0 0]
     [1 0 0 0]
     [1 0 0 0]
     [1 0 0 0]]
    """

    fn: Callable[[Any, Any, Any, Any], Any]
    batch: int | None = None
    heads: int | None = None
    bounds: Callable[[Any, Any, Span, Span], Bounds] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function of (b, h, q, kv), got {checks.describe(self.fn)}")
        for name in ("batch", "heads"):
            if getattr(self, name) is not None:
                self._set(**{name: checks.length(name, getattr(self, name))})
        if self.bounds is not None and not callable(self.bounds):
            raise TypeError(f"bounds must be a function of (b, h, q, kv), got {checks.describe(self.bounds)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch or 1, self.heads or 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        b, h = self._known(b, h)
        allowed = jnp.asarray(self.fn(*map(jnp.asarray, (b, h, q, kv))))
        return self._checked("fn", self.fn, allowed, jnp.broadcast_shapes(*map(jnp.shape, (b, h, q, kv))))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        if self.bounds is None:
            return True, False
        b, h = self._known(b, h)
        bounds = self.bounds(b, h, q, kv)
        if not isinstance(bounds, tuple) or len(bounds) != 2:
            raise TypeError(
                f"bounds of Predicate must return a pair (some, every), got {checks.describe(bounds)} from "
                f"{self.bounds!r}"
            )
        shape = jnp.broadcast_shapes(*map(jnp.shape, (b, h, q.min, kv.min)))
        some, every = (
            bound if isinstance(bound, bool) else self._checked("bounds", self.bounds, bound, shape) for bound in bounds
        )
        return some, every

    def _known(self, b: Index, h: Index) -> tuple[Index, Index]:
        # A size of 1 serves every index, as in broadcasting.
        return 0 if self.batch == 1 else b, 0 if self.heads == 1 else h

    def _checked(self, name: str, fn: object, result: Any, shape: tuple[int, ...]) -> Allowed:
        if getattr(result, "dtype", None) != jnp.bool_:
            raise TypeError(f"{name} of Predicate must return bool, got {checks.describe(result)} from {fn!r}")
        if not checks.broadcasts_to(result.shape, shape):
            raise ValueError(
                f"{name} of Predicate must return a shape that broadcasts to that of its arguments, {list(shape)}, got "
                f"{checks.describe(result)} from {fn!r}"
            )
        return result


class PerHead(Mask):
    """Another mask for each head: ``masks[h]`` for head ``h``.

    Args:
        masks: as many as there are heads. One that is given for several heads is read once for them all.

    Raises:
        TypeError: ``masks`` is no list or tuple, or one of them no mask.
        ValueError: there is none; one has heads of its own; or they disagree on a size.

    >>> from jaxmask import Full
    >>> print(PerHead([Causal(), Full()]).dense(2, 2).astype(int))
    [[[[1 0]
       [1 1]]
    <BLANKLINE>
      [[1 1]
       [1 1]]]]
    """

    masks: Sequence[Mask]

    shape_is_complete = True

    def __post_init__(self) -> None:
        if not isinstance(self.masks, list | tuple):
            raise TypeError(
                f"masks of PerHead must be a list or a tuple, a mask for each head, got {checks.describe(self.masks)}"
            )
        if not self.masks:
            raise ValueError("masks of PerHead must be a mask for each head, got none")
        self._set(masks=tuple(self.masks))
        for head, mask in enumerate(self.masks):
            if not isinstance(mask, Mask):
                raise TypeError(f"masks of PerHead must be masks, got {checks.describe(mask)} for head {head}")
            if mask.shape[1] != 1:
                raise ValueError(
                    f"masks of PerHead must be for one head each, got {mask.shape[1]} heads in {mask!r} for head {head}"
                )
        common_shape(self.masks, "masks of PerHead")

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, _, kv = common_shape(self.masks, "masks of PerHead")
        return batch, len(self.masks), kv

    def check(self, extent: Extent) -> None:
        for mask in self.masks:
            mask.check(extent)

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return PerHead([mask.at_keys(key_positions) for mask in self.masks])

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.or_, (is_own & mask.allows(b, h, q, kv) for mask, is_own in self._heads(h)))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        bounds = [(is_own, *mask.tile_bounds(b, h, q, kv)) for mask, is_own in self._heads(h)]
        some = reduce(operator.or_, (is_own & some for is_own, some, _ in bounds))
        every = reduce(operator.or_, (is_own & every for is_own, _, every in bounds))
        return some, every

    def _heads(self, h: Index) -> Iterator[tuple[Mask, Allowed]]:
        """The masks that differ, and whether ``h`` is a head of each."""
        heads: dict[Mask, list[int]] = {}
        for head, mask in enumerate(self.masks):
            heads.setdefault(mask, []).append(head)
        for mask, own in heads.items():
            # A single mask serves every head, as a size of 1 does.
            yield mask, True if len(self.masks) == 1 else reduce(operator.or_, (h == head for head in own))


def refuse_other_keys(mask: Mask, name: str, array: Any, extent: Extent) -> None:
    """Raise a ``ValueError`` where an array has no element for each key, on its last axis."""
    keys, kind = array.shape[-1], type(mask).__name__
    if extent.key_length is None:
        if is_beyond(extent.keys, keys):
            raise ValueError(
                f"{name} of {kind} describes {keys} keys ({checks.describe(array)}), but keys up to position "
                f"{extent.keys and extent.keys[1]} were asked for: it must cover every key"
            )
    elif keys != extent.key_length:
        raise ValueError(
            f"key_length is {extent.key_length}, but {name} of {kind} describes {keys} keys "
            f"({checks.describe(array)}): it must cover every key, the cached ones included"
        )


def _share(q_min: Any, q_max: Any, kv_min: Any, kv_max: Any) -> Bounds:
    """Whether some, and every, pair has equal numbers, where those of a tile are known to lie in a range."""
    return (q_min <= kv_max) & (kv_min <= q_max), (q_min == kv_max) & (q_max == kv_min)
