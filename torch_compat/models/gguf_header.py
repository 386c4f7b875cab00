"""What a GGUF file says that it holds, with each size checked against the file before anything is made of that size.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import struct
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxmask import checks

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Readers make an object of each element. The largest vocabularies have a quarter of a million tokens.
_MOST_ELEMENTS = 2**22
# GGML_MAX_DIMS. The product of millions of sizes would take hours.
_MOST_AXES = 4


class Header(NamedTuple):
    """What a GGUF file holds before its weights.

    Args:
        metadata: its keys and values. For an array the value is the number of its elements.
        elements: the number of elements of each tensor.
    """

    metadata: dict[str, Any]
    elements: dict[str, int]


def read_header(path: Path) -> Header:
    """The metadata of a file, and its tensors by their names.

    Raises:
        ValueError: it is not a whole GGUF file. The message names the file.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _Reader(data).header()
    except (ValueError, struct.error) as error:
        raise ValueError(
            f"{path.name} in {str(path.parent)!r} is not a whole GGUF file ({error}): download it again"
        ) from error


class _Reader:
    def __init__(self, data: mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version must be 2 or 3, in little-endian order, got {version}")
        tensors, values = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        # A count needs no check of its own: each value and each tensor takes bytes of the file.
        for _ in range(values):
            key = self.string()
            metadata[key] = self.value(key, self.number("I"))
        elements: dict[str, int] = {}
        ends: list[tuple[str, int]] = []
        for _ in range(tensors):
            name, axes = self.string(), self.number("I")
            if axes > _MOST_AXES:
                raise ValueError(f"tensor {checks.shown(name)} has {axes} axes, more than {_MOST_AXES}")
            shape = [self.number("Q") for _ in range(axes)]
            kind, offset = GGMLQuantizationType(self.number("I")), self.number("Q")
            elements[name] = prod(shape)
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
            ends.append((name, offset + elements[name] // per_block * block_bytes))
        for name, end in ends:
            if self.at + end > len(self.data):
                raise ValueError(f"tensor {checks.shown(name)} ends {self.at + end - len(self.data)} bytes after it")
        return Header(metadata, elements)

    def value(self, key: str, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{checks.shown(key)} is of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > _MOST_ELEMENTS:
            raise ValueError(f"{checks.shown(key)} has {count} elements, more than {_MOST_ELEMENTS}")
        if kind in _NUMBERS:
            self.skip(count * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"{checks.shown(key)} is an array of the unknown type {kind}")
        return count

    def number(self, code: str) -> Any:
        begin = self.skip(struct.calcsize(code))
        return struct.unpack_from(f"<{code}", self.data, begin)[0]

    def string(self) -> str:
        begin = self.skip(self.number("Q"))
        return self.data[begin : self.at].decode()

    def skip(self, size: int) -> int:
        """Where the next ``size`` bytes begin, once they are known to be in the file."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, and byte {self.at} is asked for")
        return begin
