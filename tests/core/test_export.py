"""One exported program serves every platform and every batch size, with the bits of the direct call."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxmask import (
    AttentionMaskConverter,
    Causal,
    Chunked,
    Dense,
    Empty,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    create_4d_causal_attention_mask,
    expand_mask,
    make_causal_mask,
    prepare_4d_attention_mask,
    prepare_4d_attention_mask_for_sdpa,
    prepare_4d_causal_attention_mask,
    prepare_4d_causal_attention_mask_for_sdpa,
    serialization,
    unmask_unattended,
)

# Symbolic sizes stand where the annotations say int.
pytestmark = pytest.mark.breaks_annotations

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCHES = (1, 3)
Q, KV = 4, 6
PAST = KV - Q


def strided(b: jax.Array, h: jax.Array, q: jax.Array, kv: jax.Array) -> jax.Array:
    return (q + kv + b) % 2 == 0


def of_padding(valid: jax.Array) -> jax.Array:
    """A bool that differs by example and query, made of the padding."""
    return valid[:, None, None, :] != (jnp.arange(Q) % 2)[:, None]


def ids_of(valid: jax.Array) -> jax.Array:
    """Ids of segments, a new one after each gap in the padding."""
    return jnp.cumsum(~valid, axis=1, dtype=jnp.int32)


# Each is a description made of what the batch brings: valid [b, kv], and positions [b].
MASKS: dict[str, Callable[[jax.Array, jax.Array], Mask]] = {
    "Full": lambda valid, at: Full(),
    "Empty": lambda valid, at: Empty(),
    "Causal": lambda valid, at: Causal(),
    "SlidingWindow": lambda valid, at: SlidingWindow(2),
    "SlidingWindow, traced": lambda valid, at: SlidingWindow(at.max()),
    "Window": lambda valid, at: Window(1, 2),
    "Window, unbounded": lambda valid, at: Window(None, 1),
    "Prefix": lambda valid, at: Prefix(2),
    "Prefix, per example": lambda valid, at: Prefix(at),
    "Chunked": lambda valid, at: Chunked(2, 1),
    "Chunked, traced, per example": lambda valid, at: Chunked(at.max(), at),
    "Padding": lambda valid, at: Padding(valid),
    "Segments": lambda valid, at: Segments(ids_of(valid)),
    "Segments, pair": lambda valid, at: Segments(ids_of(valid)[:, :Q], ids_of(valid), PAST),
    "PerHead": lambda valid, at: PerHead([Causal(), Prefix(at), Padding(valid)]),
    "Dense": lambda valid, at: Dense(of_padding(valid), offset=PAST),
    "Predicate": lambda valid, at: Predicate(strided) & Padding(valid),
    "Not": lambda valid, at: ~Padding(valid),
    "And": lambda valid, at: Causal() & Padding(valid),
    "Or": lambda valid, at: Causal() | Prefix(at),
    "nested": lambda valid, at: ~(SlidingWindow(2) & Padding(valid)) | (Prefix(at) & ~Dense(of_padding(valid), PAST)),
}

# Each reads valid [b, kv], a bias [b, 1, q, kv] and embeddings [b, q, 8].
Result = jax.Array | np.ndarray[Any, Any] | None
Operation = Callable[[jax.Array, jax.Array, jax.Array], Result]
OPERATIONS: dict[str, Operation] = {
    "to_causal_4d": lambda valid, bias, x: AttentionMaskConverter(True).to_causal_4d(x.shape[0], Q, KV, x.dtype),
    "to_causal_4d, window": lambda valid, bias, x: AttentionMaskConverter(True, 2).to_causal_4d(x.shape[0], Q, KV),
    "to_4d": lambda valid, bias, x: AttentionMaskConverter(False).to_4d(valid, Q, KV),
    "to_4d, causal": lambda valid, bias, x: AttentionMaskConverter(True).to_4d(valid, Q, KV, x.dtype),
    "to_4d, window": lambda valid, bias, x: AttentionMaskConverter(True, 2).to_4d(valid, Q, KV),
    "make_causal_mask": lambda valid, bias, x: make_causal_mask((x.shape[0], Q), PAST, 2),
    "expand_mask": lambda valid, bias, x: expand_mask(valid, Q),
    "unmask_unattended": lambda valid, bias, x: unmask_unattended(bias),
    "create_4d_causal_attention_mask": lambda valid, bias, x: create_4d_causal_attention_mask((x.shape[0], Q), PAST, 2),
    "prepare_4d_causal_attention_mask, 2D": lambda valid, bias, x: prepare_4d_causal_attention_mask(
        valid, (x.shape[0], Q), x, PAST, 2
    ),
    "prepare_4d_causal_attention_mask, 4D": lambda valid, bias, x: prepare_4d_causal_attention_mask(
        bias == 0, (x.shape[0], Q), x, PAST
    ),
    "prepare_4d_causal_attention_mask, no mask": lambda valid, bias, x: prepare_4d_causal_attention_mask(
        None, (x.shape[0], Q), x, PAST
    ),
    "prepare_4d_causal_attention_mask_for_sdpa": lambda valid, bias, x: prepare_4d_causal_attention_mask_for_sdpa(
        valid, (x.shape[0], Q), x, PAST
    ),
    "prepare_4d_attention_mask": lambda valid, bias, x: prepare_4d_attention_mask(valid, Q),
    "prepare_4d_attention_mask_for_sdpa": lambda valid, bias, x: prepare_4d_attention_mask_for_sdpa(valid, Q),
}


def inputs(batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments of an operation; the first example is all padding, so that its rows have nothing to attend to."""
    valid = np.arange(batch * KV).reshape(batch, KV) % 4 > 0
    valid[0] = False
    bias = jnp.where(valid[:, None, None, :] & np.tri(Q, KV, dtype=bool), 0, jnp.finfo(jnp.float32).min)
    return jnp.asarray(valid), bias.astype(jnp.float32), jnp.zeros((batch, Q, 8), jnp.bfloat16)


def mask_inputs(batch: int) -> tuple[jax.Array, jax.Array]:
    return inputs(batch)[0], jnp.arange(1, batch + 1, dtype=jnp.int32)


def assert_exports(function: Callable[..., Result], arguments: Callable[[int], tuple[jax.Array, ...]]) -> None:
    """Assert that ``function``, exported once for a batch ``b``, gives the bits of the direct call for each batch."""
    (batch,) = export.symbolic_shape("b")
    specs = [jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype) for array in arguments(1)]
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*specs)
    assert exported.platforms == PLATFORMS
    for size in BATCHES:
        direct, called = function(*arguments(size)), exported.call(*arguments(size))
        assert direct is not None
        assert (called.shape, called.dtype) == (direct.shape, direct.dtype)
        assert np.asarray(called).tobytes() == np.asarray(direct).tobytes()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dense_exports_with_a_symbolic_batch(mask: Callable[[jax.Array, jax.Array], Mask]) -> None:
    assert_exports(lambda valid, at: mask(valid, at).dense(Q, KV, offset=PAST + 0 * at), mask_inputs)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_bias_exports_with_a_symbolic_batch(mask: Callable[[jax.Array, jax.Array], Mask]) -> None:
    assert_exports(lambda valid, at: mask(valid, at).bias(Q, KV, jnp.bfloat16, offset=PAST), mask_inputs)


@pytest.mark.parametrize("name", ["Causal", "SlidingWindow, traced", "Chunked", "Segments, pair", "PerHead", "nested"])
def test_dense_at_positions_exports_with_a_symbolic_batch(name: str) -> None:
    def program(valid: jax.Array, at: jax.Array) -> jax.Array:
        positions = at[:, None] - jnp.arange(KV)  # empty slots, too
        return MASKS[name](valid, at).dense(Q, KV, offset=PAST, key_positions=positions)

    assert_exports(program, mask_inputs)


@pytest.mark.parametrize("name", [name for name in MASKS if name not in ("Dense", "Segments, pair", "nested")])
def test_dense_exports_with_symbolic_lengths(name: str) -> None:
    def program(valid: jax.Array, at: jax.Array) -> jax.Array:
        return MASKS[name](valid, at).dense(valid.shape[1], valid.shape[1])

    batch, length = export.symbolic_shape("b, s")
    specs = jax.ShapeDtypeStruct((batch, length), jnp.bool_), jax.ShapeDtypeStruct((batch,), jnp.int32)
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(*specs)
    for size in (3, KV):
        arguments = tuple(array[:, :size] if array.ndim == 2 else array for array in mask_inputs(2))
        direct, called = program(*arguments), exported.call(*arguments)
        assert (called.shape, called.dtype) == (direct.shape, direct.dtype)
        np.testing.assert_array_equal(called, direct)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_tiles_export_with_a_symbolic_batch(mask: Callable[[jax.Array, jax.Array], Mask]) -> None:
    assert_exports(
        lambda valid, at: mask(valid, at).tiles(Q, KV, block=(2, 4), offset=PAST + 0 * at).states, mask_inputs
    )


def test_tiles_export_with_symbolic_lengths_in_whole_tiles() -> None:
    def program(valid: jax.Array) -> jax.Array:
        mask = (Causal() & Segments(ids_of(valid)) | Prefix(1)) & Padding(valid)
        return jnp.asarray(mask.tiles(valid.shape[1], valid.shape[1], block=2).states)

    batch, tiles = export.symbolic_shape("b, n")
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(jax.ShapeDtypeStruct((batch, 2 * tiles), jnp.bool_))
    for size in (2, KV):
        valid = mask_inputs(3)[0][:, :size]
        np.testing.assert_array_equal(exported.call(valid), program(valid))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operation_exports_with_a_symbolic_batch(operation: Operation) -> None:
    assert_exports(operation, inputs)


def saved(function: Callable[..., Any], *arguments: Any) -> Any:
    """A program that was exported for these arguments, saved and read again."""
    return export.deserialize(export.export(jax.jit(function))(*arguments).serialize())


@pytest.mark.parametrize("name", [name for name in MASKS if name != "Predicate"])
def test_a_mask_may_be_an_argument_of_a_saved_program(name: str) -> None:
    mask = MASKS[name](*mask_inputs(3))

    def dense(mask: Mask) -> jax.Array:
        return mask.dense(Q, KV, offset=PAST)

    np.testing.assert_array_equal(saved(dense, mask).call(mask), dense(mask))


def test_a_saved_program_is_for_one_structure_of_masks() -> None:
    program = saved(lambda mask: mask.dense(Q, Q), SlidingWindow(2) & Prefix(jnp.int32(1)))
    expected = (SlidingWindow(2) & Prefix(3)).dense(Q, Q)
    np.testing.assert_array_equal(program.call(SlidingWindow(2) & Prefix(jnp.int32(3))), expected)
    for other in (SlidingWindow(3) & Prefix(jnp.int32(1)), Prefix(jnp.int32(1)), Causal() & Prefix(jnp.int32(1))):
        with pytest.raises(ValueError, match="same pytree structure"):
            program.call(other)


def test_a_program_may_be_saved_that_returns_a_mask_and_its_tiles() -> None:
    def tiled(mask: Mask) -> Any:
        return ~mask, mask.tiles(8, 8, block=2)

    mask = Causal() & Padding(jnp.arange(8)[None] < 5)
    inverse, tiles = saved(tiled, mask).call(mask)
    np.testing.assert_array_equal(inverse.dense(8, 8), (~mask).dense(8, 8))
    np.testing.assert_array_equal(saved(lambda tiles: tiles.kv_indices, tiles).call(tiles), tiled(mask)[1].kv_indices)


def test_a_mask_of_a_user_may_be_an_argument_of_a_saved_program() -> None:
    class Diagonal(Mask):
        shift: Any

        def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return kv == q + self.shift

    for shift in (1, jnp.int32(1)):
        program = saved(lambda mask: mask.dense(3, 3), Diagonal(shift))
        np.testing.assert_array_equal(program.call(Diagonal(shift))[0, 0], np.eye(3, k=1, dtype=bool))


def test_a_function_is_not_saved() -> None:
    with pytest.raises(
        ValueError, match="Predicate holds a function, which cannot be saved with a program: close over"
    ):
        saved(lambda mask: mask.dense(Q, Q, batch=1), Predicate(strided))


@pytest.mark.parametrize(
    "static",
    [
        *(b"", b"{", b"null", b"3", b'{"a": 1}', b"[[], []]", b"[" * 100_000, b"\x80\x04\x95", b'[[["size"]], []]'),
        *(b'[["size"], [["allows", 3]]]', b'[["size"], [["size", {}]]]', b'[[], [["size", "__import__"]], 3]'),
    ],
)
def test_what_a_saved_program_says_of_a_mask_is_checked(static: bytes) -> None:
    mask = SlidingWindow(7)
    program = export.export(jax.jit(lambda mask: mask.dense(3, 3)))(mask).serialize()
    known = b'[[], [["size", 7]]]'
    assert known in bytes(program)
    if len(static) <= len(known):
        # In its place, and of its length.
        changed = bytes(program).replace(known, static.ljust(len(known)))
        with pytest.raises(ValueError, match="SlidingWindow"):
            export.deserialize(bytearray(changed))
    with pytest.raises(ValueError, match="SlidingWindow"):
        SlidingWindow._of_saved(serialization._read(SlidingWindow, static), [])  # pyright: ignore[reportPrivateUsage]


def test_to_read_a_saved_program_runs_no_code_of_it(tmp_path: Path) -> None:
    mask = PerHead([Causal(), SlidingWindow(3) & Padding(jnp.ones((1, 4), bool))])
    program = export.export(jax.jit(lambda mask: (mask.dense(4, 4), mask.tiles(4, 4, block=2))))(mask)
    (tmp_path / "program").write_bytes(program.serialize())
    reader = (
        "import sys, jaxmask, jax, flatbuffers\n"
        "from jax import export\n"
        "def read():\n"
        "    return export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "read()\n"  # imports what it needs
        "sys.addaudithook(lambda event, _: events.append(event))\n"
        "events = []\n"
        "read()\n"
        "print(sorted({event for event in events if event in ('exec', 'compile', 'import', 'pickle.find_class')}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", reader, tmp_path / "program"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
