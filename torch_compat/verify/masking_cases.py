"""Generated calls of what is in Transformers' ``masking_utils``."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import masking_utils

from torch_compat.verify.cases import PADDING, Case, Draw, Embeds, OnSide, Shape
from torch_compat.verify.masking_arguments import PLAIN, Built, Cache, Config, Plain, Table

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flex_attention", "another backend")
# The name that the installed Transformers has for a cache: another since 5.24.
CACHE = next(
    name
    for name in inspect.signature(masking_utils.create_causal_mask).parameters
    if name in ("cache", "past_key_values")
)
# In Transformers before 5.24, which jaxmask follows, blocks reach from one packed document into another.
BLOCKS_LEAK = hasattr(masking_utils, "packed_sequence_compatibility_function")

# Decoding and prefill, with and without a past, windows that are shorter and longer than the keys. They are few, since
# each is another compilation. What the masks hold differs in every case.
_DECODE, _PREFILL = Shape(2, 1, 6, 4), Shape(2, 5, 0, 3)
_SHAPES = (_DECODE, _PREFILL, Shape(1, 4, 5, 20), Shape(3, 2, 3, 4))
# For tiles of 128 by 128: whole, ragged, several.
_LARGE_SHAPES = (Shape(1, 256, 0, 100), Shape(2, 130, 10, 40), Shape(2, 1, 270, 300))

# Shape, source of the keys, padding and implementation, where a mask can be left out and where it nearly can.
_CORNERS = tuple(
    itertools.product(
        (_DECODE, _PREFILL), (None, "dynamic", "static", "elsewhere"), (None, "ones", "left"), ("sdpa", "eager")
    )
)
_REMAPPING = ("remap_positions_for_packed_sequence", "packed_sequence_compatibility_function")


class MaskingDraw(Draw):
    """Draws of mask functions and caches, and of what they need."""

    corner: tuple[Shape, str | None, str | None, str] | None = None

    def shape(self, shapes: tuple[Shape, ...] = _SHAPES) -> Shape:
        """The sizes of a call."""
        return self.one_of(*shapes)

    def packed_positions(self, batch_size: int, length: int) -> np.ndarray:
        """Positions of sequences packed into rows, or of one sequence in each row."""
        starts = self.contents.random((batch_size, length)) < self.contents.choice([0, 0.4])
        first = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        return (np.arange(length) - first).astype(np.int32)

    def segments(self, batch_size: int, length: int) -> np.ndarray:
        """Ids of consecutive segments."""
        return np.cumsum(self.contents.random((batch_size, length)) < 0.3, axis=1).astype(np.int32)

    def blocks(self, batch_size: int, length: int) -> np.ndarray:
        """Ids of blocks, such as images, and -1 for tokens in no block."""
        ids = self.segments(batch_size, length)
        return np.where(self.contents.random((batch_size, length)) < 0.4, np.int32(-1), ids)

    def plain(self, batch_size: int, length: int) -> OnSide:
        """A user's own function."""
        if self.chance(0.1):
            return Table(batch_size, length, int(self.setting.integers(100)))
        return Plain(self.one_of(*PLAIN))

    def function(self, shape: Shape, name: str | None = None) -> Built:
        """A mask function of ``masking_utils`` that is not made of others, whose arrays reach every key."""
        name = name or str(self.one_of(*_SIMPLE))
        return Built(name, _SIMPLE[name](self, shape))

    def tree(self, shape: Shape, kind: str | None = None) -> Built:
        """A mask function, two of them combined, or one at other positions."""
        kind = kind or self.one_of("", "", "and_masks", "or_masks", *_REMAPPING)
        if kind in ("and_masks", "or_masks"):
            return Built(kind, (self.function(shape), Built("causal_mask_function")))
        if kind in _REMAPPING:
            positions = self.packed_positions(shape.batch_size, shape.key_length)
            segments = (self.segments(shape.batch_size, shape.key_length),) if kind == _REMAPPING[1] else ()
            return Built(kind, (self.function(shape), positions, *segments))
        return self.function(shape, kind)

    def cache(self, shape: Shape, kind: str | None = None) -> Cache:
        """A cache of any kind."""
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


def _window(draw: MaskingDraw, shape: Shape) -> tuple[Any, ...]:
    return (shape.window,)


def _chunk(draw: MaskingDraw, shape: Shape) -> tuple[Any, ...]:
    return shape.window, draw.ints(0, 4, shape.batch_size)


# Mask functions that are not made of others, and what they are called with. None: they are called for pairs at once.
_SIMPLE: dict[str, Callable[[MaskingDraw, Shape], tuple[Any, ...] | None]] = {
    "causal_mask_function": lambda draw, shape: None,
    "bidirectional_mask_function": lambda draw, shape: None,
    "sliding_window_overlay": _window,
    "sliding_window_causal_mask_function": _window,
    "sliding_window_bidirectional_overlay": _window,
    "sliding_window_bidirectional_mask_function": _window,
    "chunked_overlay": _chunk,
    "chunked_causal_mask_function": _chunk,
    "blockwise_overlay": lambda draw, shape: (draw.blocks(shape.batch_size, shape.key_length),),
    "padding_mask_function": lambda draw, shape: (draw.mask(shape.batch_size, shape.key_length),),
    "packed_sequence_mask_function": lambda draw, shape: (draw.segments(shape.batch_size, shape.key_length),),
}


def _grid(draw: MaskingDraw, shape: Shape) -> dict[str, np.ndarray]:
    """The indices of the last queries and of all keys."""
    sizes = shape.batch_size, 1, shape.query_length, shape.key_length
    axes = [np.arange(size).reshape([-1 if i == axis else 1 for i in range(4)]) for axis, size in enumerate(sizes)]
    axes[2] = axes[2] + shape.past
    return dict(
        zip(("batch_idx", "head_idx", "q_idx", "kv_idx"), (axis.astype(np.int32) for axis in axes), strict=True)
    )


def _case(draw: MaskingDraw, operation: str, arguments: dict[str, Any], **more: Any) -> Case:
    config = arguments.get("config")
    is_flex = operation == "flex_attention_mask" or (config is not None and config.implementation == "flex_attention")
    return Case(
        operation,
        draw.dtype,
        arguments,
        needs_dtype=False,
        known_difference=BLOCKS_LEAK and _has_blocks_in_packed_rows(arguments),
        module="masking_utils",
        # NumPy finds the tiles of its own arrays at once. For JAX arrays they are compiled.
        is_numpy=is_flex,
        **more,
    )


def _has_blocks_in_packed_rows(arguments: dict[str, Any]) -> bool:
    positions, blocks = arguments.get("position_ids"), arguments.get("block_sequence_ids")
    if positions is None or blocks is None or not (arguments["attention_mask"] is None is arguments[CACHE]):
        return False
    return bool((np.diff(positions, axis=1) != 1).any()) and arguments["config"].implementation != "another backend"


def _function(name: str) -> Callable[[MaskingDraw], Case]:
    """The case of a mask function, which is called for every pair."""

    def case(draw: MaskingDraw) -> Case:
        shape = draw.shape()
        built = _built(draw, name, shape)
        grid = _grid(draw, shape)
        if built.arguments is None:
            return _case(draw, name, grid, grid=grid)
        return _case(draw, name, {}, positional=built.arguments, grid=grid)

    return case


def _built(draw: MaskingDraw, name: str, shape: Shape) -> Built:
    if name in ("and_masks", "or_masks"):
        count = int(draw.setting.integers(1, 4))
        parts = [draw.function(shape), draw.plain(shape.batch_size, shape.key_length), draw.function(shape)]
        return Built(name, tuple(parts[:count]))
    if name == "add_offsets_to_mask_function":
        # Longer arrays, which reach every key with its offset.
        longer = replace(shape, past=shape.past + 3)
        return Built(name, (draw.function(longer), draw.one_of(0, 2, 3), draw.one_of(0, 1, 3)))
    return draw.tree(shape, name)


def _padding(draw: MaskingDraw) -> Case:
    shape = draw.shape()
    mask = None if draw.chance(0.1) else draw.mask(shape.batch_size, shape.key_length, draw.mask_dtypes())
    length = shape.key_length + draw.one_of(-1, 0, 3)
    arguments = {"attention_mask": mask, "kv_length": max(length, 1), "kv_offset": draw.one_of(0, 2)}
    return _case(draw, "prepare_padding_mask", arguments)


def _padded_blocks(draw: MaskingDraw) -> Case:
    shape = draw.shape()
    arguments = {
        "block_sequence_ids": draw.blocks(shape.batch_size, shape.key_length),
        "attention_mask": None,
        "kv_length": max(shape.key_length + draw.one_of(-1, 0, 3), 1),
        "kv_offset": draw.one_of(0, 2),
    }
    return _case(draw, "maybe_pad_block_sequence_ids", arguments)


def _packed_indices(draw: MaskingDraw) -> Case:
    shape = draw.shape()
    positions = draw.packed_positions(shape.batch_size, shape.key_length) + draw.ints(0, 2) * 5
    return _case(draw, "find_packed_sequence_indices", {"position_ids": positions})


def _first_full(draw: MaskingDraw) -> Case:
    return _case(draw, "find_first_full_attention_index", {"cache": draw.cache(draw.shape())})


def _interface(operation: str) -> Callable[[MaskingDraw], Case]:
    """The case of a function by which an attention implementation gets its mask."""

    def case(draw: MaskingDraw) -> Case:
        flex = operation == "flex_attention_mask"
        shape = draw.shape(_LARGE_SHAPES if flex else _SHAPES)
        kv_offset = 0 if draw.chance(0.7) else min(2, shape.past)
        # The arrays of a mask function have no room for the empty slots of a cache of fixed size.
        arguments: dict[str, Any] = {
            "batch_size": shape.batch_size,
            "q_length": shape.query_length,
            "kv_length": shape.key_length - kv_offset,
            "q_offset": shape.past if draw.chance(0.8) else 0,
            "kv_offset": kv_offset,
            "mask_function": draw.tree(shape),
        }
        if draw.chance(0.15):
            arguments["mask_function"], arguments["use_vmap"] = draw.plain(shape.batch_size, shape.key_length), True
        elif draw.chance(0.2):
            del arguments["mask_function"]
            arguments["kv_length"] += 3
        if draw.chance(0.7):
            length = max(shape.key_length + draw.one_of(-1, 0, 3), 1)
            arguments["attention_mask"] = draw.mask(shape.batch_size, length)
        if operation in ("sdpa_mask", "eager_mask") and draw.chance(0.5):
            arguments["local_size"] = shape.window
            arguments["allow_is_bidirectional_skip"] = draw.chance(0.5)
            arguments["allow_is_causal_skip"] = draw.chance(0.5)
        return replace(_case(draw, operation, arguments), needs_dtype=operation == "eager_mask")

    return case


def _inputs(draw: MaskingDraw, causal: bool) -> tuple[Shape, dict[str, Any]]:
    """The arguments that the ``create_`` functions share: with or without a cache, with or without a mask."""
    if draw.corner is not None:
        shape, source, padding, implementation = draw.corner
        cache = draw.cache(shape, source) if source in ("dynamic", "static") else None
        is_causal = draw.one_of(None, True)
    else:
        shape, source, padding = draw.shape(), draw.one_of(None, "elsewhere"), draw.one_of(None, "any", "any", "4D")
        cache = draw.cache(shape) if draw.chance(0.5) else None
        is_causal = draw.one_of(None, None, True, False)
        implementation = str(draw.setting.choice(IMPLEMENTATIONS, p=[0.44, 0.3, 0.1, 0.1, 0.06]))
    length = shape.query_length if cache is None else shape.key_length
    inputs: dict[str, Any] = {
        "config": Config(
            implementation=implementation,
            is_causal=is_causal,
            sliding_window=None if draw.chance(0.03) else shape.window,
            attention_chunk_size=None if draw.chance(0.03) else shape.window,
        ),
        "inputs_embeds": Embeds(shape.batch_size, shape.query_length),
        "attention_mask": None,
        CACHE: cache,
    }
    if cache is None and source == "elsewhere":
        # Keys of an encoder, or of the virtual tokens of prefix tuning.
        length += 2
        if not causal:
            inputs["encoder_hidden_states"] = Embeds(shape.batch_size, length)
    if padding == "4D":
        inputs["attention_mask"] = draw.mask_4d(shape.batch_size, shape.query_length, length)
    elif padding is not None:
        kinds = PADDING if padding == "any" else (padding,)
        inputs["attention_mask"] = draw.mask(shape.batch_size, length, draw.mask_dtypes(), kinds)
    return shape, inputs


def _overlays(draw: MaskingDraw, shape: Shape, causal: bool) -> dict[str, Any]:
    """Functions that allow more or less and, for causal masks, packed rows and blocks."""
    more: dict[str, Any] = {}
    if draw.chance(0.25):
        more["allow_is_causal_skip" if causal else "allow_is_bidirectional_skip"] = False
    if causal and draw.chance(0.5):
        more["position_ids"] = draw.packed_positions(draw.one_of(1, shape.batch_size), shape.query_length)
    if draw.corner is not None:
        return more
    # As far as any query or key of the case, those of a static cache and of prefix tuning included.
    reach = shape.key_length + 8
    if draw.chance(0.25):
        more["or_mask_function"] = draw.plain(shape.batch_size, reach)
    if draw.chance(0.25):
        more["and_mask_function"] = draw.plain(shape.batch_size, reach)
    if causal and draw.chance(0.3):
        more["block_sequence_ids"] = draw.blocks(shape.batch_size, shape.key_length)
    return more


def _create(operation: str, causal: bool) -> Callable[[MaskingDraw], Case]:
    """The case of a function that makes the mask of a model's inputs."""

    def case(draw: MaskingDraw) -> Case:
        shape, inputs = _inputs(draw, causal)
        more = _overlays(draw, shape, causal)
        cache = inputs[CACHE]
        if causal and cache is not None and draw.chance(0.3):
            more["layer_idx"] = len(cache.layer_types) - 1
        return _case(draw, operation, inputs | more)

    return case


def _generate(draw: MaskingDraw) -> Case:
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
    # Without layer types, the first of the two that is not None decides.
    sizes = {
        name: shape.window if layer_types is not None or draw.chance(0.5) else None
        for name in ("sliding_window", "attention_chunk_size")
    }
    inputs["config"] = replace(inputs["config"], layer_types=layer_types, **sizes)
    more = _overlays(draw, shape, causal=True)
    more.pop("allow_is_causal_skip", None)
    return _case(draw, "create_masks_for_generate", inputs | more)


def _recurrent(draw: MaskingDraw) -> Case:
    return _case(draw, "create_recurrent_attention_mask", _inputs(draw, causal=True)[1])


_FUNCTIONS = (*_SIMPLE, "and_masks", "or_masks", *_REMAPPING, "add_offsets_to_mask_function")
_CREATE = {  # whether they are causal
    "create_causal_mask": True,
    "create_bidirectional_mask": False,
    "create_sliding_window_causal_mask": True,
    "create_bidirectional_sliding_window_mask": False,
    "create_chunked_causal_mask": True,
}
_INTERFACES = ("sdpa_mask", "eager_mask", "flash_attention_mask", "flex_attention_mask")
_GENERATORS: dict[str, Callable[[MaskingDraw], Case]] = {
    **{name: _create(name, causal) for name, causal in _CREATE.items()},
    "create_masks_for_generate": _generate,
    "create_recurrent_attention_mask": _recurrent,
    "find_packed_sequence_indices": _packed_indices,
    **{name: _interface(name) for name in _INTERFACES},
    "prepare_padding_mask": _padding,
    "maybe_pad_block_sequence_ids": _padded_blocks,
    "find_first_full_attention_index": _first_full,
    **{name: _function(name) for name in _FUNCTIONS},
}

OPERATIONS = tuple(_GENERATORS)


# The number of ways in which an operation is called, corners aside. Each is a compilation; what arrays hold is not.
_SETTINGS = 16


def generate(operation: str, dtype: str, count: int, seed: int) -> Iterator[Case]:
    """``count`` cases of an operation. The same seed makes the same cases."""
    contents = np.random.default_rng(seed)
    if operation == "flex_attention_mask":
        # PyTorch writes block masks out, which takes a hundred times as long as all the rest.
        count = max(count // 4, min(count, _SETTINGS))
    for number in range(count):
        # Every other case is a corner. Only the `create_` functions look at it.
        corner = _CORNERS[number // 2 % len(_CORNERS)] if number % 2 else None
        which = number // 2 % (len(_CORNERS) if number % 2 else _SETTINGS)
        setting = np.random.default_rng((seed, OPERATIONS.index(operation), number % 2, which))
        draw = MaskingDraw(dtype, setting, contents)
        draw.corner = corner
        yield _GENERATORS[operation](draw)
