"""Attention by our kernels and by PyTorch: outputs and gradients, compared with PyTorch's own in float64.

The oracles are ``scaled_dot_product_attention`` and FlexAttention. The first gets a mask that PyTorch writes out, the
second a ``BlockMask`` of ours. What neither has, sinks and a given dropout, is in the definition, ``eager``. Sums in
another order cannot agree bit for bit, so each dtype has a tolerance. What must be exactly zero has none.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import jaxmask
from jaxmask.kernels import blocked, pallas_gpu
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.pallas_gpu import Block, Blocks
from torch_compat.blocks import to_block_mask
from torch_compat.bridge import to_torch
from torch_compat.verify.attention_cases import DROPOUT_RATE, HEADS, AttentionCall

# Tiles so small that every case has several.
BLOCK = (8, 16)
_TILE = Block(16, 16)
# It computes in float32.
PALLAS = "attention_pallas"
# Its cases are longer, and the kernel chooses its tiles.
LONG = "attention_long"


def _merged(query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
    """Attention to two halves of the keys, merged. Sinks belong to one of them."""
    first = jaxmask.Prefix(key.shape[1] // 2)
    sinks = arguments.pop("sinks")
    attend: Any = partial(jaxmask.attention, query, key, value, implementation="xla", return_residual=True, **arguments)
    return jaxmask.merge_attention([attend(mask & first, sinks=sinks), attend(mask & ~first)])[0]


def _pallas(query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
    """The kernel for GPU, interpreted, which it is wherever there is none."""
    return pallas_gpu.attend(checked_call(query, key, value, mask, **arguments), Blocks(_TILE, _TILE, _TILE))


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "attention_blocked": partial(blocked.attention, block=BLOCK),
    PALLAS: _pallas,
    "attention_xla": partial(jaxmask.attention, implementation="xla"),
    "attention_merged": _merged,
    LONG: partial(jaxmask.attention, implementation="blocked"),
}
OPERATIONS = tuple(IMPLEMENTATIONS)
# In the half precisions PyTorch's own error is added: it computes in float32 inside, while we round the weights, by up
# to two ulps of 1.
TOLERANCES = {
    "float32": 2e-6,
    "float16": float(ml_dtypes.finfo("float16").eps) * 2,
    "bfloat16": float(ml_dtypes.finfo("bfloat16").eps) * 2,
    "float64": 1e-14,
}
_HALF = ("float16", "bfloat16")
NAMES = ("output", *(f"gradient of {name}" for name in ("query", "key", "value", "bias", "sinks")))


@partial(jax.jit, static_argnames=("attend", "scale", "logits_soft_cap"))
def _output_and_gradients(
    attend: Callable[..., Any], inputs: Any, cotangent: Any, mask: Any, offset: Any, key: Any, **numbers: Any
) -> Any:
    dropout: dict[str, Any] = {} if key is None else {"dropout_rate": DROPOUT_RATE, "dropout_rng": key}

    def output(inputs: Any) -> Any:
        arrays = {"bias": None, "sinks": None} | inputs
        return attend(**arrays, mask=mask, offset=offset, **dropout, **numbers)

    out, pull = jax.vjp(output, inputs)
    return {"output": out, **pull(cotangent)[0]}


def _inputs(case: AttentionCall) -> dict[str, np.ndarray]:
    names = ("query", "key", "value", "bias", "sinks")
    return {name: getattr(case, name) for name in names if getattr(case, name) is not None}


def call_jax(operation: str, case: AttentionCall) -> list[torch.Tensor]:
    """The output and the gradients of query, key, value, bias and sinks, of those that there are, by one of ours."""
    results = _output_and_gradients(
        IMPLEMENTATIONS[operation],
        {name: jnp.asarray(x) for name, x in _inputs(case).items()},
        jnp.asarray(case.cotangent),
        case.mask,
        case.offset,
        case.dropout_key,
        scale=case.scale,
        logits_soft_cap=case.logits_soft_cap,
    )
    return [to_torch(results[name]) for name in ("output", *_inputs(case))]


def call_torch(oracle: str, case: AttentionCall, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same results by PyTorch, computed in ``dtype``."""

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.float64)).to(dtype)

    inputs = {name: tensor(x).requires_grad_() for name, x in _inputs(case).items()}
    arrays = {name: x.transpose(1, 2) if name in ("query", "key", "value") else x for name, x in inputs.items()}
    out = ORACLES[oracle](case, **arrays).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, tuple(inputs.values()), tensor(case.cotangent))]


def _sdpa(
    case: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    allowed = case.allowed()
    mask = allowed if bias is None else torch.where(allowed, bias, -torch.inf)
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(query, key, value, mask, scale=case.scale, enable_gqa=True)


def _flex_attention(
    case: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What ``flex_attention`` runs when it is not compiled. It refuses gradients on a CPU itself."""
    lengths = query.shape[2], key.shape[2]
    whole = None if bias is None else bias.expand(-1, HEADS, *lengths)
    cap = case.logits_soft_cap

    def score_mod(score: torch.Tensor, *pair: torch.Tensor) -> torch.Tensor:
        b, *others = pair
        capped = score if cap is None else cap * torch.tanh(score / cap)
        return capped if whole is None else capped + whole[(b % whole.shape[0], *others)]

    block_mask = to_block_mask(case.mask.tiles(*lengths, block=BLOCK, offset=case.offset))
    scale = query.shape[3] ** -0.5 if case.scale is None else case.scale
    return math_attention(query, key, value, score_mod, block_mask.as_tuple(), scale, {})[0]


def _eager(
    case: AttentionCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, whose sinks are those of ``modeling_gpt_oss.eager_attention_forward`` in Transformers."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if case.scale is None else case.scale)
    if case.logits_soft_cap is not None:
        scores = case.logits_soft_cap * torch.tanh(scores / case.logits_soft_cap)
    if bias is not None:
        scores = scores + bias
    allowed = case.allowed()
    if sinks is None:
        is_row = allowed.any(3, keepdim=True)
        weights = torch.where(allowed | ~is_row, scores, -torch.inf).softmax(3) * is_row
    else:
        sink = sinks[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((torch.where(allowed, scores, -torch.inf), sink), 3).softmax(3)[..., :-1]
    return (weights * case.dropout()).to(value.dtype) @ value


ORACLES: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": _sdpa,
    "flex_attention": _flex_attention,
    "eager": _eager,
}


@lru_cache(maxsize=1024)
def _expected(oracle: str, case: AttentionCall) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """PyTorch's results in float64, and those in the dtype of the case where its own error counts."""
    exact = call_torch(oracle, case, torch.float64)
    return exact, call_torch(oracle, case, getattr(torch, case.dtype)) if case.dtype in _HALF else exact


def tolerance(dtype: str) -> str:
    """The tolerance in words."""
    return ("PyTorch's own error and " if dtype in _HALF else "") + f"{TOLERANCES[dtype]:.2g}"


def compare(oracle: str, case: AttentionCall, ours: list[torch.Tensor], operation: str | None = None) -> str | None:
    """Where our results are beyond the tolerance, in words, or ``None`` where they are not.

    Errors are differences from PyTorch in float64. That of an output is relative to the largest element of its row.
    That of a gradient is relative to its largest element, or to a tenth of the largest element of all gradients, since
    a gradient may cancel out to rounding alone. In the half precisions PyTorch's own error is added to the tolerance.
    """
    exact, rounded = _expected(oracle, case)
    largest = max(x.abs().max() for x in exact[1:])
    names = [name for name in NAMES if name.removeprefix("gradient of ") in ("output", *_inputs(case))]
    zeros = [*_zeros(case), *(None for _ in names[4:])]
    for name, x, expected, theirs, is_zero in zip(names, ours, exact, rounded, zeros, strict=True):
        if (str(x.dtype), x.shape) != (f"torch.{case.dtype}", expected.shape):
            return f"{name}: ours {x.dtype}{list(x.shape)}, theirs torch.{case.dtype}{list(expected.shape)}"
        if is_zero is not None and x[is_zero].any():
            return f"{name}: not zero where nothing is attended to"
        sizes = expected.abs()
        scale = sizes.amax(-1, keepdim=True) if name == "output" else torch.maximum(sizes.max(), largest / 10)
        # The exponents of base 2 are rounded once more.
        own = TOLERANCES[case.dtype] * (2 if operation == PALLAS and case.dtype == "float32" else 1)
        error, limit = _error(x, expected, scale), _error(theirs, expected, scale) + own
        if not error <= limit:  # NaN is beyond it
            return f"{name}: the relative error is {error:.3g}, and the tolerance {limit:.3g}"
    return None


def _error(x: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    difference = (x.double() - expected).abs()
    return float(torch.where(difference == 0, 0, difference / scale).max())


def _zeros(case: AttentionCall) -> list[torch.Tensor]:
    """Where output and gradients must be zero: at queries ``[batch, q, heads]`` without keys, keys without queries."""
    allowed = case.allowed()
    queries = ~allowed.any(3).transpose(1, 2)
    keys = ~allowed.any(2).unflatten(1, (case.key.shape[2], -1)).any(2).transpose(1, 2)
    return [queries, queries, keys, keys]
