"""Masks that hold a table: which blocks of queries attend to which blocks of keys, or which queries attend to a key."""

from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Integer

from jaxmask import checks
from jaxmask.indices import Allowed, Index, by_example, common, inside, lookup
from jaxmask.mask import Mask
from jaxmask.masks import refuse_other_keys
from jaxmask.positions import LIMIT, Extent, Scalar, clipped
from jaxmask.spans import Bounds, Span


class Blocks(Mask):
    """Blocks of queries attend to blocks of keys: ``allowed[b, h, (q - start) // size, (kv - start) // size]``.

    The layout of block-sparse attention. A position outside the table does not attend. Tiles are exact, whatever the
    size of blocks.

    Args:
        allowed: bool, ``[q_blocks, kv_blocks]`` or ``[batch, heads, q_blocks, kv_blocks]``, where a batch or a number
            of heads of 1 serves every index.
        size: number of positions in a block, at least 1; an int, or a traced scalar.
        start: position of the first block, where it is not 0, within ±(2**30 - 1); an int, or a traced int32 ``[]`` or
            ``[batch]``.

    Raises:
        TypeError: ``allowed`` is not bool.
        ValueError: ``allowed`` has another rank; a number is out of range; ``allowed`` and ``start`` are for batches of
            different sizes.

    >>> Blocks(np.array([[True, False], [True, True]]), size=2).dense(3, 3)
    Array([[[[ True,  True, False],
             [ True,  True, False],
             [ True,  True,  True]]]], dtype=bool)
    """

    allowed: Bool[Array | np.ndarray, "q_blocks kv_blocks"] | Bool[Array | np.ndarray, "_ heads q_blocks kv_blocks"]
    size: Scalar
    start: Scalar | Integer[Array | np.ndarray, "_"] = 0

    shape_is_complete = True

    def __post_init__(self) -> None:
        allowed = checks.some("allowed", checks.array("allowed", self.allowed, "b", 2, 4), "block of keys")
        if allowed.shape[-2] == 0:
            raise ValueError(f"allowed must have at least one block of queries, got {checks.describe(allowed)}")
        self._set(
            size=checks.scalar("size", self.size, minimum=1),
            start=checks.scalar("start", self.start, -LIMIT, LIMIT, ranks=(0, 1)),
        )
        batch = self.allowed.shape[0] if self.allowed.ndim == 4 else 1
        if 1 != batch != np.size(self.start) != 1:
            raise ValueError(
                f"allowed and start must agree on the size of batch, got {checks.describe(self.allowed)} and "
                f"{checks.describe(self.start)}"
            )

    @property
    def shape(self) -> checks.Shape:
        batch, heads, *_ = (1, 1, *self.allowed.shape)[-4:]
        return common(batch, np.size(self.start)), heads, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        q, kv = self._block(b, q), self._block(b, kv)
        q_blocks, kv_blocks = self.allowed.shape[-2:]
        return lookup(self.allowed, b=b, h=h, q=q, kv=kv) & inside(q, q_blocks) & inside(kv, kv_blocks)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        # A tile is a rectangle of the table. The sums over all that is above and to the left of its four corners say
        # how many of its blocks are allowed.
        sums = self.allowed.cumsum(-2).cumsum(-1)

        def above_left(q: Any, kv: Any) -> Any:
            return lookup(sums, b=b, h=h, q=q - 1, kv=kv - 1) * ((q > 0) & (kv > 0))

        top, bottom = self._block(b, q.min), self._block(b, q.max) + 1
        left, right = self._block(b, kv.min), self._block(b, kv.max) + 1
        count = above_left(bottom, right) - above_left(top, right) - above_left(bottom, left) + above_left(top, left)
        q_blocks, kv_blocks = self.allowed.shape[-2:]
        # Outside the table, the area of a large tile could exceed an int32.
        is_inside = (top >= 0) & (bottom <= q_blocks) & (left >= 0) & (right <= kv_blocks)
        return count > 0, is_inside & (count == (bottom - top) * (right - left))

    def _block(self, b: Index, position: Any) -> Any:
        return (position - by_example(clipped(self.start), b)) // self.size


class Between(Mask):
    """An interval of queries attends to each key: ``start[b, kv] <= q < end[b, kv]``.

    Source: a column of FlashMask (https://arxiv.org/abs/2410.01359).

    Args:
        start, end: integer ``[batch, kv]``: the position of the first query that attends to a key, and of the first
            query after these.

    Raises:
        TypeError: they are not arrays of integers.
        ValueError: they have another rank, differ in shape, or do not fit an int32.

    >>> print(Between(np.array([[0, 1]]), np.array([[3, 2]])).dense(3, 2, offset=0)[0, 0].astype(int))
    [[1 0]
     [1 1]
     [1 0]]
    """

    start: Integer[Array | np.ndarray, "batch kv"]
    end: Integer[Array | np.ndarray, "batch kv"]

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
    def shape(self) -> checks.Shape:
        return self.start.shape[0], 1, self.start.shape[1]

    def check(self, extent: Extent) -> None:
        refuse_other_keys(self, "start", self.start, extent)
        super().check(extent)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        attends = (lookup(self.start, b=b, kv=kv) <= q) & (q < lookup(self.end, b=b, kv=kv))
        return attends & inside(kv, self.start.shape[1])

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        start, end = lookup(self.start, b=b, kv=kv.positions), lookup(self.end, b=b, kv=kv.positions)
        has_key = inside(kv.positions, self.start.shape[1])
        some = (kv.least(start) <= q.max) & (q.min < kv.most(end))
        every = (kv.most(start) <= q.min) & (q.max < kv.least(end))
        return some & kv.most(has_key), every & kv.least(has_key)
