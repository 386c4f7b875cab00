"""Functions of the indices of a pair, as a kernel evaluates them: masks, biases, dropout.

A kernel has no arrays but its operands, from which it reads single elements. So a function is traced for one pair, all
scalars. What does not depend on the indices is computed before the kernel, and arrays that it leaves are operands. What
does is evaluated in the kernel, for all pairs of a tile at once, and gathers become reads of operands.
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxmask import checks

# What is evaluated element by element: the names of primitives of JAX that Pallas has for Triton.
_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp clz
    convert_element_type cos cosh div eq exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max
    min mul ne neg nextafter not or population_count pow rem rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())
# Those of them that float32 would change.
_OF_BITS = frozenset({"bitcast_convert_type", "convert_element_type", "nextafter", "select_n"})
_REDUCE: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_and": jnp.bitwise_and,
    "reduce_or": jnp.bitwise_or,
    "reduce_max": jnp.maximum,
    "reduce_min": jnp.minimum,
    "reduce_prod": jnp.multiply,
    "reduce_sum": jnp.add,
}
# What only moves values from one place to another.
_MOVE: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": lambda x, *, shape, broadcast_dimensions, **_: np.broadcast_to(
        x.reshape(
            [x.shape[broadcast_dimensions.index(i)] if i in broadcast_dimensions else 1 for i in range(len(shape))]
        ),
        shape,
    ),
    "concatenate": lambda *xs, dimension, **_: np.concatenate(xs, dimension),
    "copy": lambda x, **_: x,
    "copy_p": lambda x, **_: x,
    "expand_dims": lambda x, *, dimensions, **_: np.expand_dims(x, dimensions),
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, *, dimensions, **_: np.flip(x, dimensions),
    "slice": lambda x, *, start_indices, limit_indices, strides, **_: x[
        tuple(map(slice, start_indices, limit_indices, strides or (None,) * x.ndim))
    ],
    "split": lambda x, *, sizes, axis, **_: np.split(x, np.cumsum(sizes)[:-1], axis),
    "squeeze": lambda x, *, dimensions, **_: x.squeeze(tuple(dimensions)),
    "stack": lambda *xs, axis, **_: np.stack(xs, axis),
    "stop_gradient": lambda x, **_: x,
    "unstack": lambda x, *, axis, **_: list(np.moveaxis(x, axis, 0)),
    "transpose": lambda x, *, permutation, **_: x.transpose(permutation),
}
# What evaluates a program of its own, once.
_CALLS = frozenset(
    {"checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
)
# How many values a function may hold for a pair at once, such as the coordinates of a token.
_MOST_VALUES = 64


class UnsupportedError(Exception):
    """What keeps a kernel from evaluating a function, in words."""


class Operand(NamedTuple):
    """An array that a kernel has as an operand: its number, and its shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True, eq=False)
class _Result:
    """What a step computes from the indices: an array of values for a pair, in most steps a single one."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _Step(NamedTuple):
    """Arguments are results of other steps, operands, or constants."""

    apply: Callable[..., Any]
    arguments: list[Any]
    results: list[_Result]


# Reads the elements of an operand, which is flat, at an array of indices.
Read = Callable[[int, Any], Any]


@dataclass(frozen=True, eq=False)
class Pairwise:
    """A function of the indices of a pair, which holds no array.

    Args:
        indices: of example, head, query and key, as the steps name them.
        steps: what is computed, in this order.
        outputs: what is returned: a tuple of results, constants and operands of one element.
    """

    indices: list[_Result]
    steps: list[_Step]
    outputs: list[Any]

    def __call__(self, read: Read, *indices: Any) -> list[Any]:
        """The outputs for all pairs of index arrays that broadcast against each other, of any rank.

        Args:
            read: takes the number of an operand and the indices of its elements.
            *indices: of example, head, query and key, int32.
        """
        found: dict[_Result, Any] = {}

        def value(x: Any) -> Any:
            if isinstance(x, _Result):
                return found[x]
            if isinstance(x, Operand):
                return _array([_read(read, x, at) for at in np.ndindex(x.shape)], x.shape)
            return _array([np.asarray(x)[at][()] for at in np.ndindex(np.shape(x))], np.shape(x))

        for result, index in zip(self.indices, indices, strict=True):
            found[result] = _array([jnp.asarray(index, jnp.int32)], ())
        for step in self.steps:
            outputs = step.apply(read, value, *step.arguments)
            found.update(zip(step.results, outputs, strict=True))
        return [value(x).reshape(())[()] for x in self.outputs]


def trace(function: Callable[..., tuple[Any, ...]]) -> tuple[Pairwise, list[Any]]:
    """A function of four indices as a kernel evaluates it, and its operands: arrays of any rank.

    Raises:
        UnsupportedError: it does what a kernel cannot do, such as to sort.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        closed = jax.make_jaxpr(function)(index, index, index, index)
    except Exception as error:  # whatever a function of the user's raises: it was asked for index arrays before
        raise UnsupportedError(f"it cannot be asked for a single pair: {str(error).partition(chr(10))[0]}") from error
    indices = [_Result((), np.dtype(np.int32)) for _ in range(4)]
    tracing = _Tracing()
    outputs = [tracing.known(x) for x in tracing.run(closed.jaxpr, closed.consts, indices)]
    for output in outputs:
        if prod(np.shape(output)) != 1:
            raise UnsupportedError(f"for a single pair it must give a single value, not shape {np.shape(output)}")
    return Pairwise(indices, tracing.steps, outputs), tracing.operands


class _Tracing:
    """The steps and operands that are found so far."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.operands: list[Any] = []
        # What computes results of constants alone: the kernel folds these, unless arrays need them before.
        self._constants: dict[_Result, tuple[Any, list[Any], int]] = {}

    def known(self, x: Any) -> Any:
        """A result, a constant, or an array as an operand."""
        if isinstance(x, _Result) or (np.ndim(x) == 0 and not isinstance(x, jax.Array)):
            return x
        i = next((i for i, operand in enumerate(self.operands) if operand is x), len(self.operands))
        if i == len(self.operands):
            self.operands.append(x)
        return Operand(i, np.shape(x), jnp.result_type(x))

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], place: str = "") -> list[Any]:
        """The outputs of a program: arrays where they do not depend on the indices, else results of steps.

        ``place`` is where the user's code asks for the program. Inside of one it says another place, of the first use.
        """
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def read(atom: Any) -> Any:
            if not isinstance(atom, Literal):
                return values[atom]
            aval: Any = atom.aval
            return np.asarray(atom.val, aval.dtype)[()]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            found = self.equation(equation, inputs, place or _place(equation))
            values.update(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[Any], place: str) -> Sequence[Any]:
        """The outputs of one equation."""
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params["call_jaxpr" if "call_jaxpr" in params else "jaxpr"]
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, [])
            return self.run(closed.jaxpr, closed.consts, inputs, place)
        reads = name in ("gather", "dynamic_slice")
        if reads and isinstance(inputs[0], _Result) and inputs[0] in self._constants:
            # An array that the function makes of constants is one before the kernel.
            inputs = [self._before(inputs[0]), *inputs[1:]]
        depends = any(isinstance(x, _Result) and x not in self._constants for x in inputs)
        are_constants = bool(inputs) and not any(isinstance(x, jax.Array) or np.ndim(x) for x in inputs)
        is_many = any(prod(v.aval.shape) > _MOST_VALUES for v in equation.outvars)
        if not depends and (is_many or not are_constants):
            return _bound(equation, [self._before(x) for x in inputs])
        results = [_Result(v.aval.shape, v.aval.dtype) for v in equation.outvars]
        if name == "cond":
            branches = [self.run(branch.jaxpr, branch.consts, inputs[1:], place) for branch in params["branches"]]
            for result, *answers in zip(results, *branches, strict=True):
                self.add(name, place, _each(_chosen), [inputs[0], *answers], [result])
            return results
        if any(jnp.issubdtype(result.dtype, jnp.complexfloating) for result in results):
            raise UnsupportedError(f"a GPU kernel has no complex numbers{place}")
        if name == "select_n" and len(inputs) > 3:
            apply = _each(_chosen)
        elif name in ELEMENTWISE:
            apply = _each(functools.partial(_bind, equation.primitive, params))
        elif name in _MOVE:
            apply = _with_values(functools.partial(_MOVE[name], **params), equation.primitive.multiple_results)
        elif name in _REDUCE:
            apply = _with_values(functools.partial(_reduce, _REDUCE[name], axes=params["axes"]))
        elif reads and not isinstance(inputs[0], _Result):
            take = _gather if name == "gather" else _dynamic_slice
            apply = functools.partial(take, **params, shape=results[0].shape)
        else:
            what = " of what it computes" if reads else ""
            raise UnsupportedError(f"a GPU kernel has no {name!r}{what}{place}")
        self.add(name, place, apply, inputs, results, reads_first=reads)
        if not depends:
            self._constants.update({result: (equation, inputs, i) for i, result in enumerate(results)})
        return results

    def _before(self, x: Any) -> Any:
        """A value as it is computed before the kernel."""
        if not isinstance(x, _Result):
            return x
        equation, inputs, i = self._constants[x]
        return _bound(equation, [self._before(each) for each in inputs])[i]

    def add(
        self, name: str, place: str, apply: Any, inputs: list[Any], results: list[_Result], *, reads_first: bool = False
    ) -> None:
        """A step; ``reads_first`` where it reads elements of its first argument, and does not take it as a whole."""
        arguments = [self.known(x) for x in inputs]
        for x in (*arguments[reads_first:], *results):
            if prod(np.shape(x)) > _MOST_VALUES:
                raise UnsupportedError(
                    f"a GPU kernel reads single elements of an array, and {name!r} uses "
                    f"{list(np.shape(x))} of them at once{place}"
                )
        self.steps.append(_Step(apply, arguments, results))


def _bound(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    found = equation.primitive.bind(*inputs, **equation.params)
    return found if equation.primitive.multiple_results else [found]


def _array(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An array of blocks of the kernel, one for each of the values that a function holds for a pair."""
    array = np.empty(len(values), object)
    for i, each in enumerate(values):
        array[i] = each
    return array.reshape(shape)


def _with_values(function: Callable[..., Any], returns_many: bool = False) -> Callable[..., list[Any]]:
    def apply(read: Read, value: Callable[[Any], Any], *arguments: Any) -> list[Any]:
        found = function(*map(value, arguments))
        return list(found) if returns_many else [found]

    return apply


def _each(function: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Applied to each of the values for a pair; a single one serves all."""

    def apply(*values: Any) -> Any:
        shape = np.broadcast_shapes(*(x.shape for x in values))
        aligned = [np.broadcast_to(x, shape) for x in values]
        return _array([function(*(x[at] for x in aligned)) for at in np.ndindex(shape)], shape)

    return _with_values(apply)


def _bind(primitive: Any, params: dict[str, Any], *blocks: Any) -> Any:
    """A primitive of blocks. Triton has not all of them for bools and in half precision."""
    blocks = tuple(_broadcast(*blocks))
    dtype = blocks[-1].dtype
    if dtype == jnp.bool_ and primitive.name in ("max", "min"):
        return (jnp.logical_or if primitive.name == "max" else jnp.logical_and)(*blocks)
    if dtype not in (jnp.float16, jnp.bfloat16) or primitive.name in _OF_BITS:
        return primitive.bind(*blocks, **params)
    found = primitive.bind(*(block.astype(jnp.float32) for block in blocks), **params)
    return found.astype(dtype) if jnp.issubdtype(found.dtype, jnp.floating) else found


def _broadcast(*blocks: Any) -> list[Any]:
    shape = jnp.broadcast_shapes(*map(np.shape, blocks))
    return [jnp.broadcast_to(block, shape) for block in blocks]


def _chosen(index: Any, *answers: Any) -> Any:
    index, chosen, *others = _broadcast(index, *answers)
    for i, answer in enumerate(others, start=1):
        chosen = jnp.where(index == jnp.asarray(i).astype(index.dtype), answer, chosen)
    return chosen


def _reduce(function: Callable[[Any, Any], Any], values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    values = values.transpose(*kept, *axes)
    shape = values.shape[: len(kept)]
    rows = values.reshape(-1, prod(values.shape[len(kept) :]))
    return _array([functools.reduce(lambda a, b: function(*_broadcast(a, b)), row) for row in rows], shape)


def _read(read: Read, operand: Operand, at: Sequence[Any]) -> Any:
    """The elements of an operand at an index for each of its axes."""
    index: Any = np.int32(0)
    for i, stride in zip(at, _strides(operand.shape), strict=True):
        index = index + i * np.int32(stride)
    return read(operand.number, index)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _wide(start: Any) -> Any:
    """An index in a type that can hold any other of its array."""
    return start.astype(jnp.int32) if start.dtype.itemsize < 4 else start


def _clip(start: Any, size: int) -> Any:
    """A start of which no element lies outside. It is 0 where there is no other."""
    return np.int32(0) if size == 1 else jnp.clip(_wide(start), 0, size - 1).astype(jnp.int32)


def _dynamic_slice(
    read: Read, value: Any, operand: Operand, *starts: Any, slice_sizes: Sequence[int], shape: Any, **_: Any
) -> list[Any]:
    first = [
        _clip(value(start)[()], size - taken + 1)
        for start, size, taken in zip(starts, operand.shape, slice_sizes, strict=True)
    ]
    return [
        _array(
            [
                _read(read, operand, [start + np.int32(i) for start, i in zip(first, at, strict=True)])
                for at in np.ndindex(*shape)
            ],
            shape,
        )
    ]


def _gather(
    read: Read,
    value: Any,
    operand: Operand,
    indices: Any,
    *,
    dimension_numbers: Any,
    slice_sizes: Sequence[int],
    mode: Any,
    fill_value: Any,
    shape: tuple[int, ...],
    **_: Any,
) -> list[Any]:
    numbers = dimension_numbers
    of_batch = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    inside = [
        axis
        for axis in range(len(operand.shape))
        if axis not in numbers.collapsed_slice_dims and axis not in numbers.operand_batching_dims
    ]
    fills = lax.GatherScatterMode.from_any(mode) == lax.GatherScatterMode.FILL_OR_DROP
    starts = value(indices)

    def element(at: tuple[int, ...]) -> Any:
        batch = tuple(at[axis] for axis in of_batch)
        place: list[Any] = [np.int32(0)] * len(operand.shape)
        is_inside: Any = True
        for axis, start in zip(numbers.start_index_map, map(_wide, starts[batch]), strict=True):
            last = operand.shape[axis] - slice_sizes[axis]
            is_inside = is_inside & (start >= 0) & (start <= last)
            place[axis] = _clip(start, last + 1)
        for axis, of_index in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            place[axis] = np.int32(batch[of_index])
        for axis, of_output in zip(inside, numbers.offset_dims, strict=True):
            place[axis] = place[axis] + np.int32(at[of_output])
        found = _read(read, operand, place)
        if not fills:
            return found
        missing = _missing(operand.dtype) if fill_value is None else fill_value
        found, is_inside = _broadcast(found, is_inside)
        return jnp.where(is_inside, found, jnp.full_like(found, missing))

    return [_array([element(at) for at in np.ndindex(*shape)], shape)]


def _missing(dtype: Any) -> Any:
    """What ``lax.gather`` gives for an element that is not there."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    if dtype == np.bool_:
        return True
    limits = jnp.iinfo(dtype)
    return limits.min if jnp.issubdtype(dtype, jnp.signedinteger) else limits.max


def _place(equation: Any) -> str:
    """Where the user's code asks for an equation."""
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        if not frame.file_name.startswith(_LIBRARIES):
            return f", which is asked for at {os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""


# Where code is that no user wrote.
_LIBRARIES = (*(os.path.dirname(str(module.__file__)) + os.sep for module in (jax, np, checks)), "<frozen", "<string>")
