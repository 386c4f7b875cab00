"""Attention on many devices: each computes the examples and heads that it has, and sends none of them.

The arguments are whole arrays. A :class:`Placement` says over which axes of a mesh their examples and heads are
divided, and :func:`attend` runs the call on the shards. An array in a mask follows the axes along which it is looked
up. A mask or a bias that looks at the index of an example or a head itself gets that of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from jaxmask import checks, indices
from jaxmask.indices import Allowed, Index, iota
from jaxmask.kernels.call import Call
from jaxmask.mask import And, Mask, Not, Or
from jaxmask.positions import Extent, Scalar
from jaxmask.reading import depends
from jaxmask.spans import Bounds, Span


@dataclass(frozen=True)
class Placement:
    """Over which axes of a mesh examples and heads are divided; hashable.

    Args:
        mesh: the devices.
        examples, heads: names of axes of the mesh; empty where every device has all of them.
    """

    mesh: Any
    examples: tuple[str, ...]
    heads: tuple[str, ...]

    def shards(self, axes: tuple[str, ...]) -> int:
        """How many devices divide what is sharded over these axes."""
        return prod(self.mesh.shape[axis] for axis in axes)

    def __str__(self) -> str:
        parts = [
            f"{what} over {' and '.join(map(repr, axes))} ({self.shards(axes)})"
            for what, axes in (("batch", self.examples), ("heads", self.heads))
            if axes
        ]
        return f"{', '.join(parts) or 'all of it on each device'}: queries and outputs stay where they are"


def placed(call: Call, sharding: PartitionSpec | NamedSharding | None) -> tuple[Call, Placement | None]:
    """A call, and where its examples and heads are, as the type of the query or ``sharding`` says it.

    Returns:
        ``None`` for the placement where neither does, or all is on one device.

    Raises:
        TypeError, ValueError: ``sharding`` has another type, or the call cannot follow it.
    """
    if sharding is not None and not isinstance(sharding, PartitionSpec | NamedSharding):
        raise TypeError(
            "sharding must be a PartitionSpec or a NamedSharding, that of the query, such as "
            f'P("data", None, "model", None), got {checks.describe(sharding)}'
        )
    typed = _explicit(call.query)
    if typed is None and sharding is None:
        return call, None
    call = replace(call, is_left_to_xla=False)
    if typed is None:
        return call, _as_told(call, sharding)
    spec = _axes(typed.spec)
    if sharding is not None and _axes(_spec(sharding)) != spec:
        raise ValueError(
            f"sharding is {_spec(sharding)}, but the type of query says {typed.spec}: leave sharding out where the "
            "axes of the mesh are explicit"
        )
    for name, array in (("key", call.key), ("value", call.value)):
        of_keys = _explicit(array)
        if of_keys is not None and any(
            own and own != axes for own, axes in zip(_axes(of_keys.spec), spec, strict=True)
        ):
            raise ValueError(
                f"{name} is sharded as {of_keys.spec}, but query as {typed.spec}: they must agree on batch and heads; "
                f"move one by jax.sharding.reshard"
            )
    return call, _placement("the type of query", spec, typed.mesh, call)


def _as_told(call: Call, sharding: Any) -> Placement | None:
    spec = _axes(_spec(sharding))
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else jax.sharding.get_abstract_mesh()
    if not any(spec):
        return None
    if mesh.empty:
        raise ValueError(
            f"sharding is {sharding}, but there is no mesh: call in `with jax.set_mesh(mesh):`, or give "
            "sharding=NamedSharding(mesh, spec)"
        )
    return _placement("sharding", spec, mesh, call)


def _placement(name: str, spec: tuple[tuple[str, ...], ...], mesh: Any, call: Call) -> Placement:
    shape = call.query.shape
    for what, axes, size in zip(("batch", "q", "heads", "dim"), spec, shape, strict=True):
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise ValueError(f"{name} names {unknown}, but the axes of the mesh are {list(mesh.shape)}")
        if axes and what in ("q", "dim"):
            raise ValueError(
                f"{name} divides {what} over {list(axes)}, but only batch and heads may be divided: gather the rest "
                "before, by jax.sharding.reshard where the axes of the mesh are explicit"
            )
        shards = prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            raise ValueError(
                f"{name} divides {what} into {shards}, but the query has {size}: {checks.describe(call.query)}; leave "
                "the axis out, or fill it up"
            )
    return Placement(mesh, spec[0], spec[2])


def _explicit(x: Any) -> NamedSharding | None:
    """The sharding in the type of an array, where an axis of its mesh is explicit."""
    sharding: Any = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    is_explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def _spec(sharding: PartitionSpec | NamedSharding) -> PartitionSpec:
    return sharding.spec if isinstance(sharding, NamedSharding) else sharding


def _axes(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
    """The names of axes of a mesh along each of ``[batch, q, heads, dim]``."""
    if len(spec) > 4 or any(axes is PartitionSpec.UNCONSTRAINED for axes in spec):
        raise ValueError(f"sharding must say the axes of the mesh for [batch, q, heads, dim], got {spec}")
    named: list[tuple[str, ...]] = [
        () if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in spec
    ]
    return tuple(named + [()] * (4 - len(named)))


class _Division(NamedTuple):
    """How a call is divided.

    Args:
        specs: of each array, in the order of the leaves of the call.
        by_index: for each part of the mask that ``&``, ``|`` and ``~`` combine, whether it looks at the index of the
            example itself, and whether at that of the head, where these are divided.
    """

    specs: list[PartitionSpec]
    by_index: list[tuple[bool, bool]]


def ask_shard(call: Call, placement: Placement, ask: Callable[[Call], Any]) -> Any:
    """What ``ask`` says of the call of one device. Nothing is computed."""
    division = _divide(call, placement)
    answers: list[Any] = []

    def shape(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        axes = _axes(spec)[: np.ndim(x)]
        sizes = (size // placement.shards(names) for size, names in zip(np.shape(x), axes, strict=True))
        return jax.ShapeDtypeStruct(tuple(sizes), jnp.result_type(x))

    leaves, structure = jax.tree.flatten(call)

    def on_device(part: list[Any]) -> None:
        answers.append(ask(_local(jax.tree.unflatten(structure, part), placement, division, (0, 0))))

    jax.eval_shape(on_device, [shape(x, spec) for x, spec in zip(leaves, division.specs, strict=True)])
    return answers[0]


@partial(jax.jit, static_argnums=(1, 2, 3))
def attend(call: Call, placement: Placement, run: Callable[[Call], Any], says_what_varies: bool) -> Any:
    """Run the call on the shards by ``run``.

    Kernels of others do not say over which axes of the mesh their results vary, and are not asked to.
    """
    _refuse_closed_over(call)
    division, mesh = _divide(call, placement), placement.mesh
    leaves, structure = jax.tree.flatten(call)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        # What is whole on every device is cut without communication.
        leaves = [
            jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, division.specs, strict=True)
        ]
    out = PartitionSpec(placement.examples or None, None, placement.heads or None)
    # Without names, all axes; a `vmap` over a sharded axis adds its own.
    free = {axis for axis, kind in kinds.items() if kind != AxisType.Manual}

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(division.specs,),
        out_specs=(out, out) if call.return_residual else out,
        axis_names=free if AxisType.Manual in kinds.values() else set[str](),
        check_vma=says_what_varies,
    )
    def on_device(part: list[Any]) -> Any:
        local: Call = jax.tree.unflatten(structure, part)
        batch, _, heads, _ = local.query.shape
        first = _index(placement.examples) * batch, _index(placement.heads) * heads
        return run(_local(local, placement, division, first))

    return on_device(leaves)


def _refuse_closed_over(call: Call) -> None:
    """Refuse functions that close over arrays whose types name a mesh: in a shard they have no meaning."""
    leaves, structure = jax.tree.flatten(call)
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    sizes = call.query.shape[0], call.query.shape[2], 1, 1
    at = tuple(map(iota, sizes, range(4)))

    def functions(leaves: list[Any]) -> Any:
        whole: Call = jax.tree.unflatten(structure, leaves)
        return whole.mask.allows(*at), whole.bias(*at) if isinstance(whole.bias, Partial) else None

    for x in jax.make_jaxpr(functions)(shapes).consts:
        if not jax.typeof(x).sharding.mesh.empty:
            raise ValueError(
                f"a function of the mask or the bias closes over {checks.describe(x)}, an array on the mesh: hand it "
                "over, as jax.tree_util.Partial(function, array), which calls function(array, b, h, q, kv)"
            )


def _index(axes: tuple[str, ...]) -> Any:
    """The index of this device along axes of the mesh."""
    return lax.axis_index(axes) if axes else 0


def _divide(call: Call, placement: Placement) -> _Division:
    """Where each array of a call is divided: along its examples and heads, if it has more than one."""
    examples, heads = placement.examples or None, placement.heads or None

    def along(x: Any, *axes: Any) -> list[PartitionSpec]:
        if x is None:
            return []
        axes = axes[len(axes) - np.ndim(x) :]
        return [PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, np.shape(x), strict=True)))]

    def whole(tree: Any) -> list[PartitionSpec]:
        return [PartitionSpec() for _ in jax.tree.leaves(tree)]

    units = jax.tree.leaves(call.mask, is_leaf=_is_unit)
    reads = [_read(unit, (call.query.shape[0], call.query.shape[2])) for unit in units]
    by_index = [read.by_index for read in reads]
    of_axis = {"b": examples, "h": heads}
    of_masks = [PartitionSpec(*(of_axis.get(axis) for axis in axes)) for read in reads for axes in read.axes]
    # Where the heads of keys do not divide, every device has all of them, and takes those it needs.
    divides = call.key.shape[2] % placement.shards(placement.heads) == 0
    of_keys = PartitionSpec(examples, None, heads if divides else None)
    at = call.positions
    specs = [
        PartitionSpec(examples, None, heads),
        of_keys,
        of_keys,
        *of_masks,
        *(whole(call.bias) if callable(call.bias) else along(call.bias, examples, heads, None, None)),
        *along(at.first, examples),
        *along(at.queries, examples, None),
        *along(at.keys, examples, None),
        *along(call.sinks, heads),
        *whole(call.dropout),
    ]
    divided = bool(examples), bool(heads)
    return _Division(specs, [(reads_b and divided[0], reads_h and divided[1]) for reads_b, reads_h in by_index])


def _local(part: Call, placement: Placement, division: _Division, first: tuple[Any, Any]) -> Call:
    """The call of one device, whose first example and head have these indices in the whole."""
    batch, _, heads, _ = part.query.shape
    key, value, bias, dropout = part.key, part.value, part.bias, part.dropout
    units, structure = jax.tree.flatten(part.mask, is_leaf=_is_unit)
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
        bias = Partial(_bias_of_whole, bias, *first)
    if dropout is not None:
        dropout = replace(dropout, first_example=first[0], first_head=first[1])
    return replace(part, key=key, value=value, mask=jax.tree.unflatten(structure, units), bias=bias, dropout=dropout)


def _own_heads(x: Any, first: Any, heads: int, group: int) -> Any:
    """The heads of keys or values of the query heads from the first on, of which a group shares one."""
    if group % heads == 0:
        return lax.dynamic_slice_in_dim(x, first // group, 1, 2)
    return x[:, :, (first + np.arange(heads, dtype=np.int32)) // group]


def _bias_of_whole(bias: Any, first_example: Any, first_head: Any, b: Index, h: Index, q: Index, kv: Index) -> Any:
    return bias(b + first_example, h + first_head, q, kv)


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


def _is_unit(node: Any) -> bool:
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


def _read(mask: Mask, sizes: tuple[int, int]) -> _Reads:
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
