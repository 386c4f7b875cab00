"""Generated calls of what is in Transformers' ``masking_utils``, as :mod:`torch_compat.cases` makes them of the rest.

What an argument is on each side (an array, a configuration, a cache that has seen tokens, a mask function) is made by
that side's own module, from one description of it.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache, Gemma2Config, StaticCache, cache_utils

from torch_compat.cases import Case, Embeds, OnSide, Side

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flex_attention", "another backend")


@dataclass(frozen=True)
class Config(OnSide):
    """A model's configuration: of the attributes below, those that are not ``None``."""

    implementation: str = "sdpa"
    is_causal: bool | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: tuple[str, ...] | None = None

    def on(self, side: Side) -> Any:
        read = SimpleNamespace(_attn_implementation=self.implementation)
        for name in ("is_causal", "sliding_window", "attention_chunk_size", "layer_types"):
            if getattr(self, name) is not None:
                setattr(read, name, getattr(self, name))
        if side.is_torch:
            read.get_text_config = lambda: read
        return read


@dataclass(frozen=True)
class Cache(OnSide):
    """A cache of layers of these types, which has seen ``seen`` tokens, in two steps.

    On the side of JAX it is that very cache of Transformers, or a stand-in that answers as it does, in ints or arrays.
    """

    kind: str
    layer_types: tuple[str, ...]
    sliding_window: int
    seen: int
    query_length: int
    room: int
    stand_in: str | None

    def on(self, side: Side) -> Any:
        cache = self._of_transformers()
        return cache if side.is_torch or self.stand_in is None else _StandIn.of(cache, self)

    def _of_transformers(self) -> Any:
        length = self.seen + self.query_length + self.room
        if self.kind == "layers":
            layers = {
                "full_attention": cache_utils.DynamicLayer,
                "sliding_attention": lambda: cache_utils.DynamicSlidingWindowLayer(self.sliding_window),
                "linear_attention": cache_utils.LinearAttentionLayer,
                "dummy": cache_utils.DummyLayer,
            }
            cache: Any = cache_utils.Cache(layers=[layers[layer_type]() for layer_type in self.layer_types])
        elif self.kind == "mtp":
            cache = cache_utils.MtpCache()
        else:
            config = Gemma2Config(
                num_hidden_layers=len(self.layer_types),
                layer_types=list(self.layer_types),
                sliding_window=self.sliding_window,
            )
            cache = StaticCache(config, length) if self.kind == "static" else DynamicCache(config=config)
        for tokens in (self.seen // 2, self.seen - self.seen // 2):
            for layer, layer_type in enumerate(self.layer_types):
                if tokens and layer_type.endswith(("full_attention", "sliding_attention")):
                    states = torch.zeros(1, 1, tokens, 1)
                    cache.update(states, states, layer)
        return cache


@dataclass(frozen=True)
class _StandIn:
    """A cache of nothing but answers."""

    sizes: dict[int, tuple[int, Any, Any]]
    is_sliding: list[bool]
    is_linear: list[bool]
    is_dummy: list[bool]
    is_compileable: bool

    @classmethod
    def of(cls, cache: Any, spec: Cache) -> "_StandIn":
        as_offset: Callable[[int], Any] = jnp.int32 if spec.stand_in == "arrays" else int
        sizes: dict[int, tuple[int, Any, Any]] = {}
        for layer, layer_type in enumerate(spec.layer_types):
            if layer_type.endswith(("full_attention", "sliding_attention")):
                kv_length, kv_offset = cache.get_mask_sizes(spec.query_length, layer)
                sizes[layer] = int(kv_length), as_offset(int(kv_offset)), as_offset(int(cache.get_query_offset(layer)))
        return cls(sizes, cache.is_sliding, cache.is_linear, cache.is_dummy, cache.is_compileable)

    def get_query_offset(self, layer_idx: int) -> Any:
        return self.sizes[self._layer(layer_idx)][2]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        return self.sizes[self._layer(layer_idx)][:2]

    def _layer(self, layer_idx: int) -> int:
        return layer_idx if layer_idx in self.sizes else min(self.sizes)


@dataclass(frozen=True)
class Built(OnSide):
    """A mask function by its name in ``masking_utils``, called with ``arguments``, or as it is."""

    name: str
    arguments: tuple[Any, ...] | None = None

    def on(self, side: Side) -> Any:
        function = getattr(side.masking_utils, self.name)
        return function if self.arguments is None else function(*map(side.value, self.arguments))


@dataclass(frozen=True)
class Plain(OnSide):
    """A function of four integers that a user could write, for either framework."""

    name: str

    def on(self, side: Side) -> Any:
        return PLAIN[self.name]


@dataclass(frozen=True)
class Table(OnSide):
    """A user's function that looks a key up in a table of bools ``[batch, keys]``, which ``seed`` makes."""

    batch_size: int
    length: int
    seed: int

    def on(self, side: Side) -> Any:
        return _looking_up(self, side.is_torch)


@cache
def _looking_up(table: Table, is_torch: bool) -> Callable[[Any, Any, Any, Any], Any]:
    # The same function each time, which JAX compiles once. It takes a table of JAX, for it is traced.
    allowed = np.random.default_rng(table.seed).random((table.batch_size, table.length)) < 0.5
    of_framework: Any = torch.from_numpy(allowed) if is_torch else jnp.asarray(allowed)
    return lambda b, h, q, kv: of_framework[b, kv]


PLAIN: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "every third key": lambda b, h, q, kv: kv % 3 == 0,
    "neighbours": lambda b, h, q, kv: abs(q - kv) <= 1,
    "another half in each example": lambda b, h, q, kv: (q + kv + b) % 2 == 0,
}


@dataclass(frozen=True)
class _Shape:
    batch_size: int
    query_length: int
    past: int
    window: int

    @property
    def end(self) -> int:
        return self.past + self.query_length


# Decoding and prefill, with and without a past, windows that are shorter and longer than the keys. Few, for each is
# another compilation; what the masks hold differs in every case.
_DECODE, _PREFILL = _Shape(2, 1, 6, 4), _Shape(2, 5, 0, 3)
_SHAPES = (_DECODE, _PREFILL, _Shape(1, 4, 5, 20), _Shape(3, 2, 3, 4))
# For tiles of 128 by 128: whole, ragged, several.
_LARGE_SHAPES = (_Shape(1, 256, 0, 100), _Shape(2, 130, 10, 40), _Shape(2, 1, 270, 300))


# Where the mask of a model's inputs can be left out, and where it nearly can: shape, source of the keys, padding, and
# implementation.
_CORNERS = tuple(
    itertools.product(
        (_DECODE, _PREFILL), (None, "dynamic", "static", "elsewhere"), (None, "ones", "left"), ("sdpa", "eager")
    )
)
_REMAPPING = ("remap_positions_for_packed_sequence", "packed_sequence_compatibility_function")


class _Draw:
    """What the cases of one operation and dtype are drawn from."""

    def __init__(
        self,
        dtype: str,
        setting: np.random.Generator,
        contents: np.random.Generator,
        corner: tuple[_Shape, str | None, str | None, str] | None = None,
    ) -> None:
        self.dtype, self.rng, self.contents, self.corner = dtype, setting, contents, corner

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def shape(self, shapes: tuple[_Shape, ...] = _SHAPES) -> _Shape:
        return self.one_of(*shapes)

    def mask(self, batch_size: int, length: int, *dtypes: Any, kind: str | None = None) -> np.ndarray:
        """A 2D mask of ones, with padding on the left, on the right, or in between."""
        position = np.arange(length)
        pads = self.contents.integers(0, length, size=(batch_size, 1))
        kinds = {
            "ones": np.ones((batch_size, length), np.bool_),
            "left": position >= pads,
            "right": position < length - pads,
            "holes": self.contents.random((batch_size, length)) < 0.7,
        }
        return kinds[kind or str(self.contents.choice(list(kinds)))].astype(self.one_of(*(dtypes or (np.bool_,))))

    def mask_dtypes(self) -> list[Any]:
        # JAX has no int64 outside of 64-bit mode.
        return [np.bool_, np.int32, np.float32, *([np.int64] if self.dtype == "float64" else [])]

    def packed_positions(self, batch_size: int, length: int) -> np.ndarray:
        """Positions of sequences packed into rows, or of one in each row."""
        starts = self.contents.random((batch_size, length)) < self.contents.choice([0, 0.4])
        first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        return (np.arange(length) - first).astype(np.int32)

    def blocks(self, batch_size: int, length: int) -> np.ndarray:
        """Ids of blocks, such as images, and -1 for what is in none."""
        ids = np.cumsum(self.contents.random((batch_size, length)) < 0.3, axis=1)
        return np.where(self.contents.random((batch_size, length)) < 0.4, -1, ids).astype(np.int32)

    def segments(self, batch_size: int, length: int) -> np.ndarray:
        return np.cumsum(self.contents.random((batch_size, length)) < 0.3, axis=1).astype(np.int32)

    def plain(self, batch_size: int, length: int) -> OnSide:
        if self.chance(0.1):
            return Table(batch_size, length, int(self.rng.integers(100)))
        return Plain(self.one_of(*PLAIN))

    def function(self, shape: _Shape, name: str | None = None) -> Built:
        """A mask function of ``masking_utils`` that is not made of others, whose arrays reach every key."""
        batch_size, window, end = shape.batch_size, shape.window, shape.end
        left_padding = self.contents.integers(0, 4, size=batch_size).astype(np.int32)
        names: dict[str, Callable[[], tuple[Any, ...] | None]] = {
            "causal_mask_function": lambda: None,
            "bidirectional_mask_function": lambda: None,
            "sliding_window_overlay": lambda: (window,),
            "sliding_window_causal_mask_function": lambda: (window,),
            "sliding_window_bidirectional_overlay": lambda: (window,),
            "sliding_window_bidirectional_mask_function": lambda: (window,),
            "chunked_overlay": lambda: (window, left_padding),
            "chunked_causal_mask_function": lambda: (window, left_padding),
            "blockwise_overlay": lambda: (self.blocks(batch_size, end),),
            "padding_mask_function": lambda: (self.mask(batch_size, end),),
            "packed_sequence_mask_function": lambda: (self.segments(batch_size, end),),
        }
        name = name or str(self.rng.choice(list(names)))
        return Built(name, names[name]())

    def tree(self, shape: _Shape, kind: str | None = None) -> Built:
        """A mask function, or two of them combined, or one at other positions."""
        kind = kind or self.one_of("", "", "and_masks", "or_masks", *_REMAPPING)
        if kind in ("and_masks", "or_masks"):
            return Built(kind, (self.function(shape), Built("causal_mask_function")))
        if kind in _REMAPPING:
            positions = self.packed_positions(shape.batch_size, shape.end)
            segments = (self.segments(shape.batch_size, shape.end),) if kind == _REMAPPING[1] else ()
            return Built(kind, (self.function(shape), positions, *segments))
        return self.function(shape, kind)

    def cache(self, shape: _Shape, kind: str | None = None) -> Cache:
        kind = kind or str(self.one_of("dynamic", "static", "layers", "mtp"))
        full, sliding = "full_attention", "sliding_attention"
        kinds: dict[str, list[tuple[str, ...]]] = {
            "mtp": [(full, full)],
            "layers": [(sliding, "dummy", full), ("linear_attention", full), ("dummy", sliding, full)],
        }
        return Cache(
            kind,
            self.one_of(*kinds.get(kind, [(full,), (sliding,), (sliding, full), (full, sliding)])),
            sliding_window=max(shape.window, 2),
            seen=shape.past,
            query_length=shape.query_length,
            room=self.one_of(0, 3),
            stand_in=self.one_of(None, "ints", "arrays"),
        )


def _grid(draw: _Draw, shape: _Shape) -> dict[str, np.ndarray]:
    """Indices of every pair: the last queries, and all keys."""
    sizes = shape.batch_size, 1, shape.query_length, shape.end
    axes = [np.arange(size).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, size in enumerate(sizes)]
    axes[2] = axes[2] + shape.past
    return dict(
        zip(("batch_idx", "head_idx", "q_idx", "kv_idx"), (axis.astype(np.int32) for axis in axes), strict=True)
    )


def _case(draw: _Draw, operation: str, arguments: dict[str, Any], **more: Any) -> Case:
    config = arguments.get("config")
    is_flex = operation == "flex_attention_mask" or (config is not None and config.implementation == "flex_attention")
    # Of NumPy arrays tiles are found at once, of others they are compiled.
    return Case(operation, draw.dtype, arguments, needs_dtype=False, module="masking_utils", of_numpy=is_flex, **more)


def _function(name: str) -> Callable[[_Draw], Case]:
    """The case of a mask function: read at every pair."""

    def case(draw: _Draw) -> Case:
        shape = draw.shape()
        built = _built(draw, name, shape)
        grid = _grid(draw, shape)
        if built.arguments is None:
            return _case(draw, name, grid, grid=grid)
        return _case(draw, name, {}, positional=built.arguments, grid=grid)

    return case


def _built(draw: _Draw, name: str, shape: _Shape) -> Built:
    if name in ("and_masks", "or_masks"):
        count = int(draw.rng.integers(1, 4))
        parts = [draw.function(shape), draw.plain(shape.batch_size, shape.end), draw.function(shape)]
        return Built(name, tuple(parts[:count]))
    if name == "add_offsets_to_mask_function":
        # Far enough for every key, and no further than arrays reach.
        longer = replace(shape, past=shape.past + 3)
        return Built(name, (draw.function(longer), draw.one_of(0, 2, 3), draw.one_of(0, 1, 3)))
    return draw.tree(shape, name)


def _padding(draw: _Draw) -> Case:
    shape = draw.shape()
    mask = None if draw.chance(0.1) else draw.mask(shape.batch_size, shape.end, *draw.mask_dtypes())
    length = shape.end + draw.one_of(-1, 0, 3)
    arguments = {"attention_mask": mask, "kv_length": max(length, 1), "kv_offset": draw.one_of(0, 2)}
    return _case(draw, "prepare_padding_mask", arguments)


def _padded_blocks(draw: _Draw) -> Case:
    shape = draw.shape()
    arguments = {
        "block_sequence_ids": draw.blocks(shape.batch_size, shape.end),
        "attention_mask": None,
        "kv_length": max(shape.end + draw.one_of(-1, 0, 3), 1),
        "kv_offset": draw.one_of(0, 2),
    }
    return _case(draw, "maybe_pad_block_sequence_ids", arguments)


def _packed_indices(draw: _Draw) -> Case:
    shape = draw.shape()
    positions = draw.packed_positions(shape.batch_size, shape.end) + int(draw.contents.choice([0, 5]))
    return _case(draw, "find_packed_sequence_indices", {"position_ids": positions.astype(np.int32)})


def _first_full(draw: _Draw) -> Case:
    return _case(draw, "find_first_full_attention_index", {"cache": draw.cache(draw.shape())})


def _interface(operation: str) -> Callable[[_Draw], Case]:
    """The case of a function by which an attention implementation gets its mask."""

    def case(draw: _Draw) -> Case:
        flex = operation == "flex_attention_mask"
        shape = draw.shape(_LARGE_SHAPES if flex else _SHAPES)
        kv_offset = 0 if draw.chance(0.7) else min(2, shape.past)
        # Keys to come, in a cache of fixed size, have no place in the arrays of a mask function.
        arguments: dict[str, Any] = {
            "batch_size": shape.batch_size,
            "q_length": shape.query_length,
            "kv_length": shape.end - kv_offset,
            "q_offset": shape.past if draw.chance(0.8) else 0,
            "kv_offset": kv_offset,
            "mask_function": draw.tree(shape),
        }
        if draw.chance(0.15):
            arguments["mask_function"], arguments["use_vmap"] = draw.plain(shape.batch_size, shape.end), True
        elif draw.chance(0.2):
            del arguments["mask_function"]
            arguments["kv_length"] += 3
        if draw.chance(0.7):
            length = max(shape.end + draw.one_of(-1, 0, 3), 1)
            arguments["attention_mask"] = draw.mask(shape.batch_size, length)
        if operation in ("sdpa_mask", "eager_mask") and draw.chance(0.5):
            arguments["local_size"] = shape.window
            arguments["allow_is_bidirectional_skip"] = draw.chance(0.5)
            arguments["allow_is_causal_skip"] = draw.chance(0.5)
        return replace(_case(draw, operation, arguments), needs_dtype=operation == "eager_mask")

    return case


def _inputs(draw: _Draw, causal: bool) -> tuple[_Shape, dict[str, Any]]:
    """What the ``create_`` functions share: with a cache or without, with a mask of 2 or 4 dimensions or without."""
    if draw.corner is not None:
        shape, source, padding, implementation = draw.corner
        cache = draw.cache(shape, source) if source in ("dynamic", "static") else None
        is_causal = draw.one_of(None, True)
    else:
        shape, source, padding = draw.shape(), draw.one_of(None, "elsewhere"), draw.one_of(None, "any", "any", "4D")
        cache = draw.cache(shape) if draw.chance(0.5) else None
        is_causal = draw.one_of(None, None, True, False)
        implementation = str(draw.rng.choice(IMPLEMENTATIONS, p=[0.44, 0.3, 0.1, 0.1, 0.06]))
    length = shape.query_length if cache is None else shape.end
    inputs: dict[str, Any] = {
        "config": Config(
            implementation=implementation,
            is_causal=is_causal,
            sliding_window=None if draw.chance(0.03) else shape.window,
            attention_chunk_size=None if draw.chance(0.03) else shape.window,
        ),
        "inputs_embeds": Embeds(shape.batch_size, shape.query_length),
        "attention_mask": None,
        "past_key_values": cache,
    }
    if cache is None and source == "elsewhere":
        # Keys that are not those of the queries: of an encoder, or of the virtual tokens of prefix tuning.
        length += 2
        if not causal:
            inputs["encoder_hidden_states"] = Embeds(shape.batch_size, length)
    if padding == "4D":
        sizes = shape.batch_size, 1, shape.query_length, length
        inputs["attention_mask"] = (draw.contents.random(sizes) < 0.5).astype(draw.one_of(*draw.mask_dtypes()))
    elif padding is not None:
        kind = None if padding == "any" else padding
        inputs["attention_mask"] = draw.mask(shape.batch_size, length, *draw.mask_dtypes(), kind=kind)
    return shape, inputs


def _overlays(draw: _Draw, shape: _Shape, causal: bool) -> dict[str, Any]:
    """Functions that allow more or less and, for causal masks, packed rows and blocks."""
    more: dict[str, Any] = {}
    if draw.chance(0.25):
        more["allow_is_causal_skip" if causal else "allow_is_bidirectional_skip"] = False
    if causal and draw.chance(0.5):
        more["position_ids"] = draw.packed_positions(draw.one_of(1, shape.batch_size), shape.query_length)
    if draw.corner is not None:
        return more
    # As far as any query or key of the case: those of a static cache and of prefix tuning included.
    reach = shape.end + 8
    if draw.chance(0.25):
        more["or_mask_function"] = draw.plain(shape.batch_size, reach)
    if draw.chance(0.25):
        more["and_mask_function"] = draw.plain(shape.batch_size, reach)
    if causal and draw.chance(0.3):
        more["block_sequence_ids"] = draw.blocks(shape.batch_size, shape.end)
    return more


def _create(operation: str, causal: bool) -> Callable[[_Draw], Case]:
    """The case of a function that makes the mask of a model's inputs."""

    def case(draw: _Draw) -> Case:
        shape, inputs = _inputs(draw, causal)
        more = _overlays(draw, shape, causal)
        cache = inputs["past_key_values"]
        if causal and cache is not None and draw.chance(0.3):
            more["layer_idx"] = len(cache.layer_types) - 1
        return _case(draw, operation, inputs | more)

    return case


def _generate(draw: _Draw) -> Case:
    shape, inputs = _inputs(draw, causal=True)
    layer_types = draw.one_of(
        None,
        None,
        ("full_attention", "sliding_attention"),
        ("chunked_attention", "full_attention", "chunked_attention"),
        ("linear_attention", "indexed_attention"),
        ("hybrid", "sliding_attention"),
        ("hybrid_sliding", "conv", "minimax_m3_sparse"),
        ("compressed_sparse_attention", "heavily_compressed_attention"),
        ("full_attention", "attention of a kind to come"),
    )
    # Without layer types, the first of the two that is there.
    sizes = {
        name: shape.window if layer_types is not None or draw.chance(0.5) else None
        for name in ("sliding_window", "attention_chunk_size")
    }
    inputs["config"] = replace(inputs["config"], layer_types=layer_types, **sizes)
    more = _overlays(draw, shape, causal=True)
    more.pop("allow_is_causal_skip", None)
    return _case(draw, "create_masks_for_generate", inputs | more)


def _recurrent(draw: _Draw) -> Case:
    return _case(draw, "create_recurrent_attention_mask", _inputs(draw, causal=True)[1])


_FUNCTIONS = (
    "and_masks",
    "or_masks",
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_causal_mask_function",
    "sliding_window_bidirectional_overlay",
    "sliding_window_bidirectional_mask_function",
    "chunked_overlay",
    "chunked_causal_mask_function",
    "blockwise_overlay",
    "padding_mask_function",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "packed_sequence_compatibility_function",
    "add_offsets_to_mask_function",
)
_GENERATORS: dict[str, Callable[[_Draw], Case]] = {
    "create_causal_mask": _create("create_causal_mask", causal=True),
    "create_bidirectional_mask": _create("create_bidirectional_mask", causal=False),
    "create_sliding_window_causal_mask": _create("create_sliding_window_causal_mask", causal=True),
    "create_bidirectional_sliding_window_mask": _create("create_bidirectional_sliding_window_mask", causal=False),
    "create_chunked_causal_mask": _create("create_chunked_causal_mask", causal=True),
    "create_masks_for_generate": _generate,
    "create_recurrent_attention_mask": _recurrent,
    "find_packed_sequence_indices": _packed_indices,
    "sdpa_mask": _interface("sdpa_mask"),
    "eager_mask": _interface("eager_mask"),
    "flash_attention_mask": _interface("flash_attention_mask"),
    "flex_attention_mask": _interface("flex_attention_mask"),
    "prepare_padding_mask": _padding,
    "maybe_pad_block_sequence_ids": _padded_blocks,
    "find_first_full_attention_index": _first_full,
    **{name: _function(name) for name in _FUNCTIONS},
}

OPERATIONS = tuple(_GENERATORS)


# In how many ways an operation is called, corners aside. Another way is another compilation; what arrays hold is not.
_SETTINGS = 16


def generate(operation: str, dtype: str, count: int, seed: int) -> Iterator[Case]:
    """``count`` cases of an operation; the same for the same seed."""
    contents = np.random.default_rng(seed)
    if operation == "flex_attention_mask":
        # PyTorch writes block masks out, which takes a hundred times as long as all else.
        count = max(count // 4, min(count, _SETTINGS))
    for number in range(count):
        # Every other case is a corner, which other operations than `create_` do not look at.
        corner = _CORNERS[number // 2 % len(_CORNERS)] if number % 2 else None
        which = number // 2 % (len(_CORNERS) if number % 2 else _SETTINGS)
        setting = np.random.default_rng((seed, OPERATIONS.index(operation), number % 2, which))
        yield _GENERATORS[operation](_Draw(dtype, setting, contents, corner))
