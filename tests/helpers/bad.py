"""Tables of bad input: a call, its error, and what the message must say; called as it is, and while tracing."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import pytest


@dataclass(frozen=True)
class Bad:
    """A call that must fail, also inside of a ``jit``, where its argument, if it takes one, is traced."""

    name: str
    call: Callable[..., object]
    error: type[Exception]
    says: tuple[str, ...]
    arguments: tuple[Any, ...]


def bad(name: str, call: Callable[..., object], error: type[Exception], *says: str, argument: Any = None) -> Bad:
    """A row of a table; each of ``says`` is a pattern to be found in the message."""
    return Bad(name, call, error, says, () if argument is None else (argument,))


def refusals(table: Sequence[Bad]) -> Callable[[Bad, bool], None]:
    """The test of a table."""

    @pytest.mark.breaks_annotations
    @pytest.mark.parametrize("is_traced", [False, True], ids=["called", "traced"])
    @pytest.mark.parametrize("row", table, ids=[row.name for row in table])
    def test(row: Bad, is_traced: bool) -> None:
        def call(*arguments: Any) -> None:
            row.call(*arguments)

        message = refusal(lambda: (jax.jit(call) if is_traced else call)(*row.arguments), row.error)
        assert [fragment for fragment in row.says if not re.search(fragment, message)] == [], message

    return test


def refusal(call: Callable[[], object], error: type[Exception]) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)
