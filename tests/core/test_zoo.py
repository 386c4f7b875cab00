"""The zoo agrees with the code that each mask comes from, attn-gym, or with a definition in slow Python."""

# pyright: reportPrivateUsage=false, reportMissingTypeStubs=false

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from attn_gym import masks as gym
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, noop_mask

from jaxmask import (
    EMPTY,
    PARTIAL,
    Causal,
    Chunked,
    Full,
    Mask,
    Padding,
    PerHead,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
    zoo,
)
from jaxmask.indices import iota

Bools = npt.NDArray[np.bool_]
Draw = Callable[[st.SearchStrategy[Any]], Any]
draws = settings(max_examples=20)


@dataclass(frozen=True)
class Case:
    """A mask and the ``mask_mod`` it should equal, where queries are counted from 0."""

    mask: Mask
    mask_mod: Any
    query_length: int
    key_length: int
    offset: int = 0
    batch: int = 1
    heads: int = 1

    def expected(self) -> Bools:
        # A mask of attn-gym is a function of four scalars, which torch maps over all pairs.
        return create_mask(
            self.mask_mod, self.batch, self.heads, self.query_length, self.key_length, device="cpu"
        ).numpy()


def read(mask: Mask, query_length: int, key_length: int, offset: int = 0) -> Bools:
    """The mask written out by its own ``allows``, in NumPy: no shape is compiled for."""
    batch, heads, _ = mask.shape
    allowed = mask.allows(iota(batch, 0), iota(heads, 1), iota(query_length, 2) + offset, iota(key_length, 3))
    assert isinstance(allowed, bool | np.ndarray)
    return np.broadcast_to(allowed, (batch, heads, query_length, key_length))


def states_of(allowed: Bools, block: tuple[int, int]) -> npt.NDArray[np.int8]:
    """What is true of each tile, found pair by pair."""
    *sizes, query_length, key_length = allowed.shape
    states = np.empty((*sizes, -(-query_length // block[0]), -(-key_length // block[1])), np.int8)
    for i, j in np.ndindex(*states.shape[2:]):
        tile = allowed[:, :, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        states[:, :, i, j] = np.where(tile.any((2, 3)), 1, 0) + tile.all((2, 3))
    return states


def drawn_ids(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.repeat(np.arange(len(lengths)), lengths)[None]


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


LENGTH = 32
numbers = partial(st.integers, 0)
sizes = partial(st.integers, 1)
documents = st.lists(sizes(9), min_size=1, max_size=6)
INNER: list[tuple[Mask, Any]] = [
    (Full(), noop_mask),
    (Causal(), gym.causal_mask),
    (SlidingWindow(3), gym.generate_sliding_window(2)),
    (Prefix(2) | Causal(), gym.generate_prefix_lm_mask(2)),
    (Chunked(2), lambda b, h, q, kv: q // 2 == kv // 2),
]


# The masks of attn-gym.


def a_causal(draw: Draw) -> Case:
    return Case(Causal(), gym.causal_mask, draw(sizes(LENGTH)), draw(sizes(LENGTH)))


def a_sliding_window(draw: Draw) -> Case:
    # As far back as `window_size` keys, beside its own.
    window_size = draw(numbers(40))
    return Case(SlidingWindow(window_size + 1), gym.generate_sliding_window(window_size), LENGTH, LENGTH)


def a_prefix_lm(draw: Draw) -> Case:
    length = draw(numbers(40))
    return Case(zoo.prefix_lm(length), gym.generate_prefix_lm_mask(length), LENGTH, LENGTH)


def a_document(draw: Draw) -> Case:
    lengths, (mask, mask_mod) = draw(documents), draw(st.sampled_from(INNER))
    expected = gym.generate_doc_mask_mod(mask_mod, offsets_of(lengths))
    return Case(zoo.document(mask, drawn_ids(lengths)), expected, sum(lengths), sum(lengths))


def a_packed_document(draw: Draw) -> Case:
    lengths = draw(documents)
    expected = gym.generate_packed_causal_doc_mask_mod(offsets_of(lengths))
    return Case(Causal() & Segments(drawn_ids(lengths)), expected, sum(lengths), sum(lengths))


def a_dilated_sliding_window(draw: Draw) -> Case:
    arguments = draw(numbers(40)), draw(sizes(9))
    expected = gym.generate_dilated_sliding_window(*arguments)
    return Case(zoo.dilated_sliding_window(*arguments), expected, LENGTH, LENGTH)


def a_global_sliding_window(draw: Draw) -> Case:
    window_size, is_global = draw(numbers(9)), np.array(draw(st.lists(st.booleans(), min_size=5, max_size=40)))
    expected = gym.generate_global_sliding_window(window_size, torch.from_numpy(is_global))
    return Case(zoo.global_sliding_window(window_size, is_global[None]), expected, is_global.size, is_global.size)


def a_shared_prefix(draw: Draw) -> Case:
    lengths = draw(documents)
    prefix = np.array([draw(numbers(document)) for document in range(len(lengths))])
    expected = gym.generate_shared_prefix_mask_mod(offsets_of(lengths), torch.from_numpy(prefix))
    return Case(zoo.shared_prefix(drawn_ids(lengths), prefix[None]), expected, sum(lengths), sum(lengths))


def a_vision_cross_attention(draw: Draw) -> Case:
    intervals = np.array(draw(st.lists(st.tuples(numbers(20), numbers(20)), min_size=1, max_size=4)))
    tokens = draw(sizes(9))
    expected = gym.generate_vision_cross_attention_mask_mod(torch.from_numpy(intervals), tokens)
    return Case(zoo.vision_cross_attention(intervals[None], tokens), expected, 20, tokens * len(intervals))


def a_natten(draw: Draw) -> Case:
    # Which is right for a square alone, and calls its rows `w`.
    side, kernel = draw(sizes(6)), (draw(sizes(7)), draw(sizes(7)))
    return Case(zoo.natten((side, side), kernel), gym.generate_natten(side, side, *kernel), side**2, side**2)


def a_tiled_natten(draw: Draw) -> Case:
    kernel, tile = (draw(sizes(7)), draw(sizes(7))), (draw(sizes(3)), draw(sizes(3)))
    canvas = tile[0] * draw(sizes(3)), tile[1] * draw(sizes(3))
    expected = gym.generate_tiled_natten(*canvas[::-1], *kernel[::-1], *tile[::-1])
    return Case(zoo.tiled_natten(canvas, kernel, tile), expected, math.prod(canvas), math.prod(canvas))


def a_morton_natten(draw: Draw) -> Case:
    canvas = draw(st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)]))
    kernel = draw(sizes(9)), draw(sizes(9))
    expected = gym.generate_morton_natten(*canvas[::-1], *kernel[::-1])
    return Case(zoo.morton_natten(canvas, kernel), expected, math.prod(canvas), math.prod(canvas))


def an_sta(draw: Draw, axes: int, most: int, generate: Callable[..., Any]) -> Case:
    tile = tuple(draw(sizes(2)) for _ in range(axes))
    canvas = tuple(side * draw(sizes(most)) for side in tile)
    kernel = tuple(side * draw(sizes(most + 1)) for side in tile)
    text, beyond = draw(numbers(5)), draw(numbers(3))
    length = math.prod(canvas) + text + beyond
    return Case(zoo.sta(canvas, kernel, tile, text), generate(canvas, kernel, tile, text), length, length)


def a_spatial_head(draw: Draw) -> Case:
    prompt, frames, tokens, width, sink = draw(numbers(5)), 3, draw(sizes(9)), draw(sizes(3)), draw(st.booleans())
    round_width = draw(sizes(width * tokens))
    expected = gym.generate_spatial_head_mask_mod(prompt, frames, tokens, width, sink, round_width)
    mask = zoo.svg_spatial_head(prompt, tokens, width, sink, round_width)
    return Case(mask, expected, prompt + frames * tokens, prompt + frames * tokens)


def a_temporal_head(draw: Draw) -> Case:
    prompt, frames, tokens = draw(numbers(5)), draw(sizes(4)), draw(sizes(9))
    arguments = prompt, frames, tokens, draw(st.integers(-(-frames // tokens), frames + tokens))
    length = prompt + frames * tokens
    return Case(zoo.svg_temporal_head(*arguments), gym.generate_temporal_head_mask_mod(*arguments), length, length)


def a_tree(draw: Draw) -> Case:
    prefix, nodes = draw(numbers(9)), draw(sizes(9))
    parents = [-1, *(draw(numbers(node)) for node in range(nodes - 1))]
    ancestors = gym.build_tree_ancestor_matrix(parents, "cpu")
    mask = zoo.jetspec_tree(prefix, zoo.tree_ancestors(parents))
    return Case(mask, gym.generate_jetspec_tree_causal_mask_mod(prefix, ancestors), nodes, prefix + nodes, prefix)


def a_training(draw: Draw) -> Case:
    prefix, size, blocks = draw(numbers(9)), draw(sizes(6)), draw(sizes(4))
    expected = gym.generate_jetspec_training_mask_mod(prefix, size)
    return Case(zoo.jetspec_training(prefix, size), expected, size * blocks, prefix + size * blocks, prefix)


def a_block_diffusion(draw: Draw) -> Case:
    arguments = draw(sizes(16)), draw(sizes(9))
    expected = gym.generate_block_diffusion_mask(*arguments)
    return Case(zoo.block_diffusion(*arguments), expected, 2 * arguments[0], 2 * arguments[0])


def a_batchify(draw: Draw) -> Case:
    size, (mask, mask_mod) = draw(sizes(16)), draw(st.sampled_from(INNER))
    mask_mod.__name__ = "inner"
    return Case(zoo.batchify(mask, size), gym.batchify_mask_mod(mask_mod, size), LENGTH, LENGTH)


def a_vsa(draw: Draw) -> Case:
    tile, tiles, heads, random = draw(sizes(5)), draw(sizes(6)), 2, np.random.default_rng(draw(numbers(99)))
    chosen = random.integers(0, tiles, (2, heads, tiles, draw(sizes(tiles))))
    filled = random.integers(1, tile + 1, tiles) if draw(st.booleans()) else None
    mask = zoo.vsa(chosen, tile, tiles, None if filled is None else filled[None])
    expected = gym.generate_vsa_mask_mod(
        torch.from_numpy(chosen), tile, None if filled is None else torch.from_numpy(filled)
    )
    return Case(mask, expected, tiles * tile, tiles * tile, batch=2, heads=heads)


# By the names that attn-gym gives them.
GYM: dict[str, Callable[[Draw], Case]] = {
    "causal_mask": a_causal,
    "generate_sliding_window": a_sliding_window,
    "generate_prefix_lm_mask": a_prefix_lm,
    "generate_doc_mask_mod": a_document,
    "generate_packed_causal_doc_mask_mod": a_packed_document,
    "generate_dilated_sliding_window": a_dilated_sliding_window,
    "generate_global_sliding_window": a_global_sliding_window,
    "generate_shared_prefix_mask_mod": a_shared_prefix,
    "generate_vision_cross_attention_mask_mod": a_vision_cross_attention,
    "generate_natten": a_natten,
    "generate_tiled_natten": a_tiled_natten,
    "generate_morton_natten": a_morton_natten,
    "generate_sta_mask_mod_2d": partial(an_sta, axes=2, most=4, generate=gym.generate_sta_mask_mod_2d),
    "generate_sta_mask_mod_3d": partial(an_sta, axes=3, most=3, generate=gym.generate_sta_mask_mod_3d),
    "generate_spatial_head_mask_mod": a_spatial_head,
    "generate_temporal_head_mask_mod": a_temporal_head,
    "generate_jetspec_tree_causal_mask_mod": a_tree,
    "generate_jetspec_training_mask_mod": a_training,
    "generate_block_diffusion_mask": a_block_diffusion,
    "batchify_mask_mod": a_batchify,
    "generate_vsa_mask_mod": a_vsa,
}
every_mask_of_attn_gym = pytest.mark.parametrize("a_case", GYM.values(), ids=GYM.keys())


def test_every_mask_of_attn_gym_is_compared() -> None:
    assert {name for name in vars(gym) if re.fullmatch("generate_.*|causal_mask|.*_mask_mod", name)} == set(GYM)


@every_mask_of_attn_gym
@draws
@given(data=st.data())
def test_a_mask_is_that_of_attn_gym(a_case: Callable[[Draw], Case], data: st.DataObject) -> None:
    case = a_case(data.draw)
    expected = case.expected()
    allowed = read(case.mask, case.query_length, case.key_length, case.offset)
    np.testing.assert_array_equal(np.broadcast_to(allowed, expected.shape), expected)


@every_mask_of_attn_gym
@draws
@given(data=st.data())
def test_tiles_are_sound(a_case: Callable[[Draw], Case], data: st.DataObject) -> None:
    case = a_case(data.draw)
    block = data.draw(sizes(12)), data.draw(sizes(12))
    found = case.mask.tiles(case.query_length, case.key_length, block=block, offset=case.offset).states
    true = states_of(read(case.mask, case.query_length, case.key_length, case.offset), block)
    assert ((found == true) | (found == PARTIAL)).all()


# The masks of others.


def test_natten_has_a_whole_kernel_at_every_token() -> None:
    canvas, kernel = (3, 4, 5), (3, 1, 5)

    def neighbours(token: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The kernel around a token, moved inside where it would reach over an edge."""
        first = [
            min(max(place - side // 2, 0), size - side) for place, side, size in zip(token, kernel, canvas, strict=True)
        ]
        return (tuple(np.add(first, step)) for step in np.ndindex(*kernel))

    expected = np.zeros((*canvas, *canvas), np.bool_)
    for token in np.ndindex(*canvas):
        for neighbour in neighbours(token):
            expected[*token, *neighbour] = True
    length = math.prod(canvas)
    np.testing.assert_array_equal(
        read(zoo.natten(canvas, kernel), length, length)[0, 0], expected.reshape(length, length)
    )


def test_natten_repeats_in_every_image_of_a_row() -> None:
    one = read(zoo.natten((3, 4), (3, 3)), 12, 12)[0, 0]
    two = read(Chunked(12) & zoo.natten((3, 4), (3, 3)), 24, 24)[0, 0]
    np.testing.assert_array_equal(two, np.kron(np.eye(2, dtype=np.bool_), one))


def test_tiled_natten_is_natten_in_another_order() -> None:
    # Tiles of one token, where attn-gym knows a canvas that is no square.
    plain, tiled = zoo.natten((4, 6), (3, 5)), zoo.tiled_natten((4, 6), (3, 5), (1, 1))
    np.testing.assert_array_equal(read(plain, 24, 24), read(tiled, 24, 24))


@draws
@given(half=sizes(5), dilation=sizes(4), is_global=st.lists(st.booleans(), min_size=24, max_size=24))
def test_longformer_dilates(half: int, dilation: int, is_global: list[bool]) -> None:
    length = len(is_global)
    expected = [
        [
            is_global[q] or is_global[kv] or abs(q - kv) in range(0, half * dilation + 1, dilation)
            for kv in range(length)
        ]
        for q in range(length)
    ]
    mask = zoo.longformer(2 * half, np.array([is_global]), dilation)
    np.testing.assert_array_equal(read(mask, length, length)[0, 0], expected)


def test_bigbird_draws_blocks_that_are_not_attended_to_anyway() -> None:
    heads, blocks, count = 3, 12, 4
    drawn = zoo.bigbird_random_blocks(seed=0, heads=heads, blocks=blocks, count=count)
    attended = read(zoo.bigbird(drawn, 1), blocks, blocks)[0]
    # Itself, its two neighbours and both ends, some of which coincide at the second block and the last but one.
    others = np.array([4, *[5] * (blocks - 4), 4])
    np.testing.assert_array_equal(attended[:, 1:-1].sum(-1), np.broadcast_to(others + count, (heads, blocks - 2)))


def test_bigbird_draws_the_same_for_the_same_seed() -> None:
    first, again, other = (zoo.bigbird_random_blocks(seed, 2, 12, 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@draws
@given(start=numbers(5), recent=sizes(9))
def test_streaming_llm_keeps_the_first_and_the_last(start: int, recent: int) -> None:
    kept = [sorted({*range(min(start, q + 1)), *range(max(0, q + 1 - recent), q + 1)}) for q in range(16)]
    allowed = read(zoo.streaming_llm(start, recent), 16, 16)[0, 0]
    assert [np.flatnonzero(row).tolist() for row in allowed] == kept


@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(3), Window(2, 1), Full()], ids=repr)
def test_where_only_distance_counts_a_mask_needs_no_positions_of_its_own(mask: Mask) -> None:
    ids = drawn_ids([3, 1, 5, 3])
    np.testing.assert_array_equal(read(zoo.document(mask, ids), 12, 12), read(Segments(ids) & mask, 12, 12))
    np.testing.assert_array_equal(read(zoo.batchify(mask, 5), 12, 12), read(Chunked(5) & mask, 12, 12))


# Caches that hold a part of the keys, in another order.

WINDOW = 5
STEPS = 3 * WINDOW
IMAGES = np.array([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1, 2, 2, 2, 2]])
RINGS: dict[str, Mask] = {
    "sliding-window": SlidingWindow(WINDOW),
    "chunks": Causal() & Chunked(WINDOW),
    "window-and-chunks": SlidingWindow(3) & Chunked(4, start=1),
    "heads": PerHead([SlidingWindow(WINDOW), SlidingWindow(2)]),
    "dilated": Causal() & zoo.dilated_sliding_window(4, 2),
    "images": Causal() & zoo.gemma3(IMAGES, WINDOW - 1) & SlidingWindow(WINDOW),
    "documents": SlidingWindow(WINDOW) & zoo.document(zoo.prefix_lm(2), drawn_ids([4, 7, 4])),
}


def gathered(rows: Bools, step: int, positions: Any) -> Bools:
    """What a query sees of the keys that are still there."""
    positions = np.asarray(positions)
    return np.where(positions >= 0, rows[:, :, step, positions], False)


@pytest.mark.parametrize("mask", RINGS.values(), ids=RINGS.keys())
def test_a_ring_buffer_is_a_part_of_all_keys(mask: Mask) -> None:
    rows = read(mask, STEPS, STEPS)
    for step in range(STEPS):
        positions = zoo.ring_positions(WINDOW, step + 1)
        seen = np.asarray(mask.dense(1, WINDOW, offset=step, key_positions=positions))[:, :, 0]
        np.testing.assert_array_equal(seen, gathered(rows, step, positions))
        # And nothing that it attends to is lost.
        np.testing.assert_array_equal(seen.sum(-1), rows[:, :, step].sum(-1))


def test_a_ring_buffer_holds_the_last_tokens_each_in_its_slot() -> None:
    slots = [-1] * 4
    for token in range(12):
        slots[token % 4] = token
        positions = np.asarray(zoo.ring_positions(4, token + 1))
        assert [max(position, -1) for position in positions] == slots


def test_a_ring_buffer_is_decoded_in_a_scan_at_another_length_for_each_example() -> None:
    ahead = jnp.array([0, 4])

    def decode(step: Any, _: None) -> tuple[Any, Any]:
        positions = zoo.ring_positions(WINDOW, step + 1)
        return step + 1, SlidingWindow(3).dense(1, WINDOW, offset=step, key_positions=positions)[:, 0, 0]

    _, seen = jax.lax.scan(decode, ahead, length=STEPS - 4)
    rows = read(SlidingWindow(3), STEPS, STEPS)
    for row, first in enumerate(np.asarray(ahead)):
        for step in range(STEPS - 4):
            positions = zoo.ring_positions(WINDOW, int(first) + step + 1)
            np.testing.assert_array_equal(seen[step, row], gathered(rows, first + step, positions)[0, 0])


def test_the_cache_of_streaming_llm_holds_all_that_it_attends_to() -> None:
    start, recent, sinks = 2, 4, np.arange(2)
    mask = zoo.streaming_llm(start, recent)
    rows = read(mask, STEPS, STEPS)
    for step in range(STEPS):
        ring = zoo.ring_positions(recent, max(step + 1 - start, 0))
        positions = jnp.concatenate([jnp.where(sinks <= step, sinks, -1), jnp.where(ring >= 0, ring + start, -1)])
        seen = np.asarray(mask.dense(1, start + recent, offset=step, key_positions=positions))[:, :, 0]
        np.testing.assert_array_equal(seen, gathered(rows, step, positions))
        assert seen.sum() == rows[0, 0, step].sum()


# The laws of the design, for every mask of the zoo.


@dataclass(frozen=True)
class Example:
    """A mask made from arguments that may be traced; read from the position ``offset`` on."""

    build: Callable[..., Mask]
    arguments: tuple[Any, ...] = ()
    query_length: int = 64
    key_length: int = 64
    offset: int = 0
    # Whether it holds an element for each key, in the order of the keys.
    parallel: bool = False

    @property
    def mask(self) -> Mask:
        return self.build(*self.arguments)

    @property
    def allowed(self) -> Bools:
        return read(self.mask, self.query_length, self.key_length, self.offset)

    def dense(self, **where: Any) -> Bools:
        where = {"offset": self.offset, **where}
        return np.asarray(self.mask.dense(self.query_length, self.key_length, **where))

    def states(self, block: int, **where: Any) -> Any:
        where = {"offset": self.offset, **where}
        return self.mask.tiles(self.query_length, self.key_length, block=block, **where).states


RANDOM = np.random.default_rng(0)
GLOBAL = np.isin(np.arange(64), (0, 25))[None]
PACKED = np.concatenate([drawn_ids([18, 12, 24, 10]), drawn_ids([30, 2, 16, 16])])
PREFIXES = np.array([[0, 0, 2, 2], [0, 0, 0, 0]])
PICTURES = np.where(np.isin(PACKED, (1, 2)), PACKED, -1)
SHOWN = np.array([[[0, 24], [16, 40], [40, 64], [50, 64]]])
TREE = zoo.tree_ancestors([-1, *((node - 1) // 2 for node in range(1, 16))])
CHOSEN = RANDOM.integers(0, 8, (2, 2, 8, 3))
FILLED = RANDOM.integers(1, 9, (2, 8))

EXAMPLES: dict[str, Example] = {
    "prefix_lm": Example(zoo.prefix_lm, (20,)),
    "streaming_llm": Example(zoo.streaming_llm, (4, 16)),
    "dilated_sliding_window": Example(zoo.dilated_sliding_window, (16, 4)),
    "global_sliding_window": Example(zoo.global_sliding_window, (6, GLOBAL), parallel=True),
    "longformer": Example(partial(zoo.longformer, 8), (GLOBAL, 2), parallel=True),
    "bigbird": Example(zoo.bigbird, (zoo.bigbird_random_blocks(0, 2, 16, 2), 4)),
    "gemma3": Example(zoo.gemma3, (PICTURES,)),
    "gemma3-local": Example(zoo.gemma3, (PICTURES, 8)),
    "document": Example(partial(zoo.document, zoo.prefix_lm(4)), (PACKED,)),
    "shared_prefix": Example(zoo.shared_prefix, (PACKED, PREFIXES), parallel=True),
    "vision_cross_attention": Example(
        partial(zoo.vision_cross_attention, image_token_length=8), (SHOWN,), key_length=32, parallel=True
    ),
    "natten": Example(partial(zoo.natten, (8, 8), (3, 5))),
    "tiled_natten": Example(partial(zoo.tiled_natten, (8, 8), (3, 5), (2, 4))),
    "morton_natten": Example(partial(zoo.morton_natten, (8, 8), (3, 5))),
    "sta-2d": Example(partial(zoo.sta, (8, 6), (6, 4), (2, 2), 16)),
    "sta-3d": Example(partial(zoo.sta, (4, 4, 4), (2, 4, 2), (2, 2, 2))),
    "svg_spatial_head": Example(partial(zoo.svg_spatial_head, 4, 6, 2, True, 4)),
    "svg_temporal_head": Example(partial(zoo.svg_temporal_head, 4, 6, 10, 2)),
    "jetspec_tree": Example(zoo.jetspec_tree, (20, TREE), 16, 36, 20),
    "jetspec_training": Example(zoo.jetspec_training, (20, 4), 16, 36, 20),
    "block_diffusion": Example(zoo.block_diffusion, (32, 8)),
    "batchify": Example(partial(zoo.batchify, zoo.prefix_lm(4)), (16,)),
    "vsa": Example(partial(zoo.vsa, tile_numel=8, num_kv_tiles=8), (CHOSEN,)),
    "vsa-padded": Example(lambda chosen, filled: zoo.vsa(chosen, 8, 8, filled), (CHOSEN, FILLED), parallel=True),
}
every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


@every_example
def test_a_mask_is_the_same_where_its_arguments_are_traced(example: Example) -> None:
    @jax.jit
    def inside(*arguments: Any) -> tuple[Any, Any]:
        mask = example.build(*arguments)
        where: Any = {"offset": example.offset}
        lengths = example.query_length, example.key_length
        return mask.dense(*lengths, **where), mask.tiles(*lengths, block=(8, 8), **where).states

    dense, states = inside(*example.arguments)
    np.testing.assert_array_equal(dense, example.allowed)
    np.testing.assert_array_equal(states, example.states(8))


@every_example
def test_an_offset_is_a_slice(example: Example) -> None:
    for row in (0, example.query_length - 1):
        one = example.mask.dense(1, example.key_length, offset=example.offset + row)
        np.testing.assert_array_equal(one[:, :, 0], example.allowed[:, :, row])


@pytest.mark.parametrize(
    "example", [pytest.param(example, id=name) for name, example in EXAMPLES.items() if not example.parallel]
)
def test_keys_may_come_in_any_order(example: Example) -> None:
    order = np.random.default_rng(1).permutation(example.key_length)
    allowed = example.allowed[..., order]
    np.testing.assert_array_equal(example.dense(key_positions=order), allowed)
    found, true = example.states(8, key_positions=order), states_of(allowed, (8, 8))
    assert ((found == true) | (found == PARTIAL)).all()


@every_example
def test_to_make_a_mask_again_is_not_to_compile_again(example: Example) -> None:
    traced: list[Mask] = []

    @jax.jit
    def masks(mask: Mask) -> Any:
        traced.append(mask)
        return jax.tree.leaves(mask)

    masks(example.mask)
    masks(example.mask)
    assert len(traced) == 1


@pytest.mark.parametrize(
    "mask",
    [zoo.Reordered(Full(), np.arange(5)[None]), zoo.Blocks(np.ones((5, 5), np.bool_), 1)],
    ids=["reordered", "blocks"],
)
def test_what_is_not_described_does_not_attend(mask: Mask) -> None:
    described = np.isin(np.arange(-3, 9), range(5))
    keys = np.arange(-3, 9)
    expected = described[:, None] & described
    # A negative position of a key would be an empty slot: these are read by `allows` alone.
    np.testing.assert_array_equal(np.squeeze(mask.allows(0, 0, keys[None, None, :, None], keys)), expected)
    for block in (2, 3, 5):
        found = mask.tiles(12, 9, block=block, offset=-3).states
        np.testing.assert_array_equal(found[0, 0], states_of(expected[None, None, :, 3:], (block, block))[0, 0])


def test_positions_of_few_bits_do_not_overflow() -> None:
    mask = zoo.Reordered(Window(60, 60), np.array([[-100, 100]], np.int8))
    np.testing.assert_array_equal(read(mask, 2, 2)[0, 0], np.eye(2, dtype=np.bool_))


# Where the edges of tiles are those of what the mask is made of: rows of a canvas, blocks, chunks, images.
EXACT = [
    "prefix_lm",
    "streaming_llm",
    "dilated_sliding_window",
    "longformer",
    "bigbird",
    "vision_cross_attention",
    "natten",
    "tiled_natten",
    "morton_natten",
    "sta-3d",
    "jetspec_tree",
    "jetspec_training",
    "block_diffusion",
    "batchify",
    "vsa",
    "vsa-padded",
]


@pytest.mark.parametrize("name", EXACT)
def test_tiles_are_exact(name: str) -> None:
    example = EXAMPLES[name]
    np.testing.assert_array_equal(example.states(8), states_of(example.allowed, (8, 8)))


@every_example
@pytest.mark.parametrize("block", [8, 5])
def test_tiles_find_nearly_all_that_is_empty(example: Example, block: int) -> None:
    found, true = example.states(block), states_of(example.allowed, (block, block))
    assert ((found == true) | (found == PARTIAL)).all()
    assert (found == EMPTY).sum() >= 0.8 * (true == EMPTY).sum()


# Bad input.

lib: Any = zoo
IDS = np.zeros((2, 5), np.int32)
RANDOM_BLOCKS = np.array([[[0], [4]]])
FLOATS = np.zeros((2, 5), np.float32)
VALID = np.ones((2, 5), np.bool_)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "axis-of-no-mask": (lambda: lib.Axis(3, 2), TypeError, r"mask of Axis must be a mask, got 3"),
    "axis-of-keys": (lambda: lib.Axis(Padding(VALID), 2), ValueError, r"Padding.*each of 5 keys.*by &"),
    "axis-of-nothing": (lambda: lib.Axis(Causal(), 0), ValueError, r"size must be at least 1.*got 0"),
    "reordered-floats": (lambda: lib.Reordered(Causal(), FLOATS), TypeError, r"positions must be integer.*float32"),
    "reordered-rank": (lambda: lib.Reordered(Causal(), IDS[0]), ValueError, r"positions must have rank 2.*\[5\]"),
    "transposed-array": (lambda: lib.Transposed(VALID), TypeError, r"mask of Transposed must be a mask, got bool"),
    "transposed-short": (
        lambda: lib.Transposed(Padding(VALID)).dense(1, 9, offset=5),
        ValueError,
        r"Transposed takes queries for keys.*ends at position 4.*positions 5 to 5",
    ),
    "blocks-numbers": (lambda: lib.Blocks(IDS, 4), TypeError, r"allowed must be bool, got int32"),
    "blocks-of-nothing": (lambda: lib.Blocks(VALID, 0), ValueError, r"size must be at least 1.*got 0"),
    "between-shapes": (lambda: lib.Between(IDS, IDS[:1]), ValueError, r"start and end.*int32\[2, 5\].*int32\[1, 5\]"),
    "between-keys": (lambda: lib.Between(IDS, IDS).dense(5, 4), ValueError, r"key_length is 4.*describes 5 keys"),
    "between-offset": (lambda: lib.Between(IDS, IDS).dense(4, 5), ValueError, r"offset is missing"),
    "prefix": (lambda: lib.prefix_lm(-1), ValueError, r"prefix_length must be at least 0.*got -1"),
    "sinks": (lambda: lib.streaming_llm(-1, 4), ValueError, r"start_size must be at least 0.*got -1"),
    "recent": (lambda: lib.streaming_llm(1, 0), ValueError, r"recent_size must be at least 1.*got 0"),
    "ring": (lambda: lib.ring_positions(0, 1), ValueError, r"size must be at least 1.*got 0"),
    "dilation": (lambda: lib.dilated_sliding_window(4, 0), ValueError, r"dilation must be at least 1.*got 0"),
    "radius": (lambda: lib.global_sliding_window(-1, VALID), ValueError, r"window_size must be at least 0.*got -1"),
    "global": (lambda: lib.global_sliding_window(1, FLOATS), TypeError, r"is_global must be bool or integer.*float32"),
    "odd": (lambda: lib.longformer(5, VALID), ValueError, r"attention_window must be even.*got 5"),
    "random-rank": (lambda: lib.bigbird(IDS, 4), ValueError, r"random_blocks must have rank 3.*int32\[2, 5\]"),
    "random-beyond": (
        lambda: lib.bigbird(RANDOM_BLOCKS, 4),
        ValueError,
        r"random_blocks must be from 0 to 3.*from 0 to 4",
    ),
    "random-before": (lambda: lib.bigbird(RANDOM_BLOCKS - 1, 4), ValueError, r"random_blocks must be .*from -1 to 3"),
    "random-seed": (lambda: lib.bigbird_random_blocks(-1, 1, 8, 3), ValueError, "seed must be at least 0.*got -1"),
    "nodes": (lambda: lib.jetspec_tree(2, np.ones((2, 3), bool)), ValueError, "ancestors must have a row and a column"),
    "no-documents": (lambda: lib.shared_prefix(IDS, np.ones((2, 0), int)), ValueError, "prefix_ids must have at least"),
    "too-random": (lambda: lib.bigbird_random_blocks(0, 1, 8, 4), ValueError, r"count must be at most.*got 4 of 8"),
    "images": (lambda: lib.gemma3(FLOATS), TypeError, r"block_sequence_ids must be integer.*float32"),
    "documents": (lambda: lib.document(Causal(), VALID), TypeError, r"segment_ids must be integer.*bool"),
    "document-of-keys": (lambda: lib.document(Segments(IDS), IDS), ValueError, r"must be one of positions.*Segments"),
    "prefixes": (lambda: lib.shared_prefix(IDS, IDS[:1]), ValueError, r"segment_ids and prefix_ids.*size of batch"),
    "intervals": (lambda: lib.vision_cross_attention(IDS[None], 4), ValueError, r"\[batch, images, 2\].*\[1, 2, 5\]"),
    "axes": (lambda: lib.natten((4, 4), (3,)), ValueError, r"kernel must have a size for each axis of canvas.*\(3,\)"),
    "no-axes": (lambda: lib.natten(4, 3), TypeError, r"canvas must be a tuple with a size for each axis, got 4"),
    "axes-of-an-array": (lambda: lib.natten(np.array([4]), (3,)), TypeError, r"canvas must be a tuple.*int64\[1\]"),
    "side": (lambda: lib.natten((4, 0), (3, 3)), ValueError, r"canvas\[1\] must be at least 1.*got 0"),
    "tiles": (lambda: lib.tiled_natten((4, 4), (3, 3), (2, 3)), ValueError, r"canvas must be filled by whole tiles"),
    "morton-high": (
        lambda: lib.morton_natten((4, 2), (3, 3)),
        ValueError,
        r"canvas must be filled by a Morton curve.*\(4, 2\)",
    ),
    "morton": (
        lambda: lib.morton_natten((4, 6), (3, 3)),
        ValueError,
        r"canvas must be filled by a Morton curve.*got \(4, 6\)",
    ),
    "kernel": (lambda: lib.sta((4, 4), (3, 2), (2, 2)), ValueError, r"kernel must be filled by whole tiles.*\(3, 2\)"),
    "round": (lambda: lib.svg_spatial_head(1, 4, 2, False, 9), ValueError, r"rounded down.*at least 1.*got 0"),
    "narrow": (lambda: lib.svg_temporal_head(1, 9, 4, 2), ValueError, r"// num_frames must be at least 1.*got 0"),
    "parent": (lambda: lib.tree_ancestors([-1, 0.0]), TypeError, r"parents\[1\] must be a Python int, got 0.0"),
    "parents": (lambda: lib.tree_ancestors([-1, 2, 0]), ValueError, r"parents must come before.*got 2 for node 1"),
    "ancestors": (lambda: lib.jetspec_tree(1, IDS), TypeError, r"ancestors must be bool, got int32"),
    "block": (lambda: lib.jetspec_training(1, 0), ValueError, r"block_size must be at least 1.*got 0"),
    "clean": (lambda: lib.block_diffusion(0, 1), ValueError, r"seq_len must be at least 1.*got 0"),
    "batch": (lambda: lib.batchify(Causal(), 0), ValueError, r"batchify_size must be at least 1.*got 0"),
    "chosen": (lambda: lib.vsa(IDS, 4, 4), ValueError, r"topk_indices must have rank 4.*int32\[2, 5\]"),
    "filled": (lambda: lib.vsa(CHOSEN, 8, 8, IDS), ValueError, r"variable_block_sizes.*each of 8 tiles.*int32\[2, 5\]"),
}


@pytest.mark.breaks_annotations
@pytest.mark.parametrize(("call", "error", "says"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
