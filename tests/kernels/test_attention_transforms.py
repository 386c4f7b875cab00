"""Attention under the transformations of JAX, its memory, and what it reads and compiles in decoding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxmask
from jaxmask import Causal, Dense, Full, Mask, Padding, PerHead, Predicate, Prefix, SlidingWindow
from jaxmask.kernels import blocked
from tests.core.test_mask_laws import compilations, counted
from tests.kernels.test_attention import Arrays, Attend, arrays_of, by_blocks, by_xla, ours, random, with_gradients
from tests.oracles.attention import assert_close, defined

LENGTH = 24
TOLERANCE = 2e-6
VALID = np.arange(LENGTH) >= np.array([[0], [5]])


def expected_of(mask: Mask, arrays: Arrays, cotangent: Any) -> Any:
    return defined(np.asarray(mask.dense(LENGTH, LENGTH)), cotangent, **arrays)


# Transformations.


@ours
def test_vmap_over_arrays_and_masks(attend: Attend) -> None:
    (one, cotangent), (other, _) = arrays_of(LENGTH, LENGTH, seed=0), arrays_of(LENGTH, LENGTH, seed=10)
    arrays = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    masks = [Causal() & Padding(jnp.asarray(VALID ^ flip)) for flip in (False, True)]

    def each(arrays: Arrays, mask: Mask) -> Arrays:
        return with_gradients(lambda arrays: attend(**arrays, mask=mask), arrays, cotangent)

    found = jax.jit(jax.vmap(each))(arrays, jax.tree.map(lambda *x: jnp.stack(x), *masks))
    for i, (part, mask) in enumerate(zip((one, other), masks, strict=True)):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), expected_of(mask, part, cotangent), TOLERANCE)


@ours
def test_gradient_of_jit_with_a_predicate_that_closes_over_a_traced_array(attend: Attend) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH)
    table = random(7, LENGTH)

    @jax.jit
    def loss(arrays: Arrays, table: jax.Array) -> jax.Array:
        mask = Predicate(lambda b, h, q, kv: (table[kv] > 0) | (kv == q))
        return (attend(**arrays, mask=mask) * cotangent).sum()

    gradients: tuple[Arrays, jax.Array] = jax.grad(loss, argnums=(0, 1))(arrays, table)
    of_arrays, of_table = gradients
    allowed = (np.asarray(table) > 0) | np.eye(LENGTH, dtype=bool)
    assert_close(of_arrays, defined(allowed, cotangent, **arrays), TOLERANCE)
    assert not of_table.any()


@ours
def test_a_checkpoint_changes_nothing(attend: Attend) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH)
    mask = SlidingWindow(7)
    attend = jax.checkpoint(partial(attend, mask=mask))
    found = jax.jit(lambda arrays: with_gradients(lambda arrays: attend(**arrays), arrays, cotangent))(arrays)
    assert_close(found, expected_of(mask, arrays, cotangent), TOLERANCE)


def test_layers_with_windows_of_their_own_are_scanned_by_one_program() -> None:
    x = random(0, 2, LENGTH, 4, 8)
    windows = [3, LENGTH, 9]

    def layer(x: jax.Array, window: Any, attend: Attend = by_blocks) -> tuple[jax.Array, None]:
        return x + attend(x, x, x, SlidingWindow(window)), None

    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, jnp.array(windows))[0]

    def in_turn(x: jax.Array) -> jax.Array:
        for window in windows:
            x, _ = layer(x, window, by_xla)
        return x

    (found, pull), (expected, pull_expected) = (jax.vjp(jax.jit(f), x) for f in (scanned, in_turn))
    # What one layer rounds, the next ones amplify.
    for each, wanted in ((found, expected), (pull(x)[0], pull_expected(x)[0])):
        np.testing.assert_allclose(each, wanted, rtol=0, atol=10 * TOLERANCE * float(np.abs(wanted).max()))


# Shards, each on a device of its own.


def sharded(attend: Callable[..., Any], arrays: Arrays, cotangent: Any, devices: int, specs: Arrays, *more: Any) -> Any:
    """Output and gradients of ``attend(arrays, *more)`` shard by shard."""
    mesh = jax.make_mesh((devices,), ("shard",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    out, others = specs["query"], tuple(spec for _, spec in more)

    def whole(arrays: Arrays) -> Any:
        shards = jax.shard_map(attend, mesh=mesh, in_specs=(specs, *others), out_specs=out)
        return shards(arrays, *(x for x, _ in more))

    return jax.jit(lambda arrays: with_gradients(whole, arrays, cotangent))(arrays)


@ours
def test_shards_of_the_batch(attend: Attend) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH, batch=8)
    valid, batch = jnp.asarray(np.arange(LENGTH) >= np.arange(8)[:, None]), PartitionSpec("shard")

    def shard(arrays: Arrays, valid: Any) -> Any:
        return attend(**arrays, mask=Causal() & Padding(valid))

    found = sharded(shard, arrays, cotangent, 8, dict.fromkeys(arrays, batch), (valid, batch))
    assert_close(found, expected_of(Causal() & Padding(valid), arrays, cotangent), TOLERANCE)


@ours
def test_shards_of_the_heads(attend: Attend) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH)
    allowed, heads = random(5, 1, 4, LENGTH, LENGTH) > 0, PartitionSpec(None, None, "shard")

    def shard(arrays: Arrays, allowed: Any) -> Any:
        return attend(**arrays, mask=Causal() & Dense(allowed))

    masked = (allowed, PartitionSpec(None, "shard"))
    found = sharded(shard, arrays, cotangent, 2, dict.fromkeys(arrays, heads), masked)
    assert_close(found, expected_of(Causal() & Dense(allowed), arrays, cotangent), TOLERANCE)


@ours
def test_shards_of_the_queries_begin_at_an_offset(attend: Attend) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH)
    specs = {**dict.fromkeys(arrays, PartitionSpec()), "query": PartitionSpec(None, "shard")}

    def shard(arrays: Arrays) -> Any:
        return attend(**arrays, mask=SlidingWindow(7), offset=jax.lax.axis_index("shard") * (LENGTH // 8))

    found = sharded(shard, arrays, cotangent, 8, specs)
    assert_close(found, expected_of(SlidingWindow(7), arrays, cotangent), TOLERANCE)


# Export.


@ours
def test_a_program_with_its_gradient_is_exported_for_every_platform(attend: Attend) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH)

    @jax.jit
    def program(arrays: Arrays, offset: jax.Array) -> Arrays:
        return with_gradients(lambda arrays: attend(**arrays, mask=SlidingWindow(7), offset=offset), arrays, cotangent)

    exported = jax.export.export(program, platforms=["cpu", "cuda", "tpu"])(arrays, jnp.asarray(0))
    found: Any = exported.call(arrays, jnp.asarray(0))
    assert_close(found, expected_of(SlidingWindow(7), arrays, cotangent), TOLERANCE)


@pytest.mark.parametrize("mask", [None, Causal(), SlidingWindow(7)], ids=repr)
def test_a_program_for_any_length_is_exported_with_its_gradient(mask: Any) -> None:
    def program(arrays: Arrays) -> Arrays:
        return with_gradients(lambda arrays: jaxmask.attention(**arrays, mask=mask), arrays, arrays["query"])

    length = jax.export.symbolic_shape("batch, length")
    specs = {
        name: jax.ShapeDtypeStruct((*length, heads, 8), jnp.float32)
        for name, heads in (("query", 4), ("key", 2), ("value", 2))
    }
    exported = jax.export.export(jax.jit(program))(specs)
    for batch, queries in ((1, 5), (2, 150)):
        arrays, _ = arrays_of(queries, queries, batch=batch, dim_v=8)
        found: Any = exported.call(arrays)
        allowed = np.asarray((Full() if mask is None else mask).dense(queries, queries))
        assert_close(found, defined(allowed, arrays["query"], **arrays), TOLERANCE)


def test_a_static_mask_is_no_constant_of_a_program_with_all_scores() -> None:
    mask = PerHead([SlidingWindow(size) for size in (8, 16, 32, 64)])
    x = jax.ShapeDtypeStruct((1, 1024, 4, 8), jnp.float32)

    def loss(x: Any) -> Any:
        return jaxmask.attention(x, x, x, mask, implementation="xla").sum()

    # In hexadecimal, the bools of all pairs of one head alone would be 2 MiB of text.
    assert len(jax.jit(jax.grad(loss)).lower(x).as_text()) < 2**17


# No retrace.


@ours
def test_other_values_compile_nothing(attend: Attend) -> None:
    arrays, _ = arrays_of(LENGTH, LENGTH)

    def mask(window: int, flip: bool) -> Mask:
        return SlidingWindow(jnp.asarray(window)) & Padding(jnp.asarray(VALID ^ flip))

    masks = [(mask(5, False), 0), (mask(9, True), 1), (mask(LENGTH, False), -3)]
    offsets = [int, np.int32, jnp.asarray]
    for mask_, offset in masks[:1]:
        for spelled in offsets:
            jax.block_until_ready(attend(**arrays, mask=mask_, offset=spelled(offset + 2)))
    with compilations() as seen:
        for mask_, offset in masks[1:]:
            for spelled in offsets:
                jax.block_until_ready(attend(**arrays, mask=mask_, offset=spelled(offset + 5)))
    assert seen == []


@ours
def test_other_values_trace_a_mask_no_more(attend: Attend) -> None:
    arrays, _ = arrays_of(1, LENGTH)
    mask, traces = counted()
    attend(**arrays, mask=mask & Padding(jnp.asarray(VALID)), offset=3)
    before = len(traces)
    for offset in range(4, 9):
        attend(**arrays, mask=mask & Padding(jnp.asarray(~VALID)), offset=offset)
    # To check a call against its mask traces nothing.
    assert len(traces) == before


# Memory, of the compiled program.


def temporary_bytes(length: int, mask: Mask, differentiated: bool) -> int:
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def attend(query: Any, key: Any, value: Any, mask: Mask) -> Any:
        return jaxmask.attention(query, key, value, mask, implementation="blocked")

    def gradients(query: Any, key: Any, value: Any, mask: Mask) -> Any:
        out, pull = jax.vjp(partial(attend, mask=mask), query, key, value)
        return pull(out)

    program = jax.jit(gradients if differentiated else attend).lower(x, x, x, mask).compile()
    memory: Any = program.memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("window", [64, jnp.asarray(64)], ids=["static", "traced"])
def test_memory_is_in_proportion_to_the_length(window: Any, differentiated: bool) -> None:
    length = 4096
    once, twice = (temporary_bytes(size, SlidingWindow(window), differentiated) for size in (length, 2 * length))
    assert twice <= 2.1 * once
    # The scores of both heads, in float32.
    assert twice < 2 * 4 * (2 * length) ** 2 / 20


# Decoding.


def decoding(cache: int, live: slice, dim: int = 8) -> tuple[Arrays, Arrays]:
    """Arrays of a step of decoding, with zeros and with NaN where nothing may be read."""
    arrays, _ = arrays_of(1, cache, dim=dim, dim_v=dim)
    dead = np.ones(cache, bool)
    dead[live] = False
    fill = lambda with_what: {  # noqa: E731
        name: x if name == "query" else jnp.where(dead[:, None, None], with_what, x) for name, x in arrays.items()
    }
    return fill(0.0), fill(jnp.nan)


@pytest.mark.parametrize(
    ("mask", "offset", "read"),
    [
        (Causal(), 20, slice(0, 32)),
        (Causal(), np.array([5, 20]), slice(0, 32)),
        (SlidingWindow(6), 45, slice(32, 48)),
        (SlidingWindow(jnp.asarray(6)), 45, slice(32, 48)),
        (Causal() & Prefix(jnp.array([9, 14])), 60, slice(0, 16)),
    ],
    ids=["causal", "two lengths", "sliding", "sliding traced", "prefix"],
)
def test_a_step_of_decoding_reads_live_keys_alone(mask: Mask, offset: Any, read: slice) -> None:
    zeros, dead = decoding(64, read)
    found, expected = (
        jax.jit(partial(blocked.attention, mask=mask, block=(1, 16)))(**x, offset=jnp.asarray(offset))
        for x in (dead, zeros)
    )
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, expected)
    allowed = np.asarray(mask.dense(1, 64, offset=jnp.asarray(offset)))
    assert_close({"out": found}, defined(allowed, jnp.zeros_like(found), **zeros), TOLERANCE)


def test_a_step_of_decoding_reads_live_keys_alone_by_default() -> None:
    _, dead = decoding(2048, slice(0, 512))
    found = jaxmask.attention(**dead, mask=Causal(), offset=jnp.asarray(300))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("length", [150, 1300], ids=["one range of keys", "many ranges of keys"])
@pytest.mark.parametrize("mode", ["forward", "forward of reverse", "reverse of forward", "reverse of reverse"])
def test_every_mode_of_differentiation_is_possible_at_any_length(mode: str, length: int) -> None:
    query, key, value, cotangent = (
        jnp.asarray(np.random.default_rng(i).standard_normal((1, length, 2, 4)), jnp.float32) for i in range(4)
    )

    def derivative(implementation: Any) -> Any:
        def f(x: jax.Array) -> jax.Array:
            out: jax.Array = jaxmask.attention(
                *(x, key + x, value * x, Causal()), logits_soft_cap=3.0, implementation=implementation
            )
            return (out * cotangent).sum()

        def along(x: jax.Array) -> Any:
            return jax.jvp(f, (x,), (value,))[1]

        def against(x: jax.Array) -> Any:
            return (jax.grad(f)(x) * value).sum()

        modes: dict[str, Callable[[], Any]] = {
            "forward": lambda: along(query),
            "forward of reverse": lambda: jax.jvp(jax.grad(f), (query,), (value,))[1],
            "reverse of forward": lambda: jax.grad(along)(query),
            "reverse of reverse": lambda: jax.grad(against)(query),
        }
        return jax.jit(modes[mode])()

    ours, plain = derivative("blocked"), derivative("xla")
    np.testing.assert_allclose(ours, plain, atol=1e-4 * float(jnp.abs(plain).max()))
