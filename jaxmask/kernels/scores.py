"""What attention does to the products of queries and keys before softmax, said once for every kernel of ours."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmask.indices import Allowed

# A masked score, and the lowest that the maximum of a row may be: so far apart that the weight of a masked pair is
# exactly 0, without an infinity that would make NaN of a row in which every pair is masked.
MASKED, LOWEST = -1e30, -1e29


def finish(
    scores: Float[Array, "batch heads q kv"],
    logits_soft_cap: float | None,
    bias: Float[Array | np.ndarray, "..."] | None,
    allowed: Allowed | None,
) -> Float[Array, "batch heads q kv"]:
    """Cap the scores, add the bias, mask them: in the order of Transformers' ``eager_attention_forward`` of Gemma 2."""
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if bias is not None:
        scores = scores + bias
    return scores if allowed is None else jnp.where(allowed, scores, MASKED)
