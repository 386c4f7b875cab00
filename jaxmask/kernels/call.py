"""The arguments of one call of attention, checked, as every kernel takes them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float

from jaxmask import checks, indices
from jaxmask.indices import Index, common
from jaxmask.kernels.dropout import Dropout
from jaxmask.mask import Full, Mask, by_position, placed, refuse_no_mask
from jaxmask.native import Split
from jaxmask.positions import KeyPositions, Offset, Positions, QueryPositions
from jaxmask.reading import states
from jaxmask.tiles import TileMap

# An array that broadcasts to [batch, heads, q, kv], or a function of positions, to be evaluated where it is needed.
Bias = Float[Array | np.ndarray, "..."] | Callable[[Index, Index, Index, Index], Float[Array, "..."]]

_DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)

# Arguments of other libraries, and what says the same here.
known_elsewhere = checks.hints(
    is_causal="the mask Causal() where it is true, and nothing where it is false",
    local_window_size="the mask Window(left, right), which is Window(size, size) for one number",
    key_value_seq_lengths="the mask Prefix(lengths)",
    query_seq_lengths="nothing: the output at queries of padding has no meaning; Prefix(lengths) leaves their keys out",
    window_size="the mask Window(left, right), or SlidingWindow(size), which counts the query",
    segment_ids="the mask Segments(ids)",
    attn_mask="mask: Dense(allowed) where it is bool, and bias where it is added to the scores",
    is_training="dropout_rate=0.0 where nothing is to be dropped",
    dropout_p="dropout_rate and dropout_rng",
    enable_gqa="nothing: the heads of key and value may be fewer than those of query",
    softcap="logits_soft_cap",
)


class Arguments(TypedDict, total=False):
    """The arguments of :func:`jaxmask.attention` beside arrays, mask and implementation."""

    bias: Bias | None
    scale: float | None
    offset: Offset | None
    query_positions: QueryPositions | None
    key_positions: KeyPositions | None
    positions: KeyPositions | None
    logits_soft_cap: float | None
    sinks: Float[Array | np.ndarray, "heads"] | None
    dropout_rate: float
    dropout_rng: Array | None
    broadcast_dropout: bool
    return_residual: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("query", "key", "value", "mask", "bias", "positions", "sinks", "dropout"),
    meta_fields=("scale", "logits_soft_cap", "return_residual", "is_left_to_xla", "platform"),
)
@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of :func:`jaxmask.attention`, checked. A pytree.

    Args:
        query, key, value: the arrays.
        mask: a function of the positions of queries and the indices of keys.
        bias: an array of rank 4, or a function that is a pytree.
        positions: of queries and keys. Position 0 of the first query is static, so that the tiles of a static mask are
            found at trace time.
        sinks: a logit for each head.
        dropout: ``None`` where no pair is dropped.
        scale, logits_soft_cap: of the scores.
        return_residual: whether the result is the output and the log-sum-exp, or the output alone.
        is_left_to_xla: whether XLA may divide the call over devices, along its examples and heads.
        platform: where it is to run, ``cpu``, ``gpu`` or ``tpu``.
    """

    query: Any
    key: Any
    value: Any
    mask: Mask
    bias: Bias | None
    positions: Positions
    sinks: Any
    dropout: Dropout | None
    scale: float
    logits_soft_cap: float | None
    return_residual: bool
    is_left_to_xla: bool
    platform: str

    def split(self) -> Split[Mask]:
        """What of the mask a kernel can take in its own arguments."""
        return self.mask.split_at(self.positions)

    def tiles(self, block: tuple[int, int]) -> TileMap:
        """The tiles of the mask, for the examples and heads of the arrays."""
        sizes = self.query.shape[0], self.query.shape[2]
        return TileMap.of(states(self.mask, self.positions, block, sizes), self.mask, self.positions, block)


def checked_call(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask | None,
    *,
    bias: Any = None,
    scale: float | None = None,
    offset: Offset | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    positions: KeyPositions | None = None,
    logits_soft_cap: float | None = None,
    sinks: Any = None,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
    broadcast_dropout: bool = False,
    return_residual: bool = False,
    platform: str | None = None,
    shards: tuple[int, int] = (1, 1),
) -> Call:
    """The arguments, when they are found to fit each other.

    Args:
        platform: for which they are; ``None`` for that of the query.
        shards: how many devices divide the queries and the keys, where query, key and value are those of one of them.
            All else is of the whole sequence; of a bias only its keys are.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        if checks.array(name, array, "f").dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {checks.describe(array)}; cast it by astype"
            )
    shapes = ", ".join(f"{name} {checks.describe(x)}" for name, x in (("query", query), ("key", key), ("value", value)))
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"query, key and value must be [batch, length, heads, dim], got {shapes}; for a single example, give each "
            "[None]"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {shapes}; cast them by astype")
    batch, query_length, heads, dim = query.shape
    key_length, kv_heads = key.shape[1:3]
    if (key.shape[0], value.shape[0], key.shape[3]) != (batch, batch, dim) or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "query, key and value must agree: one batch, the dim of query and key, the length and heads of key and "
            f"value; got {shapes}"
        )
    if not (heads and kv_heads and dim and value.shape[3]):
        raise ValueError(f"query, key and value must have heads and dims, got {shapes}")
    if heads % kv_heads:
        raise ValueError(
            f"the heads of key and value must divide those of query, got {kv_heads} and {heads}: {shapes}; heads are "
            "the third axis"
        )
    if mask is not None and not isinstance(mask, Mask):
        refuse_no_mask(mask, expected="mask must be a jaxmask.Mask")
    mask = Full() if mask is None else mask
    if shards[1] > 1 and mask.shape[2] == key_length:
        raise ValueError(
            f"{mask!r} describes the {key_length} keys of one device, but with axis_name a mask is of the whole "
            f"sequence of {key_length * shards[1]}: hand over the whole of its arrays, which a shard_map does by "
            "in_specs that do not name the axis there"
        )
    query_length, key_length = query_length * shards[0], key_length * shards[1]
    if is_empty(query, key):
        # Where there is no pair, nothing can be asked of a mask, nor of positions.
        mask, at, bias = Full(), Positions(query_length, key_length, None, None, None, True), None
    elif positions is not None:
        for name, given in (("offset", offset), ("query_positions", query_positions), ("key_positions", key_positions)):
            if given is not None:
                raise ValueError(
                    f"positions and {name} both say where tokens are: positions alone says it of queries and of keys"
                )
        mask, at = _in_order(mask, positions, query_length, key_length)
    else:
        mask, at = placed(mask, query_length, key_length, offset, query_positions, key_positions)
    if at.starts_at_zero:
        at = replace(at, first=None)
    for name, what, size, given in (
        # Positions first: those of keys are part of the mask.
        *(("batch", what, batch, given) for what, given in at.batches.items()),
        ("batch", "mask", batch, mask.shape[0]),
        ("heads", "mask", heads, mask.shape[1]),
    ):
        if given not in (1, size):
            raise ValueError(f"{what} is for {given} {name}, but the arrays have {size}: {shapes}")
    if sinks is not None and checks.array("sinks", sinks, "f").shape != (heads,):
        raise ValueError(f"sinks must have one logit for each of the {heads} heads, got {checks.describe(sinks)}")
    factor = dim**-0.5 if scale is None else _finite("scale", scale)
    logits_soft_cap = None if logits_soft_cap is None else _finite("logits_soft_cap", logits_soft_cap)
    if logits_soft_cap is not None and logits_soft_cap < checks.POSITIVE:
        raise ValueError(f"logits_soft_cap must be positive, got {logits_soft_cap}; None is no cap")
    if bias is not None and not callable(bias):
        checks.array("bias", bias, "f", hint="; a bool mask is Dense(allowed), joined to the mask by &")
        sizes = batch, heads, query.shape[1], key_length
        if not checks.broadcasts_to(bias.shape, sizes):
            raise ValueError(
                f"bias must broadcast to [batch, heads, q, kv] = {list(sizes)}, got {checks.describe(bias)}"
            )
        bias = indices.as_4d(bias)
    if callable(bias):
        bias = _as_pytree(bias, (batch, heads), common(*at.batches.values()))
    return Call(
        query=query,
        key=key,
        value=value,
        mask=mask,
        bias=bias,
        positions=at,
        sinks=sinks,
        dropout=_dropout(dropout_rate, dropout_rng, broadcast_dropout),
        scale=factor,
        logits_soft_cap=logits_soft_cap,
        return_residual=return_residual,
        is_left_to_xla=_is_left_to_xla(query),
        platform=_platform(query) if platform is None else platform,
    )


def _platform(query: Any) -> str:
    """Where the query is; where it is traced, what JAX runs on by default."""
    if isinstance(query, jax.Array) and not checks.is_traced(query):
        return next(iter(query.devices())).platform
    return jax.default_backend()


def _in_order(mask: Mask, positions: Any, query_length: int, key_length: int) -> tuple[Mask, Positions]:
    """The mask to be read, and the positions, of a sequence whose tokens are in another order than their positions."""
    if query_length != key_length:
        raise ValueError(
            f"positions is the order of one sequence, but there are {query_length} queries and {key_length} keys: say "
            "query_positions and key_positions where these are two"
        )
    positions = checks.int32("positions", checks.array("positions", positions, "i", 1), 0, key_length - 1)
    if positions.shape[0] != key_length:
        raise ValueError(
            f"positions must give the position of each of the {key_length} tokens, of the whole sequence, got "
            f"{checks.describe(positions)}"
        )
    if isinstance(positions, np.ndarray) and len(np.unique(positions)) != key_length:
        raise ValueError(
            f"positions must be a permutation of 0 to {key_length - 1}, got {checks.describe(positions)} with "
            f"{len(np.unique(positions))} different positions"
        )
    mask, _ = placed(mask, query_length, key_length, None, None, None)
    return by_position(mask, positions), Positions(query_length, key_length, None, positions, positions, True)


def _is_left_to_xla(query: Any) -> bool:
    """Whether several devices may take part, and nothing says in which part of the call each does."""
    if isinstance(query, jax.Array) and not checks.is_traced(query):
        return len(query.sharding.device_set) > 1
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return checks.is_traced(query) and jax.device_count() > 1
    return any(
        kind == AxisType.Auto and mesh.shape[axis] > 1
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


def is_empty(query: Any, key: Any) -> bool:
    """Whether there is no pair of a query and a key: no example, no query, or no key."""
    return 0 in (query.shape[0], query.shape[1], key.shape[1])


def _as_pytree(bias: Callable[..., Any], sizes: tuple[int, int], batch_of_positions: int) -> jax.tree_util.Partial:
    """A function as a pytree, when what it returns is found to fit the scores.

    One that closes over arrays is never the same twice, for its arrays may not be.
    """
    checks.takes_indices("bias", bias)
    # It is called for tiles, so that what it returns must follow from the indices: two queries and three keys here.
    shapes = (sizes[0], 1, 1, 1), (1, sizes[1], 1, 1), (batch_of_positions, 1, 2, 1), (1, 1, 1, 3)
    with checks.traced_function("bias"):
        closed, found = jax.make_jaxpr(bias, return_shape=True)(
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)
        )
    checks.array("what the function bias returns", found, "fi", hint="; a bool mask is a Predicate, joined by &")
    if not checks.broadcasts_to(found.shape, (*sizes, 2, 3)):
        raise ValueError(
            f"the function bias must return an array that broadcasts to [batch, heads, q, kv] = {[*sizes, 2, 3]} for "
            f"2 queries and 3 keys, got {checks.describe(found)}; it is called for tiles, and must follow its indices"
        )
    if isinstance(bias, jax.tree_util.Partial):
        return bias
    return jax.tree_util.Partial((lambda *at: bias(*at)) if closed.consts else bias)


def _dropout(rate: float, rng: Any, is_shared: bool) -> Dropout | None:
    """What drops pairs, or ``None``."""
    rate = _finite("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be at least 0 and less than 1, got {rate}")
    if not rate:
        return None
    if rng is None:
        raise ValueError(f"dropout_rng is missing: dropout_rate is {rate}, which needs a key, as of jax.random.key(0)")
    # Two words, whatever the generator of the key.
    return Dropout(jax.random.bits(checks.key("dropout_rng", rng), (2,), jnp.uint32), rate, is_shared)


def _finite(name: str, value: Any) -> float:
    hint = "; multiply the query by it, and give scale=1.0" if name == "scale" and checks.is_array(value) else ""
    return checks.real(name, value, hint=hint)
