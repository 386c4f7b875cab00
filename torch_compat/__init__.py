"""The PyTorch side of jaxmask: tensors, block masks and weights for users, and the comparison of both sides."""

from torch_compat.bridge import to_jax, to_torch

__all__ = ["to_jax", "to_torch"]
