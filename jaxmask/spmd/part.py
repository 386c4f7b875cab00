"""A part of a call: some of its examples and heads, of its queries, of its keys.

What a mask, a bias or dropout reads by an index or a position of the whole, it reads so in the part.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from jaxmask import checks
from jaxmask.indices import Allowed, Index, iota, lookup
from jaxmask.kernels.call import Call
from jaxmask.mask import Mask, by_position, occupied
from jaxmask.masks import Causal, Padding, SlidingWindow, Window
from jaxmask.positions import Extent, Positions, Scalar
from jaxmask.spans import Bounds, Span
from jaxmask.spmd.division import Division, is_unit, read_of
from jaxmask.spmd.placement import Placement


def at_shard(part: Call, placement: Placement, division: Division, first: tuple[Any, Any]) -> Call:
    """The call of one device, whose first example and head have these indices in the whole."""
    batch, _, heads, _ = part.query.shape
    key, value, bias, dropout = part.key, part.value, part.bias, part.dropout
    units, structure = jax.tree.flatten(part.mask, is_leaf=is_unit)
    units = [
        _AtShard(unit, first[0] if of_example else 0, first[1] if of_head else 0, batch, heads)
        # Any other is itself, for kernels know it.
        if of_example or of_head or unit.shape[0] > batch or unit.shape[1] > heads
        else unit
        for unit, (of_example, of_head) in zip(units, division.by_index, strict=True)
    ]
    if placement.heads and part.key.shape[2] % placement.shards(placement.heads):
        group = heads * placement.shards(placement.heads) // part.key.shape[2]
        key, value = (_own_heads(x, first[1], heads, group) for x in (key, value))
    if isinstance(bias, Partial):
        bias = Partial(_bias_of_whole, bias, *first, np.int32(0), np.int32(0))
    if dropout is not None:
        dropout = replace(dropout, first_example=first[0], first_head=first[1])
    return replace(part, key=key, value=value, mask=jax.tree.unflatten(structure, units), bias=bias, dropout=dropout)


def closed_over(call: Call) -> list[Any]:
    """The arrays that functions of the mask and the bias close over."""
    leaves, structure = jax.tree.flatten(call)
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    at = tuple(map(iota, (call.query.shape[0], call.query.shape[2], 1, 1), range(4)))

    def functions(leaves: list[Any]) -> Any:
        whole: Call = jax.tree.unflatten(structure, leaves)
        return whole.mask.allows(*at), whole.bias(*at) if isinstance(whole.bias, Partial) else None

    return jax.make_jaxpr(functions)(shapes).consts


def _own_heads(x: Any, first: Any, heads: int, group: int) -> Any:
    """The heads of keys or values of the query heads from the first on, of which a group shares one."""
    if group % heads == 0:
        return lax.dynamic_slice_in_dim(x, first // group, 1, 2)
    return x[:, :, (first + np.arange(heads, dtype=np.int32)) // group]


def _bias_of_whole(
    bias: Any, example: Any, head: Any, query: Any, key: Any, b: Index, h: Index, q: Index, kv: Index
) -> Any:
    return bias(b + example, h + head, q + query, kv + key)


class _AtShard(Mask):
    """A mask of the whole, for a shard of it. Its arrays are those of the shard, where it looks at no index itself."""

    mask: Mask
    first_example: Scalar
    first_head: Scalar
    batch: int
    heads: int

    shape_is_complete = True

    @property
    def shape(self) -> checks.Shape:
        batch, heads, kv = self.mask.shape
        return min(batch, self.batch), min(heads, self.heads), kv

    def check(self, extent: Extent) -> None:
        self.mask.check(extent)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(*self._of_whole(b, h), q, kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(*self._of_whole(b, h), q, kv)

    def _of_whole(self, b: Index, h: Index) -> tuple[Index, Index]:
        return b + self.first_example, h + self.first_head


def at_queries(call: Call, index: Any) -> Call:
    """The call for the queries at hand, those of the shard of this index, and all keys."""
    at, count = call.positions, call.query.shape[1]
    first = index * np.int32(count)
    dropout = None if call.dropout is None else replace(call.dropout, first_query=first)
    if at.queries is None:
        at = replace(at, first=at.start + first)
    else:
        queries = jnp.asarray(at.queries)
        at = replace(at, queries=lax.dynamic_slice_in_dim(queries, first, count, queries.ndim - 1))
    return replace(call, positions=replace(at, query_length=count, is_aligned=True), dropout=dropout)


def at_keys(call: Call, key: Any, value: Any, slots: Any) -> Call:
    """The call for the keys at hand, of which ``slots`` are the indices in the whole; -1 is no key."""
    at = call.positions
    # Only a function that is a bias looks at them, and a kernel that takes none need not know that keys are missing.
    keys = (slots if at.keys is None else lookup(at.keys, kv=slots)[..., 0, 0, :]) if callable(call.bias) else None
    return replace(
        call,
        key=key,
        value=value,
        mask=by_position(call.mask, slots) & occupied(slots),
        bias=_columns(call.bias, slots),
        positions=replace(at, key_length=key.shape[1], keys=keys),
        dropout=None if call.dropout is None else replace(call.dropout, keys=slots),
    )


def at_run(call: Call, key: Any, value: Any, first: Any) -> Call:
    """The call for the keys at hand, which are those from this index in the whole on."""
    at, count = call.positions, key.shape[1]
    bias: Any = call.bias
    # Only a function that is a bias looks at them, for the mask reads by index.
    keys: Any = at.keys if callable(bias) else None
    if keys is not None:
        keys = lax.dynamic_slice_in_dim(jnp.asarray(keys), first, count, np.ndim(keys) - 1)
    elif isinstance(bias, Partial):
        bias = Partial(_bias_of_whole, bias, np.int32(0), np.int32(0), np.int32(0), first)
    if bias is not None and not callable(bias) and bias.shape[3] > 1:
        bias = lax.dynamic_slice_in_dim(jnp.asarray(bias), first, count, 3)
    dropout = call.dropout
    if dropout is not None:
        dropout = replace(dropout, keys=first + np.arange(count, dtype=np.int32))
    return replace(
        call,
        key=key,
        value=value,
        mask=_Shifted(call.mask, np.int32(0), first),
        bias=bias,
        positions=replace(at, key_length=count, keys=keys),
        dropout=dropout,
    )


def at_band(call: Call, key: Any, value: Any, before: int, index: Any, length: int) -> Call:
    """The call for the queries of the shard of this index, and for all keys from ``before`` before the first of them.

    It counts positions from the first of these keys. So a mask of differences of positions is as static as it was, and
    its tiles are the same on every device. Keys that are not among the ``length`` of the whole are padding.
    """
    count = call.query.shape[1]
    first = index * np.int32(count) - np.int32(before)
    slots = first + np.arange(key.shape[1], dtype=np.int32)
    is_there = (slots >= 0) & (slots < length)
    units, structure = jax.tree.flatten(call.mask, is_leaf=is_unit)
    units = [
        unit if isinstance(unit, Causal | SlidingWindow | Window) else _Shifted(unit, first, first) for unit in units
    ]
    bias, dropout = call.bias, call.dropout
    if isinstance(bias, Partial):
        bias = Partial(_bias_of_whole, bias, np.int32(0), np.int32(0), first, first)
    if dropout is not None:
        dropout = replace(dropout, first_query=index * np.int32(count), keys=slots)
    return replace(
        call,
        key=key,
        value=value,
        mask=jax.tree.unflatten(structure, units) & Padding(is_there[None]),
        bias=_columns(bias, slots),
        positions=Positions(count, key.shape[1], before or None, None, None, is_aligned=True),
        dropout=dropout,
    )


def at_heads(call: Call, query: Any, key: Any, value: Any, first: Any) -> Call:
    """The call for the heads at hand, from the first on."""
    (batch, _, heads, _), count = call.query.shape, query.shape[2]
    units, structure = jax.tree.flatten(call.mask, is_leaf=is_unit)
    of_heads = (unit.shape[1] > 1 or read_of(unit, (batch, heads)).by_index[1] for unit in units)
    units = [_AtShard(unit, 0, first, batch, count) if yes else unit for unit, yes in zip(units, of_heads, strict=True)]
    bias: Any = call.bias
    sinks, dropout = call.sinks, call.dropout
    if isinstance(bias, Partial):
        bias = Partial(_bias_of_whole, bias, np.int32(0), first, np.int32(0), np.int32(0))
    elif bias is not None and bias.shape[1] > 1:
        bias = lax.dynamic_slice_in_dim(bias, first, count, 1)
    if dropout is not None:
        dropout = replace(dropout, first_head=dropout.first_head + first)
    return replace(
        call,
        query=query,
        key=key,
        value=value,
        mask=jax.tree.unflatten(structure, units),
        bias=bias,
        sinks=None if sinks is None else lax.dynamic_slice_in_dim(sinks, first, count, 0),
        dropout=dropout,
    )


def _columns(bias: Any, slots: Any) -> Any:
    """A bias for the keys of these indices."""
    return bias if bias is None or callable(bias) or bias.shape[3] == 1 else bias.take(slots, 3, mode="clip")


class _Shifted(Mask):
    """A mask of the whole, read by positions of queries and of keys from these on."""

    mask: Mask
    query: Scalar
    key: Scalar

    shape_is_complete = True

    @property
    def shape(self) -> checks.Shape:
        batch, heads, _ = self.mask.shape
        return batch, heads, 1

    def check(self, extent: Extent) -> None:
        """It was checked as what it is in the whole."""

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, q + self.query, kv + self.key)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(b, h, q.at(q.positions + self.query), kv.at(kv.positions + self.key))
