"""How splash attention decides the pairs of a tile: by segment ids, in the kernel, or by blocks written out.

A mask is divided into parts that ``&`` joins: segment ids say what they can, and the remainder is computed in the
kernel where a TPU can. The blocks of any other remainder are written out in :mod:`.mask_info`.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import NUM_LANES, NUM_SUBLANES
from jaxtyping import Array, Bool, Int

from jaxmask.indices import as_4d, iota
from jaxmask.mask import And, Full, Mask
from jaxmask.masks import Chunked, Prefix, Segments
from jaxmask.positions import Positions

# Primitives that a TPU kernel computes on the positions of a tile, by whether their results may be bools, and the types
# that it computes them for. (Mosaic knows more, but not on every generation of TPU.)
_NUMBERS = {
    *("add", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp", "integer_pow", "square"),
    *("select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
}
_BOOLS = {
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not"),
    *("broadcast_in_dim", "convert_element_type", "copy"),
}
_DTYPES = {np.dtype(dtype) for dtype in (np.bool_, np.int32, np.uint32, np.float32)}

# A query and one byte of a number share an int32. Splash holds tiles in 1 MiB, far too little for 2**24 queries.
_QUERY_BITS = 24

# Splash's ``mask_function``: whether pairs may attend, from ``q_sequence`` and the positions of keys.
MaskFunction = Callable[[Int[Array, "..."], Int[Array, "..."]], Bool[Array, "..."]]


def trace(mask: Mask, sizes: tuple[int, int]) -> Any:
    """The jaxpr of ``allows`` for the numbers of examples and heads, and two queries and keys.

    Its result has four axes, with size 1 along each that the mask does not look at.
    """
    indices = map(iota, (*sizes, 2, 2), range(4))
    return jax.make_jaxpr(lambda: as_4d(jnp.asarray(mask.allows(*indices))))()


def divide(mask: Mask, sizes: tuple[int, int]) -> tuple[Segments | None, list[Mask], Mask]:
    """Parts of a mask that ``&`` joins: segments, masks with arrays that look at keys alone, and the remainder."""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    segments = next((part for part in parts if isinstance(part, Segments)), None)
    of_keys: list[Mask] = []
    remainder: Mask = Full()
    for part in parts:
        if part is segments:
            continue
        # Static masks cost nothing in the kernel, where they need no ids.
        if jax.tree.leaves(part) and trace(part, sizes).out_avals[0].shape[1:3] == (1, 1):
            of_keys.append(part)
        else:
            remainder = remainder & part
    return segments, of_keys, remainder


def segment_ids(segments: Segments | None, of_keys: list[Mask], at: Positions, batch: int) -> SegmentIds | None:
    """Ids of queries ``[batch|1, q]`` and keys ``[batch|1, kv]``, equal where all of these masks allow the pair."""
    if segments is None and not of_keys:
        return None
    b, kv = iota(batch, 0), iota(at.key_length, 3)
    query_ids, key_ids = jnp.zeros((2, 1, 1, 1, 1), np.int32)
    if segments is not None:
        query_ids, key_ids = segments.segment_ids(b, at.of_queries(b, iota(at.query_length, 2)), kv)
    for mask in of_keys:
        # An id that no query has.
        key_ids = jnp.where(mask.allows(b, 0, 0, kv), key_ids, query_ids.min() - 1)
    return SegmentIds(_rows(query_ids, at.query_length), _rows(key_ids, at.key_length))


def in_kernel(
    mask: Mask, at: Positions, sizes: tuple[int, int], smallest_block: int
) -> tuple[Int[Array | np.ndarray, "batch q"] | None, MaskFunction | None]:
    """Splash's ``q_sequence`` ``[batch|1, q]`` and ``mask_function``; ``None`` for both where a kernel cannot decide.

    Args:
        mask: the remainder that :func:`divide` leaves.
        at: positions of the queries and keys.
        sizes: numbers of examples and heads.
        smallest_block: the least number of queries that a tile has.
    """
    if isinstance(mask, Full) or not _holds_only_numbers(mask):
        return None, None
    numbers, structure = jax.tree.flatten(mask)
    function = AllowsByNumbers(structure)
    # A kernel knows neither example nor head: only numbers may tell examples apart.
    shared = jax.tree.unflatten(structure, [np.int32(0)] * len(numbers))
    if trace(shared, sizes).out_avals[0].shape[:2] != (1, 1):
        return None, None
    number, positions = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((NUM_SUBLANES, NUM_LANES), np.int32)
    if not _is_elementwise(jax.make_jaxpr(function.decide)([number] * len(numbers), positions, positions)):
        return None, None
    if not numbers:
        return _rows(at.of_queries(iota(sizes[0], 0), iota(at.query_length, 2)), at.query_length), Allows(mask)
    if function.period > smallest_block or at.query_length > 1 << _QUERY_BITS:
        return None, None
    return function.pack([at.start, *numbers], at.query_length), function


@dataclass(frozen=True)
class Allows:
    """A mask without arrays as splash's ``mask_function`` of the positions of queries and keys.

    Functions of equal masks are equal, because splash compiles a kernel for each that differs.
    """

    mask: Mask

    def __call__(self, q: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
        zero = jnp.zeros_like(q)
        return jnp.broadcast_to(self.mask.allows(zero, zero, q, kv), q.shape)


@dataclass(frozen=True)
class AllowsByNumbers:
    """A mask that holds numbers as splash's ``mask_function``: each query carries one byte of a number.

    A kernel gets no argument but an int32 for each query. The low bits are the index of the query. The high byte is a
    byte of the position of the first query, or of a number in the mask; other queries carry the other bytes, in turn.

    It pays by memory. For a traced window at 8,192 and 131,072 tokens, the kernels for output and gradients together
    hold 98 KiB and 2.1 MiB of mask with it, and 192 MiB and 48 GiB with tiles written out. For ``Causal() | Prefix`` of
    a length for each of two examples they hold 195 KiB and 4.1 MiB, and 204 MiB and 48 GiB.

    Args:
        structure: the pytree structure of the mask.
    """

    structure: Any

    @property
    def period(self) -> int:
        """The number of queries after which the bytes repeat, a power of two."""
        return 1 << (4 * (1 + self.structure.num_leaves) - 1).bit_length()

    def pack(self, numbers: Sequence[Any], query_length: int) -> Int[Array, "batch q"]:
        """The int32 of each query, from int32 numbers that are ``[]`` or ``[batch]``."""
        rows = jnp.broadcast_arrays(*(jnp.asarray(number, jnp.int32).reshape(-1) for number in numbers))
        parts = jnp.stack(rows, axis=1)[:, :, None] >> np.arange(0, 32, 8, dtype=np.int32)
        parts = parts.reshape(len(parts), -1)
        query = np.arange(query_length, dtype=np.int32)
        return parts[:, np.minimum(query % self.period, parts.shape[1] - 1)] << _QUERY_BITS | query

    def __call__(self, packed: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
        # Splash passes queries along either axis, and does not say which. This corner has a period of them either way.
        corner = packed[:NUM_LANES, :NUM_LANES]
        byte, place = corner >> _QUERY_BITS & 0xFF, corner & (self.period - 1)

        def number(index: int) -> Any:
            parts = (jnp.where(place == 4 * index + part, byte, 0).max() << 8 * part for part in range(4))
            return reduce(operator.or_, parts)

        first, *numbers = map(number, range(1 + self.structure.num_leaves))
        return self.decide(numbers, (packed & ((1 << _QUERY_BITS) - 1)) + first, kv)

    def decide(self, numbers: Sequence[Any], q: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether pairs may attend, given the numbers in the mask."""
        return Allows(jax.tree.unflatten(self.structure, numbers))(q, kv)


def _holds_only_numbers(mask: Mask) -> bool:
    """Whether each array in a mask is an int32 scalar, or has one for each example, as those two masks may."""
    parts = jax.tree.leaves(mask, is_leaf=lambda part: isinstance(part, Prefix | Chunked))
    return all(isinstance(part, Mask) or (part.ndim == 0 and part.dtype == np.int32) for part in parts)


def _is_elementwise(closed: Any) -> bool:
    """Whether a function decides each pair by itself and without tables, as a kernel needs it."""
    return not closed.consts and all(map(_is_in_kernel, closed.jaxpr.eqns))


def _is_in_kernel(equation: Any) -> bool:
    name = equation.primitive.name
    if name == "jit":
        return _is_elementwise(equation.params["jaxpr"])
    dtypes = {variable.aval.dtype for variable in (*equation.invars, *equation.outvars)}
    gives_bools = equation.outvars[0].aval.dtype == np.bool_
    return dtypes <= _DTYPES and (name in _BOOLS or (name in _NUMBERS and not gives_bools))


def _rows(values: Any, length: int) -> Any:
    """``[batch|1, 1, q|1, 1]`` as ``[batch|1, q]``, and likewise for keys."""
    rows = values.reshape(values.shape[0], -1)
    return jnp.broadcast_to(rows, (len(rows), length)) if rows.shape[1] != length else rows
