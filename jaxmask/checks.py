"""What input is acceptable, and how to say no: every refusal names the argument, what came, what was expected.

To refuse, only shapes, dtypes and static values are looked at, never the contents of a JAX array, so each of these
answers at trace time and costs nothing in the compiled program.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import DTypeLike

P = ParamSpec("P")
R = TypeVar("R")

INT32_MAX = 2**31 - 1
# So many positions from 0 on differ from one another, and from a negative one, by what fits an int32.
MOST_POSITIONS = 2**30
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# The least number that is positive in float32, and that the XLA of a CPU does not take for 0.
POSITIVE = float(np.finfo(np.float32).tiny)

# What Python and NumPy say where a traced value is asked for its truth, as an index of a list, as a key.
_OF_VALUES = ("truth value", "scalar arrays", "0-dimensional arrays", "unhashable type")

# A length, or a symbolic dimension of ``jax.export`` standing for one.
Length = Any

# The sizes (batch, heads, kv) of a mask.
Shape = tuple[Length, Length, Length]


def integer(name: str, value: object, minimum: int, maximum: int = INT32_MAX) -> int:
    """``value`` as a Python int between ``minimum`` and ``maximum``."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, jax.errors.JAXTypeError):
        hint = "; it is static, so that its value must be known while tracing" if is_traced(value) else ""
        raise TypeError(f"{name} must be a Python int, got {describe(value)}{hint}") from None
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} must {_limit(minimum, maximum)}, got {describe(number)}")
    return number


def real(name: str, value: Any, least: float = -math.inf, hint: str = "") -> float:
    """``value`` as a Python float that float32 can hold, of at least ``least``."""
    if is_array(value) or isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name} must be a Python float, got {describe(value)}{hint}")
    # Compared by Python: a float16 of NumPy would take the limit for infinity, and an int may be beyond any float.
    value = value.item() if isinstance(value, np.generic) else value
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32, got {describe(value)}")
    if value < least:
        limit = "positive" if least == POSITIVE else f"at least {least:g}"
        raise ValueError(f"{name} must be {limit}, got {describe(value)}")
    return float(value)


def _limit(minimum: int, maximum: int) -> str:
    if maximum < INT32_MAX:
        return f"be at least {minimum} and at most {maximum}, for differences of positions to fit an int32"
    return "fit an int32" if minimum == -INT32_MAX else f"be at least {minimum} and fit an int32"


def scalar(name: str, value: Any, minimum: int, maximum: int = INT32_MAX, ranks: tuple[int, ...] = (0,)) -> Any:
    """``value`` as a Python int, or as an int32 array of one of ``ranks``, between ``minimum`` and ``maximum``."""
    if not is_array(value):
        return integer(name, value, minimum, maximum)
    return int32(name, array(name, value, "i", *ranks), minimum, maximum)


def int32(name: str, value: Any, minimum: int, maximum: int = INT32_MAX) -> Any:
    """An array of integers as int32: beyond the limits refused in NumPy, and clipped to an int32 where traced."""
    if isinstance(value, np.ndarray):
        if value.size and not minimum <= value.min() <= value.max() <= maximum:
            raise ValueError(
                f"{name} must {_limit(minimum, maximum)}, got {describe(value)} from {value.min()} to {value.max()}"
            )
    elif isinstance(value, jax.Array) and jnp.iinfo(value.dtype).max > INT32_MAX:
        value = value.clip(max(-INT32_MAX, int(jnp.iinfo(value.dtype).min)), INT32_MAX)
    return value if value.dtype == np.int32 else value.astype(np.int32)


def in_range(name: str, value: Any, least: int, most: int) -> None:
    """Refuse a NumPy array with an element out of range. What is in a JAX array is not looked at."""
    if isinstance(value, np.ndarray) and value.size and not least <= value.min() <= value.max() <= most:
        raise ValueError(
            f"{name} must be from {least} to {most}, got {describe(value)} from {value.min()} to {value.max()}"
        )


def fits_int32(name: str, value: Any) -> None:
    """Refuse a NumPy array that JAX, without 64-bit mode, would cut in half."""
    if isinstance(value, np.ndarray):
        int32(name, value, -INT32_MAX)


def length(name: str, value: Length) -> Length:
    """A static length of at least 1; a symbolic dimension of ``jax.export`` is one by definition."""
    if jax.export.is_symbolic_dim(value):
        return value
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is a shape and must be a Python int, got {describe(value)}; a length that changes at run time "
            "belongs into an offset or a padding mask of fixed size"
        )
    return integer(name, value, 1, MOST_POSITIONS)


def block(value: object) -> tuple[int, int]:
    """The number of queries and of keys in a tile: a pair of Python ints, or one for both."""
    sizes = value if isinstance(value, tuple) else (value, value)
    if isinstance(value, list) or len(sizes) != 2:
        raise TypeError(f"block must be a Python int, or a tuple of two (queries, keys), got {describe(value)}")
    queries, keys = (integer("block", size, minimum=1) for size in sizes)
    return queries, keys


def has_64_bits() -> bool:
    """Whether 64-bit mode is on, here and now: it may be switched for the process, a thread or a block."""
    return jnp.result_type(jnp.float64) == jnp.float64


def is_traced(value: object) -> bool:
    """Whether ``value`` is an array in the making, whose contents cannot be looked at."""
    return isinstance(value, Tracer)


def known(mask: Any, claim: Callable[[Any], Any] = lambda mask: mask) -> bool:
    """Whether a claim about all elements of a mask is known to be true: what is traced is not looked at."""
    if is_traced(mask):
        return False
    # In the middle of a trace, too.
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(claim(mask)))


def as_static(value: Any) -> Any:
    """A NumPy integer or bool as that of Python; anything else as it is."""
    return value.item() if isinstance(value, np.integer | np.bool_) else value


def hints(**instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Refuse keywords that people know from elsewhere, and say what to write instead."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs.keys() & instead.keys():
                raise TypeError(f"{function.__name__} takes no {name}: write {instead[name]}")
            return function(*args, **kwargs)

        return call

    return decorate


def takes_indices(name: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with ``(b, h, q, kv)``."""
    try:
        inspect.signature(function).bind(*"bhqk")
    except TypeError as error:
        raise TypeError(f"{name} must be a function of (b, h, q, kv), but the one given has {error}") from None
    except ValueError:  # one that is not written in Python says nothing of its arguments
        pass


@contextmanager
def traced_function(name: str) -> Generator[None]:
    """Say what a user's function did that no traced function can, where JAX says so."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # The truth of one traced value is an error of JAX, the truth of several is another.
        if not isinstance(error, jax.errors.JAXTypeError) and not any(words in str(error) for words in _OF_VALUES):
            raise
        raise TypeError(
            f"the function {name} is traced, so that the values of its indices are not known: use jnp.where in place "
            "of if, & and | in place of and and or, and jnp.asarray(table)[index] to read a table; it failed by "
            f"{type(error).__name__}"
        ) from error


def is_array(value: object) -> bool:
    """Whether ``value`` can be traced: a JAX or NumPy array, or the shape of one."""
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def contents(**arguments: Any) -> None:
    """Refuse the shape of an array where its contents are needed."""
    for name, value in arguments.items():
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(
                    f"{name} must hold arrays, got the shape of one, {describe(leaf)}: fill it with an array, or ask "
                    "for the shape of the result by jax.eval_shape(function, mask)"
                )


def array(name: str, value: Any, kinds: str, *ranks: int, hint: str = "") -> Any:
    """``value``, a JAX or NumPy array whose dtype is of one of ``kinds`` and whose rank is one of ``ranks``.

    ``kinds`` holds ``b`` for bool, ``i`` for integers, ``f`` for floats; without ``ranks`` every rank will do.
    ``hint`` says how an array of another dtype becomes one of these.
    """
    if not is_array(value):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {describe(value)}{_array_hint(value)}")
    families = {"b": ("bool", jnp.bool_), "i": ("integer", jnp.integer), "f": ("float", jnp.floating)}
    if not any(jnp.issubdtype(value.dtype, families[kind][1]) for kind in kinds):
        expected = " or ".join(families[kind][0] for kind in kinds)
        raise TypeError(f"{name} must be {expected}, got {describe(value)}{hint}")
    if jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits < 16:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {describe(value)}; cast it by astype"
        )
    if ranks and value.ndim not in ranks:
        expected = " or ".join(str(rank) for rank in ranks)
        hint = f"; for a single example, give {name}[None]" if value.ndim == 1 and ranks == (2,) else ""
        raise ValueError(f"{name} must have rank {expected}, got {describe(value)}{hint}")
    return value


def some(name: str, value: Any, what: str) -> Any:
    """``value``, an array that is not without ``what``, which its last axis has."""
    if value.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one {what}, got {describe(value)}")
    return value


def bools(name: str, array: Any) -> Any:
    """An array of bools, or of integers 0 and 1, as bools; a ``ValueError`` where, in NumPy, there are other integers.

    In a JAX array, all integers but 0 are true.
    """
    if array.dtype == np.bool_:
        return array
    if isinstance(array, np.ndarray) and array.size and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(
            f"{name} must be bool, or of 0 and 1, got {describe(array)} from {array.min()} to {array.max()}; "
            "make it bool by `ids != pad` from token ids, or by `bias == 0` from an additive bias"
        )
    return array != 0


def key(name: str, value: Any) -> Any:
    """``value``, one key of ``jax.random``, of the new kind or the old."""
    is_key = isinstance(value, jax.Array) and (
        (jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.ndim == 0)
        or (value.dtype == jnp.uint32 and value.ndim == 1)
    )
    if not is_key:
        raise TypeError(f"{name} must be one key, as of jax.random.key(0), got {describe(value)}")
    return value


def float_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """``dtype`` as a NumPy dtype, floating and available in this process."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be a JAX floating dtype such as jnp.float32, got {dtype!r}") from None
    if not jnp.issubdtype(resolved, jnp.floating):
        raise TypeError(
            f"dtype must be floating, for only a float has a minimum that softmax takes to 0, got {resolved}"
        )
    if jnp.finfo(resolved).bits < 16:
        raise TypeError(
            f"dtype must be float16, bfloat16, float32 or float64, got {resolved}: the minimum of so narrow a float "
            "may be too near to 0 for softmax to ignore it"
        )
    if resolved == jnp.float64 and not has_64_bits():
        raise ValueError(
            "dtype float64 is switched off in this process, and JAX would compute in float32 instead: "
            'switch it on by jax.config.update("jax_enable_x64", True), or ask for float32'
        )
    return resolved


def at_least_float32(dtype: DTypeLike) -> np.dtype[Any]:
    """``dtype``, or float32 where it is narrower. JAX's strict mode promotes neither."""
    return np.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of ``shape`` broadcasts to ``target``."""
    trailing = target[len(target) - len(shape) :] if len(shape) <= len(target) else None
    return trailing is not None and all(size in (1, wanted) for size, wanted in zip(shape, trailing, strict=True))


def describe(value: object) -> str:
    """``value`` in a few words, for an error message: ``int32[2, 5]``, ``'causal'``, ``a Causal``."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if shape is not None and dtype is not None:
        return f"{_torch_prefix(value)}{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "an int of more than 40 digits"  # Python refuses to write out one of thousands
    return shown(repr(value)) if isinstance(value, int | float | str | None | tuple) else f"a {type(value).__name__}"


def shown(text: str, most: int = 200) -> str:
    """``text``, which may come from anywhere, in a message: escaped where it is not printable, and cut where long."""
    cut = text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in cut)


def several(texts: Sequence[str], most: int = 12) -> str:
    """``texts`` in a message, of which only the first are given where there are many."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "; ".join([*texts[:most], *more])


def _torch_prefix(value: object) -> str:
    return "a torch tensor " if _is_torch(value) else ""


def _array_hint(value: object) -> str:
    if _is_torch(value):
        return "; hand it over by torch_compat.to_jax(tensor)"
    if isinstance(value, list | tuple):
        return "; wrap it in jnp.asarray"
    return ""


def _is_torch(value: object) -> bool:
    # By name, for jaxmask never imports torch.
    return type(value).__module__.partition(".")[0] == "torch"
