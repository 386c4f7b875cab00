"""Calls of attention that are compiled for GPUs: every kind of mask, and what else a call can ask for."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmask
from jaxmask import Causal, Chunked, Dense, Full, Padding, PerHead, Predicate, Prefix, Segments, SlidingWindow, zoo
from tests.gpu.target import CARDS, Program, compile_for

BATCH, LENGTH, HEADS, KV_HEADS, DIMS = 2, 4096, 4, 2, (64, 128)
# Those of a call and its gradients.
KERNELS = "jaxmask_forward", "jaxmask_dq", "jaxmask_dkv"

_random = np.random.default_rng(0)
documents = np.sort(_random.integers(0, 8, (BATCH, LENGTH)), axis=1).astype(np.int32)
ids = jnp.asarray(documents)
valid = jnp.asarray(np.arange(LENGTH) < np.array([[3000], [LENGTH]]))
lengths = jnp.array([300, 1000])
is_global = jnp.asarray(_random.random((BATCH, LENGTH)) < 0.01)
order = jnp.asarray(_random.permutation(LENGTH))[None]
slopes = jnp.asarray(2.0 ** -np.arange(1, HEADS + 1), jnp.float32)


def every(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Each head at steps of its own."""
    return (kv <= q) & ((q - kv) % (h + 2) == 0)


def same_document(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """The ids are closed over."""
    return ids[b, q] == ids[b, kv]


def same(ids: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    """The ids are given."""
    return ids[b, q] == ids[b, kv]


def alibi(slopes: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    """A bias by the distance, which each head weighs in its own way."""
    return slopes[h] * (kv - q)


# The arguments of attention. JAX's arrays are traced, those of NumPy are constants of the program. Ids in another order
# would be the same program.
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {"mask": Full()},
    "causal": {"mask": Causal()},
    "window": {"mask": SlidingWindow(512)},
    "traced window": {"mask": SlidingWindow(jnp.asarray(512))},
    "documents, static": {"mask": Causal() & Segments(documents)},
    "documents": {"mask": Causal() & Segments(ids)},
    "padding": {"mask": Causal() & Padding(valid)},
    "prefix": {"mask": Causal() | Prefix(1000)},
    "prefix of each example": {"mask": Causal() | Prefix(lengths)},
    "chunks from a start of each example": {"mask": Causal() & Chunked(256, jnp.array([3, 9]))},
    "per head": {"mask": PerHead([Causal(), SlidingWindow(512), Full(), Causal() & Segments(ids)])},
    "predicate on heads": {"mask": Predicate(every, heads=HEADS)},
    "predicate that closes over ids": {"mask": Causal() & Predicate(same_document, batch=BATCH)},
    "predicate that is given ids": {"mask": Causal() & Predicate(jax.tree_util.Partial(same, ids), batch=BATCH)},
    "dense": {"mask": Dense(jnp.asarray(_random.random((1, 1, LENGTH, LENGTH)) < 0.3))},
    "not causal: an empty row": {"mask": ~Causal()},
    "window and global tokens": {"mask": zoo.global_sliding_window(513, is_global)},
    "window in another order": {"mask": zoo.Reordered(SlidingWindow(512), order)},
    "blocks of a table": {"mask": zoo.Blocks(jnp.asarray(_random.random((64, 64)) < 0.4), 64)},
}
# What else a call can ask for. It is compiled for dim 64 alone, where no register may be spilled.
BESIDES: dict[str, dict[str, Any]] = {
    "sinks and window": {"mask": SlidingWindow(512), "sinks": jnp.zeros(HEADS)},
    "bias, a function": {"mask": Causal(), "bias": jax.tree_util.Partial(alibi, slopes)},
    "soft cap": {"mask": Causal(), "logits_soft_cap": 50.0},
    "dropout": {"mask": Causal(), "dropout_rate": 0.1, "dropout_rng": jax.random.key(0)},
    "offset of each example": {"mask": SlidingWindow(512), "offset": jnp.array([0, 5])},
    "positions of queries": {"mask": Causal(), "query_positions": jnp.arange(LENGTH)},
    "ragged length": {"mask": Causal(), "length": LENGTH - 100},
    "one head of keys": {"mask": Causal(), "kv_heads": 1},
    "as many heads of keys": {"mask": Causal(), "kv_heads": HEADS},
}
CALLS = MASKS | BESIDES
# Masks that read an element of an array for each pair.
TABLES = "dense", "blocks of a table"


def names(dim: int) -> list[str]:
    """Of the calls that are compiled for a dim."""
    return list(CALLS if dim == DIMS[0] else MASKS)


def shapes(dim: int, length: int = LENGTH, kv_heads: int = KV_HEADS, dtype: Any = jnp.bfloat16) -> list[Any]:
    """Of query, key, value and the cotangent of the output."""
    query, key = (jax.ShapeDtypeStruct((BATCH, length, heads, dim), dtype) for heads in (HEADS, kv_heads))
    return [query, key, key, query]


@cache
def compiled(name: str, dim: int, card: str) -> Program:
    """One of the calls and its gradients, compiled for a card."""
    arguments = dict(CALLS[name])
    sizes = {size: arguments.pop(size) for size in ("length", "kv_heads") if size in arguments}
    return compile_for(CARDS[card], *with_gradients("pallas", arguments), *shapes(dim, **sizes))


def with_gradients(implementation: Any, arguments: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A function of the traced arguments, query, key, value and a cotangent; and those arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]

    def run(given: list[Any], query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        of_call = iter(given)
        restored = [next(of_call) if is_traced else leaf for leaf, is_traced in zip(leaves, traced, strict=True)]
        attend = partial(jaxmask.attention, implementation=implementation, **jax.tree.unflatten(structure, restored))
        output, pull_back = jax.vjp(attend, query, key, value)
        return output, pull_back(cotangent)

    return run, [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]
