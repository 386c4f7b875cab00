"""Where the queries and the keys are that a mask is read for: their lengths, and the position of each."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Integer

from jaxmask import checks
from jaxmask.indices import Index, by_batch, by_example, common, lookup
from jaxmask.spans import Span

# A Python int is static structure; an array in its place is traced.
Scalar = int | np.integer[Any] | Integer[Array | np.ndarray, ""]
Offset = Scalar | Integer[Array | np.ndarray, "#batch"]
QueryPositions = Integer[Array | np.ndarray, "q"] | Integer[Array | np.ndarray, "#batch q"]
KeyPositions = Integer[Array | np.ndarray, "kv"] | Integer[Array | np.ndarray, "#batch kv"]

# Positions lie between -LIMIT and LIMIT, so that the difference of two of them fits an int32.
LIMIT = 2**30 - 1


class Extent(NamedTuple):
    """The positions at which a mask is read, as far as they are known beforehand.

    Args:
        queries, keys: the lowest and the highest position, as far as they are ints; ``None`` where arrays say them.
        query_length: the number of queries.
        key_length: the number of elements that an array of keys must have; ``None`` where it may have others.
        is_aligned: whether something says where the queries are relative to the keys.
    """

    queries: tuple[Any, Any] | None
    keys: tuple[Any, Any] | None
    query_length: checks.Length
    key_length: checks.Length | None
    is_aligned: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("first", "queries", "keys"),
    meta_fields=("query_length", "key_length", "is_aligned"),
)
@dataclass(frozen=True, eq=False)
class Positions:
    """The lengths of queries and keys, and their positions. A pytree, whose lengths are static.

    Args:
        query_length, key_length: numbers of queries and keys.
        first: the position of the first query, ``[]`` or ``[batch]``; ``None`` where it is 0, or ``queries`` are given.
        queries: the position of each query, int32 ``[q]`` or ``[batch, q]``; ``None`` where they follow ``first``.
        keys: the position of each key, int32 ``[kv]`` or ``[batch, kv]``; ``None`` where it is the index of the key.
        is_aligned: whether the caller or equal lengths say where the queries are relative to the keys.
    """

    query_length: checks.Length
    key_length: checks.Length
    first: Offset | None
    queries: QueryPositions | None
    keys: KeyPositions | None
    is_aligned: bool

    @classmethod
    def of(
        cls,
        query_length: checks.Length,
        key_length: checks.Length,
        offset: Offset | None = None,
        query_positions: QueryPositions | None = None,
        key_positions: KeyPositions | None = None,
    ) -> "Positions":
        """The positions that the arguments of :meth:`Mask.dense` say, checked."""
        query_length = checks.length("query_length", query_length)
        key_length = checks.length("key_length", key_length)
        if offset is not None and query_positions is not None:
            raise ValueError(
                "offset and query_positions both say where the queries are: give one of them, query_positions where "
                "the queries are not consecutive"
            )
        if offset is not None:
            last = 0 if jax.export.is_symbolic_dim(query_length) else query_length - 1
            offset = clipped(checks.scalar("offset", offset, -LIMIT, LIMIT - last, ranks=(0, 1)))
        if query_positions is not None:
            query_positions = _each("query_positions", query_positions, query_length, "queries", -LIMIT)
        if key_positions is not None:
            # Every negative position is an empty slot.
            slots = _each("key_positions", key_positions, key_length, "keys", -checks.INT32_MAX)
            key_positions = slots.clip(-1)
            if offset is None and query_positions is None:
                raise ValueError(
                    "offset is missing: key_positions says where the keys are, but not where the queries are; say "
                    "offset=<the position of the first query>, or query_positions=<the position of each>"
                )
        is_aligned = offset is not None or query_positions is not None or query_length == key_length
        return cls(query_length, key_length, offset, query_positions, key_positions, is_aligned)

    @property
    def batch(self) -> checks.Length:
        """The number of examples that the positions tell apart, or 1."""
        return common(*self.batches.values())

    @property
    def batches(self) -> dict[str, checks.Length]:
        """The number of examples in each argument that has one for each example."""
        arrays: dict[str, tuple[Any, int]] = {
            "offset": (self.first, 1),
            "query_positions": (self.queries, 2),
            "key_positions": (self.keys, 2),
        }
        return {name: array.shape[0] for name, (array, rank) in arrays.items() if np.ndim(array) == rank}

    @property
    def extent(self) -> Extent:
        """What of these positions is known beforehand: the ints."""
        first = self.start
        return Extent(
            queries=None
            if self.queries is not None or checks.is_array(first)
            else (first, first + self.query_length - 1),
            keys=(0, self.key_length - 1),
            query_length=self.query_length,
            key_length=self.key_length,
            is_aligned=self.is_aligned,
        )

    @property
    def start(self) -> Offset:
        """The position of the first query, where the queries are consecutive."""
        return 0 if self.first is None else self.first

    @property
    def starts_at_zero(self) -> bool:
        """Whether the queries are known to be at the positions 0, 1, 2 and so on."""
        return self.queries is None and isinstance(self.start, int) and self.start == 0

    def of_queries(self, b: Index, index: Index) -> Any:
        """The positions of the queries of these indices."""
        return by_example(self.start, b) + index if self.queries is None else lookup(self.queries, b=b, q=index)

    def of_keys(self, b: Index, index: Index) -> Any:
        """The positions of the keys of these indices."""
        return index if self.keys is None else lookup(self.keys, b=b, kv=index)

    def query_span(self, b: Index, indices: Integer[Array | np.ndarray, "..."], size: int) -> Span:
        """The positions of all queries, in tiles of ``size``."""
        if self.queries is None:
            return Span(indices, 2, size, by_batch(self.start))
        return Span(lookup(self.queries, b=b, q=indices), 2, size)


def _each(name: str, positions: Any, length: checks.Length, what: str, minimum: int) -> Any:
    """The position of each query or key, checked, as int32."""
    positions = checks.int32(name, checks.array(name, positions, "i", 1, 2), minimum, LIMIT)
    if positions.shape[-1] != length:
        raise ValueError(
            f"{name} must give the position of each of the {length} {what}, got {checks.describe(positions)}"
        )
    return clipped(positions)


def clipped(position: Any) -> Any:
    """A position within the limits. An int is there already, and a traced one becomes so: no difference wraps."""
    return position.clip(-LIMIT, LIMIT) if isinstance(position, jax.Array) else position
