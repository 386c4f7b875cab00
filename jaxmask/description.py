"""What a mask is: a frozen dataclass and a pytree that says which (batch, head, query, key) may attend.

Here is what every mask says of itself, and how its fields become a pytree. How masks combine and are read is in
:mod:`jaxmask.mask`, the masks themselves are in :mod:`jaxmask.masks`.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, dataclass_transform

import jax
import numpy as np

from jaxmask import checks, serialization
from jaxmask.indices import Allowed, Index
from jaxmask.native import Native
from jaxmask.positions import Extent
from jaxmask.spans import Bounds, Span

# Names of the fields that hold arrays or masks, and names and values of the others.
_Structure = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]


@dataclass_transform(eq_default=False, frozen_default=True)
class Description:
    """What a mask says of itself. Subclass :class:`jaxmask.Mask`, which can also be read and combined.

    A class that defines ``allows`` is final: a subclass could change what it allows, but would inherit what it says of
    tiles and to kernels.
    """

    # Whether it looks at the position of a query. Where it does not, queries and keys need no alignment.
    reads_queries: ClassVar[bool] = True
    # Whether ``kv`` is the index of a key, because its arrays have an element for each key; else it is a position.
    keys_by_index: ClassVar[bool] = False
    # Whether ``shape`` has every size that it depends on. Where it may not, a reading that is not told finds out.
    shape_is_complete: ClassVar[bool] = False

    @property
    def shape(self) -> checks.Shape:
        """``(batch, heads, kv)``, each 1 where the mask fits any size."""
        return (1, 1, 1)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        """Whether head ``h`` of example ``b`` lets the query at position ``q`` attend to the key at position ``kv``.

        Args:
            b, h, q, kv: int32 arrays, or integers, that broadcast against each other.

        Returns:
            bool, in a shape that broadcasts to that of the arguments together.

        >>> import jax.numpy as jnp
        >>> from jaxmask import Causal
        >>> Causal().allows(0, 0, q=jnp.arange(3), kv=1)
        Array([False,  True,  True], dtype=bool)
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it allows(b, h, q, kv)")

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        """Whether some pair of each tile may attend, and whether every pair may: ``allows`` in three-valued logic.

        Bounds may be loose: ``some`` may be True for an empty tile, ``every`` False for a full one. A mask that does
        not override this method says nothing, and all of its tiles are PARTIAL.

        Args:
            b, h: as in :meth:`allows`.
            q, kv: positions cut into tiles, with their ``min`` and ``max``: int32 ``[batch|1, 1, q_tiles, 1]`` and
                ``[batch|1, 1, 1, kv_tiles]``.

        Returns:
            Two bools, or bool arrays that broadcast to ``[batch, heads, q_tiles, kv_tiles]``.
        """
        return True, False

    def native(self) -> Native | None:
        """The mask in the terms that fused kernels know, or ``None`` where they cannot say it.

        >>> from jaxmask import SlidingWindow
        >>> SlidingWindow(4).native()
        Native(left=3, right=0, length=None, interval=None)
        """
        return None

    def check(self, extent: Extent) -> None:
        """Raise a ``ValueError`` where this mask cannot be read at these positions.

        Args:
            extent: what is known of them beforehand. What is traced is not checked: a pair for which an array of the
                mask has no element may not attend.
        """
        if self.reads_queries and not extent.is_aligned:
            queries, keys = extent.query_length, extent.key_length
            bottom_right = f"offset={keys - queries} " if keys is not None else ""
            raise ValueError(
                f"offset is missing: {queries} queries and {keys} keys can be aligned in two ways, which {self!r} "
                f"tells apart; say offset=0 where the first query is at the first key (top-left), or {bottom_right}"
                "where the last query is at the last key (bottom-right); in a cache of fixed size it is the number of "
                "tokens before the first query (the cache_index of Flax)"
            )

    def parts(self) -> "Iterator[Description]":
        """This mask and all masks inside it."""
        yield self
        for field in self._fields():
            value = getattr(self, field.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Description):
                    yield from part.parts()

    def __eq__(self, other: object) -> bool:
        """The same structure and static integers, and the very same arrays: their contents are never compared."""
        if not isinstance(other, Description):
            return NotImplemented
        (leaves, structure), (other_leaves, other_structure) = jax.tree.flatten(self), jax.tree.flatten(other)
        return structure == other_structure and all(map(operator.is_, leaves, other_leaves))

    def __hash__(self) -> int:
        # The hash of a structure does not see its integers, and the masks of many heads would all have the same.
        children, (_, static) = self._flatten()
        nested = (child if isinstance(child, tuple) else (child,) for child in children)
        masks = tuple(mask for group in nested for mask in group if isinstance(mask, Description))
        return hash((type(self), static, masks))

    def __repr__(self) -> str:
        arguments = [(getattr(self, field.name), field.default) for field in self._fields()]
        while arguments and arguments[-1][0] is arguments[-1][1]:
            arguments.pop()
        shown = (_shown(value) for value, _ in arguments)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __init_subclass__(cls) -> None:
        for base in cls.__mro__[1:]:
            if base is not Description and "allows" in vars(base):
                raise TypeError(
                    f"{cls.__name__} cannot be a subclass of {base.__name__}, which says what it allows: a subclass "
                    f"would inherit its tiles and its arguments of kernels, whatever it allows itself; combine "
                    f"{base.__name__} with another mask by &, | and ~, or subclass Mask"
                )
        for name in ("allows", "tile_bounds"):
            if name in vars(cls):
                setattr(cls, name, _returns_bools(vars(cls)[name]))
        if "__post_init__" in vars(cls):
            cls._check_fields = cls.__post_init__
            cls.__post_init__ = Description.__post_init__
        dataclass(frozen=True, eq=False, repr=False)(cls)
        cls.__init__ = _says_what_it_takes(cls.__init__)
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, cls._flatten)
        serialization.register(cls, cls._of_saved)

    def __post_init__(self) -> None:
        # What a class says in its own `__post_init__` is called from here, when its integers are those of Python.
        names = [field.name for field in self._fields()]
        self._set(**{name: checks.as_static(getattr(self, name)) for name in names})
        self._check_fields()
        for name in names:
            value = getattr(self, name)
            if isinstance(value, np.ndarray) and _may_change(value):
                value = _copied(value)
                self._set(**{name: value})
            masks = value if isinstance(value, tuple) else (value,)
            is_mask = all(isinstance(mask, Description) for mask in masks)
            # A function may also be a pytree with arrays of its own, as a Partial is.
            if not (is_mask or _is_static(value) or checks.is_array(value) or callable(value)):
                raise TypeError(
                    f"{name} of {type(self).__name__} must be an int, None, a function, a mask, a tuple of masks or an "
                    f"array, got {checks.describe(value)}"
                )

    def _check_fields(self) -> None:
        """What a class checks of its fields, as its ``__post_init__``."""

    @classmethod
    def _fields(cls) -> "tuple[Field[Any], ...]":
        return fields(cls)  # pyright: ignore[reportArgumentType]

    def _set(self, **values: Any) -> None:
        """Set fields while the mask is built."""
        self.__dict__.update(values)

    def _traced(self) -> tuple[str, ...]:
        """The names of the fields that hold arrays or masks.

        They are found once and kept through unflattening, when anything at all may stand in the place of an array.
        """
        if "_traced_names" not in self.__dict__:
            names = (field.name for field in self._fields())
            self._set(_traced_names=tuple(name for name in names if not _is_static(getattr(self, name))))
        return self.__dict__["_traced_names"]

    def _flatten(self) -> tuple[tuple[Any, ...], _Structure]:
        traced = self._traced()
        names = (field.name for field in self._fields())
        static = tuple((name, getattr(self, name)) for name in names if name not in traced)
        return tuple(getattr(self, name) for name in traced), (traced, static)

    def _flatten_with_keys(self) -> tuple[tuple[Any, ...], _Structure]:
        children, structure = self._flatten()
        keys = map(jax.tree_util.GetAttrKey, self._traced())
        return tuple(zip(keys, children, strict=True)), structure

    @classmethod
    def _of_saved(cls, structure: Any, children: Iterable[Any]) -> Any:
        """A mask from a saved program, which must have the fields of this class."""
        try:
            traced, static = structure
            found = {*traced, *dict(static)}
        except (TypeError, ValueError):
            found = set[str]()
        expected = {field.name for field in cls._fields()}
        if found != expected:
            raise ValueError(f"{cls.__name__} has the fields {sorted(expected)}, but other ones in the saved program")
        return cls._unflatten(structure, children)

    @classmethod
    def _unflatten(cls, structure: _Structure, children: Iterable[Any]) -> Any:
        traced, static = structure
        mask = object.__new__(cls)
        mask._set(**dict(static), **dict(zip(traced, children, strict=True)), _traced_names=traced)
        return mask


def _returns_bools(method: Callable[..., Any]) -> Callable[..., Any]:
    """``allows`` or ``tile_bounds`` of a mask, refused where it returns numbers, of which ``&`` makes other ones."""

    @functools.wraps(method)
    def checked(self: Description, b: Any, h: Any, q: Any, kv: Any) -> Any:
        answer = method(self, b, h, q, kv)
        for part in answer if isinstance(answer, tuple) else (answer,):
            if not isinstance(part, bool) and getattr(part, "dtype", None) != np.bool_:
                raise TypeError(f"{method.__name__} of {self!r} must return bool, got {checks.describe(part)}")
        return answer

    return checked


def _says_what_it_takes(init: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a mask, whose error for other arguments says what the mask is and which it takes."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Description, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except TypeError:
            try:
                signature.bind(self, *args, **kwargs)
            except TypeError as error:
                name, (what, _, _) = type(self).__name__, (type(self).__doc__ or "").partition("\n")
                takes = ", ".join(list(signature.parameters)[1:])
                raise TypeError(f"{name} takes ({takes}), but {error}; it means: {what}") from None
            raise

    return checked


def _may_change(array: Any) -> bool:
    """Whether something could write into the memory of an array: by itself, or by the array that it is a view of."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return True
        array = array.base
    return False


def _copied(array: Any) -> Any:
    """An array that nothing can write into. A broadcast is copied as small as it is.

    A mask is a value: what is written into an array later must not change it, as a compiled program would not see that.
    """
    once = np.array(array[tuple(slice(None if step else 1) for step in array.strides)])
    once.flags.writeable = False
    return np.broadcast_to(once, array.shape)


def _shown(value: object) -> str:
    if isinstance(value, Description):
        return repr(value)
    return value.__name__ if inspect.isfunction(value) else checks.describe(value)


def _is_static(value: object) -> bool:
    """Whether a field is part of the structure: an int, ``None``, or a function that is no pytree."""
    return value is None or isinstance(value, int) or (callable(value) and jax.tree_util.all_leaves([value]))


def is_beyond(known: tuple[Any, Any] | None, count: checks.Length, first: Any = 0) -> bool:
    """Whether positions from the lowest to the highest are known to reach beyond ``count`` that begin at ``first``."""
    if known is None or checks.is_array(first):
        return False
    lowest, highest = known
    return lowest - first < 0 or highest - first >= count
