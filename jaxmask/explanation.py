"""Which implementation attention takes, why, and what it costs."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmask import checks, spmd
from jaxmask.dispatch import FUSED, LACKS, Implementation, Sharding, choose, drawbacks
from jaxmask.indices import by_batch
from jaxmask.kernels import pallas_gpu
from jaxmask.kernels.call import Arguments, Call, checked_call, is_empty, known_elsewhere
from jaxmask.kernels.key_ranges import key_ranges_of
from jaxmask.mask import Mask

# The states of so many tiles are found in less than a second; beyond, those of stripes of queries are.
_MOST_TILES, _STRIPE = 2**21, 256


@dataclass(frozen=True, repr=False)
class Explanation:
    """Which implementation :func:`attention` uses, and why. ``print`` it.

    Args:
        implementation: its name.
        reason: why, in words.
        lacks: for each other implementation, what it lacks to do the same.
        sparsity: the fraction of tiles of 128 queries and keys that are EMPTY; ``None`` where the mask is traced. Where
            there are millions of tiles, this and the costs are estimated from evenly spaced queries.
        flops: of the two matrix products, in the ranges of keys that ``"blocked"`` reads, or of all scores where it is
            ``"xla"``; ``None`` if unknown.
        dense_flops: of the two matrix products with all scores.
        bytes: read and written: query and output once, and for each tile of queries the keys and values of its ranges;
            with all scores besides, written and read, where it is ``"xla"``.
        dense_bytes: the same with all scores written out.
        launches: the kernels that ``"pallas"`` launches, with their tiles, in words; empty for any other.
        devices: how the call is divided over the devices of a mesh, in words; ``None`` where it is not. The numbers are
            those of the whole.
        context_parallel: what a device receives and computes where the sequence is divided, too; ``None`` where nothing
            is sent. ``context_parallel.show()`` draws which shards of keys each shard of queries needs.
    """

    implementation: str
    reason: str
    lacks: dict[str, list[str]]
    sparsity: float | None
    flops: int | None
    dense_flops: int
    bytes: int | None
    dense_bytes: int
    launches: list[str]
    devices: str | None
    context_parallel: spmd.Cost | None = None

    def __repr__(self) -> str:
        lines = [f"{self.implementation}: {self.reason}"]
        lines += [f"  {self.devices}"] if self.devices is not None else []
        lines += [f"  {line}" for line in str(self.context_parallel or "").splitlines()]
        lines += [f"  {launch}" for launch in self.launches]
        lines += [f"  not {name}: {'; '.join(lacks)}" for name, lacks in self.lacks.items() if lacks]
        if self.sparsity is None:
            lines.append("  how many tiles are empty is known only when the program runs, for the mask is traced")
        else:
            lines.append(f"  {self.sparsity:.1%} of the tiles are empty")
        if self.dense_flops and self.flops is not None and self.bytes is not None:
            lines += [
                f"  {self.flops:,} FLOPs, {self.flops / self.dense_flops:.1%} of those with all scores",
                f"  {self.bytes:,} bytes, {self.bytes / self.dense_bytes:.1%} of those with all scores",
            ]
        return "\n".join(lines)


@known_elsewhere
def explain(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None = None,
    *,
    sharding: Sharding | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    context_parallel: spmd.Scheme | None = None,
    implementation: Implementation | None = None,
    platform: Literal["cpu", "gpu", "tpu"] | None = None,
    **arguments: Unpack[Arguments],
) -> Explanation:
    """Which implementation :func:`attention` uses for the same arguments, why, and what it costs. Nothing is computed.

    Args:
        query, key, value: arrays, or their shapes as ``jax.ShapeDtypeStruct``.
        mask, sharding, axis_name, context_parallel, implementation: as in :func:`attention`.
        platform: where it is to run, though it be not here; ``None`` for where the query is.
        **arguments: the others of :func:`attention`.

    Returns:
        What to print.

    Raises:
        ValueError, TypeError: as :func:`attention`.

    >>> import jax.numpy as jnp
    >>> import jaxmask
    >>> x = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)
    >>> print(jaxmask.explain(x, x, x, jaxmask.SlidingWindow(512), implementation="blocked"))
    blocked: it was asked for
      not cudnn: it is made for GPU; it takes float16 and bfloat16, not float32
      not pallas: it is made for GPU
      not tokamax: it is made for GPU and TPU
      not splash: it is made for TPU
      not xla: it writes out all scores
      92.4% of the tiles are empty
      12,884,901,888 FLOPs, 9.4% of those with all scores
      134,217,728 bytes, 3.1% of those with all scores
    """
    if platform not in (None, "cpu", "gpu", "tpu"):
        raise ValueError(f"platform must be 'cpu', 'gpu' or 'tpu', or None for where the query is, got {platform!r}")
    shards = spmd.shards_of(axis_name, query, key, context_parallel)
    call = checked_call(query, key, value, mask, platform=platform, **arguments, shards=shards)
    call, placement, sequence = spmd.placed(call, sharding, axis_name, context_parallel)
    has_pairs = not is_empty(call.query, call.key)

    def judged(
        call: Call, scheme: spmd.Scheme | None = None
    ) -> tuple[tuple[str, str], list[str], dict[str, list[str]]]:
        chosen = choose(call, implementation, scheme)
        launches = pallas_gpu.launches(call) if chosen[0] == "pallas" else []
        return chosen, launches, {name: _unfit(name, call) for name in LACKS if has_pairs and name != chosen[0]}

    # What each device has to do, which is what an implementation must take.
    asked = judged(call) if placement is None else spmd.ask_shard(call, placement, sequence, judged)
    (chosen, reason), launches, lacks = asked
    devices = None if placement is None else str(placement)
    cost = None
    if placement is not None and sequence is not None:
        cost = spmd.ask_shard(call, placement, None, lambda part, _: sequence.cost(part))
        call = _whole(call)
    slow = {"xla": "it writes out all scores", "blocked": "there are too few scores to cut into tiles"}
    lacks |= {name: [why] for name, why in slow.items() if has_pairs and chosen in slow and name != chosen}
    (batch, query_length, heads, dim), (_, key_length, kv_heads, dim_v) = call.query.shape, call.value.shape
    itemsize = call.query.dtype.itemsize
    ends = batch * query_length * heads * (dim + dim_v) * itemsize
    dense_pairs = batch * heads * query_length * key_length
    dense_bytes = ends + batch * key_length * kv_heads * (dim + dim_v) * itemsize + 2 * 4 * dense_pairs
    sparsity = pairs = moved = None
    if not has_pairs:
        sparsity = 0.0
    elif not any(map(checks.is_traced, jax.tree.leaves((call.mask, call.positions)))):
        # The program of attention has every array as its argument, NumPy's too.
        mask, positions = jax.tree.map(jnp.asarray, (call.mask, call.positions))
        call, share = _part(replace(call, mask=mask, positions=positions))
        sparsity = float(call.tiles((128, 128)).sparsity)
        ranges, queries, keys = key_ranges_of(call)
        sharing = batch * heads // (ranges.range_count.shape[0] * ranges.range_count.shape[1])
        read = int(sharing * keys * int(ranges.range_count.sum()) / share)
        pairs = read * queries
        moved = ends + read * (dim + dim_v) * itemsize // (heads // kv_heads)
    if chosen == "xla":
        pairs, moved = dense_pairs, dense_bytes
    flops_of_pair = 2 * (dim + dim_v)
    flops = None if pairs is None else flops_of_pair * pairs
    dense_flops = flops_of_pair * dense_pairs
    return Explanation(chosen, reason, lacks, sparsity, flops, dense_flops, moved, dense_bytes, launches, devices, cost)


def _whole(call: Call) -> Call:
    """The call with the shapes of the whole sequence, where its arrays are those of one device."""

    def whole(x: Any, length: checks.Length) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype)

    at = call.positions
    key, value = (whole(x, at.key_length) for x in (call.key, call.value))
    return replace(call, query=whole(call.query, at.query_length), key=key, value=value)


def _part(call: Call) -> tuple[Call, float]:
    """A call of evenly spaced queries, where all of them have too many tiles to look at, and their share of all."""
    batch, heads, _ = call.mask.shape
    query_length, key_length = call.query.shape[1], call.key.shape[1]
    stripes, keys = query_length // _STRIPE, -(-key_length // 128)
    count = max(1, _MOST_TILES // (batch * heads * keys * (_STRIPE // 128)))
    if count >= stripes:
        return call, 1.0
    first = ((np.arange(count) + 0.5) * stripes / count).astype(np.int32) * _STRIPE
    index = (first[:, None] + np.arange(_STRIPE, dtype=np.int32)).reshape(-1)
    at = call.positions
    # In NumPy where all queries would be: what is static is found without a program.
    positions = by_batch(at.start)[:, 0, :, 0] + index if at.queries is None else at.queries[..., index]
    at = replace(at, query_length=index.size, first=None, queries=positions)
    query = jax.ShapeDtypeStruct((call.query.shape[0], index.size, *call.query.shape[2:]), call.query.dtype)
    return replace(call, query=query, positions=at), index.size / query_length


def _unfit(name: str, call: Call) -> list[str]:
    made_for = [platform.upper() for platform, names in FUSED.items() if name in names]
    elsewhere = [] if call.platform.upper() in made_for else [f"it is made for {' and '.join(made_for)}"]
    lacks = [lack for lack in LACKS[name](call) if not (elsewhere and lack.startswith("it needs"))]
    return elsewhere + (lacks or drawbacks(name, call))
