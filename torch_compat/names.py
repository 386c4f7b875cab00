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
        parameter: which of ours, as ``"layers.0.query.weight"``. Several weights that go to one are joined along its
            first axis, in the order of their names.
        transform: what it becomes there.
        size: of its part of that axis, where there are others; ``None`` where it is all of it.
    """

    parameter: str
    transform: Transform = same
    size: int | None = None


# By the name of the weight in Transformers.
Names = dict[str, Place]


def linear(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same, size: int | None = None) -> Names:
    """The names of an ``nn.Linear`` that becomes one of ``jaxmask.flax``, ``[out, in]`` both, or a part of one.

    ``transform`` is of the weight and of the bias.
    """
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{theirs}.{kind}": Place(f"{ours}.{kind}", transform, size) for kind in kinds}


def norm(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same) -> Names:
    """The names of a norm of PyTorch that becomes one of nnx."""
    names: Names = {f"{theirs}.weight": Place(f"{ours}.scale", transform)}
    return {**names, f"{theirs}.bias": Place(f"{ours}.bias")} if bias else names


def embedding(theirs: str, ours: str) -> Names:
    """The names of an ``nn.Embedding`` that becomes an ``nnx.Embed``."""
    return {f"{theirs}.weight": Place(f"{ours}.embedding")}
