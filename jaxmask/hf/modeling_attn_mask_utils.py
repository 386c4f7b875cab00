"""The names, signatures, positional order and defaults of ``transformers.modeling_attn_mask_utils``, on JAX arrays.

Ported code changes one import::

    from jaxmask.hf.modeling_attn_mask_utils import AttentionMaskConverter, _prepare_4d_causal_attention_mask

Transformers has had no such module since 5.24. ``device`` is accepted and ignored: a JAX array lives where the program
that makes it runs. Each function is documented at the function in ``jaxmask.hf.converter`` that it calls.
"""

# The names of Transformers begin with underscores.
# pyright: reportUnusedFunction=false

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, DTypeLike, Float, Integer, Shaped

from jaxmask import bias
from jaxmask.hf import converter
from jaxmask.hf.converter import Bias4D, Mask2D, Mask4D


@dataclass(frozen=True)
class AttentionMaskConverter:
    """:class:`jaxmask.AttentionMaskConverter` under the original's signatures.

    >>> import jax.numpy as jnp
    >>> AttentionMaskConverter(True).to_4d(jnp.array([[0, 1]]), 2, jnp.float16, key_value_length=2)
    Array([[[[-6.55e+04, -6.55e+04],
             [-6.55e+04,  0.00e+00]]]], dtype=float16)
    """

    is_causal: bool
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sliding_window", self._converter().sliding_window)

    def _converter(self) -> converter.AttentionMaskConverter:
        return converter.AttentionMaskConverter(self.is_causal, self.sliding_window)

    def to_causal_4d(
        self, batch_size: int, query_length: int, key_value_length: int, dtype: DTypeLike, device: object = "cpu"
    ) -> Bias4D | None:
        """See :meth:`jaxmask.AttentionMaskConverter.to_causal_4d`."""
        return self._converter().to_causal_4d(batch_size, query_length, key_value_length, dtype)

    def to_4d(
        self, attention_mask_2d: Mask2D, query_length: int, dtype: DTypeLike, key_value_length: int | None = None
    ) -> Bias4D:
        """See :meth:`jaxmask.AttentionMaskConverter.to_4d`."""
        return self._converter().to_4d(attention_mask_2d, query_length, key_value_length, dtype)

    @staticmethod
    def _make_causal_mask(
        input_ids_shape: Sequence[int],
        dtype: DTypeLike,
        device: object,
        past_key_values_length: int = 0,
        sliding_window: int | None = None,
    ) -> Bias4D:
        """See :func:`jaxmask.make_causal_mask`."""
        return converter.make_causal_mask(input_ids_shape, past_key_values_length, sliding_window, dtype=dtype)

    @staticmethod
    def _expand_mask(mask: Mask2D, dtype: DTypeLike, tgt_len: int | None = None) -> Bias4D:
        """See :func:`jaxmask.expand_mask`."""
        return converter.expand_mask(mask, tgt_len, dtype=dtype)

    @staticmethod
    def _unmask_unattended(
        expanded_mask: Float[Array | np.ndarray, "..."] | Integer[Array | np.ndarray, "..."], min_dtype: float
    ) -> Float[Array, "..."] | Integer[Array, "..."]:
        """See :func:`jaxmask.unmask_unattended`."""
        return bias.unmask_unattended(expanded_mask, min_dtype)

    @staticmethod
    def _ignore_causal_mask_sdpa(
        attention_mask: Mask2D | Mask4D | None,
        inputs_embeds: Shaped[Array | np.ndarray, "batch q ..."],
        past_key_values_length: int,
        sliding_window: int | None = None,
        is_training: bool = False,
    ) -> bool:
        """See :func:`jaxmask.ignore_causal_mask_sdpa`."""
        return converter.ignore_causal_mask_sdpa(
            attention_mask, inputs_embeds, past_key_values_length, sliding_window, is_training
        )


def _prepare_4d_causal_attention_mask(
    attention_mask: Mask2D | Mask4D | None,
    input_shape: Sequence[int],
    inputs_embeds: Float[Array | np.ndarray, "batch q ..."],
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> Bias4D | None:
    """See :func:`jaxmask.prepare_4d_causal_attention_mask`."""
    return converter.prepare_4d_causal_attention_mask(
        attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window
    )


def _prepare_4d_causal_attention_mask_for_sdpa(
    attention_mask: Mask2D | Mask4D | None,
    input_shape: Sequence[int],
    inputs_embeds: Float[Array | np.ndarray, "batch q ..."],
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> Shaped[Array, "batch heads q kv"] | None:
    """See :func:`jaxmask.prepare_4d_causal_attention_mask_for_sdpa`."""
    return converter.prepare_4d_causal_attention_mask_for_sdpa(
        attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window
    )


def _prepare_4d_attention_mask(mask: Mask2D, dtype: DTypeLike, tgt_len: int | None = None) -> Bias4D:
    """See :func:`jaxmask.prepare_4d_attention_mask`."""
    return converter.prepare_4d_attention_mask(mask, tgt_len, dtype=dtype)


def _prepare_4d_attention_mask_for_sdpa(mask: Mask2D, dtype: DTypeLike, tgt_len: int | None = None) -> Bias4D | None:
    """See :func:`jaxmask.prepare_4d_attention_mask_for_sdpa`."""
    return converter.prepare_4d_attention_mask_for_sdpa(mask, tgt_len, dtype=dtype)


def _create_4d_causal_attention_mask(
    input_shape: Sequence[int],
    dtype: DTypeLike,
    device: object,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> Bias4D | None:
    """See :func:`jaxmask.create_4d_causal_attention_mask`."""
    return converter.create_4d_causal_attention_mask(input_shape, past_key_values_length, sliding_window, dtype=dtype)
