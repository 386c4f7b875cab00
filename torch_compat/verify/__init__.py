"""The comparison of jaxmask with PyTorch and Transformers: what ``jaxmask verify`` runs."""

from torch_compat.verify.command import run
from torch_compat.verify.comparison import compare

__all__ = ["compare", "run"]
