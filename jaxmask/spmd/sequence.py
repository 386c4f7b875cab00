"""Attention to a sequence that is divided over devices: what each of them sends, and the call that it computes then.

Every scheme takes the call of one device, inside of a ``shard_map``: query, key and value are its shards, and the mask,
the positions and all else are of the whole sequence. All but ``"ring"`` (in its own module) bring the keys to the
queries, or the queries to the keys, and are then one call of any kernel. Where every device has all queries, as of a
step of decoding, and some of the keys, ``"merge"`` sends neither, but what each has found. Their gradients are JAX's:
what was gathered is scattered, what was permuted is permuted back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmask.kernels import scores
from jaxmask.kernels.call import Call, is_empty
from jaxmask.mask import Full
from jaxmask.spmd.part import at_band, at_heads, at_keys, at_queries, at_run
from jaxmask.spmd.placement import QUERIES_ARE_DIVIDED, Placement
from jaxmask.spmd.plan import Plan, Scheme, Traffic, plan_of
from jaxmask.spmd.ring import ring
from jaxmask.tiles import EMPTY, PARTIAL, TileMap

Run = Callable[[Call], Any]


@dataclass(frozen=True)
class Sequence:
    """How a sequence is divided over devices; hashable.

    Args:
        axes: names of axes of the mesh.
        plan: which keys each device needs; ``None`` where each has all of them.
        forced: the scheme by which they are sent; ``None`` for the one that sends least.
    """

    axes: tuple[str, ...]
    plan: Plan | None
    forced: Scheme | None

    def received(self, call: Call) -> dict[Scheme, Traffic]:
        """What a device receives by each scheme that can do its call."""
        if self.plan is None:
            return {}
        if self.forced == "merge":
            return {"merge": self.plan.merged(call.query, call.value)}
        may_divide = not _keeps_heads(call, self.plan.shards)
        return self.plan.received(call.query, call.key, call.value, divides_heads=may_divide)

    def scheme(self, call: Call) -> Scheme | None:
        """The scheme for the call of one device; ``None`` where nothing is sent."""
        if self.plan is None:
            return None
        if self.forced == "ulysses":
            lacks = _keeps_heads(call, self.plan.shards)
            if lacks:
                raise ValueError(f"context_parallel='ulysses' cannot do this: {lacks}; None chooses what can")
        if self.forced is not None:
            return self.forced
        # A ring receives no less than a halo does; at the same bytes, what is gathered is in order.
        order: tuple[Scheme, ...] = ("gather", "halo", "ulysses")
        received = self.received(call)
        return min((scheme for scheme in order if scheme in received), key=received.__getitem__)

    def cost(self, call: Call) -> "Cost | None":
        """What the call of one device costs; ``None`` where nothing is sent."""
        scheme = self.scheme(call)
        if self.plan is None or scheme is None:
            return None
        (batch, _, heads, dim), dim_v = call.query.shape, call.value.shape[3]
        imbalance = 1.0 if scheme == "ulysses" else self.plan.imbalance
        pairs = batch * heads * self.plan.work.mean() * imbalance
        return Cost(scheme, self.received(call), int(2 * (dim + dim_v) * pairs), imbalance, self.plan)

    def attend(self, call: Call, run: Run) -> Any:
        """What the call of one device asks for; ``run`` is the kernel."""
        index, scheme = lax.axis_index(self.axes), self.scheme(call)
        if self.plan is None or scheme is None:
            return run(at_queries(call, index))
        if scheme == "ring":
            return ring(at_queries(call, index), self.axes, self.plan.shifts)
        return _SCHEMES[scheme](call, self.axes, self.plan, index, run)

    def ask(self, call: Call, ask: Callable[[Call, Scheme | None], Any]) -> Any:
        """What ``ask`` says of the call that a kernel gets, and of the scheme."""
        answers, scheme = list[Any](), self.scheme(call)
        if scheme == "ring":
            return ask(call, scheme)

        def asked(part: Call) -> Any:
            answers.append(ask(part, scheme))
            return zeros(part)

        self.attend(call, asked)
        return answers[0]


@dataclass(frozen=True, repr=False)
class Cost:
    """What attention to a divided sequence costs each device. ``print`` it.

    Args:
        scheme: how the keys are sent.
        received: the bytes that a device receives by each scheme that can do it: in the forward pass, and beside these
            in the backward pass.
        flops: of the two matrix products on the busiest device, in tiles that may hold a pair.
        imbalance: how much more the busiest device computes than the mean of all.
        plan: which keys each device needs.
    """

    scheme: Scheme
    received: dict[Scheme, Traffic]
    flops: int
    imbalance: float
    plan: Plan

    def __repr__(self) -> str:
        forward, backward = self.received[self.scheme]
        others = ", ".join(f"{name} {sum(by):,}" for name, by in self.received.items() if name != self.scheme)
        lines = [
            f"by {self.scheme!r}, a device receives {forward:,} bytes, and {backward:,} more for gradients"
            + (f"; by others in all: {others}" if others else ""),
            f"the busiest device computes {self.flops:,} FLOPs, {self.imbalance:.2f} times the mean",
        ]
        if not self.plan.is_exact and self.scheme != "merge":
            lines.append(
                "what of the mask is in JAX arrays is not known beforehand: a static mask beside it bounds what is "
                "sent, as & SlidingWindow(longest) does for documents, and so do NumPy arrays"
            )
        return "\n".join(lines)

    def show(self) -> None:
        """Draw which shards of keys the queries of each shard need, or all queries where each device has them."""
        plan = self.plan
        states = np.where(plan.needed.any(2), PARTIAL, EMPTY).astype(np.int8)[None, None]
        lengths = len(states[0, 0]) * plan.queries, plan.shards * plan.keys
        TileMap(states, Full(), 0, *lengths, (plan.queries, plan.keys)).show()


def sequence_of(call: Call, placement: Placement, context_parallel: object) -> Sequence | None:
    """How the sequence of a call is divided; ``None`` where it is not.

    Raises:
        ValueError: ``context_parallel`` names no scheme, or there is nothing that it could send.
    """
    if context_parallel is not None and context_parallel not in get_args(Scheme):
        names = ", ".join(map(repr, get_args(Scheme)))
        raise ValueError(f"context_parallel must be one of {names}, or None to choose, got {context_parallel!r}")
    if not placement.keys and context_parallel is not None:
        raise ValueError(no_keys_to_send(context_parallel))
    if not placement.keys or is_empty(call.query, call.key):
        return Sequence(placement.queries, None, None) if placement.queries else None
    merges = not placement.queries
    if context_parallel is not None and merges != (context_parallel == "merge"):
        raise ValueError(
            f"context_parallel is {context_parallel!r}, but every device has all queries, and some of the keys: these "
            'are never sent, but what each finds is merged, by "merge"; leave it out, or divide the query as the keys'
            if merges
            else QUERIES_ARE_DIVIDED
        )
    forced: Any = "merge" if merges else context_parallel
    plan = plan_of(call, placement.shards(placement.keys), has_all_queries=merges)
    return Sequence(placement.keys, plan, forced)


def no_keys_to_send(context_parallel: object) -> str:
    """Why no scheme can be asked for."""
    return (
        f"context_parallel is {context_parallel!r}, but every device has all keys: it is for sequences that are "
        'divided, as sharding=P(None, "seq") says, or the types of query and key, or axis_name inside of a shard_map'
    )


def zeros(call: Call) -> Any:
    """What a call returns, of zeros."""
    out = jnp.zeros((*call.query.shape[:3], call.value.shape[3]), call.value.dtype)
    return (out, out[..., 0]) if call.return_residual else out


def _keeps_heads(call: Call, shards: int) -> str | None:
    """Why devices cannot take some of the heads of a call each, for all of its queries."""
    heads, kv_heads = call.query.shape[2], call.key.shape[2]
    if heads % shards or (kv_heads % shards and shards % kv_heads):
        return f"{heads} heads and {kv_heads} of keys do not divide over {shards} devices"
    if call.bias is not None and not callable(call.bias) and call.bias.shape[2] > 1:
        return "the bias has a row for each query, and would have to be sent"
    return None


def _gather(call: Call, axes: tuple[str, ...], plan: Plan, index: Any, run: Run) -> Any:
    """All keys to every device."""
    shards = plan.shards
    near = max(size for size in range(1, isqrt(shards) + 1) if shards % size == 0)
    rows = [[*range(start, start + near)] for start in range(0, shards, near)]
    columns = [[*range(start, shards, near)] for start in range(near)]

    def gathered(x: Any) -> Any:
        # In two hops, and each along a new axis, the first. What is scattered in the backward pass otherwise comes as a
        # whole sum, twice as much: on a TPU whose chips are a square, and along another axis on any.
        x = lax.all_gather(lax.all_gather(x, axes, axis_index_groups=rows), axes, axis_index_groups=columns)
        x = jnp.moveaxis(x, (0, 1), (1, 2))
        return x.reshape(x.shape[0], -1, *x.shape[4:])

    return run(replace(at_queries(call, index), key=gathered(call.key), value=gathered(call.value)))


def _halo(call: Call, axes: tuple[str, ...], plan: Plan, index: Any, run: Run) -> Any:
    """To every device the keys that some query of it needs."""
    at = call.positions
    is_in_order = call.query.shape[1] == plan.keys and at.first is at.queries is at.keys is None
    if plan.band is not None and is_in_order:
        key, value = (_band(x, axes, plan.band, plan.shards) for x in (call.key, call.value))
        return run(at_band(call, key, value, plan.band[0], index, plan.keys * plan.shards))
    tables = {shift: plan.table(shift) for shift in plan.shifts}
    # The tiles of the whole that each device has then, its own first.
    tiles = plan.needed.shape[2]
    own = np.arange(plan.shards, dtype=np.int32)[:, None]
    received = [np.where(table < 0, -1, (own - shift) % plan.shards * tiles + table) for shift, table in tables.items()]
    at_hand = np.concatenate((own * tiles + np.arange(tiles, dtype=np.int32), *received), 1)
    at_hand = jnp.asarray(at_hand)[index][:, None]
    slots = jnp.where(at_hand < 0, -1, at_hand * plan.tile + np.arange(plan.tile, dtype=np.int32)).reshape(-1)

    def fetch(x: Any) -> Any:
        cut = x.reshape(x.shape[0], tiles, plan.tile, *x.shape[2:])
        parts = [cut]
        for shift, table in tables.items():
            # The row of whom this device sends to.
            sent = jnp.asarray(np.roll(table, -shift, 0).clip(0))[index]
            there = np.flatnonzero(plan.counts[shift])
            pairs = [(int(i - shift) % plan.shards, int(i)) for i in there]
            parts.append(lax.ppermute(cut.take(sent, 1, mode="clip"), axes, pairs))
        return jnp.concatenate(parts, 1).reshape(x.shape[0], -1, *x.shape[2:])

    return run(at_keys(at_queries(call, index), fetch(call.key), fetch(call.value), slots))


def _band(x: Any, axes: tuple[str, ...], band: tuple[int, int], shards: int) -> Any:
    """The keys or values of a shard, those before them and those after; zeros where there are none."""
    before, after = band
    length, parts = x.shape[1], [x]
    for distance in range(1, -(-before // length) + 1):
        size = min(before - (distance - 1) * length, length)
        pairs = [(source, source + distance) for source in range(shards - distance)]
        parts.insert(0, lax.ppermute(x[:, length - size :], axes, pairs))
    for distance in range(1, -(-after // length) + 1):
        size = min(after - (distance - 1) * length, length)
        pairs = [(source, source - distance) for source in range(distance, shards)]
        parts.append(lax.ppermute(x[:, :size], axes, pairs))
    return jnp.concatenate(parts, 1)


def _ulysses(call: Call, axes: tuple[str, ...], plan: Plan, index: Any, run: Run) -> Any:
    """To every device all queries and keys, for some of the heads."""
    there = partial(lax.all_to_all, axis_name=axes, split_axis=2, concat_axis=1, tiled=True)
    back = partial(lax.all_to_all, axis_name=axes, split_axis=1, concat_axis=2, tiled=True)
    # A head of keys that several devices need is sent to each.
    copies = max(1, plan.shards // call.key.shape[2])
    key, value = (jnp.repeat(x, copies, 2) if copies > 1 else x for x in (call.key, call.value))
    query = there(call.query)
    part = at_heads(call, query, there(key), there(value), index * np.int32(query.shape[2]))
    return jax.tree.map(back, run(part))


def _merge(call: Call, axes: tuple[str, ...], plan: Plan, index: Any, run: Run) -> Any:
    """Every device attends to its own keys, for all queries; what they find is merged by the log-sum-exp."""
    # A sink is a score without a key, and the first device has it.
    sinks = None if call.sinks is None else jnp.where(index == 0, call.sinks, -jnp.inf)
    first = index * np.int32(plan.keys)
    out, lse = run(at_run(replace(call, sinks=sinks, return_residual=True), call.key, call.value, first))
    highest = jnp.maximum(lax.pmax(lax.stop_gradient(lse), axes), scores.lowest(lse.dtype))
    weights = jnp.exp(lse - highest)
    total, merged = lax.psum((weights, out.astype(lse.dtype) * weights[..., None]), axes)
    has_keys = total > 0
    total = jnp.where(has_keys, total, 1)
    merged = (merged / total[..., None]).astype(out.dtype)
    return (merged, jnp.where(has_keys, highest + jnp.log(total), -jnp.inf)) if call.return_residual else merged


_SCHEMES: dict[str, Callable[[Call, tuple[str, ...], Plan, Any, Run], Any]] = {
    "gather": _gather,
    "halo": _halo,
    "ulysses": _ulysses,
    "merge": _merge,
}
