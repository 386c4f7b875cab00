"""What attention to a divided sequence cannot do is refused, with what came, what was expected, and what to do."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmask
from jaxmask import Causal, Mask, Padding, Predicate, SlidingWindow, balanced_order, reorder, restore
from tests.helpers.bad import bad, refusals

X = jnp.zeros((2, 16, 4, 8))
ORDER = np.arange(16)[::-1]
ALLOWED: Any = np.ones((16, 16))
LIST: Any = [1, 2]
AUTO = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)


def attend(query: Any = X, key: Any = X, mask: Mask | None = None, **how: Any) -> Any:
    return jaxmask.attention(query, key, key, Causal() if mask is None else mask, **how)


def told(*spec: Any, **how: Any) -> Any:
    return attend(sharding=NamedSharding(AUTO, P(*spec)), **how)


def typed(query: P, key: P, **how: Any) -> Any:
    def put(spec: P) -> Any:
        return jax.device_put(X, NamedSharding(EXPLICIT, spec))

    return attend(put(query), put(key), **how)


def by_two_axes() -> Any:
    """Keys that are divided over another axis than their values."""
    query, key, value = (
        jax.device_put(X, NamedSharding(EXPLICIT, spec)) for spec in (P(), P(None, "seq"), P(None, "data"))
    )
    return jaxmask.attention(query, key, value, Causal())


def inside(axis_name: Any = "seq", *, has_all_keys: bool = False, **how: Any) -> Any:
    """On one device of a ``shard_map``."""

    keys = P() if has_all_keys else P(None, "seq")

    @partial(jax.shard_map, mesh=AUTO, in_specs=(P(None, "seq"), keys), out_specs=P(None, "seq"))
    def shard(query: Any, key: Any) -> Any:
        return attend(query, key, axis_name=axis_name, **how)

    return shard(X, X)


def by_traced_function(**how: Any) -> Any:
    def run(limit: Any) -> Any:
        return told(None, "seq", mask=Predicate(lambda b, h, q, kv: kv < limit), **how)

    return jax.jit(run)(jnp.int32(3))


test_bad_context_is_refused = refusals(
    [
        bad("no-scheme", lambda: told(None, "seq", context_parallel="tree"), ValueError, "'halo', 'gather'", "'tree'"),
        bad("whole", lambda: attend(context_parallel="ring"), ValueError, "'ring'", "has all keys", "sharding="),
        bad("not-divided", lambda: told("data", context_parallel="halo"), ValueError, "'halo'", "has all keys"),
        bad(
            "whole-keys",
            lambda: typed(P(None, "seq"), P(), context_parallel="gather"),
            ValueError,
            "'gather'",
            "has all keys",
        ),
        bad("length", lambda: told(None, "seq", query=X[:, :15], key=X[:, :15]), ValueError, "sequence into 4", "15"),
        bad("queries", lambda: told(None, "seq", query=X[:, :6], offset=0), ValueError, "sequence into 4", "has 6"),
        bad("dim", lambda: told(None, None, None, "seq"), ValueError, "divides dim", "reshard"),
        bad(
            "axis-of-examples",
            lambda: typed(P("data"), P(None, "data")),
            ValueError,
            "key is sharded",
            "agree",
            "or all queries",
            "reshard",
        ),
        bad(
            "keys-alone-gathered",
            lambda: typed(P(), P(None, "seq"), context_parallel="gather"),
            ValueError,
            "'gather'",
            "has all queries",
            '"merge"',
        ),
        bad(
            "queries-merged",
            lambda: typed(P(None, "seq"), P(None, "seq"), context_parallel="merge"),
            ValueError,
            '"merge"',
            "divided as the keys",
        ),
        bad("keys-merged", lambda: told("data", context_parallel="merge"), ValueError, "'merge'", "has all keys"),
        bad("two-divisions", by_two_axes, ValueError, r"key is divided over \['seq'\]", r"value over \['data'\]"),
        bad(
            "one-query",
            lambda: told(None, "seq", query=X[:, :1], offset=15),
            ValueError,
            "sequence into 4, but the query has 1",
            'context_parallel="merge"',
        ),
        bad(
            "keys-that-do-not-divide",
            lambda: told(None, "seq", query=X[:, :1], key=X[:, :15], offset=15, context_parallel="merge"),
            ValueError,
            "the keys into 4, but the key has 15",
        ),
        bad("other-axis", lambda: typed(P(None, "seq"), P(None, "data")), ValueError, "key is sharded", "sequence"),
        bad(
            "heads",
            lambda: told(None, "seq", query=X[:, :, :3], key=X[:, :, :3], context_parallel="ulysses"),
            ValueError,
            "3 heads and 3 of keys do not divide over 4",
            "None chooses",
        ),
        bad(
            "bias-of-heads",
            lambda: told(None, "seq", bias=jnp.zeros((1, 1, 16, 16)), context_parallel="ulysses"),
            ValueError,
            "bias has a row for each query",
        ),
        bad(
            "ring-by-xla",
            lambda: told(None, "seq", context_parallel="ring", implementation="xla"),
            ValueError,
            "'xla' cannot join",
            "leave it out",
        ),
        bad(
            "ring-closes-over",
            lambda: by_traced_function(context_parallel="ring"),
            ValueError,
            "closes over int32",
            "Partial",
        ),
        bad("outside", lambda: attend(axis_name="seq"), ValueError, "'seq'", "no such axis", "shard_map", "sharding="),
        bad("other-name", lambda: inside("model"), ValueError, "'model'", "no such axis"),
        bad("no-name", lambda: inside(3), TypeError, "axis_name must be the name", "3"),
        bad(
            "merged-inside",
            lambda: inside(context_parallel="merge"),
            ValueError,
            'context_parallel is "merge"',
            "divided as the keys",
        ),
        bad("no-names", lambda: inside(()), TypeError, "axis_name must be the name", r"\(\)"),
        bad("both", lambda: inside(sharding=P(None, "seq")), ValueError, "axis_name is 'seq' and sharding"),
        bad("keys-of-all", lambda: inside(has_all_keys=True), ValueError, "key is the same on every device", "offset="),
        bad(
            "mask-of-a-shard",
            lambda: inside(mask=Padding(jnp.ones((2, 4), bool))),
            ValueError,
            "4 keys of one device",
            "whole sequence of 16",
        ),
        bad(
            "mask-of-others", lambda: inside(mask=Padding(jnp.ones((2, 9), bool))), ValueError, "key_length is 16", "9"
        ),
        bad("bias-of-a-shard", lambda: inside(bias=jnp.zeros((1, 1, 4, 4))), ValueError, "bias must", r"4, 4, 16\]"),
        bad("order-and-offset", lambda: attend(positions=ORDER, offset=3), ValueError, "positions and offset"),
        bad(
            "order-and-queries",
            lambda: attend(positions=ORDER, query_positions=ORDER),
            ValueError,
            "positions and query_positions",
        ),
        bad("order-of-two", lambda: attend(query=X[:, :8], positions=ORDER), ValueError, "8 queries and 16 keys"),
        bad("order-of-a-shard", lambda: inside(positions=ORDER[:4]), ValueError, "each of the 16 tokens", r"\[4\]"),
        bad(
            "no-permutation", lambda: attend(positions=ORDER // 2), ValueError, "permutation of 0 to 15", "8 different"
        ),
        bad("order-beyond", lambda: attend(positions=ORDER + 1), ValueError, "positions", "16"),
        bad("order-of-floats", lambda: attend(positions=ORDER / 1.0), TypeError, "positions must be integer"),
        bad("explained", lambda: jaxmask.explain(X, X, X, context_parallel="halo"), ValueError, "has all keys"),
        bad("balanced-shards", lambda: balanced_order(Causal(), 16, 3), ValueError, "multiple of shards", "16 and 3"),
        bad("balanced-length", lambda: balanced_order(Causal(), 0, 1), ValueError, "length", "0"),
        bad("balanced-array", lambda: balanced_order(ALLOWED, 16, 4), TypeError, "must be a jaxmask.Mask"),
        bad(
            "balanced-traced",
            lambda: balanced_order(SlidingWindow(jnp.int32(3)), 16, 4),
            ValueError,
            "arrays of JAX",
            "NumPy",
        ),
        bad("reorder-length", lambda: reorder(X, ORDER[:3]), ValueError, "each of the 16 tokens along axis 1"),
        bad("restore-axis", lambda: restore(X, ORDER, axis=4), ValueError, "axis must be one of x", "4"),
        bad("reorder-list", lambda: reorder(LIST, ORDER), TypeError, "x must be a JAX or NumPy array"),
    ]
)
