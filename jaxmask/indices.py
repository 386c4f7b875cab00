"""Index arrays: four of them, along the axes batch, head, query and key, broadcast to every pair of a mask.

Everything here works on NumPy and on JAX arrays alike, so that what is static is computed at trace time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int
from numpy.lib.mixins import NDArrayOperatorsMixin

from jaxmask import checks

AXES = ("b", "h", "q", "kv")


@partial(jax.tree_util.register_dataclass, data_fields=("start",), meta_fields=("size", "axis"))
@dataclass(frozen=True, eq=False)
class Run(NDArrayOperatorsMixin):
    """The consecutive positions ``start, start + 1, …`` along one axis, of which :func:`lookup` takes a slice.

    A run plus or minus a number is a run. In any other operation it is the array of its positions.

    Args:
        start: an int, or a traced int32 scalar.
        size: the number of positions, static.
        axis: 0 to 3 for batch, head, query and key, static.

    >>> run = Run(jnp.int32(2), size=3, axis=3) + 1
    >>> lookup(jnp.array([10, 11, 12, 13, 14, 15]), kv=run).reshape(-1)
    Array([13, 14, 15], dtype=int32)
    """

    start: int | Int[Array | np.ndarray, ""]
    size: checks.Length
    axis: int

    @property
    def shape(self) -> tuple[checks.Length, ...]:
        """``size`` on one of four axes, 1 on the others."""
        return along(self.axis, self.size)

    @property
    def ndim(self) -> int:
        """The number of axes, 4."""
        return 4

    @property
    def positions(self) -> Any:
        """The positions as an int32 array; NumPy where the start is static."""
        return iota(self.size, self.axis) + self.start

    def __add__(self, other: Any) -> Any:
        return Run(self.start + other, self.size, self.axis) if np.ndim(other) == 0 else self.positions + other

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return Run(self.start - other, self.size, self.axis) if np.ndim(other) == 0 else self.positions - other

    def __jax_array__(self) -> Array:
        return jnp.asarray(self.positions)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any) -> Any:
        arrays = [operand.positions if isinstance(operand, Run) else operand for operand in operands]
        return getattr(library(arrays), ufunc.__name__)(*arrays)


# An index array, an integer, or a run, that broadcasts against the others.
Index = Int[Array | np.ndarray, "..."] | np.integer[Any] | int | Run
Allowed = Bool[Array | np.ndarray, "..."] | bool | np.bool_


@runtime_checkable
class View(Protocol):
    """An array in a kernel's memory. It reads itself, and stands in a mask wherever an array does."""

    shape: tuple[int, ...]
    ndim: int
    size: int

    def lookup(self, **indices: Index) -> Any:
        """The elements at the indices of its own axes, in the shape that the indices have together."""
        ...


def is_static(*trees: Any) -> bool:
    """Whether no array in these is a JAX array, so that NumPy computes with them at trace time."""
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trees))


def library(*trees: Any) -> Any:
    """NumPy for static arrays, else ``jax.numpy``."""
    return np if is_static(*trees) else jnp


def along(axis: int, size: checks.Length) -> tuple[checks.Length, ...]:
    """The shape of an index array along one of the four axes."""
    return tuple(size if i == axis else 1 for i in range(4))


def iota(size: checks.Length, axis: int) -> Int[Array | np.ndarray, "..."]:
    """``0, 1, …`` along one of the four axes; in NumPy, so that :func:`lookup` sees that these are all indices."""
    shape = along(axis, size)
    if jax.export.is_symbolic_dim(size):
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return np.arange(size, dtype=np.int32).reshape(shape)


def lookup(array: Any, **indices: Index) -> Any:
    """``array[indices]``: an axis of size 1 serves every index, as in broadcasting, and other indices are clipped.

    An array of the masks is read here and nowhere else, in the cheapest of these ways:

    - an index that is known to run over a whole axis makes it a broadcast, which needs no communication where the axis
      is sharded;
    - a :class:`Run` takes a slice;
    - any other index is gathered;
    - a :class:`View` reads itself.

    Args:
        array: any rank up to 4.
        indices: for each axis of the array one of ``b``, ``h``, ``q``, ``kv``, in this order. Where the array has fewer
            axes than there are indices, it has the last of them.
    """
    indices = dict(list(indices.items())[len(indices) - array.ndim :])
    if isinstance(array, View) and not isinstance(array, jax.Array | np.ndarray):
        return array.lookup(**indices)
    if not isinstance(array, np.ndarray) or not is_static(indices):
        array = jnp.asarray(array)
    sizes = dict(zip(map(AXES.index, indices), array.shape, strict=True))
    array = array.reshape([sizes.get(axis, 1) for axis in range(4)])
    gathered: dict[int, Any] = {}
    for (axis, size), index in zip(sizes.items(), indices.values(), strict=True):
        if size == 1 or _is_whole(index, axis, size):
            continue
        array = unsharded(array, axis)
        if isinstance(index, Run) and index.axis == axis:
            array = _slice(array, axis, index)
        else:
            gathered[axis] = index.positions if isinstance(index, Run) else index
    if not gathered:
        return array
    if len(gathered) == 1:
        ((axis, index),) = gathered.items()
        if np.shape(index) == along(axis, np.size(index)):
            return array.take(index.reshape(-1), axis, mode="clip")
    if isinstance(array, np.ndarray):
        # The axes that are not gathered have their own index, which runs along them.
        at = [gathered.get(axis, 0 if size == 1 else iota(size, axis)) for axis, size in enumerate(array.shape)]
        return array[tuple(np.clip(index, 0, size - 1) for size, index in zip(array.shape, at, strict=True))]
    return _gather(array, gathered)


def _gather(array: Array, at: dict[int, Any]) -> Array:
    """The elements at the indices along some axes; along the others each has its own, and they may be sharded."""
    own = [axis for axis, size in enumerate(array.shape) if axis not in at and size > 1]
    at = {axis: as_4d(jnp.asarray(index)) for axis, index in at.items()} if own else at

    def gather(array: Array, found: dict[int, Any]) -> Array:
        axes = (axis for axis in range(4) if axis not in own)
        return array.at[tuple(found.get(axis, 0) for axis in axes)].get(mode="clip")

    # The last axis first, so that the numbers of those before it stay.
    for axis in own:
        varies = {key: axis if np.shape(index)[axis] > 1 else None for key, index in at.items()}
        gather = jax.vmap(gather, (axis, varies), axis)
    for axis in reversed(own):
        at = {key: index if np.shape(index)[axis] > 1 else index.squeeze(axis) for key, index in at.items()}
    return gather(array, at)


def unsharded(array: Any, axis: int) -> Any:
    """The array, which every device then has whole along this axis: on a mesh with explicit axes this must be said."""
    at = None if isinstance(array, np.ndarray) else jax.typeof(array).sharding
    if at is None or AxisType.Explicit not in at.mesh.axis_types or at.spec[axis] is None:
        return array
    spec = PartitionSpec(*(None if i == axis else names for i, names in enumerate(at.spec)))
    return jax.sharding.reshard(array, NamedSharding(at.mesh, spec))


def _slice(array: Any, axis: int, run: Run) -> Any:
    """The elements of a run along one axis, the first and the last repeated for positions beyond them."""
    size, length = run.size, array.shape[axis]
    if is_static(array, run):
        return array.take(run.positions.reshape(-1), axis, mode="clip")
    near = min(size, length)
    start = jnp.clip(run.start, 0, length - near)
    part = lax.dynamic_slice_in_dim(array, start, near, axis)
    ends = (lax.slice_in_dim(part, i, i + 1, axis=axis) for i in (0, near - 1))
    before, after = (jnp.repeat(end, size, axis) for end in ends)
    shift = jnp.clip(run.start - start, -size, near)
    return lax.dynamic_slice_in_dim(jnp.concatenate((before, part, after), axis), size + shift, size, axis)


def by_example(value: Any, b: Index) -> Any:
    """A number for every example, or the number of each."""
    return lookup(value, b=b) if np.ndim(value) else value


def by_batch(value: Any) -> Any:
    """A number for every example, or one for each ``[batch]``, as int32 ``[batch|1, 1, 1, 1]``."""
    return library(value).asarray(value, np.int32).reshape(-1, 1, 1, 1)


def inside(index: Index, size: checks.Length) -> Allowed:
    """Whether an index is one of an axis of ``size``; ``True`` where that is known beforehand of every index."""
    is_inside = (index >= 0) & (index < size)
    return True if isinstance(is_inside, np.ndarray) and is_inside.all() else is_inside


def common(*sizes: Any) -> Any:
    """The size on which axes agree, where 1 fits any other; sizes may be symbolic."""
    return next((size for size in sizes if size != 1), 1)


def as_4d(array: Any) -> Any:
    """An array with leading axes of size 1, up to four."""
    return array[(None,) * (4 - array.ndim)]


def _is_whole(index: Index, axis: int, size: checks.Length) -> bool:
    """Whether an index is known, now, to be ``0, 1, …, size - 1`` along its own axis."""
    if isinstance(index, Run):
        return isinstance(index.start, int) and (index.start, index.axis, index.size) == (0, axis, size)
    return (
        isinstance(index, np.ndarray)
        and index.shape == along(axis, size)
        and np.array_equal(index.reshape(-1), np.arange(size))
    )
