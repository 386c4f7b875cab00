"""Generated calls of what is in ``modeling_attn_mask_utils``.

Shapes come from a small pool, so that cases share compilations. Masks differ in every case.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from transformers import AutoTokenizer

from torch_compat.verify.cases import DTYPES, PADDING, Case, Draw, Embeds, Shape
from torch_compat.verify.sentences import TEXTS
from torch_compat.weights import minilm_folder

_MASK_DTYPES = (np.bool_, np.int32, np.int64, np.float32)
_EVERY_PADDING = (*PADDING, "zero row", "strange")


def _shapes(rng: random.Random) -> list[Shape]:
    """Corners (decoding, no past, a window of one and one wider than the keys), and some at random."""
    corners = [(1, 1, 0, 1), (2, 1, 17, 3), (4, 33, 0, 8), (3, 33, 17, 50), (2, 4, 2, 1), (2, 2, 4, 2)]
    drawn = [(rng.randint(1, 4), rng.randint(2, 33), rng.randint(0, 17), rng.randint(1, 20)) for _ in range(4)]
    return [Shape(*sizes) for sizes in corners + drawn]


@cache
def text_masks() -> tuple[np.ndarray, ...]:
    """The int64 attention masks of real texts, padded on the left and on the right by MiniLM's own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    return tuple(
        tokenizer(list(texts), padding=True, padding_side=side, return_tensors="np")["attention_mask"]
        for side in ("left", "right")
        for texts in (TEXTS[:2], TEXTS[2:5], TEXTS[4:])
    )


class _Draw(Draw):
    """Draws from the shapes of this module."""

    shapes: list[Shape]

    def shape(self) -> Shape:
        return self.one_of(*self.shapes)

    def window(self, shape: Shape) -> int | None:
        return shape.window if self.chance(0.5) else None

    def padding(self, shape: Shape) -> np.ndarray:
        return self.mask(shape.batch_size, shape.key_length, _MASK_DTYPES, _EVERY_PADDING)

    def padded(self) -> tuple[np.ndarray, int]:
        """A generated mask or that of a real text, and a number of queries that fits it."""
        if self.chance(0.15):
            mask = self.one_of(*text_masks())
            return mask, self.one_of(1, 2, mask.shape[1])
        shape = self.shape()
        return self.padding(shape), shape.query_length


def _to_causal_4d(draw: _Draw) -> Case:
    shape = draw.shape()
    lengths = shape.query_length, shape.key_length
    query_length, key_value_length = reversed(lengths) if draw.chance(0.02) else lengths
    return Case(
        "AttentionMaskConverter.to_causal_4d",
        draw.dtype,
        {"batch_size": shape.batch_size, "query_length": query_length, "key_value_length": key_value_length},
        converter=(not draw.chance(0.05), draw.window(shape)),
    )


def _to_4d(draw: _Draw) -> Case:
    mask, query_length = draw.padded()
    key_value_length = None if draw.chance(0.05) else mask.shape[1]
    if draw.chance(0.02) and query_length > 1:
        key_value_length = mask.shape[1] + 1
    window = draw.window(draw.shape()) if draw.chance(0.8) else 0 if draw.chance(0.1) else None
    return Case(
        "AttentionMaskConverter.to_4d",
        draw.dtype,
        {"attention_mask_2d": mask, "query_length": query_length, "key_value_length": key_value_length},
        converter=(draw.chance(0.8), window),
    )


def _causal(operation: str, shape_name: str) -> Callable[[_Draw], Case]:
    """The case of a function that makes a causal mask from lengths."""

    def case(draw: _Draw) -> Case:
        shape = draw.shape()
        arguments = {
            shape_name: (shape.batch_size, shape.query_length),
            "device": "cpu",
            "past_key_values_length": shape.past,
            "sliding_window": draw.window(shape),
        }
        return Case(operation, draw.dtype, arguments)

    return case


def _expanding(operation: str) -> Callable[[_Draw], Case]:
    """The case of a function that makes a 4D mask from a 2D one."""

    def case(draw: _Draw) -> Case:
        mask, query_length = draw.padded()
        tgt_len = None if draw.chance(0.3) else query_length
        return Case(operation, draw.dtype, {"mask": mask, "tgt_len": tgt_len})

    return case


def _unmask_unattended(draw: _Draw) -> Case:
    shape = draw.shape()
    minimum = float(ml_dtypes.finfo(DTYPES[draw.dtype]).min)
    allowed = draw.mask_4d(shape.batch_size, shape.query_length, shape.key_length) != 0
    allowed[0, :, 0] = False
    bias = np.where(allowed, 0, np.array(minimum, DTYPES[draw.dtype])).astype(DTYPES[draw.dtype])
    if draw.chance(0.1):
        bias = allowed
    if draw.chance(0.3):
        bias = bias[:, 0]
    arguments = {"expanded_mask": bias, "min_dtype": minimum}
    return Case("AttentionMaskConverter._unmask_unattended", draw.dtype, arguments, needs_dtype=False)


def _inputs(draw: _Draw) -> tuple[dict[str, Any], Shape]:
    """The arguments that the functions over a model's inputs share: no mask, a 2D one, or a 4D one."""
    shape = draw.shape()
    mask = None if draw.chance(0.2) else draw.padding(shape)
    if draw.chance(0.25):
        mask = draw.mask_4d(shape.batch_size, shape.query_length, shape.key_length)
    return {
        "attention_mask": mask,
        "inputs_embeds": Embeds(shape.batch_size, shape.query_length),
        "past_key_values_length": shape.past,
        "sliding_window": draw.window(shape),
    }, shape


def _ignore_causal_mask_sdpa(draw: _Draw) -> Case:
    arguments = _inputs(draw)[0] | {"is_training": draw.chance(0.5)}
    return Case("AttentionMaskConverter._ignore_causal_mask_sdpa", draw.dtype, arguments, needs_dtype=False)


def _prepare_4d_causal(operation: str) -> Callable[[_Draw], Case]:
    """The case of a function over a model's inputs."""

    def case(draw: _Draw) -> Case:
        arguments, shape = _inputs(draw)
        arguments["input_shape"] = (shape.batch_size, shape.query_length)
        mask, unanswered = arguments["attention_mask"], ()
        if mask is not None and mask.ndim == 4 and not operation.endswith("for_sdpa"):
            if mask.dtype == np.bool_:
                unanswered = ("transformers",)
            if mask.shape[3] > 1 and draw.chance(0.05):
                arguments["attention_mask"], unanswered = mask[:, :, :, :-1], ()
        return Case(operation, draw.dtype, arguments, needs_dtype=False, unanswered=unanswered)

    return case


_GENERATORS: dict[str, Callable[[_Draw], Case]] = {
    "to_causal_4d": _to_causal_4d,
    "to_4d": _to_4d,
    "make_causal_mask": _causal("AttentionMaskConverter._make_causal_mask", "input_ids_shape"),
    "expand_mask": _expanding("AttentionMaskConverter._expand_mask"),
    "unmask_unattended": _unmask_unattended,
    "ignore_causal_mask_sdpa": _ignore_causal_mask_sdpa,
    "create_4d_causal_attention_mask": _causal("_create_4d_causal_attention_mask", "input_shape"),
    "prepare_4d_causal_attention_mask": _prepare_4d_causal("_prepare_4d_causal_attention_mask"),
    "prepare_4d_causal_attention_mask_for_sdpa": _prepare_4d_causal("_prepare_4d_causal_attention_mask_for_sdpa"),
    "prepare_4d_attention_mask": _expanding("_prepare_4d_attention_mask"),
    "prepare_4d_attention_mask_for_sdpa": _expanding("_prepare_4d_attention_mask_for_sdpa"),
}

OPERATIONS = tuple(_GENERATORS)


def generate(operation: str, dtype: str, count: int, seed: int) -> Iterator[Case]:
    """``count`` cases of an operation, by its public name in jaxmask. The same seed makes the same cases."""
    rng = np.random.default_rng(seed)
    draw = _Draw(dtype, rng, rng)
    draw.shapes = _shapes(random.Random(seed))
    for _ in range(count):
        yield _GENERATORS[operation](draw)
