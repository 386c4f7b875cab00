"""The embeddings of tokens, where what is no token is not taken for another."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxmask import checks


def embed(
    name: str,
    ids: Int[Array | np.ndarray, "batch q"],
    table: nnx.Embed,
    valid: Bool[Array | np.ndarray, "batch q"] | None,
) -> Float[Array, "batch q dim"]:
    """The embedding of each id; NaN for one that has none, unless it is padding.

    Raises:
        ValueError: an id does not fit an int32. ``name`` is what the caller calls the ids.
    """
    checks.fits_int32(name, ids)
    ids = jnp.asarray(ids).astype(jnp.int32)
    known = ids.clip(0, table.num_embeddings - 1)
    is_none: Any = ids != known
    if valid is not None:
        is_none = is_none & valid
    return jnp.where(is_none[..., None], jnp.nan, table(known))
