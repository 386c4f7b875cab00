"""Additive biases: the arrays that are added to attention scores, ``0`` where a query may attend, else the minimum."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Integer, Shaped

from jaxmask import checks


def from_allowed(allowed: Bool[Array | np.ndarray, "*shape"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """The additive bias of a boolean mask: ``0`` where ``allowed``, ``finfo(dtype).min`` elsewhere, exactly those bits.

    The minimum and not ``-inf``, so that a row with nothing to attend to gives a uniform softmax and no NaN; the
    convention of Transformers' ``AttentionMaskConverter`` and ``eager_mask``.

    Args:
        allowed: bool, any shape.
        dtype: the floating dtype of the result.

    Raises:
        TypeError: ``allowed`` is not a bool array, or ``dtype`` not floating.
        ValueError: ``dtype`` is float64 and 64-bit mode is off.

    >>> from_allowed(jnp.array([True, False]), jnp.float16)
    Array([ 0.00e+00, -6.55e+04], dtype=float16)
    """
    dtype = checks.float_dtype(dtype)
    return fill(checks.array("allowed", allowed, "b"), dtype, float(jnp.finfo(dtype).min))


@partial(jax.jit, static_argnames=("dtype", "minimum"))
def fill(allowed: Bool[Array, "*shape"], dtype: np.dtype[Any], minimum: float) -> Float[Array, "*shape"]:
    """``0`` where ``allowed``, ``minimum`` elsewhere."""
    return jnp.where(allowed, jnp.zeros((), dtype), jnp.asarray(minimum, dtype))


def is_one(mask: Shaped[Array | np.ndarray, "*shape"], dtype: DTypeLike) -> Bool[Array | np.ndarray, "*shape"]:
    """Where a 0/1 mask of any dtype says "attend".

    PyTorch casts to ``dtype``, subtracts from one and masks what is not zero: all but a one is masked, and a float near
    one may round to it. A NumPy array is compared in NumPy, before JAX without 64-bit mode could cut an int64 in half.
    """
    return mask.astype(dtype) == 1 if isinstance(mask, np.ndarray) else _is_one(mask, dtype)


@partial(jax.jit, static_argnames="dtype")
def _is_one(mask: Shaped[Array, "*shape"], dtype: DTypeLike) -> Bool[Array, "*shape"]:
    return mask.astype(dtype) == 1


def unmask_unattended(
    expanded_mask: Float[Array | np.ndarray, "..."] | Integer[Array | np.ndarray, "..."],
    min_dtype: float | None = None,
) -> Float[Array, "..."] | Integer[Array, "..."]:
    """Rows with nothing to attend to become zero, so that they attend to everything.

    For kernels that give NaN on such rows, as PyTorch's memory-efficient attention did (pytorch#110213). The semantics,
    a multiplication, are those of Transformers' ``AttentionMaskConverter._unmask_unattended``: a negative minimum
    becomes **-0.0**.

    Args:
        expanded_mask: an additive bias, ``[batch, heads, q, kv]`` or ``[batch, q, kv]``; floating, or of integers.
        min_dtype: the value that masks; ``finfo(expanded_mask.dtype).min`` unless given, as it must be for integers.

    Returns:
        The bias in the shape and dtype of ``expanded_mask``.

    Raises:
        ValueError: ``expanded_mask`` is bool, or of another rank.
        TypeError: ``expanded_mask`` is neither floating nor of integers, or of integers and ``min_dtype`` is missing.

    >>> low = jnp.finfo(jnp.float32).min
    >>> unmask_unattended(jnp.array([[[low, low], [0.0, low]]]))
    Array([[[-0.0000000e+00, -0.0000000e+00],
            [ 0.0000000e+00, -3.4028235e+38]]], dtype=float32)
    """
    if checks.is_array(expanded_mask) and expanded_mask.dtype == jnp.bool_:
        raise ValueError(
            f"expanded_mask must be an additive bias, got {checks.describe(expanded_mask)}; "
            "make one by jaxmask.bias.from_allowed(allowed, dtype)"
        )
    is_floating = jnp.issubdtype(checks.array("expanded_mask", expanded_mask, "fi", 3, 4).dtype, jnp.floating)
    if not is_floating:
        checks.fits_int32("expanded_mask", expanded_mask)
        if min_dtype is None:
            raise TypeError(
                f"expanded_mask must be float where min_dtype is left out, got {checks.describe(expanded_mask)}: say "
                "which integer masks"
            )
    if min_dtype is None:
        min_dtype = float(jnp.finfo(expanded_mask.dtype).min)
    return _unmask_unattended(expanded_mask, min_dtype)


@jax.jit
def _unmask_unattended(
    expanded_mask: Float[Array | np.ndarray, "..."] | Integer[Array | np.ndarray, "..."], min_dtype: float | Array
) -> Float[Array, "..."] | Integer[Array, "..."]:
    unattended = jnp.all(expanded_mask == min_dtype, axis=-1, keepdims=True)
    # Not `expanded_mask * attended`: XLA may turn that into a select of +0.0, and the sign is lost.
    return jnp.where(unattended, expanded_mask * 0, expanded_mask)
