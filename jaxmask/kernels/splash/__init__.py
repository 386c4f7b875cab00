"""Splash attention, JAX's block-sparse kernel for TPU, from a mask by its tiles.

Splash needs to know which tiles to run, and how to decide the pairs of those that are not full. Both come from the
description: the tiles from :meth:`Mask.tiles`, and the pairs in the cheapest of four ways that the kernel offers.

Source: ``jax.experimental.pallas.ops.tpu.splash_attention``, whose ``process_mask`` finds the same by reading every
pair.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    NUM_LANES,
    NUM_SUBLANES,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from jaxmask import checks
from jaxmask.indices import as_4d, by_batch, iota, is_static, library
from jaxmask.mask import And, Full, Mask, Not, Offset, Or, refuse_no_mask
from jaxmask.masks import Chunked, Dense, Padding, PerHead, Predicate, Prefix, Segments
from jaxmask.tiles import EMPTY, FULL, PARTIAL

# A logit beside those of the keys of every row, which splash calls a sink. It takes nothing of the softmax where a row
# has a key, and all of it where it has none: it lies between the logit of a pair that may not attend and any other.
_NO_KEY = -1e30

# The ids of queries and keys where a mask has no segments.
_ONE_SEGMENT = np.zeros((1, 1, 1, 1), np.int32)

# Primitives that a kernel for TPU computes on the positions of a tile: those whose results are numbers, and those whose
# results may be bools; of these types. (Mosaic knows others, but not on every generation of TPU.)
_NUMBERS = {
    *("add", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp", "integer_pow", "square"),
    *("select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical"),
}
_BOOLS = {
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not"),
    *("broadcast_in_dim", "convert_element_type", "copy"),
}
_DTYPES = {np.dtype(dtype) for dtype in (np.bool_, np.int32, np.uint32, np.float32)}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "segment_ids", "no_key"),
    meta_fields=("shape",),
)
@dataclass(frozen=True, eq=False)
class SplashAttention:
    """Splash attention with its mask, as :func:`to_splash` makes it. A pytree, which may be passed to a ``jit``.

    Args:
        kernel: splash's own, whose arrays have a leading axis ``[batch|1]``.
        segment_ids: of queries ``[batch|1, q]`` and keys ``[batch|1, kv]``, where the mask has segments or padding.
        no_key: float32 ``[batch|1]``, the logit that makes a row without keys zero.
        shape: ``(batch, heads, query_length, key_length)`` of the mask, where a batch or heads of 1 fit any number.
    """

    kernel: SplashAttentionKernel
    segment_ids: SegmentIds | None
    no_key: Float[Array | np.ndarray, "batch"]
    shape: tuple[int, int, int, int]

    def __call__(
        self,
        query: Float[Array, "*batch heads q dim"],
        key: Float[Array, "*batch kv_heads kv dim"],
        value: Float[Array, "*batch kv_heads kv dim_v"],
    ) -> Float[Array, "*batch heads q dim_v"]:
        """Attention, differentiable in all three.

        Args:
            query: ``[batch, heads, q, dim]``, scaled already, as a rule by ``dim ** -0.5``; or ``[heads, q, dim]``
                where the mask is the same for every example, as splash's own kernel takes it under a ``vmap``.
            key, value: ``[batch, kv_heads, kv, dim]``, where ``kv_heads`` divides ``heads``; of the rank of the query.

        Returns:
            ``[batch, heads, q, dim_v]``. A query with no key to attend to gives zero, and zero gradients.

        Raises:
            ValueError: the shapes do not match each other, or those of the mask.
        """
        batch, heads, query_length, key_length = self.shape
        if query.ndim == 3 and batch == 1:
            return self(query[None], key[None], value[None])[0]
        if query.ndim != 4 or batch not in (1, query.shape[0]) or query.shape[2] != query_length:
            examples = "batch" if batch == 1 else batch
            raise ValueError(
                f"query must be [{examples}, heads, {query_length}, dim], as the mask is, got {checks.describe(query)}"
            )
        if heads not in (1, query.shape[1]):
            raise ValueError(f"query must have the {heads} heads that the mask has, got {checks.describe(query)}")
        for name, array in (("key", key), ("value", value)):
            expected = query.shape[0], key_length
            if array.ndim != 4 or (array.shape[0], array.shape[2]) != expected or query.shape[1] % array.shape[1]:
                raise ValueError(
                    f"{name} must be [{expected[0]}, kv_heads, {key_length}, dim], where kv_heads divides "
                    f"{query.shape[1]}, got {checks.describe(array)}"
                )

        # Splash takes one example at a time. What serves every example is not mapped over.
        arrays, structure = jax.tree.flatten((self.kernel, self.segment_ids, self.no_key))
        shared = [array.shape[0] == 1 for array in arrays]

        def one(arrays: list[Any], query: Array, key: Array, value: Array) -> Any:
            kernel, segment_ids, no_key = jax.tree.unflatten(structure, arrays)
            return kernel(query, key, value, segment_ids, jnp.broadcast_to(no_key, query.shape[0]))

        arrays = [array[0] if alone else array for array, alone in zip(arrays, shared, strict=True)]
        return jax.vmap(one, in_axes=([None if alone else 0 for alone in shared], 0, 0, 0))(arrays, query, key, value)


def to_splash(
    mask: Mask,
    query_length: int,
    key_length: int,
    *,
    offset: Offset | None = None,
    block_sizes: BlockSizes | None = None,
    partial_tiles: int | None = None,
    attn_logits_soft_cap: float | None = None,
    interpret: bool = False,
) -> SplashAttention:
    """Splash attention for TPU that attends as ``mask`` says, and skips the tiles that are EMPTY.

    The mask is never written out. The tiles that run are known from bounds, and splash holds a few bytes for each in
    its 1 MiB of scalar memory. Its grid is as wide as the longest row of tiles that may run, as far as that is static.
    How the pairs of a tile are decided is the first of these that applies, and what it holds besides the tiles:

    1. Arrays of keys alone (``Padding``, ``Prefix`` of a length for each example, ``Dense`` of ``[batch, 1, 1, kv]``)
       and one ``Segments``, joined to the rest of the mask by ``&``, are splash's own segment ids: ``O(q + kv)``.
    2. A rest that holds no arrays, and is arithmetic on positions, is computed in the kernel: ``O(q)``.
    3. So is one that holds numbers, such as a traced window or a prefix for each example, at any ``offset``. The
       numbers ride with the positions: ``O(q)`` for each example.
    4. Of any other rest the PARTIAL tiles are written out, a byte for each pair, and again for the backward pass. Where
       it is static (``PerHead``, or a ``Predicate`` that looks at heads, or into a table) each that differs is held
       once, for all examples. Where it is traced (``Dense``, or ``Segments`` under ``|`` or ``~``) there is room for
       each tile that may turn out to be PARTIAL, for each example; or for as many as ``partial_tiles`` says.

    Call it where the arrays are: inside a ``jit``; or inside a ``shard_map`` (with ``check_vma=False``, which splash
    needs) with the lengths of a shard and the offset of its queries. A NumPy array is static, as everywhere: other
    values may be another compilation.

    Args:
        mask: which pairs may attend. Where tiles differ between examples, examples run one after the other.
        query_length, key_length: static, and multiples of the blocks, for splash has no ragged tiles.
        offset: as in :meth:`Mask.dense`.
        block_sizes: splash's own; by default the largest of 512, 256 and 128 that divides the lengths.
        partial_tiles: for the fourth way alone: how many PARTIAL tiles an example has at most, over all heads. One that
            has more gives NaN, for no error can be raised where that is known.
        attn_logits_soft_cap: as in splash's own kernel, static.
        interpret: run without a TPU, slowly.

    Raises:
        ValueError: as :meth:`Mask.dense`; a length is no multiple of its block, or a block none of what a TPU takes.
        TypeError: as :meth:`Mask.dense`; what must be static is traced, or is of another type.

    >>> from jaxmask import Causal
    >>> attention = to_splash(Causal() & Padding(jnp.arange(128)[None] < 100), 128, 128, interpret=True)
    >>> query = key = value = jnp.ones((1, 2, 128, 64))
    >>> attention(query / 8, key, value).shape
    (1, 2, 128, 64)
    """
    if not isinstance(mask, Mask):
        refuse_no_mask(mask, "mask must be a mask")
    query_length = checks.integer("query_length", checks.length("query_length", query_length), minimum=1)
    key_length = checks.integer("key_length", checks.length("key_length", key_length), minimum=1)
    if partial_tiles is not None:
        partial_tiles = checks.integer("partial_tiles", partial_tiles, minimum=1)
    if not isinstance(attn_logits_soft_cap, float | int | None):
        raise TypeError(f"attn_logits_soft_cap must be a Python float, got {checks.describe(attn_logits_soft_cap)}")
    if not isinstance(block_sizes, BlockSizes | None):
        raise TypeError(f"block_sizes must be the BlockSizes of splash attention, got {checks.describe(block_sizes)}")
    sizes = _default_blocks(query_length, key_length) if block_sizes is None else block_sizes
    _check_blocks(sizes, query_length, key_length)

    # Traced without computing anything, for the sizes, and so that what cannot be read is refused.
    batch, heads, *_ = jax.eval_shape(partial(mask.dense, query_length, key_length, offset=offset)).shape
    first = by_batch(0 if offset is None else offset)
    b, q, kv = iota(batch, 0), iota(query_length, 2) + first, iota(key_length, 3)
    segments, of_keys, rest = _native(mask)
    rest, is_traced = _with_sizes(rest, b, iota(heads, 1), kv)
    corner = min(block for block in (sizes.block_q, sizes.block_q_dkv, sizes.block_q_dq, NUM_LANES) if block)
    q_sequence, mask_function = _in_kernel(rest, first, query_length, corner)
    reading = _Reading(mask, rest, first, query_length, key_length, q_sequence, mask_function, is_traced, partial_tiles)

    forward, missed = _mask_info(reading, sizes.block_q, sizes.block_kv)
    dq = dkv = None
    if sizes.has_backward_blocks:
        fused = sizes.use_fused_bwd_kernel
        # The fused kernel finds the place of what it writes by counting the tiles of a row, all of them.
        dkv, also_missed = _mask_info(reading, sizes.block_q_dkv, sizes.block_kv_dkv, by_key=True, shrink=not fused)
        missed = missed | also_missed
        if not fused and (sizes.block_q_dq, sizes.block_kv_dq) == (sizes.block_q, sizes.block_kv):
            dq = forward
        elif not fused:
            dq, also_missed = _mask_info(reading, sizes.block_q_dq, sizes.block_kv_dq)
            missed = missed | also_missed
    kernel = SplashAttentionKernel(
        forward,
        dq,
        dkv,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=attn_logits_soft_cap,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )
    return SplashAttention(
        kernel,
        _segment_ids(segments, of_keys, b, q, kv),
        jnp.where(missed, jnp.nan, _NO_KEY).astype(jnp.float32),
        (batch, heads, query_length, key_length),
    )


@dataclass(frozen=True)
class _Reading:
    """A mask where it is read; what is left of it when segment ids have said their part; and how that is decided."""

    mask: Mask
    rest: Mask
    first: Int[Array | np.ndarray, "batch 1 1 1"]
    query_length: int
    key_length: int
    q_sequence: Int[Array | np.ndarray, "batch q"] | None
    mask_function: Callable[..., Any] | None
    is_traced: bool
    partial_tiles: int | None

    def states(self, mask: Mask, block: tuple[int, int]) -> Any:
        """The states of the tiles, ``[batch|1, heads|1, q_tiles, kv_tiles]``; in NumPy where they are static."""
        offset: Any = self.first.reshape(-1) if self.first.shape[0] > 1 else self.first.reshape(())
        read = partial(mask.tiles, self.query_length, self.key_length, block=block, offset=offset)
        if not is_static(mask, self.first):
            return read().states
        with jax.ensure_compile_time_eval():
            return np.asarray(read().states)

    def known(self, mask: Mask, block: tuple[int, int]) -> Any:
        """The states as far as they are static, in NumPy: as if nothing was known of JAX arrays."""
        if not is_static(self.first):
            tiles = self.query_length // block[0], self.key_length // block[1]
            return np.full((1, mask.shape[1], *tiles), PARTIAL, np.int8)
        return self.states(_known(mask), block)


def _default_blocks(query_length: int, key_length: int) -> BlockSizes:
    sizes: list[int] = []
    for name, length, how in (
        ("query_length", query_length, "drop the rows that come out for padded queries"),
        ("key_length", key_length, f"keep queries from the padded keys by & Prefix({key_length})"),
    ):
        if length % NUM_LANES:
            raise ValueError(
                f"{name} must be a multiple of {NUM_LANES}, for splash attention has no ragged tiles, got {length}: "
                f"pad to {length + -length % NUM_LANES}, and {how}"
            )
        sizes.append(next(size for size in (512, 256, NUM_LANES) if length % size == 0))
    q, kv = sizes
    return BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)


def _check_blocks(sizes: BlockSizes, query_length: int, key_length: int) -> None:
    for name, length, unit, blocks in (
        ("query_length", query_length, NUM_SUBLANES, ("block_q",)),
        ("query_length", query_length, NUM_LANES, ("block_q_dkv", "block_q_dq")),
        ("key_length", key_length, NUM_LANES, ("block_kv", "block_kv_dkv", "block_kv_dq")),
        ("block_kv", sizes.block_kv, NUM_LANES, ("block_kv_compute",)),
        ("block_kv_dkv", sizes.block_kv_dkv or NUM_LANES, NUM_LANES, ("block_kv_dkv_compute",)),
    ):
        for block_name in blocks:
            block = getattr(sizes, block_name)
            if block is None:
                continue  # there is no backward pass, or a fused one
            if checks.integer(f"{block_name} of block_sizes", block, minimum=1) % unit:
                raise ValueError(f"{block_name} of block_sizes must be a multiple of {unit}, got {block}")
            if length % block:
                raise ValueError(
                    f"{name} must be a multiple of {block_name} of block_sizes, for splash attention has no ragged "
                    f"tiles, got {length} and {block}: pad to {length + -length % block}, or choose another block"
                )


def _native(mask: Mask) -> tuple[Segments | None, list[Mask], Mask]:
    """A mask in three parts, to be joined by ``&``: segments, arrays of keys alone, and the rest."""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    segments = next((part for part in parts if isinstance(part, Segments)), None)
    of_keys = [part for part in parts if jax.tree.leaves(part) and _is_of_keys(part)]
    rest = [part for part in parts if not any(part is native for native in (segments, *of_keys))]
    return segments, of_keys, reduce(operator.and_, rest, Full()) if len(rest) < len(parts) else mask


def _is_of_keys(mask: Mask) -> bool:
    """Whether all queries and heads have the same keys."""
    match mask:
        case Padding() | Prefix():
            return True
        case Dense():
            return as_4d(mask.allowed).shape[1:3] == (1, 1)
        case And() | Or():
            return all(map(_is_of_keys, mask.masks))
        case Not():
            return _is_of_keys(mask.mask)
        case _:
            return False


def _with_sizes(rest: Mask, b: Any, h: Any, kv: Any) -> tuple[Mask, bool]:
    """The rest of a mask, with the sizes that it looks at and that another part has told; and whether it is traced."""
    seen = jax.make_jaxpr(lambda: jnp.asarray(rest.allows(b, h, iota(1, 2), kv)))()
    # A predicate may close over an array that is traced, though the mask holds none.
    is_traced = not is_static(rest) or any(map(checks.is_traced, seen.consts))
    shape = seen.out_avals[0].shape
    if len(shape) == 4 and any(size > told for size, told in zip(shape[:2], rest.shape[:2], strict=True)):
        return rest & Dense(np.ones((*shape[:2], 1, 1), np.bool_)), is_traced
    return rest, is_traced


def _segment_ids(segments: Segments | None, of_keys: list[Mask], b: Any, q: Any, kv: Any) -> SegmentIds | None:
    """Ids of queries ``[batch|1, q]`` and keys ``[batch|1, kv]``, equal where all of these masks allow it."""
    if segments is None and not of_keys:
        return None
    (query_ids, query_given), (key_ids, key_given) = (_ONE_SEGMENT, True), (_ONE_SEGMENT, True)
    if segments is not None:
        (query_ids, query_given), (key_ids, key_given) = segments.of_queries(b, q), segments.of_keys(b, kv)
    valid = reduce(operator.and_, (mask.allows(b, 0, 0, kv) for mask in of_keys), key_given)
    query_ids, key_ids = jnp.asarray(query_ids, jnp.int32), jnp.asarray(key_ids, jnp.int32)
    # Ids that no other has, for what attends to nothing.
    key_ids = jnp.where(valid, key_ids, query_ids.min() - 1)
    query_ids = jnp.where(query_given, query_ids, key_ids.max() + 1)
    return SegmentIds(_rows(query_ids, q.shape[2]), _rows(key_ids, kv.shape[3]))


@dataclass(frozen=True)
class _Allows:
    """A mask without arrays as splash's ``mask_function``, of the positions of queries and keys.

    It is equal for equal masks, for splash compiles for each that differs.
    """

    mask: Mask

    def __call__(self, q: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
        zero = jnp.zeros_like(q)
        return jnp.broadcast_to(self.mask.allows(zero, zero, q, kv), q.shape)


@dataclass(frozen=True)
class _AllowsByNumbers:
    """A mask that holds numbers as splash's ``mask_function``, of an int32 for each query and of positions of keys.

    A kernel has nothing else of the numbers. The low bits of the int32 say which query it is. The others carry a piece
    of a number: of the position of the first query, or of one in the mask; query by query another piece, over and over.

    Args:
        structure: of the mask.
        query_bits: how many bits say which query it is.
    """

    structure: Any
    query_bits: int

    @property
    def piece_bits(self) -> int:
        return 32 - self.query_bits

    @property
    def pieces(self) -> int:
        """How many pieces a number has."""
        return -(-32 // self.piece_bits)

    @property
    def period(self) -> int:
        """After how many queries the pieces begin again, a power of two."""
        return 1 << (self.pieces * (1 + self.structure.num_leaves) - 1).bit_length()

    def pack(self, numbers: list[Any], query_length: int) -> Int[Array, "batch q"]:
        """The int32 of each query, from numbers that are ``[]`` or ``[batch]``."""
        rows = (jnp.asarray(number, jnp.int32).reshape(-1) for number in numbers)
        columns = jnp.stack(jnp.broadcast_arrays(*rows), axis=1)[:, :, None]
        pieces = self._piece(columns >> np.arange(self.pieces, dtype=np.int32) * self.piece_bits)
        pieces = pieces.reshape(columns.shape[0], -1)
        query = np.arange(query_length, dtype=np.int32)
        carried = pieces[:, np.minimum(query % self.period, pieces.shape[1] - 1)]
        return carried << self.query_bits | query

    def __call__(self, packed: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
        # Queries run along one of the axes, and which is not said. In a corner there is a period of them either way.
        corner = packed[:NUM_LANES, :NUM_LANES]
        carried, turn = self._piece(corner >> self.query_bits), corner & (self.period - 1)

        def number(index: int) -> Any:
            found = [jnp.where(turn == index * self.pieces + piece, carried, 0).max() for piece in range(self.pieces)]
            return reduce(operator.or_, (piece << place * self.piece_bits for place, piece in enumerate(found)))

        first, *leaves = map(number, range(1 + self.structure.num_leaves))
        return self.decide(leaves, (packed & ((1 << self.query_bits) - 1)) + first, kv)

    def decide(self, leaves: Sequence[Any], q: Int[Array, "..."], kv: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether pairs may attend, given the numbers in the mask."""
        return _Allows(jax.tree.unflatten(self.structure, leaves))(q, kv)

    def _piece(self, number: Any) -> Any:
        return number & ((1 << self.piece_bits) - 1)


def _in_kernel(rest: Mask, first: Any, query_length: int, corner: int) -> tuple[Any, Callable[..., Any] | None]:
    """An int32 for each query ``[batch|1, q]``, and the function of it and a key that decides a pair in the kernel.

    ``(None, None)`` where nothing is to be decided, or where there is no such function. Every tile has at least
    ``corner`` queries.
    """
    if isinstance(rest, Full) or not _holds_numbers(rest):
        return None, None
    numbers, structure = jax.tree.flatten(rest)
    function = _AllowsByNumbers(structure, (query_length - 1).bit_length())
    number, positions = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((NUM_SUBLANES, NUM_LANES), np.int32)
    of_example = [number] * len(numbers)
    # Nothing but numbers may tell examples apart, and nothing heads.
    if jax.tree.unflatten(structure, of_example).shape != (1, 1, 1):
        return None, None
    if not _is_elementwise(jax.make_jaxpr(function.decide)(of_example, positions, positions)):
        return None, None
    if not numbers:
        return (iota(query_length, 2) + first).reshape(-1, query_length), _Allows(rest)
    if function.period > corner:
        return None, None
    return function.pack([first, *numbers], query_length), function


def _holds_numbers(mask: Mask) -> bool:
    """Whether all arrays in a mask are numbers, for all examples or for each."""
    parts = jax.tree.leaves(mask, is_leaf=lambda part: isinstance(part, Prefix | Chunked))
    return all(isinstance(part, Mask) or part.ndim == 0 for part in parts)


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
    return library(values).broadcast_to(values.reshape(values.shape[0], -1), (values.shape[0], length))


def _mask_info(
    reading: _Reading, block_q: int | None, block_kv: int | None, *, by_key: bool = False, shrink: bool = True
) -> tuple[MaskInfo, Bool[Array | np.ndarray, "batch"]]:
    """What one of splash's kernels asks of a mask, with a leading axis ``[batch|1]``, and the examples that it fails.

    The kernels for the output and for ``dq`` go by tiles of queries, over the tiles of keys of each. That for ``dk``
    and ``dv`` goes by tiles of keys, over the tiles of queries of each. Here both go by rows, over columns.
    """
    assert block_q is not None
    assert block_kv is not None
    block = block_q, block_kv

    def turned(tiles: Any) -> Any:
        return tiles.swapaxes(2, 3) if by_key else tiles

    runs = turned(reading.states(reading.mask, block)) != EMPTY
    rest = turned(reading.states(reading.rest, block))
    # As much of both as is static, for sizes are.
    may_run = turned((reading.known(reading.mask, block) != EMPTY).any(0, keepdims=True))
    xp = library(runs, rest)
    # Segment ids are compared in every tile that runs, so that it is the rest that makes one PARTIAL.
    states = xp.where(runs, rest, EMPTY)

    # The columns of each row that run, in order, to the left or, by key, to the right: as splash has them.
    columns = states.shape[3]
    width = max(1, int(may_run.sum(3).max())) if shrink else columns
    if not shrink:
        order = xp.broadcast_to(np.arange(columns), states.shape)
    elif by_key:
        order = xp.argsort(states != EMPTY, axis=3, stable=True)[..., columns - width :]
    else:
        order = xp.argsort(states == EMPTY, axis=3, stable=True)[..., :width]
    states = xp.take_along_axis(states, order, 3)
    # A step that does not run fetches what the next one that does will need.
    needed = xp.take_along_axis(order, xp.argmax(states != EMPTY, axis=3, keepdims=True), 3)
    data_next = xp.where(states != EMPTY, order, needed if by_key else xp.roll(needed, -1, axis=2))

    mask_next = blocks = None
    missed: Any = np.zeros(1, np.bool_)
    if reading.mask_function is None and not isinstance(reading.rest, Full):
        undecided = may_run & (rest == PARTIAL)
        if reading.is_traced or not is_static(reading.first):
            may_be = may_run & (turned(reading.known(reading.rest, block)) == PARTIAL)
            room = max(1, min(reading.partial_tiles or may_be.size, int(may_be.sum((1, 2, 3)).max())))
            blocks, numbers, missed = _traced_blocks(reading, undecided, block, by_key, room)
        else:
            blocks, numbers = _static_blocks(reading, undecided, block, by_key)
        mask_next = turned(_small(xp.take_along_axis(numbers, order, 3), blocks.shape[1]))
    q_sequence: Any = reading.q_sequence
    data_next, block_mask = turned(_small(data_next, columns)), turned(_small(states, FULL + 1))
    return MaskInfo(data_next, mask_next, block_mask, blocks, q_sequence), missed


def _static_blocks(reading: _Reading, undecided: Any, block: tuple[int, int], by_key: bool) -> tuple[Any, Any]:
    """The pairs of the undecided tiles, each that differs once ``[1, count, *block]``, and which are whose.

    ``undecided`` and the numbers of the blocks are ``[batch|1, heads|1, rows, columns]``. A tile that is not undecided
    has the number of the next one that is, for splash fetches it early.
    """
    found: dict[bytes, int] = {}
    blocks: list[Any] = []
    numbers: list[int] = []
    with jax.ensure_compile_time_eval():
        rest, first = jax.tree.map(jnp.asarray, (reading.rest, reading.first))
        for coordinates in np.argwhere(undecided):
            pairs = np.asarray(_pairs(rest, first, coordinates, block, by_key))
            number = found.setdefault(pairs.tobytes(), len(found))
            if number == len(blocks):
                blocks.append(pairs)
            numbers.append(number)
    if not blocks:
        return np.zeros((1, 1, *(block[::-1] if by_key else block)), np.bool_), np.zeros(undecided.shape, np.int32)
    return np.stack(blocks)[None], np.array(numbers)[_ranks(undecided.ravel(), len(numbers))].reshape(undecided.shape)


def _traced_blocks(
    reading: _Reading, undecided: Any, block: tuple[int, int], by_key: bool, room: int
) -> tuple[Any, Any, Any]:
    """As for static ones, with ``room`` for as many tiles of each example; and the examples that have more."""
    batch, *shape = undecided.shape

    def of_example(b: Any, undecided: Any) -> tuple[Any, Any, Any]:
        found = jnp.argsort(~undecided, stable=True)[:room]
        coordinates = jnp.stack([jnp.full(room, b), *jnp.unravel_index(found, shape)], axis=1)
        blocks = jax.vmap(lambda one: _pairs(reading.rest, reading.first, one, block, by_key))(coordinates)
        return blocks, _ranks(undecided, room).reshape(shape), undecided.sum() > room

    return jax.vmap(of_example)(np.arange(batch), jnp.asarray(undecided).reshape(batch, -1))


@partial(jax.jit, static_argnames=("block", "by_key"))
def _pairs(
    mask: Mask, first: Any, coordinates: Any, block: tuple[int, int], by_key: bool
) -> Bool[Array, "rows columns"]:
    """The pairs of the tile at ``(b, h, row, column)``."""
    b, h, row, column = coordinates
    q_tile, kv_tile = (column, row) if by_key else (row, column)
    q = first[jnp.minimum(b, first.shape[0] - 1)] + q_tile * block[0] + iota(block[0], 2)
    kv = kv_tile * block[1] + iota(block[1], 3)
    allowed = mask.allows(b.reshape(1, 1, 1, 1), h.reshape(1, 1, 1, 1), q, kv)
    pairs = jnp.broadcast_to(allowed, (1, 1, *block)).reshape(block)
    return pairs.T if by_key else pairs


def _ranks(undecided: Any, count: int) -> Any:
    """For each tile in order, how many undecided ones come before it, where there is one at or after it."""
    return library(undecided).minimum(undecided.cumsum() - undecided, count - 1)


def _known(mask: Mask) -> Mask:
    """The mask, with nothing known of the leaves that hold JAX arrays."""
    if is_static(mask):
        return mask
    match mask:
        case And() | Or() | PerHead():
            return type(mask)(tuple(map(_known, mask.masks)))
        case Not():
            return Not(_known(mask.mask))
        case _:
            return Predicate(_anything, *mask.shape[:2])


def _anything(b: Any, h: Any, q: Any, kv: Any) -> Any:
    raise AssertionError("only tiles are asked of this, which has no bounds to say anything about them")


def _small(numbers: Any, count: int) -> Any:
    """Numbers less than ``count``, in the smallest type, for splash keeps them in the little memory of scalars."""
    return numbers.astype(np.min_scalar_type(-count))
