"""Names of weights in PyTorch modules, and where these weights go in nnx modules."""

from collections.abc import Callable
from typing import NamedTuple

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """The weight unchanged."""
    return tensor


class Place(NamedTuple):
    """Where a weight goes.

    Args:
        parameter: the name of our parameter, such as ``"layers.0.query.weight"``. Weights that go to the same parameter
            are joined along its first axis, in the order of their names.
        transform: applied to the weight.
        size: the length of the weight's part of that axis; ``None`` where the weight is the whole parameter.
    """

    parameter: str
    transform: Transform = same
    size: int | None = None


# Keys are the names of weights in Transformers.
Names = dict[str, Place]


def linear(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same, size: int | None = None) -> Names:
    """The names of an ``nn.Linear`` that becomes a linear layer of ``jaxmask.flax``, or a part of one.

    Both have weights ``[out, in]``. ``transform`` is applied to the weight and to the bias.
    """
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{theirs}.{kind}": Place(f"{ours}.{kind}", transform, size) for kind in kinds}


def norm(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same) -> Names:
    """The names of a norm that becomes an nnx norm."""
    names: Names = {f"{theirs}.weight": Place(f"{ours}.scale", transform)}
    return {**names, f"{theirs}.bias": Place(f"{ours}.bias")} if bias else names


def embedding(theirs: str, ours: str) -> Names:
    """The names of an ``nn.Embedding`` that becomes an ``nnx.Embed``."""
    return {f"{theirs}.weight": Place(f"{ours}.embedding")}
