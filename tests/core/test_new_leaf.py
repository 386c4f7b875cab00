"""A new kind of mask is one small subclass: everything else comes with it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console

from jaxmask import EMPTY, PARTIAL, Causal, Full, Mask, Padding, PerHead, attention, show
from jaxmask.indices import Allowed, Index
from jaxmask.mask import Scalar
from jaxmask.native import Native
from jaxmask.tiles import Bounds, Span


class Dilated(Mask):
    step: Scalar

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return (q - kv) % self.step == 0


class Ahead(Mask):
    """The keys that are some positions ahead of a query, or more; it knows its bounds."""

    distance: Scalar

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return kv - q >= self.distance

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        return kv.max - q.min >= self.distance, kv.min - q.max >= self.distance


LENGTH = 6
QUERIES, KEYS = np.indices((LENGTH, LENGTH))
BY_TWO = (QUERIES - KEYS) % 2 == 0


def test_a_new_leaf_densifies() -> None:
    np.testing.assert_array_equal(Dilated(2).dense(LENGTH, LENGTH)[0, 0], BY_TWO)


def test_a_new_leaf_is_a_bias() -> None:
    np.testing.assert_array_equal(Dilated(2).bias(LENGTH, LENGTH)[0, 0] == 0, BY_TWO)


def test_a_new_leaf_composes() -> None:
    valid = jnp.array([[False, True, True, True, True, True]])
    composed = Causal() & Padding(valid) & ~Dilated(2)
    np.testing.assert_array_equal(composed.dense(LENGTH, LENGTH)[0, 0], (KEYS <= QUERIES) & np.asarray(valid) & ~BY_TWO)


def test_a_new_leaf_takes_an_offset() -> None:
    np.testing.assert_array_equal(Dilated(2).dense(1, LENGTH, offset=3)[0, 0], BY_TWO[3:4])


def test_a_new_leaf_refuses_to_guess_the_alignment() -> None:
    with pytest.raises(ValueError, match=r"offset is missing.*Dilated\(2\)"):
        Dilated(2).dense(1, LENGTH)


def test_a_new_leaf_is_an_argument_of_jit() -> None:
    np.testing.assert_array_equal(
        jax.jit(lambda mask: mask.dense(LENGTH, LENGTH))(Dilated(jnp.asarray(2)))[0, 0], BY_TWO
    )


def test_a_new_leaf_is_mapped_over() -> None:
    stacked = jax.vmap(Dilated)(jnp.array([1, 2, 3]))
    mapped = jax.vmap(lambda mask: mask.dense(LENGTH, LENGTH)[0, 0])(stacked)
    np.testing.assert_array_equal(mapped, np.stack([(QUERIES - KEYS) % step == 0 for step in (1, 2, 3)]))


def test_a_new_leaf_compares_and_hashes_by_its_static_integers() -> None:
    assert (Dilated(2), hash(Dilated(2))) == (Dilated(2), hash(Dilated(2)))
    assert Dilated(2) != Dilated(3)


def test_a_new_leaf_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Dilated(2).step = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_new_leaf_reads_positions_of_keys() -> None:
    positions = jnp.array([4, 5, 0, 1, -1, 3])
    allowed = Dilated(2).dense(1, LENGTH, offset=3, key_positions=positions)[0, 0, 0]
    np.testing.assert_array_equal(allowed, [False, True, False, True, False, True])


def test_a_new_leaf_is_one_of_the_heads() -> None:
    allowed = PerHead([Dilated(2), Causal()]).dense(LENGTH, LENGTH)
    np.testing.assert_array_equal(allowed[0], [BY_TWO, KEYS <= QUERIES])


def test_a_new_leaf_without_bounds_is_partial_until_another_mask_knows_better() -> None:
    assert (Dilated(2).tiles(LENGTH, LENGTH, block=2).states == PARTIAL).all()
    np.testing.assert_array_equal(
        (Causal() & Dilated(2)).tiles(LENGTH, LENGTH, block=2).states[0, 0] == EMPTY, np.triu(np.ones((3, 3)), 1)
    )


def test_a_new_leaf_says_which_tiles_are_empty_or_full() -> None:
    expected = [[1, 2, 2], [0, 1, 2], [0, 0, 1]]
    for distance in (1, jnp.asarray(1)):
        np.testing.assert_array_equal(Ahead(distance).tiles(LENGTH, LENGTH, block=2).states[0, 0], expected)


def test_a_leaf_without_a_meaning_says_so() -> None:
    class Meaningless(Mask):
        pass

    with pytest.raises(NotImplementedError, match=r"Meaningless must say what it allows"):
        Meaningless().dense(2, 2)


class Near(Mask):
    """The keys that are at most ``radius`` positions away, in all that a mask can say."""

    radius: Scalar

    def allows(self, b: Index, h: Index, q: Index, kv: Index) -> Allowed:
        return abs(q - kv) <= self.radius

    def tile_bounds(self, b: Index, h: Index, q: Span, kv: Span) -> Bounds:
        nearest = jnp.maximum(q.min - kv.max, kv.min - q.max)
        farthest = jnp.maximum(q.max - kv.min, kv.max - q.min)
        return nearest <= self.radius, farthest <= self.radius

    def native(self) -> Native:
        return Native(left=self.radius, right=self.radius)


NEAR = abs(QUERIES - KEYS) <= 2


def test_a_new_leaf_says_all_it_knows_to_kernels() -> None:
    split = Near(2).split(LENGTH, LENGTH)
    assert (split.local_window_size, split.residual) == ((2, 2), Full())


def test_a_new_leaf_is_drawn() -> None:
    console = Console(record=True, width=80, color_system=None)
    show(Near(2), LENGTH, console=console)
    rows = [line.split()[1:] for line in console.export_text().splitlines()[1 : LENGTH + 1]]
    assert [[cell == "■" for cell in row] for row in rows] == NEAR.tolist()


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_a_new_leaf_attends_in_transformations(implementation: Any) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 40, 2, 8)), jnp.float32)
    attend = partial(attention, implementation=implementation)

    def loss(x: jax.Array, mask: Mask) -> jax.Array:
        return attend(x, x, x, mask).sum()

    scores = jnp.einsum("bqhd,bkhd->bhqk", x, x) / 8**0.5
    q, kv = np.indices((40, 40))
    weights = jax.nn.softmax(jnp.where(abs(q - kv) <= 3, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, x)
    mask = Near(jnp.asarray(3))
    np.testing.assert_allclose(jax.jit(attend)(x, x, x, mask), expected, atol=1e-5)
    mapped = jax.vmap(lambda x, mask: attend(x, x, x, mask), (0, None))(x[:, None], mask)
    np.testing.assert_allclose(mapped[:, 0], expected, atol=1e-5)
    shards = jax.shard_map(
        lambda x: attend(x, x, x, Near(3)),
        mesh=Mesh(np.array(jax.devices()), ("batch",)),
        in_specs=PartitionSpec("batch"),
        out_specs=PartitionSpec("batch"),
    )
    np.testing.assert_allclose(jax.jit(shards)(x), expected, atol=1e-5)
    by_static, by_traced = (jax.grad(loss)(x, mask) for mask in (Near(3), mask))
    np.testing.assert_allclose(by_static, by_traced, atol=1e-4)
    assert bool((by_static != 0).any())
