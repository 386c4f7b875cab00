"""Where the weights of a PyTorch module go in one of nnx, by their names in both."""

from collections.abc import Callable
from typing import NamedTuple

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The weight as it is."""
    return tensor


class Place(NamedTuple):
    """Where a weight goes.

    Args:
        parameter: which of ours, as ``"layers.0.query.kernel"``. Several weights that go to one are joined along its
            last axis, in the order of their names.
        transform: what it becomes there.
        size: of its part of that axis, where there are others; ``None`` where it is all of it.
    """

    parameter: str
    transform: Transform = same
    size: int | None = None


# By the name of the weight in Transformers.
Names = dict[str, Place]


def linear(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same, size: int | None = None) -> Names:
    """The names of an ``nn.Linear``, ``[out, in]``, that becomes an ``nnx.Linear``, ``[in, out]``, or a part of one.

    ``transform`` comes first, of the weight and of the bias.
    """
    names: Names = {f"{theirs}.weight": Place(f"{ours}.kernel", lambda tensor: _transposed(transform(tensor)), size)}
    return {**names, f"{theirs}.bias": Place(f"{ours}.bias", transform, size)} if bias else names


def norm(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same) -> Names:
    """The names of a norm of PyTorch that becomes one of nnx."""
    names: Names = {f"{theirs}.weight": Place(f"{ours}.scale", transform)}
    return {**names, f"{theirs}.bias": Place(f"{ours}.bias")} if bias else names


def embedding(theirs: str, ours: str) -> Names:
    """The names of an ``nn.Embedding`` that becomes an ``nnx.Embed``."""
    return {f"{theirs}.weight": Place(f"{ours}.embedding")}


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    # Of any rank, for one that is not a matrix is to be refused by its shape.
    return tensor.permute(*reversed(range(tensor.ndim)))
