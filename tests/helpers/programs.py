"""Meshes for programs, and what a compiled program does."""

import re
from collections import Counter
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|called_computation|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count\D*(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
# The devices of a group, listed, or as in [groups, devices]<=[…], or by axes of a mesh.
_GROUP = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\})"
)


def collectives(compiled: Any) -> list[str]:
    """The kinds of communication between devices in a program."""
    return sorted(kind for kind, _, _ in _communication(compiled.as_text()))


def mesh_of(mode: AxisType, shape: tuple[int, ...] = (2, 2), names: tuple[str, ...] = ("data", "model")) -> Mesh:
    """A mesh over the first devices, of the axes ``data`` and ``model`` or others."""
    devices = jax.devices()[: prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(mode,) * len(shape), devices=devices)


def received(compiled: Any) -> dict[str, int]:
    """The bytes that a device receives in a run of a program, by the kind of communication; loops as often as they run.

    What a device has already is not received: of what is gathered from eight devices, seven eighths are.
    """
    found: Counter[str] = Counter()
    for kind, size, times in _communication(compiled.as_text()):
        found[kind] += size * times
    return dict(found)


def _communication(text: str) -> list[tuple[str, int, int]]:
    """The kind of each communication, the bytes that a device receives by it, and how often it happens."""
    computations: dict[str, list[str]] = {}
    entry = lines = None
    for line in text.splitlines():
        heading = _COMPUTATION.match(line)
        if heading:
            lines = computations.setdefault(heading[2], [])
            entry = heading[2] if heading[1] else entry
        elif lines is not None:
            lines.append(line)
    assert entry is not None
    found: list[tuple[str, int, int]] = []

    def visit(name: str, times: int) -> None:
        for line in computations[name]:
            operation = _OPERATION.match(line)
            if not operation:
                continue
            shape, kind, rest = operation.groups()
            kind = kind.removesuffix("-start")
            if re.fullmatch(_KINDS, kind):
                # An operation that starts has a tuple with its operands, too.
                sizes = [_bytes(*match) for match in _SHAPE.findall(shape)]
                size = max(sizes) if operation[2].endswith("-start") else sum(sizes)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    # How the compiler for TPU writes it: as a fusion, which slices what is reduced.
                    found.append(("reduce-scatter", _others("all-gather", size, rest), times))
                else:
                    found.append((kind, _others(kind, size, rest), times))
            within = times * (_trips(rest, computations) if kind == "while" else 1)
            branches = [branch.strip(" %") for group in _BRANCHES.findall(rest) for branch in group.split(",")]
            for called in (*_CALLED.findall(rest), *branches):
                if called in computations:
                    visit(called, within)

    visit(entry, 1)
    return found


def _trips(loop: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs, if the program says so: else it is one over tiles, in which nothing is sent."""
    said, condition = _TRIPS.search(loop), _CONDITION.search(loop)
    if said or not condition:
        return int(said[1]) if said else 1
    # A program for TPU says only up to which number it counts from 0.
    bounds = [bound for line in computations[condition[1]] for bound in _BOUND.findall(line)]
    return int(bounds[0]) if len(bounds) == 1 else 1


def _bytes(name: str, bits: str, dimensions: str) -> int:
    return prod(int(size) for size in dimensions.split(",") if size) * max(1, int(bits or 8) // 8)


def _others(kind: str, size: int, rest: str) -> int:
    """The bytes of a result that are of other devices."""
    if kind == "collective-permute":
        return size
    group = _GROUP.search(rest)
    assert group is not None
    listed, size_of_group, mesh, axes = group.groups()
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        count = prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
    else:
        count = int(size_of_group) if listed is None else len(listed.split(","))
    # What is scattered was `count` times as large; what is reduced is sent twice.
    return {"reduce-scatter": size * (count - 1), "all-reduce": 2 * size * (count - 1) // count}.get(
        kind, size * (count - 1) // count
    )
