"""Attention as Flax's modules call it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike

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
    """An ``attention_fn`` for ``flax.linen`` and ``flax.nnx`` ``MultiHeadAttention``, that attends as a mask says.

    What flax passes is honoured or refused. The bool mask of the call and ``is_causal`` are joined to the description
    by ``&``, the bias is added, the inputs are cast to the dtype; dropout, a precision, other products and sown weights
    are refused. Where the lengths differ and the description depends on positions, as in a decoding step with flax's
    own cache, it needs an offset, and says so: make the function in the step, with the layer's ``cache_index``, and one
    compilation serves all steps. :class:`jaxmask.flax.Cache` needs none of that.

    Args:
        description: which keys a query attends to; ``None`` for all.
        offset, key_positions, implementation: as in :func:`attention`.

    Returns:
        A function of query, key and value, ``[..., length, heads, dim]``, as flax calls it.

    >>> import jaxmask
    >>> from flax import nnx
    >>> attend = make_attention_fn(jaxmask.SlidingWindow(4))
    >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 6, 8))).shape
    (1, 6, 8)
    """

    def attention_fn(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Bool[Array, "..."] | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Any = None,
        is_causal: bool = False,
    ) -> Array:
        if dropout_rate and not deterministic:
            raise ValueError(
                f"dropout_rate is {dropout_rate}, but jaxmask.attention drops no weights: use dropout_rate=0, or "
                "deterministic=True"
            )
        refused = {
            "precision": (precision, "set jax.default_matmul_precision"),
            "module": (module, "sow_weights=True asks for the weights, which are not written out"),
            "einsum_dot_general": (einsum_dot_general, "the products are jaxmask's own"),
            "qk_attn_weights_einsum": (qk_attn_weights_einsum, "the products are jaxmask's own"),
            "attn_weights_value_einsum": (attn_weights_value_einsum, "the products are jaxmask's own"),
        }
        for name, (given, hint) in refused.items():
            if given is not None:
                raise ValueError(
                    f"{name} cannot be honoured by jaxmask.attention, got {checks.describe(given)}: {hint}"
                )
        if promote_dtype is not None:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        elif dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        batch, each = query.shape[:-3], (jnp.shape(x)[-3:] for x in (query, key, value))
        query, key, value = (x.reshape(-1, *shape) for x, shape in zip((query, key, value), each, strict=True))
        joined = Full() if description is None else description
        if is_causal:
            joined = joined & Causal()
        if mask is not None:
            joined = joined & _of_queries_at_hand(_flat(mask, batch).astype(bool), offset)
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


def _of_queries_at_hand(mask: Any, offset: Offset | None) -> Mask:
    """A mask with a row for each query of the call, wherever the first of them is."""
    if mask.shape[2] == 1 or offset is None:
        return Dense(mask)
    if np.ndim(offset):
        raise ValueError(
            "mask has a row for each query, and cannot be aligned with an offset for each example: put it into the "
            "description"
        )
    return Dense(mask, offset=offset)


def _flat(array: Any, batch: tuple[int, ...]) -> Any:
    """``[*batch, heads, q, kv]`` with one axis for the batch."""
    if array.ndim < 3 or (array.ndim <= 4 and len(batch) == 1):
        return indices.as_4d(array)
    return jnp.broadcast_to(array, (*batch, *array.shape[-3:])).reshape(-1, *array.shape[-3:])
