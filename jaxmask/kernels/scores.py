"""What attention does to the products of queries and keys before softmax, said once for every kernel of ours."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Shaped

from jaxmask.indices import Allowed

# The maximum of a row is at least the lowest float, so that a masked score has a weight of exactly 0 and no row is NaN.
# A score is never below it: only the mask, or a bias of minus infinity, makes a row empty.
MASKED = -jnp.inf


def lowest(dtype: DTypeLike) -> float:
    """The lowest that the maximum of a row of scores may be."""
    return float(jnp.finfo(dtype).min)


def read_keys(allowed: Bool[Array, "batch heads q kv"], kv_heads: int) -> Bool[Array, "batch kv_heads kv"]:
    """Which keys some query may attend to. An axis of size 1 serves every example, head or key."""
    by_head = allowed.any(2)
    if by_head.shape[1] == 1:
        return by_head
    return by_head.reshape(by_head.shape[0], kv_heads, -1, by_head.shape[2]).any(2)


def finish(
    scores: Float[Array, "batch heads q kv"],
    logits_soft_cap: float | None,
    bias: Shaped[Array | np.ndarray, "..."] | None,
    allowed: Allowed | None,
) -> Float[Array, "batch heads q kv"]:
    """Cap the scores, add the bias, mask them: in the order of Transformers' ``eager_attention_forward`` of Gemma 2."""
    if logits_soft_cap is not None:
        if allowed is not None:
            # The slope of tanh at NaN is NaN, whatever it is multiplied by.
            scores = jnp.where(allowed, scores, 0)
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if bias is not None:
        scores = scores + jnp.asarray(bias).astype(scores.dtype)
    return scores if allowed is None else jnp.where(allowed, scores, MASKED)
