"""Blocks of tokens that attend to each other both ways, in a text that is causal: images, and prefixes."""

from typing import Any

from jaxtyping import Array, Integer

from jaxmask import checks
from jaxmask.indices import Allowed, Index, by_example, inside, lookup
from jaxmask.mask import Mask
from jaxmask.positions import Scalar, clipped
from jaxmask.spans import Bounds, Span, share_ids


class Blockwise(Mask):
    """A query attends to all tokens of its own block, before it and after it.

    The ids are those of the new tokens of a step, which a cache holds among others: both are read by position.
    Source: ``blockwise_overlay`` in Transformers' ``masking_utils``.

    Args:
        block_sequence_ids: int32 ``[batch, length]``: the block of each token, negative for a token of none.
        start: position of the first of these tokens, where it is not 0; an int, or an int32 ``[]`` or ``[batch]``.

    >>> import jax.numpy as jnp
    >>> print(Blockwise(jnp.array([[-1, 0, 0]])).dense(3, 3)[0, 0].astype(int))
    [[0 0 0]
     [0 1 1]
     [0 1 1]]
    """

    block_sequence_ids: Integer[Array, "batch length"]
    start: Scalar | Integer[Array, "batch"] = 0

    shape_is_complete = True

    @property
    def shape(self) -> checks.Shape:
        return self.block_sequence_ids.shape[0], 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        query_ids, key_ids = self._ids(b, q=q), self._ids(b, kv=kv)
        return (query_ids == key_ids) & (query_ids >= 0) & self._has(b, q) & self._has(b, kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        query_ids, key_ids = self._ids(b, q=q.positions), self._ids(b, kv=kv.positions)
        has_query = (query_ids >= 0) & self._has(b, q.positions)
        has_key = (key_ids >= 0) & self._has(b, kv.positions)
        return share_ids(q, kv, query_ids, key_ids, has_query, has_key)

    def _ids(self, b: Index, **position: Any) -> Any:
        ((name, at),) = position.items()
        return lookup(self.block_sequence_ids, b=b, **{name: at - by_example(clipped(self.start), b)})

    def _has(self, b: Index, position: Any) -> Allowed:
        return inside(position - by_example(clipped(self.start), b), self.block_sequence_ids.shape[1])
