"""A linear function whose transpose is given, under every transformation of JAX.

``jax.custom_derivatives.linear_call`` is that, but for ``jax.vmap`` and for derivatives in its constants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# The operands of a primitive may be what stands for an array in a transformation.
Function = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Linear:
    """A function of constants and arrays that is linear in the arrays.

    Args:
        function: what is computed.
        transposed: a function of the constants and the cotangents of the results, which returns those of the arrays.
        definition, transposed_definition: the same two for JAX to differentiate, as often as it likes.
    """

    function: Function
    transposed: Function
    definition: Function
    transposed_definition: Function

    @property
    def transpose(self) -> "Linear":
        """The function from cotangents of the results to those of the arrays."""
        return Linear(self.transposed, self.function, self.transposed_definition, self.definition)

    def __call__(self, constants: Sequence[Any], arrays: Sequence[Any], like: Sequence[Any]) -> list[Any]:
        """The results, each of the type of the one in ``like``."""
        return self.bind(constants, arrays, tuple(map(jax.typeof, like)))

    def bind(self, constants: Sequence[Any], arrays: Sequence[Any], types: tuple[Any, ...]) -> list[Any]:
        """The results, of these types, as an operation of the program that is traced."""
        return _linear.bind(*constants, *arrays, linear=self, count=len(constants), types=types)


def _compute(*operands: Any, linear: Linear, count: int, types: Any) -> list[Any]:
    return list(linear.function(operands[:count], operands[count:]))


def _differentiate(primals: Any, tangents: Any, *, linear: Linear, count: int, types: Any) -> Any:
    """Along the arrays it is itself; along the constants it is what JAX makes of the definition."""
    constants, arrays = primals[:count], primals[count:]
    results = linear.bind(constants, arrays, types)
    out = [ad.Zero(x) for x in types]
    if any(not isinstance(t, ad.Zero) for t in tangents[count:]):
        out = linear.bind(constants, [ad.instantiate_zeros(t) for t in tangents[count:]], types)
    moving = [i for i, t in enumerate(tangents[:count]) if not isinstance(t, ad.Zero)]
    if moving:

        def of_moving(*values: Any) -> Sequence[Any]:
            merged = list(constants)
            for i, value in zip(moving, values, strict=True):
                merged[i] = value
            return tuple(linear.definition(merged, arrays))

        more = jax.jvp(of_moving, [constants[i] for i in moving], [tangents[i] for i in moving])[1]
        out = [b if isinstance(a, ad.Zero) else a + b for a, b in zip(out, more, strict=True)]
    return results, out


def _transpose(cotangents: Any, *operands: Any, linear: Linear, count: int, types: Any) -> list[Any]:
    constants, arrays = operands[:count], operands[count:]
    into = tuple(x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in arrays)
    found = linear.transpose.bind(constants, [ad.instantiate_zeros(ct) for ct in cotangents], into)
    return [None] * count + [ct if ad.is_undefined_primal(x) else None for ct, x in zip(found, arrays, strict=True)]


def _batch(operands: Any, axes: Any, *, linear: Linear, count: int, types: Any) -> Any:
    """Linear in a batch of arrays, too."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    in_axes = [None if axis is None else 0 for axis in axes[:count]]
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands[:count], axes[:count], strict=True)
    ]
    arrays = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands[count:], axes[count:], strict=True)
    ]

    def batched(function: Function) -> Function:
        return lambda constants, arrays: jax.vmap(
            lambda c, x: tuple(function(c, x)), in_axes=(in_axes, 0), axis_size=size
        )(list(constants), list(arrays))

    of_all = Linear(
        *map(batched, (linear.function, linear.transposed, linear.definition, linear.transposed_definition))
    )
    types = jax.make_jaxpr(of_all.function)(moved, arrays).out_avals
    return of_all.bind(moved, arrays, tuple(types)), [0] * len(types)


_linear = Primitive("linear_with_transpose")
_linear.multiple_results = True
_linear.def_impl(partial(jax.jit, static_argnames=("linear", "count", "types"))(_compute))
_linear.def_abstract_eval(lambda *_, types, **__: types)
mlir.register_lowering(_linear, mlir.lower_fun(_compute, multiple_results=True))
ad.primitive_jvps[_linear] = _differentiate
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
