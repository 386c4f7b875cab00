"""The kernel for GPU, interpreted: output and gradients are what they are defined to be, for every argument.

What it shares with the other kernels of ours, word for word, is in ``test_attention.py``.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

import jaxmask
from jaxmask import (
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
    zoo,
)
from jaxmask.kernels import pallas_gpu
from jaxmask.kernels.call import checked_call
from jaxmask.kernels.pallas_gpu import pairwise
from tests.kernels.test_attention import (
    BATCH,
    DISTANCES,
    HEADS,
    KEYS,
    MASKS,
    OFFSET,
    QUERIES,
    SLOPES,
    TOLERANCE,
    VALID,
    Case,
    arrays_of,
    attentions,
    called,
    quickly,
    random,
    with_gradients,
    with_lse,
    written_out,
)
from tests.kernels.test_attention import by_pallas as attend
from tests.oracles.attention import assert_close, defined


@settings(max_examples=6)
@given(attentions((jnp.float32,)))
def test_output_and_gradients_are_defined_for_any_mask(case: Case) -> None:
    found = quickly(lambda: case.found(attend))()
    assert_close(found, case.expected(), TOLERANCE["float32"])


@settings(max_examples=2)
@given(attentions((jnp.bfloat16, jnp.float16)))
def test_output_and_gradients_are_defined_for_any_mask_in_half_precision(case: Case) -> None:
    found = quickly(lambda: case.found(attend))()
    assert_close(found, case.expected(), TOLERANCE[case.arrays["query"].dtype.name])


# What else attention takes.


def test_a_scale_that_turns_the_order_of_scores_around() -> None:
    arrays, cotangent = arrays_of()
    expected = defined(written_out(MASKS["packed"]), cotangent, **arrays, scale=-0.7)
    found = called(attend, arrays, cotangent, mask=MASKS["packed"], offset=OFFSET, scale=-0.7)
    assert_close(found, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("how", [{"logits_soft_cap": 1e5}, {"scale": 0.0}], ids=str)
def test_numbers_at_the_edge(how: Any) -> None:
    arrays, cotangent = arrays_of()
    found = called(attend, arrays, cotangent, mask=MASKS["packed"], offset=OFFSET, **how)
    assert_close(found, defined(written_out(MASKS["packed"]), cotangent, **arrays, **how), TOLERANCE["float32"])


def test_a_scale_below_the_digits_of_float32_is_no_scale() -> None:
    arrays, cotangent = arrays_of()
    tiny, zero = (
        called(attend, arrays, cotangent, mask=MASKS["packed"], offset=OFFSET, scale=scale) for scale in (1e-39, 0.0)
    )
    for name in ("out", "value"):
        np.testing.assert_array_equal(tiny[name], zero[name])


def test_the_log_sum_exp_of_the_lowest_scores_is_finite() -> None:
    arrays, _ = arrays_of()
    bias = jnp.full((1, 1, 1, KEYS), jnp.finfo(jnp.float32).min)
    out, lse = attend(**arrays, bias=bias, return_residual=True, mask=Full())
    assert (lse == jnp.finfo(jnp.float32).min).all()
    merged, _ = jaxmask.merge_attention([(out, lse), (out, lse)])
    np.testing.assert_allclose(merged, out, atol=1e-6)


def test_the_lists_of_a_long_static_mask_are_no_constants_of_the_program() -> None:
    x = jax.ShapeDtypeStruct((1, 32_768, 1, 64), jnp.bfloat16)
    assert len(lowered(partial(jaxmask.attention, mask=Causal(), implementation="pallas"), x, x, x)) < 500_000


@pytest.mark.parametrize("name", ["packed", "heads"])
def test_sinks_and_log_sum_exp_and_their_gradients(name: str) -> None:
    arrays, cotangent = arrays_of()
    if name == "heads":
        arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 30.0])
    lse_cotangent = random(5, BATCH, QUERIES, HEADS)
    how = partial(attend, mask=MASKS[name], offset=OFFSET, return_residual=True)
    found = quickly(with_lse, static_argnums=0)(lambda arrays: how(**arrays), arrays, (cotangent, lse_cotangent))
    expected = defined(written_out(MASKS[name]), cotangent, **arrays, lse_cotangent=lse_cotangent)
    assert_close(found, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("is_shared", [False, True], ids=["by head", "shared"])
def test_dropout_drops_the_same_pairs_as_the_plain_loop(is_shared: bool) -> None:
    arrays, cotangent = arrays_of()
    how = {"dropout_rate": 0.4, "dropout_rng": jax.random.key(3), "broadcast_dropout": is_shared}
    found, expected = (
        called(each, arrays, cotangent, mask=MASKS["sinks"], offset=OFFSET, **how)
        for each in (attend, partial(jaxmask.attention, implementation="xla"))
    )
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-5)


def test_queries_and_keys_attend_by_their_positions() -> None:
    arrays, cotangent = arrays_of()
    ring, order = np.roll(np.arange(KEYS), 11), np.random.default_rng(0).permutation(KEYS)[:QUERIES]
    bias = lambda b, h, q, kv: SLOPES[h] * (kv - q)  # noqa: E731
    written = np.asarray(SLOPES, np.float64)[:, None, None] * (ring - order[:, None])
    allowed = (ring <= order[:, None]) & (order[:, None] - ring < 25)
    how = {"query_positions": jnp.asarray(order), "key_positions": jnp.asarray(ring), "bias": bias}
    found = called(attend, arrays, cotangent, mask=SlidingWindow(25), **how)
    assert_close(found, defined(allowed, cotangent, **arrays, bias=written), TOLERANCE["float32"])


@pytest.mark.parametrize("dim", [24, 40, 80])
def test_dims_that_are_no_power_of_two(dim: int) -> None:
    arrays, cotangent = arrays_of(dim=dim, dim_v=2 * dim)
    found = called(attend, arrays, cotangent, mask=MASKS["sliding"], offset=OFFSET)
    assert_close(found, defined(written_out(MASKS["sliding"]), cotangent, **arrays), TOLERANCE["float32"])


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_few_queries_divide_a_long_cache_over_programs(queries: int, kv_heads: int) -> None:
    arrays, cotangent = arrays_of(queries, 700, kv_heads=kv_heads)
    arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 3.0])
    lengths = jnp.array([650, 0])
    mask = PerHead([Causal(), SlidingWindow(300), Prefix(lengths), Full()]) & Prefix(lengths)
    call = checked_call(**{name: x for name, x in arrays.items() if name != "sinks"}, mask=mask, offset=600)
    assert "divided over" in pallas_gpu.launches(call)[0]
    found = called(partial(jaxmask.attention, implementation="pallas"), arrays, cotangent, mask=mask, offset=600)
    allowed = np.asarray(mask.dense(queries, 700, offset=600))
    assert_close(found, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])


# What scores and keys are like.


def test_a_key_that_is_nan_shows_in_the_queries_that_attend_to_it() -> None:
    arrays, _ = arrays_of()
    for name in ("key", "value"):
        with_nan = {**arrays, name: arrays[name].at[:, 30].set(jnp.nan)}
        out = attend(**with_nan, mask=SlidingWindow(6), offset=OFFSET)
        attends = (np.arange(QUERIES) + OFFSET >= 30) & (np.arange(QUERIES) + OFFSET < 36)
        assert np.isnan(out[:, attends]).all()
        assert not np.isnan(out[:, ~attends]).any()


# Transformations.


def test_vmap_over_arrays_and_masks() -> None:
    (one, cotangent), (other, _) = arrays_of(seed=0), arrays_of(seed=10)
    arrays = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    masks = [Causal() & Padding(jnp.asarray(VALID ^ flip)) for flip in (False, True)]

    def each(arrays: Any, mask: Mask) -> Any:
        return with_gradients(lambda arrays: attend(**arrays, mask=mask, offset=OFFSET), arrays, cotangent)

    found = quickly(jax.vmap(each))(arrays, jax.tree.map(lambda *x: jnp.stack(x), *masks))
    for i, (part, mask) in enumerate(zip((one, other), masks, strict=True)):
        expected = defined(written_out(mask), cotangent, **part)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), expected, TOLERANCE["float32"])


def test_gradient_of_jit_with_a_predicate_that_closes_over_a_traced_array() -> None:
    arrays, cotangent = arrays_of()
    table = random(7, KEYS)

    @jax.jit
    def loss(arrays: Any, table: jax.Array) -> jax.Array:
        mask = Predicate(lambda b, h, q, kv: (table[kv] > 0) | (kv == q))
        return (attend(**arrays, mask=mask, offset=OFFSET) * cotangent).sum()

    of_arrays, of_table = jax.grad(loss, argnums=(0, 1))(arrays, table)
    allowed = (np.asarray(table) > 0) | (DISTANCES == 0)
    assert_close(of_arrays, defined(allowed, cotangent, **arrays), TOLERANCE["float32"])
    assert not of_table.any()


def test_layers_with_windows_of_their_own_are_scanned_by_one_program() -> None:
    x, windows = random(0, 2, KEYS, 4, 8), [3, KEYS, 9]

    @quickly
    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(
            lambda x, window: (x + attend(x, x, x, SlidingWindow(window)), None), x, jnp.array(windows)
        )[0]

    expected = x
    for window in windows:
        expected = expected + jaxmask.attention(
            expected, expected, expected, SlidingWindow(window), implementation="xla"
        )
    np.testing.assert_allclose(scanned(x), expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


# What decides is the platform that a program is lowered for: it needs neither a GPU nor its compiler.


@contextmanager
def as_on_a_gpu() -> Generator[None]:
    """JAX 0.12 asks which GPU a program is lowered for. 0.10 does not."""
    device: Any = getattr(jax.sharding, "AbstractDevice", None)
    if device is None:
        yield
        return
    h100 = device(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh: Any = partial(jax.sharding.AbstractMesh, abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh((), ())):
        yield


def lowered(function: Any, *arguments: Any) -> str:
    with as_on_a_gpu():
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def output_and_gradients(query: Any, key: Any, value: Any, mask: Mask) -> Any:
    forced = partial(jaxmask.attention, mask=mask, implementation="pallas")
    out, pull = jax.vjp(forced, query, key, value)
    return out, pull(out)


IDS = np.sort(np.random.default_rng(0).integers(0, 4, (2, 1000)), 1).astype(np.int32)
TRACED_IDS = jnp.asarray(IDS)
EVERY_MASK: dict[str, Mask] = {
    "causal or a prefix": Causal() | Prefix(50),
    "a prefix for each example": Causal() | Prefix(jnp.array([30, 100])),
    "documents": Causal() & Segments(TRACED_IDS),
    "static documents": Causal() & Segments(IDS),
    "padding": Causal() & Padding(TRACED_IDS > 0),
    "a traced window": SlidingWindow(jnp.asarray(40)),
    "heads": PerHead([Causal(), SlidingWindow(20), Full(), Causal() & Segments(TRACED_IDS)]),
    "a predicate": Predicate(lambda b, h, q, kv: (kv <= q) & ((q - kv) % (h + 2) == 0), heads=4),
    "a predicate that closes over ids": Predicate(lambda b, h, q, kv: TRACED_IDS[b, q] == TRACED_IDS[b, kv], batch=2),
    "a predicate of ids": Predicate(Partial(lambda ids, b, h, q, kv: ids[b, q] == ids[b, kv], TRACED_IDS), batch=2),
    "pairs": Dense(jnp.asarray(np.random.default_rng(0).random((2, 1, 1000, 1000)) < 0.3)),
    "chunks": Causal() & Chunked(32, jnp.array([3, 9])),
    "global tokens": zoo.global_sliding_window(31, IDS == 2),
    "an order": zoo.Reordered(SlidingWindow(30), jnp.asarray(np.random.default_rng(0).permutation(1000)[None])),
    "blocks": zoo.Blocks(np.random.default_rng(0).random((20, 20)) < 0.4, 50),
    "no keys": Causal() & ~Causal(),
    "neighbours": zoo.natten((25, 40), (5, 7)),
}


@pytest.mark.parametrize("mask", EVERY_MASK.values(), ids=EVERY_MASK)
def test_every_mask_becomes_three_kernels_for_a_gpu_and_no_array_of_pairs(mask: Mask) -> None:
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, 64), jnp.bfloat16) for heads in (4, 2))
    program = lowered(output_and_gradients, q, k, k, mask)
    assert program.count("__gpu$xla.gpu.triton") == 3
    sizes = [prod(map(int, shape.rstrip("x").split("x"))) for shape in re.findall(r"tensor<((?:\d+x)+)", program)]
    assert (max(sizes) >= 1000 * 1000) == isinstance(mask, Dense)
    assert jaxmask.explain(q, k, k, mask, platform="gpu").implementation == "pallas"


def with_everything(query: Any, key: Any, value: Any, slopes: Any, ids: Any) -> Any:
    """The output, the log-sum-exp and their gradients."""

    def forced(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        mask = Causal() & Segments(ids) | Prefix(3)
        bias = Partial(lambda slopes, b, h, q, kv: slopes[h] * (kv - q).astype(jnp.float32), slopes)
        how: dict[str, Any] = {
            "logits_soft_cap": 5.0,
            "dropout_rate": 0.5,
            "dropout_rng": jax.random.key(0),
            "sinks": slopes,
        }
        where: dict[str, Any] = {"offset": 30, "return_residual": True, "implementation": "pallas"}
        return jaxmask.attention(query, key, value, mask, bias=bias, **how, **where)

    out, pull = jax.vjp(forced, query, key, value, slopes)
    return out, pull(out)


def shapes_of_everything(dim: int = 16, dim_v: int = 16, dtype: Any = jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    shapes = [(2, 100, 4, dim), (2, 130, 2, dim), (2, 130, 2, dim_v)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return [*arrays, jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((2, 130), jnp.int32)]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("dims", [(80, 80), (96, 192), (256, 64)], ids=str)
def test_every_argument_becomes_three_kernels_for_a_gpu(dims: tuple[int, int], dtype: Any) -> None:
    assert lowered(with_everything, *shapes_of_everything(*dims, dtype)).count("__gpu$xla.gpu.triton") == 3


MODES = {
    "strict promotion of dtypes": partial(jax.numpy_dtype_promotion, "strict"),
    "no promotion of ranks": partial(jax.numpy_rank_promotion, "raise"),
    "64 bits": partial(jax.enable_x64, True),
    "checks of JAX itself": partial(jax.enable_checks, True),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_it_is_lowered_in_every_mode_of_jax(mode: Any) -> None:
    with mode():
        assert lowered(with_everything, *shapes_of_everything()).count("__gpu$xla.gpu.triton") == 3


def test_no_tracer_leaks() -> None:
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, 64), jnp.bfloat16) for heads in (4, 2))
    with jax.checking_leaks():
        assert lowered(output_and_gradients, q, k, k, EVERY_MASK["heads"]).count("__gpu$xla.gpu.triton") == 3


def test_it_is_lowered_under_vmap() -> None:
    twice = [jax.ShapeDtypeStruct((2, 3, *x.shape), x.dtype) for x in shapes_of_everything()]
    assert lowered(jax.vmap(jax.vmap(with_everything)), *twice).count("__gpu$xla.gpu.triton") == 3


def test_an_export_for_a_gpu_holds_the_kernel() -> None:
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    forced = partial(jaxmask.attention, mask=Causal() | Prefix(5), implementation="pallas")
    x = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.bfloat16)
    with as_on_a_gpu():
        exported = jax.export.export(jax.jit(forced), platforms=("cuda",), disabled_checks=[check])(x, x, x)
    assert "__gpu$xla.gpu.triton" in exported.mlir_module()
    assert jax.export.deserialize(exported.serialize()).platforms == ("cuda",)


def test_an_export_for_several_platforms_at_once_is_refused() -> None:
    forced = partial(jaxmask.attention, mask=Causal() | Prefix(5), implementation="pallas")
    x = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.bfloat16)
    with as_on_a_gpu(), pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        jax.export.export(jax.jit(forced), platforms=("cpu", "cuda"))(x, x, x)


# What it cannot do.


def of_pair(function: Any) -> dict[str, Any]:
    return {"mask": Predicate(function)}


def sorted_ids(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.sort(jnp.stack(jnp.broadcast_arrays(q, kv)), 0)[0] == q


def a_loop(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jax.lax.while_loop(lambda x: x > 3, lambda x: x - 3, q) == 0


def a_whole_array(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (TRACED_IDS[0] == q).any()


def a_whole_row(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (TRACED_IDS.reshape(20, 100)[q] > kv[..., None]).any(-1)


def a_product(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.tensordot(jnp.array([2, 3]), jnp.stack(jnp.broadcast_arrays(q, kv)), 1) > 0


def a_row_of_positions(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q[..., :1] <= kv


def computed(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.stack(jnp.broadcast_arrays(q, kv))[(q + kv) % 2] > 3


def an_assertion(b: Any, h: Any, q: Any, kv: Any) -> Any:
    assert np.ndim(q) == 4, "of rank 4"
    return q >= kv


def a_complex_number(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return jnp.abs(q + 1j * kv) < 9


HERE = "test_pallas.py"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": jnp.float64}, "it computes in float32, not in float64"),
    "dim": ({"dim": 257}, "the dim of query and key is 257, and it takes at most 256"),
    "dim_v": ({"dim_v": 300}, "the dim of the values is 300, and it takes at most 256"),
    "sort": (of_pair(sorted_ids), f"a GPU kernel has no 'sort', which is asked for at {HERE}:"),
    "loop": (of_pair(a_loop), f"a GPU kernel has no 'while', which is asked for at {HERE}:"),
    "array": (of_pair(a_whole_array), "reads single elements of an array, and 'eq' uses [1000] of them at once"),
    "row": (of_pair(a_whole_row), f"uses [1, 100] of them at once, which is asked for at {HERE}:"),
    "product": (of_pair(a_product), f"a GPU kernel has no 'dot_general', which is asked for at {HERE}:"),
    "element": (of_pair(a_row_of_positions), "it cannot be asked for a single pair"),
    "assertion": (of_pair(an_assertion), "it cannot be asked for a single pair: of rank 4"),
    "complex": (
        of_pair(a_complex_number),
        "a GPU kernel has no complex numbers, which is asked for at test_pallas.py:",
    ),
    "computed": (of_pair(computed), "a GPU kernel has no 'dynamic_slice' of what it computes, which is asked for at"),
    "bias": ({"bias": lambda b, h, q, kv: sorted_ids(b, h, q, kv) * 1.0}, "a GPU kernel has no 'sort'"),
    "query": ({"batch": 2**19, "queries": 2**7}, "query has 2,147,483,648 elements, and it can address 2,147,483,647"),
    "key": ({"batch": 2**19, "keys": 2**8}, "key has 2,147,483,648 elements, and it can address 2,147,483,647"),
    "table": (
        {"queries": 2**16, "keys": 2**15, "bias": jax.ShapeDtypeStruct((1, 1, 2**16, 2**15), jnp.bfloat16)},
        "an array of the mask or the bias, bfloat16, has 2,147,483,648 elements",
    ),
}


@pytest.mark.parametrize(("how", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_lacks_is_said_by_explain_and_by_a_call_that_forces_it(how: Any, message: str) -> None:
    sizes = {"batch": 2, "queries": 8, "keys": 8, "dim": 8, "dim_v": 8, "dtype": jnp.bfloat16} | how
    batch, queries, keys, dim, dim_v, dtype = (sizes.pop(name) for name in list(sizes)[:6])
    shapes = (batch, queries, 4, dim), (batch, keys, 2, dim), (batch, keys, 2, dim_v)
    with jax.enable_x64(True):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    mask, bias = sizes.pop("mask", Full()), sizes.pop("bias", None)
    if isinstance(bias, jax.ShapeDtypeStruct):
        arrays.append(bias)

    def forced(query: Any, key: Any, value: Any, bias: Any = bias) -> Any:
        return jaxmask.attention(query, key, value, mask, bias=bias, implementation="pallas")

    def explained(query: Any, key: Any, value: Any, bias: Any = bias) -> None:
        explanation = jaxmask.explain(query, key, value, mask, bias=bias, implementation="xla", platform="gpu")
        lacks.append(explanation.lacks["pallas"])

    lacks: list[list[str]] = []
    with jax.enable_x64(dtype == jnp.float64):
        jax.eval_shape(explained, *arrays)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            jax.eval_shape(forced, *arrays)
    assert message in "; ".join(lacks[0])
    assert "implementation='pallas' cannot do this" in str(error.value)


def test_symbolic_lengths_have_no_tiles() -> None:
    shape = jax.export.symbolic_shape("1, s, 2, 64")
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    forced = partial(jaxmask.attention, mask=Causal(), implementation="pallas")
    with pytest.raises(ValueError, match="its tiles need lengths that are known: these are symbolic"):
        jax.export.export(jax.jit(forced))(x, x, x)


def test_a_shard_that_is_checked_says_what_it_needs() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jnp.ones((2, 32, 2, 16))
    forced = partial(jaxmask.attention, mask=Causal(), implementation="pallas")
    with pytest.raises(ValueError, match="inside of a shard_map it needs check_vma=False"):
        jax.shard_map(forced, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x, x, x)
    unchecked = jax.shard_map(forced, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    np.testing.assert_allclose(unchecked(x, x, x), forced(x, x, x), atol=1e-6)


def test_the_shards_of_a_mesh_each_run_the_kernel() -> None:
    arrays, cotangent = arrays_of(KEYS, KEYS)
    mask = Causal() & Padding(jnp.asarray(VALID))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    how = {"implementation": "pallas", "sharding": NamedSharding(mesh, P("data", None, "model", None))}
    found = called(jaxmask.attention, arrays, cotangent, mask=mask, **how)
    assert_close(found, defined(np.asarray(mask.dense(KEYS, KEYS)), cotangent, **arrays), TOLERANCE["float32"])


# Functions of a pair.

UNARY = (
    "abs acos asin asinh atan atanh cbrt ceil cos cosh exp exp2 expm1 floor is_finite log log1p logistic neg rsqrt "
    "sign sin sinh sqrt square tan tanh"
)
BINARY = "add atan2 div eq ge gt le lt max min mul ne nextafter pow rem sub"
OF_INTS = "add and div eq max min mul or rem shift_left shift_right_arithmetic shift_right_logical sub xor"


def uses(x: Any, y: Any) -> dict[str, Any]:
    """A use of each primitive that the kernel evaluates pair by pair; ``x`` and ``y`` are int32, from 1 to 63."""
    a, b = (z.astype(jnp.float32) / 64 for z in (x, y))

    def of(name: str) -> Any:
        return getattr(jax.lax, {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}.get(name, name))

    return {
        **{name: of(name)(a) for name in UNARY.split()},
        "acosh": jax.lax.acosh(a + 1),
        **{name: of(name)(a, b) for name in BINARY.split()},
        **{f"{name} of ints": of(name)(x, y) for name in OF_INTS.split()},
        "not": ~(x > y),
        "population_count": jax.lax.population_count(x),
        "clz": jax.lax.clz(x),
        "integer_pow": a**5,
        "select_n": jnp.where(x > y, a, b),
        "clamp": jax.lax.clamp(jnp.int32(3), x, jnp.int32(9)),
        "bitcast_convert_type": jax.lax.bitcast_convert_type(a, jnp.int32),
        "cond": jax.lax.cond(x > y, lambda: a, lambda: b) if np.ndim(x) == 0 else jnp.where(x > y, a, b),
        "a sum": jnp.stack(jnp.broadcast_arrays(a, b, a * b)).sum(0),
        "any": (jnp.stack(jnp.broadcast_arrays(x, y)) > 40).any(0),
        "elements of a table": jnp.take(jnp.arange(50) * 2.0, x * y % 70, mode="fill"),
        "two elements at once": (jnp.arange(128.0).reshape(64, 2)[x] * jnp.array([1.0, -2.0])).sum(-1),
        "a table of constants": jnp.full((200,), 7)[x],
        "a narrow index": jnp.take(jnp.arange(300), x.astype(jnp.int8), mode="clip"),
        "three cases": jax.lax.select_n(x % 3, a, b, a + b) if np.ndim(x) == 0 else a,
        "half precision": ((x - y).astype(jnp.bfloat16) / y.astype(jnp.bfloat16)).astype(jnp.float32),
        "logistic in half precision": jax.nn.sigmoid(b.astype(jnp.float16)).astype(jnp.float32),
        "the greater of two bools": jax.lax.max(x > 3, y > 9),
        "a slice": jax.lax.dynamic_slice(jnp.arange(64.0), (x,), (2,)).max() if np.ndim(x) == 0 else None,
    }


X, Y = np.random.default_rng(0).integers(1, 64, (2, 1000)).astype(np.int32)
NAMES = list(uses(jnp.int32(1), jnp.int32(2)))


def test_every_primitive_of_the_kernel_is_used_below() -> None:
    used = {equation.primitive.name for equation in jax.make_jaxpr(uses)(jnp.int32(1), jnp.int32(2)).eqns}
    assert pairwise.ELEMENTWISE - used <= {"add_any"}  # a sum of gradients alone


@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_a_pair_is_in_the_kernel_what_it_is_outside(name: str) -> None:
    function, operands = pairwise.trace(lambda b, h, q, kv: (uses(q, kv)[name],))
    x, y = jnp.asarray(X)[:, None], jnp.asarray(Y)[None]
    (found,) = function(lambda i, at: jnp.asarray(operands[i]).reshape(-1)[at], 0, 0, x, y)
    expected = jax.vmap(jax.vmap(lambda x, y: uses(x, y)[name], (None, 0)), (0, None))(X, Y)
    # XLA divides in another way in a loop of its own, and rounds within a function in half precision.
    rtol = 1e-3 if "half" in name else 1e-6
    np.testing.assert_allclose(np.broadcast_to(found, expected.shape), expected, rtol=rtol)


def test_every_primitive_of_the_kernel_is_one_of_triton() -> None:
    def bias(b: Any, h: Any, q: Any, kv: Any) -> Any:
        found = uses(q % 63 + 1, kv % 63 + 1) if np.ndim(q) == 0 else {"zero": q * kv * 0}
        return sum(jnp.asarray(x).astype(jnp.float32) for x in found.values())

    x = jax.ShapeDtypeStruct((1, 40, 1, 16), jnp.float32)
    forced = partial(jaxmask.attention, bias=bias, implementation="pallas")
    assert lowered(forced, x, x, x).count("__gpu$xla.gpu.triton") == 1
