"""One call for attention, which chooses the implementation."""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from jaxmask import checks, spmd
from jaxmask.kernels import blocked, fused, pallas_gpu, xla
from jaxmask.kernels.call import Bias, Call, checked_call, is_empty, known_elsewhere
from jaxmask.mask import Mask
from jaxmask.positions import KeyPositions, Offset, QueryPositions

Implementation = Literal["cudnn", "pallas", "tokamax", "splash", "xla", "blocked"]
Sharding = PartitionSpec | NamedSharding

RUN: dict[str, Callable[[Call], Any]] = {
    "cudnn": fused.cudnn,
    "pallas": pallas_gpu.attend,
    "tokamax": fused.tokamax,
    "splash": fused.splash,
    "xla": xla.attention,
    "blocked": blocked.attend,
}
LACKS: dict[str, Callable[[Call], list[str]]] = {
    "cudnn": fused.cudnn_lacks,
    "pallas": pallas_gpu.lacks,
    "tokamax": fused.tokamax_lacks,
    "splash": fused.splash_lacks,
}
# What is written here, in JAX.
OURS = ("xla", "blocked")
# Which kernels to try on a platform, the best first.
FUSED = {"gpu": ("cudnn", "pallas", "tokamax"), "tpu": ("splash", "tokamax")}
# What XLA divides over devices by itself.
DIVISIBLE = ("cudnn", *OURS)
# Up to so many queries and keys, there is nothing to gain by cutting the scores into tiles.
_SMALL = 128


@overload
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
    positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array | np.ndarray, "heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | UInt32[Array, "words"] | None = None,
    broadcast_dropout: bool = False,
    return_residual: Literal[False] = False,
    sharding: Sharding | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    context_parallel: spmd.Scheme | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q heads dim_v"]: ...
@overload
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
    positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array | np.ndarray, "heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | UInt32[Array, "words"] | None = None,
    broadcast_dropout: bool = False,
    return_residual: Literal[True],
    sharding: Sharding | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    context_parallel: spmd.Scheme | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "batch q heads dim_v"], Float[Array, "batch q heads"]]: ...
@known_elsewhere
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
    positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array | np.ndarray, "heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | UInt32[Array, "words"] | None = None,
    broadcast_dropout: bool = False,
    return_residual: bool = False,
    sharding: Sharding | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    context_parallel: spmd.Scheme | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Scaled dot-product attention, of every query to the keys that the mask lets it attend to.

    ``softmax(cap(scale * query @ key) + bias) @ value``, computed in at least float32, with products of the
    precision that ``jax.default_matmul_precision`` says, by default TF32 on a GPU. A query that may attend to
    nothing gives zeros, and zero gradients; only the mask does that, and a bias of minus infinity, but no other score.
    A key that no query may attend to changes nothing, though it be NaN, nor does its value; where some query may attend
    to it, those that share its tile are NaN, too. Differentiable in query, key, value, bias and sinks; by ``"xla"`` and
    ``"blocked"`` in forward mode and more than once, too, at any length.

    Args:
        query: ``[batch, q, heads, dim]``, in float16, bfloat16, float32 or float64.
        key: ``[batch, kv, kv_heads, dim]``, where ``kv_heads`` divides ``heads``: grouped-query attention, where
            consecutive queries share a head of keys; multi-query attention where it is 1.
        value: ``[batch, kv, kv_heads, dim_v]``.
        mask: which keys a query attends to; ``None`` for all.
        bias: added to the scores: an array that broadcasts to ``[batch, heads, q, kv]``, or a function
            ``bias(b, h, q, kv)`` of index arrays, as :meth:`Mask.allows` gets them, which returns such an array: ALiBi
            needs none of ``[q, kv]``. The function may close over arrays, and they get gradients; outside of a ``jit``
            it then compiles at each call, unless it is ``jax.tree_util.Partial(function, *arrays)``, which arrays on a
            mesh need.
        scale: of the scores, a Python float; ``None`` for ``dim ** -0.5``.
        offset: position of the first query, as in :meth:`Mask.dense`. Another value never recompiles.
        query_positions: the position of each query, as in :meth:`Mask.dense`, in place of ``offset``.
        key_positions: the position of each key, as in :meth:`Mask.dense`: for a cache that is a ring buffer.
        positions: the position of each token, integer ``[length]``, where queries and keys are one sequence in another
            order than that of its positions, such as :func:`balanced_order` finds for devices. It is a permutation,
            which is checked in NumPy, and then known beforehand. Arrays in the mask are in the order of positions, and
            those of keys, too; a bias that is an array is in the order of the tokens.
        logits_soft_cap: ``cap(x) = logits_soft_cap * tanh(x / logits_soft_cap)``, as of Gemma 2; a Python float.
        sinks: ``[heads]``, a logit for each head that takes part in softmax beside those of the keys, and has no value:
            the attention sinks of gpt-oss (``modeling_gpt_oss.eager_attention_forward`` in Transformers).
        dropout_rate: the probability that a weight is dropped, after softmax; a Python float. The others grow by
            ``1 / (1 - dropout_rate)``.
        dropout_rng: a key, as of ``jax.random.key(0)``. The same key drops the same pairs by every implementation: they
            follow from the key and the indices of example, head, query and key in these arrays. In a ``shard_map`` fold
            the index of the shard into the key.
        broadcast_dropout: whether all examples and heads drop the same pairs, as ``flax`` does by default.
        return_residual: whether to return the log-sum-exp too, by which :func:`merge_attention` joins partial results.
        sharding: how the query is divided over the devices of a mesh, where the axes of the mesh are automatic: such as
            ``P("data", "seq", "model", None)`` for its examples, tokens and heads, on the mesh of ``jax.set_mesh``, or
            a ``NamedSharding``. Each device then computes its own part, by the best kernel for it. Of examples and
            heads it sends nothing; of the sequence, what ``context_parallel`` says. Keys are divided as the queries
            where there are as many; else every device has all of them; with ``context_parallel="merge"`` the keys
            alone are divided, as of a cache. It is ``P()`` where there is one device.
            Explicit axes need it not: the types of query and key say the same. With neither, where several devices may
            take part, an implementation is chosen that XLA can divide.
        axis_name: the axis of the mesh that divides the sequence, or several, in a ``shard_map`` of yours: query, key
            and value are then those of one device, and of a bias that is an array the queries, and all else (mask,
            positions, offset, the keys of a bias) is of the whole sequence.
        context_parallel: how the keys of a divided sequence come to the queries; ``None`` for what sends least.
            ``"halo"`` sends each device the keys that the mask lets some query of it attend to, ``"gather"`` all of
            them. ``"ulysses"`` sends all queries and keys of some of the heads, where these divide. ``"ring"`` sends
            all keys around, but for devices that need none, and no device has more than two shards at a time; it is by
            ``"blocked"``, and differentiable once, in reverse. What is static of the mask decides what is needed:
            ``& SlidingWindow(longest)`` bounds documents whose ids are traced. Where the keys alone are divided, and
            every device has all queries, the scheme is ``"merge"``: each attends to its own keys, and sends what it has
            found, some numbers for each query and head. :func:`explain` says the bytes.
        implementation: ``None`` chooses: a kernel of the platform that takes all of the arguments (cuDNN on GPU, else
            our own ``"pallas"``; splash on TPU; tokamax on both if installed), else ``"xla"`` where there are few
            queries and keys, else ``"blocked"``. A name forces one. Elsewhere than on their platform ``"pallas"`` and
            ``"splash"`` run interpreted, slowly, for tests.

    Returns:
        ``[batch, q, heads, dim_v]``, in the dtype of the values; zeros where there are no keys. With
        ``return_residual`` a pair: that, and the log-sum-exp, float32 (or float64) ``[batch, q, heads]``, the layout of
        ``jax.nn.dot_product_attention``; ``-inf`` for a query that attends to nothing, and has no sink.

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
    for name, array in (("query", query), ("key", key), ("value", value)):
        if isinstance(array, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name} must be an array, got the shape of one, {checks.describe(array)}; explain takes shapes, and "
                "jax.eval_shape(attention, …) gives that of the output"
            )
    call = checked_call(
        query,
        key,
        value,
        mask,
        bias=bias,
        scale=scale,
        offset=offset,
        query_positions=query_positions,
        key_positions=key_positions,
        positions=positions,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
        return_residual=return_residual,
        shards=spmd.shards_of(axis_name, query, key, context_parallel),
    )
    call, placement, sequence = spmd.placed(call, sharding, axis_name, context_parallel)
    if placement is None:
        return RUN[choose(call, implementation)[0]](call)
    name, _ = spmd.ask_shard(call, placement, sequence, lambda part, scheme: choose(part, implementation, scheme))
    return spmd.attend(call, placement, sequence, RUN[name], name in OURS)


def drawbacks(name: str, call: Call) -> list[str]:
    """Why a kernel that could do a call is not chosen unless it is asked for."""
    found: list[str] = []
    if call.is_left_to_xla and name not in DIVISIBLE:
        found.append("XLA cannot divide it over devices: say sharding=, that of the query")
    if name == "tokamax" and fused.tokamax_writes_all_pairs(call):
        found.append("its gradients write an array of all pairs")
    return found


def choose(call: Call, implementation: str | None, scheme: spmd.Scheme | None = None) -> tuple[str, str]:
    """The implementation, and why; ``scheme`` says how devices share a sequence."""
    if scheme == "ring":
        if implementation not in (None, "blocked"):
            raise ValueError(
                f"implementation={implementation!r} cannot join what comes around a ring: leave it out, or "
                "context_parallel='ring'"
            )
        return "blocked", "it joins what comes around a ring"
    if is_empty(call.query, call.key):
        return "xla", "there is no pair of a query and a key"
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
    query_length, key_length = call.query.shape[1], call.key.shape[1]
    if any(map(jax.export.is_symbolic_dim, (query_length, key_length))):
        return "xla", "the lengths are symbolic, and no tile could have a number of queries and keys"
    for name in FUSED.get(call.platform, ()):
        if not LACKS[name](call) and not drawbacks(name, call):
            return name, f"it is a kernel of the {call.platform.upper()}, and takes all of the arguments"
    if max(query_length, key_length) <= _SMALL:
        return "xla", f"at most {_SMALL} queries and keys are too few to gain by tiles"
    reason = f"more than {_SMALL} queries or keys: it skips empty tiles, and writes no scores out"
    if call.is_left_to_xla:
        reason += (
            "; XLA can divide it over the examples and heads, but it skips only the tiles that are known to be empty "
            "while tracing: with sharding=, that of the query, it skips those of each example"
        )
    return "blocked", reason
