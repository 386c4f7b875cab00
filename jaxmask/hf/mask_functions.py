"""The mask functions of ``transformers.masking_utils``, and how they combine.

A mask function answers for four indices (batch, head, query, key), as it does in Transformers. Here it also keeps the
description that it was made from, a :class:`jaxmask.Mask`, so that tiles and kernels can read it.

Arrays in a mask function begin at position 0. A query or key beyond the end of such an array is an error where its
position is known, and does not attend where its position is traced.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Shaped

from jaxmask import checks
from jaxmask.description import is_beyond
from jaxmask.indices import Allowed, Index, common, inside, lookup
from jaxmask.mask import Empty, Full, Mask, Scalar
from jaxmask.masks import Causal, Chunked, Padding, Predicate, Segments, SlidingWindow, Window
from jaxmask.positions import Extent
from jaxmask.tiles import Bounds, Span

# A function of (batch_idx, head_idx, q_idx, kv_idx), or a mask.
MaskMod = Callable[[Any, Any, Any, Any], Any] | Mask
# A 0/1 mask: bool, integer or float; JAX or NumPy.
Mask2D = Shaped[Array | np.ndarray, "batch keys"]
Ids = Integer[Array | np.ndarray, "batch positions"]
LeftPadding = Integer[Array | np.ndarray, "batch"] | int


@dataclass(frozen=True)
class MaskFunction:
    """A function of positions, as Transformers hands it around, that keeps its description.

    Args:
        mask: the description. All of it is read at positions, its arrays too.

    >>> causal_mask_function(0, 0, 2, jnp.arange(4))
    Array([ True,  True,  True, False], dtype=bool)
    >>> and_masks(causal_mask_function, sliding_window_overlay(3))
    MaskFunction(mask=Causal() & Window(2, None))
    """

    mask: Mask

    def __call__(self, batch_idx: Index, head_idx: Index, q_idx: Index, kv_idx: Index) -> Bool[Array, "..."]:
        """Whether the query at ``q_idx`` may attend to the key at ``kv_idx``.

        Args:
            batch_idx, head_idx, q_idx, kv_idx: integers, or integer arrays that broadcast against each other.

        Returns:
            bool, in the shape that the indices have together.

        Raises:
            ValueError: an index that is not traced lies beyond an array of the mask.
        """
        examples = _known_range(batch_idx)
        if examples is not None:
            _check_batch(self.mask, examples[1] + 1)
        self.mask.check(Extent(_known_range(q_idx), _known_range(kv_idx), 1, None, is_aligned=True))
        return _at_pairs(self.mask, batch_idx, head_idx, q_idx, kv_idx)


@jax.jit
def _at_pairs(mask: Mask, *indices: Int[Array, "..."]) -> Bool[Array, "..."]:
    shape = jnp.broadcast_shapes(*map(jnp.shape, indices))
    allowed = jnp.asarray(mask.allows(*indices), jnp.bool_)
    # An array of one element answers in four dimensions, however few the indices have.
    return jnp.broadcast_to(allowed.reshape(allowed.shape[max(allowed.ndim - len(shape), 0) :]), shape)


# The masks of this module. Their arrays may be longer than the queries and keys that are read, but not shorter.


class _AtPositions(Mask):
    """A mask that is read at other positions than those that are asked for.

    Args:
        mask: whose arrays, too, are read at positions.
        q_offset, kv_offset: added to the positions of queries and keys.
        position_ids: where given, the position of a query or key is the element at that place.
    """

    mask: Mask
    q_offset: Scalar = 0
    kv_offset: Scalar = 0
    position_ids: Ids | None = None

    shape_is_complete = True

    @property
    def shape(self) -> checks.Shape:
        batch, heads, _ = self.mask.shape
        return batch if self.position_ids is None else common(batch, self.position_ids.shape[0]), heads, 1

    def check(self, extent: Extent) -> None:
        queries, keys = _shifted(extent.queries, self.q_offset), _shifted(extent.keys, self.kv_offset)
        if self.position_ids is not None:
            for name, known in (("query", queries), ("key", keys)):
                if is_beyond(known, self.position_ids.shape[1]):
                    raise ValueError(
                        f"position_ids, {checks.describe(self.position_ids)}, ends at position "
                        f"{self.position_ids.shape[1] - 1}, but {name} positions {known and known[0]} to "
                        f"{known and known[1]} were asked for: it must reach every query and key"
                    )
            queries = keys = _known_range(self.position_ids)
        self.mask.check(extent._replace(queries=queries, keys=keys, key_length=None, is_aligned=True))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        q, kv = q + self.q_offset, kv + self.kv_offset
        ids = self.position_ids
        if ids is None:
            return self.mask.allows(b, h, q, kv)
        allowed = self.mask.allows(b, h, lookup(ids, b=b, q=q), lookup(ids, b=b, kv=kv))
        return allowed & inside(q, ids.shape[1]) & inside(kv, ids.shape[1])

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        q, kv = q.at(q.positions + self.q_offset), kv.at(kv.positions + self.kv_offset)
        ids = self.position_ids
        if ids is None:
            return self.mask.tile_bounds(b, h, q, kv)
        places = q.at(lookup(ids, b=b, q=q.positions)), kv.at(lookup(ids, b=b, kv=kv.positions))
        some, every = self.mask.tile_bounds(b, h, *places)
        has_q, has_kv = inside(q.positions, ids.shape[1]), inside(kv.positions, ids.shape[1])
        return some & q.most(has_q) & kv.most(has_kv), every & q.least(has_q) & kv.least(has_kv)


class ForBatch(Mask):
    """A mask for a number of examples, with one head that stands for all."""

    mask: Mask
    batch_size: int

    shape_is_complete = True

    @property
    def shape(self) -> checks.Shape:
        return self.batch_size, 1, 1

    def check(self, extent: Extent) -> None:
        _check_batch(self.mask, self.batch_size)
        self.mask.check(extent._replace(key_length=None, is_aligned=True))

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return self.mask.allows(self._example(b), 0, q, kv)

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return self.mask.tile_bounds(self._example(b), 0, q, kv)

    def _example(self, b: Index) -> Index:
        return 0 if self.batch_size == 1 else b


def _known_range(positions: Any) -> tuple[int, int] | None:
    """The lowest and the highest of positions, or ``None`` where they are traced."""
    if checks.is_traced(positions) or np.size(positions) == 0:
        return None
    positions = np.asarray(positions)  # its contents are known in the middle of a trace, too
    return int(positions.min()), int(positions.max())


def _check_batch(mask: Mask, batch_size: int) -> None:
    if 1 < mask.shape[0] < batch_size:
        raise ValueError(
            f"the mask function is for {mask.shape[0]} examples, but {batch_size} were asked for: {mask!r}"
        )


def _shifted(positions: tuple[Any, Any] | None, offset: Scalar) -> tuple[Any, Any] | None:
    if positions is None or checks.is_traced(offset):
        return None
    return positions[0] + int(offset), positions[1] + int(offset)


# How mask functions combine.


@dataclass(frozen=True)
class _PairByPair:
    """A function of four integers, on arrays. It equals itself, so that what it is part of is compiled once."""

    function: Callable[[Any, Any, Any, Any], Any]

    def __call__(self, b: Array, h: Array, q: Array, kv: Array) -> Array:
        return _for_each_pair(self.function, b, h, q, kv)


@partial(jax.jit, static_argnames="function")
def _for_each_pair(function: Callable[[Any, Any, Any, Any], Any], b: Array, h: Array, q: Array, kv: Array) -> Array:
    return jnp.vectorize(function)(b, h, q, kv)


def described(function: MaskMod) -> Mask:
    """The description of a mask function.

    Raises:
        TypeError: neither a function nor a mask.
    """
    if isinstance(function, MaskFunction):
        return function.mask
    if isinstance(function, Mask):
        return _AtPositions(function)
    if not callable(function):
        raise TypeError(
            "a mask function must be a function of (batch_idx, head_idx, q_idx, kv_idx) or a mask, got "
            f"{checks.describe(function)}"
        )
    return Predicate(_PairByPair(function))


def valid_keys(name: str, mask: Any) -> Any:
    """A 0/1 mask as bools. Contents that are known stay known in the middle of a trace."""
    checks.array(name, mask, "bif", 2)
    if mask.dtype == jnp.bool_:
        return mask
    with jax.ensure_compile_time_eval():
        return mask != 0


def position(name: str, value: Any, minimum: int = 0, ranks: tuple[int, ...] = (0,)) -> Any:
    """A position as an int, also from a 0-d tensor of a cache of PyTorch, or as the array that it is."""
    if not checks.is_array(value):
        return checks.integer(name, value, minimum)
    return checks.scalar(name, value, minimum, ranks=ranks)


def and_masks(*mask_functions: MaskMod) -> MaskFunction:
    """The intersection of mask functions.

    Args:
        mask_functions: those of this module, masks, or other functions of four integers (batch, head, query, key). Such
            a function is called for each pair on its own, and may index JAX arrays by the integers.

    Raises:
        TypeError: one is neither a function nor a mask.

    >>> and_masks(causal_mask_function, lambda b, h, q, kv: kv != 1)(0, 0, 2, jnp.arange(4))
    Array([ True, False,  True, False], dtype=bool)
    """
    return MaskFunction(reduce(operator.and_, map(described, mask_functions), Full()))


def or_masks(*mask_functions: MaskMod) -> MaskFunction:
    """The union of mask functions. Arguments and errors are those of :func:`and_masks`.

    >>> or_masks(causal_mask_function, blockwise_overlay(jnp.array([[-1, 0, 0]])))(0, 0, 1, jnp.arange(3))
    Array([ True,  True,  True], dtype=bool)
    """
    return MaskFunction(reduce(operator.or_, map(described, mask_functions), Empty()))


causal_mask_function = MaskFunction(Causal())
bidirectional_mask_function = MaskFunction(Full())


def sliding_window_overlay(sliding_window: int) -> MaskFunction:
    """The last ``sliding_window`` keys, the query's own included, and all later keys. Combine it with a causal mask.

    >>> sliding_window_overlay(2)
    MaskFunction(mask=Window(1, None))
    """
    return MaskFunction(Window(checks.integer("sliding_window", sliding_window, minimum=1) - 1, None))


def chunked_overlay(chunk_size: int, left_padding: LeftPadding) -> MaskFunction:
    """The keys in the query's chunk. The first chunk begins after ``left_padding`` tokens, an int or ``[batch]``.

    >>> chunked_overlay(2, jnp.array([1]))(0, 0, 2, jnp.arange(4))
    Array([False,  True,  True, False], dtype=bool)
    """
    checks.integer("chunk_size", chunk_size, minimum=1)
    checks.scalar("left_padding", left_padding, minimum=0, ranks=(0, 1))
    return MaskFunction(Chunked(chunk_size, left_padding))


def blockwise_overlay(block_sequence_ids: Ids) -> MaskFunction:
    """The keys in the query's block: those with the same id. A negative id means that a token is in no block.

    Args:
        block_sequence_ids: integer ``[batch, positions]``.

    >>> blockwise_overlay(jnp.array([[-1, 0, 0, -1]]))(0, 0, 1, jnp.arange(4))
    Array([False,  True,  True, False], dtype=bool)
    """
    ids = checks.array("block_sequence_ids", block_sequence_ids, "i", 2)
    return MaskFunction(_AtPositions(Segments(ids) & Padding(ids >= 0)))


def sliding_window_causal_mask_function(sliding_window: int) -> MaskFunction:
    """The last ``sliding_window`` keys, the query's own included.

    >>> sliding_window_causal_mask_function(2)
    MaskFunction(mask=SlidingWindow(2))
    """
    return MaskFunction(SlidingWindow(checks.integer("sliding_window", sliding_window, minimum=1)))


def sliding_window_bidirectional_overlay(sliding_window: int) -> MaskFunction:
    """The keys that are at most ``sliding_window`` positions before or after the query.

    >>> sliding_window_bidirectional_overlay(2)
    MaskFunction(mask=Window(2, 2))
    """
    sliding_window = checks.integer("sliding_window", sliding_window, minimum=0)
    return MaskFunction(Window(sliding_window, sliding_window))


def sliding_window_bidirectional_mask_function(sliding_window: int) -> MaskFunction:
    """The same as :func:`sliding_window_bidirectional_overlay`, which is complete without another mask."""
    return and_masks(sliding_window_bidirectional_overlay(sliding_window), bidirectional_mask_function)


def chunked_causal_mask_function(chunk_size: int, left_padding: LeftPadding) -> MaskFunction:
    """The keys in the query's chunk, up to the query itself: a causal :func:`chunked_overlay`."""
    return and_masks(chunked_overlay(chunk_size, left_padding), causal_mask_function)


def padding_mask_function(padding_mask: Mask2D) -> MaskFunction:
    """The keys that are valid: ``padding_mask[batch_idx, kv_idx]``.

    Args:
        padding_mask: 0/1 ``[batch, keys]``.

    Raises:
        ValueError: another rank; or, when it is read, a key beyond the last one.

    >>> padding_mask_function(jnp.array([[False, True]]))(0, 0, 0, jnp.arange(2))
    Array([False,  True], dtype=bool)
    """
    return MaskFunction(_AtPositions(Padding(valid_keys("padding_mask", padding_mask))))


def find_packed_sequence_indices(position_ids: Ids) -> Int[Array, "batch positions"] | None:
    """Which of the sequences in its row a token belongs to. ``None`` where each row is one sequence.

    A sequence begins wherever a position does not follow the one before.

    Args:
        position_ids: integer ``[batch, q]``.

    Returns:
        integer ``[batch, q]``, counted from 0. Never ``None`` where ``position_ids`` is traced.

    Raises:
        TypeError: ``position_ids`` is not a JAX or NumPy array of integers.
        ValueError: it has another rank.

    >>> find_packed_sequence_indices(jnp.array([[0, 1, 0, 1, 2, 0]]))
    Array([[0, 0, 1, 1, 1, 2]], dtype=int32)
    >>> find_packed_sequence_indices(jnp.array([[0, 1, 2]])) is None
    True
    """
    ids = checks.array("position_ids", position_ids, "i", 2)
    # NumPy reads known contents in the middle of a trace, too.
    xp = jnp if checks.is_traced(ids) else np
    starts = xp.diff(xp.asarray(ids), axis=1) != 1
    packed = xp.cumsum(xp.pad(starts, ((0, 0), (1, 0))), axis=1)
    return None if xp is np and not packed[:, -1].any() else jnp.asarray(packed)


def packed_sequence_mask_function(packed_sequence_mask: Ids) -> MaskFunction:
    """The keys in the query's sequence: those with the same id.

    Args:
        packed_sequence_mask: integer ``[batch, positions]``, as :func:`find_packed_sequence_indices` returns it.

    >>> packed_sequence_mask_function(jnp.array([[0, 0, 1]]))(0, 0, 1, jnp.arange(3))
    Array([ True,  True, False], dtype=bool)
    """
    return MaskFunction(_AtPositions(Segments(checks.array("packed_sequence_mask", packed_sequence_mask, "i", 2))))


def remap_positions_for_packed_sequence(mask_function: MaskMod, position_ids: Ids) -> MaskFunction:
    """``mask_function`` at the positions ``position_ids[batch_idx, q_idx]`` and ``position_ids[batch_idx, kv_idx]``.

    Args:
        mask_function: as in :func:`and_masks`.
        position_ids: integer ``[batch, positions]``.

    >>> remap_positions_for_packed_sequence(causal_mask_function, jnp.array([[0, 1, 0]]))(0, 0, 2, jnp.arange(3))
    Array([ True, False,  True], dtype=bool)
    """
    ids = checks.array("position_ids", position_ids, "i", 2)
    checks.fits_int32("position_ids", ids)
    return MaskFunction(_AtPositions(described(mask_function), position_ids=ids))


def packed_sequence_compatibility_function(
    mask_function: MaskMod, position_ids: Ids, packed_sequence_mask: Ids
) -> MaskFunction:
    """``mask_function`` within each packed sequence, whose positions count from 0.

    Transformers had this function up to version 5.23.

    >>> ids, segments = jnp.array([[0, 1, 0]]), jnp.array([[0, 0, 1]])
    >>> packed_sequence_compatibility_function(causal_mask_function, ids, segments)(0, 0, 2, jnp.arange(3))
    Array([False, False,  True], dtype=bool)
    """
    return and_masks(
        packed_sequence_mask_function(packed_sequence_mask),
        remap_positions_for_packed_sequence(mask_function, position_ids),
    )


def add_offsets_to_mask_function(mask_function: MaskMod, q_offset: Scalar, kv_offset: Scalar) -> MaskFunction:
    """``mask_function`` where the first query is at position ``q_offset`` and the first key at ``kv_offset``.

    >>> add_offsets_to_mask_function(causal_mask_function, 2, 0)(0, 0, 0, jnp.arange(4))
    Array([ True,  True,  True, False], dtype=bool)
    """
    offsets = [
        position(name, offset, minimum=-checks.INT32_MAX)
        for name, offset in (("q_offset", q_offset), ("kv_offset", kv_offset))
    ]
    return MaskFunction(_AtPositions(described(mask_function), *offsets))
