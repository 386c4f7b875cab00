"""Meshes for programs, and what a compiled program does."""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

_COLLECTIVE = re.compile(
    r"^.* = .*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", re.MULTILINE
)


def collectives(compiled: Any) -> list[str]:
    """The kinds of communication between devices in a program."""
    return sorted(_COLLECTIVE.findall(compiled.as_text()))


def mesh_of(mode: AxisType, shape: tuple[int, int] = (2, 2)) -> Mesh:
    """A mesh of the axes ``data`` and ``model``, over the first devices."""
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(mode,) * 2, devices=devices)
