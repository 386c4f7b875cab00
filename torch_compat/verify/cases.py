"""What the generated cases share: a call that runs in either framework, its shapes, and what it is drawn from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class Side:
    """A framework in which a case is called: its modules, its arrays and its dtype."""

    modeling_attn_mask_utils: Any
    masking_utils: Any
    array: Callable[[np.ndarray], Any]
    zeros: Callable[[tuple[int, ...], Any], Any]
    dtype: Any
    is_torch: bool

    def value(self, argument: Any) -> Any:
        """An argument of a case as this side takes it."""
        if isinstance(argument, OnSide):
            return argument.on(self)
        return self.array(argument) if isinstance(argument, np.ndarray) else argument


class OnSide:
    """An argument that each side makes for itself."""

    def on(self, side: Side) -> Any:
        """The argument for the functions of ``side``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Embeds(OnSide):
    """A stand-in for ``inputs_embeds``, which is read for its shape and dtype alone."""

    batch_size: int
    query_length: int

    def on(self, side: Side) -> Any:
        return side.zeros((self.batch_size, self.query_length, 8), side.dtype)


@dataclass(frozen=True)
class Case:
    """One call of an operation, by Transformers' name for it.

    Args:
        operation: a function, or a method as ``"Class.method"``.
        dtype: of the results. It is not in ``arguments``.
        arguments, positional: of the call.
        converter: the arguments of the class, where the operation is a method.
        needs_dtype: whether the operation takes a dtype.
        unanswered: the oracles that have no answer. PyTorch refuses to subtract a bool mask from one, for example.
        known_difference: whether the installed Transformers is known to answer otherwise.
        module: where the operation is.
        is_numpy: whether JAX gets NumPy arrays in place of its own.
        grid: the indices (batch, head, query, key) at which a mask function is called.
    """

    operation: str
    dtype: str
    arguments: dict[str, Any]
    positional: tuple[Any, ...] = ()
    converter: tuple[bool, int | None] | None = None
    needs_dtype: bool = True
    unanswered: tuple[str, ...] = ()
    known_difference: bool = False
    module: Literal["modeling_attn_mask_utils", "masking_utils"] = "modeling_attn_mask_utils"
    is_numpy: bool = True
    grid: dict[str, np.ndarray] | None = None

    def describe(self) -> str:
        """The call with its inputs in full, so that a person can repeat it."""
        named = [f"{name}={_describe(value)}" for name, value in self.arguments.items()]
        arguments = ", ".join([*map(_describe, self.positional), *named])
        converter = "" if self.converter is None else f"{self.converter}"
        return f"{self.operation.replace('.', converter + '.')}({arguments}) in {self.dtype}"


def _describe(value: object) -> str:
    return f"{value.dtype}{value.tolist()}" if isinstance(value, np.ndarray) else repr(value)


@dataclass(frozen=True)
class Shape:
    """The sizes of a call: queries that come after ``past`` keys."""

    batch_size: int
    query_length: int
    past: int
    window: int

    @property
    def key_length(self) -> int:
        """The number of keys."""
        return self.past + self.query_length


PADDING = ("ones", "left", "right", "holes")


class Draw:
    """Random arguments for the cases of one operation in one dtype.

    Args:
        dtype: the name of the dtype.
        setting: decides shapes and structure. Another setting is another compilation.
        contents: decides what arrays hold.
    """

    def __init__(self, dtype: str, setting: np.random.Generator, contents: np.random.Generator) -> None:
        self.dtype, self.setting, self.contents = dtype, setting, contents

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return bool(self.setting.random() < probability)

    def one_of(self, *choices: Any) -> Any:
        """One of the choices, all equally likely."""
        return choices[self.setting.integers(len(choices))]

    def floats(self, *shape: int) -> np.ndarray:
        """Normally distributed numbers in the dtype."""
        return self.contents.standard_normal(shape).astype(DTYPES[self.dtype])

    def ints(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Numbers from ``low`` up to ``high``, exclusively."""
        return self.contents.integers(low, high, shape, np.int32)

    def mask(
        self, batch_size: int, length: int, dtypes: tuple[Any, ...] = (np.bool_,), kinds: tuple[str, ...] = PADDING
    ) -> np.ndarray:
        """A 2D mask of ones with padding on the left, on the right, or in between; or with a row of nothing else.

        ``"strange"`` is a mask with values that are neither 0 nor 1.
        """
        position = np.arange(length)
        pads = self.contents.integers(0, length + 1, size=(batch_size, 1))
        kind = str(self.contents.choice(kinds))
        values = {
            "ones": np.ones((batch_size, length)),
            "left": position >= pads,
            "right": position < length - pads,
            "holes": self.contents.random((batch_size, length)) < 0.7,
            "zero row": (np.arange(batch_size)[:, None] > 0) & (position >= 0),
            "strange": self.contents.choice([0, 1, 2, -1, 3], size=(batch_size, length)),
        }[kind]
        mask = np.asarray(values).astype(self.one_of(*dtypes))
        if kind == "strange" and mask.dtype == np.float32:
            # One plus an ulp rounds to one in the half precisions. Only there it may attend.
            mask[:, 0] = np.nextafter(np.float32(1), np.float32(2))
        return mask

    def mask_dtypes(self) -> tuple[Any, ...]:
        """The dtypes of masks that both frameworks have: JAX has no int64 outside of 64-bit mode."""
        return (np.bool_, np.int32, np.float32, *((np.int64,) if self.dtype == "float64" else ()))

    def mask_4d(self, batch_size: int, query_length: int, key_length: int) -> np.ndarray:
        """A 0/1 mask of four dimensions, in which half of the pairs may attend."""
        allowed = self.contents.random((batch_size, 1, query_length, key_length)) < 0.5
        return allowed.astype(self.one_of(*self.mask_dtypes()))
