"""Tensors from one framework in the other, by DLPack, without a copy where the frameworks allow it.

Both then share one buffer. JAX takes its arrays to be immutable, so do not write into a tensor that came from JAX or
that was handed to JAX.
"""

import jax
import jax.numpy as jnp
import torch

from jaxmask import checks

# What JAX has of each dtype without 64-bit mode.
_HALVES = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}


def to_torch(array: jax.Array) -> torch.Tensor:
    """A JAX array as a PyTorch tensor of the same dtype, bfloat16 and bool included, on the same memory.

    Args:
        array: any shape and dtype, on one device.

    Returns:
        A tensor of the same shape, on the same device.

    Raises:
        TypeError: ``array`` is not a JAX array, or it is traced and has no contents yet.

    >>> to_torch(jnp.array([True, False]))
    tensor([ True, False])
    """
    if not isinstance(array, jax.Array):
        raise TypeError(f"array must be a JAX array, got a {type(array).__name__}")
    if checks.is_traced(array):
        raise TypeError("array is traced and has no contents to hand over: call to_torch outside of jit")
    return torch.from_dlpack(array)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A PyTorch tensor as a JAX array of the same dtype, bfloat16 and bool included.

    The memory is shared where the tensor is contiguous and aligned as JAX needs it, and copied otherwise.

    Args:
        tensor: any shape, detached from autograd.

    Returns:
        An array of the same shape.

    Raises:
        TypeError: ``tensor`` is not a PyTorch tensor.
        ValueError: its numbers have 64 bits, or parts of 64 bits, while 64-bit mode is off; or it requires grad.

    >>> to_jax(torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
    Array([1.5, 2.5], dtype=bfloat16)
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor must be a PyTorch tensor, got a {type(tensor).__name__}")
    if tensor.requires_grad:
        raise ValueError("tensor requires grad, which JAX cannot continue: hand over tensor.detach()")
    if tensor.dtype in _HALVES and not checks.has_64_bits():
        raise ValueError(
            f"tensor is {tensor.dtype}, and JAX would cut it in half: convert it first, as by "
            f"tensor.to({_HALVES[tensor.dtype]}), or switch 64-bit mode on by "
            'jax.config.update("jax_enable_x64", True)'
        )
    # A bit of a tensor may say that its numbers are to be negated or conjugated, and DLPack does not know of it.
    return jnp.from_dlpack(tensor.resolve_conj().resolve_neg().contiguous())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of the tensor as integers, so that -0.0 differs from 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal, bit for bit."""
    return torch.equal(bits(one), bits(other))
