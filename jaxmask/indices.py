"""Index arrays: four of them, along the axes batch, head, query and key, broadcast to every pair of a mask.

All of it works on NumPy and on JAX arrays alike, so that what is static is computed at trace time.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

# An index array, or an integer, that broadcasts against the others.
Index = Int[Array | np.ndarray, "..."] | int
Allowed = Bool[Array | np.ndarray, "..."] | bool

AXES = ("b", "h", "q", "kv")


def is_static(*trees: Any) -> bool:
    """Whether no leaf of these is a JAX array, so that NumPy computes with them, at trace time."""
    return not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trees))


def library(*trees: Any) -> Any:
    """NumPy, or JAX where it is needed."""
    return np if is_static(*trees) else jnp


def along(axis: int, size: int) -> tuple[int, ...]:
    """The shape of an index array along one of the four axes."""
    return tuple(size if i == axis else 1 for i in range(4))


def iota(size: int, axis: int) -> Int[Array | np.ndarray, "..."]:
    """``0, 1, …`` along one of the four axes; in NumPy, where its contents tell :func:`lookup` that these are all."""
    shape = along(axis, size)
    if jax.export.is_symbolic_dim(size):
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return np.arange(size, dtype=np.int32).reshape(shape)


def lookup(array: Any, **indices: Index) -> Any:
    """``array[indices]``, where a size of 1 serves every index, as in broadcasting, and others are clipped.

    The indices are named for the axes of the array, a selection of ``b``, ``h``, ``q``, ``kv``. Those that run over a
    whole axis make it a broadcast, and no gather: faster on a TPU, and without communication where the axis is sharded.
    """
    if not isinstance(array, np.ndarray) or not is_static(indices):
        array = jnp.asarray(array)
    sizes = dict(zip(map(AXES.index, indices), array.shape, strict=True))
    spread = array.reshape([sizes.get(axis, 1) for axis in range(4)])
    picked: list[tuple[int, Any]] = [
        (axis, index)
        for (axis, size), index in zip(sizes.items(), indices.values(), strict=True)
        if size != 1 and not _is_whole(index, axis, size)
    ]
    if not picked:
        return spread
    if len(picked) == 1 and np.shape(picked[0][1]) == along(picked[0][0], np.size(picked[0][1])):
        axis, index = picked[0]
        return spread.take(index.reshape(-1), axis, mode="clip")
    found = tuple(0 if size == 1 else index for size, index in zip(array.shape, indices.values(), strict=True))
    if isinstance(array, np.ndarray):
        return array[tuple(np.clip(index, 0, size - 1) for size, index in zip(array.shape, found, strict=True))]
    return array.at[found].get(mode="clip")


def by_example(value: Any, b: Index) -> Any:
    """A number for all, or that of each example."""
    return lookup(value, b=b) if np.ndim(value) else value


def key_position(key_positions: Any, b: Index, kv: Index) -> Any:
    """The position of the key of an index: the index itself, unless positions ``[kv]`` or ``[batch, kv]`` are given."""
    if key_positions is None:
        return kv
    return lookup(as_rows(key_positions), b=b, kv=kv)


def by_batch(value: Any) -> Any:
    """A number for all, or one for each example ``[batch]``, as int32 ``[batch|1, 1, 1, 1]``."""
    return library(value).asarray(value, np.int32).reshape(-1, 1, 1, 1)


def inside(index: Index, size: int) -> Allowed:
    """Whether an index is one of an axis of ``size``."""
    return (index >= 0) & (index < size)


def as_rows(array: Any) -> Any:
    """``[length]`` for every example, or ``[batch, length]``, as the latter."""
    return array if array.ndim == 2 else array[None]


def as_4d(array: Any) -> Any:
    """An array with leading axes of size 1, up to four."""
    return array[(None,) * (4 - array.ndim)]


def _is_whole(index: Index, axis: int, size: int) -> bool:
    """Whether an index is known, now, to be ``0, 1, …, size - 1`` along its own axis."""
    return (
        isinstance(index, np.ndarray)
        and index.shape == along(axis, size)
        and np.array_equal(index.reshape(-1), np.arange(size))
    )
