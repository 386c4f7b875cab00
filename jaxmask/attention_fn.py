"""Attention as Flax's modules call it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Shaped

from jaxmask import checks, indices
from jaxmask.dispatch import Implementation, attention
from jaxmask.mask import Full, KeyPositions, Mask, Offset
from jaxmask.masks import Causal, Dense


def make_attention_fn(
    description: Mask | None = None,
    *,
    offset: Offset | None = None,
    key_positions: KeyPositions | None = None,
    implementation: Implementation | None = None,
) -> Callable[..., Array]:
    """Make an ``attention_fn`` for ``MultiHeadAttention`` of ``flax.linen`` and ``flax.nnx`` that attends by a mask.

    The function uses or refuses every argument that flax passes. It joins the call's bool mask and ``is_causal`` to the
    description by ``&``, adds the bias, and casts the inputs to the dtype. It refuses dropout, a precision, other
    products, and sown weights.

    A decoding step with flax's own cache has fewer queries than keys. If the description depends on positions, the
    function then needs an offset. Make the function inside the step, with the layer's ``cache_index`` as the offset, so
    that one compilation serves all steps. :class:`jaxmask.flax.Cache` needs no offset.

    Args:
        description: the keys that a query attends to; ``None`` for all.
        offset, key_positions, implementation: as in :func:`attention`.

    Returns:
        A function of query, key and value, ``[..., length, heads, dim]``. It raises ``ValueError`` for an argument that
        it cannot use.

    >>> import jaxmask
    >>> from flax import nnx
    >>> attend = make_attention_fn(jaxmask.SlidingWindow(4))
    >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 6, 8))).shape
    (1, 6, 8)
    """

    def attention_fn(
        query: Float[Array | np.ndarray, "..."],
        key: Float[Array | np.ndarray, "..."],
        value: Float[Array | np.ndarray, "..."],
        bias: Float[Array | np.ndarray, "..."] | None = None,
        mask: Shaped[Array | np.ndarray, "..."] | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: object = None,
        module: object = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: object = None,
        qk_attn_weights_einsum: object = None,
        attn_weights_value_einsum: object = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "..."]:
        if dropout_rate and not deterministic:
            raise ValueError(
                f"dropout_rate is {dropout_rate}, but jaxmask.attention drops no weights: use dropout_rate=0, or "
                "deterministic=True"
            )
        for name, argument, hint in (
            ("precision", precision, "set jax.default_matmul_precision"),
            ("module", module, "sow_weights=True asks for the weights, which are never written out"),
            ("einsum_dot_general", einsum_dot_general, "jaxmask computes the products itself"),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum, "jaxmask computes the products itself"),
            ("attn_weights_value_einsum", attn_weights_value_einsum, "jaxmask computes the products itself"),
        ):
            if argument is not None:
                raise ValueError(f"{name} must be None for jaxmask.attention, got {checks.describe(argument)}: {hint}")
        if promote_dtype is not None:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        elif dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        batch = query.shape[:-3]
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        joined = Full() if description is None else description
        if is_causal:
            joined = joined & Causal()
        if mask is not None:
            joined = joined & _of_call(_flat(mask, batch).astype(bool), offset)
        out = attention(
            query,
            key,
            value,
            joined,
            bias=None if bias is None else _flat(bias, batch),
            offset=offset,
            key_positions=key_positions,
            implementation=implementation,
        )
        return out.reshape(*batch, *out.shape[1:])

    return attention_fn


def _of_call(mask: Bool[Array, "batch heads q kv"], offset: Offset | None) -> Mask:
    """The mask of a call, whose rows are its queries, wherever the first of them is."""
    if mask.shape[2] == 1 or offset is None:
        return Dense(mask)
    if np.ndim(offset):
        raise ValueError(
            "mask has a row for each query, and cannot be aligned with an offset for each example; put it into the "
            "description"
        )
    return Dense(mask, offset=offset)


def _flat(array: Array | np.ndarray, batch: tuple[int, ...]) -> Any:
    """``[*batch, heads, q, kv]`` with one axis for the batch."""
    if array.ndim < 3 or (array.ndim <= 4 and len(batch) == 1):
        return indices.as_4d(array)
    return jnp.broadcast_to(array, (*batch, *array.shape[-3:])).reshape(-1, *array.shape[-3:])
