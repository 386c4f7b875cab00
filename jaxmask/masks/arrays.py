"""Masks that hold an array of their user's: ``Padding``, ``Segments``, ``Dense``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from jaxmask import checks
from jaxmask.description import is_beyond
from jaxmask.indices import Allowed, Index, common, inside, lookup
from jaxmask.mask import Mask
from jaxmask.native import Native
from jaxmask.positions import LIMIT, Extent, KeyPositions, Scalar, clipped
from jaxmask.spans import Bounds, Span, share_ids


class Padding(Mask):
    """A query attends to the keys that are valid: ``valid[b, kv]``.

    Source: ``padding_mask_function`` in Transformers' ``masking_utils``.

    Args:
        valid: bool or integer ``[batch, kv]``, as of a tokenizer; true, or not zero, where there is a token and no
            padding.

    Raises:
        TypeError: ``valid`` is no array of bools or integers (an additive bias, a torch tensor).
        ValueError: ``valid`` has another rank.

    >>> Padding(jnp.array([[0, 1, 1]])).dense(1, 3)
    Array([[[[False,  True,  True]]]], dtype=bool)
    """

    valid: Bool[Array | np.ndarray, "batch kv"] | Integer[Array | np.ndarray, "batch kv"]

    reads_queries, keys_by_index, shape_is_complete = False, True, True

    def __post_init__(self) -> None:
        if checks.array("valid", self.valid, "bi", hint=_to_bool("valid")).ndim != 2:
            hint = "where it tells queries or heads apart, the mask is Dense(allowed)"
            if self.valid.ndim < 2:
                hint = "for a single example, give valid[None]; where these are numbers of keys, it is Prefix(lengths)"
            raise ValueError(f"valid must be [batch, kv], got {checks.describe(self.valid)}; {hint}")
        if isinstance(self.valid, np.ndarray):
            # Before JAX, without 64-bit mode, cuts an int64 in half.
            self._set(valid=self.valid != 0)

    @property
    def shape(self) -> checks.Shape:
        return self.valid.shape[0], 1, self.valid.shape[1]

    def check(self, extent: Extent) -> None:
        refuse_other_keys(self, "valid", self.valid, extent)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return lookup(self.valid, b=b, kv=kv).astype(bool) & inside(kv, self.valid.shape[1])

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

    query_ids: Integer[Array | np.ndarray, "#batch q"]
    key_ids: Integer[Array | np.ndarray, "#batch kv"] | None = None
    offset: Scalar = 0
    consecutive: bool = False

    shape_is_complete = True

    def __post_init__(self) -> None:
        hint = "; ids of segments are integers, such as jnp.cumsum(is_start, axis=1) of where documents start"
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
                if len(ids) and len(np.unique(ids)) <= np.count_nonzero(np.diff(ids)):
                    raise ValueError(f"consecutive is True, but row {row} of the ids returns to an id: {ids!r}")

    @property
    def shape(self) -> checks.Shape:
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
        has_query, has_key = self._has_query(q.positions), inside(kv.positions, self._keys.shape[1])
        return share_ids(q, kv, query_ids, key_ids, has_query, has_key)

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

    >>> from jaxmask import Causal
    >>> (Causal() & Dense(jnp.array([[True, False, True]]))).dense(1, 3, offset=2)
    Array([[[[ True, False,  True]]]], dtype=bool)
    """

    allowed: Bool[Array | np.ndarray, "q kv"] | Bool[Array | np.ndarray, "batch heads q kv"]
    offset: Scalar = 0

    keys_by_index, shape_is_complete = True, True

    def __post_init__(self) -> None:
        if checks.array("allowed", self.allowed, "b", hint=_to_bool("allowed")).ndim not in (2, 4):
            hints = {
                1: "; where it says which keys are valid, the mask is Padding(allowed[None])",
                3: "; give allowed[:, None] where the first axis is batch, or allowed[None] where it is heads",
            }
            raise ValueError(
                f"allowed must have rank 2 or 4, got {checks.describe(self.allowed)}{hints.get(self.allowed.ndim, '')}"
            )
        self._set(offset=checks.scalar("offset", self.offset, -LIMIT, LIMIT))

    @property
    def shape(self) -> checks.Shape:
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


def _to_bool(name: str) -> str:
    """How an array of another dtype becomes a bool mask."""
    return (
        f"; make it bool by `{name} != 0` from a 0/1 mask, or by `{name} == 0` from an additive bias that is 0 where "
        "it allows; any other bias is no mask, and the argument bias of attention"
    )


def refuse_other_keys(mask: Mask, name: str, array: Any, extent: Extent) -> None:
    """Raise a ``ValueError`` where an array has no element for each key, on its last axis."""
    keys, kind = array.shape[-1], type(mask).__name__
    if extent.key_length is None:
        if is_beyond(extent.keys, keys):
            raise ValueError(
                f"{name} of {kind}, {checks.describe(array)}, ends at position {keys - 1}, but key positions "
                f"{extent.keys and extent.keys[0]} to {extent.keys and extent.keys[1]} were asked for: it must cover "
                "every key"
            )
    elif keys != extent.key_length:
        raise ValueError(
            f"key_length is {extent.key_length}, but {name} of {kind} describes {keys} keys "
            f"({checks.describe(array)}): it must cover every key, the cached ones included"
        )
