"""The Pallas kernel and its gradients, compiled ahead of time for GPUs: what the compiler makes of each call."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from docs import gpu_kernels
from jaxmask import Causal
from jaxmask.kernels.pallas_gpu.blocks import blocks_for
from tests.gpu.calls import BATCH, DIMS, HEADS, KERNELS, LENGTH, TABLES, compiled, names, shapes, with_gradients
from tests.gpu.target import CARDS, H100, Program, compile_for

PAGE = Path(gpu_kernels.__file__).with_suffix(".md").read_text(encoding="utf-8")
# Bytes that a thread may store to memory, for want of registers.
MOST_SPILLED = {64: 0, 128: 256}
MOST_OF_TABLES = 128
# XLA's kernels: the bounds of tiles, counts and sorts of them into lists, and the product of output and cotangent.
MOST_OTHERS = 20


def programs() -> Iterator[Any]:
    """One process of pytest-xdist has all the tests of a program, which it compiles once."""
    for dim in DIMS:
        for name in names(dim):
            for card in CARDS:
                identity = f"{name}-{card}-{dim}"
                yield pytest.param(name, dim, card, id=identity, marks=pytest.mark.xdist_group(identity))


def section(dim: int, card: str) -> list[str]:
    """The lines of a table of the docs, and what stands about it."""
    return PAGE.partition(gpu_kernels.title(card, dim))[2].partition("\n## ")[0].splitlines()


each_program = pytest.mark.parametrize(("name", "dim", "card"), [*programs()])


@each_program
def test_output_and_gradients_are_three_kernels(name: str, dim: int, card: str) -> None:
    program = compiled(name, dim, card)
    assert sorted(kernel.name for kernel in program.kernels) == sorted(KERNELS)
    assert len(program.others) <= MOST_OTHERS, program.others


@each_program
def test_products_are_of_matrix_units_and_tiles_are_on_their_way_meanwhile(name: str, dim: int, card: str) -> None:
    of_card, of_others = ("wgmma", "mma.sync") if card == "H100" else ("mma.sync", "wgmma")
    for kernel in compiled(name, dim, card).kernels:
        assert kernel.count(of_card) > 0
        assert kernel.count(of_others) == 0
        assert kernel.count("cp.async") > 0


@each_program
def test_nothing_is_multiplied_twice(name: str, dim: int, card: str) -> None:
    kernels = {kernel.name: kernel for kernel in compiled(name, dim, card).kernels}
    # Forward: q k and w v. For dq: q k, do v and ds k. For dk and dv: these and w do.
    for kernel, block, products in zip(KERNELS, blocks_for(jnp.bfloat16, dim), (2, 3, 4), strict=True):
        for loop in kernels[kernel].over_tiles():
            assert kernels[kernel].products(loop) == products * block.queries * block.keys * dim


@each_program
def test_registers_suffice(name: str, dim: int, card: str) -> None:
    spilled = {kernel.name: kernel.spilled for kernel in compiled(name, dim, card).kernels}
    most = max(MOST_SPILLED[dim], MOST_OF_TABLES if name in TABLES else 0)
    assert max(spilled.values()) <= most, spilled


@each_program
def test_memory_is_of_the_length(name: str, dim: int, card: str) -> None:
    program = compiled(name, dim, card)
    # Less than the query takes.
    assert program.temporaries < 2 * BATCH * LENGTH * HEADS * dim
    assert max(map(math.prod, program.written)) < LENGTH * LENGTH


@each_program
def test_the_docs_say_what_the_compiler_says(name: str, dim: int, card: str) -> None:
    assert gpu_kernels.row(name, compiled(name, dim, card)) in section(dim, card), gpu_kernels.__doc__


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dim", DIMS)
def test_the_docs_have_these_calls_and_no_others(dim: int, card: str) -> None:
    rows = [line.split(" | ")[0] for line in section(dim, card) if line.startswith("| ")]
    assert rows == ["| call", "| ---", *(f"| {name}" for name in names(dim))]


def test_the_docs_begin_with_what_the_figures_are() -> None:
    assert PAGE.startswith(gpu_kernels.ABOUT)


def test_all_scores_written_out_would_be_found() -> None:
    run, traced = with_gradients("xla", {"mask": Causal()})
    program = compile_for(H100, run, traced, *shapes(64))
    assert program.temporaries > 2 * LENGTH * LENGTH
    assert max(map(math.prod, program.written)) >= LENGTH * LENGTH


def multiply(x_ref: Any, y_ref: Any, z_ref: Any) -> None:
    z_ref[...] = plgpu.dot(x_ref[...], y_ref[...])


def product(size: int, depth: int) -> Program:
    """A product of matrices, by a single block of 128 threads."""
    run = pl.pallas_call(
        multiply,
        out_shape=jax.ShapeDtypeStruct((size, size), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name="product",
    )
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((size, depth), (depth, size)))
    return compile_for(H100, run, *shapes)


def test_registers_that_do_not_suffice_would_be_found() -> None:
    # Sums of 256 rows and columns, 512 for each thread.
    (kernel,) = product(256, 64).kernels
    assert kernel.registers == 255
    assert kernel.spilled > 0


def test_more_shared_memory_than_there_is_is_refused() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        product(256, 256)
