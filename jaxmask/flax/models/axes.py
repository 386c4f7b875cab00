"""Names for the dimensions of parameters, caches and tokens, by which flax's rules of logical axes shard models."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import spmd
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike

from jaxmask import checks
from jaxmask.flax.cache import Cache, LayerCache

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
# The same, as they hold on the mesh.
Current = tuple[tuple[str, tuple[str, ...]], ...]
X = TypeVar("X")
M = TypeVar("M", bound=nnx.Module)

NAMES = (
    # tokens
    *("batch", "length", "vocab"),
    # caches
    "slots",
    # the residual stream, and the inside of the feed-forward
    *("dim", "hidden"),
    # attention
    *("heads", "kv_heads", "head_dim"),
    # what is fused in one weight
    *("query_key_value", "gate_up"),
    # tables
    *("positions", "token_types", "buckets", "bucket_heads"),
    # norms, whose few weights each device has
    "norm",
)
# These, which a model takes apart or needs as a whole, no rule divides.
WHOLE = "head_dim", "query_key_value", "gate_up", "buckets", "bucket_heads"


def axis_rules(**axes: str | tuple[str, ...] | None) -> Rules:
    """Rules for ``nnx.logical_axis_rules``, by which the models of this package are sharded over a mesh.

    A model that is made or loaded under these rules and a mesh has its parameters where they say. A call under them
    puts tokens there, and so does ``empty_cache`` with keys and values. A model that is there already is moved by
    ``nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))``, where ``state`` is
    ``nnx.state(model)``. As in all of flax, a function under ``jax.jit`` reads the rules when it is traced. On a mesh
    with explicit axes, a call without rules follows the types of its arguments.

    With heads, hidden units and the vocabulary divided, a decoder sums over devices once for the embeddings and twice
    in each layer, and sends nothing else.

    Args:
        **axes: over which axis of the mesh, or which of several, each dimension is sharded; each device has all of
            those left out. Tokens are ``batch`` and ``length``; caches have ``slots``, of which each device attends to
            its own, but for the few of a window; embeddings and logits have ``vocab``; ``dim`` is the residual stream;
            attention has ``heads`` and ``kv_heads``; the feed-forward has ``hidden``. Less common are ``positions`` and
            ``token_types``, of tables; and ``norm``, of the scales of norms. An axis divides one dimension of an array.

    Returns:
        A rule for each name. ``nnx.get_partition_spec`` reads them, too.

    Raises:
        ValueError: there is no dimension of that name, or each device needs all of it.
        TypeError: an axis of the mesh is not named by a string.

    >>> from flax import nnx
    >>> from jaxmask.flax import Decoder, DecoderConfig, DecoderLayer, generate
    >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"))  # as many devices as there are
    >>> rules = axis_rules(batch="data", vocab="tensor", heads="tensor", kv_heads="tensor", hidden="tensor")
    >>> config = DecoderConfig(16, 8, 16, heads=4, kv_heads=2, head_dim=4, layers=(DecoderLayer(),))
    >>> with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
    ...     model = Decoder(config, rngs=nnx.Rngs(0))
    ...     new = generate(model, jnp.array([[5, 6, 7], [8, 9, 1]]), max_new_tokens=3).tokens
    >>> tuple(model.blocks[0].feed_forward.down.weight.sharding.spec)  # of [dim, hidden]
    (None, 'tensor')
    """
    if unknown := set(axes) - set(NAMES):
        raise ValueError(f"the names of dimensions are {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for name, over in axes.items():
        if name in WHOLE and over is not None:
            raise ValueError(f"{name} cannot be divided, for each device needs all of it, got {over!r}; leave it out")
        if not all(isinstance(axis, str) for axis in _names(over)):
            raise TypeError(
                f"{name} must be an axis of the mesh, by its name, a tuple of names, or None, got "
                f"{checks.describe(over)}"
            )
    return tuple((name, axes.get(name)) for name in NAMES)


def current_rules() -> Current:
    """The rules of the surrounding ``nnx.logical_axis_rules``, hashable; none without a mesh to apply them to.

    Axes of a surrounding ``shard_map`` are left out: what they divide is divided already.

    Raises:
        ValueError: some axes of the mesh are explicit, and some automatic.
    """
    given: Any = spmd.get_logical_axis_rules()
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = {axis: kind for axis, kind in kinds.items() if kind != AxisType.Manual}
    if not given or not free:
        return ()
    if len({*free.values()}) > 1:
        raise ValueError(f"rules need a mesh whose axes are all explicit or all automatic, got {free}")
    return tuple(
        (name, tuple(axis for axis in _names(over) if axis in free or axis not in kinds))
        for name, over in dict(given).items()
    )


def named(**sizes: int) -> dict[str, Any]:
    """The metadata of a parameter whose dimensions have these names and sizes. The names alone demand no mesh.

    Raises:
        ValueError: a size does not divide over its axes, or the mesh lacks one of them.
    """
    _check_divides(sizes)
    return {"out_sharding": tuple(sizes), "eager_sharding": False}


def settled(module: M) -> M:
    """A module whose own parameters are where the rules put them, once they are made."""
    for parameter in vars(module).values():
        if isinstance(parameter, nnx.Param):
            parameter.set_value(placed(parameter[...], *parameter.get_metadata("out_sharding")))
    return module


def spec_of(*names: str | None) -> PartitionSpec:
    """Where the rules put dimensions of these names."""
    rules, taken = dict(current_rules()), dict[str, str]()
    for name in filter(None, names):
        for axis in rules.get(name, ()):
            if axis in taken:
                raise ValueError(
                    f"the rules put both {taken[axis]} and {name} over {axis!r}, but they are dimensions of one array, "
                    "and an axis of the mesh divides one: leave one of them out"
                )
            taken[axis] = name
    over = (rules.get(name, ()) if name is not None else () for name in names)
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in over))


def placed(x: X, *names: str | None) -> X:
    """An array whose dimensions have these names, where the rules put them; as it is without names, rules or a mesh.

    Raises:
        ValueError: a size does not divide over its axes, or the mesh lacks one of them.
    """
    if not names or not current_rules():
        return x
    array: Any = jnp.asarray(x)  # pyright: ignore[reportArgumentType]
    _check_divides({name: size for name, size in zip(names, array.shape, strict=True) if name is not None})
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return jax.sharding.reshard(array, spec_of(*names))
    # An array that was made elsewhere is moved; what is traced is where the compiler puts it.
    put = jax.lax.with_sharding_constraint if checks.is_traced(array) else jax.device_put
    return put(array, spec_of(*names))


def empty_cache(
    batch: SupportsIndex,
    length: SupportsIndex,
    windows: Sequence[int | None],
    heads: dict[str, int],
    dim: int,
    dtype: DTypeLike,
) -> Cache:
    """:meth:`Cache.empty`, with its keys and values where the rules put ``batch`` and its heads, ``{name: number}``.

    Where the rules divide slots, it has room for a few more tokens, if need be, so that they divide.
    """
    ((name, kv_heads),), rules = heads.items(), current_rules()
    length = checks.integer("length", length, 1, checks.MOST_POSITIONS)
    length += -length % _shards(dict(rules).get("slots", ()))
    how: dict[str, Any] = {
        "batch": batch,
        "length": length,
        "layers": tuple(windows),
        "kv_heads": kv_heads,
        "dim": dim,
        "dtype": dtype,
    }
    return _sharded_cache(tuple(how.items()), name, rules) if rules else Cache.empty(**how)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sharded_cache(how: tuple[tuple[str, Any], ...], heads: str, rules: Current) -> Cache:
    """A cache that is made by a program, so that at no time a device has all of it."""
    cache, layers = Cache.empty(**dict(how)), list[LayerCache]()
    for layer in cache.layers:
        names = "batch", slots_of(layer), heads, "head_dim"
        layers.append(LayerCache(placed(layer.key, *names), placed(layer.value, *names), layer.is_ring))
    return Cache(tuple(layers), placed(cache.tokens, "batch"))


def rows_beside(cache: Cache, tokens: Any) -> Cache:
    """A cache with its rows where those of the tokens are, on a mesh with explicit axes."""
    mesh = explicit_mesh(tokens)
    return cache if mesh is None else Cache(cache.layers, put(cache.tokens, mesh, spec(tokens)[0]))


def heads_beside(layer: LayerCache, key: Array) -> LayerCache:
    """A layer of a cache with its rows and heads where those of new keys are, on a mesh with explicit axes."""
    if (mesh := explicit_mesh(key)) is None:
        return layer
    rows, _, heads, dim = spec(key)
    key, value = (put(x, mesh, rows, spec(x)[1], heads, dim) for x in (layer.key, layer.value))
    return LayerCache(key, value, layer.is_ring)


def told(second: str | None) -> PartitionSpec | None:
    """What attention is told of where queries are, or a layer of a cache, whose second dimension has this name.

    Types say it where the axes of a mesh are explicit.
    """
    if not current_rules() or AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return None
    return spec_of("batch", second, "heads", "head_dim")


def slots_of(layer: LayerCache) -> str | None:
    """The name of the slots of a layer. A window has few, which every device has."""
    return None if layer.is_ring else "slots"


def explicit_mesh(*arrays: Any) -> Any:
    """The mesh with explicit axes that the type of one of these arrays names; ``None`` where none does."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def spec(x: Any) -> tuple[Any, ...]:
    """What the type of an array says of where each of its dimensions is."""
    at = tuple(jax.typeof(x).sharding.spec)
    return at + (None,) * (x.ndim - len(at))


def put(x: X, mesh: Any, *at: Any) -> X:
    """An array with its dimensions over these axes of a mesh with explicit axes."""
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*at)))


def rows_of(x: Any, *shape: int, value: Any) -> Array:
    """An array filled with a value, ``[batch, *shape]``, whose rows are where those of ``x`` are."""
    mesh = explicit_mesh(x)
    full = jnp.broadcast_to(jnp.asarray(value), (len(x), *shape))
    return full if mesh is None else put(full, mesh, spec(x)[0])


def agree(mesh: Any, x: Array, weight: Array, count: int) -> tuple[Array, Array]:
    """``x`` and ``weight`` as a product over their last ``count`` dimensions takes them: both sharded alike.

    What ``x`` has whole is cut as the weight is. A weight that is sharded over axes that divide the rows of ``x``, as
    weights over the data axis are, is gathered.
    """
    of_x, of_weight = list(spec(x)), list(spec(weight))
    rows = {axis for at in of_x[:-count] for axis in _names(at)}
    for i in range(-count, 0):
        if of_x[i] is None and rows.isdisjoint(_names(of_weight[i])):
            of_x[i] = of_weight[i]
        of_weight[i] = of_x[i]
    taken = {axis for at in of_x for axis in _names(at)}
    of_weight[:-count] = [at if taken.isdisjoint(_names(at)) else None for at in of_weight[:-count]]
    return put(x, mesh, *of_x), put(weight, mesh, *of_weight)


def beside(bias: Array, out: Array) -> Array:
    """A bias of the last dimensions of ``out``, with as many dimensions, where these are."""
    mesh = explicit_mesh(bias, out)
    bias = bias if mesh is None else put(bias, mesh, *spec(out)[-bias.ndim :])
    return jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))


def _names(at: Any) -> tuple[str, ...]:
    return tuple(at) if isinstance(at, tuple | list) else () if at is None else (at,)


def _shards(over: tuple[str, ...]) -> int:
    """How many devices these axes have; an axis that the mesh lacks is refused elsewhere."""
    return prod(jax.sharding.get_abstract_mesh().shape.get(axis, 1) for axis in over)


def _check_divides(sizes: dict[str, int]) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    for name, over in current_rules():
        if name not in sizes:
            continue
        if unknown := [axis for axis in over if axis not in mesh.shape]:
            raise ValueError(f"the rules put {name} over {unknown}, but the axes of the mesh are {list(mesh.shape)}")
        if sizes[name] % (shards := _shards(over)):
            axes = " and ".join(map(repr, over))
            raise ValueError(
                f"{name} must divide over {shards} devices, those of {axes}, where the rules put it, got "
                f"{sizes[name]}; leave {name} out of the rules, or give {axes} fewer devices"
            )
