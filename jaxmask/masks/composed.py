"""Masks made of something else: of a function, of another mask for each head."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmask import checks
from jaxmask.indices import Allowed, Index, along, is_static
from jaxmask.mask import Mask, common_shape
from jaxmask.positions import Extent, KeyPositions
from jaxmask.spans import Bounds, Span


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

    >>> from jaxmask import Causal
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
    batch: int | np.integer[Any] | None = None
    heads: int | np.integer[Any] | None = None
    bounds: Callable[[Any, Any, Span, Span], Bounds] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function of (b, h, q, kv), got {checks.describe(self.fn)}")
        checks.takes_indices("fn", self.fn)
        for name in ("batch", "heads"):
            if getattr(self, name) is not None:
                self._set(**{name: checks.length(name, getattr(self, name))})
        if self.bounds is not None and not callable(self.bounds):
            raise TypeError(f"bounds must be a function of (b, h, q, kv), got {checks.describe(self.bounds)}")
        if self.bounds is not None:
            checks.takes_indices("bounds", self.bounds)

    @property
    def shape(self) -> checks.Shape:
        return self.batch or 1, self.heads or 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        b, h = self._known(b, h)
        with checks.traced_function("fn"):
            allowed = self.fn(*map(jnp.asarray, (b, h, q, kv)))
        if isinstance(allowed, bool | np.bool_ | np.ndarray):
            allowed = jnp.asarray(allowed)
        return self._checked("fn", self.fn, allowed, jnp.broadcast_shapes(*map(jnp.shape, (b, h, q, kv))))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        if self.bounds is None:
            return True, False
        b, h = self._known(b, h)
        with checks.traced_function("bounds"):
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

    def _checked(self, name: str, fn: object, result: Any, shape: tuple[checks.Length, ...]) -> Allowed:
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

    >>> from jaxmask import Causal, Full
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
    def shape(self) -> checks.Shape:
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
        some = _of_heads([(is_own, some) for is_own, some, _ in bounds])
        every = _of_heads([(is_own, every) for is_own, _, every in bounds])
        return some, every

    def _heads(self, h: Index) -> Iterator[tuple[Mask, Allowed]]:
        """The masks that differ, and whether ``h`` is a head of each."""
        heads: dict[Mask, list[int]] = {}
        for head, mask in enumerate(self.masks):
            heads.setdefault(mask, []).append(head)
        for mask, own in heads.items():
            # A single mask serves every head, as a size of 1 does.
            yield mask, True if len(self.masks) == 1 else reduce(operator.or_, (h == head for head in own))


def _of_heads(answers: list[tuple[Allowed, Allowed]]) -> Allowed:
    """Each answer at its own heads, from pairs of whether a head is one of them and the answer for one head."""
    shapes = [np.shape(array) for pair in answers for array in pair]
    are_of_heads = all(shape == along(1, math.prod(shape)) for shape in shapes[::2])
    are_of_one_head = all(shape[1:2] in ((), (1,)) for shape in shapes[1::2])
    if not (is_static(answers) and are_of_heads and are_of_one_head):
        return reduce(operator.or_, (is_own & answer for is_own, answer in answers))
    # The same, in time for as many tiles as there are, and not for as many times as there are heads.
    joined = np.zeros(np.broadcast_shapes(*shapes), np.bool_)
    for is_own, answer in answers:
        joined[:, np.reshape(is_own, -1)] = answer
    return joined
