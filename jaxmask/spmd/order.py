"""Orders of tokens over devices, which make the work of a mask even: an order says the position of each token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Int32, Integer, Shaped

from jaxmask import checks
from jaxmask.indices import is_static
from jaxmask.mask import Mask, refuse_no_mask
from jaxmask.spmd.plan import MOST_TILES, Plan, divisor_near, tile_of
from jaxmask.tiles import EMPTY

Ints = npt.NDArray[np.integer[Any]]
Order = Integer[Array | np.ndarray, "length"]

# Work within so much of the most even counts as even.
_EVEN = 1.05


def balanced_order(mask: Mask, length: int, shards: int, *, block: int = 512) -> Int32[np.ndarray, "length"]:
    """An order of the tokens of a sequence by which the devices that divide it have the same to do.

    Blocks of tokens are dealt to the devices. Of the orders that are the most even, within a twentieth, it is the one
    by which a device receives the fewest keys: tokens in order; zigzag; striped; blocks dealt by what they have to do;
    and tokens in order but for the blocks that busy devices change with idle ones. So it is never less even than the
    first three. What comes of it :func:`explain` says, with ``positions=``.

    Args:
        mask: of the sequence, whose arrays are NumPy's: the order is found beforehand.
        length: the number of tokens.
        shards: how many devices divide them.
        block: how many consecutive tokens stay together; it divides the tokens of a shard. Where it does not, as in
            short sequences, it is the largest divisor below.

    Returns:
        The position of each token, shard by shard: the argument ``positions`` of :func:`attention`, and of
        :func:`reorder`, which brings the tokens in this order.

    Raises:
        ValueError: the mask holds arrays of JAX, or the tokens do not divide.
        TypeError: ``mask`` is no mask, or a number no int.

    >>> from jaxmask import Causal
    >>> balanced_order(Causal(), 16, 4, block=2)
    array([ 0,  1, 14, 15,  2,  3, 12, 13,  4,  5, 10, 11,  6,  7,  8,  9],
          dtype=int32)
    """
    if not isinstance(mask, Mask):
        refuse_no_mask(mask, expected="mask must be a jaxmask.Mask")
    length, shards = checks.integer("length", length, 1), checks.integer("shards", shards, 1)
    block = checks.integer("block", block, 1)
    if length % shards:
        raise ValueError(f"length must be a multiple of shards, got {length} and {shards}: fill the sequence up")
    if not is_static(mask):
        raise ValueError(
            f"{mask!r} holds arrays of JAX, but an order is found before anything runs: hand over NumPy arrays"
        )
    block = max(size for size in range(1, min(block, length // shards) + 1) if length // shards % size == 0)
    # The tiles by which a plan is made, so that what is even here is so there.
    tile = tile_of(length // shards)
    tile = tile if block % tile == 0 else block
    batch, heads, _ = mask.shape
    rows = divisor_near(block, min(block, max(tile, -(-batch * heads * length**2 // tile // MOST_TILES))))
    with jax.ensure_compile_time_eval():
        live = np.asarray(mask.tiles(length, length, block=(rows, tile)).states) != EMPTY
    blocks = length // block
    pairs = live.sum((0, 1)).reshape(blocks, block // rows, blocks, block // tile).sum((1, 3)) * rows * tile
    work = pairs.sum(1)
    in_order = np.arange(len(work)).reshape(shards, -1)
    known = [in_order, in_order.reshape(-1, shards).T]
    if in_order.shape[1] % 2 == 0:
        halves = in_order.reshape(2 * shards, -1)
        known.append(np.concatenate((halves[:shards], halves[: shards - 1 : -1]), 1))
    deals = [*known, _by_work(work, shards)]
    most = min(_EVEN, *(_plan(deal, pairs, block).imbalance for deal in known))
    deals.append(_exchanged(work, in_order, most))
    plans = [_plan(deal, pairs, block) for deal in deals]
    uneven = [plan.imbalance for plan in plans]
    most = min(_EVEN * min(uneven), *uneven[: len(known)])
    fits = [i for i, imbalance in enumerate(uneven) if imbalance <= most]
    best = np.sort(deals[min(fits, key=lambda i: (plans[i].fetched, uneven[i]))], 1)
    return (best.reshape(-1, 1) * block + np.arange(block)).reshape(-1).astype(np.int32)


def _plan(deal: Ints, pairs: Ints, block: int) -> Plan:
    """The plan of the blocks that each device has, ``[shards, blocks]``, by what is live of all pairs of blocks."""
    found = pairs[deal].sum(1)[:, deal]
    size = deal.shape[1] * block
    return Plan(size, size, found > 0, found.sum(2).astype(float), is_exact=True)


def _by_work(work: Ints, shards: int) -> Ints:
    """Blocks in the order of their work, dealt back and forth."""
    rounds = np.argsort(-work, kind="stable").reshape(-1, shards)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T


def _exchanged(work: Ints, deal: Ints, most: float) -> Ints:
    """The blocks that each device has, when the busiest has changed some with the idlest until all are even enough."""
    deal = deal.copy()
    for _ in range(deal.size):
        of_device = work[deal].sum(1)
        busiest, idlest = of_device.argmax(), of_device.argmin()
        gap = of_device[busiest] - of_device[idlest]
        if of_device[busiest] <= most * of_device.mean():
            break
        gains = work[deal[busiest]][:, None] - work[deal[idlest]]
        gains = np.where((gains > 0) & (gains < gap), gains, 0)
        if not gains.any():
            break
        given, taken = np.unravel_index(np.where(gains > 0, np.abs(gains - gap / 2), np.inf).argmin(), gains.shape)
        deal[busiest, given], deal[idlest, taken] = deal[idlest, taken], deal[busiest, given]
    return deal


def reorder(x: Shaped[Array | np.ndarray, "..."], positions: Order, *, axis: int = 1) -> Any:
    """Bring what has an element for each token, in the order of positions, into another order: that of the devices.

    Args:
        x: an array; in NumPy the result is NumPy's, too. Best done to ids, before they are put on the devices.
        positions: ``[length]``, the position of each token, as of :func:`balanced_order`.
        axis: along which the tokens are.

    Raises:
        ValueError: ``positions`` has another length than the axis.
        TypeError: an argument is no array.

    >>> ids = np.array([[5, 6, 7, 8]])
    >>> reorder(ids, np.array([0, 3, 1, 2]))
    array([[5, 8, 6, 7]])
    >>> restore(reorder(ids, np.array([0, 3, 1, 2])), np.array([0, 3, 1, 2]))
    array([[5, 6, 7, 8]])
    """
    return _take(x, _checked(x, positions, axis), axis)


def restore(x: Shaped[Array | np.ndarray, "..."], positions: Order, *, axis: int = 1) -> Any:
    """Bring what :func:`reorder` has brought into another order into that of positions again.

    Args:
        x, positions, axis: as in :func:`reorder`.

    Raises:
        ValueError, TypeError: as :func:`reorder`.
    """
    positions = _checked(x, positions, axis)
    return _take(x, (np if isinstance(positions, np.ndarray) else jnp).argsort(positions), axis)


def _checked(x: Any, positions: Any, axis: int) -> Any:
    checks.array("x", x, "bif")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of x, {checks.describe(x)}, got {axis}")
    positions = checks.array("positions", positions, "i", 1)
    if positions.shape[0] != x.shape[axis]:
        raise ValueError(
            f"positions must give the position of each of the {x.shape[axis]} tokens along axis {axis} of x, got "
            f"{checks.describe(positions)}"
        )
    return positions


def _take(x: Any, index: Any, axis: int) -> Any:
    if isinstance(x, np.ndarray) and isinstance(index, np.ndarray):
        return x.take(index, axis)
    return jnp.asarray(x).take(index, axis, mode="clip")
