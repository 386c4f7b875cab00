"""Transformers' ``AttentionMaskConverter`` and the functions beside it, which read a mask.

Results are those of ``transformers.modeling_attn_mask_utils`` up to Transformers 5.23, bit for bit. Names have no
underscore here, and ``dtype`` is a keyword. :mod:`jaxmask.hf.modeling_attn_mask_utils` has the original signatures.

Masks are 0/1 arrays of bools, integers or floats, JAX or NumPy; lengths and dtypes are static. A past length that is an
array is traced: it shifts positions only, as with a key cache of fixed size, and the key length must then be given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Shaped

from jaxmask import bias, checks
from jaxmask.mask import Mask, Offset
from jaxmask.masks import Causal, Padding, SlidingWindow

# A 0/1 mask: bool, integer or float; JAX or NumPy.
Mask2D = Shaped[Array | np.ndarray, "batch kv"]
Mask4D = Shaped[Array | np.ndarray, "batch 1 q kv"]
Bias4D = Float[Array, "batch 1 q kv"]
# Static as a Python int, which also sets the key length; traced as an array.
PastLength = int | Int[Array, ""] | Int[Array, "batch"]


@dataclass(frozen=True)
class AttentionMaskConverter:
    """Makes 4D additive masks from 2D ones, or from nothing but lengths.

    Hashable, and so usable as a static argument of ``jax.jit``. Source: ``AttentionMaskConverter`` in Transformers'
    ``modeling_attn_mask_utils``.

    Args:
        is_causal: whether a query attends only to keys up to its position.
        sliding_window: number of keys **before** its own that a query attends to, which makes ``sliding_window + 1``
            keys in all; ``None`` for no window. (:class:`jaxmask.SlidingWindow` and Transformers' newer
            ``masking_utils`` count the own key in.)

    Raises:
        ValueError: ``sliding_window`` is not positive.

    >>> AttentionMaskConverter(is_causal=True).to_4d(jnp.array([[0, 1, 1]]), 2, 3, dtype=jnp.float16)
    Array([[[[-6.55e+04,  0.00e+00, -6.55e+04],
             [-6.55e+04,  0.00e+00,  0.00e+00]]]], dtype=float16)
    """

    is_causal: bool
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.sliding_window is not None:
            # As a Python int, for an array has no hash.
            window = checks.integer("sliding_window", self.sliding_window, minimum=1)
            object.__setattr__(self, "sliding_window", window)

    def to_causal_4d(
        self,
        batch_size: int,
        query_length: int,
        key_value_length: int,
        dtype: DTypeLike = jnp.float32,
        *,
        past_key_values_length: PastLength | None = None,
    ) -> Bias4D | None:
        """The causal bias, aligned so that the last query is at the last key; ``None`` for one query without window.

        Args:
            batch_size, query_length, key_value_length: static.
            dtype: floating, static.
            past_key_values_length: position of the first query; ``key_value_length - query_length`` unless given.

        Returns:
            ``dtype`` ``[batch, 1, q, kv]``.

        Raises:
            ValueError: the converter is not causal; a length is not positive; more queries than keys.

        >>> AttentionMaskConverter(True).to_causal_4d(1, 2, 3, jnp.float16)
        Array([[[[ 0.00e+00,  0.00e+00, -6.55e+04],
                 [ 0.00e+00,  0.00e+00,  0.00e+00]]]], dtype=float16)
        """
        if not self.is_causal:
            raise ValueError(f"to_causal_4d needs a converter with is_causal=True, got {self}")
        dtype = checks.float_dtype(dtype)
        batch_size = checks.length("batch_size", batch_size)
        offset = _checked_offset(query_length, key_value_length, past_key_values_length)
        if not self._restricts(query_length):
            return None
        return _bias_4d(_causal(self.sliding_window), batch_size, query_length, key_value_length, dtype, offset)

    def to_4d(
        self,
        attention_mask_2d: Mask2D,
        query_length: int,
        key_value_length: int | None = None,
        dtype: DTypeLike = jnp.float32,
        *,
        past_key_values_length: PastLength | None = None,
    ) -> Bias4D:
        """The bias of a 2D mask, causal where the converter is.

        Args:
            attention_mask_2d: 0/1 ``[batch, kv]``; what is not a one in ``dtype`` is masked.
            query_length: static; may be shorter than the keys.
            key_value_length: static. It is needed where the converter is causal, unless there is one query and no
                window, and ignored otherwise.
            dtype: floating, static.
            past_key_values_length: position of the first query; ``key_value_length - query_length`` unless given.

        Returns:
            ``dtype`` ``[batch, 1, q, kv]``. Rows with nothing to attend to hold the minimum everywhere: see
            :func:`unmask_unattended`.

        Raises:
            ValueError: the key length is needed and missing, or is not that of the mask; a length is not positive;
                there are more queries than keys, if causal; the mask has another rank.
            NotImplementedError: the converter has a window and is not causal.
            TypeError: the mask is not a JAX or NumPy array.

        >>> AttentionMaskConverter(is_causal=False).to_4d(jnp.array([[0, 1]]), 1, dtype=jnp.float16)
        Array([[[[-6.55e+04,  0.00e+00]]]], dtype=float16)
        """
        dtype = checks.float_dtype(dtype)
        checks.array("attention_mask_2d", attention_mask_2d, "bif", 2)
        query_length = checks.length("query_length", query_length)
        batch_size, mask_length = attention_mask_2d.shape
        if self.sliding_window is not None and not self.is_causal:
            raise NotImplementedError(f"a sliding window is implemented for causal masks only, got {self}")
        causal = self.is_causal and self._restricts(query_length)
        if causal and key_value_length is None:
            raise ValueError(
                f"key_value_length is missing: a causal converter aligns {query_length} queries with the keys "
                f"(the mask has {mask_length})"
            )
        if causal and key_value_length != mask_length:
            raise ValueError(
                f"key_value_length is {checks.describe(key_value_length)}, but attention_mask_2d is "
                f"{checks.describe(attention_mask_2d)}: it must cover every key, the past ones included"
            )
        padding = Padding(bias.is_one(attention_mask_2d, dtype))
        if not causal:
            return _bias_4d(padding, batch_size, query_length, mask_length, dtype, 0)
        offset = _checked_offset(query_length, mask_length, past_key_values_length)
        return _bias_4d(_causal(self.sliding_window) & padding, batch_size, query_length, mask_length, dtype, offset)

    def _restricts(self, query_length: int) -> bool:
        """Whether causality masks anything. A single query is at the last position and sees every key in its window."""
        return query_length > 1 or self.sliding_window is not None


def make_causal_mask(
    input_ids_shape: Sequence[int],
    past_key_values_length: PastLength = 0,
    sliding_window: int | None = None,
    *,
    key_value_length: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Bias4D:
    """The causal bias of ``input_ids_shape``, ``(batch, q)``, after ``past_key_values_length`` keys visible to all.

    Args:
        input_ids_shape: ``(batch, query_length)``, static.
        past_key_values_length: number of keys before the first query.
        sliding_window: keys before its own that a query attends to (``sliding_window + 1`` in all), past ones included.
        key_value_length: static; ``past_key_values_length + query_length`` unless given; needed where that is traced.
        dtype: floating, static.

    Returns:
        ``dtype`` ``[batch, 1, q, kv]``. Source: ``AttentionMaskConverter._make_causal_mask``.

    Raises:
        ValueError: a length or the window is not positive, or the key length is missing.

    >>> make_causal_mask((1, 2), past_key_values_length=1, dtype=jnp.float16)
    Array([[[[ 0.00e+00,  0.00e+00, -6.55e+04],
             [ 0.00e+00,  0.00e+00,  0.00e+00]]]], dtype=float16)
    """
    batch_size, query_length = _checked_input_shape("input_ids_shape", input_ids_shape)
    dtype = checks.float_dtype(dtype)
    key_value_length = _key_value_length(query_length, past_key_values_length, key_value_length)
    offset = _checked_offset(query_length, key_value_length, past_key_values_length)
    if sliding_window is not None:
        checks.integer("sliding_window", sliding_window, minimum=1)
    return _bias_4d(_causal(sliding_window), batch_size, query_length, key_value_length, dtype, offset)


def expand_mask(mask: Mask2D, tgt_len: int | None = None, *, dtype: DTypeLike = jnp.float32) -> Bias4D:
    """A 2D mask as a bias for ``tgt_len`` queries: ones become 0, all other elements the minimum.

    Args:
        mask: 0/1 ``[batch, kv]``.
        tgt_len: number of queries, static; that of the keys unless given.
        dtype: floating, static.

    Returns:
        ``dtype`` ``[batch, 1, tgt_len, kv]``. Source: ``AttentionMaskConverter._expand_mask``.

    Raises:
        ValueError: a mask of another rank, or ``tgt_len`` is not positive.
        TypeError: no JAX or NumPy array.

    >>> expand_mask(jnp.array([[1, 0]]), tgt_len=1, dtype=jnp.float16)
    Array([[[[ 0.00e+00, -6.55e+04]]]], dtype=float16)
    """
    dtype = checks.float_dtype(dtype)
    batch_size, key_length = checks.array("mask", mask, "bif", 2).shape
    tgt_len = key_length if tgt_len is None else checks.length("tgt_len", tgt_len)
    return _bias_4d(Padding(bias.is_one(mask, dtype)), batch_size, tgt_len, key_length, dtype, 0)


def ignore_causal_mask_sdpa(
    attention_mask: Mask2D | Mask4D | None,
    inputs_embeds: Shaped[Array | np.ndarray, "batch q ..."],
    past_key_values_length: PastLength,
    sliding_window: int | None = None,
    is_training: bool = False,
) -> bool:
    """Whether a fused kernel's causal flag means the same as the mask, so that no mask need be made.

    The answer is a Python bool. Where an argument is traced, it is the original's answer while tracing: the contents of
    the mask are not looked at, and a mask is made. The same holds where the past length is an array.

    Args:
        attention_mask: 0/1 ``[batch, kv]`` or ``[batch, 1, q, kv]``, or ``None``.
        inputs_embeds: read for its shape, ``[batch, q, ...]``.
        past_key_values_length: number of keys before the first query.
        sliding_window: the window of the model's configuration.
        is_training: whether the model is in training, when a program is not exported for other lengths.

    Returns:
        ``True`` where the mask can be left out. Source: ``AttentionMaskConverter._ignore_causal_mask_sdpa``.

    Raises:
        ValueError: ``attention_mask`` is of another rank.
        TypeError: no JAX or NumPy array.

    >>> ignore_causal_mask_sdpa(jnp.ones((1, 3)), jnp.zeros((1, 3, 8)), past_key_values_length=0)
    True
    """
    if attention_mask is not None:
        checks.array("attention_mask", attention_mask, "bif", 2, 4)
    checks.array("inputs_embeds", inputs_embeds, "bif", 2, 3, 4)
    if checks.is_array(past_key_values_length):
        return False
    query_length = inputs_embeds.shape[1]
    key_value_length = query_length + checks.integer("past_key_values_length", past_key_values_length, minimum=0)
    aligned = query_length == 1 or key_value_length == query_length
    within_window = sliding_window is None or key_value_length < sliding_window
    if not (aligned and within_window):
        return False
    if attention_mask is None:
        return is_training or not checks.is_traced(inputs_embeds)
    if attention_mask.ndim != 2 or checks.is_traced(inputs_embeds):
        return False
    return checks.known(attention_mask, lambda mask: mask == 1)


def create_4d_causal_attention_mask(
    input_shape: Sequence[int],
    past_key_values_length: PastLength = 0,
    sliding_window: int | None = None,
    *,
    key_value_length: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Bias4D | None:
    """The causal bias of ``input_shape``, ``(batch, q)``; ``None`` for one query without window.

    Arguments, result and errors as in :func:`make_causal_mask`. Source: ``_create_4d_causal_attention_mask``.

    >>> create_4d_causal_attention_mask((1, 1), past_key_values_length=4) is None
    True
    """
    batch_size, query_length = _checked_input_shape("input_shape", input_shape)
    return AttentionMaskConverter(True, sliding_window).to_causal_4d(
        batch_size,
        query_length,
        _key_value_length(query_length, past_key_values_length, key_value_length),
        dtype,
        past_key_values_length=past_key_values_length,
    )


def prepare_4d_causal_attention_mask(
    attention_mask: Mask2D | Mask4D | None,
    input_shape: Sequence[int],
    inputs_embeds: Float[Array | np.ndarray, "batch q ..."],
    past_key_values_length: PastLength,
    sliding_window: int | None = None,
    *,
    key_value_length: int | None = None,
) -> Bias4D | None:
    """The causal bias of a model's inputs, in the dtype of ``inputs_embeds``.

    Args:
        attention_mask: 0/1 ``[batch, kv]``; or ``[batch, 1, q, kv]``, which then says everything, causality included;
            or ``None``.
        input_shape: ``(batch, query_length)``, static.
        inputs_embeds: read for its dtype.
        past_key_values_length: number of keys before the first query.
        sliding_window: keys before its own that a query attends to (``sliding_window + 1`` in all).
        key_value_length: static; ``past_key_values_length + query_length`` unless given, and that of the mask where the
            past length is traced.

    Returns:
        ``[batch, 1, q, kv]`` in the dtype of ``inputs_embeds``; from a 4D mask in that of the mask, or float32 where it
        has no float dtype, as PyTorch's promotion has it. ``None`` for one query without window and mask. Source:
        ``_prepare_4d_causal_attention_mask``.

    Raises:
        ValueError: a mask of a wrong shape or rank; a float 4D mask whose dtype cannot hold the minimum of that of
            ``inputs_embeds``; a length or the window is not positive, or the key length is missing.
        TypeError: no JAX or NumPy array.

    >>> prepare_4d_causal_attention_mask(jnp.array([[0, 1]]), (1, 2), jnp.zeros((1, 2, 8), jnp.float16), 0)
    Array([[[[-6.55e+04, -6.55e+04],
             [-6.55e+04,  0.00e+00]]]], dtype=float16)
    """
    batch_size, query_length = _checked_input_shape("input_shape", input_shape)
    dtype = checks.array("inputs_embeds", inputs_embeds, "f").dtype
    if attention_mask is not None:
        checks.array("attention_mask", attention_mask, "bif", 2, 4)
        if checks.is_array(past_key_values_length):
            key_value_length = attention_mask.shape[-1]
    key_value_length = _key_value_length(query_length, past_key_values_length, key_value_length)
    converter = AttentionMaskConverter(True, sliding_window)
    if attention_mask is None:
        return converter.to_causal_4d(
            batch_size, query_length, key_value_length, dtype, past_key_values_length=past_key_values_length
        )
    if attention_mask.ndim == 2:
        if attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask must be for the batch of {batch_size} that input_shape says, got "
                f"{checks.describe(attention_mask)}"
            )
        return converter.to_4d(
            attention_mask, query_length, key_value_length, dtype, past_key_values_length=past_key_values_length
        )
    expected = (batch_size, 1, query_length, key_value_length)
    if attention_mask.shape != expected:
        raise ValueError(f"attention_mask must have shape {expected}, got {attention_mask.shape}")
    return _bias_of_4d(attention_mask, dtype)


def prepare_4d_causal_attention_mask_for_sdpa(
    attention_mask: Mask2D | Mask4D | None,
    input_shape: Sequence[int],
    inputs_embeds: Float[Array | np.ndarray, "batch q ..."],
    past_key_values_length: PastLength,
    sliding_window: int | None = None,
    *,
    key_value_length: int | None = None,
) -> Shaped[Array, "batch heads q kv"] | None:
    """As :func:`prepare_4d_causal_attention_mask`, but ``None`` where a kernel's causal flag suffices.

    A 4D mask is handed back as it came. Rows with nothing to attend to stay the minimum, as in Transformers on a CPU;
    on a CUDA device Transformers goes on to :func:`unmask_unattended`, for the sake of PyTorch's kernels.

    Arguments and errors as there. Source: ``_prepare_4d_causal_attention_mask_for_sdpa``; see also
    :func:`ignore_causal_mask_sdpa`.

    >>> prepare_4d_causal_attention_mask_for_sdpa(jnp.ones((1, 2)), (1, 2), jnp.zeros((1, 2, 8)), 0) is None
    True
    """
    if ignore_causal_mask_sdpa(attention_mask, inputs_embeds, past_key_values_length, sliding_window):
        return None
    if attention_mask is not None and attention_mask.ndim == 4:
        return jnp.asarray(attention_mask)
    return prepare_4d_causal_attention_mask(
        attention_mask,
        input_shape,
        inputs_embeds,
        past_key_values_length,
        sliding_window,
        key_value_length=key_value_length,
    )


def prepare_4d_attention_mask(mask: Mask2D, tgt_len: int | None = None, *, dtype: DTypeLike = jnp.float32) -> Bias4D:
    """The bias of a 2D mask without causality, as encoders and cross-attention want it: :func:`expand_mask`.

    Source: ``_prepare_4d_attention_mask``.

    >>> prepare_4d_attention_mask(jnp.array([[1, 0]]), tgt_len=1, dtype=jnp.float16)
    Array([[[[ 0.00e+00, -6.55e+04]]]], dtype=float16)
    """
    return expand_mask(mask, tgt_len, dtype=dtype)


def prepare_4d_attention_mask_for_sdpa(
    mask: Mask2D, tgt_len: int | None = None, *, dtype: DTypeLike = jnp.float32
) -> Bias4D | None:
    """As :func:`prepare_4d_attention_mask`, but ``None`` where the mask is not traced and masks nothing.

    Source: ``_prepare_4d_attention_mask_for_sdpa``.

    >>> prepare_4d_attention_mask_for_sdpa(jnp.ones((1, 2))) is None
    True
    """
    checks.array("mask", mask, "bif", 2)
    return None if checks.known(mask, lambda mask: mask == 1) else expand_mask(mask, tgt_len, dtype=dtype)


def _causal(sliding_window: int | None) -> Mask:
    # The original masks keys farther away than the window, and so lets one more key through than SlidingWindow.
    return Causal() if sliding_window is None else SlidingWindow(sliding_window + 1)


# One program: the broadcast over the batch is fused into the write.
@partial(jax.jit, static_argnames=("batch_size", "query_length", "key_length", "dtype"))
def _bias_4d(
    mask: Mask, batch_size: int, query_length: int, key_length: int, dtype: np.dtype[Any], offset: Offset
) -> Bias4D:
    shape = (batch_size, 1, query_length, key_length)
    return jnp.broadcast_to(mask.bias(query_length, key_length, dtype, offset=offset), shape)


def _bias_of_4d(mask: Mask4D, dtype: np.dtype[Any]) -> Bias4D:
    # PyTorch computes `1.0 - mask` in its own promotion of the mask's dtype, whatever dtype the minimum is taken from.
    is_float = jnp.issubdtype(mask.dtype, jnp.floating)
    result = checks.float_dtype(mask.dtype if is_float else checks.at_least_float32(dtype))
    if jnp.finfo(dtype).min < jnp.finfo(result).min:
        raise ValueError(
            f"attention_mask is {checks.describe(mask)}, which cannot hold the minimum of {dtype}, the dtype of "
            "inputs_embeds: pass it as bool, as an integer, or in that dtype"
        )
    return bias.fill(bias.is_one(mask, result), result, float(jnp.finfo(dtype).min))


def _checked_input_shape(name: str, input_shape: Sequence[int]) -> tuple[int, int]:
    if not isinstance(input_shape, Sequence) or len(input_shape) != 2:
        raise ValueError(f"{name} must be (batch, query_length), got {checks.describe(input_shape)}")
    batch_size, query_length = input_shape
    return checks.length(f"{name}[0]", batch_size), checks.length(f"{name}[1]", query_length)


def _key_value_length(query_length: int, past_key_values_length: PastLength, key_value_length: int | None) -> int:
    if key_value_length is not None:
        return checks.length("key_value_length", key_value_length)
    if checks.is_array(past_key_values_length):
        raise ValueError(
            "key_value_length is missing: past_key_values_length is an array, whose value is not known when shapes are "
            "set; give the size of the key cache"
        )
    return query_length + checks.integer("past_key_values_length", past_key_values_length, minimum=0)


def _checked_offset(query_length: int, key_value_length: int, past_key_values_length: PastLength | None) -> Offset:
    query_length = checks.length("query_length", query_length)
    key_value_length = checks.length("key_value_length", key_value_length)
    if query_length > key_value_length:
        raise ValueError(
            f"query_length must not exceed key_value_length if causal, got {query_length} and {key_value_length}: "
            "the keys are the cached ones and those of the queries"
        )
    if past_key_values_length is None:
        return key_value_length - query_length
    if checks.is_array(past_key_values_length):
        return checks.array("past_key_values_length", past_key_values_length, "i", 0, 1)
    past = checks.integer("past_key_values_length", past_key_values_length, minimum=0)
    if past + query_length > key_value_length:
        raise ValueError(
            f"past_key_values_length + query_length must not exceed key_value_length, got {past} + {query_length} and "
            f"{key_value_length}"
        )
    return past
