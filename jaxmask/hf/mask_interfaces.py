"""What each attention implementation takes as a mask: bools, an additive mask, the 2D mask itself, or tiles.

The functions are those of ``transformers.masking_utils`` with the same names and signatures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from jaxmask import checks
from jaxmask.hf.mask_functions import (
    ForBatch,
    Ids,
    Mask2D,
    MaskFunction,
    MaskMod,
    add_offsets_to_mask_function,
    causal_mask_function,
    described,
    position,
    valid_keys,
)
from jaxmask.mask import Mask, Offset, Scalar
from jaxmask.masks import Padding
from jaxmask.tiles import TileMap


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
    """The mask as bools, ``True`` where a query may attend. ``None`` where the kernel needs no mask.

    Args:
        batch_size, q_length, kv_length: static.
        q_offset, kv_offset: positions of the first query and of the first key; ints, or traced scalars.
        mask_function: a function of (batch, head, query, key). A function of your own is called for each pair, as with
            ``use_vmap`` in Transformers. It is static: another function is another compilation.
        attention_mask: 0/1 ``[batch, keys]`` from position 0 on. Keys after its end are padding.
        local_size: the size of a window or chunk. A mask that has one is left out only where there are fewer keys.
        allow_is_causal_skip: whether the answer may be ``None`` where ``is_causal`` of the kernel means the same mask.
        allow_is_bidirectional_skip: whether the answer may be ``None`` where nothing is masked.
        use_vmap, device, kwargs: accepted and ignored.

    Returns:
        bool ``[batch, 1, q, kv]`` or ``None``. Source: ``sdpa_mask`` in Transformers' ``masking_utils``.

    Raises:
        ValueError: a length is not positive; ``attention_mask`` has another rank or is for another batch; an array in
            ``mask_function`` ends before the last query or key, as far as their positions are known.
        TypeError: ``attention_mask`` is not a JAX or NumPy array (a torch tensor, say); a length is not a Python int;
            ``mask_function`` is not a function.

    >>> from jaxmask.hf.mask_functions import sliding_window_causal_mask_function
    >>> sdpa_mask(1, 2, 3, q_offset=1, mask_function=sliding_window_causal_mask_function(2), local_size=2)
    Array([[[[ True,  True, False],
             [False,  True,  True]]]], dtype=bool)
    >>> sdpa_mask(1, 3, 3) is None
    True
    """
    request = MaskRequest.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if allow_is_causal_skip and request.is_causal_without_mask(local_size):
        return None
    if allow_is_bidirectional_skip and request.masks_nothing(local_size):
        return None
    return request.mask(mask_function).dense(request.q_length, request.kv_length, offset=request.q_offset)


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
    """The mask that is added to scores: 0 where a query may attend, else the minimum of ``dtype``.

    Arguments and errors are those of :func:`sdpa_mask`. ``local_size`` is read from ``kwargs``.

    Returns:
        ``dtype`` ``[batch, 1, q, kv]``. ``None`` only where ``allow_is_bidirectional_skip`` is true and nothing is
        masked. Source: ``eager_mask`` in Transformers' ``masking_utils``.

    >>> eager_mask(1, 2, 2, dtype=jnp.float16)
    Array([[[[ 0.00e+00, -6.55e+04],
             [ 0.00e+00,  0.00e+00]]]], dtype=float16)
    """
    request = MaskRequest.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if allow_is_bidirectional_skip and request.masks_nothing(kwargs.get("local_size")):
        return None
    return request.mask(mask_function).bias(request.q_length, request.kv_length, dtype, offset=request.q_offset)


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
    """The last ``kv_length`` columns of the 2D mask. ``None`` where all of them are valid, or where there is no mask.

    Arguments and errors are those of :func:`sdpa_mask`. Source: ``flash_attention_mask`` in Transformers'
    ``masking_utils``.

    >>> flash_attention_mask(1, 1, 2, attention_mask=jnp.array([[1, 0, 1]]))
    Array([[0, 1]], dtype=int32)
    """
    request = MaskRequest.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if attention_mask is None:
        return None
    last = attention_mask[:, -request.kv_length :]
    if last.shape[1] == request.kv_length and checks.known(attention_mask, lambda m: m[:, -request.kv_length :]):
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
    """The mask as tiles of 128 queries by 128 keys. ``torch_compat.blocks`` makes a ``BlockMask`` of them.

    Arguments and errors are those of :func:`sdpa_mask`. As in Transformers, an ``attention_mask`` without padding is
    left out: keys after its end are then no padding. Source: ``flex_attention_mask`` in Transformers'
    ``masking_utils``.

    >>> print(flex_attention_mask(1, 256, 256).states[0, 0])
    [[1 0]
     [2 1]]
    """
    request = MaskRequest.of(batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask)
    if attention_mask is not None and checks.known(attention_mask):
        request = MaskRequest.of(batch_size, q_length, kv_length, q_offset, kv_offset, None)
    return request.mask(mask_function).tiles(request.q_length, request.kv_length, offset=request.q_offset)


# By the name of an attention implementation. An implementation that is not here needs no mask. Users may add theirs.
ALL_MASK_ATTENTION_FUNCTIONS: dict[str | None, Callable[..., Any]] = {
    "sdpa": sdpa_mask,
    "eager": eager_mask,
    "flash_attention_2": flash_attention_mask,
    "flash_attention_3": flash_attention_mask,
    "flash_attention_4": flash_attention_mask,
    "flex_attention": flex_attention_mask,
}


def prepare_padding_mask(
    attention_mask: Mask2D | None, kv_length: int, kv_offset: int
) -> Shaped[Array | np.ndarray, "batch padded"] | None:
    """The 2D mask, with zeros added where it ends before key ``kv_offset + kv_length``.

    >>> prepare_padding_mask(jnp.array([[True, True]]), kv_length=3, kv_offset=0)
    Array([[ True,  True, False]], dtype=bool)
    """
    return None if attention_mask is None else _pad_to("attention_mask", attention_mask, kv_length, kv_offset, 0)


def maybe_pad_block_sequence_ids(
    block_sequence_ids: Ids, attention_mask: Mask2D | None, kv_length: int, kv_offset: int
) -> Int[Array | np.ndarray, "batch padded"]:
    """The ids, with ``-1`` added where they end before key ``kv_offset + kv_length``.

    ``attention_mask`` is accepted and ignored, as in Transformers.

    >>> maybe_pad_block_sequence_ids(jnp.array([[0, 0]]), None, kv_length=3, kv_offset=0)
    Array([[ 0,  0, -1]], dtype=int32)
    """
    return _pad_to("block_sequence_ids", block_sequence_ids, kv_length, kv_offset, -1)


def _pad_to(name: str, array: Any, kv_length: int, kv_offset: int, value: int) -> Any:
    checks.array(name, array, "bif", 2)
    end = checks.length("kv_length", kv_length) + checks.integer("kv_offset", kv_offset, minimum=0)
    missing = end - array.shape[1]
    return jnp.pad(array, ((0, 0), (0, missing)), constant_values=value) if missing > 0 else array


@dataclass(frozen=True)
class MaskRequest:
    """The sizes and positions of a mask that is asked for, after they were checked."""

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: Offset
    kv_offset: Scalar
    attention_mask: Any

    @classmethod
    def of(
        cls, batch_size: int, q_length: int, kv_length: int, q_offset: Any, kv_offset: Any, attention_mask: Any
    ) -> "MaskRequest":
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
            position("q_offset", q_offset, ranks=(0, 1)),
            position("kv_offset", kv_offset),
            attention_mask,
        )

    def mask(self, mask_function: MaskMod) -> Mask:
        """The mask function at the positions of these keys, and the padding of these keys."""
        function = MaskFunction(described(mask_function))
        if checks.is_array(self.kv_offset) or self.kv_offset != 0:
            # An array, so that another offset is not another compilation.
            offset: Any = self.kv_offset if checks.is_array(self.kv_offset) else np.asarray(self.kv_offset, np.int32)
            function = add_offsets_to_mask_function(function, 0, offset)
        placed = ForBatch(function.mask, self.batch_size)
        if self.attention_mask is None:
            return placed
        return placed & Padding(
            _keys_at_hand(valid_keys("attention_mask", self.attention_mask), self.kv_length, self.kv_offset)
        )

    def is_causal_without_mask(self, local_size: int | None) -> bool:
        """Whether a causal kernel does the same without a mask. ``False`` where that depends on traced values."""
        if any(map(checks.is_traced, (self.attention_mask, self.q_offset, self.kv_offset))):
            return False
        if local_size is not None and self.kv_length >= local_size:
            return False
        # A kernel aligns a single query with the last key. As many queries as keys can be aligned in one way only.
        aligned = self.q_length == 1 or self.kv_length == self.q_length
        with jax.ensure_compile_time_eval():
            first = bool(np.all(self.q_offset == 0))
            if self.attention_mask is None:
                return aligned or first
            # A cache of fixed size has empty slots after the queries until it is full. They are masked as future keys.
            no_padding, only_future = _padding_of_keys(
                self.attention_mask, self.q_length, self.kv_length, self.kv_offset
            )
            return (aligned and bool(no_padding)) or (first and bool(only_future))

    def masks_nothing(self, local_size: int | None) -> bool:
        """Whether a bidirectional mask masks nothing. ``False`` where that depends on traced values."""
        if checks.is_traced(self.kv_offset) or (local_size is not None and self.kv_length >= local_size):
            return False
        if self.attention_mask is None:
            return True
        reached = self.attention_mask.shape[1] >= self.kv_length + self.kv_offset
        return bool(reached) and checks.known(self.attention_mask)


def _keys_at_hand(valid: Any, kv_length: int, kv_offset: Scalar) -> Any:
    """The columns of the keys that are read. Columns that the mask does not have are padding."""
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
def _padding_of_keys(
    attention_mask: Mask2D, q_length: int, kv_length: int, kv_offset: Scalar
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether no key is padding; and whether exactly the keys after the first ``q_length`` are padding."""
    valid = _columns(attention_mask != 0, kv_length, kv_offset)
    return valid.all(), valid[:, :q_length].all() & ~valid[:, q_length:].any()
