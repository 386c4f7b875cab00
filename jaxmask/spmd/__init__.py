"""Attention on many devices: each computes what it has, and of a sequence that is divided it is sent what it needs.

The arguments are whole arrays, or those of one device inside of a ``shard_map``. A :class:`Placement` says over which
axes of a mesh their examples, heads and tokens are divided, and :func:`attend` runs the call on the shards. Where only
examples and heads are divided, nothing is sent. Of a divided sequence a :class:`Plan` says which keys each device
needs, and by which scheme it gets them with the fewest bytes. A mask or a bias that looks at the index of an example or
a head, or at the position of a query or a key, gets that of the whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmask import checks
from jaxmask.kernels.call import Call
from jaxmask.spmd.division import divide
from jaxmask.spmd.order import balanced_order, reorder, restore
from jaxmask.spmd.part import at_shard, closed_over
from jaxmask.spmd.placement import Axes, Placement, division_of, placement_of, shards_of
from jaxmask.spmd.plan import Plan, Scheme
from jaxmask.spmd.sequence import Cost, Sequence, no_keys_to_send, sequence_of, zeros

__all__ = [
    "Cost",
    "Placement",
    "Plan",
    "Scheme",
    "Sequence",
    "ask_shard",
    "attend",
    "balanced_order",
    "division_of",
    "on_devices",
    "placed",
    "reorder",
    "restore",
    "shards_of",
]


def placed(
    call: Call,
    sharding: PartitionSpec | NamedSharding | None,
    axis_name: str | Axes | None = None,
    context_parallel: object = None,
) -> tuple[Call, Placement | None, Sequence | None]:
    """A call, where its parts are, and how its sequence is divided; ``None`` where it is not.

    Raises:
        TypeError, ValueError: the call cannot follow what says where it is, or cannot be done as it is told.
    """
    call, placement = placement_of(call, sharding, axis_name, context_parallel)
    if placement is None and context_parallel is not None:
        raise ValueError(no_keys_to_send(context_parallel))
    return call, placement, None if placement is None else sequence_of(call, placement, context_parallel)


def ask_shard(
    call: Call, placement: Placement, sequence: Sequence | None, ask: Callable[[Call, Scheme | None], Any]
) -> Any:
    """What ``ask`` says of the call that a kernel gets on one device, and of the scheme. Nothing is computed."""
    answers: list[Any] = []

    def asked(part: Call) -> Any:
        answers.append(ask(part, None) if sequence is None else sequence.ask(part, ask))
        return zeros(part)

    # Kernels ask their arrays over which axes they vary; inside of a shard_map of ours that is not for them to know.
    jax.eval_shape(lambda call: _on_devices(call, placement, asked, says_what_varies=False), call)
    return answers[0]


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def attend(
    call: Call, placement: Placement, sequence: Sequence | None, run: Callable[[Call], Any], says_what_varies: bool
) -> Any:
    """Run the call on the shards by ``run``.

    Kernels of others do not say over which axes of the mesh their results vary, and are not asked to.
    """
    _refuse_closed_over(call)
    on_device = run if sequence is None else partial(sequence.attend, run=run)
    return _on_devices(call, placement, on_device, says_what_varies)


def _on_devices(call: Call, placement: Placement, run: Callable[[Call], Any], says_what_varies: bool) -> Any:
    """What ``run`` makes of the call of each device, whose queries and keys are those that it has."""
    if placement.mesh is None:
        return run(call)
    division, mesh = divide(call, placement), placement.mesh
    leaves, structure = jax.tree.flatten(call)
    out = PartitionSpec(placement.examples or None, placement.queries or None, placement.heads or None)

    def on_device(*part: Any) -> Any:
        local: Call = jax.tree.unflatten(structure, part)
        batch, _, heads, _ = local.query.shape
        first = _index(placement.examples) * batch, _index(placement.heads) * heads
        return run(at_shard(local, placement, division, first))

    out_specs = (out, out) if call.return_residual else out
    return on_devices(on_device, mesh, division.specs, out_specs, leaves, says_what_varies=says_what_varies)


def on_devices(
    function: Callable[..., Any],
    mesh: Any,
    in_specs: list[PartitionSpec],
    out_specs: Any,
    arguments: list[Any],
    *,
    says_what_varies: bool = True,
) -> Any:
    """Call a function on each device with its parts of the arguments, trees of arrays of which each has one spec."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        # What is whole on every device is cut without communication.
        arguments = [
            jax.tree.map(partial(jax.sharding.reshard, out_shardings=NamedSharding(mesh, spec)), tree)
            for tree, spec in zip(arguments, in_specs, strict=True)
        ]
    # Without names, all axes; a `vmap` over a sharded axis adds its own.
    free = {axis for axis, kind in kinds.items() if kind != AxisType.Manual}
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(in_specs),
        out_specs=out_specs,
        axis_names=free if AxisType.Manual in kinds.values() else set[str](),
        check_vma=says_what_varies,
    )(*arguments)


def _refuse_closed_over(call: Call) -> None:
    """Refuse functions that close over arrays whose types name a mesh: in a shard they have no meaning."""
    for x in closed_over(call):
        if not jax.typeof(x).sharding.mesh.empty:
            raise ValueError(
                f"a function of the mask or the bias closes over {checks.describe(x)}, an array on the mesh: hand it "
                "over, as jax.tree_util.Partial(function, array), which calls function(array, b, h, q, kv)"
            )


def _index(axes: tuple[str, ...]) -> Any:
    """The index of this device along axes of the mesh."""
    return lax.axis_index(axes) if axes else 0
