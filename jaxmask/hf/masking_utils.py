"""The names, signatures, positional order, defaults and results of ``transformers.masking_utils`` 5, on JAX arrays.

Ported code changes one import::

    from jaxmask.hf.masking_utils import create_causal_mask, create_sliding_window_causal_mask

A mask function is a :class:`MaskFunction` here: it is called with four indices as it is there, and it is a description
that is read, so that ``sdpa`` gets a bool mask, ``eager`` an additive one and ``flex_attention`` a ``TileMap``.

``config`` is anything that has the attributes that are read: a configuration of Transformers, a dataclass, a namespace.
A cache is anything that answers ``get_query_offset(layer_idx)`` and ``get_mask_sizes(q_length, layer_idx)``, and has
lists ``is_sliding``, ``is_linear``, ``is_dummy`` and a bool ``is_compileable`` as far as they are not all false. Its
offsets may be traced, as those of a cache of fixed size are inside ``jit``; another offset never recompiles.

Where ``attention_mask``, ``position_ids`` or an offset is traced, the answer is the one that Transformers gives while
tracing: contents are not looked at, and no mask is left out because of them. ``device`` is accepted and ignored.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from jaxmask import checks
from jaxmask.indices import Allowed, Index, lookup
from jaxmask.mask import Empty, Full, Mask, Offset, Scalar
from jaxmask.masks import Causal, Chunked, Padding, Predicate, Segments, SlidingWindow, Window
from jaxmask.tiles import Bounds, Span, TileMap

# A function of (batch_idx, head_idx, q_idx, kv_idx); or a description of one.
MaskMod = Callable[[Any, Any, Any, Any], Any] | Mask
# A 0/1 mask: bool, integer or float; JAX or NumPy.
Mask2D = Shaped[Array | np.ndarray, "batch kv"]
Mask4D = Shaped[Array | np.ndarray, "batch heads q kv"]
Embeds = Shaped[Array | np.ndarray, "batch q ..."]
Ids = Int[Array | np.ndarray, "batch q"]
# What an attention implementation takes: bool, additive, the 2D mask itself, or tiles.
Prepared = Shaped[Array | np.ndarray, "..."] | TileMap


@dataclass(frozen=True)
class MaskFunction:
    """A mask as Transformers hands it around, a function of positions, which still knows its description.

    Args:
        mask: read at positions throughout, its arrays too: their elements are those of the positions 0, 1, ….

    >>> causal_mask_function(0, 0, 2, jnp.arange(4))
    Array([ True,  True,  True, False], dtype=bool)
    >>> and_masks(causal_mask_function, sliding_window_overlay(3))
    MaskFunction(mask=Causal() & Window(2, None))
    """

    mask: Mask

    def __call__(self, batch_idx: Index, head_idx: Index, q_idx: Index, kv_idx: Index) -> Bool[Array, "..."]:
        """Whether the query at ``q_idx`` may attend to the key at ``kv_idx``, for indices that broadcast."""
        return _at_pairs(self.mask, batch_idx, head_idx, q_idx, kv_idx)


@jax.jit
def _at_pairs(mask: Mask, *indices: Int[Array, "..."]) -> Bool[Array, "..."]:
    shape = jnp.broadcast_shapes(*map(jnp.shape, indices))
    allowed = jnp.asarray(mask.allows(*indices), jnp.bool_)
    # An array of one element answers in four dimensions, however few the indices have.
    return jnp.broadcast_to(allowed.reshape(allowed.shape[max(allowed.ndim - len(shape), 0) :]), shape)


class _Moved(Mask):
    """A mask of positions, its arrays included, that is read at other positions than those that are asked for."""

    mask: Mask

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _ = self.mask.shape
        return batch, heads, 1

    def check_lengths(self, query_length: int, key_length: int, offset: Offset | None) -> None:
        pass  # arrays may be longer than the keys at hand

    def move(self, b: Index, q: Index, kv: Index) -> tuple[Any, Any]:
        """Where the mask is read for the positions ``q`` and ``kv``."""
        raise NotImplementedError

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(b, h, *self.move(b, q, kv))

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        moved_q, moved_kv = self.move(b, q.positions, kv.positions)
        return self.mask.tile_bounds(b, h, q.at(moved_q), kv.at(moved_kv))


class _Shifted(_Moved):
    q_offset: Scalar = 0
    kv_offset: Scalar = 0

    def move(self, b: Index, q: Index, kv: Index) -> tuple[Any, Any]:
        return q + self.q_offset, kv + self.kv_offset


class _Remapped(_Moved):
    """A mask read at ``position_ids[b, q]`` and ``position_ids[b, kv]``."""

    position_ids: Ids

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, heads, _ = self.mask.shape
        return max(batch, self.position_ids.shape[0]), heads, 1

    def move(self, b: Index, q: Index, kv: Index) -> tuple[Any, Any]:
        return lookup(self.position_ids, b=b, q=q), lookup(self.position_ids, b=b, kv=kv)


class _OfBatch(_Moved):
    """A mask for so many examples, and one head that stands for all."""

    batch_size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch_size, 1, 1

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(self._known(b), 0, q, kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(self._known(b), 0, q, kv)

    def _known(self, b: Index) -> Index:
        return 0 if self.batch_size == 1 else b


@dataclass(frozen=True)
class _PairByPair:
    """A function of four integers, on arrays. It equals itself, so that what it is part of is compiled once."""

    function: Callable[[Any, Any, Any, Any], Any]

    def __call__(self, b: Array, h: Array, q: Array, kv: Array) -> Array:
        return _for_each_pair(self.function, b, h, q, kv)


@partial(jax.jit, static_argnames="function")
def _for_each_pair(function: Callable[[Any, Any, Any, Any], Any], b: Array, h: Array, q: Array, kv: Array) -> Array:
    return jnp.vectorize(function)(b, h, q, kv)


def and_masks(*mask_functions: MaskMod) -> MaskFunction:
    """The intersection of mask functions.

    Args:
        mask_functions: of this module, or any functions of four integers (batch, head, query, key), which are read for
            each pair on its own and may index JAX arrays by them; or masks.

    Raises:
        TypeError: one is neither a function nor a mask.

    >>> and_masks(causal_mask_function, lambda b, h, q, kv: kv != 1)(0, 0, 2, jnp.arange(4))
    Array([ True, False,  True, False], dtype=bool)
    """
    return MaskFunction(reduce(operator.and_, map(_described, mask_functions), Full()))


def or_masks(*mask_functions: MaskMod) -> MaskFunction:
    """The union of mask functions; arguments and errors as in :func:`and_masks`.

    >>> or_masks(causal_mask_function, blockwise_overlay(jnp.array([[-1, 0, 0]])))(0, 0, 1, jnp.arange(3))
    Array([ True,  True,  True], dtype=bool)
    """
    return MaskFunction(reduce(operator.or_, map(_described, mask_functions), Empty()))


def _described(function: MaskMod) -> Mask:
    if isinstance(function, MaskFunction):
        return function.mask
    if isinstance(function, Mask):
        return _Shifted(function)
    if not callable(function):
        raise TypeError(
            "a mask function must be a function of (batch_idx, head_idx, q_idx, kv_idx) or a mask, got "
            f"{checks.describe(function)}"
        )
    return Predicate(_PairByPair(function))


causal_mask_function = MaskFunction(Causal())
bidirectional_mask_function = MaskFunction(Full())


def sliding_window_overlay(sliding_window: int) -> MaskFunction:
    """The last ``sliding_window`` keys, its own included, and all that come after: to be combined with a causal mask.

    >>> sliding_window_overlay(2)
    MaskFunction(mask=Window(1, None))
    """
    return MaskFunction(Window(checks.integer("sliding_window", sliding_window, minimum=1) - 1, None))


def chunked_overlay(chunk_size: int, left_padding: Int[Array, "batch"] | int) -> MaskFunction:
    """The keys in the chunk of the query, where chunks begin after the padding on the left.

    >>> chunked_overlay(2, jnp.array([1]))(0, 0, 2, jnp.arange(4))
    Array([False,  True,  True, False], dtype=bool)
    """
    checks.integer("chunk_size", chunk_size, minimum=1)
    checks.scalar("left_padding", left_padding, minimum=0, ranks=(0, 1))
    return MaskFunction(Chunked(chunk_size, left_padding))


def blockwise_overlay(block_sequence_ids: Ids) -> MaskFunction:
    """The keys in the block of the query; a negative id is no block.

    >>> blockwise_overlay(jnp.array([[-1, 0, 0, -1]]))(0, 0, 1, jnp.arange(4))
    Array([False,  True,  True, False], dtype=bool)
    """
    ids = checks.array("block_sequence_ids", block_sequence_ids, "i", 2)
    return MaskFunction(_Shifted(Segments(ids) & Padding(ids >= 0)))


def sliding_window_causal_mask_function(sliding_window: int) -> MaskFunction:
    """The last ``sliding_window`` keys, its own included.

    >>> sliding_window_causal_mask_function(2)
    MaskFunction(mask=SlidingWindow(2))
    """
    return MaskFunction(SlidingWindow(checks.integer("sliding_window", sliding_window, minimum=1)))


def sliding_window_bidirectional_overlay(sliding_window: int) -> MaskFunction:
    """The keys at a distance of at most ``sliding_window``, before and after.

    >>> sliding_window_bidirectional_overlay(2)
    MaskFunction(mask=Window(2, 2))
    """
    sliding_window = checks.integer("sliding_window", sliding_window, minimum=0)
    return MaskFunction(Window(sliding_window, sliding_window))


def sliding_window_bidirectional_mask_function(sliding_window: int) -> MaskFunction:
    """:func:`sliding_window_bidirectional_overlay`, which is a mask of its own."""
    return and_masks(sliding_window_bidirectional_overlay(sliding_window), bidirectional_mask_function)


def chunked_causal_mask_function(chunk_size: int, left_padding: Int[Array, "batch"] | int) -> MaskFunction:
    """The keys up to the query's position in its chunk: :func:`chunked_overlay`, causal."""
    return and_masks(chunked_overlay(chunk_size, left_padding), causal_mask_function)


def padding_mask_function(padding_mask: Mask2D) -> MaskFunction:
    """The keys that are valid: ``padding_mask[batch_idx, kv_idx]``.

    >>> padding_mask_function(jnp.array([[False, True]]))(0, 0, 0, jnp.arange(2))
    Array([False,  True], dtype=bool)
    """
    return MaskFunction(_Shifted(Padding(_valid("padding_mask", padding_mask))))


def packed_sequence_mask_function(packed_sequence_mask: Ids) -> MaskFunction:
    """The keys in the sequence of the query: those that have the same id.

    >>> packed_sequence_mask_function(jnp.array([[0, 0, 1]]))(0, 0, 1, jnp.arange(3))
    Array([ True,  True, False], dtype=bool)
    """
    return MaskFunction(_Shifted(Segments(checks.array("packed_sequence_mask", packed_sequence_mask, "i", 2))))


def remap_positions_for_packed_sequence(mask_function: MaskMod, position_ids: Ids) -> MaskFunction:
    """``mask_function`` at the positions ``position_ids[batch_idx, q_idx]`` and ``position_ids[batch_idx, kv_idx]``.

    >>> remap_positions_for_packed_sequence(causal_mask_function, jnp.array([[0, 1, 0]]))(0, 0, 2, jnp.arange(3))
    Array([ True, False,  True], dtype=bool)
    """
    ids = checks.array("position_ids", position_ids, "i", 2)
    checks.fits_int32("position_ids", ids)
    return MaskFunction(_Remapped(_described(mask_function), ids))


def packed_sequence_compatibility_function(
    mask_function: MaskMod, position_ids: Ids, packed_sequence_mask: Ids
) -> MaskFunction:
    """``mask_function`` within each of the packed sequences, at the positions that they have each on its own."""
    return and_masks(
        packed_sequence_mask_function(packed_sequence_mask),
        remap_positions_for_packed_sequence(mask_function, position_ids),
    )


def add_offsets_to_mask_function(mask_function: MaskMod, q_offset: Scalar, kv_offset: Scalar) -> MaskFunction:
    """``mask_function`` at positions that count from ``q_offset`` and ``kv_offset``.

    >>> add_offsets_to_mask_function(causal_mask_function, 2, 0)(0, 0, 0, jnp.arange(4))
    Array([ True,  True,  True, False], dtype=bool)
    """
    offsets = [
        _position(name, offset, minimum=-checks.INT32_MAX)
        for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset))
    ]
    return MaskFunction(_Shifted(_described(mask_function), *offsets))


def prepare_padding_mask(attention_mask: Mask2D | None, kv_length: int, kv_offset: int) -> Mask2D | None:
    """The 2D mask, with zeros for the keys up to ``kv_offset + kv_length`` that it does not reach.

    >>> prepare_padding_mask(jnp.array([[True, True]]), kv_length=3, kv_offset=0)
    Array([[ True,  True, False]], dtype=bool)
    """
    return None if attention_mask is None else _pad_to("attention_mask", attention_mask, kv_length, kv_offset, 0)


def maybe_pad_block_sequence_ids(
    block_sequence_ids: Ids, attention_mask: Mask2D | None, kv_length: int, kv_offset: int
) -> Ids:
    """The ids, with ``-1`` for the keys up to ``kv_offset + kv_length`` that they do not reach."""
    return _pad_to("block_sequence_ids", block_sequence_ids, kv_length, kv_offset, -1)


def _pad_to(name: str, array: Any, kv_length: int, kv_offset: int, value: int) -> Any:
    checks.array(name, array, "bif", 2)
    end = checks.length("kv_length", kv_length) + checks.integer("kv_offset", kv_offset, minimum=0)
    missing = end - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, missing)), constant_values=value) if missing > 0 else array


def find_packed_sequence_indices(position_ids: Ids) -> Int[Array, "batch q"] | None:
    """Which of the sequences packed into a row each token belongs to, or ``None`` where there is one in each row.

    A sequence begins wherever a position does not follow the one before.

    Args:
        position_ids: integer ``[batch, q]``.

    Returns:
        integer ``[batch, q]``, counted from 0. Where ``position_ids`` is traced it is never ``None``.

    Raises:
        TypeError, ValueError: no JAX or NumPy array of integers, or of another rank.

    >>> find_packed_sequence_indices(jnp.array([[0, 1, 0, 1, 2, 0]]))
    Array([[0, 0, 1, 1, 1, 2]], dtype=int32)
    >>> find_packed_sequence_indices(jnp.array([[0, 1, 2]])) is None
    True
    """
    ids = checks.array("position_ids", position_ids, "i", 2)
    # NumPy where the contents are known, also in the middle of a trace.
    xp = jnp if checks.is_traced(ids) else np
    starts = xp.diff(xp.asarray(ids), axis=1) != 1
    packed = xp.cumsum(xp.pad(starts, ((0, 0), (1, 0))), axis=1)
    return None if xp is np and not packed[:, -1].any() else jnp.asarray(packed)


def sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: Scalar = 0,
    mask_function: MaskMod = causal_mask_function,
    attention_mask: Mask2D | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: object = "cpu",
    **kwargs: object,
) -> Bool[Array, "batch 1 q kv"] | None:
    """The mask as bools, ``True`` where a query may attend; ``None`` where a kernel needs no mask.

    Args:
        batch_size, q_length, kv_length: static.
        q_offset, kv_offset: positions of the first query and of the first key; ints, or traced scalars.
        mask_function: a function of (batch, head, query, key). One that is not of this module is read for each pair on
            its own, as with ``use_vmap`` in Transformers, and is static: another function is another compilation.
        attention_mask: 0/1 ``[batch, keys]`` from position 0 on; keys that it does not reach are padding.
        local_size: of a window or chunk, which is left out only where there are fewer keys.
        allow_is_causal_skip: whether ``None`` may stand for a causal mask, which ``is_causal`` of the kernel says.
        allow_is_bidirectional_skip: whether ``None`` may stand for a mask that masks nothing.
        use_vmap, device, kwargs: accepted and ignored.

    Returns:
        bool ``[batch, 1, q, kv]`` or ``None``. Source: ``sdpa_mask`` in Transformers' ``masking_utils``.

    Raises:
        ValueError: a length that is not positive; a mask of another rank, or for another batch.
        TypeError: no JAX or NumPy array (a torch tensor), no Python int, no function.

    >>> sdpa_mask(1, 2, 3, q_offset=1, mask_function=sliding_window_causal_mask_function(2), local_size=2)
    Array([[[[ True,  True, False],
             [False,  True,  True]]]], dtype=bool)
    >>> sdpa_mask(1, 3, 3) is None
    True
    """
    call = _Call.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if allow_is_causal_skip and call.is_causal_without_mask(local_size):
        return None
    if allow_is_bidirectional_skip and call.masks_nothing(local_size):
        return None
    return call.mask(mask_function).dense(call.q_length, call.kv_length, offset=call.q_offset)


def eager_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: Scalar = 0,
    mask_function: MaskMod = causal_mask_function,
    attention_mask: Mask2D | None = None,
    dtype: DTypeLike = jnp.float32,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: object = "cpu",
    **kwargs: Any,
) -> Float[Array, "batch 1 q kv"] | None:
    """The mask as what is added to scores: 0 where a query may attend, else the minimum of ``dtype``.

    Arguments and errors as in :func:`sdpa_mask`; ``local_size`` is one of ``kwargs``.

    Returns:
        ``dtype`` ``[batch, 1, q, kv]``; ``None`` only where ``allow_is_bidirectional_skip`` lets it stand for a mask
        that masks nothing. Source: ``eager_mask`` in Transformers' ``masking_utils``.

    >>> eager_mask(1, 2, 2, dtype=jnp.float16)
    Array([[[[ 0.00e+00, -6.55e+04],
             [ 0.00e+00,  0.00e+00]]]], dtype=float16)
    """
    call = _Call.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if allow_is_bidirectional_skip and call.masks_nothing(kwargs.get("local_size")):
        return None
    return call.mask(mask_function).bias(call.q_length, call.kv_length, dtype, offset=call.q_offset)


def flash_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: Scalar = 0,
    mask_function: MaskMod = causal_mask_function,
    attention_mask: Mask2D | None = None,
    **kwargs: object,
) -> Shaped[Array, "batch kv"] | None:
    """The last ``kv_length`` columns of the 2D mask, from which a kernel learns lengths; ``None`` where all are valid.

    Arguments and errors as in :func:`sdpa_mask`. Source: ``flash_attention_mask`` in Transformers' ``masking_utils``.

    >>> flash_attention_mask(1, 1, 2, attention_mask=jnp.array([[1, 0, 1]]))
    Array([[0, 1]], dtype=int32)
    """
    call = _Call.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if attention_mask is None:
        return None
    last = attention_mask[:, -call.kv_length :]
    if last.shape[1] == call.kv_length and checks.known(attention_mask, lambda m: m[:, -call.kv_length :]):
        return None
    return jnp.asarray(last)


def flex_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Offset = 0,
    kv_offset: Scalar = 0,
    mask_function: MaskMod = causal_mask_function,
    attention_mask: Mask2D | None = None,
    device: object = "cpu",
    **kwargs: object,
) -> TileMap:
    """The mask as tiles of 128 queries by 128 keys, which ``torch_compat.blocks`` makes a ``BlockMask``.

    Arguments and errors as in :func:`sdpa_mask`. Source: ``flex_attention_mask`` in Transformers' ``masking_utils``;
    as there, an ``attention_mask`` without any padding is left out, and does not end the keys where it ends.

    >>> print(flex_attention_mask(1, 256, 256).states[0, 0])
    [[1 0]
     [2 1]]
    """
    call = _Call.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if attention_mask is not None and checks.known(attention_mask):
        call = _Call.of(batch_size, q_length, kv_length, q_offset, kv_offset, None)
    return call.mask(mask_function).tiles(call.q_length, call.kv_length, offset=call.q_offset)


# By the name of an attention implementation; another name belongs to a backend that needs no mask. To be added to.
ALL_MASK_ATTENTION_FUNCTIONS: dict[str | None, Callable[..., Any]] = {
    "sdpa": sdpa_mask,
    "eager": eager_mask,
    "flash_attention_2": flash_attention_mask,
    "flash_attention_3": flash_attention_mask,
    "flash_attention_4": flash_attention_mask,
    "flex_attention": flex_attention_mask,
}


@dataclass(frozen=True)
class _Call:
    """Sizes and positions of a mask that is asked for, checked."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: Offset
    kv_offset: Scalar
    attention_mask: Any

    @classmethod
    def of(
        cls, batch_size: int, q_length: int, kv_length: int, q_offset: Any, kv_offset: Any, attention_mask: Any
    ) -> "_Call":
        batch_size = checks.length("batch_size", batch_size)
        if attention_mask is not None:
            checks.array("attention_mask", attention_mask, "bif", 2)
            if attention_mask.shape[0] != batch_size:
                raise ValueError(
                    f"attention_mask must be for the batch of {batch_size} at hand, got "
                    f"{checks.describe(attention_mask)}"
                )
        return cls(
            batch_size,
            checks.length("q_length", q_length),
            checks.length("kv_length", kv_length),
            _position("q_offset", q_offset, ranks=(0, 1)),
            _position("kv_offset", kv_offset),
            attention_mask,
        )

    def mask(self, mask_function: MaskMod) -> Mask:
        """What is read: the function at the positions of the keys at hand, and the padding of these keys."""
        function = _described(mask_function)
        if checks.is_array(self.kv_offset) or self.kv_offset != 0:
            # An array, so that another offset is not another compilation.
            offset: Any = self.kv_offset if checks.is_array(self.kv_offset) else np.asarray(self.kv_offset, np.int32)
            function = _Shifted(function, 0, offset)
        placed = _OfBatch(function, self.batch_size)
        if self.attention_mask is None:
            return placed
        return placed & Padding(_at_hand(_valid("attention_mask", self.attention_mask), self.kv_length, self.kv_offset))

    def is_causal_without_mask(self, local_size: int | None) -> bool:
        """Whether a causal kernel without any mask does the same. What is traced is not looked at."""
        if any(map(checks.is_traced, (self.attention_mask, self.q_offset, self.kv_offset))):
            return False
        if local_size is not None and self.kv_length >= local_size:
            return False
        # A kernel aligns one query with the last key, and as many queries as keys can be aligned in one way only.
        aligned = self.q_length == 1 or self.kv_length == self.q_length
        with jax.ensure_compile_time_eval():
            first = bool(np.all(self.q_offset == 0))
            if self.attention_mask is None:
                return aligned or first
            # Keys after the queries, which a cache of fixed size has until it is full, are masked as the future.
            no_padding, only_future = _what_is_masked(
                self.attention_mask, self.q_length, self.kv_length, self.kv_offset
            )
            return (aligned and bool(no_padding)) or (first and bool(only_future))

    def masks_nothing(self, local_size: int | None) -> bool:
        """Whether every query may attend to every key, of a bidirectional mask. What is traced is not looked at."""
        if checks.is_traced(self.kv_offset) or (local_size is not None and self.kv_length >= local_size):
            return False
        if self.attention_mask is None:
            return True
        reached = self.attention_mask.shape[1] >= self.kv_length + self.kv_offset
        return bool(reached) and checks.known(self.attention_mask)


def find_first_full_attention_index(cache: Any) -> int:
    """The index of the first layer of a cache that is neither sliding nor linear nor a dummy, or 0.

    >>> from types import SimpleNamespace
    >>> find_first_full_attention_index(SimpleNamespace(is_sliding=[True, True, False]))
    2
    """
    sliding = getattr(cache, "is_sliding", [])
    others = [getattr(cache, name, [False] * len(sliding)) for name in ("is_linear", "is_dummy")]
    return next((index for index, kinds in enumerate(zip(sliding, *others, strict=True)) if not any(kinds)), 0)


def _first_sliding_index(cache: Any) -> int:
    return next((index for index, is_sliding in enumerate(getattr(cache, "is_sliding", [])) if is_sliding), 0)


def create_causal_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    past_key_values: Any,
    position_ids: Ids | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: Ids | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,
) -> Prepared | None:
    """The causal mask of a model's inputs, as its attention implementation wants it.

    Args:
        config: read for ``_attn_implementation`` and, if there is one, ``is_causal``, which makes the mask that of
            :func:`create_bidirectional_mask` where it is false.
        inputs_embeds: ``[batch, q, ...]``, read for its shape and its floating dtype.
        attention_mask: 0/1 ``[batch, keys]``, the cached ones included; or ``None``; or four dimensions or a
            ``TileMap``, handed back as it is.
        past_key_values: a cache, or ``None``.
        position_ids: integer ``[batch, q]`` or ``[1, q]``. Where there is neither a mask nor a cache, sequences packed
            into a row, found by :func:`find_packed_sequence_indices`, do not attend to each other.
        or_mask_function, and_mask_function: functions of (batch, head, query, key) that allow more, or less.
        block_sequence_ids: integer ``[batch, keys]``: tokens with the same id that is not negative attend to each
            other in both directions.
        layer_idx: the layer of the cache to ask for sizes; the first with full attention unless given.
        allow_is_causal_skip: whether ``None`` may stand for a mask that ``is_causal`` of the kernel says.

    Returns:
        For ``"sdpa"`` bool and for ``"eager"`` additive, ``[batch, 1, q, kv]``; the 2D mask for flash attention; a
        ``TileMap`` for ``"flex_attention"``; what was put in ``ALL_MASK_ATTENTION_FUNCTIONS`` for another. ``None``
        where the kernel needs no mask. Source: ``create_causal_mask`` in Transformers' ``masking_utils``.

    Raises:
        AttributeError: ``config`` has no ``_attn_implementation``.
        TypeError: no JAX or NumPy array (a torch tensor), no function.
        ValueError: arrays of another rank, or for different batches.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa")
    >>> create_causal_mask(config, jnp.zeros((1, 2, 8)), jnp.array([[0, 1]]), None)
    Array([[[[False, False],
             [False,  True]]]], dtype=bool)
    """
    if not getattr(config, "is_causal", True):
        return create_bidirectional_mask(
            config,
            inputs_embeds,
            attention_mask,
            past_key_values=past_key_values,
            or_mask_function=or_mask_function,
            and_mask_function=and_mask_function,
            allow_is_bidirectional_skip=allow_is_causal_skip,
        )
    return _create_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        find_first_full_attention_index(past_key_values) if layer_idx is None else layer_idx,
        lambda call: (causal_mask_function, None),
        or_mask_function,
        and_mask_function,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids,
        allow_is_causal_skip=allow_is_causal_skip,
    )


def create_bidirectional_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    encoder_hidden_states: Embeds | None = None,
    past_key_values: Any = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    allow_is_bidirectional_skip: bool = True,
    **kwargs: object,
) -> Prepared | None:
    """The mask of an encoder, or of cross-attention: every key that is no padding.

    Args:
        encoder_hidden_states: ``[batch, kv, ...]``, read in place of ``inputs_embeds`` for batch, dtype and, without a
            mask, the number of keys.
        allow_is_bidirectional_skip: whether ``None`` may stand for a mask that masks nothing.
        kwargs: accepted and ignored.

    The other arguments, the result and the errors are as in :func:`create_causal_mask`. Source:
    ``create_bidirectional_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="eager")
    >>> create_bidirectional_mask(config, jnp.zeros((1, 1, 8), jnp.float16), jnp.array([[1, 0]]))
    Array([[[[ 0.00e+00, -6.55e+04]]]], dtype=float16)
    """
    return _create_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        find_first_full_attention_index(past_key_values),
        lambda call: (bidirectional_mask_function, None),
        or_mask_function,
        and_mask_function,
        encoder_hidden_states=encoder_hidden_states,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
    )


def create_sliding_window_causal_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    past_key_values: Any,
    position_ids: Ids | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: Ids | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,
) -> Prepared | None:
    """The causal mask of the last ``config.sliding_window`` keys, the own one included; sized by a sliding layer.

    Arguments, result and errors as in :func:`create_causal_mask`, and a ``ValueError`` where ``config`` has no
    ``sliding_window``. Source: ``create_sliding_window_causal_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=2)
    >>> create_sliding_window_causal_mask(config, jnp.zeros((1, 3, 8)), None, None)
    Array([[[[ True, False, False],
             [ True,  True, False],
             [False,  True,  True]]]], dtype=bool)
    """
    if not getattr(config, "is_causal", True):
        return create_bidirectional_sliding_window_mask(
            config,
            inputs_embeds,
            attention_mask,
            past_key_values=past_key_values,
            or_mask_function=or_mask_function,
            and_mask_function=and_mask_function,
            allow_is_bidirectional_skip=allow_is_causal_skip,
        )
    return _create_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        _first_sliding_index(past_key_values) if layer_idx is None else layer_idx,
        partial(_windowed, config, sliding_window_causal_mask_function),
        or_mask_function,
        and_mask_function,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids,
        allow_is_causal_skip=allow_is_causal_skip,
    )


def create_bidirectional_sliding_window_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    encoder_hidden_states: Embeds | None = None,
    past_key_values: Any = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    allow_is_bidirectional_skip: bool = True,
    **kwargs: object,
) -> Prepared | None:
    """The mask of an encoder whose tokens attend ``config.sliding_window`` keys far, before and after.

    Arguments, result and errors as in :func:`create_bidirectional_mask`, and a ``ValueError`` where ``config`` has no
    ``sliding_window``. Source: ``create_bidirectional_sliding_window_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=1)
    >>> create_bidirectional_sliding_window_mask(config, jnp.zeros((1, 3, 8)), None)
    Array([[[[ True,  True, False],
             [ True,  True,  True],
             [False,  True,  True]]]], dtype=bool)
    """
    return _create_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        _first_sliding_index(past_key_values),
        partial(_windowed, config, sliding_window_bidirectional_mask_function),
        or_mask_function,
        and_mask_function,
        encoder_hidden_states=encoder_hidden_states,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
    )


def create_chunked_causal_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    past_key_values: Any,
    position_ids: Ids | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: Ids | None = None,
    layer_idx: int | None = None,
    allow_is_causal_skip: bool = True,
) -> Prepared | None:
    """The causal mask within chunks of ``config.attention_chunk_size``, which begin after the padding on the left.

    Arguments, result and errors as in :func:`create_causal_mask`, and a ``ValueError`` where ``config`` has no
    ``attention_chunk_size``, or where it asks for flash attention and there are more keys than that. Source:
    ``create_chunked_causal_mask`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(_attn_implementation="sdpa", attention_chunk_size=2)
    >>> create_chunked_causal_mask(config, jnp.zeros((1, 3, 8)), jnp.array([[0, 1, 1]]), None)
    Array([[[[False, False, False],
             [False,  True, False],
             [False,  True,  True]]]], dtype=bool)
    """
    return _create_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        _first_sliding_index(past_key_values) if layer_idx is None else layer_idx,
        partial(_chunked, config),
        or_mask_function,
        and_mask_function,
        position_ids=position_ids,
        block_sequence_ids=block_sequence_ids,
        allow_is_causal_skip=allow_is_causal_skip,
    )


def _windowed(config: Any, mask_function: Callable[[int], MaskFunction], call: "_Call") -> tuple[MaskFunction, int]:
    window = _size(config, "sliding_window")
    return mask_function(window), window


def _chunked(config: Any, call: "_Call") -> tuple[MaskFunction, int]:
    chunk_size = _size(config, "attention_chunk_size")
    if "flash" in config._attn_implementation and not checks.is_array(call.kv_offset):
        keys = call.kv_length + call.kv_offset
        if keys > chunk_size:
            raise ValueError(
                f"flash attention knows no chunks, and {keys} keys are more than the one chunk of attention_chunk_size="
                f"{chunk_size}: use another _attn_implementation than {config._attn_implementation!r}"
            )
    left_padding = 0
    if call.attention_mask is not None:
        of_numpy = isinstance(call.attention_mask, np.ndarray)
        left_padding = (_left_padding if of_numpy else jax.jit(_left_padding))(call.attention_mask)
    return chunked_causal_mask_function(chunk_size, left_padding), chunk_size


def _left_padding(valid: Any) -> Any:
    """The number of keys before the first that is valid, of each example."""
    return (valid.cumsum(axis=1) == 0).sum(axis=1)


def _size(config: Any, name: str) -> int:
    size = getattr(config, name, None)
    if size is None:
        raise ValueError(f"config, {checks.describe(config)}, must have {name}, which is missing or None")
    return checks.integer(f"{name} of config", size, minimum=1)


def _create_mask(
    config: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    cache: Any,
    layer_idx: int,
    pattern: Callable[[_Call], tuple[MaskFunction, int | None]],
    or_mask_function: MaskMod | None,
    and_mask_function: MaskMod | None,
    *,
    encoder_hidden_states: Any = None,
    position_ids: Any = None,
    block_sequence_ids: Any = None,
    allow_is_causal_skip: bool,
    allow_is_bidirectional_skip: bool = False,
) -> Any:
    """What all the functions above have in common; ``pattern`` gives the mask function and its ``local_size``."""
    if attention_mask is not None and not isinstance(attention_mask, TileMap):
        checks.array("attention_mask", attention_mask, "bif", 2, 4)
    if isinstance(attention_mask, TileMap) or (attention_mask is not None and attention_mask.ndim == 4):
        return attention_mask
    if not hasattr(config, "_attn_implementation"):
        raise AttributeError(
            f"config, {checks.describe(config)}, must have _attn_implementation, such as 'sdpa' or 'eager'"
        )
    interface = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if interface is None:
        return None

    q_length = checks.array("inputs_embeds", inputs_embeds, "bif", 2, 3, 4).shape[1]
    embeds = inputs_embeds
    if encoder_hidden_states is not None:
        embeds = checks.array("encoder_hidden_states", encoder_hidden_states, "bif", 2, 3, 4)
    batch_size = embeds.shape[0]
    if attention_mask is not None:
        attention_mask = _valid("attention_mask", attention_mask)
    if cache is not None:
        q_offset = cache.get_query_offset(layer_idx)
        kv_length, kv_offset = cache.get_mask_sizes(q_length, layer_idx)
    else:
        q_offset, kv_offset = 0, 0
        keys = embeds if attention_mask is None else attention_mask
        kv_length = keys.shape[1]
    call = _Call.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)

    function, local_size = pattern(call)
    plain = function
    if or_mask_function is not None:
        function = or_masks(function, or_mask_function)
    if and_mask_function is not None:
        function = and_masks(function, and_mask_function)
    if position_ids is not None and attention_mask is None and cache is None:
        _checked_ids("position_ids", position_ids, batch_size, q_length)
        packed = find_packed_sequence_indices(position_ids)
        if packed is not None:
            function = packed_sequence_compatibility_function(function, position_ids, packed)
    if block_sequence_ids is not None:
        _checked_ids("block_sequence_ids", block_sequence_ids, batch_size)
        function = or_masks(function, blockwise_overlay(block_sequence_ids))
    # A cache that compiles keeps one shape of answer from one query to the next.
    decodes = q_length == 1 and getattr(cache, "is_compileable", False)
    return interface(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=call.kv_length,
        q_offset=call.q_offset,
        kv_offset=call.kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and function is plain and not decodes,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and function is plain,
        dtype=embeds.dtype,
        config=config,
        use_vmap=or_mask_function is not None or and_mask_function is not None,
    )


def create_recurrent_attention_mask(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | None,
    past_key_values: Any = None,
    **kwargs: object,
) -> Shaped[Array, "batch q"] | None:
    """The 2D mask of the tokens at hand, by which layers of linear attention multiply their inputs.

    Args:
        inputs_embeds: ``[batch, q, ...]``, read for its shape.
        attention_mask: 0/1 ``[batch, keys]``, of which the last ``q`` are the tokens at hand.
        config, past_key_values, kwargs: accepted and ignored.

    Returns:
        ``[batch, q]`` in the dtype of the mask. ``None`` where there is no 2D mask, where there is one token, and where
        a mask that is not traced is all ones. Source: ``create_recurrent_attention_mask`` in Transformers'
        ``masking_utils``.

    >>> create_recurrent_attention_mask(None, jnp.zeros((1, 2, 8)), jnp.array([[0, 1, 1]]))
    Array([[1, 1]], dtype=int32)
    """
    if attention_mask is None:
        return None
    checks.array("attention_mask", attention_mask, "bif")
    q_length = checks.array("inputs_embeds", inputs_embeds, "bif", 2, 3, 4).shape[1]
    if attention_mask.ndim != 2 or q_length == 1 or checks.known(attention_mask, lambda m: m == 1):
        return None
    return jnp.asarray(attention_mask[:, -q_length:])


# Which function makes the mask of a layer type, or which functions make its masks.
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING: dict[str, Callable[..., Any] | Mapping[str, Callable[..., Any]]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
    "compressed_sparse_attention": create_sliding_window_causal_mask,
    "heavily_compressed_attention": create_sliding_window_causal_mask,
    "minimax_m3_sparse": create_causal_mask,
    "indexed_attention": partial(create_causal_mask, allow_is_causal_skip=False),
    "linear_attention": create_recurrent_attention_mask,
    "conv": create_recurrent_attention_mask,
    "hybrid": {"full_attention": create_causal_mask, "linear_attention": create_recurrent_attention_mask},
    "hybrid_sliding": {"sliding_attention": create_causal_mask, "linear_attention": create_recurrent_attention_mask},
}


def create_masks_for_generate(
    config: Any,
    inputs_embeds: Embeds,
    attention_mask: Mask2D | Mask4D | TileMap | None,
    past_key_values: Any,
    position_ids: Ids | None = None,
    or_mask_function: MaskMod | None = None,
    and_mask_function: MaskMod | None = None,
    block_sequence_ids: Ids | None = None,
    **kwargs: object,
) -> Any:
    """The masks that a model needs: one for each of ``config.layer_types``, by its name; else the one it needs.

    Args:
        config: read for ``layer_types``, or else ``sliding_window``, or else ``attention_chunk_size``; of its
            ``get_text_config()``, where it has one.
        kwargs: accepted and ignored.

    The other arguments and the errors are as in :func:`create_causal_mask`.

    Returns:
        A mask, or a dict of them; ``attention_mask`` as it is where a layer type is not known. Source:
        ``create_masks_for_generate`` in Transformers' ``masking_utils``.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(
    ...     _attn_implementation="sdpa", layer_types=["sliding_attention", "full_attention"], sliding_window=2
    ... )
    >>> masks = create_masks_for_generate(config, jnp.zeros((1, 3, 8)), None, None)
    >>> {name: None if mask is None else mask.shape for name, mask in masks.items()}
    {'sliding_attention': (1, 1, 3, 3), 'full_attention': None}
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "or_mask_function": or_mask_function,
        "and_mask_function": and_mask_function,
        "block_sequence_ids": block_sequence_ids,
    }
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        if any(layer_type not in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING for layer_type in layer_types):
            return attention_mask
        masks: dict[str, Any] = {}
        for layer_type in dict.fromkeys(layer_types):
            functions = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[layer_type]
            if not isinstance(functions, Mapping):
                masks[layer_type] = functions(**arguments)
            else:
                masks |= {name: function(**arguments) for name, function in functions.items() if name not in masks}
        return masks
    if getattr(config, "sliding_window", None) is not None:
        return create_sliding_window_causal_mask(**arguments)
    if getattr(config, "attention_chunk_size", None) is not None:
        return create_chunked_causal_mask(**arguments)
    return create_causal_mask(**arguments)


def _position(name: str, value: Any, minimum: int = 0, ranks: tuple[int, ...] = (0,)) -> Any:
    """A position as an int, also from a 0-d tensor of a cache of PyTorch, or as the array that it is."""
    if not checks.is_array(value):
        return checks.integer(name, value, minimum)
    checks.scalar(name, value, minimum, ranks)
    return value


def _checked_ids(name: str, ids: Any, batch_size: int, length: int | None = None) -> None:
    checks.array(name, ids, "i", 2)
    if ids.shape[0] not in (1, batch_size) or length not in (None, ids.shape[1]):
        expected = f"[{batch_size}, {'keys' if length is None else length}]"
        raise ValueError(
            f"{name} must have the shape {expected}, or 1 in place of {batch_size}, got {checks.describe(ids)}"
        )


def _valid(name: str, mask: Any) -> Any:
    """A 0/1 mask as bools: as contents where they are known, in the middle of a trace too."""
    checks.array(name, mask, "bif", 2)
    if mask.dtype == jnp.bool_:
        return mask
    with jax.ensure_compile_time_eval():
        return mask != 0


def _at_hand(valid: Any, kv_length: int, kv_offset: Scalar) -> Any:
    """The columns of the keys at hand; those that are not there are padding."""
    if checks.is_array(kv_offset):
        return _columns(valid, kv_length, kv_offset)
    if kv_offset == 0 and valid.shape[1] == kv_length:
        return valid
    if isinstance(valid, np.ndarray):
        part = valid[:, kv_offset : kv_offset + kv_length]
        return np.pad(part, ((0, 0), (0, kv_length - part.shape[1])))
    return _columns(valid, kv_length, kv_offset)


@partial(jax.jit, static_argnames="kv_length")
def _columns(valid: Bool[Array, "batch keys"], kv_length: int, kv_offset: Scalar) -> Bool[Array, "batch kv"]:
    return jnp.take(valid, jnp.arange(kv_length) + kv_offset, axis=1, mode="fill", fill_value=False)


@partial(jax.jit, static_argnames=("q_length", "kv_length"))
def _what_is_masked(
    attention_mask: Mask2D, q_length: int, kv_length: int, kv_offset: Scalar
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether none of the keys at hand is padding; and whether all after the first ``q_length`` are, and no other."""
    valid = _columns(attention_mask != 0, kv_length, kv_offset)
    return valid.all(), valid[:, :q_length].all() & ~valid[:, q_length:].any()
