"""Which devices of a mesh have which part of a call: what the type of the query says, ``sharding`` or ``axis_name``."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmask import checks
from jaxmask.kernels.call import Call, is_empty

Axes = tuple[str, ...]

QUERIES_ARE_DIVIDED = (
    'context_parallel is "merge", but the queries are divided as the keys: it is for a few queries that every device '
    "has, and the others are for these"
)


@dataclass(frozen=True)
class Placement:
    """Over which axes of a mesh a call is divided; hashable.

    Args:
        mesh: the devices; ``None`` inside of a ``shard_map``, where the arrays are those of one device.
        examples, heads, queries: names of axes of the mesh; empty where every device has all of them.
        keys: those of the queries, or empty; any where every device has all queries.
    """

    mesh: Any
    examples: Axes = ()
    heads: Axes = ()
    queries: Axes = ()
    keys: Axes = ()

    def shards(self, axes: Axes) -> int:
        """How many devices divide what is sharded over these axes."""
        return prod(self.mesh.shape[axis] if self.mesh is not None else lax.axis_size(axis) for axis in axes)

    def __str__(self) -> str:
        parts = [
            f"{what} over {' and '.join(map(repr, axes))} ({self.shards(axes)})"
            for what, axes in (
                *(("batch", self.examples), ("heads", self.heads), ("sequence", self.queries)),
                ("keys", () if self.queries else self.keys),
            )
            if axes
        ]
        return f"{', '.join(parts) or 'all of it on each device'}: queries and outputs stay where they are"


def placement_of(
    call: Call,
    sharding: PartitionSpec | NamedSharding | None,
    axis_name: str | Axes | None = None,
    context_parallel: object = None,
) -> tuple[Call, Placement | None]:
    """A call, and where its parts are, as the type of the query, ``sharding`` or ``axis_name`` says it.

    Returns:
        ``None`` for the placement where none does, or all is on one device.

    Raises:
        TypeError, ValueError: ``sharding`` has another type, or the call cannot follow it.
    """
    _check(sharding)
    typed = _explicit(call.query)
    if axis_name is not None:
        merges = has_all_queries(axis_name, call.query, call.key, context_parallel)
        return call, _inside(sharding, typed, axis_name, merges)
    if typed is None and sharding is None:
        return call, None
    call = replace(call, is_left_to_xla=False)
    if typed is None:
        return call, _as_told(call, sharding, merges=context_parallel == "merge")
    spec = _axes(typed.spec)
    if sharding is not None and _axes(_spec(sharding)) != spec:
        raise ValueError(
            f"sharding is {_spec(sharding)}, but the type of query says {typed.spec}: leave sharding out where the "
            "axes of the mesh are explicit"
        )
    divided: list[Axes] = []
    for name, array in (("key", call.key), ("value", call.value)):
        at = _explicit(array)
        own = _axes(at.spec) if at is not None else ((),) * 4
        # Keys may be divided though the queries are not, over axes that divide nothing else.
        may_be = spec if spec[1] or {*own[1]} & {*spec[0], *spec[2]} else (spec[0], own[1], *spec[2:])
        if at is not None and any(one and one != other for one, other in zip(own, may_be, strict=True)):
            raise ValueError(
                f"{name} is sharded as {at.spec}, but query as {typed.spec}: they must agree on batch and heads, and "
                "on the sequence, of which each device may also have all keys, or all queries; move one by "
                "jax.sharding.reshard"
            )
        divided += [own[1]] if own[1] and own[1] not in divided else []
    if len(divided) > 1:
        raise ValueError(
            f"key is divided over {list(divided[0])} along its sequence, but value over {list(divided[1])}: they must "
            "agree; move one by jax.sharding.reshard"
        )
    return call, _placement("the type of query", spec, typed.mesh, call, keys=divided[0] if divided else ())


def division_of(x: Any, sharding: PartitionSpec | NamedSharding | None) -> tuple[Any, tuple[Axes, ...]] | None:
    """The mesh, and the axes along each axis of an array, as its type says them, or ``sharding``."""
    _check(sharding)
    said = _explicit(x) or sharding
    if said is None:
        return None
    spec, mesh = _axes(_spec(said)), _mesh_of(said)
    _check_axes("sharding", spec, mesh)
    return mesh, spec


def shards_of(axis_name: object, query: object, key: object, context_parallel: object = None) -> tuple[int, int]:
    """How many devices of the surrounding ``shard_map`` divide query and key, by the axes named; 1 for ``None``."""
    if axis_name is None:
        return 1, 1
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "axis_name must be the name of an axis of the mesh that divides the sequence, or a tuple of names, got "
            f"{checks.describe(axis_name)}"
        )
    try:
        size = lax.axis_size(names)
    except NameError:
        raise ValueError(
            f"axis_name is {axis_name!r}, but there is no such axis here: it is for calls inside of a jax.shard_map "
            'over it; for arrays that are whole, say sharding=, the spec of the query, as P(None, "seq")'
        ) from None
    if set(names) & (_varying(query) - _varying(key)):
        raise ValueError(
            f"key is the same on every device of {axis_name!r}, and query is not: where each has all keys, leave "
            "axis_name out and say offset=, the position of its first query"
        )
    if context_parallel == "merge" and set(names) & _varying(query):
        raise ValueError(QUERIES_ARE_DIVIDED)
    return 1 if has_all_queries(axis_name, query, key, context_parallel) else size, size


def has_all_queries(axis_name: object, query: object, key: object, context_parallel: object) -> bool:
    """Whether the keys alone are divided over the devices of the surrounding ``shard_map``, and each has all queries.

    Where it does not check what varies, only ``context_parallel`` says so.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return context_parallel == "merge" or set(names) <= _varying(key) - _varying(query)


def _varying(x: Any) -> Any:
    """The axes of the mesh over which an array varies; where a ``shard_map`` does not check it, none."""
    return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()


def _inside(sharding: Any, typed: Any, axis_name: str | Axes, merges: bool) -> Placement:
    if sharding is not None:
        raise ValueError(
            f"axis_name is {axis_name!r} and sharding {sharding}: give sharding for arrays that are whole, and "
            "axis_name inside of a shard_map, where they are those of one device"
        )
    if typed is not None and any(_axes(typed.spec)):
        raise ValueError(
            f"axis_name is {axis_name!r}, but the type of query says {typed.spec} besides: let the shard_map be over "
            "these axes, too"
        )
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return Placement(None, queries=() if merges else axes, keys=axes)


def _as_told(call: Call, sharding: Any, *, merges: bool) -> Placement | None:
    spec = _axes(_spec(sharding))
    if not any(spec):
        return None
    mesh = _mesh_of(sharding)
    # As many keys as queries are those of the same sequence.
    keys = spec[1] if merges or call.key.shape[1] == call.query.shape[1] else ()
    return _placement("sharding", (spec[0], (), *spec[2:]) if merges else spec, mesh, call, keys=keys)


def _mesh_of(sharding: Any) -> Any:
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"sharding is {sharding}, but there is no mesh: call in `with jax.set_mesh(mesh):`, or give "
            "sharding=NamedSharding(mesh, spec)"
        )
    return mesh


def _check_axes(name: str, spec: tuple[Axes, ...], mesh: Any) -> None:
    named = [axis for axes in spec for axis in axes]
    if unknown := [axis for axis in named if axis not in mesh.shape]:
        raise ValueError(f"{name} names {unknown}, but the axes of the mesh are {list(mesh.shape)}")
    if twice := sorted({axis for axis in named if named.count(axis) > 1}):
        raise ValueError(f"{name} names {twice} twice, but an axis of the mesh divides one axis of an array")


def _placement(name: str, spec: tuple[Axes, ...], mesh: Any, call: Call, keys: Axes) -> Placement:
    if not spec[1] and is_empty(call.query, call.key):
        keys = ()
    _check_axes(name, spec if spec[1] else (spec[0], keys, *spec[2:]), mesh)
    for what, axes, array, axis in (
        *(("batch", spec[0], call.query, 0), ("the sequence", spec[1], call.query, 1)),
        *(("heads", spec[2], call.query, 2), ("dim", spec[3], call.query, 3), ("the keys", keys, call.key, 1)),
    ):
        if axes and what == "dim":
            raise ValueError(
                f"{name} divides dim over {list(axes)}, but only batch, sequence and heads may be divided: gather it "
                "before, by jax.sharding.reshard where the axes of the mesh are explicit"
            )
        shards = prod(mesh.shape[axis] for axis in axes)
        if axes and what in ("the sequence", "the keys") and jax.export.is_symbolic_dim(array.shape[axis]):
            raise ValueError(f"{name} divides {what} over {list(axes)}, but its length is symbolic: give a number")
        if array.shape[axis] % shards:
            which = "key" if what == "the keys" else "query"
            raise ValueError(
                f"{name} divides {what} into {shards}, but the {which} has {array.shape[axis]}: "
                f"{checks.describe(array)}; leave the axis out, or fill it up"
                + ('; where it divides the keys alone, say context_parallel="merge"' if what == "the sequence" else "")
            )
    return Placement(mesh, spec[0], spec[2], spec[1], keys)


def _explicit(x: Any) -> NamedSharding | None:
    """The sharding in the type of an array, where an axis of its mesh is explicit."""
    sharding: Any = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    is_explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if is_explicit else None


def _check(sharding: object) -> None:
    if sharding is not None and not isinstance(sharding, PartitionSpec | NamedSharding):
        raise TypeError(
            "sharding must be a PartitionSpec or a NamedSharding, that of the query, such as "
            f'P("data", None, "model", None), got {checks.describe(sharding)}'
        )


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
