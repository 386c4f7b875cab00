"""Attention by its definition, with all scores written out; XLA fuses what it can. Best where there are few of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmask.indices import iota
from jaxmask.kernels import scores
from jaxmask.kernels.call import Call


@jax.jit
def attention(call: Call) -> Float[Array, "batch q heads dim_v"]:
    """Softmax of the scores, in at least float32. A row with nothing to attend to is zero, and has zero gradients."""
    (batch, query_length, heads, _), (_, key_length, kv_heads, _) = call.query.shape, call.key.shape
    b, h, kv = iota(batch, 0), iota(heads, 1), iota(key_length, 3)
    q = call.positions.of_queries(b, iota(query_length, 2))
    precise = jnp.promote_types(call.query.dtype, jnp.float32)
    query = call.query.reshape(batch, query_length, kv_heads, -1, call.query.shape[3])
    products = jnp.einsum("bqngd,bknd->bngqk", query, call.key, preferred_element_type=precise) * call.scale
    products = products.reshape(batch, heads, query_length, key_length)
    bias = call.bias(b, h, q, call.positions.of_keys(b, kv)) if callable(call.bias) else call.bias
    logits = scores.finish(products, call.logits_soft_cap, bias, call.mask.allows(b, h, q, kv))
    highest = jnp.maximum(jax.lax.stop_gradient(logits).max(-1, keepdims=True), scores.LOWEST)
    weights = jnp.exp(logits - highest)
    total = weights.sum(-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, 1)).astype(call.value.dtype)
    weights = weights.reshape(batch, kv_heads, -1, query_length, key_length)
    out = jnp.einsum("bngqk,bknd->bqngd", weights, call.value, preferred_element_type=precise)
    return out.reshape(batch, query_length, heads, -1).astype(call.value.dtype)
