"""The PyTorch side of jaxmask: what Transformers' masks mean, in PyTorch, and the comparison of both, bit for bit."""

from torch_compat.bridge import to_jax, to_torch

__all__ = ["to_jax", "to_torch"]
