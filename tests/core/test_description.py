"""What a mask is: abstract or final, with fields that are what they say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmask import (
    Causal,
    Chunked,
    Dense,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    attention,
    zoo,
)


def allows_all(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv == kv


@pytest.mark.parametrize(
    "final", [Causal, SlidingWindow, Padding, Segments, Dense, Predicate, type(Causal() & Prefix(1)), zoo.Axis]
)
def test_a_class_that_says_what_it_allows_is_final_and_a_subclass_is_refused(final: type[Mask]) -> None:
    with pytest.raises(
        TypeError, match=rf"EvenMore cannot be a subclass of {final.__name__}.*combine .*or subclass Mask"
    ):
        type("EvenMore", (final,), {"allows": allows_all})
    with pytest.raises(TypeError, match="cannot be a subclass"):
        type("Same", (final,), {})


def test_an_abstract_class_may_be_shared_by_masks() -> None:
    class Aligned(Mask):
        size: int

        def block(self, position: Any) -> Any:
            return position // self.size

    class SameBlock(Aligned):
        def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return self.block(q) == self.block(kv)

    np.testing.assert_array_equal(SameBlock(2).dense(5, 5), Chunked(2).dense(5, 5))


@pytest.mark.parametrize("number", [np.int8(3), np.uint8(3), np.int64(3), np.uint64(3)], ids=lambda x: str(x.dtype))
def test_integers_of_numpy_are_those_of_python(number: Any) -> None:
    assert SlidingWindow(number) == SlidingWindow(3)
    assert hash(SlidingWindow(number)) == hash(SlidingWindow(3))
    assert type(Predicate(allows_all, heads=number).heads) is int
    assert [type(side) for side in (Window(number, None).left, Chunked(number, number).start)] == [int, int]


def test_a_predicate_whose_sizes_numpy_counted_is_read_in_a_jit() -> None:
    mask = Predicate(lambda b, h, q, kv: kv <= q + h, heads=np.int64(2))
    assert jax.jit(lambda: mask.dense(3, 3))().shape == (1, 2, 3, 3)


def test_an_offset_that_numpy_counted_is_static() -> None:
    split = Causal().split(4, 4, offset=np.int64(0))
    assert split.is_causal


@pytest.mark.parametrize("value", [1.5, "causal", [1, 2], {"a": 1}], ids=repr)
def test_bad_fields_are_refused_by_name(value: Any) -> None:
    class Labelled(Mask):
        label: Any

        def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return kv <= q

    with pytest.raises(TypeError, match="label of Labelled must be an int, None, a function, a mask"):
        Labelled(value)


def test_a_partial_is_a_pytree_whose_arrays_are_traced() -> None:
    def by_table(table: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return table[kv]

    def mask(table: Any) -> Mask:
        return Predicate(jax.tree_util.Partial(by_table, table))

    traces: list[int] = []

    @jax.jit
    def dense(mask: Mask) -> Any:
        traces.append(1)
        return mask.dense(2, 3, offset=0)

    for table in ([True, False, True], [False, True, True]):
        np.testing.assert_array_equal(dense(mask(jnp.array(table)))[0, 0], [table, table])
    assert traces == [1]


def test_a_mask_that_looks_at_heads_is_told_how_many_there_are() -> None:
    mask = Predicate(
        lambda b, h, q, kv: kv <= q + h, bounds=lambda b, h, q, kv: (kv.min <= q.max + h, kv.max <= q.min + h)
    )
    expected = np.arange(4) <= np.arange(4)[:, None] + np.arange(3)[:, None, None]
    np.testing.assert_array_equal(mask.dense(4, 4, heads=3)[0], expected)
    assert mask.tiles(4, 4, block=2, heads=3).states.shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match="looks at its index of heads"):
        mask.dense(4, 4)
    x = jnp.ones((1, 300, 3, 8))
    by_xla, by_tiles = (attention(x, x, x, mask, implementation=name) for name in ("xla", "blocked"))
    np.testing.assert_allclose(by_xla, by_tiles, atol=1e-5)


def test_a_mask_that_hands_its_indices_on_without_looking_needs_no_sizes() -> None:
    ignoring = jax.jit(lambda b, h, q, kv: kv <= q)
    np.testing.assert_array_equal(Predicate(ignoring).dense(3, 3), Causal().dense(3, 3))


def test_a_mask_that_returns_numbers_is_refused() -> None:
    class Numbers(Mask):
        def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return kv - q

    class Bounds(Mask):
        def allows(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return kv <= q

        def tile_bounds(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
            return 1, False

    with pytest.raises(TypeError, match=r"allows of Numbers\(\) must return bool, got int32"):
        Numbers().dense(2, 2)
    with pytest.raises(TypeError, match=r"allows of Numbers\(\) must return bool, got int32"):
        Numbers().allows(0, 0, jnp.arange(3), 1)
    x = jnp.ones((1, 300, 1, 8))
    for mask in (Numbers(), Numbers() & Causal(), ~Numbers() | Causal(), PerHead([Numbers()])):
        for name in ("xla", "blocked"):
            with pytest.raises(TypeError, match=r"allows of Numbers\(\) must return bool, got int32"):
                attention(x, x, x, mask, implementation=name)
    with pytest.raises(TypeError, match=r"tile_bounds of Bounds\(\) must return bool, got 1"):
        Bounds().tiles(4, 4, block=2)


def test_what_is_written_into_an_array_later_does_not_change_a_mask_of_it() -> None:
    ids, allowed, lengths, starts = np.zeros((1, 4), int), np.ones((4, 4), bool), np.array([4]), np.array([0])
    masks = [
        Segments(ids),
        Segments(ids, ids, offset=0, consecutive=True),
        Dense(allowed),
        Padding(allowed),
        Prefix(lengths),
        Chunked(4, starts),
        Causal() | Dense(allowed) & ~~Segments(ids),
    ]
    expected = [np.asarray(mask.dense(4, 4, query_positions=np.arange(4))) for mask in masks]
    ids[:, 2:], allowed[1:], lengths[:], starts[:] = 1, False, 1, 2
    for mask, before in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask.dense(4, 4, query_positions=np.arange(4)), before)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 1, 4, 4)])
def test_what_is_written_into_an_array_behind_a_view_does_not_change_a_mask_of_the_view(shape: Any) -> None:
    behind = np.ones((1, 1, 4, 4), bool)
    for view in (np.broadcast_to(behind, shape), np.broadcast_to(behind[..., :1], shape)):
        behind[:] = True
        mask = Dense(view)
        behind[:] = False
        assert mask.dense(4, 4).all()


def test_an_array_that_cannot_be_written_into_is_not_copied() -> None:
    kept: Any = Dense(np.ones((4, 4), bool)).allowed
    assert Dense(kept).allowed is kept
    assert Dense(broadcast := np.broadcast_to(kept, (1, 2, 4, 4))).allowed is broadcast


def test_a_broadcast_array_takes_no_more_memory_than_before() -> None:
    copied: Any = Dense(np.broadcast_to(np.ones((1, 1, 4, 1), bool), (1, 2, 4, 4))).allowed
    assert copied.strides == (0, 0, 1, 0)
