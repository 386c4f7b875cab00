"""What of a mask a fused kernel can take in its own arguments, and what is left over."""

import operator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxmask.mask import And, Full, Mask, Offset
from jaxmask.masks import Causal, Prefix, SlidingWindow, Window


@dataclass(frozen=True, eq=False)
class Split:
    """The arguments of ``jax.nn.dot_product_attention`` that say a mask, or a part of it.

    Args:
        query_length, key_length: static.
        is_causal: whether a query attends to no key with a higher index than its own.
        local_window_size: how many keys before and after its own index a query attends to, or ``None`` for all.
        key_value_seq_lengths: int32 ``[batch|1]``, how many keys there are, or ``None`` for all.
        residual: the mask that these do not say. They and it, joined by ``&``, are the mask that was split.
    """

    query_length: int
    key_length: int
    is_causal: bool
    local_window_size: tuple[int, int] | None
    key_value_seq_lengths: Int[Array | np.ndarray, "batch"] | None
    residual: Mask

    def has_keys(self) -> Bool[Array, "batch q"]:
        """Whether a query has any key to attend to, where nothing is left over: ``[batch|1, q]``."""
        before, after = self.local_window_size or (self.query_length, 0 if self.is_causal else self.key_length)
        query = jnp.arange(self.query_length, dtype=jnp.int32)
        lengths = self.key_length if self.key_value_seq_lengths is None else self.key_value_seq_lengths[:, None]
        return jnp.atleast_2d(jnp.minimum(query + after, lengths - 1) >= jnp.maximum(query - before, 0))


def split(mask: Mask, query_length: int, key_length: int, offset: Offset | None) -> Split:
    """What of ``mask`` the arguments of a fused kernel can say. See :meth:`Mask.split`."""
    aligned = is_at_start(offset)
    windows: list[tuple[int | None, int | None]] = []
    lengths: list[Any] = []
    left_over: list[Mask] = []
    for part in mask.masks if isinstance(mask, And) else (mask,):
        match part:
            case Full():
                pass
            case Prefix(length):
                lengths.append(length)
            case Causal() if query_length == 1:
                lengths.append(1 + (0 if offset is None else offset))  # a step of decoding: the keys up to its own
            case Causal() if aligned:
                windows.append((None, 0))
            case SlidingWindow(int(size)) if aligned:
                windows.append((size - 1, 0))
            case Window(int() | None as left, int() | None as right) if aligned:
                windows.append((left, right))
            case _:
                left_over.append(part)
    # No more than there are, so that no sum of positions overflows.
    left = min((min(left, query_length) for left, _ in windows if left is not None), default=None)
    right = min((min(right, key_length) for _, right in windows if right is not None), default=None)
    window = query_length if left is None else left, key_length if right is None else right
    return Split(
        query_length,
        key_length,
        is_causal=right == 0,
        local_window_size=None if left is None and right in (None, 0) else window,
        key_value_seq_lengths=_lengths(lengths, key_length),
        residual=reduce(operator.and_, left_over, Full()),
    )


def is_at_start(offset: Offset | None) -> bool:
    """Whether the first query is known, now, to be at the first key."""
    return offset is None or (isinstance(offset, int) and offset == 0)


def _lengths(lengths: list[Any], key_length: int) -> Int[Array, "batch"] | None:
    if not lengths:
        return None
    return jnp.clip(
        reduce(jnp.minimum, (jnp.asarray(length, jnp.int32).reshape(-1) for length in lengths)), 0, key_length
    )
