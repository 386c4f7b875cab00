"""How the static part of a pytree is written into a program that ``jax.export`` saves: as JSON.

A saved program may come from anywhere. To read one makes numbers and names, and runs no code of it.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from typing import Any

from jax import export

from jaxmask import checks


def register(kind: type[Any], from_children: Callable[[Any, Iterable[Any]], Any]) -> None:
    """Let programs whose arguments or results are of a class be saved.

    Args:
        kind: a class that JAX knows as a pytree.
        from_children: makes an object of the static part and of what stands in the place of the others.
    """
    # A class that is defined again, as in a notebook, is not the one whose programs were saved.
    with suppress(ValueError):
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"{kind.__module__}.{kind.__qualname__}",
            serialize_auxdata=lambda static: _write(kind, static),
            deserialize_auxdata=lambda data: _read(kind, data),
            from_children=lambda aux_data, children: from_children(aux_data, children),
        )


def register_dataclass(kind: type[Any], *, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> None:
    """:func:`register` a dataclass that JAX knows by ``jax.tree_util.register_dataclass`` with these fields."""

    def from_children(static: Any, children: Iterable[Any]) -> Any:
        # Without its ``__init__``, for the children are no arrays here.
        made = object.__new__(kind)
        for name, value in (*zip(data_fields, children, strict=True), *zip(meta_fields, static, strict=True)):
            object.__setattr__(made, name, value)
        return made

    assert {field.name for field in fields(kind)} == {*data_fields, *meta_fields}
    register(kind, from_children)


def _write(kind: type[Any], static: Any) -> bytes:
    def refuse(value: Any) -> Any:
        raise ValueError(
            f"{kind.__name__} holds {checks.describe(value)}, which cannot be saved with a program: close over it in "
            "the function that is exported, and pass arrays alone"
        )

    return json.dumps(static, default=refuse).encode()


def _read(kind: type[Any], data: bytes) -> Any:
    try:
        return _as_tuples(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the saved program has no {kind.__name__} that can be read: {error}") from error


def _as_tuples(value: Any) -> Any:
    """Lists as tuples, as they were before they were written."""
    if isinstance(value, list):
        return tuple(map(_as_tuples, value))
    if value is None or isinstance(value, int | str):
        return value
    raise ValueError(f"it holds {checks.describe(value)}")
