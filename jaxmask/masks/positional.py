"""Masks of positions: ``Causal``, windows, chunks and prefixes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from jaxmask import checks
from jaxmask.indices import Allowed, Index, by_example
from jaxmask.mask import Mask
from jaxmask.native import Native
from jaxmask.positions import Scalar
from jaxmask.spans import Bounds, Span, share


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
    """A query attends to ``left`` keys before its position, itself, and ``right`` keys after; ``None`` is all of them.

    That is ``q - left <= kv <= q + right``. Both sides must be said, for other libraries read one number differently:
    ``local_window_size=4`` of ``jax.nn.dot_product_attention`` is ``Window(4, 4)``. Source: that argument, and
    ``window_size`` of FlashAttention (whose ``-1`` is ``None`` here).

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
    start: Scalar | Integer[Array | np.ndarray, "batch"] = 0

    shape_is_complete = True

    def __post_init__(self) -> None:
        self._set(
            size=checks.scalar("size", self.size, minimum=1),
            start=checks.scalar("start", self.start, minimum=-checks.INT32_MAX, ranks=(0, 1)),
        )

    @property
    def shape(self) -> checks.Shape:
        return np.size(self.start), 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self._chunk(b, q) == self._chunk(b, kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return share(*(self._chunk(b, position) for position in (q.min, q.max, kv.min, kv.max)))

    def native(self) -> Native:
        def interval(b: Index, q: Index) -> tuple[Any, Any]:
            q = jnp.asarray(q)
            before = (q % self.size - by_example(self.start, b) % self.size) % self.size
            # Summed from the right, for no part of it may exceed an int32.
            return q - before, q + jnp.minimum(self.size - before, checks.INT32_MAX - jnp.maximum(q, 0))

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

    length: Scalar | Integer[Array | np.ndarray, "batch"]

    reads_queries, shape_is_complete = False, True

    def __post_init__(self) -> None:
        self._set(length=checks.scalar("length", self.length, minimum=0, ranks=(0, 1)))

    @property
    def shape(self) -> checks.Shape:
        return np.size(self.length), 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv < by_example(self.length, b)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        length = by_example(self.length, b)
        return kv.min < length, kv.max < length

    def native(self) -> Native:
        return Native(length=self.length)
