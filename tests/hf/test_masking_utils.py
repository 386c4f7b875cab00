"""``jaxmask.hf.masking_utils`` is Transformers' module on JAX arrays; its tiles are PyTorch's block masks."""

# pyright: reportPrivateUsage=false

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from transformers import AutoConfig, LlamaConfig, StaticCache
from transformers import masking_utils as transformers_masks

import jaxmask
from jaxmask import Causal, Chunked, Padding, Predicate, Prefix, Segments, SlidingWindow, TileMap
from jaxmask.hf import masking_utils as masks
from tests.core.test_mask_laws import compilations
from tests.helpers.bad import bad, refusals
from tests.helpers.strategies import Described, Problem, cases, problems
from torch_compat.blocks import to_block_mask
from torch_compat.verify import comparison, masking_cases

NAMES = (*masking_cases.OPERATIONS, "LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING", "ALL_MASK_ATTENTION_FUNCTIONS")
# Bad input, and what a trace makes of arrays, is known to no type checker.
lib: Any = masks

SDPA = SimpleNamespace(_attn_implementation="sdpa", sliding_window=3, attention_chunk_size=3)
EAGER = SimpleNamespace(_attn_implementation="eager", sliding_window=3, attention_chunk_size=3)
EMBEDS: Any = jnp.zeros((2, 4, 8))
ONE: Any = jnp.zeros((2, 1, 8))
PADDED: Any = jnp.array([[0, 1, 1, 1], [1, 1, 1, 1]])


@dataclass(frozen=True)
class Cache:
    """A cache of one layer, of fixed size."""

    seen: Any
    kv_length: Any = 16
    kv_offset: Any = 0
    is_compileable: bool = True

    def get_query_offset(self, layer_idx: int) -> Any:
        return self.seen

    def get_mask_sizes(self, q_length: int, layer_idx: int) -> tuple[Any, Any]:
        return self.kv_length, self.kv_offset


# Names and signatures.


def _parameters(function: Callable[..., Any]) -> list[tuple[str, object, object]]:
    def default(value: object) -> object:
        if value is transformers_masks.causal_mask_function or value is masks.causal_mask_function:
            return "causal_mask_function"
        return {torch.float32: "float32", jnp.float32: "float32"}.get(value, value)  # pyright: ignore[reportArgumentType, reportCallIssue]

    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, default(parameter.default)) for parameter in parameters]


# One is gone in Transformers 5.24, and kept here.
SHARED = [name for name in masking_cases.OPERATIONS if hasattr(transformers_masks, name)]


@pytest.mark.skipif(masking_cases.CACHE != "cache", reason="the signatures are those of Transformers 5.24")
@pytest.mark.parametrize("name", SHARED)
def test_signature_is_that_of_transformers(name: str) -> None:
    assert _parameters(getattr(masks, name)) == _parameters(getattr(transformers_masks, name))


CREATORS = [name for name in masking_cases.OPERATIONS if name.startswith("create_")]


@pytest.mark.parametrize("name", CREATORS)
def test_a_cache_is_taken_by_its_old_name_too(name: str) -> None:
    create = getattr(lib, name)
    config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=3, attention_chunk_size=3, layer_types=None)
    padded = jnp.arange(16) >= jnp.array([[1], [0]])
    answers = [create(config, EMBEDS, padded, **{cache: Cache(4)}) for cache in ("cache", "past_key_values")]
    assert np.array_equal(np.asarray(answers[0]), np.asarray(answers[1]))
    assert name == "create_recurrent_attention_mask" or answers[0].shape == (2, 1, 4, 16)
    with pytest.raises(TypeError, match="both cache and past_key_values"):
        create(config, EMBEDS, padded, cache=None, past_key_values=None)


@pytest.mark.parametrize("name", ["create_causal_mask", "create_chunked_causal_mask", "create_bidirectional_mask"])
def test_a_paged_cache_needs_no_mask(name: str) -> None:
    class PagedAttentionCache:
        """As Transformers names it."""

    class Mine(PagedAttentionCache):
        """One of its subclasses."""

    for cache in (PagedAttentionCache(), Mine()):
        assert getattr(lib, name)(EAGER, EMBEDS, PADDED, cache=cache) is None


@pytest.mark.parametrize(
    "name", ["create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask"]
)
def test_blocks_do_not_reach_from_one_packed_document_into_another(name: str) -> None:
    positions, blocks = jnp.array([[0, 1, 0, 1]]), jnp.zeros((1, 4), jnp.int32)
    ours = getattr(lib, name)(SDPA, EMBEDS[:1], None, None, positions, block_sequence_ids=blocks)
    assert np.array_equal(np.asarray(ours)[0, 0], np.kron(np.eye(2), np.ones((2, 2))))


def test_the_mappings_have_the_keys_and_functions_of_transformers() -> None:
    def named(function: Any) -> object:
        if isinstance(function, dict):
            return {name: named(part) for name, part in function.items()}
        return getattr(function, "__name__", None) or (function.func.__name__, function.keywords)

    theirs = transformers_masks.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    assert named(dict(masks.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)) == named(theirs)
    theirs = transformers_masks.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    assert named(masks.ALL_MASK_ATTENTION_FUNCTIONS) == named(theirs)


def test_every_function_of_transformers_is_here() -> None:
    """All that is public there, but for what is of PyTorch alone."""
    of_torch = {"fast_all"}
    there = {
        name
        for name, value in vars(transformers_masks).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == transformers_masks.__name__
    }
    assert there - of_torch - set(vars(masks)) == set()
    assert set(masking_cases.OPERATIONS) >= there - of_torch


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_import_does_not_import(module: str) -> None:
    code = f"import sys, jaxmask.hf.masking_utils; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Mask functions.


@dataclass(frozen=True)
class Drawn:
    """A mask function of the generated cases, at the sizes that its arrays reach."""

    shape: Any
    function: masks.MaskFunction

    @classmethod
    def of(cls, seed: int) -> "Drawn":
        rng = np.random.default_rng(seed)
        draw = masking_cases.MaskingDraw("float32", rng, rng)
        shape = draw.shape()
        return cls(shape, draw.tree(shape).on(comparison.jax_side("float32", np.asarray)))

    @property
    def arguments(self) -> dict[str, Any]:
        sizes = {
            "batch_size": self.shape.batch_size,
            "q_length": self.shape.query_length,
            "kv_length": self.shape.key_length,
        }
        return sizes | {"q_offset": self.shape.past, "mask_function": self.function}

    @property
    def expected(self) -> np.ndarray:
        """What the function says of each pair, asked for one by one."""
        b, _, q, kv = np.indices((self.shape.batch_size, 1, self.shape.query_length, self.shape.key_length), np.int32)
        return np.asarray(self.function(b.ravel(), 0, q.ravel() + self.shape.past, kv.ravel())).reshape(b.shape)


SEEDS = st.integers(0, 40)


@given(SEEDS)
@settings(max_examples=15)
def test_a_mask_has_what_its_function_says_of_each_pair(seed: int) -> None:
    drawn = Drawn.of(seed)
    assert np.array_equal(np.asarray(masks.sdpa_mask(**drawn.arguments, local_size=1)), drawn.expected)


@given(SEEDS)
@settings(max_examples=30)
def test_tiles_of_a_mask_function_are_sound(seed: int) -> None:
    drawn = Drawn.of(seed)
    shape = drawn.shape
    mask = masks.flex_attention_mask(**drawn.arguments).mask
    tiles = mask.tiles(shape.query_length, shape.key_length, block=2, offset=shape.past)
    assert isinstance(tiles.states, np.ndarray)
    assert tiles.states.shape[0] == shape.batch_size
    for b, h, i, j in np.ndindex(*tiles.states.shape):
        pairs = drawn.expected[b, h, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        state = tiles.states[b, h, i, j]
        assert state == jaxmask.PARTIAL or (pairs.all() if state == jaxmask.FULL else not pairs.any())


def test_composition_stays_visible() -> None:
    assert masks.sliding_window_causal_mask_function(3).mask == SlidingWindow(3)
    chunked = masks.chunked_causal_mask_function(4, 0)
    assert chunked.mask == Chunked(4) & Causal()
    assert masks.and_masks(chunked, masks.causal_mask_function).mask == Chunked(4) & Causal() & Causal()


def test_tiles_of_causal_packed_rows_skip_other_sequences() -> None:
    """Packed rows reach the tile logic as what they are."""
    positions = np.tile(np.arange(256), 4)[None]
    config = SimpleNamespace(_attn_implementation="flex_attention")
    tiles = masks.create_causal_mask(config, jnp.zeros((1, 1024, 8)), None, None, position_ids=positions)
    assert isinstance(tiles, TileMap)
    assert np.asarray(tiles.counts).tolist() == [64 - 12, 8, 4]


def test_a_mask_serves_as_a_mask_function() -> None:
    ours = masks.create_causal_mask(SDPA, EMBEDS, None, None, or_mask_function=Prefix(2))
    assert np.array_equal(np.asarray(ours), np.broadcast_to((Causal() | Prefix(2)).dense(4, 4), (2, 1, 4, 4)))


def test_a_function_of_pairs_may_index_an_array_that_is_traced() -> None:
    def forward(ids: jax.Array) -> Any:
        return masks.create_causal_mask(
            SDPA, EMBEDS, None, None, or_mask_function=lambda b, h, q, kv: ids[b, q] == ids[b, kv]
        )

    ids = jnp.array([[0, 1, 1, 0], [0, 0, 2, 2]])
    expected = np.tril(np.ones((4, 4), bool)) | (np.asarray(ids)[:, None, :, None] == np.asarray(ids)[:, None, None])
    assert np.array_equal(jax.jit(forward)(ids), expected)


def test_a_function_of_pairs_may_be_constant() -> None:
    ours = masks.create_causal_mask(SDPA, EMBEDS, PADDED, None, or_mask_function=lambda *pair: True)
    assert np.array_equal(np.asarray(ours), np.broadcast_to(np.asarray(PADDED)[:, None, None] != 0, (2, 1, 4, 4)))


# What lies beyond an array.

FOUR: Any = np.array([[1, 1, 0, 1]])
ENDING = {
    "padding": lambda ids: lib.padding_mask_function(ids),
    "packed": lambda ids: lib.packed_sequence_mask_function(ids),
    "blockwise": lambda ids: lib.blockwise_overlay(ids),
    "remap": lambda ids: lib.remap_positions_for_packed_sequence(lib.bidirectional_mask_function, ids),
    "a mask": lambda ids: Padding(ids),
}


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", ENDING)
def test_known_positions_beyond_an_array_are_refused(name: str, as_array: Callable[[Any], Any]) -> None:
    function = lib.and_masks(ENDING[name](as_array(FOUR)))
    pattern = r"\[1, 4\], ends at position 3, but (query|key) positions 0 to 5 were asked for"
    for mask in (masks.sdpa_mask, masks.eager_mask, masks.flex_attention_mask):
        with pytest.raises(ValueError, match=pattern):
            mask(1, 6, 6, mask_function=function, local_size=1)
    with pytest.raises(ValueError, match=pattern):
        lib.create_bidirectional_mask(SDPA, jnp.zeros((1, 6, 8)), None, and_mask_function=function)
    with pytest.raises(ValueError, match=r"positions 4 to 4 were asked for"):
        function(0, 0, 0, 4)
    with pytest.raises(ValueError, match="-1 to"):
        lib.add_offsets_to_mask_function(function, 0, -1)(0, 0, 0, 0)


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("count", [1, 4])
def test_traced_positions_beyond_an_array_do_not_attend(name: str, count: int) -> None:
    function = lib.and_masks(ENDING[name](jnp.ones((1, count), jnp.int32)))

    @jax.jit
    def read(first: Any) -> Any:
        return masks.sdpa_mask(1, 1, count, kv_offset=first, mask_function=function, local_size=1)

    allowed = np.stack([np.asarray(read(first))[0, 0, 0] for first in range(count + 2)])
    assert np.array_equal(allowed, np.arange(count + 2)[:, None] + np.arange(count) < count)


@pytest.mark.parametrize("name", ENDING)
def test_traced_positions_beyond_an_array_have_no_tiles(name: str) -> None:
    function = lib.and_masks(ENDING[name](jnp.ones((1, 256), jnp.int32)))

    @jax.jit
    def tiles(first: Any) -> Any:
        return masks.flex_attention_mask(1, 128, 256, kv_offset=first, mask_function=function).states

    assert tiles(0).tolist() == [[[[jaxmask.FULL, jaxmask.FULL]]]]
    assert tiles(128).tolist() == [[[[jaxmask.FULL, jaxmask.EMPTY]]]]


def test_positions_that_are_remapped_beyond_an_array_are_refused() -> None:
    function = lib.remap_positions_for_packed_sequence(lib.padding_mask_function(FOUR), np.array([[0, 1, 0, 5]]))
    with pytest.raises(ValueError, match="key positions 0 to 5 were asked for"):
        masks.sdpa_mask(1, 4, 4, mask_function=function, local_size=1)


def test_an_array_for_fewer_examples_is_refused() -> None:
    function = lib.padding_mask_function(np.ones((2, 4)))
    with pytest.raises(ValueError, match="is for 2 examples, but 3 were asked for"):
        masks.sdpa_mask(3, 4, 4, mask_function=function, local_size=1)


def test_blocks_may_end_before_the_slots_of_a_cache() -> None:
    blocks = jnp.array([[0, 0, 1, 1]])
    ours = masks.create_causal_mask(SDPA, EMBEDS[:1], None, Cache(0, kv_length=6), block_sequence_ids=blocks)
    expected = np.kron(np.eye(2), np.ones((2, 2))) + np.tril(np.ones((4, 4))) > 0
    assert np.array_equal(np.asarray(ours)[0, 0], np.pad(expected, ((0, 0), (0, 2))))


# Configurations and caches.


@dataclass
class Plain:
    _attn_implementation: str = "sdpa"
    sliding_window: int | None = 2
    layer_types: tuple[str, ...] | None = None


@pytest.mark.parametrize(
    "config",
    [
        Plain(),
        SimpleNamespace(_attn_implementation="sdpa", sliding_window=2),
        AutoConfig.for_model("mistral", sliding_window=2, attn_implementation="sdpa"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_any_config_will_do(config: Any) -> None:
    ours = masks.create_masks_for_generate(config, EMBEDS, None, None)
    assert np.array_equal(ours[1, 0], SlidingWindow(2).dense(4, 4)[0, 0])


def test_a_static_cache_of_transformers_will_do() -> None:
    cache = StaticCache(LlamaConfig(num_hidden_layers=1), max_cache_len=8)
    states = torch.zeros(2, 1, 3, 1)
    cache.update(states, states, 0)
    ours = masks.create_causal_mask(SDPA, ONE, None, cache)
    assert np.asarray(ours)[0, 0].tolist() == [[True] * 4 + [False] * 4]


def test_a_4d_mask_or_tiles_come_back_as_they_are() -> None:
    for prepared in (jnp.ones((2, 1, 4, 4)), np.ones((2, 1, 4, 4)), Causal().tiles(4, 4)):
        for create in (masks.create_causal_mask, masks.create_chunked_causal_mask, masks.create_masks_for_generate):
            assert create(SimpleNamespace(), EMBEDS, prepared, None) is prepared


def test_another_implementation_gets_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setitem(masks.ALL_MASK_ATTENTION_FUNCTIONS, "mine", lambda **arguments: given.append(arguments))
    config = SimpleNamespace(_attn_implementation="mine", sliding_window=3)
    assert masks.create_sliding_window_causal_mask(config, EMBEDS, None, None) is None
    assert given[0]["mask_function"].mask == SlidingWindow(3)
    theirs = inspect.signature(transformers_masks.sdpa_mask).parameters.keys() - {"device", "kwargs"}
    assert given[0].keys() >= theirs - {"allow_torch_fix"}


# Tracing.


@pytest.mark.parametrize("create", [masks.create_causal_mask, masks.create_chunked_causal_mask])
@pytest.mark.parametrize("config", [SDPA, EAGER], ids=["sdpa", "eager"])
def test_traced_arrays_give_the_same_bits(create: Callable[..., Any], config: Any) -> None:
    def forward(mask: Any, seen: Any, first: Any, blocks: Any) -> Any:
        cache = Cache(seen, kv_length=6, kv_offset=first)
        return create(
            config, EMBEDS, mask, cache, block_sequence_ids=blocks, and_mask_function=lambda b, h, q, kv: kv != 3
        )

    mask = np.arange(9) >= np.array([[2], [0]])
    blocks = np.array([[-1, 0, 0, 1, 1, 1, -1, 2, 2, 2]]) + np.zeros((2, 1), int)
    traced = jax.jit(forward)(mask, 5, 3, blocks)
    assert np.array_equal(np.asarray(traced), np.asarray(forward(mask, 5, 3, blocks)))


@pytest.mark.parametrize("q_length", [1, 4])
@pytest.mark.parametrize("kv_length", [4, 6])
@pytest.mark.parametrize("local_size", [None, 3, 50])
@pytest.mark.parametrize("traced", ["nothing", "mask", "offset", "mask and offset"])
@pytest.mark.parametrize("name", ["sdpa_mask", "eager_mask"])
def test_no_more_is_left_out_while_tracing_than_in_transformers(
    q_length: int, kv_length: int, local_size: int | None, traced: str, name: str
) -> None:
    """What is traced here is a fake tensor there."""
    skips = {"allow_is_causal_skip": name == "sdpa_mask", "allow_is_bidirectional_skip": name == "eager_mask"}
    sizes = {"batch_size": 1, "q_length": q_length, "kv_length": kv_length, "local_size": local_size, **skips}

    def ours(mask: Any, offset: Any) -> Any:
        return getattr(masks, name)(**sizes, attention_mask=mask, q_offset=offset)

    mask = np.ones((1, kv_length), np.bool_) if "mask" in traced else None
    if "offset" in traced:
        answer = jax.eval_shape(ours, mask, np.int32(0))
    else:
        answer = jax.eval_shape(lambda mask: ours(mask, 0), mask)
    with FakeTensorMode():
        theirs = getattr(transformers_masks, name)(
            **sizes,
            attention_mask=None if mask is None else torch.ones(1, kv_length, dtype=torch.bool),
            q_offset=torch.tensor(0) if "offset" in traced else 0,
        )
    assert (answer is None) == (theirs is None)
    assert answer is None or answer.shape == theirs.shape


def test_a_mask_that_is_not_traced_is_read_in_the_middle_of_a_trace() -> None:
    for ones in (jnp.ones((2, 4), jnp.int32), np.ones((2, 4)), jnp.ones((2, 4), jnp.bool_)):
        jax.make_jaxpr(lambda embeds, ones=ones: _is_none(masks.create_causal_mask(SDPA, embeds, ones, None)))(EMBEDS)
        jax.make_jaxpr(lambda embeds, ones=ones: _is_none(masks.create_bidirectional_mask(SDPA, embeds, ones)))(EMBEDS)
        jax.make_jaxpr(lambda embeds, ones=ones: _is_none(masks.create_recurrent_attention_mask(SDPA, embeds, ones)))(
            EMBEDS
        )


def _is_none(mask: Any) -> int:
    assert mask is None
    return 0


def test_traced_positions_have_indices_of_sequences() -> None:
    indices = jax.jit(masks.find_packed_sequence_indices)(jnp.arange(4)[None])
    with FakeTensorMode():
        assert transformers_masks.find_packed_sequence_indices(torch.arange(4)[None]) is not None
    assert np.array_equal(np.asarray(indices), np.zeros((1, 4)))
    packed = jnp.array([[0, 1, 0, 1]])
    traced = jax.jit(lambda ids: masks.create_causal_mask(SDPA, EMBEDS, None, None, position_ids=ids))(packed)
    static: Any = masks.create_causal_mask(SDPA, EMBEDS, None, None, position_ids=packed)
    assert np.array_equal(traced, static)


def test_a_traced_mask_is_kept_for_linear_and_flash_attention() -> None:
    ones = jnp.ones((2, 4), jnp.int32)
    flash = SimpleNamespace(_attn_implementation="flash_attention_2")
    for create in (
        lambda mask: masks.create_recurrent_attention_mask(flash, EMBEDS, mask),
        lambda mask: masks.create_causal_mask(flash, EMBEDS, mask, None),
    ):
        assert create(ones) is None
        assert np.asarray(jax.jit(create)(ones)).all()


def test_decoding_with_a_cache_of_fixed_size_traces_once() -> None:
    traces: list[int] = []

    @jax.jit
    def step(embeds: Any, valid: Any, seen: Any) -> Any:
        traces.append(1)
        return masks.create_causal_mask(EAGER, embeds, valid, Cache(seen))

    valid = jnp.ones((2, 16), jnp.bool_)
    for t in range(16):
        bias = step(ONE, valid, t)
        assert np.array_equal(bias[0, 0, 0] == 0, np.arange(16) <= t)
    assert len(traces) == 1


@pytest.mark.parametrize("as_offset", [int, jnp.asarray], ids=["int", "jax"])
@pytest.mark.parametrize("name", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_another_offset_compiles_nothing(name: str, as_offset: Callable[[int], Any]) -> None:
    create = getattr(masks, name)
    valid = jnp.arange(40)[None] >= jnp.array([[3], [0]])

    def step(t: int) -> Any:
        return create(EAGER, ONE, valid, Cache(as_offset(t), kv_length=6, kv_offset=as_offset(t - 5)))

    step(6)
    with compilations() as seen:
        for t in range(7, 30):
            step(t)
    assert seen == []


# Tiles as block masks.


@given(cases(at=problems(to_array=(np.asarray,))))
@settings(max_examples=40)
def test_block_mask_is_that_of_every_pair(case: tuple[Problem, list[Described]]) -> None:
    problem, [described] = case
    tiles = problem.tiles(described.mask, (2, 3))
    batch, heads, *_ = tiles.states.shape
    allowed = torch.from_numpy(problem.expected(described.oracle)[:batch, :heads])
    theirs = create_block_mask(
        lambda b, h, q, kv: allowed[b, h, q, kv], *allowed.shape, device="cpu", BLOCK_SIZE=(2, 3)
    )
    ours = to_block_mask(tiles)
    assert comparison.compare(comparison.parts(ours), comparison.parts(theirs)) is None
    assert torch.equal(create_mask(ours.mask_mod, *allowed.shape, device="cpu"), allowed)


def test_flex_attention_takes_the_block_mask() -> None:
    valid = np.arange(150)[None] >= np.array([[0], [40]])
    tiles = masks.flex_attention_mask(
        2, 150, 150, mask_function=masks.sliding_window_causal_mask_function(60), attention_mask=valid
    )
    query, key, value = torch.randn(3, 2, 2, 150, 16, generator=torch.Generator().manual_seed(0))
    real = torch.from_numpy(valid)

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) & (kv > q - 60) & real[b, kv]

    theirs = create_block_mask(mask_mod, 2, None, 150, 150, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [
            flex_attention(query, key, value, block_mask=block_mask)
            for block_mask in (theirs, to_block_mask(tiles), to_block_mask(tiles, mask_mod))
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_block_mask_has_the_function_that_is_given() -> None:
    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv <= q

    assert to_block_mask(Causal().tiles(200, 200), mask_mod).mask_mod is mask_mod


def test_block_mask_decides_what_three_valued_logic_cannot() -> None:
    tiles = (Causal() & Predicate(lambda b, h, q, kv: kv > q)).tiles(256, 256)
    assert (tiles.states == jaxmask.PARTIAL).sum() == 3
    assert to_block_mask(tiles).kv_num_blocks.sum() == 0
    full = (~Causal() | Predicate(lambda b, h, q, kv: kv <= q)).tiles(256, 256)
    assert str(to_block_mask(full).full_kv_num_blocks) == "tensor([[[2, 2]]], dtype=torch.int32)"


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_block_mask_of_many_tiles_with_offsets_of_examples(as_array: Callable[[Any], Any]) -> None:
    """More tiles than are written out at once, in two examples at other positions."""
    ids = np.cumsum(np.arange(2000) % 17 == 0)[None] + np.zeros((2, 1), int)
    mask = Segments(as_array(ids), as_array(ids))
    tiles = mask.tiles(1200, 2000, block=(8, 8), offset=as_array([100, 700]))
    assert (np.asarray(tiles.states) == jaxmask.PARTIAL).sum() > 512
    allowed = torch.from_numpy(np.array(mask.dense(1200, 2000, offset=as_array([100, 700]))))
    theirs = create_block_mask(
        lambda b, h, q, kv: allowed[b, h, q, kv], 2, None, 1200, 2000, device="cpu", BLOCK_SIZE=8
    )
    assert comparison.compare(comparison.parts(to_block_mask(tiles)), comparison.parts(theirs)) is None


# Bad input.

TENSOR: Any = torch.ones(2, 4, dtype=torch.bool)
TO_JAX = r"torch_compat\.to_jax"
TYPE, VALUE = TypeError, ValueError
IDS: Any = jnp.zeros((2, 4), jnp.int32)


def _with(**attributes: Any) -> Any:
    return SimpleNamespace(_attn_implementation="sdpa", **attributes)


TABLE = [
    bad("no-config", lambda: lib.create_causal_mask(None, EMBEDS, None, None), AttributeError, "config, None", "sdpa"),
    bad(
        "config-without-implementation",
        lambda: lib.create_causal_mask(SimpleNamespace(), EMBEDS, None, None),
        AttributeError,
        "a SimpleNamespace",
        "_attn_implementation",
    ),
    bad(
        "config-without-window",
        lambda: lib.create_sliding_window_causal_mask(_with(), EMBEDS, None, None),
        VALUE,
        "a SimpleNamespace",
        "sliding_window, which is missing",
    ),
    bad(
        "config-window-none",
        lambda: lib.create_bidirectional_sliding_window_mask(_with(sliding_window=None), EMBEDS, None),
        VALUE,
        "sliding_window, which is missing or None",
    ),
    bad(
        "config-window-zero",
        lambda: lib.create_sliding_window_causal_mask(_with(sliding_window=0), EMBEDS, None, None),
        VALUE,
        "sliding_window of config",
        "got 0",
        "at least 1",
    ),
    bad(
        "config-window-traced",
        lambda window: lib.create_sliding_window_causal_mask(_with(sliding_window=window), EMBEDS, None, None),
        TYPE,
        "sliding_window of config",
        r"float32\[\]",
        argument=jnp.ones(()),
    ),
    bad(
        "config-without-chunk",
        lambda: lib.create_chunked_causal_mask(_with(), EMBEDS, None, None),
        VALUE,
        "attention_chunk_size, which is missing",
    ),
    bad(
        "flash-chunks",
        lambda: lib.create_chunked_causal_mask(
            SimpleNamespace(_attn_implementation="flash_attention_2", attention_chunk_size=3), EMBEDS, None, None
        ),
        VALUE,
        "4 keys",
        "attention_chunk_size=3",
        "another _attn_implementation",
    ),
    bad(
        "embeds-torch",
        lambda: lib.create_causal_mask(SDPA, torch.ones(2, 4, 8), None, None),
        TYPE,
        "inputs_embeds",
        TO_JAX,
    ),
    bad(
        "embeds-rank",
        lambda embeds: lib.create_causal_mask(SDPA, embeds, None, None),
        VALUE,
        "inputs_embeds",
        r"float32\[4\]",
        "rank 2",
        argument=jnp.ones(4),
    ),
    bad(
        "encoder-torch",
        lambda: lib.create_bidirectional_mask(SDPA, EMBEDS, None, torch.ones(2, 4, 8)),
        TYPE,
        "encoder_hidden_states",
        TO_JAX,
    ),
    bad("mask-torch", lambda: lib.create_causal_mask(SDPA, EMBEDS, TENSOR, None), TYPE, "attention_mask", TO_JAX),
    bad(
        "mask-4d-torch",
        lambda: lib.create_masks_for_generate(SDPA, EMBEDS, TENSOR[None, None], None),
        TYPE,
        "attention_mask",
        TO_JAX,
    ),
    bad("mask-recurrent-torch", lambda: lib.create_recurrent_attention_mask(SDPA, EMBEDS, TENSOR), TYPE, TO_JAX),
    bad(
        "mask-rank",
        lambda mask: lib.create_bidirectional_mask(SDPA, EMBEDS, mask),
        VALUE,
        "attention_mask",
        r"bool\[2, 1, 4\]",
        "rank 2 or 4",
        argument=jnp.ones((2, 1, 4), jnp.bool_),
    ),
    bad(
        "mask-batch",
        lambda mask: lib.create_causal_mask(EAGER, EMBEDS, mask, None),
        VALUE,
        "attention_mask",
        "batch of 2",
        r"bool\[3, 4\]",
        argument=jnp.ones((3, 4), jnp.bool_),
    ),
    bad(
        "mask-batch-direct",
        lambda mask: lib.sdpa_mask(2, 4, 4, attention_mask=mask),
        VALUE,
        "attention_mask",
        "batch of 2",
        r"bool\[1, 4\]",
        argument=jnp.ones((1, 4), jnp.bool_),
    ),
    bad(
        "or-mask",
        lambda: lib.create_causal_mask(SDPA, EMBEDS, None, None, or_mask_function=TENSOR),
        TYPE,
        "mask function",
        "a torch tensor",
    ),
    bad("and-masks", lambda: lib.and_masks(lib.causal_mask_function, 3), TYPE, "mask function", "got 3"),
    bad("or-masks", lambda: lib.or_masks(IDS), TYPE, "mask function", r"int32\[2, 4\]"),
    bad(
        "function-of-ints",
        lambda: lib.create_causal_mask(SDPA, EMBEDS, None, None, and_mask_function=lambda b, h, q, kv: q - kv),
        TYPE,
        "bool",
        r"int32\[",
    ),
    bad(
        "positions-rank",
        lambda ids: lib.create_causal_mask(SDPA, EMBEDS, None, None, position_ids=ids),
        VALUE,
        "position_ids",
        r"int32\[3, 2, 4\]",
        "rank 2",
        argument=jnp.zeros((3, 2, 4), jnp.int32),
    ),
    bad(
        "positions-batch",
        lambda ids: lib.create_causal_mask(SDPA, EMBEDS, None, None, position_ids=ids),
        VALUE,
        "position_ids",
        r"int32\[3, 4\]",
        r"\[2, 4\]",
        argument=jnp.zeros((3, 4), jnp.int32),
    ),
    bad(
        "positions-length",
        lambda ids: lib.create_causal_mask(SDPA, EMBEDS, None, None, position_ids=ids),
        VALUE,
        "position_ids",
        r"int32\[2, 5\]",
        r"\[2, 4\]",
        argument=jnp.zeros((2, 5), jnp.int32),
    ),
    bad(
        "positions-float", lib.find_packed_sequence_indices, TYPE, "position_ids", r"float32\[4\]", argument=jnp.ones(4)
    ),
    bad(
        "blocks-batch",
        lambda ids: lib.create_causal_mask(SDPA, EMBEDS, None, None, block_sequence_ids=ids),
        VALUE,
        "block_sequence_ids",
        r"int32\[3, 4\]",
        r"\[2, keys\]",
        argument=jnp.zeros((3, 4), jnp.int32),
    ),
    bad(
        "blocks-float", lib.blockwise_overlay, TYPE, "block_sequence_ids", r"float32\[2, 4\]", argument=jnp.ones((2, 4))
    ),
    bad(
        "cache-length-traced",
        lambda length: lib.create_causal_mask(SDPA, EMBEDS, None, Cache(0, kv_length=length)),
        TYPE,
        "kv_length",
        r"int32\[\]",
        "must be a Python int",
        argument=jnp.asarray(4),
    ),
    bad(
        "cache-offset",
        lambda: lib.create_causal_mask(SDPA, EMBEDS, None, Cache(1.5)),
        TYPE,
        "q_offset",
        r"1\.5",
    ),
    bad(
        "padding-offset-traced",
        lambda offset: jax.jit(lib.prepare_padding_mask, static_argnums=1)(PADDED, 4, offset),
        TYPE,
        "kv_offset",
        r"int32\[\]",
        "Python int",
        argument=jnp.asarray(1),
    ),
    bad("eager-dtype", lambda: lib.eager_mask(1, 2, 2, dtype=jnp.int32), TYPE, "dtype", "int32", "floating"),
    bad("padding-rank", lib.padding_mask_function, VALUE, "padding_mask", r"int32\[4\]", "rank 2", argument=PADDED[0]),
    bad("chunk-size", lambda: lib.chunked_overlay(0, 0), VALUE, "chunk_size", "got 0", "at least 1"),
    bad(
        "left-padding",
        lambda padding: lib.chunked_causal_mask_function(3, padding),
        VALUE,
        "left_padding",
        r"int32\[2, 4\]",
        "rank 0 or 1",
        argument=IDS,
    ),
    bad("lengths", lambda: lib.sdpa_mask(1, 0, 4), VALUE, "q_length", "got 0", "at least 1"),
    bad("tiles", lambda: to_block_mask(Any), TYPE, "tiles", r"mask\.tiles"),  # pyright: ignore[reportArgumentType]
    bad(
        "tiles-traced",
        lambda valid: jax.jit(lambda valid: to_block_mask(Padding(valid).tiles(4, 4)).kv_num_blocks)(valid),
        TYPE,
        "tiles are traced",
        "outside of jit",
        argument=PADDED,
    ),
]

test_bad_input_is_refused = refusals(TABLE)
