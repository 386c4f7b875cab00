"""What a compiled program does."""

import re
from typing import Any

_COLLECTIVE = re.compile(
    r"^.* = .*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", re.MULTILINE
)


def collectives(compiled: Any) -> list[str]:
    """The kinds of communication between devices in a program."""
    return sorted(_COLLECTIVE.findall(compiled.as_text()))
