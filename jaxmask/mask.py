"""Masks as descriptions: which (batch, head, query position, key position) may attend.

A mask holds a few integers and, at most, the arrays that its user brought. It is written out only when it is read, by
:meth:`Mask.dense` or :meth:`Mask.bias`. What a leaf means is said in one place, its ``allows``; all else follows.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import Any, ClassVar, Literal, NoReturn, Self, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxmask import bias, checks

# An index array, or an integer, that broadcasts against the others.
Index = Int[Array | np.ndarray, "..."] | int
Allowed = Bool[Array | np.ndarray, "..."] | bool
# A Python int is static structure; an array in its place is traced.
Scalar = int | Int[Array, ""]
Offset = int | Int[Array, ""] | Int[Array, "batch"]


@dataclass_transform(eq_default=False, frozen_default=True)
class Mask:
    """Which (batch, head, query position, key position) may attend. Masks combine by ``&``, ``|`` and ``~``.

    Every mask is a pytree: Python ints are static structure, which ``==`` and ``hash`` see, and arrays are leaves. So a
    mask may be built outside a ``jit`` and passed in, mapped over, carried through a ``scan`` or sharded.

    A new kind of mask is one subclass, which becomes a frozen dataclass and a pytree by being defined::

        class Diagonal(Mask):
            def allows(self, b, h, q, kv):
                return kv == q

    It overrides ``shape`` and ``check_lengths`` only where it holds arrays, or does not look at ``q``.
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

        >>> Causal().allows(0, 0, q=jnp.arange(3), kv=1)
        Array([False,  True,  True], dtype=bool)
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it allows(b, h, q, kv)")

    def dense(
        self, query_length: int, key_length: int, *, offset: Offset | None = None
    ) -> Bool[Array, "batch heads query_length key_length"]:
        """The mask written out, ``True`` where a query may attend to a key.

        Args:
            query_length: static.
            key_length: static.
            offset: position of the first query, which is the number of keys already cached: an int, or a traced int32
                of shape ``[]`` or ``[batch]``. Needed only where the lengths differ and the mask depends on positions.
                Another offset never recompiles.

        Returns:
            bool ``[batch|1, heads|1, query_length, key_length]``. Read inside a ``jit``, XLA may compute it where it is
            used and never write it out, as in a sum; before a softmax, or a broadcast over heads, some backends write
            it out once.

        Raises:
            ValueError: the lengths differ and no offset says how they are aligned; a length is not positive, or does
                not match an array in the mask.
            TypeError: a length is not a Python int, or the offset no integer.

        >>> Causal().dense(2, 3, offset=1)
        Array([[[[ True,  True, False],
                 [ True,  True,  True]]]], dtype=bool)
        """
        return _dense(self, *_checked_lengths(self, query_length, key_length, offset))

    def bias(
        self,
        query_length: int,
        key_length: int,
        dtype: DTypeLike = jnp.float32,
        *,
        offset: Offset | None = None,
    ) -> Float[Array, "batch heads query_length key_length"]:
        """The mask as what is added to attention scores: ``0`` where a query may attend, else ``finfo(dtype).min``.

        Args:
            query_length, key_length, offset: as in :meth:`dense`.
            dtype: the floating dtype of the scores, static.

        Returns:
            ``dtype`` ``[batch|1, heads|1, query_length, key_length]``; the bits of Transformers' ``eager_mask``.

        Raises:
            ValueError, TypeError: as :meth:`dense`; a dtype that is not floating, or float64 without 64-bit mode.

        >>> SlidingWindow(1).bias(2, 2, jnp.float16)
        Array([[[[ 0.00e+00, -6.55e+04],
                 [-6.55e+04,  0.00e+00]]]], dtype=float16)
        """
        lengths = _checked_lengths(self, query_length, key_length, offset)
        return _bias(self, *lengths, checks.float_dtype(dtype))

    def __and__(self, other: "Mask") -> "Mask":
        return And.of(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or.of(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def __rand__(self, other: object) -> NoReturn:
        _refuse_operand(other)

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
        arguments = [getattr(self, field.name) for field in fields(self)]  # pyright: ignore[reportArgumentType]
        return f"{type(self).__name__}({', '.join(map(checks.describe, arguments))})"

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, eq=False, repr=False)(cls)
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, cls._flatten)

    def _traced(self) -> tuple[str, ...]:
        """The names of the fields that hold arrays or masks.

        Found once and kept through unflattening, when anything at all may stand in the place of an array.
        """
        if "_traced_names" not in self.__dict__:
            names = (field.name for field in fields(self))  # pyright: ignore[reportArgumentType]
            self.__dict__["_traced_names"] = tuple(name for name in names if not _is_static(getattr(self, name)))
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

    >>> Full() & Causal()
    Causal()
    """

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # no position of a query is looked at

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return True

    def __invert__(self) -> Mask:
        return Empty()


class Empty(Mask):
    """No pair may attend: the neutral element of ``|``."""

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # no position of a query is looked at

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return False

    def __invert__(self) -> Mask:
        return Full()


class Causal(Mask):
    """A query attends to the keys up to its own position: ``kv <= q``.

    Source: ``causal_mask_function`` in Transformers' ``masking_utils``.

    >>> Causal().dense(2, 2)
    Array([[[[ True, False],
             [ True,  True]]]], dtype=bool)
    """

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv <= q


class SlidingWindow(Mask):
    """A query attends to the last ``size`` keys, its own included: ``q - size < kv <= q``.

    Source: ``sliding_window_causal_mask_function`` in Transformers' ``masking_utils``, and Mistral
    (https://arxiv.org/abs/2310.06825). The older ``AttentionMaskConverter(True, sliding_window)`` lets one key more
    through: ``SlidingWindow(sliding_window + 1)``.

    Args:
        size: number of keys, at least 1; an int, or a traced scalar, for which ``key_length`` means "no window".

    Raises:
        ValueError: ``size`` is less than 1.

    >>> SlidingWindow(2).dense(3, 3)
    Array([[[[ True, False, False],
             [ True,  True, False],
             [False,  True,  True]]]], dtype=bool)
    """

    size: Scalar

    def __post_init__(self) -> None:
        _check_scalar("size", self.size, minimum=1)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return (kv <= q) & (q - kv < self.size)


class Window(Mask):
    """A query attends to ``left`` keys before its position, itself, and ``right`` keys after.

    That is ``q - left <= kv <= q + right``; ``None`` is unbounded. Source: ``local_window_size`` of
    ``jax.nn.dot_product_attention``, ``window_size`` of FlashAttention (whose ``-1`` is ``None`` here).

    Args:
        left, right: number of keys, at least 0; an int, a traced scalar, or ``None``.

    Raises:
        ValueError: ``left`` or ``right`` is negative.

    >>> Window(0, 1).dense(3, 3)
    Array([[[[ True,  True, False],
             [False,  True,  True],
             [False, False,  True]]]], dtype=bool)
    """

    left: Scalar | None
    right: Scalar | None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _check_scalar(name, getattr(self, name), minimum=0)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        # Differences, and not `q + right`, which could overflow.
        near_left = True if self.left is None else q - kv <= self.left
        near_right = True if self.right is None else kv - q <= self.right
        return near_left & near_right


class Prefix(Mask):
    """Every query attends to the first ``length`` keys: ``kv < length``.

    With ``|`` it opens a prefix to a causal mask: a prefix language model (https://arxiv.org/abs/1910.10683), the
    prompts of p-tuning v2 (https://arxiv.org/abs/2110.07602), attention sinks (https://arxiv.org/abs/2309.17453).

    Args:
        length: number of keys, at least 0; an int, or a traced int32 ``[]`` or ``[batch]``.

    Raises:
        ValueError: ``length`` is negative.

    >>> (Causal() | Prefix(2)).dense(3, 3)
    Array([[[[ True,  True, False],
             [ True,  True, False],
             [ True,  True,  True]]]], dtype=bool)
    """

    length: Scalar | Int[Array, "batch"]

    def __post_init__(self) -> None:
        _check_scalar("length", self.length, minimum=0, ranks=(0, 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (np.shape(self.length) or (1,))[0], 1, 1

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # no position of a query is looked at

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv < (_lookup(self.length, b=b) if np.ndim(self.length) else self.length)


class Padding(Mask):
    """A query attends to the keys that are valid: ``valid[b, kv]``.

    Source: ``padding_mask_function`` in Transformers' ``masking_utils``.

    Args:
        valid: bool or integer ``[batch, kv]``; true, or not zero, where there is a token and no padding.

    Raises:
        TypeError: ``valid`` is no array of bools or integers (an additive bias, a torch tensor).
        ValueError: ``valid`` has another rank.

    >>> Padding(jnp.array([[0, 1, 1]])).dense(1, 3)
    Array([[[[False,  True,  True]]]], dtype=bool)
    """

    valid: Bool[Array | np.ndarray, "batch kv"] | Int[Array | np.ndarray, "batch kv"]

    def __post_init__(self) -> None:
        hint = "; make it bool by `valid != 0` from a 0/1 mask, or by `valid == 0` from an additive bias"
        checks.array("valid", self.valid, "bi", 2, hint=hint)
        if isinstance(self.valid, np.ndarray):
            # Before JAX, without 64-bit mode, cuts an int64 in half.
            object.__setattr__(self, "valid", self.valid != 0)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.valid.shape[0], 1, self.valid.shape[1]

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        if self.valid.shape[1] != key_length:
            raise ValueError(
                f"key_length is {key_length}, but valid of Padding describes {self.valid.shape[1]} keys "
                f"({checks.describe(self.valid)}): it must cover every key, the cached ones included"
            )

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return _lookup(self.valid, b=b, kv=kv) != 0


class Dense(Mask):
    """The pairs that are given: ``allowed[b, h, q - offset, kv]``.

    Rows that are not given may not attend.

    Args:
        allowed: bool, ``[q, kv]`` or ``[batch, heads, q, kv]``, where a size of 1 serves every index.
        offset: position of the first row given, for an array that describes just the queries at hand and is combined
            with masks that know absolute positions; an int, or a traced scalar.

    Raises:
        TypeError: ``allowed`` is not bool.
        ValueError: ``allowed`` has another rank; a rank of 3 could mean batch or heads, and is not guessed.

    >>> (Causal() & Dense(jnp.array([[True, False, True]]))).dense(1, 3, offset=2)
    Array([[[[ True, False,  True]]]], dtype=bool)
    """

    allowed: Bool[Array | np.ndarray, "q kv"] | Bool[Array | np.ndarray, "batch heads q kv"]
    offset: Scalar = 0

    def __post_init__(self) -> None:
        hint = "; make it bool by `allowed != 0` from a 0/1 mask, or by `allowed == 0` from an additive bias"
        checks.array("allowed", self.allowed, "b", 2, 4, hint=hint)
        _check_scalar("offset", self.offset, minimum=-checks.INT32_MAX)

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _, kv = _as_4d(self.allowed).shape
        return batch, heads, kv

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        *_, rows, kv = self.allowed.shape
        if kv not in (1, key_length):
            raise ValueError(
                f"key_length is {key_length}, but allowed of Dense has {kv} keys ({checks.describe(self.allowed)})"
            )
        if rows == 1 or checks.is_array(offset) or checks.is_array(self.offset):
            return
        start = 0 if offset is None else offset
        if not 0 <= start - self.offset <= rows - query_length or (offset is None and rows != query_length):
            raise ValueError(
                f"allowed of Dense has {rows} rows, for the queries at {self.offset} to {self.offset + rows - 1}, but "
                f"{query_length} queries from {start} on were asked for: where the rows are just these queries, say "
                "Dense(allowed, offset=<position of the first>)"
            )

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        allowed = _as_4d(self.allowed)
        rows = allowed.shape[2]
        row = q - self.offset
        given = True if rows == 1 else (row >= 0) & (row < rows)
        return given & _lookup(allowed, b=b, h=h, q=row, kv=kv)


class Predicate(Mask):
    """The pairs for which a function returns true: ``fn(b, h, q, kv)``.

    The ``mask_mod`` of PyTorch's FlexAttention.

    Args:
        fn: takes four int32 arrays that broadcast against each other (batch, head, query position, key position), and
            returns a bool array that broadcasts with them. It is part of the mask's static structure, compared by
            identity: define it once, for another function is another compilation.
        batch, heads: the sizes of the axes that ``fn`` looks at, where no mask beside it has them; static.

    Raises:
        TypeError: ``fn`` is not callable or, when the mask is read, does not return bool.
        ValueError: when the mask is read, ``fn`` returns a shape that does not broadcast to its arguments.

    >>> def strided(b, h, q, kv):
    ...     return kv % 2 == 0
    >>> (Causal() & Predicate(strided)).dense(1, 4, offset=3)
    Array([[[[ True, False,  True, False]]]], dtype=bool)
    """

    fn: Callable[[Any, Any, Any, Any], Any]
    batch: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function of (b, h, q, kv), got {checks.describe(self.fn)}")
        for name in ("batch", "heads"):
            if getattr(self, name) is not None:
                checks.length(name, getattr(self, name))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch or 1, self.heads or 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        # A size of 1 serves every index, as in broadcasting.
        b, h = 0 if self.batch == 1 else b, 0 if self.heads == 1 else h
        allowed = jnp.asarray(self.fn(*map(jnp.asarray, (b, h, q, kv))))
        if allowed.dtype != jnp.bool_:
            raise TypeError(f"fn of Predicate must return bool, got {checks.describe(allowed)} from {self.fn!r}")
        shape = jnp.broadcast_shapes(*map(jnp.shape, (b, h, q, kv)))
        if not checks.broadcasts_to(allowed.shape, shape):
            raise ValueError(
                f"fn of Predicate must return a shape that broadcasts to {list(shape)}, got {checks.describe(allowed)} "
                f"from {self.fn!r}"
            )
        return allowed


class _Combination(Mask):
    """Masks read together: flat, and without neutral elements."""

    masks: tuple[Mask, ...]

    symbol: ClassVar[str]
    neutral: ClassVar[type[Mask]]
    absorbing: ClassVar[type[Mask]]

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self.masks]
        for name, *sizes in zip(("batch", "heads", "kv"), *shapes, strict=True):
            if len(set(sizes) - {1}) > 1:
                found = ", ".join(
                    f"{size} in {part!r}" for size, part in zip(sizes, self.masks, strict=True) if size != 1
                )
                raise ValueError(f"masks joined by {self.symbol} must agree on the size of {name}, got {found}")

    @classmethod
    def of(cls, left: Mask, right: object) -> Mask:
        """Both masks in one, as flat and as small as the algebra allows."""
        if not isinstance(right, Mask):
            _refuse_operand(right)
        parts = [part for mask in (left, right) for part in (mask.masks if isinstance(mask, cls) else (mask,))]
        parts = [part for part in parts if not isinstance(part, cls.neutral)]
        if any(isinstance(part, cls.absorbing) for part in parts):
            return cls.absorbing()
        return cls(tuple(parts)) if len(parts) > 1 else parts[0] if parts else cls.neutral()

    @property
    def shape(self) -> tuple[int, int, int]:
        # Sizes agree or are 1: the last of the others is as good as any.
        shapes = zip(*(part.shape for part in self.masks), strict=True)
        batch, heads, kv = ([1, *(size for size in sizes if size != 1)][-1] for sizes in shapes)
        return batch, heads, kv

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        for part in self.masks:
            part.check_lengths(query_length, key_length, offset)

    def __repr__(self) -> str:
        # `&` binds tighter than `|`, so that an Or inside an And is what needs parentheses.
        parts = (f"({part!r})" if isinstance(part, Or) else repr(part) for part in self.masks)
        return f" {self.symbol} ".join(parts)


class And(_Combination):
    """The pairs that every one of the masks allows; written ``a & b``."""

    symbol, neutral, absorbing = "&", Full, Empty

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.and_, (part.allows(b, h, q, kv) for part in self.masks))


class Or(_Combination):
    """The pairs that one of the masks allows; written ``a | b``."""

    symbol, neutral, absorbing = "|", Empty, Full

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return reduce(operator.or_, (part.allows(b, h, q, kv) for part in self.masks))


class Not(Mask):
    """The pairs that the mask does not allow; written ``~a``."""

    mask: Mask

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.mask.shape

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        self.mask.check_lengths(query_length, key_length, offset)

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return jnp.logical_not(self.mask.allows(b, h, q, kv))

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Combination) else f"~{self.mask!r}"


def _checked_lengths(mask: Mask, query_length: int, key_length: int, offset: Offset | None) -> tuple[int, int, Offset]:
    query_length = checks.length("query_length", query_length)
    key_length = checks.length("key_length", key_length)
    if offset is not None:
        _check_scalar("offset", offset, minimum=-checks.INT32_MAX, ranks=(0, 1))
    mask.check_lengths(query_length, key_length, offset)
    return query_length, key_length, 0 if offset is None else offset


# The offset is traced even where it is a Python int, so that decoding step by step compiles once.
@partial(jax.jit, static_argnames=("query_length", "key_length"))
def _dense(mask: Mask, query_length: int, key_length: int, offset: Offset) -> Bool[Array, "batch heads q kv"]:
    batch, heads, _ = mask.shape
    first = jnp.asarray(offset, jnp.int32).reshape(-1, 1, 1, 1)
    if first.shape[0] != 1 and batch not in (1, first.shape[0]):
        raise ValueError(f"offset is for a batch of {first.shape[0]}, but {mask!r} for one of {batch}")
    shape = (first.shape[0] if batch == 1 else batch, heads, query_length, key_length)
    b, h, q, kv = (_indices(size, axis) for axis, size in enumerate(shape))
    allowed = mask.allows(b, h, q + first, kv)
    # An array tells the size of the batch, be it 1. Of heads, 1 tells nothing: arrays have it to fit any number.
    if all(jnp.ndim(array) == 0 for array in (*jax.tree.leaves(mask), offset)):
        _check_ignores("batch", lambda two: mask.allows(two, h, q + first, kv), mask)
    if heads == 1:
        _check_ignores("heads", lambda two: mask.allows(b, two, q + first, kv), mask)
    return jnp.broadcast_to(allowed, shape)


def _indices(size: int, axis: int) -> Int[Array | np.ndarray, "..."]:
    """``0, 1, …`` along one of the four axes; in NumPy, where its contents tell ``_lookup`` that these are all."""
    shape = _along(axis, size)
    if jax.export.is_symbolic_dim(size):
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return np.arange(size, dtype=np.int32).reshape(shape)


def _check_ignores(name: Literal["batch", "heads"], allows: Callable[[Index], Allowed], mask: Mask) -> None:
    """Refuse a mask that differs between examples, or heads, where nothing says how many of them there are."""
    axis = ("batch", "heads").index(name)
    allowed = jax.eval_shape(lambda: jnp.asarray(allows(_indices(2, axis))))
    if allowed.ndim == 4 and allowed.shape[axis] == 2 and mask.shape[axis] == 1:
        raise ValueError(
            f"{mask!r} looks at its index of {name}, but nothing says how many there are: give the size, as by "
            f"Predicate(fn, {name}=…), or combine it with a mask that has it"
        )


@partial(jax.jit, static_argnames=("query_length", "key_length", "dtype"))
def _bias(
    mask: Mask, query_length: int, key_length: int, offset: Offset, dtype: np.dtype[Any]
) -> Float[Array, "batch heads q kv"]:
    return bias.from_allowed(_dense(mask, query_length, key_length, offset), dtype)


def _check_scalar(name: str, value: Any, minimum: int, ranks: tuple[int, ...] = (0,)) -> None:
    if checks.is_array(value):
        checks.array(name, value, "i", *ranks)
        if isinstance(value, np.ndarray) and value.size and abs(value).max() > checks.INT32_MAX:
            raise ValueError(f"{name} must fit an int32, got {value}")
    else:
        checks.integer(name, value, minimum)


def _is_static(value: object) -> bool:
    return value is None or isinstance(value, int) or callable(value)


def _as_4d(array: Any) -> Any:
    return array[(None,) * (4 - array.ndim)]


def _lookup(array: Any, **indices: Index) -> Array:
    """``array[indices]``, where a size of 1 serves every index, as in broadcasting.

    The indices are named for the axes of the array, a selection of ``b``, ``h``, ``q``, ``kv``. Those that run over a
    whole axis make it a broadcast, and no gather: faster on a TPU, and without communication where the axis is sharded.
    """
    array = jnp.asarray(array)
    axes = [("b", "h", "q", "kv").index(name) for name in indices]
    sizes = dict(zip(axes, array.shape, strict=True))
    spread = array.reshape([sizes.get(axis, 1) for axis in range(4)])
    picked = [
        (axis, index)
        for axis, index in zip(axes, indices.values(), strict=True)
        if sizes[axis] != 1 and not _is_whole(index, axis, sizes[axis])
    ]
    if not picked:
        return spread
    if len(picked) == 1 and np.shape(picked[0][1]) == _along(picked[0][0], np.size(picked[0][1])):
        axis, index = picked[0]
        return jnp.take(spread, jnp.ravel(index), axis, mode="clip")
    found = tuple(0 if size == 1 else index for size, index in zip(array.shape, indices.values(), strict=True))
    return array.at[found].get(mode="clip")


def _along(axis: int, size: int) -> tuple[int, ...]:
    return tuple(size if i == axis else 1 for i in range(4))


def _is_whole(index: Index, axis: int, size: int) -> bool:
    """Whether an index is known, now, to be ``0, 1, …, size - 1`` along its own axis."""
    return (
        isinstance(index, np.ndarray)
        and index.shape == _along(axis, size)
        and np.array_equal(index.reshape(-1), np.arange(size))
    )


def _refuse_operand(value: object) -> NoReturn:
    hint = "; wrap it in Dense(allowed) or Padding(valid)" if checks.is_array(value) else ""
    raise TypeError(f"a mask combines only with masks, got {checks.describe(value)}{hint}")
