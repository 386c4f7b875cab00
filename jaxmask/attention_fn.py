"""Attention as Flax's modules call it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Shaped

from jaxmask import checks, indices
from jaxmask.dispatch import Implementation, Sharding, attention
from jaxmask.mask import Full, Mask
from jaxmask.masks import Causal, Dense
from jaxmask.positions import KeyPositions, Offset, QueryPositions


def make_attention_fn(
    description: Mask | None = None,
    *,
    offset: Offset | None = None,
    query_positions: QueryPositions | None = None,
    key_positions: KeyPositions | None = None,
    sinks: Float[Array | np.ndarray, "heads"] | None = None,
    sharding: Sharding | None = None,
    implementation: Implementation | None = None,
) -> "AttentionFn":
    """Make an ``attention_fn`` for ``MultiHeadAttention`` of ``flax.linen`` and ``flax.nnx`` that attends by a mask.

    The function uses or refuses every argument that flax passes. It joins the call's mask and ``is_causal`` to the
    description by ``&``, adds the bias, drops weights, casts the inputs to the dtype, and computes the products in the
    precision. It refuses other products and sown weights. The mask of a call is a :class:`Mask`, or an array of bools
    or of 0 and 1; what is added to the scores is a bias.

    A decoding step with flax's own cache has fewer queries than keys. If the description depends on positions, the
    function then needs an offset. Make the function inside the step, with the layer's ``cache_index`` as the offset, so
    that one compilation serves all steps. :class:`jaxmask.flax.Cache` needs no offset.

    Args:
        description: the keys that a query attends to; ``None`` for all.
        offset, query_positions, key_positions, sinks, sharding, implementation: as in :func:`attention`.

    Returns:
        A function of query, key and value, ``[..., length, heads, dim]``. Functions of equal arguments are equal, so
        that equal layers are traced once. It raises ``ValueError`` for an argument that it cannot use. Where a float
        mask is traced and turns out not to be of 0 and 1, its output is NaN.

    >>> import jaxmask
    >>> from flax import nnx
    >>> attend = make_attention_fn(jaxmask.SlidingWindow(4))
    >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 6, 8))).shape
    (1, 6, 8)
    >>> layer(jnp.ones((1, 6, 8)), mask=jaxmask.Padding(jnp.arange(6)[None] < 5)).shape
    (1, 6, 8)
    """
    arguments = {
        "offset": offset,
        "query_positions": query_positions,
        "key_positions": key_positions,
        "sinks": sinks,
        "sharding": sharding,
        "implementation": implementation,
    }
    return AttentionFn(Full() if description is None else description, arguments)


@dataclass(frozen=True, eq=False)
class AttentionFn:
    """Attention by a description, as Flax's modules call it. :func:`make_attention_fn` makes it."""

    description: Mask
    arguments: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        """Equal descriptions and equal arguments; arrays are equal only to themselves."""
        if not isinstance(other, AttentionFn):
            return NotImplemented
        pairs = ((value, other.arguments[name]) for name, value in self.arguments.items())
        return self.description == other.description and all(
            one is another or (not checks.is_array(one) and not checks.is_array(another) and one == another)
            for one, another in pairs
        )

    def __hash__(self) -> int:
        return hash(self.description)

    def __call__(
        self,
        query: Float[Array | np.ndarray, "..."],
        key: Float[Array | np.ndarray, "..."],
        value: Float[Array | np.ndarray, "..."],
        bias: Float[Array | np.ndarray, "..."] | None = None,
        mask: Mask | Shaped[Array | np.ndarray, "..."] | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: object = None,
        module: object = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: object = None,
        qk_attn_weights_einsum: object = None,
        attn_weights_value_einsum: object = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "..."]:
        for name, argument, hint in (
            ("module", module, "sow_weights=True asks for the weights, which are never written out"),
            ("einsum_dot_general", einsum_dot_general, "jaxmask computes the products itself"),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum, "jaxmask computes the products itself"),
            ("attn_weights_value_einsum", attn_weights_value_einsum, "jaxmask computes the products itself"),
        ):
            if argument is not None:
                raise ValueError(f"{name} must be None for jaxmask.attention, got {checks.describe(argument)}: {hint}")
        name = _name_of(precision)
        if promote_dtype is not None:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        elif dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        batch = query.shape[:-3]
        query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        joined = self.description & Causal() if is_causal else self.description
        is_legal: Any = True
        if isinstance(mask, Mask):
            joined = joined & mask
        elif mask is not None:
            allowed, is_legal = _allowed(mask)
            joined = joined & _of_call(_flat(allowed, batch), self.arguments["offset"])
        arguments = {
            "bias": None if bias is None else _flat(bias, batch),
            "dropout_rate": 0.0 if deterministic else dropout_rate,
            "dropout_rng": dropout_rng,
            "broadcast_dropout": broadcast_dropout,
            **self.arguments,
        }
        attend: Any = attention if name is None else partial(_in_precision, name)
        out = attend(query, key, value, joined, **arguments)
        if is_legal is not True:
            out = jnp.where(is_legal, out, jnp.nan)
        return out.reshape(*batch, *out.shape[1:])


def _name_of(precision: Any) -> str | None:
    """The name of a precision of both operands, ``None`` for the default one."""
    try:
        precisions = {lax.Precision(each) for each in (precision if isinstance(precision, tuple) else (precision,))}
    except ValueError:
        precisions = set[lax.Precision]()
    if len(precisions) != 1:
        raise ValueError(
            f"precision must be one of jax.lax.Precision, the same for both operands, got {checks.describe(precision)}"
        )
    (one,) = precisions
    return None if one == lax.Precision.DEFAULT else one.name.lower()


def _in_precision(name: str, *args: Any, **kwargs: Any) -> Any:
    """Attention whose products are of a precision, and so are those of its gradients, which are traced later."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    # What is static stays static.
    arrays = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]

    def attend(arrays: Any) -> Any:
        args, kwargs = tree.unflatten(
            leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)
        )
        return attention(*args, **kwargs)

    @jax.custom_vjp
    def run(arrays: Any) -> Any:
        with jax.default_matmul_precision(name):
            return attend(arrays)

    def forward(arrays: Any) -> tuple[Any, Any]:
        with jax.default_matmul_precision(name):
            return jax.vjp(attend, arrays)

    def backward(pull: Any, cotangents: Any) -> Any:
        with jax.default_matmul_precision(name):
            return pull(cotangents)

    run.defvjp(forward, backward)
    return run(arrays)


def _allowed(mask: Shaped[Array | np.ndarray, "..."]) -> tuple[Any, Any]:
    """The mask of a call as bools, and whether it is one of 0 and 1: ``True``, or an array where that is traced."""
    checks.array("mask", mask, "bif")
    if mask.dtype == jnp.bool_:
        return mask, True
    if checks.is_traced(mask):
        return mask != 0, _is_of_zeros_and_ones(mask)
    if not checks.known(mask, _is_of_zeros_and_ones):
        raise ValueError(
            f"mask must be bool, or of 0 and 1, got {checks.describe(mask)} with other values; what is added to the "
            "scores is not a mask: give it as bias"
        )
    return mask != 0, True


def _is_of_zeros_and_ones(mask: Shaped[Array | np.ndarray, "..."]) -> Bool[Array, ""]:
    return jnp.all((mask == 0) | (mask == 1))


def _of_call(mask: Bool[Array, "batch heads q kv"], offset: Offset | None) -> Mask:
    """The mask of a call, whose rows are its queries, wherever the first of them is."""
    if mask.shape[2] == 1 or offset is None:
        return Dense(mask)
    if np.ndim(offset):
        raise ValueError(
            "mask has a row for each query, and cannot be aligned with an offset for each example; give it as a bias "
            "of 0 and minus infinity, whose rows are the queries, or put a mask of positions into the description"
        )
    return Dense(mask, offset=offset)


def _flat(array: Array | np.ndarray, batch: tuple[int, ...]) -> Any:
    """``[*batch, heads, q, kv]`` with one axis for the batch."""
    if array.ndim < 3 or (array.ndim <= 4 and len(batch) == 1):
        return indices.as_4d(array)
    return jnp.broadcast_to(array, (*batch, *array.shape[-3:])).reshape(-1, *array.shape[-3:])
