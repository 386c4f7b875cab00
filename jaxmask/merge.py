"""Attention to several sets of keys, joined from attention to each."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmask import checks
from jaxmask.kernels import scores


def merge_attention(
    parts: Sequence[tuple[Float[Array, "batch q heads dim_v"], Float[Array, "batch q heads"]]],
) -> tuple[Float[Array, "batch q heads dim_v"], Float[Array, "batch q heads"]]:
    """Attention to several sets of keys, from attention to each: ring attention, split keys, a shared prefix.

    Args:
        parts: for each set of keys what :func:`attention` returns with ``return_residual=True``. No key is in two sets.
            Sinks belong to one of the parts only. What dropout drops is that of the indices in each part.

    Returns:
        The output in the dtype of those of the parts, and the log-sum-exp. Differentiable in all parts. A query that
        attends to nothing in any part gives zeros and ``-inf``.

    Raises:
        ValueError: there is no part, a part is no pair, or shapes or dtypes differ.
        TypeError: an array is not a float array.

    Source: https://arxiv.org/abs/2501.01005, section 2.2.

    >>> import jax.numpy as jnp
    >>> import jaxmask
    >>> x = jnp.ones((1, 6, 1, 8))
    >>> halves = [jaxmask.attention(x, part, part, return_residual=True) for part in (x[:, :4], x[:, 4:])]
    >>> out, lse = jaxmask.merge_attention(halves)
    >>> bool(jnp.allclose(out, jaxmask.attention(x, x, x)))
    True
    """
    for i, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise ValueError(
                f"parts[{i}] must be a pair of an output and its log-sum-exp, as attention returns it with "
                f"return_residual=True, got {checks.describe(part)}"
            )
        for name, array in zip(("output", "log-sum-exp"), part, strict=True):
            checks.array(f"the {name} of parts[{i}]", array, "f")
    described = [tuple(map(checks.describe, part)) for part in parts]
    if len(set(described)) != 1 or parts[0][0].shape[:-1] != parts[0][1].shape:
        raise ValueError(
            "parts must be pairs of an output [batch, q, heads, dim_v] and its log-sum-exp [batch, q, heads], all of "
            f"the same shapes and dtypes, got {described}"
        )
    outs, lses = (jnp.stack(arrays) for arrays in zip(*parts, strict=True))
    highest = jnp.maximum(lax.stop_gradient(lses).max(0, keepdims=True), scores.lowest(lses.dtype))
    weights = jnp.exp(lses - highest)
    total = weights.sum(0, keepdims=True)
    has_keys = total > 0
    total = jnp.where(has_keys, total, 1)
    out = (outs.astype(lses.dtype) * (weights / total)[..., None]).sum(0).astype(outs.dtype)
    return out, jnp.where(has_keys, highest + jnp.log(total), -jnp.inf)[0]
