"""A description read at given positions: as booleans, as an additive bias, as the states of tiles.

Each reading evaluates what a mask says, of pairs or of tiles, on index arrays for every example, head, query and key.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxmask import bias as biases
from jaxmask import checks
from jaxmask.description import Description
from jaxmask.indices import Allowed, common, iota, is_static
from jaxmask.positions import Positions
from jaxmask.spans import Bounds, Span
from jaxmask.tiles import from_bounds

# The numbers of examples and heads, as far as the caller tells them.
Sizes = tuple[checks.Length | None, checks.Length | None]


# The offset is traced even where it is a Python int, so that decoding step by step compiles once.
@partial(jax.jit, static_argnames="sizes")
def dense(mask: Description, at: Positions, sizes: Sizes) -> Bool[Array, "batch heads q kv"]:
    """``True`` where a query may attend to a key. See :meth:`jaxmask.Mask.dense`."""
    if at.first is None and at.queries is None:
        # Else static positions would make all pairs a constant of the program.
        at = replace(at, first=jnp.int32(0))

    def allows(b: Any, h: Any) -> tuple[Allowed]:
        q, kv = at.of_queries(b, iota(at.query_length, 2)), iota(at.key_length, 3)
        with checks.traced_function("allows"):
            return (mask.allows(b, h, q, kv),)

    (allowed,), batch, heads = _read(mask, at, sizes, allows)
    return jnp.broadcast_to(allowed, (batch, heads, at.query_length, at.key_length))


@partial(jax.jit, static_argnames=("dtype", "sizes"))
def bias(mask: Description, at: Positions, dtype: np.dtype[Any], sizes: Sizes) -> Float[Array, "batch heads q kv"]:
    """``0`` where a query may attend to a key, else ``finfo(dtype).min``. See :meth:`jaxmask.Mask.bias`."""
    return biases.from_allowed(dense(mask, at, sizes), dtype)


def states(mask: Description, at: Positions, block: tuple[int, int], sizes: Sizes) -> Any:
    """EMPTY, PARTIAL or FULL for each tile, in NumPy where nothing is a JAX array. See :meth:`jaxmask.Mask.tiles`."""
    return (_states if is_static(mask, at) else _traced_states)(mask, at, block, sizes)


def _states(mask: Description, at: Positions, block: tuple[int, int], sizes: Sizes) -> Any:
    def bounds(b: Any, h: Any) -> Bounds:
        q = at.query_span(b, iota(at.query_length, 2), block[0])
        with checks.traced_function("tile_bounds"):
            return mask.tile_bounds(b, h, q, Span(iota(at.key_length, 3), 3, block[1]))

    (some, every), batch, heads = _read(mask, at, sizes, bounds)
    return from_bounds(some, every, (batch, heads, -(-at.query_length // block[0]), -(-at.key_length // block[1])))


_traced_states = jax.jit(_states, static_argnums=(2, 3))


def _read(
    mask: Description, at: Positions, sizes: Sizes, look: Callable[[Any, Any], tuple[Allowed, ...]]
) -> tuple[tuple[Allowed, ...], checks.Length, checks.Length]:
    """What ``look(b, h)`` says of all examples and heads, and how many of them it tells apart."""
    batch, heads, _ = mask.shape
    for name, size in at.batches.items():
        if size != 1 and batch not in (1, size):
            raise ValueError(f"{name} is for a batch of {size}, but {mask!r} for one of {batch}")
    batch = at.batch if batch == 1 else batch
    for name, told, size in (("batch", sizes[0], batch), ("heads", sizes[1], heads)):
        if told is not None and size not in (1, told):
            raise ValueError(f"{name} is {told}, but {mask!r} is for {size}")
    unknown = [axis for axis, size in enumerate((batch, heads)) if size == 1 and sizes[axis] is None]
    # An array tells the size of the batch, be it 1. An axis of one head tells nothing: arrays have it to fit any.
    if 0 in unknown and any(np.ndim(array) > 0 for array in jax.tree.leaves((mask, at))):
        unknown.remove(0)
    b, h = iota(sizes[0] or batch, 0), iota(sizes[1] or heads, 1)
    answers = look(b, h)
    if unknown and not all(part.shape_is_complete for part in mask.parts()):
        names = [("batch", "heads")[axis] for axis in unknown if depends(look, b, h, axis)]
        if names:
            raise ValueError(
                f"{mask!r} looks at its index of {' and '.join(names)}, but nothing says how many there are: give the "
                f"size, as by Predicate(fn, {names[0]}=…) or by {names[0]}= where the mask is read, or combine it with "
                "a mask that has it"
            )
    shapes = [np.shape(part) for part in answers if np.ndim(part) == 4]
    return answers, common(batch, *(shape[0] for shape in shapes)), common(heads, *(shape[1] for shape in shapes))


def depends(look: Callable[..., Any], b: Any, h: Any, axis: int, *operands: Any) -> bool:
    """Whether ``look(b, h, *operands)`` depends on one of its indices: ``vmap`` over it makes a batch of answers."""

    def answer(index: Any, *operands: Any) -> Any:
        return look(b, index, *operands) if axis else look(index, h, *operands)

    over_index = jax.vmap(answer, (0, *(None for _ in operands)), None)
    try:
        jax.eval_shape(over_index, (h if axis else b)[None], *operands)
    except ValueError:
        return True
    return False
