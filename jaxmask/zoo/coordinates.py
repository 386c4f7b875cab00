"""Masks of other coordinates: along one axis of a grid, in another order of tokens, with queries and keys exchanged."""

from typing import Any

import numpy as np
from jaxtyping import Array, Integer

from jaxmask import checks
from jaxmask.indices import Allowed, Index, common, inside, lookup
from jaxmask.mask import Mask
from jaxmask.positions import LIMIT, Extent, Scalar, clipped
from jaxmask.spans import Bounds, Span


class Axis(Mask):
    """A mask of one coordinate: it reads ``(position - start) // stride % size`` in place of the position.

    In a grid whose tokens are stored row by row, that is the coordinate on an axis of ``size`` along which neighbours
    are ``stride`` tokens apart. With a ``stride`` of 1 it is the position within a period of ``size``. The bounds of a
    tile that reaches over the end of an axis are loose.

    Args:
        mask: a mask of positions alone, without an element for each key.
        size: number of positions on the axis, 1 to 2**30 - 1; an int, or a traced scalar.
        stride: number of tokens between neighbours, at least 1; likewise.
        start: the position of the first token of the grid, within ±(2**30 - 1); likewise.

    Raises:
        ValueError: a number is out of range; ``mask`` holds an element for each key.

    >>> from jaxmask import Window
    >>> columns = Axis(Window(0, 0), size=2)  # a grid two tokens wide
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
            # Coordinates are positions, too, and have the same limit.
            size=checks.scalar("size", self.size, 1, LIMIT),
            stride=checks.scalar("stride", self.stride, minimum=1),
            start=checks.scalar("start", self.start, -LIMIT, LIMIT),
        )

    @property
    def shape(self) -> checks.Shape:
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
    """A mask of other positions: it reads ``positions[b, position]`` in place of the position.

    With it, a mask of an image stored row by row serves one that is stored tile by tile. A position outside
    ``positions`` does not attend.

    Where all masks of a reading need the same order, leave the mask as it is and say ``query_positions`` and
    ``key_positions`` to :meth:`Mask.dense`. ``Reordered`` is for a mask that others are combined with, which know the
    tokens by another order: in ``Causal() & Reordered(mask, positions)``, ``Causal`` reads the order in memory.

    Args:
        mask: a mask of positions alone, without an element for each key.
        positions: integer ``[batch, length]``, within ±(2**30 - 1); traced ones beyond are clipped.

    Raises:
        TypeError: ``positions`` is not an array of integers.
        ValueError: ``positions`` has another rank, is out of range, or is for another batch than ``mask``; ``mask``
            holds an element for each key.

    >>> from jaxmask import Causal
    >>> print(Reordered(Causal(), np.array([[2, 0, 1]])).dense(3, 3)[0, 0].astype(int))
    [[1 1 1]
     [0 1 0]
     [0 1 1]]
    """

    mask: Mask
    positions: Integer[Array | np.ndarray, "batch length"]

    shape_is_complete = True

    def __post_init__(self) -> None:
        _check_positional("Reordered", self.mask)
        # As int32, because differences of narrower positions could overflow.
        positions = checks.some("positions", checks.array("positions", self.positions, "i", 2), "position")
        self._set(positions=checks.int32("positions", positions, -LIMIT, LIMIT))
        if 1 != self.mask.shape[0] != self.positions.shape[0] != 1:
            raise ValueError(
                f"positions and mask of Reordered must agree on the size of batch, got "
                f"{checks.describe(self.positions)} and {self.mask!r} for {self.mask.shape[0]}"
            )

    @property
    def shape(self) -> checks.Shape:
        batch, heads, _ = self.mask.shape
        return common(batch, self.positions.shape[0]), heads, 1

    def check(self, extent: Extent) -> None:
        super().check(extent)
        is_known = isinstance(self.positions, np.ndarray) and self.positions.size
        known = (int(self.positions.min()), int(self.positions.max())) if is_known else None
        self.mask.check(extent._replace(queries=known, keys=known, key_length=None, is_aligned=True))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        at_query, at_key = clipped(lookup(self.positions, b=b, q=q)), clipped(lookup(self.positions, b=b, kv=kv))
        return self.mask.allows(b, h, at_query, at_key) & self._has(q) & self._has(kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        queries, keys = lookup(self.positions, b=b, q=q.positions), lookup(self.positions, b=b, kv=kv.positions)
        some, every = self.mask.tile_bounds(b, h, q.at(clipped(queries)), kv.at(clipped(keys)))
        has_query, has_key = self._has(q.positions), self._has(kv.positions)
        return some & q.most(has_query) & kv.most(has_key), every & q.least(has_query) & kv.least(has_key)

    def _has(self, position: Index) -> Allowed:
        return inside(position, self.positions.shape[1])


class Transposed(Mask):
    """A mask with queries and keys exchanged: whether the key would attend to the query.

    ``Prefix(n) | Transposed(Prefix(n))`` makes the first tokens global: all attend to them, and they to all.

    Args:
        mask: any mask. An element that it has for each key now belongs to the query at that position.

    Raises:
        ValueError: the mask is read at queries for which it has no element.

    >>> from jaxmask import Prefix
    >>> print(Transposed(Prefix(1)).dense(2, 2)[0, 0].astype(int))
    [[1 1]
     [0 0]]
    """

    mask: Mask

    shape_is_complete = True

    def __post_init__(self) -> None:
        _check_mask("Transposed", self.mask)

    @property
    def shape(self) -> checks.Shape:
        batch, heads, _ = self.mask.shape
        return batch, heads, 1

    def check(self, extent: Extent) -> None:
        super().check(extent)
        exchanged = extent._replace(queries=extent.keys, keys=extent.queries, key_length=None, is_aligned=True)
        try:
            self.mask.check(exchanged)
        except ValueError as error:
            raise ValueError(f"Transposed takes queries for keys and keys for queries: {error}") from None

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, kv, q)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(b, h, kv, q)


def both_ways(mask: Mask) -> Mask:
    """A mask of the keys that all attend to, which as queries attend to all."""
    return mask | Transposed(mask)


def _check_mask(name: str, mask: Any) -> None:
    if not isinstance(mask, Mask):
        raise TypeError(f"mask of {name} must be a mask, got {checks.describe(mask)}")


def _check_positional(name: str, mask: Any) -> None:
    _check_mask(name, mask)
    if mask.shape[2] != 1:
        raise ValueError(
            f"mask of {name} must be one of positions, got {mask!r}, which has an element for each of {mask.shape[2]} "
            "keys: leave the part that has them out, and join it to the result by &, where & joined it before"
        )
