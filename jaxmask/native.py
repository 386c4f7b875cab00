"""What a mask can say in the few terms that fused kernels know, and what is left over.

Kernels ask and masks answer: a mask says its :class:`Native` terms by :meth:`Mask.native`, and a kernel takes those
that it knows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from jaxmask import checks
from jaxmask.indices import Index, by_example, iota
from jaxmask.positions import LIMIT, Positions, Scalar

M = TypeVar("M")

# The first key of each query at position ``q`` of example ``b``, and the first after the last.
Interval = Callable[[Index, Index], tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Native:
    """A mask in the terms of fused kernels. A query at position ``q`` attends to the keys at ``kv`` where all hold.

    Args:
        left: ``q - left <= kv``; ``None`` for no limit.
        right: ``kv <= q + right``; 0 is causal.
        length: ``kv < length``, the number of keys; an int, or int32 ``[]`` or ``[batch]``.
        interval: a function of the example and the position of a query that returns ``(start, end)``, for
            ``start <= kv < end``; both broadcast with its arguments.

    >>> terms = Native(right=0) & Native(left=3)  # causal, and a window
    >>> terms.left, terms.right, terms.length
    (3, 0, None)
    """

    left: Scalar | None = None
    right: Scalar | None = None
    length: Scalar | Integer[Array | np.ndarray, "batch"] | None = None
    interval: Interval | None = None

    def __and__(self, other: "Native") -> "Native":
        return Native(
            _least(self.left, other.left),
            _least(self.right, other.right),
            _least(self.length, other.length),
            _intersection(self.interval, other.interval),
        )

    def keys(self, b: Index, q: Index, key_length: checks.Length) -> tuple[Any, Any]:
        """The keys of each query as an interval ``[start, end)`` within ``[0, key_length)``: int32."""
        start, end = jnp.int32(0), jnp.int32(key_length)
        if self.left is not None:
            start = jnp.maximum(start, q - jnp.minimum(self.left, LIMIT))
        if self.right is not None:
            # The limit is at most the distance to the last key, so that the sum fits an int32.
            end = jnp.minimum(end, q + jnp.minimum(self.right, end - q) + 1)
        if self.length is not None:
            end = jnp.minimum(end, by_example(self.length, b))
        if self.interval is not None:
            first, last = self.interval(b, q)
            start, end = jnp.maximum(start, first), jnp.minimum(end, last)
        return start, end


@dataclass(frozen=True, eq=False)
class Split(Generic[M]):
    """The arguments of a fused kernel that say a mask, or a part of it.

    Args:
        is_causal: whether a query attends to no key with a higher index than its own.
        local_window_size: how many keys before and after its own index a query attends to, or ``None`` for all.
        key_value_seq_lengths: int32 ``[batch|1]``, how many keys there are, or ``None`` for all.
        residual: the mask that the arguments do not say. Arguments and residual, joined by ``&``, are the mask.
        terms: what the arguments say, as one.
        positions: of the queries and keys.
        batch: the number of examples that the mask and the positions tell apart.
    """

    is_causal: bool
    local_window_size: tuple[int, int] | None
    key_value_seq_lengths: Integer[Array | np.ndarray, "batch"] | None
    residual: M
    terms: Native
    positions: Positions
    batch: checks.Length

    @property
    def key_interval(self) -> tuple[Integer[Array, "batch q"], Integer[Array, "batch q"]]:
        """The keys that the arguments leave to each query, ``[start, end)``: int32 ``[batch|1, q]`` each."""
        at, b = self.positions, iota(self.batch, 0)
        ends = self.terms.keys(b, at.of_queries(b, iota(at.query_length, 2)), at.key_length)
        start, end = jnp.broadcast_arrays(*ends, jnp.zeros((1, 1, at.query_length, 1)))[:2]
        return start[:, 0, :, 0], end[:, 0, :, 0]

    def has_keys(self) -> Bool[Array, "batch q"]:
        """Whether the arguments leave a query any key: ``[batch|1, q]``."""
        start, end = self.key_interval
        return start < end


def split(parts: Iterable[Any], at: Positions, batch: checks.Length, neutral: M, *, intervals: bool) -> Split[M]:
    """Take the native terms of masks that are joined by ``&``. See :meth:`Mask.split`.

    Args:
        parts: the masks.
        at: positions of the queries and keys.
        batch: the number of examples.
        neutral: the mask that is left over where nothing is.
        intervals: whether to take everything that is an interval of keys for each query.
    """
    terms, residual = Native(), neutral
    for part in parts:
        said = part.native()
        if said is not None and (intervals or _fits_arguments(said, at)):
            terms = terms & said
        else:
            residual = residual & part
    limits: tuple[Any, ...] = (None, None, None) if intervals else (terms.left, terms.right, terms.length)
    left, right, length = limits
    if at.query_length == 1 and right is not None:
        # For a single query, as in a step of decoding, a limit after its position is a number of keys.
        position = at.start if at.queries is None else at.queries[..., 0]
        length, left, right = _least(length, position + 1 + jnp.minimum(right, at.key_length)), None, None
    # No more than there are, so that no sum of positions overflows.
    left = None if left is None else min(left, at.query_length)
    right = None if right is None else min(right, at.key_length)
    window = at.query_length if left is None else left, at.key_length if right is None else right
    return Split(
        is_causal=right == 0,
        local_window_size=None if left is None and right in (None, 0) else window,
        key_value_seq_lengths=None if length is None else jnp.clip(jnp.reshape(length, -1), 0, at.key_length),
        residual=residual,
        terms=terms,
        positions=at,
        batch=batch,
    )


def _fits_arguments(terms: Native, at: Positions) -> bool:
    """Whether static windows, relative to indices, and a number of keys say all of these terms."""
    if terms.interval is not None:
        return False
    if terms.left is None and (terms.right is None or at.query_length == 1):
        return True
    return at.starts_at_zero and all(isinstance(side, int | None) for side in (terms.left, terms.right))


def _least(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one if other is None else other
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else jnp.minimum(one, other)


def _intersection(one: Interval | None, other: Interval | None) -> Interval | None:
    if one is None or other is None:
        return one or other

    def both(b: Index, q: Index) -> tuple[Any, Any]:
        (start, end), (other_start, other_end) = one(b, q), other(b, q)
        return jnp.maximum(start, other_start), jnp.minimum(end, other_end)

    return both
