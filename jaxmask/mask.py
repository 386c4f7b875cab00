"""Masks as descriptions: which (batch, head, query position, key position) may attend.

A mask holds a few integers and, at most, the arrays that its user brought. It is written out only when it is read, by
:meth:`Mask.dense` or :meth:`Mask.bias`, and :meth:`Mask.tiles` says where it is empty or full without writing it out.
Here is what a mask is, how masks combine and how they are read; the vocabulary is in :mod:`jaxmask.masks`.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxmask import bias, checks
from jaxmask.indices import Allowed, Index, as_rows, by_batch, iota, is_static, key_position
from jaxmask.tiles import Bounds, Span, TileMap, from_bounds

if TYPE_CHECKING:
    from jaxmask.native import Split

# A Python int is static structure; an array in its place is traced.
Scalar = int | Int[Array | np.ndarray, ""]
Offset = int | Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, "batch"]
KeyPositions = Int[Array | np.ndarray, "kv"] | Int[Array | np.ndarray, "batch kv"]


@dataclass_transform(eq_default=False, frozen_default=True)
class Mask:
    """Which (batch, head, query position, key position) may attend. Masks combine by ``&``, ``|`` and ``~``.

    Every mask is a pytree: Python ints are static structure, which ``==`` and ``hash`` see, and arrays are leaves. So a
    mask may be built outside a ``jit`` and passed in, mapped over, carried through a ``scan`` or sharded.

    A new kind of mask is one subclass, which becomes a frozen dataclass and a pytree by being defined::

        class Diagonal(Mask):
            def allows(self, b, h, q, kv):
                return kv == q

    It overrides ``tile_bounds`` to say which tiles are empty or full; ``shape``, ``check_lengths`` and ``at_keys`` only
    where it holds arrays, or does not look at ``q``.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(batch, heads, kv)``, each 1 where the mask fits any size."""
        return (1, 1, 1)

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        """Raise a ``ValueError`` where this mask cannot be read at these lengths.

        Unless a mask knows better, that is where nothing says how queries and keys of different lengths are aligned.
        """
        if offset is None and query_length != key_length:
            raise ValueError(
                f"offset is missing: {query_length} queries and {key_length} keys can be aligned in two ways, which "
                f"{self!r} tells apart; say offset=0 where the first query is at the first key (top-left), or "
                f"offset={key_length - query_length} where the last query is at the last key (bottom-right, a cache)"
            )

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        """Whether head ``h`` of example ``b`` lets the query at position ``q`` attend to the key at position ``kv``.

        Args:
            b, h, q, kv: int32 arrays, or integers, that broadcast against each other.

        Returns:
            bool, in a shape that broadcasts to that of the arguments together.

        >>> from jaxmask import Causal
        >>> Causal().allows(0, 0, q=jnp.arange(3), kv=1)
        Array([False,  True,  True], dtype=bool)
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it allows(b, h, q, kv)")

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        """Whether some pair of each tile may attend, and whether every pair does: ``allows`` in three-valued logic.

        It may err to one side: ``some`` where no pair does, not ``every`` where every pair does. Unless a mask knows
        better, it knows nothing of any tile.

        Args:
            b, h: as in :meth:`allows`.
            q, kv: positions cut into tiles, with their ``min`` and ``max``: int32 ``[batch|1, 1, q_tiles, 1]`` and
                ``[batch|1, 1, 1, kv_tiles]``.

        Returns:
            Two bools, or bool arrays that broadcast to ``[batch, heads, q_tiles, kv_tiles]``.
        """
        return True, False

    def at_keys(self, key_positions: KeyPositions) -> "Mask":
        """This mask with ``kv`` as the index of a key whose position ``key_positions`` gives.

        A mask whose arrays have an element for each key is read by that index already, and returns itself.
        """
        return _AtKeys(self, key_positions)

    def dense(
        self,
        query_length: int,
        key_length: int,
        *,
        offset: Offset | None = None,
        key_positions: KeyPositions | None = None,
    ) -> Bool[Array, "batch heads query_length key_length"]:
        """The mask written out, ``True`` where a query may attend to a key.

        Args:
            query_length: static.
            key_length: static.
            offset: position of the first query, which is the number of keys already cached: an int, or a traced int32
                of shape ``[]`` or ``[batch]``. Needed only where the lengths differ and the mask depends on positions.
                Another offset never recompiles.
            key_positions: the position of each key, int32 ``[kv]`` or ``[batch, kv]``, where it is not its index: in a
                ring buffer, or in a part of the keys. It needs an offset. A negative position is an empty slot, to
                which no query attends. Arrays in the mask that have an element for each key (of ``Padding``, ``Dense``
                and the ``key_ids`` of ``Segments``) are in the order of the keys, not of their positions.

        Returns:
            bool ``[batch|1, heads|1, query_length, key_length]``. Read inside a ``jit``, XLA may compute it where it is
            used and never write it out, as in a sum; before a softmax, or a broadcast over heads, some backends write
            it out once.

        Raises:
            ValueError: the lengths differ and no offset says how they are aligned; a length is not positive, or does
                not match an array in the mask.
            TypeError: a length is not a Python int, or the offset no integer.

        >>> from jaxmask import Causal, SlidingWindow
        >>> Causal().dense(2, 3, offset=1)
        Array([[[[ True,  True, False],
                 [ True,  True,  True]]]], dtype=bool)
        >>> ring = jnp.array([4, 5, 2, 3])  # four slots; the oldest two of six keys are gone
        >>> SlidingWindow(3).dense(1, 4, offset=5, key_positions=ring)
        Array([[[[ True,  True, False,  True]]]], dtype=bool)
        """
        return _dense(*checked(self, query_length, key_length, offset, key_positions))

    def bias(
        self,
        query_length: int,
        key_length: int,
        dtype: DTypeLike = jnp.float32,
        *,
        offset: Offset | None = None,
        key_positions: KeyPositions | None = None,
    ) -> Float[Array, "batch heads query_length key_length"]:
        """The mask as what is added to attention scores: ``0`` where a query may attend, else ``finfo(dtype).min``.

        Args:
            query_length, key_length, offset, key_positions: as in :meth:`dense`.
            dtype: the floating dtype of the scores, static.

        Returns:
            ``dtype`` ``[batch|1, heads|1, query_length, key_length]``; the bits of Transformers' ``eager_mask``.

        Raises:
            ValueError, TypeError: as :meth:`dense`; a dtype that is not floating, or float64 without 64-bit mode.

        >>> from jaxmask import SlidingWindow
        >>> SlidingWindow(1).bias(2, 2, jnp.float16)
        Array([[[[ 0.00e+00, -6.55e+04],
                 [-6.55e+04,  0.00e+00]]]], dtype=float16)
        """
        read = checked(self, query_length, key_length, offset, key_positions)
        return _bias(*read, checks.float_dtype(dtype))

    def tiles(
        self,
        query_length: int,
        key_length: int,
        *,
        block: int | tuple[int, int] = (128, 128),
        offset: Offset | None = None,
        key_positions: KeyPositions | None = None,
    ) -> TileMap:
        """Which tiles of the mask are empty, full, or neither, without writing it out.

        The leaves bound themselves on the range of positions of a tile, and ``&``, ``|``, ``~`` combine what is known
        by Kleene's three-valued logic: it takes time and memory for the tiles, never for the pairs. It is sound: an
        EMPTY tile has no pair that may attend, a FULL one no other. PARTIAL is everything else: tiles that are neither,
        and those of which nothing is known. Single positional leaves (``Causal``, the windows, ``Chunked``, ``Prefix``)
        are exact, and so are ``Causal`` with a window or chunks, and with ``Segments`` of consecutive ids; where
        ``Padding`` meets the diagonal, one tile in a row may be PARTIAL though it is empty.

        Args:
            query_length, key_length, offset, key_positions: as in :meth:`dense`.
            block: number of queries and keys in a tile, or one number for both; static.

        Returns:
            The states, computed by NumPy at trace time where nothing of the mask is a JAX array, else in the program.

        Raises:
            ValueError, TypeError: as :meth:`dense`; a block that is not positive.

        >>> from jaxmask import SlidingWindow
        >>> print(SlidingWindow(8).tiles(16, 16, block=4).states[0, 0])
        [[1 0 0 0]
         [2 1 0 0]
         [1 2 1 0]
         [0 1 2 1]]
        """
        block = checks.block(block)
        mask, query_length, key_length, first = checked(self, query_length, key_length, offset, key_positions)
        states = (_states if is_static(mask, first) else _traced_states)(mask, query_length, key_length, first, block)
        return TileMap(states, mask, first, query_length, key_length, block)

    def split(self, query_length: int, key_length: int, *, offset: Offset | None = None) -> "Split":
        """What of this mask a fused kernel can take in its own arguments, and the mask that is left over.

        Args:
            query_length, key_length, offset: as in :meth:`dense`.

        Returns:
            The arguments of ``jax.nn.dot_product_attention``: ``is_causal``, ``local_window_size``,
            ``key_value_seq_lengths``; and the ``residual``. A kernel may be used where that is ``Full()``.

        Raises:
            ValueError, TypeError: as :meth:`dense`.

        >>> from jaxmask import Padding, SlidingWindow
        >>> split = (SlidingWindow(3) & Padding(jnp.ones((1, 8), bool))).split(8, 8)
        >>> print(split.is_causal, split.local_window_size, split.residual)
        True (2, 0) Padding(bool[1, 8])
        """
        from jaxmask.native import split

        checked(self, query_length, key_length, offset, None)
        return split(self, query_length, key_length, offset)

    def __and__(self, other: "Mask") -> "Mask":
        return And.of(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or.of(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __rand__(self, other: object) -> NoReturn:
        refuse_no_mask(other)

    __ror__ = __rand__
    # So that NumPy leaves `array & mask` to the line above, instead of combining element by element.
    __array_ufunc__ = None

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self!r} is neither true nor false: combine masks by &, | and ~, not by and, or and not")

    def __eq__(self, other: object) -> bool:
        """The same structure and static integers, and the very same arrays: their contents are never compared."""
        if not isinstance(other, Mask):
            return NotImplemented
        (leaves, structure), (other_leaves, other_structure) = jax.tree.flatten(self), jax.tree.flatten(other)
        return structure == other_structure and all(map(operator.is_, leaves, other_leaves))

    def __hash__(self) -> int:
        return hash(jax.tree.structure(self))

    def __repr__(self) -> str:
        arguments = [(getattr(self, field.name), field.default) for field in fields(self)]  # pyright: ignore[reportArgumentType]
        while arguments and arguments[-1][0] is arguments[-1][1]:
            arguments.pop()
        shown = (repr(value) if isinstance(value, Mask) else checks.describe(value) for value, _ in arguments)
        return f"{type(self).__name__}({', '.join(shown)})"

    # The package that draws gives this to the class.
    _repr_html_: ClassVar[Callable[..., str]]

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, eq=False, repr=False)(cls)
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, cls._flatten)

    def _traced(self) -> tuple[str, ...]:
        """The names of the fields that hold arrays or masks.

        Found once and kept through unflattening, when anything at all may stand in the place of an array.
        """
        if "_traced_names" not in self.__dict__:
            names = (field.name for field in fields(self))  # pyright: ignore[reportArgumentType]
            self.__dict__["_traced_names"] = tuple(name for name in names if not _is_structure(getattr(self, name)))
        return self.__dict__["_traced_names"]

    def _flatten(self) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]]:
        traced = self._traced()
        names = (field.name for field in fields(self))  # pyright: ignore[reportArgumentType]
        static = tuple((name, getattr(self, name)) for name in names if name not in traced)
        return tuple(getattr(self, name) for name in traced), (traced, static)

    def _flatten_with_keys(self):
        children, structure = self._flatten()
        keys = map(jax.tree_util.GetAttrKey, self._traced())
        return tuple(zip(keys, children, strict=True)), structure

    @classmethod
    def _unflatten(
        cls, structure: tuple[tuple[str, ...], tuple[tuple[str, Any], ...]], children: Iterable[Any]
    ) -> Self:
        traced, static = structure
        mask = object.__new__(cls)
        mask.__dict__.update(static, _traced_names=traced, **dict(zip(traced, children, strict=True)))
        return mask


class Full(Mask):
    """Every pair may attend: the neutral element of ``&``.

    >>> from jaxmask import Causal, Full
    >>> Full() & Causal()
    Causal()
    """

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # no position of a query is looked at

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return self

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return True

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return True, True

    def __invert__(self) -> Mask:
        return Empty()


class Empty(Mask):
    """No pair may attend: the neutral element of ``|``."""

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # no position of a query is looked at

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return self

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return False

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return False, False

    def __invert__(self) -> Mask:
        return Full()


class _Combination(Mask):
    """Masks read together: flat, and without neutral elements."""

    masks: tuple[Mask, ...]

    symbol: ClassVar[str]
    neutral: ClassVar[type[Mask]]
    absorbing: ClassVar[type[Mask]]

    def __post_init__(self) -> None:
        common_shape(self.masks, f"masks joined by {self.symbol}")

    @classmethod
    def of(cls, left: Mask, right: object) -> Mask:
        """Both masks in one, as flat and as small as the algebra allows."""
        if not isinstance(right, Mask):
            refuse_no_mask(right)
        parts = [part for mask in (left, right) for part in (mask.masks if isinstance(mask, cls) else (mask,))]
        parts = [part for part in parts if not isinstance(part, cls.neutral)]
        if any(isinstance(part, cls.absorbing) for part in parts):
            return cls.absorbing()
        return cls(tuple(parts)) if len(parts) > 1 else parts[0] if parts else cls.neutral()

    @property
    def shape(self) -> tuple[int, int, int]:
        return common_shape(self.masks, f"masks joined by {self.symbol}")

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        for part in self.masks:
            part.check_lengths(query_length, key_length, offset)

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return type(self)(tuple(part.at_keys(key_positions) for part in self.masks))

    def __repr__(self) -> str:
        # `&` binds tighter than `|`, so that an Or inside an And is what needs parentheses.
        parts = (f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.masks)
        return f" {self.symbol} ".join(parts)


class And(_Combination):
    """The pairs that every one of the masks allows; written ``a & b``."""

    symbol, neutral, absorbing = "&", Full, Empty

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.and_, (part.allows(b, h, q, kv) for part in self.masks))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        some, every = zip(*(part.tile_bounds(b, h, q, kv) for part in self.masks), strict=True)
        return reduce(operator.and_, some), reduce(operator.and_, every)


class Or(_Combination):
    """The pairs that one of the masks allows; written ``a | b``."""

    symbol, neutral, absorbing = "|", Empty, Full

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.or_, (part.allows(b, h, q, kv) for part in self.masks))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        some, every = zip(*(part.tile_bounds(b, h, q, kv) for part in self.masks), strict=True)
        return reduce(operator.or_, some), reduce(operator.or_, every)


class Not(Mask):
    """The pairs that the mask does not allow; written ``~a``."""

    mask: Mask

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.mask.shape

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        self.mask.check_lengths(query_length, key_length, offset)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return _not(self.mask.allows(b, h, q, kv))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        some, every = self.mask.tile_bounds(b, h, q, kv)
        return _not(every), _not(some)

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return Not(self.mask.at_keys(key_positions))

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Combination) else f"~{self.mask!r}"


class _AtKeys(Mask):
    """A mask of positions, for keys whose positions are given: ``kv`` is the index of a key."""

    mask: Mask
    key_positions: KeyPositions

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _ = self.mask.shape
        rows, kv = as_rows(self.key_positions).shape
        return rows if batch == 1 else batch, heads, kv

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # positions are given, and any will do

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, q, key_position(self.key_positions, b, kv))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        positions = key_position(self.key_positions, b, kv.positions)
        return self.mask.tile_bounds(b, h, q, kv.at(positions))

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return self

    def __repr__(self) -> str:
        return f"{self.mask!r}.at_keys({checks.describe(self.key_positions)})"


class _Occupied(Mask):
    """The keys that are there: an empty slot has a negative position."""

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv >= 0

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return kv.max >= 0, kv.min >= 0


def common_shape(masks: Sequence[Mask], joined: str) -> tuple[int, int, int]:
    """The sizes ``(batch, heads, kv)`` on which masks agree, where 1 fits any other.

    Raises:
        ValueError: they do not; ``joined`` says what they have to do with each other.
    """
    common: list[int] = []
    for name, *sizes in zip(("batch", "heads", "kv"), *(mask.shape for mask in masks), strict=True):
        known = [size for size in sizes if size != 1]
        if len(set(known)) > 1:
            found = ", ".join(f"{size} in {part!r}" for size, part in zip(sizes, masks, strict=True) if size != 1)
            raise ValueError(f"{joined} must agree on the size of {name}, got {found}")
        common.append([1, *known][-1])
    batch, heads, kv = common
    return batch, heads, kv


def checked(
    mask: Mask, query_length: int, key_length: int, offset: Offset | None, key_positions: KeyPositions | None
) -> tuple[Mask, int, int, Offset]:
    """The mask to be read, of the indices of keys, at the lengths and from the position that are meant."""
    query_length = checks.length("query_length", query_length)
    key_length = checks.length("key_length", key_length)
    if offset is not None:
        checks.scalar("offset", offset, minimum=-checks.INT32_MAX, ranks=(0, 1))
    if key_positions is not None:
        checks.fits_int32("key_positions", checks.array("key_positions", key_positions, "i", 1, 2))
        if key_positions.shape[-1] != key_length:
            raise ValueError(
                f"key_positions must give the position of each of the {key_length} keys, got "
                f"{checks.describe(key_positions)}"
            )
        if offset is None:
            raise ValueError(
                "offset is missing: key_positions says where the keys are, but not where the queries; say offset=<the "
                "position of the first query>"
            )
        batch, rows = mask.shape[0], as_rows(key_positions).shape[0]
        if rows != 1 and batch not in (1, rows):
            raise ValueError(f"key_positions is for a batch of {rows}, but {mask!r} for one of {batch}")
        # In fewer bits, a difference of positions could overflow.
        key_positions = key_positions.astype(np.int32)
        mask = mask.at_keys(key_positions)
    mask.check_lengths(query_length, key_length, offset)
    if key_positions is not None:
        mask = mask & _AtKeys(_Occupied(), key_positions)
    return mask, query_length, key_length, 0 if offset is None else offset


# The offset is traced even where it is a Python int, so that decoding step by step compiles once.
@partial(jax.jit, static_argnames=("query_length", "key_length"))
def _dense(mask: Mask, query_length: int, key_length: int, offset: Offset) -> Bool[Array, "batch heads q kv"]:
    (allowed,), batch, heads = _read(
        mask, query_length, key_length, offset, lambda b, h, q, first, kv: (mask.allows(b, h, q + first, kv),)
    )
    return jnp.broadcast_to(allowed, (batch, heads, query_length, key_length))


@partial(jax.jit, static_argnames=("query_length", "key_length", "dtype"))
def _bias(
    mask: Mask, query_length: int, key_length: int, offset: Offset, dtype: np.dtype[Any]
) -> Float[Array, "batch heads q kv"]:
    return bias.from_allowed(_dense(mask, query_length, key_length, offset), dtype)


def _states(mask: Mask, query_length: int, key_length: int, offset: Offset, block: tuple[int, int]) -> Any:
    def bounds(b: Index, h: Index, q: Any, first: Any, kv: Any) -> Bounds:
        return mask.tile_bounds(b, h, Span(q, 2, block[0], first), Span(kv, 3, block[1]))

    (some, every), batch, heads = _read(mask, query_length, key_length, offset, bounds)
    return from_bounds(some, every, (batch, heads, -(-query_length // block[0]), -(-key_length // block[1])))


_traced_states = jax.jit(_states, static_argnums=(1, 2, 4))


def _read(
    mask: Mask, query_length: int, key_length: int, offset: Offset, look: Callable[..., tuple[Allowed, ...]]
) -> tuple[tuple[Allowed, ...], int, int]:
    """What ``look(b, h, q, first, kv)`` finds for every pair, and the numbers of examples and of heads.

    Of the queries it is told their indices and the position of the first.
    """
    batch, heads, _ = mask.shape
    first = by_batch(offset)
    if first.shape[0] != 1 and batch not in (1, first.shape[0]):
        raise ValueError(f"offset is for a batch of {first.shape[0]}, but {mask!r} for one of {batch}")
    batch = first.shape[0] if batch == 1 else batch
    # An array tells the size of the batch, be it 1. Of heads, 1 tells nothing: arrays have it to fit any number. Where
    # the number is unknown, two of them show whether it matters.
    any_batch = all(np.ndim(array) == 0 for array in (*jax.tree.leaves(mask), offset)) and batch == 1
    any_heads = heads == 1
    b, h = iota(2 if any_batch else batch, 0), iota(2 if any_heads else heads, 1)
    found = look(b, h, iota(query_length, 2), first, iota(key_length, 3))
    for axis, name, unknown in ((0, "batch", any_batch), (1, "heads", any_heads)):
        if unknown and any(np.ndim(part) == 4 and np.shape(part)[axis] == 2 for part in found):
            raise ValueError(
                f"{mask!r} looks at its index of {name}, but nothing says how many there are: give the size, as by "
                f"Predicate(fn, {name}=…), or combine it with a mask that has it"
            )
    return found, batch, heads


def _not(truth: Allowed) -> Allowed:
    return not truth if isinstance(truth, bool) else ~truth


def _is_structure(value: object) -> bool:
    return value is None or isinstance(value, int) or callable(value)


def refuse_no_mask(value: object, expected: str = "a mask combines only with masks") -> NoReturn:
    """Say what was expected, and how an array that came instead becomes a mask."""
    hint = "; wrap it in Dense(allowed) or Padding(valid)" if checks.is_array(value) else ""
    raise TypeError(f"{expected}, got {checks.describe(value)}{hint}")
