"""One call for attention, which chooses the implementation."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float

from jaxmask.kernels import blocked, fused, xla
from jaxmask.kernels.call import Bias, Call, checked_call
from jaxmask.mask import Mask
from jaxmask.positions import KeyPositions, Offset, QueryPositions

Implementation = Literal["cudnn", "tokamax", "splash", "xla", "blocked"]

RUN: dict[str, Callable[[Call], Any]] = {
    "cudnn": fused.cudnn,
    "tokamax": fused.tokamax,
    "splash": fused.splash,
    "xla": xla.attention,
    "blocked": blocked.attend,
}
LACKS: dict[str, Callable[[Call], list[str]]] = {
    "cudnn": fused.cudnn_lacks,
    "tokamax": fused.tokamax_lacks,
    "splash": fused.splash_lacks,
}
# Which kernels to try on a platform, the best first.
FUSED = {"gpu": ("cudnn", "tokamax"), "tpu": ("splash", "tokamax")}
# Up to so many queries and keys, there is nothing to gain by cutting the scores into tiles.
_SMALL = 128


def attention(
    query: Float[Array | np.ndarray, "batch q heads dim"],
    key: Float[Array | np.ndarray, "batch kv kv_heads dim"],
    value: Float[Array | np.ndarray, "batch kv kv_heads dim_v"],
    mask: Mask | None = None,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    offset: Offset | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q heads dim_v"]:
    """Scaled dot-product attention, of every query to the keys that the mask lets it attend to.

    ``softmax(cap(scale * query @ key) + bias) @ value``, computed in at least float32. A query that may attend to
    nothing gives zeros, and zero gradients. Differentiable in query, key, value and bias, once and in reverse mode.

    Args:
        query: ``[batch, q, heads, dim]``, in float16, bfloat16, float32 or float64.
        key: ``[batch, kv, kv_heads, dim]``, where ``kv_heads`` divides ``heads``: grouped-query attention, where
            consecutive queries share a head of keys; multi-query attention where it is 1.
        value: ``[batch, kv, kv_heads, dim_v]``.
        mask: which keys a query attends to; ``None`` for all.
        bias: added to the scores: an array that broadcasts to ``[batch, heads, q, kv]``, or a function
            ``bias(b, h, q, kv)`` of index arrays, as :meth:`Mask.allows` gets them, which returns such an array: ALiBi
            needs none of ``[q, kv]``. The function may close over arrays, and they get gradients; outside of a ``jit``
            it then compiles at each call, unless it is ``jax.tree_util.Partial(function, *arrays)``.
        scale: of the scores, a Python float; ``None`` for ``dim ** -0.5``.
        offset: position of the first query, as in :meth:`Mask.dense`. Another value never recompiles.
        query_positions: the position of each query, as in :meth:`Mask.dense`, in place of ``offset``.
        key_positions: the position of each key, as in :meth:`Mask.dense`: for a cache that is a ring buffer.
        logits_soft_cap: ``cap(x) = logits_soft_cap * tanh(x / logits_soft_cap)``, as of Gemma 2; a Python float.
        implementation: ``None`` chooses: a fused kernel of the platform that takes all of the arguments (cuDNN on GPU,
            splash on TPU, tokamax on both if installed), else ``"xla"`` where there are few queries and keys, else
            ``"blocked"``. A name forces one.

    Returns:
        ``[batch, q, heads, dim_v]``, in the dtype of the values.

    Raises:
        ValueError: shapes do not fit each other or the mask; an offset is missing; the scale is not finite; the
            implementation that is forced cannot take the arguments.
        TypeError: an argument has the wrong type or dtype.

    Source: ``jax.nn.dot_product_attention``, whose layout and names these are; the order of cap, bias and mask is that
    of ``modeling_gemma2.eager_attention_forward`` in Transformers.

    >>> import jax.numpy as jnp
    >>> import jaxmask
    >>> x = jnp.ones((1, 1024, 4, 64))
    >>> jaxmask.attention(x, x, x, jaxmask.SlidingWindow(128)).shape
    (1, 1024, 4, 64)
    """
    call = checked_call(query, key, value, mask, bias, scale, offset, query_positions, key_positions, logits_soft_cap)
    return RUN[choose(call, implementation)[0]](call)


def choose(call: Call, implementation: str | None) -> tuple[str, str]:
    """The implementation, and why."""
    if implementation is not None:
        if implementation not in RUN:
            names = ", ".join(map(repr, RUN))
            raise ValueError(f"implementation must be one of {names}, or None to choose, got {implementation!r}")
        lacks = LACKS[implementation](call) if implementation in LACKS else []
        if lacks:
            raise ValueError(
                f"implementation={implementation!r} cannot do this: {'; '.join(lacks)}; leave implementation out, and "
                "one is chosen that can"
            )
        return implementation, "it was asked for"
    for name in FUSED.get(call.platform, ()):
        if not LACKS[name](call):
            return name, f"it is a fused kernel of the {call.platform.upper()}, and takes all of the arguments"
    query_length, key_length = call.query.shape[1], call.key.shape[1]
    if max(query_length, key_length) <= _SMALL:
        return "xla", f"at most {_SMALL} queries and keys are too few to gain by tiles"
    return "blocked", f"more than {_SMALL} queries or keys: it skips empty tiles, and writes no scores out"
