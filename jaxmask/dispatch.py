"""One call for attention: it chooses the implementation, and :func:`explain` says which and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmask import checks
from jaxmask.kernels import blocked, fused, xla
from jaxmask.kernels.call import Bias, Call, checked_call
from jaxmask.kernels.key_ranges import strips_of
from jaxmask.mask import Mask
from jaxmask.positions import KeyPositions, Offset, QueryPositions

Implementation = Literal["cudnn", "tokamax", "splash", "xla", "blocked"]

_RUN: dict[str, Callable[[Call], Any]] = {
    "cudnn": fused.cudnn,
    "tokamax": fused.tokamax,
    "splash": fused.splash,
    "xla": xla.attention,
    "blocked": blocked.attend,
}
_LACKS: dict[str, Callable[[Call], list[str]]] = {
    "cudnn": fused.cudnn_lacks,
    "tokamax": fused.tokamax_lacks,
    "splash": fused.splash_lacks,
}
# Which kernels to try on a platform, the best first.
_FUSED = {"gpu": ("cudnn", "tokamax"), "tpu": ("splash", "tokamax")}
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
    return _RUN[_choose(call, implementation)[0]](call)


def _choose(call: Call, implementation: str | None) -> tuple[str, str]:
    """The implementation, and why."""
    if implementation is not None:
        if implementation not in _RUN:
            names = ", ".join(map(repr, _RUN))
            raise ValueError(f"implementation must be one of {names}, or None to choose, got {implementation!r}")
        lacks = _LACKS[implementation](call) if implementation in _LACKS else []
        if lacks:
            raise ValueError(
                f"implementation={implementation!r} cannot do this: {'; '.join(lacks)}; leave implementation out, and "
                "one is chosen that can"
            )
        return implementation, "it was asked for"
    for name in _FUSED.get(call.platform, ()):
        if not _LACKS[name](call):
            return name, f"it is a fused kernel of the {call.platform.upper()}, and takes all of the arguments"
    query_length, key_length = call.query.shape[1], call.key.shape[1]
    if max(query_length, key_length) <= _SMALL:
        return "xla", f"at most {_SMALL} queries and keys are too few to gain by tiles"
    return "blocked", f"more than {_SMALL} queries or keys: it skips empty tiles, and writes no scores out"


@dataclass(frozen=True, repr=False)
class Explanation:
    """Which implementation :func:`attention` uses, and why. ``print`` it.

    Args:
        implementation: its name.
        reason: why, in words.
        lacks: for each other implementation, what it lacks to do the same.
        sparsity: the fraction of tiles of 128 queries and keys that are EMPTY; ``None`` where the mask is traced.
        flops: of the two matrix products, in the strips of keys that ``"blocked"`` reads, or of all scores where it is
            ``"xla"``; ``None`` if unknown.
        dense_flops: of the two matrix products with all scores.
        bytes: read and written: query and output once, and for each tile of queries the keys and values of its strips;
            with all scores besides, written and read, where it is ``"xla"``.
        dense_bytes: the same with all scores written out.
    """

    implementation: str
    reason: str
    lacks: dict[str, list[str]]
    sparsity: float | None
    flops: int | None
    dense_flops: int
    bytes: int | None
    dense_bytes: int

    def __repr__(self) -> str:
        lines = [f"{self.implementation}: {self.reason}"]
        lines += [f"  not {name}: {'; '.join(lacks)}" for name, lacks in self.lacks.items() if lacks]
        if self.sparsity is None:
            lines.append("  how many tiles are empty is known only when the program runs, for the mask is traced")
        else:
            lines.append(f"  {self.sparsity:.1%} of the tiles are empty")
        if self.flops is not None and self.bytes is not None:
            lines += [
                f"  {self.flops:,} FLOPs, {self.flops / self.dense_flops:.1%} of those with all scores",
                f"  {self.bytes:,} bytes, {self.bytes / self.dense_bytes:.1%} of those with all scores",
            ]
        return "\n".join(lines)


def explain(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None = None,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    offset: Offset | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> Explanation:
    """Which implementation :func:`attention` uses for the same arguments, why, and what it costs. Nothing is computed.

    Args:
        query, key, value: arrays, or their shapes as ``jax.ShapeDtypeStruct``.
        mask, bias, scale, offset, query_positions, key_positions, logits_soft_cap, implementation: as in
            :func:`attention`.

    Returns:
        What to print.

    Raises:
        ValueError, TypeError: as :func:`attention`.

    >>> import jax.numpy as jnp
    >>> import jaxmask
    >>> x = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)
    >>> print(jaxmask.explain(x, x, x, jaxmask.SlidingWindow(512), implementation="blocked"))
    blocked: it was asked for
      not cudnn: it is made for GPU; it takes float16 and bfloat16, not float32
      not tokamax: it is made for GPU and TPU
      not splash: it is made for TPU
      not xla: it writes out all scores
      92.4% of the tiles are empty
      12,884,901,888 FLOPs, 9.4% of those with all scores
      134,217,728 bytes, 3.1% of those with all scores
    """
    call = checked_call(query, key, value, mask, bias, scale, offset, query_positions, key_positions, logits_soft_cap)
    chosen, reason = _choose(call, implementation)
    lacks = {name: _unfit(name, call) for name in _LACKS if name != chosen}
    slow = {"xla": "it writes out all scores", "blocked": "there are too few scores to cut into tiles"}
    lacks |= {name: [why] for name, why in slow.items() if chosen in slow and name != chosen}
    (batch, query_length, heads, dim), (_, key_length, kv_heads, dim_v) = call.query.shape, call.value.shape
    itemsize = call.query.dtype.itemsize
    ends = batch * query_length * heads * (dim + dim_v) * itemsize
    dense_pairs = batch * heads * query_length * key_length
    dense_bytes = ends + batch * key_length * kv_heads * (dim + dim_v) * itemsize + 2 * 4 * dense_pairs
    sparsity = pairs = moved = None
    if not any(map(checks.is_traced, jax.tree.leaves((call.mask, call.positions)))):
        sparsity = float(call.tiles((128, 128)).sparsity)
        strips, queries, keys = strips_of(call)
        each = batch * heads // (strips.count.shape[0] * strips.count.shape[1])
        read = each * keys * int(strips.count.sum())
        pairs = read * queries
        moved = ends + read * (dim + dim_v) * itemsize // (heads // kv_heads)
    if chosen == "xla":
        pairs, moved = dense_pairs, dense_bytes
    each_pair = 2 * (dim + dim_v)
    flops = None if pairs is None else each_pair * pairs
    return Explanation(chosen, reason, lacks, sparsity, flops, each_pair * dense_pairs, moved, dense_bytes)


def _unfit(name: str, call: Call) -> list[str]:
    made_for = [platform.upper() for platform, names in _FUSED.items() if name in names]
    elsewhere = [] if call.platform.upper() in made_for else [f"it is made for {' and '.join(made_for)}"]
    return elsewhere + [lack for lack in _LACKS[name](call) if not (elsewhere and lack.startswith("it needs"))]
