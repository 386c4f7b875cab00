"""Bad input of attention is refused at once: the message names the argument, what came, and what was expected."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmask
from jaxmask import Causal, Mask, Padding, PerHead, Predicate, SlidingWindow
from jaxmask.kernels import blocked
from tests.helpers.bad import bad, refusals

VALUE, TYPE = ValueError, TypeError


def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


Q, K = zeros(2, 6, 4, 8), zeros(2, 6, 2, 8)
LONGER = zeros(2, 9, 2, 8)
HALF = {"query": Q.astype(jnp.float16), "key": K.astype(jnp.float16), "value": K.astype(jnp.float16)}


def attend(query: Any = Q, key: Any = K, value: Any = K, mask: Any = None, **how: Any) -> Any:
    return jaxmask.attention(query, key, value, mask, **how)


def explain(query: Any = Q, key: Any = K, value: Any = K, mask: Any = None, **how: Any) -> Any:
    return jaxmask.explain(query, key, value, mask, **how)


def splash(length: int = 128, dim_v: int = 64, mask: Mask | None = None, **how: Any) -> Any:
    query, value = zeros(1, length, 2, 64), zeros(1, length, 2, dim_v)
    return jaxmask.attention(query, query, value, mask or Causal(), implementation="splash", **how)


# Every one of the arrays, in one message.
ALL = (r"query float32\[2, 6, 4, 8\]",)
RESIDUAL = Causal() & Padding(jnp.ones((2, 6), bool))

SHAPES = [
    bad(
        "rank-3", lambda: attend(Q[0], K[0], K[0]), VALUE, r"\[batch, length, heads, dim\]", r"\[6, 4, 8\]", r"\[None\]"
    ),
    bad("rank-3-value", lambda: attend(value=K[0]), VALUE, *ALL, r"value float32\[6, 2, 8\]"),
    bad("batch", lambda: attend(key=K[:1]), VALUE, *ALL, r"key float32\[1, 6, 2, 8\]", r"value float32\[2, 6, 2, 8\]"),
    bad("batch-both", lambda: attend(key=K[:1], value=K[:1]), VALUE, *ALL, r"key float32\[1", r"value float32\[1"),
    bad("dim", lambda: attend(key=K[..., :4]), VALUE, *ALL, r"key float32\[2, 6, 2, 4\]", "dim of query and key"),
    bad("length", lambda: attend(value=K[:, :5]), VALUE, *ALL, r"value float32\[2, 5, 2, 8\]", "length"),
    bad("kv-heads", lambda: attend(value=K[:, :, :1]), VALUE, *ALL, r"value float32\[2, 6, 1, 8\]", "heads of key"),
    bad("heads", lambda: attend(Q[:, :, :3]), VALUE, "must divide", "got 2 and 3", r"query float32\[2, 6, 3, 8\]"),
    bad("heads-fewer", lambda: attend(Q[:, :, :1]), VALUE, "must divide", "got 2 and 1"),
    bad(
        "no-dim-v", lambda: attend(value=K[..., :0]), VALUE, "must have heads and dims", r"value float32\[2, 6, 2, 0\]"
    ),
    bad("no-heads", lambda: attend(key=K[:, :, :0], value=K[:, :, :0]), VALUE, "must have heads and dims"),
    bad("shapes-explained", lambda: explain(key=K[:1]), VALUE, *ALL, r"key float32\[1, 6, 2, 8\]"),
]

DTYPES = [
    bad(
        "dtypes",
        lambda: attend(value=K.astype(jnp.bfloat16)),
        TYPE,
        r"query float32\[.*key float32\[.*value bfloat16\[",
        "one dtype",
        "astype",
    ),
    bad("integers", lambda: attend(*(x.astype(int) for x in (Q, K, K))), TYPE, "query must be float", "int32"),
    bad("bools", lambda: attend(value=K > 0), TYPE, "value must be float", "bool"),
    bad(
        "eight-bits",
        lambda: attend(*(x.astype(jnp.float8_e4m3fn) for x in (Q, K, K))),
        TYPE,
        "query must be float16, bfloat16, float32 or float64",
        "float8_e4m3fn",
    ),
    bad("complex", lambda: attend(key=K.astype(complex)), TYPE, "key must be float", "complex64"),
    bad("list", lambda: attend([[1.0]]), TYPE, "query must be a JAX or NumPy array", "jnp.asarray"),
    bad("none", lambda: jaxmask.attention(Q, K, None), TYPE, "value must be a JAX or NumPy array", "None"),  # pyright: ignore[reportArgumentType]
]

MASKS = [
    bad(
        "array-mask",
        lambda: attend(mask=jnp.ones((6, 6), bool)),
        TYPE,
        "jaxmask.Mask",
        r"bool\[6, 6\]",
        "Dense",
        "Padding",
    ),
    bad("numpy-mask", lambda: attend(mask=np.ones((2, 6), bool)), TYPE, "jaxmask.Mask", r"bool\[2, 6\]", "Dense"),
    bad("name-mask", lambda: attend(mask="causal"), TYPE, "jaxmask.Mask", "'causal'"),
    bad("mask-batch", lambda: attend(mask=Padding(jnp.ones((3, 6), bool))), VALUE, "mask is for 3 batch", "have 2"),
    bad("mask-heads", lambda: attend(mask=PerHead([Causal()] * 3)), VALUE, "mask is for 3 heads", "have 4"),
    bad("mask-kv-heads", lambda: attend(mask=PerHead([Causal()] * 2)), VALUE, "mask is for 2 heads", "have 4"),
    bad("mask-length", lambda: attend(mask=Padding(jnp.ones((2, 5), bool))), VALUE, r"\[2, 5\]", "6"),
    bad("offset-missing", lambda: attend(Q[:, :2], mask=Causal()), VALUE, "offset is missing", "2 queries and 6 keys"),
    bad(
        "offset-missing-positions",
        lambda: attend(mask=Causal(), key_positions=jnp.arange(6)),
        VALUE,
        "offset is missing",
        "key_positions",
    ),
    bad("offset-batch", lambda: attend(mask=Causal(), offset=jnp.arange(3)), VALUE, "offset is for 3 batch", "have 2"),
    bad("offset-float", lambda: attend(mask=Causal(), offset=1.0), TYPE, "offset", "1.0"),
    bad(
        "positions-batch",
        lambda: attend(mask=Causal(), offset=0, key_positions=jnp.zeros((3, 6), int)),
        VALUE,
        "key_positions is for 3 batch",
        "have 2",
    ),
    bad(
        "positions-length",
        lambda: attend(mask=Causal(), offset=0, key_positions=jnp.arange(5)),
        VALUE,
        "key_positions",
        "6 keys",
        r"int32\[5\]",
    ),
    bad(
        "offset-and-query-positions",
        lambda: attend(mask=Causal(), offset=0, query_positions=jnp.arange(6)),
        VALUE,
        "offset and query_positions",
    ),
    bad(
        "query-positions-batch",
        lambda: attend(mask=Causal(), query_positions=jnp.zeros((3, 6), int)),
        VALUE,
        "query_positions is for 3 batch",
        "have 2",
    ),
    bad(
        "query-positions-explained",
        lambda: explain(mask=Causal(), query_positions=jnp.arange(5)),
        VALUE,
        "query_positions",
        "6 queries",
        r"int32\[5\]",
    ),
    bad(
        "positions-list",
        lambda: attend(mask=Causal(), offset=0, key_positions=[0] * 6),
        TYPE,
        "key_positions",
        "jnp.asarray",
    ),
]

NUMBERS = [
    bad("scale-nan", lambda: attend(scale=float("nan")), VALUE, "scale must be finite", "nan"),
    bad("scale-inf", lambda: attend(scale=float("inf")), VALUE, "scale must be finite", "inf"),
    bad("scale-of-float64", lambda: attend(scale=1e300), VALUE, "scale must be finite in float32", r"1e\+300"),
    bad("scale-of-numpy", lambda: attend(scale=np.float64(1e300)), VALUE, "scale must be finite in", r"1e\+300"),
    bad("scale-beyond", lambda: attend(scale=10**400), VALUE, "scale must be finite", "an int of more than 40 digits"),
    bad("cap-beyond", lambda: attend(logits_soft_cap=10**400), VALUE, "logits_soft_cap must be finite"),
    bad("cap-of-float64", lambda: attend(logits_soft_cap=1e-300), VALUE, "logits_soft_cap must be positive", "1e-300"),
    bad("scale-array", lambda scale: attend(scale=scale), TYPE, "scale", "multiply the query", argument=jnp.ones(())),
    bad("scale-numpy-array", lambda: attend(scale=np.ones(4)), TYPE, "scale must be a Python float", r"float64\[4\]"),
    bad("scale-bool", lambda: attend(scale=True), TYPE, "scale must be a Python float", "True"),
    bad("scale-str", lambda: attend(scale="1"), TYPE, "scale must be a Python float", "'1'"),
    bad("cap-zero", lambda: attend(logits_soft_cap=0.0), VALUE, "logits_soft_cap must be positive", "0.0", "None"),
    bad("cap-negative", lambda: attend(logits_soft_cap=-5), VALUE, "logits_soft_cap must be positive", "-5"),
    bad("cap-nan", lambda: attend(logits_soft_cap=float("nan")), VALUE, "logits_soft_cap must be finite", "nan"),
    bad("cap-array", lambda cap: attend(logits_soft_cap=cap), TYPE, "logits_soft_cap", argument=jnp.ones(())),
    bad("bias-shape", lambda: attend(bias=zeros(4, 6, 5)), VALUE, r"\[2, 4, 6, 6\]", r"float32\[4, 6, 5\]"),
    bad("bias-kv-heads", lambda: attend(bias=zeros(2, 6, 6)), VALUE, "bias must broadcast", r"float32\[2, 6, 6\]"),
    bad("bias-rank-5", lambda: attend(bias=zeros(1, 2, 4, 6, 6)), VALUE, "bias must broadcast", r"\[1, 2, 4, 6, 6\]"),
    bad(
        "bias-bool",
        lambda: attend(bias=jnp.ones((6, 6), bool)),
        TYPE,
        "bias must be float",
        "bool",
        r"Dense\(allowed\)",
    ),
    bad("bias-list", lambda: attend(bias=[[0.0] * 6] * 6), TYPE, "bias must be a JAX or NumPy array"),
]

IMPLEMENTATIONS = [
    bad(
        "unknown",
        lambda: attend(implementation="flash"),
        VALUE,
        "'flash'",
        "'cudnn'.*'tokamax'.*'splash'.*'xla'.*'blocked'",
    ),
    bad("unknown-explained", lambda: explain(implementation="Blocked"), VALUE, "'Blocked'", "'blocked'"),
    bad("cudnn-cpu", lambda: attend(**HALF, implementation="cudnn"), VALUE, "'cudnn' cannot", "NVIDIA GPU"),
    bad(
        "cudnn-all",
        lambda: attend(mask=RESIDUAL, logits_soft_cap=2.0, implementation="cudnn"),
        VALUE,
        "NVIDIA GPU",
        "not float32",
        "logits_soft_cap",
        "Padding",
    ),
    bad("cudnn-explained", lambda: explain(implementation="cudnn"), VALUE, "'cudnn' cannot", "NVIDIA GPU"),
    bad(
        "tokamax-residual",
        lambda: attend(mask=RESIDUAL, implementation="tokamax"),
        VALUE,
        "'tokamax' cannot",
        "Padding",
    ),
    bad(
        "tokamax-bias",
        lambda: attend(bias=lambda b, h, q, kv: 0.1 * (kv - q), implementation="tokamax"),
        VALUE,
        "bias that is a function",
    ),
    bad(
        "tokamax-cap",
        lambda: attend(bias=zeros(6, 6), logits_soft_cap=2.0, implementation="tokamax"),
        VALUE,
        "caps the scores after the bias",
    ),
    bad(
        "tokamax-positions",
        lambda: attend(mask=Causal(), offset=0, key_positions=jnp.arange(6), implementation="tokamax"),
        VALUE,
        "key_positions",
    ),
    *(
        bad(
            f"{name}-query-positions",
            lambda name=name: attend(
                *(zeros(1, 128, 2, 64, dtype=jnp.float16),) * 3,
                mask=Causal(),
                query_positions=jnp.arange(128),
                implementation=name,
            ),
            VALUE,
            f"'{name}' cannot",
            "it takes no query_positions",
        )
        for name in ("cudnn", "tokamax", "splash")
    ),
    bad("splash-ragged", lambda: splash(100), VALUE, "'splash' cannot", "100"),
    bad("splash-bias", lambda: splash(bias=zeros(128, 128)), VALUE, "'splash' cannot", "it takes no bias"),
    bad("splash-dim-v", lambda: splash(dim_v=32), VALUE, "'splash' cannot", "not 32 and 64"),
    bad(
        "splash-positions",
        lambda: splash(offset=0, key_positions=jnp.arange(128)),
        VALUE,
        "'splash' cannot",
        "key_positions",
    ),
]

BLOCKS = [
    bad("block-zero", lambda: blocked.attention(Q, K, K, Causal(), block=(0, 4)), VALUE, "block"),
    bad(
        "tokamax-window",
        lambda: jaxmask.attention(
            Q, zeros(2, 9, 2, 8), zeros(2, 9, 2, 8), SlidingWindow(3), offset=0, implementation="tokamax"
        ),
        VALUE,
        "implementation='tokamax'",
        "as many queries as keys",
    ),
    bad("block-negative", lambda: blocked.attention(Q, K, K, Causal(), block=(4, -128)), VALUE, "block"),
    bad("block-no-keys", lambda: blocked.attention(Q, K, K, Causal(), block=(4, 0)), VALUE, "block"),
    bad("block-float", lambda: blocked.attention(Q, K, K, Causal(), block=(2.0, 4)), TYPE, "block"),  # pyright: ignore[reportArgumentType]
    bad("sinks-shape", lambda: blocked.attention(Q, K, K, Causal(), sinks=zeros(3)), VALUE, "sinks", "4"),
    bad("sinks-integers", lambda: blocked.attention(Q, K, K, Causal(), sinks=zeros(4, dtype=int)), TYPE, "sinks"),
]

SHAPE_OF_Q = jax.ShapeDtypeStruct(Q.shape, Q.dtype)
TABLE_OF_BIAS = np.zeros(6, np.float32)


def drop(rate: Any = 0.5, rng: Any = None, **how: Any) -> Any:
    return attend(dropout_rate=rate, dropout_rng=jax.random.key(0) if rng is None else rng, **how)


TWO: Any = lambda q, kv: kv <= q  # noqa: E731


def by_branch(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return 1.0 if q > kv else 0.0


def by_and(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q > kv and kv > 0


BIASES = [
    bad(
        "bias-fn-bool",
        lambda: attend(bias=lambda b, h, q, kv: kv <= q),
        TYPE,
        "returns must be float",
        "bool",
        "Predicate",
    ),
    bad("bias-fn-none", lambda: attend(bias=lambda b, h, q, kv: None), TYPE, "what the function bias returns", "None"),
    bad("bias-fn-complex", lambda: attend(bias=lambda b, h, q, kv: 1j * kv), TYPE, "must be float", "complex64"),
    bad(
        "bias-fn-shape",
        lambda: attend(bias=lambda b, h, q, kv: zeros(2, 4, 6, 6)),
        VALUE,
        "2 queries and 3 keys",
        r"float32\[2, 4, 6, 6\]",
        "called for tiles",
    ),
    bad(
        "bias-fn-rank",
        lambda: attend(bias=lambda b, h, q, kv: (q - kv)[None] * 1.0),
        VALUE,
        r"float32\[1, 1, 1, 2, 3\]",
    ),
    bad(
        "bias-fn-heads",
        lambda: attend(bias=lambda b, h, q, kv: zeros(3, 1, 1)),
        VALUE,
        r"\[2, 4, 2, 3\]",
        r"float32\[3, 1, 1\]",
    ),
    bad(
        "bias-fn-two",
        lambda: attend(bias=lambda q, kv: 0.1 * (kv - q)),
        TYPE,
        r"bias must be a function of \(b, h, q, kv\)",
        "too many",
    ),
    bad(
        "bias-fn-five",
        lambda: attend(bias=lambda b, h, q, kv, x: 0.1 * kv),
        TYPE,
        r"bias must be a function of \(b, h, q, kv\)",
        "'x'",
    ),
    bad("bias-fn-if", lambda: attend(bias=by_branch), TYPE, "function bias is traced", "jnp.where"),
    bad("bias-fn-and", lambda: attend(bias=by_and), TYPE, "function bias is traced", "&"),
    bad(
        "bias-fn-table",
        lambda: attend(bias=lambda b, h, q, kv: TABLE_OF_BIAS[q]),
        TYPE,
        "function bias is traced",
        r"jnp.asarray\(table\)",
    ),
    bad(
        "predicate-two",
        lambda: attend(mask=Predicate(TWO)),
        TYPE,
        r"fn must be a function of \(b, h, q, kv\)",
    ),  # pyright: ignore[reportArgumentType]
    bad(
        "predicate-table",
        lambda: attend(mask=Predicate(lambda b, h, q, kv: TABLE_OF_BIAS[q] > 0)),
        TYPE,
        "function fn is traced",
        r"jnp.asarray\(table\)",
    ),
    bad("predicate-and", lambda: attend(mask=Predicate(by_and)), TYPE, "function fn is traced", "&"),
]

SINKS_AND_DROPOUT = [
    bad(
        "sinks-heads",
        lambda: attend(sinks=zeros(2)),
        VALUE,
        "sinks must have one logit for each of the 4 heads",
        r"float32\[2\]",
    ),
    bad("sinks-rank", lambda: attend(sinks=zeros(1, 4)), VALUE, "sinks must have one logit", r"float32\[1, 4\]"),
    bad("sinks-bool", lambda: attend(sinks=jnp.ones(4, bool)), TYPE, "sinks must be float", "bool"),
    bad("sinks-list", lambda: attend(sinks=[0.0] * 4), TYPE, "sinks must be a JAX or NumPy array", "jnp.asarray"),
    bad(
        "sinks-tokamax", lambda: attend(sinks=zeros(4), implementation="tokamax"), VALUE, "'tokamax' cannot", "no sinks"
    ),
    bad("rate-one", lambda: drop(1.0), VALUE, "dropout_rate must be at least 0 and less than 1", "1.0"),
    bad("rate-negative", lambda: drop(-0.1), VALUE, "dropout_rate must be", "-0.1"),
    bad("rate-nan", lambda: drop(float("nan")), VALUE, "dropout_rate", "nan"),
    bad("rate-array", lambda rate: drop(rate), TYPE, "dropout_rate must be a Python float", argument=jnp.ones(()) / 2),
    bad("rate-bool", lambda: drop(True), TYPE, "dropout_rate must be a Python float", "True"),
    bad("rng-missing", lambda: attend(dropout_rate=0.5), VALUE, "dropout_rng is missing", r"jax.random.key\(0\)"),
    bad("rng-int", lambda: drop(rng=3), TYPE, "dropout_rng must be one key", "3", r"jax.random.key\(0\)"),
    bad("rng-batch", lambda: drop(rng=jax.random.split(jax.random.key(0))), TYPE, "dropout_rng must be one key"),
    bad("rng-float", lambda: drop(rng=zeros(2)), TYPE, "dropout_rng must be one key", r"float32\[2\]"),
    bad(
        "dropout-splash",
        lambda: splash(dropout_rate=0.5, dropout_rng=jax.random.key(0)),
        VALUE,
        "'splash' cannot",
        "drops no weights",
    ),
    bad("residual-tokamax", lambda: attend(return_residual=True, implementation="tokamax"), VALUE, "no log-sum-exp"),
]

ELSEWHERE = [
    bad("is-causal", lambda: attend(is_causal=True), TYPE, "attention takes no is_causal", r"Causal\(\)"),
    bad("is-causal-explained", lambda: explain(is_causal=True), TYPE, "explain takes no is_causal", r"Causal\(\)"),
    bad("lengths", lambda: attend(key_value_seq_lengths=jnp.ones(2, int)), TYPE, r"Prefix\(lengths\)"),
    bad("window", lambda: attend(local_window_size=4), TYPE, r"Window\(left, right\)"),
    bad("window-size", lambda: attend(window_size=(4, 0)), TYPE, r"Window\(left, right\)"),
    bad("segment-ids", lambda: attend(segment_ids=jnp.ones((2, 6), int)), TYPE, r"Segments\(ids\)"),
    bad("shape-query", lambda: attend(SHAPE_OF_Q), TYPE, "query must be an array", "explain takes shapes"),
    bad("shape-value", lambda: attend(value=SHAPE_OF_Q), TYPE, "value must be an array", "jax.eval_shape"),
]

MERGE: Any = jaxmask.merge_attention
MERGES = [
    bad("merge-none", lambda: MERGE([]), VALUE, "parts must be pairs", r"got \[\]"),
    bad(
        "merge-outputs",
        lambda: MERGE([Q, Q]),
        VALUE,
        r"parts\[0\] must be a pair",
        "return_residual=True",
    ),  # pyright: ignore[reportArgumentType]
    bad(
        "merge-shapes",
        lambda: MERGE([(Q, zeros(2, 6, 4)), (Q[:1], zeros(1, 6, 4))]),
        VALUE,
        "the same shapes",
    ),
    bad(
        "merge-heads-first",
        lambda: MERGE([(Q, zeros(2, 4, 6))]),
        VALUE,
        r"\[batch, q, heads\]",
        r"float32\[2, 4, 6\]",
    ),
    bad(
        "merge-integers",
        lambda: MERGE([(Q, zeros(2, 6, 4, dtype=int))]),
        TYPE,
        r"log-sum-exp of parts\[0\]",
        "int32",
    ),
]

TABLE = SHAPES + DTYPES + MASKS + NUMBERS + IMPLEMENTATIONS + BLOCKS + BIASES + SINKS_AND_DROPOUT + ELSEWHERE + MERGES
test_bad_input_of_attention_is_refused = refusals(TABLE)


def test_the_table_has_no_name_twice() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
