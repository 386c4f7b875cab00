"""Ring attention: keys and values go around the devices, and each joins its attention to those that it has at a time.

For sequences whose keys are too many for one device. It is computed by the ``"blocked"`` implementation. Parts are
joined by their log-sum-exp (https://arxiv.org/abs/2310.01889), and the backward pass goes around once more with that of
all keys, so that nothing is computed a second time but the weights, as on one device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxmask import checks
from jaxmask.kernels import blocked, scores
from jaxmask.kernels.call import Call
from jaxmask.spmd.part import at_keys, closed_over

Carry = TypeVar("Carry")
Tree = TypeVar("Tree")

# The output, and the two parts of the log-sum-exp, as of `blocked.sums`.
Sums = tuple[Array, Array, Array]


@dataclass(frozen=True)
class _Way:
    """Where keys go: along these axes of the mesh, to each device from the one so many before it, around, in order."""

    axes: tuple[str, ...]
    shifts: tuple[int, ...]

    def fold(self, step: Callable[[Carry, Tree, Any, int], Carry], carry: Carry, travelling: Tree) -> Carry:
        """Fold ``step(carry, travelling, shift, by)`` over the stops, the first of which is at home.

        What travels on is under way while it is used. What a step makes of it must travel ``by`` so many devices after
        it; after the last it is not at home yet.
        """
        stops = (0, *self.shifts)
        breaks = [i for i in range(1, len(stops)) if stops[i] != stops[i - 1] + 1]
        for first, end in zip((0, *breaks), (*breaks, len(stops)), strict=True):
            start = stops[first]

            def body(i: Any, state: tuple[Carry, Tree], start: int = start) -> tuple[Carry, Tree]:
                carry, here = state
                following = self.hop(here, 1)
                return step(carry, here, np.int32(start) + i, 1), following

            # A loop, so that the program is as long for thousands of devices as for two.
            if end - first > 1:
                carry, travelling = lax.fori_loop(np.int32(0), np.int32(end - first - 1), body, (carry, travelling))
            last = stops[end - 1]
            by = stops[end] - last if end < len(stops) else 0
            following = self.hop(travelling, by)
            carry, travelling = step(carry, travelling, np.int32(last), by), following
        return carry

    def hop(self, tree: Tree, by: int) -> Tree:
        """Everything from the device so many before."""
        count = lax.axis_size(self.axes)
        if by == 0:
            return tree
        pairs = [(source, (source + by) % count) for source in range(count)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, pairs), tree)

    def home(self, tree: Tree) -> Tree:
        """Everything from the last stop to where it set out."""
        return self.hop(tree, lax.axis_size(self.axes) - self.shifts[-1]) if self.shifts else tree

    def part(self, call: Call, key: Any, value: Any, shift: Any) -> Call:
        """The call for the keys of the shard so many before this device's own."""
        count, shards = np.int32(key.shape[1]), np.int32(lax.axis_size(self.axes))
        source = lax.rem(lax.axis_index(self.axes) - shift + shards, shards)
        slots = source * count + np.arange(count, dtype=np.int32)
        return replace(at_keys(call, key, value, slots), sinks=None)


def ring(call: Call, axes: tuple[str, ...], shifts: Sequence[int]) -> Any:
    """What a call for the queries at hand asks for, whose keys and values are those of this device.

    Args:
        call: of which query, key and value are those of this device.
        axes: names of axes of the mesh.
        shifts: of how many devices before its own, around, some device needs keys.

    Raises:
        ValueError: a function of the mask or the bias closes over a traced array.
    """
    for x in closed_over(call):
        if checks.is_traced(x):
            raise ValueError(
                "context_parallel='ring' cannot do this: a function of the mask or the bias closes over "
                f"{checks.describe(x)}, which is traced; hand it over, as jax.tree_util.Partial(function, array), "
                "which calls function(array, b, h, q, kv)"
            )
    call = blocked.vary_alike(call)
    leaves, structure = jax.tree.flatten(replace(call, key=None, value=None, sinks=None))
    program = _Program(
        _Way(axes, tuple(shifts)), structure, tuple(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
    )
    floats, others = (
        [x for x, yes in zip(leaves, program.is_float, strict=True) if yes == kind] for kind in (True, False)
    )
    found: Any = _attend(program, _Floats(floats, (call.key, call.value), call.sinks), others)
    return found if call.return_residual else found[0]


class _Floats(NamedTuple):
    """The arrays that have gradients: those that stay, the keys and values, which go around, and the sinks."""

    stay: list[Any]
    here: tuple[Any, Any]
    sinks: Any


@dataclass(frozen=True)
class _Program:
    """What the compiled program is specialised on: the way, and how a call is made of its arrays."""

    way: _Way
    structure: Any
    is_float: tuple[bool, ...]

    def part(self, stay: list[Any], others: list[Any], here: tuple[Any, Any], shift: Any) -> Call:
        """The call for the keys and values of the shard so many before this device's own."""
        remaining = {True: iter(stay), False: iter(others)}
        call: Call = jax.tree.unflatten(self.structure, [next(remaining[yes]) for yes in self.is_float])
        return self.way.part(call, *here, shift)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(program: _Program, floats: _Floats, others: list[Any]) -> tuple[Array, Array]:
    return _forward(program, floats, others)[0]


def _forward(program: _Program, floats: _Floats, others: list[Any]) -> tuple[tuple[Array, Array], Any]:
    out, highest, log_total = _sums(program, floats, others)
    residuals = out, highest, jnp.where(jnp.isneginf(log_total), 0, log_total)
    return (out.astype(floats.here[1].dtype), highest + log_total), (floats, others, residuals)


def _sums(program: _Program, floats: _Floats, others: list[Any]) -> Sums:
    def step(found: Sums, here: tuple[Array, Array], shift: Any, by: int) -> Sums:
        return _joined(found, blocked.sums(program.part(floats.stay, others, here, shift)))

    query = program.part(floats.stay, others, floats.here, np.int32(0)).query
    precise = checks.at_least_float32(query.dtype)
    of_rows = jnp.zeros_like(query, precise, query.shape[:3])
    out = jnp.zeros_like(query, precise, (*of_rows.shape, floats.here[1].shape[3]))
    found = program.way.fold(step, (out, of_rows + scores.lowest(precise), of_rows - jnp.inf), floats.here)
    if floats.sinks is not None:
        # A score without a value.
        found = _joined(found, (out, of_rows + floats.sinks.astype(precise), of_rows))
    return found


def _joined(one: Sums, other: Sums) -> Sums:
    """Attention to two sets of keys."""
    highest = jnp.maximum(one[1], other[1])
    weights = [jnp.exp(part - highest + log_total) for _, part, log_total in (one, other)]
    total = weights[0] + weights[1]
    out = one[0] * weights[0][..., None] + other[0] * weights[1][..., None]
    return out / jnp.where(total > 0, total, 1)[..., None], highest, jnp.log(total)


def _backward(program: _Program, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[_Floats, None]:
    floats, others, results = residuals
    # Or XLA would keep what came around in the forward pass, for which there may be no room.
    here = lax.optimization_barrier(floats.here)

    def step(carry: Any, here: tuple[Array, Array], shift: Any, by: int) -> Any:
        def to_call(arrays: Any) -> Call:
            return program.part(arrays[0], others, arrays[1], shift)

        found = blocked.pulled_back(to_call, (floats.stay, here), results, cotangents)
        staying, travelling = jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, found)
        return staying, program.way.hop(travelling, by)

    nothing = jax.tree.map(lambda x: jnp.zeros_like(x, checks.at_least_float32(x.dtype)), (floats.stay, here))
    found = program.way.fold(step, nothing, here)
    stay, here = jax.tree.map(lambda x, like: x.astype(like.dtype), found, (floats.stay, here))
    here = program.way.home(here)
    dsinks = None
    if floats.sinks is not None:
        out, highest, log_total = results
        delta = (cotangents[0].astype(out.dtype) * out).sum(-1) - cotangents[1]
        dsinks = -(jnp.exp(floats.sinks.astype(out.dtype) - highest - log_total) * delta).sum((0, 1))
        dsinks = dsinks.astype(floats.sinks.dtype)
    return _Floats(stay, here, dsinks), None


_attend.defvjp(_forward, _backward)
