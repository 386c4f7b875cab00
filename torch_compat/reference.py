"""What the operations mean that Transformers 5.24 no longer has, in PyTorch.

This is an oracle, written from the description and not from Transformers' code. Names and signatures are those of
``transformers.modeling_attn_mask_utils``, so that the same call runs on either. The differences are: ``dtype`` alone
decides about float64, where Transformers also needs the global default dtype; a 4D mask may be bool; and shapes that do
not fit are a ``ValueError``, where PyTorch raises a ``RuntimeError`` deep inside.
"""

# pyright: reportUnusedFunction=false, reportPrivateUsage=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class AttentionMaskConverter:
    """4D additive masks from 2D ones, or from lengths."""

    is_causal: bool
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(f"sliding_window must be positive, got {self.sliding_window}")

    def to_causal_4d(
        self, batch_size: int, query_length: int, key_value_length: int, dtype: torch.dtype, device: object = "cpu"
    ) -> Tensor | None:
        """``[batch, 1, q, kv]`` with the last query at the last key. ``None`` for one query without a window."""
        if not self.is_causal:
            raise ValueError("to_causal_4d is for causal converters")
        if query_length == 1 and self.sliding_window is None:
            return None
        past_key_values_length = key_value_length - query_length
        return self._make_causal_mask(
            (batch_size, query_length), dtype, device, past_key_values_length, self.sliding_window
        )

    def to_4d(
        self, attention_mask_2d: Tensor, query_length: int, dtype: torch.dtype, key_value_length: int | None = None
    ) -> Tensor:
        """``[batch, 1, q, kv]``: the minimum where the 2D mask masks, and for later keys if causal."""
        if self.sliding_window is not None and not self.is_causal:
            raise NotImplementedError("a window without causality")
        allowed = _is_one(attention_mask_2d, dtype)[:, None, None, :].expand(-1, -1, query_length, -1)
        if self.is_causal and (query_length > 1 or self.sliding_window is not None):
            if key_value_length is None:
                raise ValueError("a causal converter needs key_value_length")
            if key_value_length != attention_mask_2d.shape[-1]:
                raise ValueError("key_value_length is not that of the mask")
            allowed = allowed & _causal(query_length, key_value_length - query_length, self.sliding_window)
        return _bias(allowed, dtype)

    @staticmethod
    def _make_causal_mask(
        input_ids_shape: Sequence[int],
        dtype: torch.dtype,
        device: object,
        past_key_values_length: int = 0,
        sliding_window: int | None = None,
    ) -> Tensor:
        """The causal mask of new tokens after past ones. A window lets ``sliding_window + 1`` keys through."""
        batch_size, query_length = input_ids_shape
        allowed = _causal(query_length, past_key_values_length, sliding_window)
        return _bias(allowed, dtype).expand(batch_size, 1, -1, -1)

    @staticmethod
    def _expand_mask(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
        """``[batch, kv]`` to ``[batch, 1, tgt_len, kv]``: every element that is not one becomes the minimum."""
        tgt_len = mask.shape[-1] if tgt_len is None else tgt_len
        return _bias(_is_one(mask, dtype)[:, None, None, :].expand(-1, -1, tgt_len, -1), dtype)

    @staticmethod
    def _unmask_unattended(expanded_mask: Tensor, min_dtype: float) -> Tensor:
        """The mask, with rows that are all minimum multiplied by zero, which makes them -0.0."""
        if expanded_mask.dtype == torch.bool:
            raise ValueError("a bool mask cannot be multiplied")
        attended = (expanded_mask != min_dtype).any(dim=-1, keepdim=True)
        return expanded_mask * attended

    @staticmethod
    def _ignore_causal_mask_sdpa(
        attention_mask: Tensor | None,
        inputs_embeds: Tensor,
        past_key_values_length: int,
        sliding_window: int | None = None,
        is_training: bool = False,
    ) -> bool:
        """Whether ``is_causal`` of scaled-dot-product attention means the same as the mask."""
        query_length = inputs_embeds.shape[1]
        key_value_length = query_length + past_key_values_length
        if sliding_window is not None and key_value_length >= sliding_window:
            return False
        if query_length > 1 and past_key_values_length > 0:
            return False
        tracing = _is_tracing(inputs_embeds)
        if attention_mask is None:
            return is_training or not tracing
        return attention_mask.dim() == 2 and not tracing and bool((attention_mask == 1).all())


def _prepare_4d_causal_attention_mask(
    attention_mask: Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> Tensor | None:
    """The causal mask of a model's inputs. A 4D mask is complete by itself."""
    batch_size, query_length = input_shape
    key_value_length = query_length + past_key_values_length
    converter = AttentionMaskConverter(True, sliding_window)
    if attention_mask is None:
        return converter.to_causal_4d(batch_size, query_length, key_value_length, inputs_embeds.dtype)
    if attention_mask.dim() == 2:
        return converter.to_4d(attention_mask, query_length, inputs_embeds.dtype, key_value_length)
    if attention_mask.shape != (batch_size, 1, query_length, key_value_length):
        raise ValueError("a 4D mask of another shape")
    minimum = torch.finfo(inputs_embeds.dtype).min
    dtype = attention_mask.dtype
    if not dtype.is_floating_point:
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
    if minimum < torch.finfo(dtype).min:
        raise ValueError("the mask's dtype cannot hold the minimum")
    return torch.where(_is_one(attention_mask, dtype), torch.tensor(0, dtype=dtype), torch.tensor(minimum, dtype=dtype))


def _prepare_4d_causal_attention_mask_for_sdpa(
    attention_mask: Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> Tensor | None:
    """The same, but ``None`` where ``is_causal`` suffices. A 4D mask comes back as it is."""
    if AttentionMaskConverter._ignore_causal_mask_sdpa(
        attention_mask, inputs_embeds, past_key_values_length, sliding_window
    ):
        return None
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    return _prepare_4d_causal_attention_mask(
        attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window
    )


def _prepare_4d_attention_mask(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
    """The mask of an encoder, or of cross-attention."""
    return AttentionMaskConverter._expand_mask(mask, dtype, tgt_len)


def _prepare_4d_attention_mask_for_sdpa(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor | None:
    """The same, but ``None`` where nothing is masked."""
    if not _is_tracing(mask) and bool((mask == 1).all()):
        return None
    return AttentionMaskConverter._expand_mask(mask, dtype, tgt_len)


def _create_4d_causal_attention_mask(
    input_shape: Sequence[int],
    dtype: torch.dtype,
    device: object,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> Tensor | None:
    """The causal mask for the shape of an input."""
    batch_size, query_length = input_shape
    converter = AttentionMaskConverter(True, sliding_window)
    return converter.to_causal_4d(batch_size, query_length, query_length + past_key_values_length, dtype, device)


def packed_sequence_compatibility_function(
    mask_function: Callable[..., Tensor], position_ids: Tensor, packed_sequence_mask: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A mask function within each packed sequence, whose positions count from 0: a part of ``masking_utils``."""

    def inner_mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        is_same = packed_sequence_mask[b, q] == packed_sequence_mask[b, kv]
        return is_same & mask_function(b, h, position_ids[b, q], position_ids[b, kv])

    return inner_mask


def _is_tracing(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def _causal(query_length: int, past_key_values_length: int, sliding_window: int | None) -> Tensor:
    if past_key_values_length < 0:
        raise ValueError("more queries than keys")
    kv = torch.arange(past_key_values_length + query_length)
    distance = kv[past_key_values_length:, None] - kv
    return (distance >= 0) if sliding_window is None else (distance >= 0) & (distance <= sliding_window)


def _is_one(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return 1.0 - mask.to(dtype) == 0


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
