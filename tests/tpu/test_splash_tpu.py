"""Splash attention compiled ahead of time for a TPU v5e, with its gradients: what the compiler takes, and how much."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmask import Causal, Chunked, Mask, Padding, PerHead, Predicate, Prefix, Segments, SlidingWindow
from jaxmask.kernels.splash import to_splash
from tests.tpu.v5e import spec, v5e

BATCH, HEADS, DIM = 2, 2, 128
LENGTH, SHORT = 32768, 8192


def temporaries(
    mask: Callable[..., Mask],
    *shapes: tuple[int, ...],
    length: int = LENGTH,
    offset: bool = False,
    partial_tiles: int | None = None,
) -> int:
    """The bytes that the output and the gradients take beside themselves; the arguments of ``mask`` are traced."""

    def attend(query: Any, key: Any, value: Any, cotangent: Any, first: Any, *arguments: Any) -> Any:
        def attention(query: Any, key: Any, value: Any) -> Any:
            options: Any = {"offset": first if offset else 0, "partial_tiles": partial_tiles}
            return to_splash(mask(*arguments), length, length, **options)(query, key, value)

        output, pull_back = jax.vjp(attention, query, key, value)
        return output, pull_back(cotangent)

    heads = [spec(BATCH, HEADS, length, DIM, dtype=jnp.bfloat16)] * 4
    # How an integer is divided depends on the chip, which Pallas asks of the mesh.
    with jax.sharding.use_abstract_mesh(v5e().mesh.abstract_mesh):
        lowered = jax.jit(attend).lower(*heads, spec(), *(spec(*shape) for shape in shapes))
    memory: Any = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes


def natten(b: Any, h: Any, q: Any, kv: Any) -> Any:
    """Neighbours in an image of 128 columns."""
    near = jnp.abs(jnp.clip(q // 128, 3, 252) - kv // 128) <= 3
    return near & (jnp.abs(jnp.clip(q % 128, 3, 124) - kv % 128) <= 3)


MASKS: dict[str, tuple[Callable[..., Mask], list[tuple[int, ...]]]] = {
    "static": (lambda: Causal() & SlidingWindow(4096), []),
    "chunks": (lambda: Causal() & Chunked(5000, 3), []),
    "predicate": (lambda: Predicate(natten), []),
    "segments": (lambda ids: Causal() & Segments(ids), [(BATCH, LENGTH)]),
    "padding": (lambda valid: SlidingWindow(4096) & Padding(valid), [(BATCH, LENGTH)]),
    "numbers": (lambda size, length: Causal() & (SlidingWindow(size) | Prefix(length)), [(), (BATCH,)]),
    "heads": (lambda ids: PerHead([Causal(), SlidingWindow(4096)]) & Segments(ids), [(BATCH, LENGTH)]),
}


@pytest.mark.parametrize(("mask", "shapes"), MASKS.values(), ids=MASKS)
def test_memory_grows_with_the_length_and_not_with_its_square(
    mask: Callable[..., Mask], shapes: list[tuple[int, ...]]
) -> None:
    assert temporaries(mask, *shapes) < LENGTH * LENGTH // 4


def test_offset_may_be_traced() -> None:
    assert temporaries(lambda: SlidingWindow(4096), offset=True) < LENGTH * LENGTH // 4


def test_traced_tiles_take_a_byte_for_each_pair_or_as_much_as_is_said() -> None:
    def images(ids: Any) -> Mask:
        return Causal() | Segments(ids)

    all_of_them = temporaries(images, (BATCH, SHORT), length=SHORT)
    few = temporaries(images, (BATCH, SHORT), length=SHORT, partial_tiles=32)
    # The forward pass has done with its tiles when the backward pass writes its own.
    saved = BATCH * (SHORT * SHORT - 32 * 512 * 512)
    assert 0.9 * saved < all_of_them - few < 2.1 * saved
