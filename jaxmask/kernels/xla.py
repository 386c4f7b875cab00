"""Attention by its definition, with all scores written out; XLA fuses what it can. Best where there are few of them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmask import checks
from jaxmask.indices import as_4d, iota
from jaxmask.kernels import scores
from jaxmask.kernels.call import Call


@jax.jit
def attention(call: Call) -> Any:
    """Softmax of the scores, in at least float32. A row with nothing to attend to is zero, and has zero gradients."""
    (batch, query_length, heads, dim), (_, key_length, kv_heads, dim_v) = call.query.shape, call.value.shape
    b, h, kv = iota(batch, 0), iota(heads, 1), iota(key_length, 3)
    if call.positions.first is None and call.positions.queries is None:
        # Else static positions would make all pairs a constant of the program.
        call = replace(call, positions=replace(call.positions, first=jnp.int32(0)))
    q = call.positions.of_queries(b, iota(query_length, 2))
    allowed = as_4d(jnp.asarray(call.mask.allows(b, h, q, kv)))
    precise = checks.at_least_float32(call.query.dtype)

    # What no query may attend to is zero, for a weight of 0 would not take NaN away.
    is_read = scores.read_keys(allowed, kv_heads).swapaxes(1, 2)[..., None]
    key, value = (jnp.where(is_read, x, 0) for x in (call.key, call.value))

    query = call.query.reshape(batch, query_length, kv_heads, heads // kv_heads, dim)
    products = jnp.einsum("bqngd,bknd->bngqk", query, key, preferred_element_type=precise) * call.scale
    products = products.reshape(batch, heads, query_length, key_length)
    bias = call.bias(b, h, q, call.positions.of_keys(b, kv)) if callable(call.bias) else call.bias
    logits = scores.finish(products, call.logits_soft_cap, bias, allowed)

    highest = lax.stop_gradient(logits).max(-1, keepdims=True, initial=scores.lowest(precise))
    sinks = None if call.sinks is None else jnp.asarray(call.sinks, precise)[None, :, None, None]
    if sinks is not None:
        highest = jnp.maximum(highest, lax.stop_gradient(sinks))
    weights = jnp.exp(logits - highest)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - highest)
    has_keys = total > 0
    total = jnp.where(has_keys, total, 1)
    weights = weights / total
    if call.dropout is not None:
        weights = weights * call.dropout.factor(precise, b, h, iota(query_length, 2), kv)
    weights = weights.astype(value.dtype).reshape(batch, kv_heads, heads // kv_heads, query_length, key_length)
    out = jnp.einsum("bngqk,bknd->bqngd", weights, value, preferred_element_type=precise)
    out = out.reshape(batch, query_length, heads, dim_v).astype(value.dtype)
    if not call.return_residual:
        return out
    lse = jnp.where(has_keys, highest + jnp.log(total), -jnp.inf)
    return out, lse[..., 0].swapaxes(1, 2)
