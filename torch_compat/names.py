"""Where the weights of a PyTorch module go in one of nnx, by their names in both."""

from collections.abc import Callable

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]
# Where each weight goes, by its name in Transformers: to which of our parameters, as "layers.0.query.kernel", and how.
# Several that go to one are joined along its last axis, in the order of their names here.
Names = dict[str, tuple[str, Transform]]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The weight as it is."""
    return tensor


def linear(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same) -> Names:
    """The names of an ``nn.Linear``, ``[out, in]``, that becomes an ``nnx.Linear``, ``[in, out]``.

    ``transform`` comes first, of the weight and of the bias.
    """
    names: Names = {f"{theirs}.weight": (f"{ours}.kernel", lambda tensor: _transposed(transform(tensor)))}
    return {**names, f"{theirs}.bias": (f"{ours}.bias", transform)} if bias else names


def norm(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same) -> Names:
    """The names of a norm of PyTorch that becomes one of nnx."""
    names: Names = {f"{theirs}.weight": (f"{ours}.scale", transform)}
    return {**names, f"{theirs}.bias": (f"{ours}.bias", same)} if bias else names


def embedding(theirs: str, ours: str) -> Names:
    """The names of an ``nn.Embedding`` that becomes an ``nnx.Embed``."""
    return {f"{theirs}.weight": (f"{ours}.embedding", same)}


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    # Of any rank, for one that is not a matrix is to be refused by its shape.
    return tensor.permute(*reversed(range(tensor.ndim)))
