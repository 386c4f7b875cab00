"""Masks: how they combine by ``&``, ``|`` and ``~``, and the methods by which they are read.

A mask holds a few integers and, at most, the arrays that its user brought. It is written out only by :meth:`Mask.dense`
and :meth:`Mask.bias`. :meth:`Mask.tiles` says where it is empty or full without writing it out, and :meth:`Mask.split`
what a fused kernel can take of it.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, ClassVar, NoReturn, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from jaxmask import checks, native, reading
from jaxmask.description import Description
from jaxmask.indices import Allowed, Index, common, lookup
from jaxmask.native import Native, Split
from jaxmask.positions import Extent, KeyPositions, Offset, Positions, QueryPositions, Scalar
from jaxmask.spans import Bounds, Span
from jaxmask.tiles import TileMap

__all__ = ["And", "Empty", "Full", "KeyPositions", "Mask", "Not", "Offset", "Or", "QueryPositions", "Scalar"]


@dataclass_transform(eq_default=False, frozen_default=True)
class Mask(Description):
    """Which (batch, head, query position, key position) may attend. Masks combine by ``&``, ``|`` and ``~``.

    Every mask is a pytree: Python ints are static structure, which ``==`` and ``hash`` see, and arrays are leaves. So a
    mask may be built outside a ``jit`` and passed in, mapped over, carried through a ``scan`` or sharded.

    A new kind of mask is one subclass, which becomes a frozen dataclass and a pytree by being defined. It is final: it
    cannot be subclassed again. ``allows`` is all that it must say::

        class Diagonal(Mask):
            def allows(self, b, h, q, kv):
                return kv == q

    It may say more: ``tile_bounds`` which tiles are empty or full, ``native`` what fused kernels can take of it. A mask
    that holds arrays says their sizes in ``shape`` and what cannot be read in ``check``; one that does not look at the
    query says ``reads_queries = False``, and one whose arrays have an element for each key ``keys_by_index = True``.

    Raises:
        TypeError: a field is not an int, ``None``, a function, a mask, a tuple of masks or an array; or a class is a
            subclass of one that says what it allows.
    """

    # A picture for notebooks, which the package that draws gives to this class.
    _repr_html_: ClassVar[Callable[..., str]]

    def at_keys(self, key_positions: KeyPositions) -> "Mask":
        """This mask with ``kv`` as the index of a key whose position ``key_positions`` gives.

        A mask whose arrays have an element for each key is read by that index already, and returns itself.
        """
        return self if self.keys_by_index else _AtKeys(self, key_positions)

    def dense(
        self,
        query_length: checks.Length,
        key_length: checks.Length,
        *,
        offset: Offset | None = None,
        query_positions: QueryPositions | None = None,
        key_positions: KeyPositions | None = None,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Bool[Array, "batch heads q kv"]:
        """The mask written out, ``True`` where a query may attend to a key.

        Args:
            query_length, key_length: static.
            offset: position of the first query, which is the number of keys already cached: an int, or a traced int32
                of shape ``[]`` or ``[batch]``. Needed only where the lengths differ and the mask depends on positions.
                Another offset never recompiles.
            query_positions: the position of each query, int32 ``[q]`` or ``[batch, q]``, in place of ``offset`` where
                the queries are not consecutive: a zigzag shard of a sequence, packed rows, a tree of drafts.
            key_positions: the position of each key, int32 ``[kv]`` or ``[batch, kv]``, where it is not its index: in a
                ring buffer, or in a part of the keys. It needs ``offset`` or ``query_positions``. A negative position
                is an empty slot, to which no query attends. Arrays in the mask that have an element for each key (of
                ``Padding``, ``Dense`` and the ``key_ids`` of ``Segments``) are in the order of the keys, not of their
                positions.
            batch, heads: numbers of examples and heads, static, for a mask that looks at ``b`` or ``h`` and has no
                array that tells how many there are.

        Returns:
            bool ``[batch|1, heads|1, query_length, key_length]``. Inside a ``jit``, XLA may compute it where it is used
            and never write it out, as in a sum; before a softmax, or a broadcast over heads, some backends write it out
            once.

        Raises:
            ValueError: the lengths differ and nothing says how they are aligned; ``offset`` and ``query_positions`` are
                both given; a length is not positive, or does not match an array in the mask; a position is known to be
                beyond ±(2**30 - 1) or beyond an array.
            TypeError: a length is not a Python int, or positions are not integers.

        >>> from jaxmask import Causal, SlidingWindow
        >>> Causal().dense(2, 3, offset=1)
        Array([[[[ True,  True, False],
                 [ True,  True,  True]]]], dtype=bool)
        >>> Causal().dense(2, 4, query_positions=jnp.array([0, 3]))  # the first and the last of four tokens
        Array([[[[ True, False, False, False],
                 [ True,  True,  True,  True]]]], dtype=bool)
        >>> ring = jnp.array([4, 5, 2, 3])  # four slots; the oldest two of six keys are gone
        >>> SlidingWindow(3).dense(1, 4, offset=5, key_positions=ring)
        Array([[[[ True,  True, False,  True]]]], dtype=bool)
        """
        checks.contents(mask=self, offset=offset, query_positions=query_positions, key_positions=key_positions)
        mask, at = placed(self, query_length, key_length, offset, query_positions, key_positions)
        return reading.dense(mask, at, _sizes(batch, heads))

    def bias(
        self,
        query_length: checks.Length,
        key_length: checks.Length,
        dtype: DTypeLike = jnp.float32,
        *,
        offset: Offset | None = None,
        query_positions: QueryPositions | None = None,
        key_positions: KeyPositions | None = None,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Float[Array, "batch heads q kv"]:
        """The mask as what is added to attention scores: ``0`` where a query may attend, else ``finfo(dtype).min``.

        Args:
            dtype: the floating dtype of the scores, static.
            query_length, key_length, offset, query_positions, key_positions, batch, heads: as in :meth:`dense`.

        Returns:
            ``dtype`` ``[batch|1, heads|1, query_length, key_length]``; the bits of Transformers' ``eager_mask``.

        Raises:
            ValueError, TypeError: as :meth:`dense`; a dtype that is not floating, or float64 without 64-bit mode.

        >>> from jaxmask import SlidingWindow
        >>> SlidingWindow(1).bias(2, 2, jnp.float16)
        Array([[[[ 0.00e+00, -6.55e+04],
                 [-6.55e+04,  0.00e+00]]]], dtype=float16)
        """
        checks.contents(mask=self, offset=offset, query_positions=query_positions, key_positions=key_positions)
        mask, at = placed(self, query_length, key_length, offset, query_positions, key_positions)
        return reading.bias(mask, at, checks.float_dtype(dtype), _sizes(batch, heads))

    def tiles(
        self,
        query_length: checks.Length,
        key_length: checks.Length,
        *,
        block: int | tuple[int, int] = (128, 128),
        offset: Offset | None = None,
        query_positions: QueryPositions | None = None,
        key_positions: KeyPositions | None = None,
        batch: int | None = None,
        heads: int | None = None,
    ) -> TileMap:
        """Which tiles of the mask are empty, full, or neither, without writing it out.

        Each mask bounds itself on the range of positions of a tile, and ``&``, ``|``, ``~`` combine the bounds by
        Kleene's three-valued logic. It takes time and memory for the tiles, never for the pairs. It is sound: an EMPTY
        tile has no pair that may attend, a FULL tile no pair that may not. PARTIAL is every other tile. Masks of
        positions (``Causal``, the windows, ``Chunked``, ``Prefix``) are exact, and so are ``Causal`` with a window or
        chunks, and with ``Segments`` of consecutive ids, where the positions in a tile are consecutive. Where
        ``Padding`` meets the diagonal, one tile in a row may be PARTIAL though it is empty.

        Args:
            block: number of queries and keys in a tile, or one number for both; static.
            query_length, key_length, offset, query_positions, key_positions, batch, heads: as in :meth:`dense`.

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
        checks.contents(mask=self, offset=offset, query_positions=query_positions, key_positions=key_positions)
        mask, at = placed(self, query_length, key_length, offset, query_positions, key_positions)
        return TileMap.of(reading.states(mask, at, block, _sizes(batch, heads)), mask, at, block)

    def split(
        self,
        query_length: checks.Length,
        key_length: checks.Length,
        *,
        offset: Offset | None = None,
        query_positions: QueryPositions | None = None,
        intervals: bool = False,
    ) -> "Split[Mask]":
        """What of this mask a fused kernel can take in its own arguments, and the mask that is left over.

        Args:
            query_length, key_length, offset, query_positions: as in :meth:`dense`.
            intervals: whether the kernel takes an interval of keys for each query, ``Split.key_interval``. It then says
                every mask that is one, at any position: ``Causal``, windows, ``Chunked``, ``Prefix``, consecutive
                ``Segments``.

        Returns:
            The arguments of ``jax.nn.dot_product_attention``: ``is_causal``, ``local_window_size``,
            ``key_value_seq_lengths``; or the interval. And the ``residual``: a kernel may be used where it is
            ``Full()``.

        Raises:
            ValueError, TypeError: as :meth:`dense`.

        >>> from jaxmask import Chunked, Padding, SlidingWindow
        >>> split = (SlidingWindow(3) & Padding(jnp.ones((1, 8), bool))).split(8, 8)
        >>> print(split.is_causal, split.local_window_size, split.residual)
        True (2, 0) Padding(bool[1, 8])
        >>> start, end = Chunked(3).split(1, 8, offset=4, intervals=True).key_interval
        >>> print(start, end)
        [[3]] [[6]]
        """
        mask, at = placed(self, query_length, key_length, offset, query_positions, None)
        return mask.split_at(at, intervals=intervals)

    def split_at(self, at: Positions, *, intervals: bool = False) -> "Split[Mask]":
        """:meth:`split` at positions that are checked."""
        parts = self.masks if isinstance(self, And) else (self,)
        return native.split(parts, at, common(self.shape[0], at.batch), Full(), intervals=intervals)

    def __and__(self, other: "Mask") -> "Mask":
        return And.of(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or.of(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __rand__(self, other: object) -> "Mask":
        refuse_no_mask(other)

    __ror__ = __rand__
    # NumPy leaves `array & mask` to the line above, instead of combining element by element.
    __array_ufunc__ = None

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is neither true nor false: combine masks by &, | and ~, not by and, or and not")


class Full(Mask):
    """Every pair may attend: the neutral element of ``&``.

    >>> from jaxmask import Causal, Full
    >>> Full() & Causal()
    Causal()
    """

    reads_queries, keys_by_index, shape_is_complete = False, True, True

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return True

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return True, True

    def native(self) -> Native:
        return Native()

    def __invert__(self) -> Mask:
        return Empty()


class Empty(Mask):
    """No pair may attend: the neutral element of ``|``."""

    reads_queries, keys_by_index, shape_is_complete = False, True, True

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return False

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return False, False

    def __invert__(self) -> Mask:
        return Full()


class _Combination(Mask):
    """Masks combined by an operator: flat, and without neutral elements."""

    masks: tuple[Mask, ...]

    symbol: ClassVar[str]
    neutral: ClassVar[type[Mask]]
    absorbing: ClassVar[type[Mask]]
    join: ClassVar[Callable[[Allowed, Allowed], Allowed]]
    shape_is_complete = True

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
    def shape(self) -> checks.Shape:
        return common_shape(self.masks, f"masks joined by {self.symbol}")

    def check(self, extent: Extent) -> None:
        for part in self.masks:
            part.check(extent)

    def at_keys(self, key_positions: KeyPositions) -> Mask:
        return type(self)(tuple(part.at_keys(key_positions) for part in self.masks))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        some, every = zip(*(part.tile_bounds(b, h, q, kv) for part in self.masks), strict=True)
        return reduce(type(self).join, some), reduce(type(self).join, every)

    def __repr__(self) -> str:
        # `&` binds tighter than `|`, so that an Or inside an And is what needs parentheses.
        parts = (f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.masks)
        return f" {self.symbol} ".join(parts)


class And(_Combination):
    """The pairs that every one of the masks allows; written ``a & b``."""

    symbol, neutral, absorbing, join = "&", Full, Empty, operator.and_

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.and_, (part.allows(b, h, q, kv) for part in self.masks))


class Or(_Combination):
    """The pairs that one of the masks allows; written ``a | b``."""

    symbol, neutral, absorbing, join = "|", Empty, Full, operator.or_

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.or_, (part.allows(b, h, q, kv) for part in self.masks))


class Not(Mask):
    """The pairs that the mask does not allow; written ``~a``."""

    mask: Mask

    shape_is_complete = True

    @property
    def shape(self) -> checks.Shape:
        return self.mask.shape

    def check(self, extent: Extent) -> None:
        self.mask.check(extent)

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

    keys_by_index, shape_is_complete = True, True

    @property
    def shape(self) -> checks.Shape:
        batch, heads, _ = self.mask.shape
        *rows, kv = self.key_positions.shape
        return common(batch, *rows), heads, kv

    def check(self, extent: Extent) -> None:
        self.mask.check(extent._replace(queries=None, keys=None, key_length=None))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, q, lookup(self.key_positions, b=b, kv=kv))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(b, h, q, kv.at(lookup(self.key_positions, b=b, kv=kv.positions)))

    def __repr__(self) -> str:
        return f"{self.mask!r}.at_keys({checks.describe(self.key_positions)})"


class _Occupied(Mask):
    """The slots that hold a key: an empty slot has a negative position."""

    reads_queries, shape_is_complete = False, True

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv >= 0

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return kv.max >= 0, kv.min >= 0


class Unknown(Mask):
    """A mask of which only the tiles are asked, and nothing is known."""


def without_arrays(mask: Mask) -> Mask:
    """The mask with each part that holds a JAX array taken for unknown."""

    def holds_array(node: Any) -> bool:
        children = jax.tree.leaves(node, is_leaf=lambda child: child is not node and isinstance(child, Mask))
        return isinstance(node, Mask) and any(isinstance(child, jax.Array) for child in children)

    return jax.tree.map(lambda node: Unknown() if holds_array(node) else node, mask, is_leaf=holds_array)


def common_shape(masks: Sequence[Mask], joined: str) -> checks.Shape:
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


def placed(
    mask: Mask,
    query_length: checks.Length,
    key_length: checks.Length,
    offset: Offset | None,
    query_positions: QueryPositions | None,
    key_positions: KeyPositions | None,
) -> tuple[Mask, Positions]:
    """The mask to be read, as a function of the indices of keys, and the positions; both checked."""
    at = Positions.of(query_length, key_length, offset, query_positions, key_positions)
    if at.keys is None:
        mask.check(at.extent)
        return mask, at
    batch, rows = mask.shape[0], at.batches.get("key_positions", 1)
    if rows != 1 and batch not in (1, rows):
        raise ValueError(f"key_positions is for a batch of {rows}, but {mask!r} for one of {batch}")
    mask = mask.at_keys(at.keys)
    mask.check(at.extent)
    return mask & occupied(at.keys), at


def by_position(mask: Mask, positions: KeyPositions) -> Mask:
    """The mask with ``kv`` as the index of a key whose position is given, by which its arrays are read, too."""
    return _AtKeys(mask, positions)


def occupied(positions: KeyPositions) -> Mask:
    """The keys, by their index, whose position is not negative."""
    return _AtKeys(_Occupied(), positions)


def _sizes(batch: int | None, heads: int | None) -> reading.Sizes:
    return (
        None if batch is None else checks.integer("batch", batch, minimum=1),
        None if heads is None else checks.integer("heads", heads, minimum=1),
    )


def _not(truth: Allowed) -> Allowed:
    return not truth if isinstance(truth, bool) else ~truth


def refuse_no_mask(value: object, expected: str = "a mask combines only with masks") -> NoReturn:
    """Say what was expected, and how an array that came instead becomes a mask."""
    hint = "; wrap it in Dense(allowed) or Padding(valid)" if checks.is_array(value) else ""
    raise TypeError(f"{expected}, got {checks.describe(value)}{hint}")
