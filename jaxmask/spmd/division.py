"""Where the arrays of a call are divided over devices: along their examples, their heads and their queries.

An array in a mask follows the axes of examples and heads along which it is looked up. Along the sequence every device
has all of it, for it holds an element for each token and not a vector.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxmask import indices
from jaxmask.indices import iota
from jaxmask.kernels.call import Call
from jaxmask.mask import And, Mask, Not, Or
from jaxmask.reading import depends
from jaxmask.spans import Span
from jaxmask.spmd.placement import Placement


class Division(NamedTuple):
    """How a call is divided.

    Args:
        specs: of each array, in the order of the leaves of the call.
        by_index: for each part of the mask that ``&``, ``|`` and ``~`` combine, whether it looks at the index of the
            example itself, and whether at that of the head, where these are divided.
    """

    specs: list[PartitionSpec]
    by_index: list[tuple[bool, bool]]


def divide(call: Call, placement: Placement) -> Division:
    """Where each array of a call is divided: along its examples, heads and queries, if it has more than one."""
    examples, heads, queries = placement.examples or None, placement.heads or None, placement.queries or None

    def along(x: Any, *axes: Any) -> list[PartitionSpec]:
        if x is None:
            return []
        axes = axes[len(axes) - np.ndim(x) :]
        return [PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, np.shape(x), strict=True)))]

    def whole(tree: Any) -> list[PartitionSpec]:
        return [PartitionSpec() for _ in jax.tree.leaves(tree)]

    units = jax.tree.leaves(call.mask, is_leaf=is_unit)
    reads = [read_of(unit, (call.query.shape[0], call.query.shape[2])) for unit in units]
    by_index = [read.by_index for read in reads]
    of_axis = {"b": examples, "h": heads}
    of_masks = [PartitionSpec(*(of_axis.get(axis) for axis in axes)) for read in reads for axes in read.axes]
    # Where the heads of keys do not divide, every device has all of them, and takes those it needs.
    divides = call.key.shape[2] % placement.shards(placement.heads) == 0
    of_keys = PartitionSpec(examples, placement.keys or None, heads if divides else None)
    at = call.positions
    specs = [
        PartitionSpec(examples, queries, heads),
        of_keys,
        of_keys,
        *of_masks,
        *(whole(call.bias) if callable(call.bias) else along(call.bias, examples, heads, queries, None)),
        *along(at.first, examples),
        *along(at.queries, examples, None),
        *along(at.keys, examples, None),
        *along(call.sinks, heads),
        *whole(call.dropout),
    ]
    divided = bool(examples), bool(heads)
    return Division(specs, [(reads_b and divided[0], reads_h and divided[1]) for reads_b, reads_h in by_index])


def is_unit(node: Any) -> bool:
    """Whether this is a part of a mask that is not combined of others by ``&``, ``|`` and ``~``."""
    return isinstance(node, Mask) and not isinstance(node, And | Or | Not)


class _Reads(NamedTuple):
    """What a part of a mask reads.

    Args:
        axes: for each of its arrays, the names of the axes along which each device needs its own part; empty names for
            the others, and no names for an array that every device needs.
        by_index: whether the part looks at the index of the example itself, and whether at that of the head.
    """

    axes: list[tuple[str, ...]]
    by_index: tuple[bool, bool]


def read_of(mask: Mask, sizes: tuple[int, int]) -> _Reads:
    """Find out what a mask reads, by handing it arrays that say how they are used. Nothing is computed."""
    leaves, structure = jax.tree.flatten(mask)
    uses: list[set[tuple[str, ...]]] = [set() for _ in leaves]
    q, kv = iota(2, 2), iota(2, 3)

    def look(b: Any, h: Any, leaves: list[Any]) -> Any:
        watched = [_Watched(leaf, b, h, use) for leaf, use in zip(leaves, uses, strict=True)]
        part: Mask = jax.tree.unflatten(structure, [each if each.ndim else each.array() for each in watched])
        return part.allows(b, h, q, kv), part.tile_bounds(b, h, Span(q, 2, 2), Span(kv, 3, 2))

    # Shapes alone, for where the arrays are does not matter here.
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    b, h = iota(sizes[0], 0), iota(sizes[1], 1)
    by_index = depends(look, b, h, 0, shapes), depends(look, b, h, 1, shapes)
    if any(len(use) > 1 and any(map(any, use)) for use in uses):
        # An array of which an element is looked up for each example or head, and others too.
        return _Reads([()] * len(leaves), (True, True))
    names = {name for name, looks in zip("bh", by_index, strict=True) if not looks}
    return _Reads([tuple(axis if axis in names else "" for axis in next(iter(use), ())) for use in uses], by_index)


class _Watched:
    """An array in a mask that says along which axes it is looked up by the index of an example or a head itself.

    It is a :class:`jaxmask.indices.View`. Whatever else a mask does with it, it does with the whole array.

    Args:
        array: traced.
        b, h: the indices that the mask is given.
        uses: to which the names of the axes of each lookup are added: empty ones along which it is looked up otherwise,
            and none where something else is done with the array.
    """

    def __init__(self, array: Any, b: Any, h: Any, uses: set[tuple[str, ...]]) -> None:
        self.shape, self.ndim, self.size, self.dtype = array.shape, array.ndim, array.size, array.dtype
        self._array, self._given, self._uses = array, {"b": b, "h": h}, uses

    def lookup(self, **at: Any) -> Any:
        """The elements; along an axis with one for each example or head, all of them."""
        at = dict(list(at.items())[len(at) - self.ndim :])
        own = {
            name: iota(size, indices.AXES.index(name))
            for (name, index), size in zip(at.items(), self.shape, strict=True)
            if size > 1 and index is self._given.get(name) and size == np.size(index)
        }
        self._uses.add(tuple(name if name in own else "" for name in at))
        return indices.lookup(self._array, **{**at, **own})

    def array(self) -> Any:
        """The array, for all that is no lookup."""
        self._uses.add(())
        return self._array

    __jax_array__ = array

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.array()[index]
