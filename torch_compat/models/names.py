"""Names of weights in PyTorch modules, and where these weights go in nnx modules."""

from collections.abc import Callable
from itertools import islice
from math import prod
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
            are joined, in the order of their names.
        transform: applied to the weight.
        size: the length of the weight's part of the axis along which they are joined; ``None`` where the weight is the
            whole parameter.
        axis: that axis.
        split: into how many dimensions of the parameter each of the weight is split; ``None`` for one.
    """

    parameter: str
    transform: Transform = same
    size: int | None = None
    axis: int = 0
    split: tuple[int, ...] | None = None

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight's part of a parameter of this shape."""
        return shape if self.size is None else (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight for a parameter of this shape."""
        dimensions = iter(self.part(shape))
        return tuple(prod(islice(dimensions, count)) for count in self.split or (1,) * len(shape))


# Keys are the names of weights in Transformers.
Names = dict[str, Place]


def linear(
    theirs: str,
    ours: str,
    *,
    bias: bool = True,
    transform: Transform = same,
    size: int | None = None,
    axis: int = 0,
    split: tuple[int, int] = (1, 1),
) -> Names:
    """The names of an ``nn.Linear`` that becomes a linear layer of ``jaxmask.flax``, or a part of one.

    ``transform`` is applied to the weight ``[out, in]`` and to the bias ``[out]``. ``split`` says how many dimensions
    ``out`` and ``in`` have here.
    """
    names = {f"{theirs}.weight": Place(f"{ours}.weight", transform, size, axis, split)}
    return {**names, f"{theirs}.bias": Place(f"{ours}.bias", transform, size, axis, split[:1])} if bias else names


def norm(theirs: str, ours: str, *, bias: bool = True, transform: Transform = same) -> Names:
    """The names of a norm that becomes an nnx norm."""
    names: Names = {f"{theirs}.weight": Place(f"{ours}.scale", transform)}
    return {**names, f"{theirs}.bias": Place(f"{ours}.bias")} if bias else names


def embedding(theirs: str, ours: str) -> Names:
    """The names of an ``nn.Embedding`` that becomes an ``nnx.Embed``."""
    return {f"{theirs}.weight": Place(f"{ours}.embedding")}
