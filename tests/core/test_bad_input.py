"""Bad input is refused, and the refusal names the argument, what came and what was expected; while tracing too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

import jaxmask
from jaxmask import (
    AttentionMaskConverter,
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    zoo,
)
from jaxmask.bias import from_allowed
from jaxmask.hf import modeling_attn_mask_utils as hf
from jaxmask.kernels.splash import to_splash
from jaxmask.parse import MaskSyntaxError, parse_mask
from tests.helpers.bad import bad, refusal, refusals

# Bad input is what the types forbid: nothing here is known to the type checker.
lib: Any = jaxmask
causal: Any = AttentionMaskConverter(True)
plain: Any = AttentionMaskConverter(False)
hf_causal: Any = hf.AttentionMaskConverter(True)
hf_any: Any = hf
CAUSAL: Any = Causal()

ONES: Any = jnp.ones((2, 5), jnp.int32)
VALID: Any = jnp.ones((2, 5), jnp.bool_)
EMBEDS: Any = jnp.zeros((2, 3, 8), jnp.float32)
IDS: Any = np.ones((2, 5), np.int64)
TENSOR: Any = torch.ones(2, 5, dtype=torch.bool)
TO_JAX = r"torch_compat\.to_jax"
TENSOR_CAME = r"a torch tensor bool\[2, 5\]"


def fine_predicate(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv <= q


def single_bounds(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv.min <= q.max


def integer_predicate(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q - kv


def shapeless_predicate(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.ones((7,), jnp.bool_)


TABLE_OF_KEYS = np.arange(9) % 2 == 0
LIST_OF_KEYS = TABLE_OF_KEYS.tolist()
PREDICATES: dict[str, Any] = {
    "if": lambda b, h, q, kv: kv <= q if q > 2 else kv < q,
    "and": lambda b, h, q, kv: (kv <= q) and (kv > 2),
    "chain": lambda b, h, q, kv: 0 <= q - kv < 4,
    "max": lambda b, h, q, kv: max(q, kv) > 2,
    "table": lambda b, h, q, kv: TABLE_OF_KEYS[kv],
    "list": lambda b, h, q, kv: LIST_OF_KEYS[kv],
    "dict": lambda b, h, q, kv: {1: True}[kv],
    "int": lambda b, h, q, kv: int(q) > 3,
    "range": lambda b, h, q, kv: sum(range(kv)) > 3,
    "numpy": lambda b, h, q, kv: np.isin(kv, [1, 2]),
}


class Branching(Mask):
    """A mask of a user who writes for numbers."""

    def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= q if q > 2 else kv < q

    def tile_bounds(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (True, False) if kv.min <= q.max else (False, False)


def shape_of(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


TYPE, VALUE = TypeError, ValueError
IS_TRACED = "is traced", "jnp.where in place of if", "& and | in place of and and or", r"jnp\.asarray\(table\)"
NARROW = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn]

FAR = np.full((1, 2, 5), 2**40)
CHOSEN = np.array([[[[1], [0]]]])
TABLE = [
    bad(
        "window-one-side",
        lambda: lib.Window(4),
        TypeError,
        r"Window takes \(left, right\)",
        "'right'",
        "``None`` is all",
    ),
    bad(
        "window-by-another-name",
        lambda: lib.SlidingWindow(window=4),
        TypeError,
        r"SlidingWindow takes \(size\)",
        "last ``size`` keys",
    ),
    bad("causal-of-a-length", lambda: lib.Causal(4), TypeError, r"Causal takes \(\)", "too many"),
    bad(
        "lengths-are-no-padding",
        lambda: lib.Padding(jnp.array([3, 2])),
        ValueError,
        r"int32\[2\]",
        r"Prefix\(lengths\)",
    ),
    # Masks: their arguments.
    bad("padding-rank", lib.Padding, VALUE, "valid", r"bool\[5\]", r"\[batch, kv\]", argument=VALID[0]),
    bad("padding-float", lib.Padding, TYPE, "valid", r"float32\[2, 5\]", "bool or integer", argument=jnp.ones((2, 5))),
    bad("padding-torch", lambda: lib.Padding(TENSOR), TYPE, "valid", TENSOR_CAME, "JAX or NumPy array", TO_JAX),
    bad("padding-list", lambda: lib.Padding([[1, 0]]), TYPE, "valid", "a list", "JAX or NumPy array", r"jnp\.asarray"),
    bad("padding-none", lambda: lib.Padding(None), TYPE, "valid", "None", "JAX or NumPy array"),
    bad("sliding-zero", lambda: SlidingWindow(0), VALUE, "size", "got 0", "at least 1"),
    bad("sliding-negative", lambda: SlidingWindow(-2), VALUE, "size", "got -2", "at least 1"),
    bad("sliding-float", lambda: lib.SlidingWindow(2.0), TYPE, "size", r"2\.0", "int"),
    bad("sliding-bool", lambda: SlidingWindow(True), TYPE, "size", "True", "int"),
    bad("sliding-too-large", lambda: SlidingWindow(2**31), VALUE, "size", str(2**31), "int32"),
    bad("sliding-rank", lib.SlidingWindow, VALUE, "size", r"int32\[5\]", "rank 0", argument=ONES[0]),
    bad("sliding-float-array", lib.SlidingWindow, TYPE, "size", r"float32\[\]", "integer", argument=jnp.ones(())),
    bad("window-left", lambda: Window(-1, 0), VALUE, "left", "got -1", "at least 0"),
    bad("window-right", lambda: Window(None, -3), VALUE, "right", "got -3", "at least 0"),
    bad("prefix-negative", lambda: Prefix(-1), VALUE, "length", "got -1", "at least 0"),
    bad("prefix-rank", lib.Prefix, VALUE, "length", r"int32\[2, 5\]", "rank 0 or 1", argument=ONES),
    bad("dense-rank", lib.Dense, VALUE, "allowed", r"bool\[1, 2, 5\]", "rank 2 or 4", argument=VALID[None]),
    bad("dense-int", lib.Dense, TYPE, "allowed", r"int32\[2, 5\]", "bool", argument=ONES),
    bad("dense-bias", lib.Dense, TYPE, "allowed", r"float32\[2, 5\]", "allowed == 0", argument=jnp.zeros((2, 5))),
    bad("dense-torch", lambda: lib.Dense(TENSOR), TYPE, "allowed", TENSOR_CAME, TO_JAX),
    bad("dense-offset", lambda: lib.Dense(VALID, 1.5), TYPE, "offset", r"1\.5", "int"),
    bad("predicate-call", lambda: lib.Predicate(3), TYPE, "fn", "got 3", r"function of \(b, h, q, kv\)"),
    # Segments, chunks, masks by head.
    bad("ids-rank", lib.Segments, VALUE, "query_ids", r"int32\[5\]", "rank 2", r"query_ids\[None\]", argument=ONES[0]),
    bad("ids-bool", lib.Segments, TYPE, "query_ids", r"bool\[2, 5\]", "integer", "cumsum", argument=VALID),
    bad("ids-float", lib.Segments, TYPE, "query_ids", r"float32\[2, 5\]", "integer", argument=jnp.ones((2, 5))),
    bad("ids-torch", lambda: lib.Segments(TENSOR), TYPE, "query_ids", TENSOR_CAME, TO_JAX),
    bad("ids-list", lambda: lib.Segments([[0, 0, 1]]), TYPE, "query_ids", "a list", r"jnp\.asarray"),
    bad("ids-too-large", lambda: lib.Segments(np.array([[1, 2**31]])), VALUE, "query_ids", "int32", str(2**31)),
    bad("ids-unsigned", lambda: lib.Segments(np.array([[2**63]], np.uint64)), VALUE, "query_ids", "int32", str(2**63)),
    bad("key-ids-too-small", lambda: Segments(IDS, -(2**33) * IDS), VALUE, "key_ids", "int32", str(-(2**33))),
    bad(
        "key-ids-rank",
        lambda ids: Segments(ids, ids[None]),
        VALUE,
        "key_ids must have rank 2",
        r"int32\[1, 2, 5\]",
        argument=ONES,
    ),
    bad(
        "ids-batch",
        lambda ids: Segments(ids, ids[:1].repeat(3, 0)),
        VALUE,
        "query_ids and key_ids",
        "size of batch",
        r"int32\[2, 5\] and int32\[3, 5\]",
        argument=ONES,
    ),
    bad(
        "ids-and-padding-batch",
        lambda ids: Segments(ids) & Padding(VALID),
        VALUE,
        "size of batch",
        r"3 in Segments\(int32\[3, 5\]\)",
        r"2 in Padding\(bool\[2, 5\]\)",
        argument=jnp.ones((3, 5), jnp.int32),
    ),
    bad(
        "ids-of-other-keys",
        lambda ids: Segments(ids).dense(4, 4),
        VALUE,
        "key_length is 4",
        "query_ids of Segments",
        "5 keys",
        argument=ONES,
    ),
    bad(
        "key-ids-of-other-keys",
        lambda ids: Segments(ids, ids[:, :4]).tiles(5, 5),
        VALUE,
        "key_length is 5",
        "key_ids of Segments",
        r"4 keys \(int32\[2, 4\]\)",
        argument=ONES,
    ),
    bad(
        "query-ids-too-short",
        lambda ids: Segments(ids[:, :2], ids).dense(3, 5, offset=0),
        VALUE,
        "query_ids of Segments",
        "queries at 0 to 1",
        "3 queries from 0 on",
        r"Segments\(query_ids, key_ids, offset=",
        argument=ONES,
    ),
    bad(
        "query-ids-before-the-offset",
        lambda ids: Segments(ids[:, :2], ids, offset=3).dense(2, 5, offset=2),
        VALUE,
        "query_ids of Segments",
        "queries at 3 to 4",
        "2 queries from 2 on",
        argument=ONES,
    ),
    bad(
        "query-ids-too-short-for-the-offset",
        lambda ids: (Causal() & Segments(ids)).dense(2, 5, offset=4),
        VALUE,
        "queries at 0 to 4",
        "2 queries from 4 on",
        argument=ONES,
    ),
    bad(
        "ids-offset-missing",
        lambda ids: Segments(ids).dense(2, 5),
        VALUE,
        "offset is missing",
        r"Segments\(int32\[2, 5\]\)",
        "offset=3 .*bottom-right",
        argument=ONES,
    ),
    bad(
        "ids-offset-without-key-ids",
        lambda ids: Segments(ids, offset=3),
        VALUE,
        "offset of Segments",
        "needs key_ids",
        "offset=3 and no key_ids",
        argument=ONES,
    ),
    bad(
        "ids-traced-offset-without-key-ids",
        lambda offset: Segments(ONES, offset=offset),
        VALUE,
        "offset of Segments",
        r"offset=int32\[\] and no key_ids",
        argument=jnp.array(3),
    ),
    bad(
        "ids-offset-rank",
        lambda offset: lib.Segments(ONES, ONES, offset),
        VALUE,
        "offset must have rank 0",
        r"int32\[5\]",
        argument=ONES[0],
    ),
    bad("chunk-zero", lambda: Chunked(0), VALUE, "size", "got 0", "at least 1"),
    bad("chunk-float", lambda: lib.Chunked(2.5), TYPE, "size", r"2\.5", "int"),
    bad("chunk-rank", lib.Chunked, VALUE, "size", r"int32\[5\]", "rank 0", argument=ONES[0]),
    bad("chunk-start-float", lambda: lib.Chunked(2, 0.5), TYPE, "start", r"0\.5", "int"),
    bad("chunk-start-rank", lambda start: lib.Chunked(2, start), VALUE, "start", "rank 0 or 1", argument=ONES),
    bad(
        "chunk-start-batch",
        lambda start: Chunked(2, start) | Padding(VALID),
        VALUE,
        "size of batch",
        r"5 in Chunked\(2, int32\[5\]\)",
        r"2 in Padding",
        argument=ONES[0],
    ),
    bad("heads-none", lambda: PerHead([]), VALUE, "masks of PerHead", "a mask for each head", "got none"),
    bad("heads-one-mask", lambda: lib.PerHead(CAUSAL), TYPE, "masks of PerHead", "list or a tuple", "a Causal"),
    bad("heads-generator", lambda: lib.PerHead(m for m in [CAUSAL]), TYPE, "masks of PerHead", "list", "a generator"),
    bad("heads-no-mask", lambda: lib.PerHead([CAUSAL, None]), TYPE, "must be masks", "None for head 1"),
    bad("heads-class", lambda: lib.PerHead([Causal]), TYPE, "must be masks", "the class Causal for head 0"),
    bad(
        "heads-array",
        lambda valid: lib.PerHead([CAUSAL, valid]),
        TYPE,
        "must be masks",
        r"bool\[2, 5\] for head 1",
        argument=VALID,
    ),
    bad(
        "heads-nested",
        lambda: PerHead([Full(), PerHead([Causal(), Full()])]),
        VALUE,
        "masks of PerHead",
        "one head each",
        r"2 heads in PerHead\(\(Causal\(\), Full\(\)\)\) for head 1",
    ),
    bad(
        "heads-of-a-dense",
        lambda allowed: PerHead([Causal(), Dense(allowed)]),
        VALUE,
        "one head each",
        "3 heads in Dense",
        argument=jnp.ones((1, 3, 4, 4), jnp.bool_),
    ),
    bad(
        "heads-batch",
        lambda length: PerHead([Padding(VALID), Prefix(length)]),
        VALUE,
        "masks of PerHead must agree on the size of batch",
        r"2 in Padding\(bool\[2, 5\]\)",
        r"5 in Prefix\(int32\[5\]\)",
        argument=ONES[0],
    ),
    bad(
        "heads-disagree",
        lambda: PerHead([Causal(), Full()]) & PerHead([Causal(), Full(), Causal()]),
        VALUE,
        "size of heads",
        r"2 in PerHead\(\(Causal\(\), Full\(\)\)\)",
        "3 in PerHead",
    ),
    bad(
        "heads-keys",
        lambda valid: PerHead([Causal(), Padding(valid)]).dense(4, 4),
        VALUE,
        "key_length is 4",
        "5 keys",
        argument=VALID,
    ),
    bad("heads-offset", lambda: PerHead([Full(), Causal()]).dense(2, 4), VALUE, "offset is missing", r"Causal\(\)"),
    # Predicates that know their sizes and bounds.
    bad("predicate-batch", lambda: Predicate(fine_predicate, batch=0), VALUE, "batch", "got 0", "at least 1"),
    bad("predicate-heads", lambda: lib.Predicate(fine_predicate, heads=2.0), TYPE, "heads", r"2\.0", "int"),
    bad(
        "predicate-traced-batch",
        lambda: jax.jit(lambda n: Predicate(fine_predicate, batch=n).dense(2, 2))(2),
        TYPE,
        "batch",
        r"int32\[\]",
        "Python int",
    ),
    bad(
        "predicate-bounds",
        lambda: lib.Predicate(fine_predicate, bounds=(True, False)),
        TYPE,
        "bounds must be a function",
        r"\(b, h, q, kv\)",
        r"got \(True, False\)",
    ),
    bad(
        "predicate-bounds-pair",
        lambda: lib.Predicate(fine_predicate, bounds=single_bounds).tiles(8, 8, block=4),
        TYPE,
        "bounds of Predicate must return a pair",
        r"got bool\[",
        "single_bounds",
    ),
    bad(
        "predicate-bounds-int",
        lambda: lib.Predicate(fine_predicate, bounds=lambda b, h, q, kv: (1, 0)).tiles(8, 8, block=4),
        TYPE,
        "bounds of Predicate must return bool",
        "got 1",
    ),
    # Tiles.
    bad("block-zero", lambda: Causal().tiles(4, 4, block=0), VALUE, "block", "got 0", "at least 1"),
    bad("block-negative", lambda: Causal().tiles(4, 4, block=(2, -1)), VALUE, "block", "got -1", "at least 1"),
    bad("block-float", lambda: lib.Causal().tiles(4, 4, block=2.0), TYPE, "block", r"2\.0", "Python int"),
    bad("block-bool", lambda: Causal().tiles(4, 4, block=True), TYPE, "block", "True", "Python int"),
    bad("block-none", lambda: lib.Causal().tiles(4, 4, block=None), TYPE, "block", "None", "Python int"),
    bad(
        "block-three",
        lambda: lib.Causal().tiles(4, 4, block=(1, 2, 3)),
        TYPE,
        "block",
        r"\(1, 2, 3\)",
        r"Python int, or a tuple of two \(queries, keys\)",
    ),
    bad("block-list", lambda: lib.Causal().tiles(4, 4, block=[2, 2]), TYPE, "block", "a list", "a tuple of two"),
    bad(
        "block-traced",
        lambda: jax.jit(lambda n: lib.Causal().tiles(4, 4, block=n).states)(2),
        TYPE,
        "block",
        r"int32\[\]",
        "static",
    ),
    bad(
        "block-traced-keys",
        lambda: jax.jit(lambda n: lib.Causal().tiles(4, 4, block=(2, n)).states)(2),
        TYPE,
        "block",
        r"int32\[\]",
        "static",
    ),
    bad(
        "tiles-traced-query-length",
        lambda n: lib.Causal().tiles(n, 4),
        TYPE,
        "query_length",
        r"int32\[\]",
        "Python int",
        "offset or a padding mask",
        argument=jnp.array(4),
    ),
    bad(
        "tiles-traced-key-length",
        lambda n: lib.Causal().tiles(4, n),
        TYPE,
        "key_length",
        r"int32\[\]",
        "Python int",
        argument=jnp.array(4),
    ),
    bad("tiles-offset-missing", lambda: Causal().tiles(1, 5), VALUE, "offset is missing", "offset=4 .*bottom-right"),
    bad(
        "tiles-offset-batch",
        lambda t: Padding(VALID).tiles(5, 5, offset=t),
        VALUE,
        "offset",
        "batch of 5",
        "one of 2",
        argument=ONES[0],
    ),
    # Positions of keys.
    bad(
        "positions-length",
        lambda at: Causal().dense(1, 4, offset=0, key_positions=at),
        VALUE,
        "key_positions",
        "each of the 4 keys",
        r"int32\[5\]",
        argument=ONES[0],
    ),
    bad(
        "positions-rank",
        lambda at: Causal().tiles(1, 5, offset=0, key_positions=at),
        VALUE,
        "key_positions",
        r"int32\[1, 2, 5\]",
        "rank 1 or 2",
        argument=ONES[None],
    ),
    bad(
        "positions-float",
        lambda at: Causal().bias(1, 5, offset=0, key_positions=at),
        TYPE,
        "key_positions must be integer",
        r"float32\[5\]",
        argument=jnp.zeros(5),
    ),
    bad(
        "positions-bool",
        lambda at: Causal().dense(1, 5, offset=0, key_positions=at),
        TYPE,
        "key_positions must be integer",
        r"bool\[2, 5\]",
        argument=VALID,
    ),
    bad(
        "positions-list",
        lambda: lib.Causal().dense(1, 2, offset=0, key_positions=[0, 1]),
        TYPE,
        "key_positions",
        "a list",
        r"jnp\.asarray",
    ),
    bad(
        "positions-torch",
        lambda: lib.Causal().dense(1, 5, offset=0, key_positions=TENSOR),
        TYPE,
        "key_positions",
        TENSOR_CAME,
        TO_JAX,
    ),
    bad(
        "positions-too-large",
        lambda: Causal().dense(1, 2, offset=0, key_positions=np.array([0, 2**31])),
        VALUE,
        "key_positions",
        "int32",
        str(2**31),
    ),
    bad(
        "positions-batch",
        lambda at: (Causal() & Padding(VALID)).dense(1, 5, offset=0, key_positions=at),
        VALUE,
        "key_positions",
        "batch of 3",
        r"Causal\(\) & Padding\(bool\[2, 5\]\) for one of 2",
        argument=jnp.ones((3, 5), jnp.int32),
    ),
    bad(
        "positions-and-offset-batch",
        lambda at: Causal().dense(1, 5, offset=jnp.zeros(2, jnp.int32), key_positions=at),
        VALUE,
        "offset is for a batch of 2",
        r"int32\[3, 5\]",
        "one of 3",
        argument=jnp.ones((3, 5), jnp.int32),
    ),
    bad(
        "positions-without-offset",
        lambda at: Causal().dense(5, 5, key_positions=at),
        VALUE,
        "offset is missing",
        "key_positions",
        r"offset=<the position of the first query>",
        argument=ONES[0],
    ),
    bad(
        "positions-without-offset-for-tiles",
        lambda at: Full().tiles(5, 5, key_positions=at),
        VALUE,
        "offset is missing",
        argument=ONES[0],
    ),
    bad(
        "positions-and-padding",
        lambda at: Padding(VALID).dense(1, 4, offset=0, key_positions=at),
        VALUE,
        "key_length is 4",
        "valid of Padding describes 5 keys",
        argument=ONES[0, :4],
    ),
    # Masks from text.
    bad("text-unknown", lambda: parse_mask("chunkd(3)"), MaskSyntaxError, "'chunkd'", "did you mean 'chunked'"),
    bad("text-heads-unknown", lambda: parse_mask("per_hed(full)"), MaskSyntaxError, "'per_hed'", "mean 'per_head'"),
    bad("text-segments", lambda: parse_mask("segments(3)"), MaskSyntaxError, "segments holds arrays", "in Python"),
    bad("text-chunk-zero", lambda: parse_mask("chunked(0)"), MaskSyntaxError, "size", "got 0", "at least 1"),
    bad(
        "text-chunk-none", lambda: parse_mask("chunked"), MaskSyntaxError, r"chunked\(size, start\)", "got no argument"
    ),
    bad("text-heads-none", lambda: parse_mask("per_head()"), MaskSyntaxError, "a mask for each head", "got none"),
    bad("text-heads-number", lambda: parse_mask("per_head(3)"), MaskSyntaxError, "expected a mask such as causal"),
    bad(
        "text-heads-nested",
        lambda: parse_mask("per_head(full, per_head(causal, full))"),
        MaskSyntaxError,
        "one head each",
        "2 heads in PerHead",
    ),
    # Masks: being read.
    bad(
        "padding-keys",
        lambda valid: Padding(valid).dense(4, 4),
        VALUE,
        "key_length is 4",
        r"bool\[2, 5\]",
        "5 keys",
        argument=VALID,
    ),
    bad(
        "padding-keys-in-composition",
        lambda valid: (Causal() & ~Padding(valid)).bias(4, 4),
        VALUE,
        "key_length is 4",
        r"bool\[2, 5\]",
        argument=VALID,
    ),
    bad(
        "dense-keys",
        lambda allowed: Dense(allowed).dense(2, 4),
        VALUE,
        "key_length is 4",
        "allowed of Dense",
        "5 keys",
        argument=VALID,
    ),
    bad(
        "dense-too-few-rows",
        lambda allowed: Dense(allowed).dense(3, 5, offset=0),
        VALUE,
        "allowed of Dense",
        "2 rows",
        "3 queries",
        argument=VALID,
    ),
    bad(
        "dense-rows-elsewhere",
        lambda allowed: Dense(allowed).dense(2, 5, offset=3),
        VALUE,
        "2 rows",
        "2 queries from 3 on",
        r"Dense\(allowed, offset=",
        argument=VALID,
    ),
    bad(
        "predicate-not-bool",
        lambda: Predicate(integer_predicate).dense(2, 2),
        TYPE,
        "fn of Predicate",
        "must return bool",
        r"int32\[",
        "integer_predicate",
    ),
    bad(
        "predicate-shape",
        lambda: Predicate(shapeless_predicate, batch=2, heads=3).dense(4, 5, offset=0),
        VALUE,
        "fn of Predicate",
        r"bool\[7\]",
        r"broadcasts to that of its arguments, \[2, 3, 4, 5\]",
        "shapeless_predicate",
    ),
    bad("query-zero", lambda: Causal().dense(0, 4), VALUE, "query_length", "got 0", "at least 1"),
    bad("key-negative", lambda: Full().dense(1, -4), VALUE, "key_length", "got -4", "at least 1"),
    bad("query-float", lambda: lib.Causal().dense(2.0, 2), TYPE, "query_length", r"2\.0", "Python int"),
    bad(
        "query-array", lambda n: Causal().dense(n, 4), TYPE, "query_length", r"int32\[\]", "int", argument=jnp.array(4)
    ),
    bad("key-array", lambda n: Causal().bias(4, n), TYPE, "key_length", r"int32\[\]", "int", argument=jnp.array(4)),
    bad(
        "offset-missing",
        lambda: Causal().dense(1, 5),
        VALUE,
        "offset is missing",
        "1 queries and 5 keys",
        r"offset=0 .*top-left",
        r"offset=4 .*bottom-right",
    ),
    bad(
        "offset-missing-under-padding",
        lambda valid: (Padding(valid) & SlidingWindow(2)).dense(3, 5),
        VALUE,
        "offset is missing",
        r"offset=0 .*top-left",
        r"offset=2 .*bottom-right",
        argument=VALID,
    ),
    bad("offset-float", lambda: lib.Causal().dense(2, 2, offset=0.5), TYPE, "offset", r"0\.5", "int"),
    bad(
        "offset-float-array",
        lambda t: Causal().dense(2, 2, offset=t),
        TYPE,
        "offset",
        r"float32\[\]",
        "integer",
        argument=jnp.zeros(()),
    ),
    bad(
        "offset-rank",
        lambda t: Causal().dense(2, 2, offset=t),
        VALUE,
        "offset",
        r"int32\[2, 5\]",
        "rank",
        argument=ONES,
    ),
    bad(
        "offset-batch",
        lambda t: Padding(VALID).dense(5, 5, offset=t),
        VALUE,
        "offset",
        "batch of 5",
        "one of 2",
        argument=ONES[0],
    ),
    bad("bias-integer", lambda: Causal().bias(2, 2, jnp.int32), TYPE, "dtype", "int32", "floating"),
    bad(
        "bias-torch-dtype",
        lambda: lib.Causal().bias(2, 2, torch.float32),
        TYPE,
        "dtype",
        r"torch\.float32",
        r"jnp\.float32",
    ),
    bad(
        "bias-float64", lambda: Causal().bias(2, 2, jnp.float64), VALUE, "dtype", "float64", "jax_enable_x64", "float32"
    ),
    # Masks: being combined.
    bad(
        "batch-mismatch",
        lambda v: Padding(VALID) & Padding(v),
        VALUE,
        "&",
        "batch",
        "2 in",
        "3 in",
        argument=VALID[:1].repeat(3, 0),
    ),
    bad(
        "keys-mismatch",
        lambda v: Padding(VALID) | Padding(v),
        VALUE,
        r"\|",
        "kv",
        "5 in",
        "4 in",
        argument=VALID[:, :4],
    ),
    bad(
        "heads-mismatch",
        lambda a: Dense(a) & Dense(a[:, :2]),
        VALUE,
        "&",
        "heads",
        "3 in",
        "2 in",
        argument=jnp.ones((1, 3, 4, 4), jnp.bool_),
    ),
    bad("truth", lambda: bool(Causal()), TYPE, r"Causal\(\)", "neither true nor false", r"&, \| and ~"),
    bad("and-keyword", lambda: Causal() and Full(), TYPE, r"Causal\(\)", "not by and"),
    bad(
        "not-keyword",
        lambda v: not lib.Padding(v),
        TYPE,
        r"Padding\(bool\[2, 5\]\)",
        "not by and, or and not",
        argument=VALID,
    ),
    bad(
        "mask-and-array",
        lambda v: Causal() & v,
        TYPE,
        r"bool\[2, 5\]",
        r"Dense\(allowed\)",
        "only with masks",
        argument=VALID,
    ),
    bad(
        "array-and-mask",
        lambda v: v & CAUSAL,
        TYPE,
        r"bool\[2, 5\]",
        r"Dense\(allowed\)",
        "only with masks",
        argument=VALID,
    ),
    bad("numpy-and-mask", lambda: np.ones((2, 5), bool) & CAUSAL, TYPE, r"bool\[2, 5\]", "only with masks"),
    bad("array-or-mask", lambda v: v | CAUSAL, TYPE, r"bool\[2, 5\]", "only with masks", argument=VALID),
    bad("mask-or-none", lambda: lib.Causal() | None, TYPE, "None", "only with masks"),
    bad("mask-and-true", lambda: lib.Causal() & True, TYPE, "True", "only with masks"),
    # Additive biases.
    bad(
        "unmask-bool",
        lib.unmask_unattended,
        VALUE,
        "expanded_mask",
        r"bool\[1, 2, 5\]",
        "from_allowed",
        argument=VALID[None],
    ),
    bad("unmask-int", lib.unmask_unattended, TYPE, "expanded_mask", r"int32\[1, 2, 5\]", "float", argument=ONES[None]),
    bad("bias-without-zero", lambda: CAUSAL.bias(2, 2, "float8_e8m0fnu"), TYPE, "dtype must be float16"),
    bad("unmask-long", lambda: lib.unmask_unattended(FAR, -1), VALUE, "expanded_mask must fit an int32"),
    bad("morton-axes", lambda: zoo.morton_natten((4,), (1,)), VALUE, r"canvas must be \(height, width\)", r"\(4,\)"),
    bad("vsa-tile", lambda: zoo.vsa(CHOSEN + 1, 2, 2), VALUE, "topk_indices must be from 0 to 1", "from 1 to 2"),
    bad("vsa-negative", lambda: zoo.vsa(CHOSEN - 1, 2, 2), VALUE, "topk_indices must be from 0 to 1", "from -1 to 0"),
    bad(
        "vsa-size",
        lambda: zoo.vsa(CHOSEN, 2, 2, np.array([[3, 1]])),
        VALUE,
        "variable_block_sizes must be from 0 to 2",
        "from 1 to 3",
    ),
    bad(
        "shared-prefix",
        lambda: zoo.shared_prefix(np.array([[0, 1]]), np.array([[0, 2]])),
        VALUE,
        "prefix_ids must be from 0 to 1",
        "from 0 to 2",
    ),
    bad(
        "unmask-rank",
        lib.unmask_unattended,
        VALUE,
        "expanded_mask",
        r"float32\[2, 5\]",
        "rank 3 or 4",
        argument=jnp.zeros((2, 5)),
    ),
    bad("unmask-torch", lambda: lib.unmask_unattended(TENSOR), TYPE, "expanded_mask", TENSOR_CAME, TO_JAX),
    bad("unmask-list", lambda: lib.unmask_unattended([[[0.0]]]), TYPE, "expanded_mask", "a list", r"jnp\.asarray"),
    bad("from-allowed-int", from_allowed, TYPE, "allowed", r"int32\[2, 5\]", "bool", argument=ONES),
    # The converter.
    bad(
        "converter-window-zero", lambda: AttentionMaskConverter(True, 0), VALUE, "sliding_window", "got 0", "at least 1"
    ),
    bad(
        "converter-window-float", lambda: lib.AttentionMaskConverter(True, 2.5), TYPE, "sliding_window", r"2\.5", "int"
    ),
    bad("not-causal", lambda: plain.to_causal_4d(1, 2, 2), VALUE, "to_causal_4d", "is_causal=True", "is_causal=False"),
    bad("causal-batch", lambda: causal.to_causal_4d(0, 2, 2), VALUE, "batch_size", "got 0", "at least 1"),
    bad("causal-query", lambda: causal.to_causal_4d(1, -1, 2), VALUE, "query_length", "got -1", "at least 1"),
    bad(
        "causal-too-many-queries",
        lambda: causal.to_causal_4d(1, 3, 2),
        VALUE,
        "query_length",
        "3 and 2",
        "key_value_length",
    ),
    bad(
        "causal-float64", lambda: causal.to_causal_4d(1, 2, 2, jnp.float64), VALUE, "dtype", "float64", "jax_enable_x64"
    ),
    bad(
        "causal-length-array",
        lambda n: causal.to_causal_4d(1, 2, n),
        TYPE,
        "key_value_length",
        r"int32\[\]",
        "int",
        argument=jnp.array(4),
    ),
    bad(
        "causal-past-too-long",
        lambda: causal.to_causal_4d(1, 2, 4, past_key_values_length=3),
        VALUE,
        "past_key_values_length",
        "3 \\+ 2 and 4",
        "must not exceed key_value_length",
    ),
    bad(
        "causal-past-float-array",
        lambda t: causal.to_causal_4d(1, 2, 4, past_key_values_length=t),
        TYPE,
        "past_key_values_length",
        r"float32\[\]",
        "integer",
        argument=jnp.zeros(()),
    ),
    bad("4d-rank", lambda m: causal.to_4d(m, 1), VALUE, "attention_mask_2d", r"int32\[5\]", "rank 2", argument=ONES[0]),
    bad("4d-torch", lambda: causal.to_4d(TENSOR, 1), TYPE, "attention_mask_2d", TENSOR_CAME, TO_JAX),
    bad("4d-list", lambda: causal.to_4d([[1]], 1), TYPE, "attention_mask_2d", "a list", r"jnp\.asarray"),
    bad(
        "4d-no-key-length",
        lambda m: causal.to_4d(m, 2),
        VALUE,
        "key_value_length is missing",
        "2 queries",
        "5",
        argument=ONES,
    ),
    bad(
        "4d-key-length",
        lambda m: causal.to_4d(m, 2, 6),
        VALUE,
        "key_value_length is 6",
        r"int32\[2, 5\]",
        argument=ONES,
    ),
    bad("4d-too-many-queries", lambda m: causal.to_4d(m, 6, 5), VALUE, "query_length", "6 and 5", argument=ONES),
    bad("4d-query-zero", lambda m: plain.to_4d(m, 0), VALUE, "query_length", "got 0", "at least 1", argument=ONES),
    bad("4d-integer", lambda m: plain.to_4d(m, 1, dtype=jnp.int8), TYPE, "dtype", "int8", "floating", argument=ONES),
    bad(
        "window-without-causal",
        lambda m: AttentionMaskConverter(False, 2).to_4d(m, 5, 5),
        NotImplementedError,
        "sliding window",
        "causal",
        "is_causal=False, sliding_window=2",
        argument=ONES,
    ),
    # The functions beside it.
    bad(
        "make-shape",
        lambda: lib.make_causal_mask((2, 3, 4)),
        VALUE,
        "input_ids_shape",
        r"\(2, 3, 4\)",
        r"\(batch, query_length\)",
    ),
    bad(
        "make-shape-int", lambda: lib.make_causal_mask(3), VALUE, "input_ids_shape", "got 3", r"\(batch, query_length\)"
    ),
    bad(
        "prepare-4d-float64",
        lambda: lib.prepare_4d_causal_attention_mask(np.ones((1, 1, 2, 2)), (1, 2), jnp.zeros((1, 2, 8)), 0),
        VALUE,
        "float64",
        "jax_enable_x64",
    ),
    bad("make-batch", lambda: lib.make_causal_mask((0, 3)), VALUE, r"input_ids_shape\[0\]", "got 0", "at least 1"),
    bad("make-past", lambda: lib.make_causal_mask((1, 3), -1), VALUE, "past_key_values_length", "got -1", "at least 0"),
    bad("make-window", lambda: lib.make_causal_mask((1, 3), 0, 0), VALUE, "sliding_window", "got 0", "at least 1"),
    bad(
        "make-traced-past",
        lambda t: lib.make_causal_mask((1, 3), t),
        VALUE,
        "key_value_length is missing",
        "past_key_values_length",
        "key cache",
        argument=jnp.array(2),
    ),
    bad(
        "create-traced-past",
        lambda t: lib.create_4d_causal_attention_mask((1, 3), t),
        VALUE,
        "key_value_length is missing",
        argument=jnp.array(2),
    ),
    bad(
        "create-query",
        lambda: lib.create_4d_causal_attention_mask((1, 0)),
        VALUE,
        r"input_shape\[1\]",
        "got 0",
        "at least 1",
    ),
    bad("expand-rank", lib.expand_mask, VALUE, "mask", r"int32\[1, 2, 5\]", "rank 2", argument=ONES[None]),
    bad("expand-target", lambda m: lib.expand_mask(m, 0), VALUE, "tgt_len", "got 0", "at least 1", argument=ONES),
    bad("expand-torch", lambda: lib.expand_mask(TENSOR), TYPE, "mask", TENSOR_CAME, TO_JAX),
    bad("encoder-rank", lib.prepare_4d_attention_mask, VALUE, "mask", r"int32\[5\]", "rank 2", argument=ONES[0]),
    bad(
        "encoder-sdpa-rank",
        lib.prepare_4d_attention_mask_for_sdpa,
        VALUE,
        "mask",
        r"int32\[5\]",
        "rank 2",
        argument=ONES[0],
    ),
    bad(
        "encoder-sdpa-torch", lambda: lib.prepare_4d_attention_mask_for_sdpa(TENSOR), TYPE, "mask", TENSOR_CAME, TO_JAX
    ),
    bad(
        "ignore-rank",
        lambda m: lib.ignore_causal_mask_sdpa(m, EMBEDS, 0),
        VALUE,
        "attention_mask",
        r"int32\[1, 2, 5\]",
        "rank 2 or 4",
        argument=ONES[None],
    ),
    bad(
        "ignore-past",
        lambda: lib.ignore_causal_mask_sdpa(None, EMBEDS, -1),
        VALUE,
        "past_key_values_length",
        "got -1",
        "at least 0",
    ),
    bad(
        "ignore-embeds",
        lambda e: lib.ignore_causal_mask_sdpa(None, e, 0),
        VALUE,
        "inputs_embeds",
        r"float32\[3\]",
        "rank",
        argument=jnp.zeros(3),
    ),
    bad(
        "ignore-embeds-list",
        lambda: lib.ignore_causal_mask_sdpa(None, [[1.0]], 0),
        TYPE,
        "inputs_embeds",
        "a list",
        "JAX or NumPy array",
    ),
    bad(
        "prepare-4d-shape",
        lambda m: lib.prepare_4d_causal_attention_mask(m, (2, 3), EMBEDS, 0),
        VALUE,
        "attention_mask",
        r"\(2, 1, 3, 3\)",
        r"\(2, 1, 3, 4\)",
        argument=jnp.ones((2, 1, 3, 4)),
    ),
    bad(
        "prepare-4d-float16",
        lambda m: lib.prepare_4d_causal_attention_mask(m, (2, 3), EMBEDS, 0),
        VALUE,
        "attention_mask",
        r"float16\[2, 1, 3, 3\]",
        "float32",
        "inputs_embeds",
        argument=jnp.ones((2, 1, 3, 3), jnp.float16),
    ),
    bad(
        "prepare-keys",
        lambda m: lib.prepare_4d_causal_attention_mask(m, (2, 3), EMBEDS, 0),
        VALUE,
        "key_value_length is 3",
        r"int32\[2, 5\]",
        argument=ONES,
    ),
    bad(
        "prepare-embeds-int",
        lambda e: lib.prepare_4d_causal_attention_mask(None, (2, 5), e, 0),
        TYPE,
        "inputs_embeds",
        r"int32\[2, 5\]",
        "float",
        argument=ONES,
    ),
    bad(
        "prepare-embeds-torch",
        lambda: lib.prepare_4d_causal_attention_mask(None, (2, 5), TENSOR, 0),
        TYPE,
        "inputs_embeds",
        TENSOR_CAME,
        TO_JAX,
    ),
    bad(
        "prepare-traced-past",
        lambda t: lib.prepare_4d_causal_attention_mask(None, (2, 3), EMBEDS, t),
        VALUE,
        "key_value_length is missing",
        "past_key_values_length",
        argument=jnp.array(2),
    ),
    bad(
        "prepare-sdpa-shape",
        lambda m: lib.prepare_4d_causal_attention_mask_for_sdpa(m, (2, 3), EMBEDS, 0),
        VALUE,
        "attention_mask",
        r"int32\[5\]",
        "rank 2 or 4",
        argument=ONES[0],
    ),
    bad(
        "prepare-sdpa-torch",
        lambda: lib.prepare_4d_causal_attention_mask_for_sdpa(TENSOR, (2, 5), EMBEDS, 0),
        TYPE,
        "attention_mask",
        TENSOR_CAME,
        TO_JAX,
    ),
    # Transformers' signatures.
    bad(
        "hf-not-causal",
        lambda: hf.AttentionMaskConverter(False).to_causal_4d(1, 2, 2, jnp.float32),
        VALUE,
        "is_causal=True",
        "is_causal=False",
    ),
    bad("hf-window", lambda: hf.AttentionMaskConverter(True, -1), VALUE, "sliding_window", "got -1", "at least 1"),
    bad(
        "hf-4d-no-key-length",
        lambda m: hf_causal.to_4d(m, 2, jnp.float32),
        VALUE,
        "key_value_length is missing",
        argument=ONES,
    ),
    bad(
        "hf-4d-torch-dtype",
        lambda m: hf_causal.to_4d(m, 2, torch.float16, 5),
        TYPE,
        "dtype",
        r"torch\.float16",
        r"jnp\.float32",
        argument=ONES,
    ),
    bad(
        "hf-swapped-dtype",
        lambda m: hf_causal.to_4d(m, 2, 5, jnp.float32),
        TYPE,
        "dtype",
        "5",
        r"jnp\.float32",
        argument=ONES,
    ),
    bad("hf-expand-torch", lambda: hf_causal._expand_mask(TENSOR, jnp.float32), TYPE, "mask", TENSOR_CAME, TO_JAX),
    bad(
        "hf-make-float64",
        lambda: hf_causal._make_causal_mask((1, 2), jnp.float64, "cpu"),
        VALUE,
        "dtype",
        "float64",
        "jax_enable_x64",
    ),
    bad(
        "hf-unmask-bool",
        lambda m: hf_causal._unmask_unattended(m, -1.0),
        VALUE,
        "expanded_mask",
        r"bool\[1, 2, 5\]",
        argument=VALID[None],
    ),
    bad(
        "hf-prepare-4d-shape",
        lambda m: hf_any._prepare_4d_causal_attention_mask(m, (2, 3), EMBEDS, 0),
        VALUE,
        "attention_mask",
        r"\(2, 1, 3, 3\)",
        r"\(2, 1, 4, 3\)",
        argument=jnp.ones((2, 1, 4, 3)),
    ),
    bad(
        "hf-encoder-rank",
        lambda m: hf_any._prepare_4d_attention_mask(m, jnp.float32),
        VALUE,
        "mask",
        r"int32\[5\]",
        "rank 2",
        argument=ONES[0],
    ),
    bad(
        "hf-create-shape",
        lambda: hf_any._create_4d_causal_attention_mask((2,), jnp.float32, "cpu"),
        VALUE,
        "input_shape",
        r"\(2,\)",
        r"\(batch, query_length\)",
    ),
    # Hints that once led elsewhere.
    bad("padding-4d", lib.Padding, VALUE, r"\[batch, kv\]", r"Dense\(allowed\)$", argument=VALID[:, None, None]),
    bad("dense-keys-alone", lib.Dense, VALUE, "rank 2 or 4", r"Padding\(allowed\[None\]\)", argument=VALID[0]),
    bad("dense-3d", lib.Dense, VALUE, r"allowed\[:, None\] .*batch", r"allowed\[None\] .*heads", argument=VALID[None]),
    bad("dense-alibi", lib.Dense, TYPE, "any other bias is no mask", argument=jnp.zeros((2, 5))),
    bad("blocks-1d", lambda v: zoo.Blocks(v, 2), VALUE, r"rank 2 or 4, got bool\[5\]$", argument=VALID[0]),
    bad("ids-of-starts", lib.Segments, TYPE, r"jnp\.cumsum\(is_start, axis=1\)", argument=VALID),
    bad(
        "scale-of-an-array",
        lambda scale: lib.attention(*[EMBEDS[..., None, :]] * 3, scale=scale),
        TYPE,
        "multiply the query by it, and give scale=1.0",
        argument=jnp.ones(()),
    ),
    bad(
        "is-causal-false",
        lambda: lib.attention(*[EMBEDS[..., None, :]] * 3, is_causal=False),
        TYPE,
        r"Causal\(\) where it is true, and nothing where it is false",
    ),
    bad(
        "one-number-of-a-window",
        lambda: lib.attention(*[EMBEDS[..., None, :]] * 3, local_window_size=1),
        TYPE,
        r"Window\(size, size\) for one number",
    ),
    bad(
        "document-of-keys",
        lambda valid: zoo.document(Causal() & Padding(valid), IDS),
        VALUE,
        "leave the part that has them out, and join it to the result by &",
        argument=VALID,
    ),
    bad(
        "splash-keys",
        lambda: to_splash(CAUSAL, 128, 384, offset=0, block_sizes=BlockSizes(block_q=128, block_kv=256)),
        VALUE,
        "pad to 512, and mask the padded keys by & Prefix\\(384\\)",
    ),
    bad(
        "splash-compute",
        lambda: to_splash(CAUSAL, 512, 512, block_sizes=BlockSizes(block_q=128, block_kv=256, block_kv_compute=384)),
        VALUE,
        "block_kv must be a multiple of block_kv_compute of block_sizes, got 256 and 384$",
    ),
    # Functions that are written for numbers, and not for arrays.
    *(
        bad(f"predicate-{name}", lambda fn=fn: Predicate(fn).dense(4, 4), TYPE, "function fn", *IS_TRACED)
        for name, fn in PREDICATES.items()
    ),
    *(
        bad(
            f"bounds-{name}",
            lambda fn=fn: Predicate(fine_predicate, bounds=lambda b, h, q, kv: (fn(b, h, q.min, kv.min), False)).tiles(
                8, 8, block=2, offset=jnp.zeros(2, jnp.int32)
            ),
            TYPE,
            "function bounds",
            *IS_TRACED,
        )
        for name, fn in PREDICATES.items()
        if name not in ("table", "numpy")  # the positions of keys are static
    ),
    bad("own-allows", lambda: Branching().dense(4, 4), TYPE, "function allows", *IS_TRACED),
    bad("own-bounds", lambda: Branching().tiles(4, 4, block=2), TYPE, "function tile_bounds", *IS_TRACED),
    bad("predicate-none", lambda: Predicate(lambda b, h, q, kv: None).dense(4, 4), TYPE, "must return bool, got None"),
    bad(
        "predicate-pair",
        lambda: Predicate(lambda b, h, q, kv: (kv <= q, True)).dense(4, 4),
        TYPE,
        "fn of Predicate must return bool",
    ),
    # Floats that are too narrow.
    *(
        row
        for dtype in map(jnp.dtype, NARROW)
        for row in (
            bad(
                f"bias-{dtype}",
                lambda dtype=dtype: Causal().bias(2, 2, dtype),
                TYPE,
                "dtype must be float16",
                f"got {dtype}",
                "minimum",
            ),
            bad(
                f"converter-{dtype}",
                lambda ids, dtype=dtype: causal.to_4d(ids, 5, 5, dtype=dtype),
                TYPE,
                "dtype must be float16",
                f"got {dtype}",
                argument=ONES,
            ),
            bad(
                f"unmask-{dtype}",
                lib.unmask_unattended,
                TYPE,
                "expanded_mask must be float16",
                rf"{dtype}\[1, 2, 5\]",
                "astype",
                argument=jnp.zeros((1, 2, 5), dtype),
            ),
            bad(
                f"merge-{dtype}",
                lambda out: lib.merge_attention([(out, jnp.zeros((1, 2, 5)))]),
                TYPE,
                r"output of parts\[0\] must be float16",
                "astype",
                argument=jnp.zeros((1, 2, 5, 4), dtype),
            ),
        )
    ),
    # The shapes of arrays where arrays are needed.
    bad("shape-dense", lambda: Padding(shape_of(2, 5)).dense(5, 5), TYPE, "mask must hold arrays", r"int32\[2, 5\]"),
    bad("shape-bias", lambda: (Causal() & Padding(shape_of(2, 5))).bias(5, 5), TYPE, "mask must hold arrays"),
    bad("shape-tiles", lambda: Padding(shape_of(2, 5)).tiles(5, 5), TYPE, "mask must hold arrays", "eval_shape"),
    bad("shape-offset", lambda: Causal().dense(5, 5, offset=shape_of(2)), TYPE, "offset must hold arrays"),
    # Arrays of nothing.
    bad("ids-of-nothing", lambda: Segments(np.zeros((1, 0), int), consecutive=True).dense(1, 1), VALUE, "0 keys"),
    bad("blocks-of-keys", lambda: zoo.Blocks(np.zeros((2, 0), bool), 2), VALUE, "allowed", "at least one", "2, 0"),
    bad("blocks-of-queries", lambda: zoo.Blocks(np.zeros((0, 2), bool), 2), VALUE, "allowed", "at least one", "0, 2"),
    bad("no-order", lambda: zoo.Reordered(CAUSAL, np.zeros((1, 0), int)), VALUE, "positions", "at least one position"),
    bad("no-groups", lambda: zoo.ordered_groups(np.zeros((1, 0), int)), VALUE, "group_ids", "at least one id"),
    bad("no-token", lambda: zoo.document(CAUSAL, np.zeros((1, 0), int)), VALUE, "segment_ids", "at least one token"),
    bad("no-block", lambda: zoo.bigbird(np.zeros((1, 0, 1), int), 2), VALUE, "random_blocks", "at least one block"),
    bad(
        "no-lengths",
        lambda lengths: zoo.segment_ids_from_lengths(lengths, 4),
        VALUE,
        "lengths must have at least one document",
        r"int32\[1, 0\]",
        argument=jnp.zeros((1, 0), jnp.int32),
    ),
    bad(
        "no-ends",
        lambda ends: zoo.segment_ids_from_cu_seqlens(ends, 4),
        VALUE,
        "cu_seqlens must have at least two ends",
        r"int32\[1, 1\]",
        argument=jnp.zeros((1, 1), jnp.int32),
    ),
]

test_bad_input_is_refused = refusals(TABLE)


@pytest.mark.parametrize("dtype", [jnp.int2, jnp.uint2, jnp.int4, jnp.uint4])
@pytest.mark.parametrize("library", [np, jnp])
def test_narrow_integers_are_taken_as_others_are(dtype: Any, library: Any) -> None:
    ones = library.ones((1, 4), dtype)
    for mask, same in (
        (Padding(ones), Full()),
        (Segments(ones), Full()),
        (Prefix(ones[0, :1]), Prefix(1)),
        (Chunked(2, ones[0, :1]), Chunked(2, 1)),
    ):
        np.testing.assert_array_equal(mask.dense(4, 4), same.dense(4, 4))
    for name in ("offset", "key_positions"):
        at = ones[0] if name == "key_positions" else ones[0, :1]
        same: Any = np.array(at, np.int32)
        given: Any = {"offset": 0} if name == "key_positions" else {}
        np.testing.assert_array_equal(
            Causal().dense(4, 4, **given, **{name: at}), Causal().dense(4, 4, **given, **{name: same})
        )


def test_no_example_is_no_error() -> None:
    for nobody in (np.zeros(0, np.int32), jnp.zeros(0, jnp.int32)):
        for mask in (Prefix(nobody), Chunked(2, nobody), Causal() & (Prefix(nobody) | ~Chunked(3, nobody))):
            assert mask.dense(3, 4, offset=1).shape == (0, 1, 3, 4)
            assert mask.tiles(3, 4, offset=nobody, block=2).states.shape == (0, 1, 2, 2)


@pytest.mark.parametrize("mask", [Causal(), Causal() & Padding(VALID), Window(2, None) | Prefix(jnp.array([1, 2]))])
def test_a_block_far_beyond_the_mask_is_one_tile_and_takes_no_memory(mask: Any) -> None:
    tiles = mask.tiles(5, 5, block=2_000_000_000)
    np.testing.assert_array_equal(tiles.states, mask.tiles(5, 5, block=5).states)
    assert tiles.block == (2_000_000_000,) * 2


@pytest.mark.breaks_annotations
def test_the_hint_of_an_additive_bias_is_for_masks_only() -> None:
    message = refusal(lambda: Causal().dense(2, 2, offset=jnp.zeros(())), TypeError)
    assert "additive bias" not in message


# Hints, followed.


def test_arrays_of_three_axes_become_the_masks_that_the_hint_says() -> None:
    allowed = np.random.default_rng(0).random((3, 4, 4)) < 0.5
    np.testing.assert_array_equal(Dense(allowed[:, None]).dense(4, 4), allowed[:, None])
    np.testing.assert_array_equal(Dense(allowed[None]).dense(4, 4), allowed[None])
    np.testing.assert_array_equal(Padding(allowed[0, :1]).dense(4, 4)[0, 0], np.tile(allowed[0, 0], (4, 1)))


def test_starts_of_documents_become_ids() -> None:
    starts = jnp.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool)
    same = np.array([[[0, 0, 1, 1]], [[0, 1, 1, 1]]])
    np.testing.assert_array_equal(Segments(jnp.cumsum(starts, axis=1)).dense(4, 4)[:, 0], same.swapaxes(1, 2) == same)


def test_a_query_that_is_multiplied_by_the_scale_is_scaled_once() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 6, 2, 8)), jnp.float32)
    scale = jnp.float32(0.3)
    np.testing.assert_allclose(
        lib.attention(x * scale, x, x, CAUSAL, scale=1.0), lib.attention(x, x, x, CAUSAL, scale=0.3), atol=1e-6
    )


def test_a_mask_of_rows_is_given_as_a_bias_where_examples_have_offsets() -> None:
    random = np.random.default_rng(2)
    query, key = (jnp.asarray(random.standard_normal((2, n, 1, 8)), jnp.float32) for n in (3, 6))
    allowed, offset = jnp.asarray(random.random((2, 1, 3, 6)) < 0.6), jnp.array([1, 3])
    attend = jaxmask.make_attention_fn(Causal(), offset=offset)
    with pytest.raises(ValueError, match="give it as a bias of 0 and minus infinity, whose rows are the queries"):
        attend(query, key, key, mask=allowed)
    out = attend(query, key, key, bias=jnp.where(allowed, 0, -jnp.inf))
    both = allowed & Causal().dense(3, 6, offset=offset)
    np.testing.assert_allclose(out, lib.attention(query, key, key, Dense(both, offset=0), offset=0), atol=1e-6)
