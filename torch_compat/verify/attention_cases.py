"""Generated calls of attention: arrays, a mask, and the same mask written again as a ``mask_mod`` of PyTorch.

To compile a program takes longer than to run all of its cases, so the cases of a program differ in values alone. Kinds
of masks and of arguments are dealt like cards: every kind of mask occurs, and every kind of argument in every dtype.
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.extend.random import threefry_2x32
from jaxtyping import Float, UInt32

from jaxmask import (
    Causal,
    Chunked,
    Dense,
    Full,
    Mask,
    Padding,
    PerHead,
    Predicate,
    Prefix,
    Segments,
    SlidingWindow,
    Window,
)
from torch_compat.verify.cases import DTYPES, Draw

# Takes tensors that broadcast: example, head, position of the query, position of the key.
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BATCH, HEADS, DIM = 2, 4, 16
DROPOUT_RATE = 0.25
# The number of programs for each dtype.
PROGRAMS = 3


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one call of :func:`jaxmask.attention`, as NumPy arrays in its dtype.

    Args:
        masks: the kinds of masks that ``mask`` is made of.
        mask_mod: the same as ``mask``, in PyTorch.
        first: the position of the first query of each example, which is ``offset`` where that is given.
        cotangent: the gradient of a loss with respect to the output.
        dropout_key: the words of a key, where weights are dropped.
    """

    dtype: str
    masks: tuple[str, ...]
    mask: Mask
    mask_mod: MaskMod
    query: Float[np.ndarray, "batch q heads dim"]
    key: Float[np.ndarray, "batch kv kv_heads dim"]
    value: Float[np.ndarray, "batch kv kv_heads dim_v"]
    cotangent: Float[np.ndarray, "batch q heads dim_v"]
    bias: Float[np.ndarray, "..."] | None
    scale: float | None
    first: tuple[int, ...]
    offset: np.ndarray | None
    logits_soft_cap: float | None
    sinks: Float[np.ndarray, "heads"] | None
    dropout_key: UInt32[np.ndarray, "2"] | None

    # Attention is expected to be near PyTorch's, never to differ in a known way.
    known_difference = False

    @property
    def unanswered(self) -> tuple[str, ...]:
        """The oracles that cannot do this: neither has sinks or a given dropout, and SDPA has no cap of the scores."""
        if self.sinks is not None or self.dropout_key is not None:
            return "sdpa", "flex_attention"
        return () if self.logits_soft_cap is None else ("sdpa",)

    def allowed(self) -> torch.Tensor:
        """Which pairs may attend, by ``mask_mod``: bool ``[batch, heads, q, kv]``."""
        (batch, query_length, heads, _), key_length = self.query.shape, self.key.shape[1]
        b, h, kv = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1), torch.arange(key_length)
        q = torch.tensor(self.first).view(-1, 1, 1, 1) + torch.arange(query_length)[:, None]
        return self.mask_mod(b, h, q, kv).expand(batch, heads, query_length, key_length)

    def dropout(self) -> torch.Tensor | float:
        """What each weight is multiplied by, ``[batch, heads, q, kv]``, pair by pair from JAX's own generator."""
        if self.dropout_key is None:
            return 1.0
        sizes = *self.query.shape[:3:2], self.query.shape[1], self.key.shape[1]
        words = np.asarray(jax.random.bits(jnp.asarray(self.dropout_key), (2,), jnp.uint32))
        pairs = np.concatenate([x.astype(np.uint32).ravel() for x in np.indices(sizes[2:])])
        bits = np.empty(sizes, np.uint32)
        for b, h in np.ndindex(*sizes[:2]):
            of_head = threefry_2x32(threefry_2x32(words, np.array([b, h], np.uint32)), pairs)
            bits[b, h] = np.asarray(of_head)[: bits[b, h].size].reshape(sizes[2:])
        return torch.from_numpy(np.where(bits < round(DROPOUT_RATE * 2**32), 0, 1 / (1 - DROPOUT_RATE)))

    def describe(self) -> str:
        """The call in words. The same seed makes it again, with its arrays."""
        bias = None if self.bias is None else list(self.bias.shape)
        return (
            f"attention of {list(self.query.shape)} to {list(self.key.shape)}, values {list(self.value.shape)}, in "
            f"{self.dtype}, first positions {list(self.first)}, scale {self.scale}, cap {self.logits_soft_cap}, bias "
            f"{bias}, sinks {self.sinks is not None}, dropout {self.dropout_key}, mask {self.mask!r}"
        )


@dataclass(frozen=True)
class _Program:
    """What the calls of one compilation share: shapes, structure, and Python numbers."""

    lengths: tuple[int, int]
    starts: tuple[int, ...] | None
    kv_heads: int
    value_dim: int
    scale: float | None
    logits_soft_cap: float | None
    bias: tuple[bool, ...] | None
    has_sinks: bool
    has_dropout: bool
    masks: tuple[str, ...]
    negated: tuple[bool, ...]
    joined: tuple[Callable[[Any, Any], Any], ...]


def _chunked(draw: Draw, keys: int) -> tuple[Mask, MaskMod]:
    start = draw.ints(0, 8, BATCH)
    starts = torch.from_numpy(start)
    return Chunked(8, start), lambda b, h, q, kv: (q - starts[b]) // 8 == (kv - starts[b]) // 8


def _window(draw: Draw, keys: int) -> tuple[Mask, MaskMod]:
    left, right = draw.ints(0, 12), draw.ints(0, 12)
    return Window(left, right), lambda b, h, q, kv: (kv >= q - int(left)) & (kv <= q + int(right))


def _prefix(draw: Draw, keys: int) -> tuple[Mask, MaskMod]:
    length = draw.ints(0, keys + 1, BATCH)
    lengths = torch.from_numpy(length)
    return Prefix(length), lambda b, h, q, kv: kv < lengths[b]


def _padding(draw: Draw, keys: int) -> tuple[Mask, MaskMod]:
    """Padding on the left or on the right. Sometimes one example is all padding."""
    valid = draw.mask(BATCH, keys, kinds=("left", "right"))
    valid[0] &= draw.contents.random() < 0.7
    table = torch.from_numpy(valid)
    return Padding(valid), lambda b, h, q, kv: table[b, kv]


def _segments(draw: Draw, keys: int) -> tuple[Mask, MaskMod]:
    """Consecutive documents."""
    ids = (draw.contents.random((BATCH, keys)) < 0.1).cumsum(1, dtype=np.int32)
    table = torch.from_numpy(ids)
    return Segments(ids), lambda b, h, q, kv: table[b, q] == table[b, kv]


def _dense(draw: Draw, keys: int) -> tuple[Mask, MaskMod]:
    allowed = draw.contents.random((1, HEADS, keys, keys)) < 0.4
    table = torch.from_numpy(allowed)
    return Dense(allowed), lambda b, h, q, kv: table[0, h, q, kv]


def _strided(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (q - kv) % 3 == 0


def _is_in_heads(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return (h == 2) | ((h == 3) & ((q - kv).abs() <= 3)) | ((h < 2) & (kv <= q) & ((h == 0) | (kv > q - 5)))


MASKS: dict[str, Callable[[Draw, int], tuple[Mask, MaskMod]]] = {
    "causal": lambda draw, keys: (Causal(), lambda b, h, q, kv: kv <= q),
    "sliding window": lambda draw, keys: (SlidingWindow(9), lambda b, h, q, kv: (kv <= q) & (kv > q - 9)),
    "window": _window,
    "chunked": _chunked,
    "prefix": _prefix,
    "padding": _padding,
    "segments": _segments,
    "per head": lambda draw, keys: (PerHead([Causal(), SlidingWindow(5), Full(), Window(3, 3)]), _is_in_heads),
    "dense": _dense,
    "predicate": lambda draw, keys: (Predicate(_strided), _strided),
}


def _programs(seed: int) -> dict[str, list[_Program]]:
    """The programs of each dtype, with one to three masks each."""
    rng = random.Random(seed)
    deck = [name for _ in range(3) for name in rng.sample(list(MASKS), len(MASKS))]
    return {dtype: _programs_of_dtype(rng, deck) for dtype in DTYPES}


def _programs_of_dtype(rng: random.Random, deck: list[str]) -> list[_Program]:
    def dealt(*cards: Any) -> list[Any]:
        return rng.sample(cards, PROGRAMS)

    # Lengths, and the position of the first query of each example where it is not 0.
    longer, decode = ((19, 43), rng.choice([(24, 24), (24, 20)])), ((1, 43), (42, 30))
    places = dealt(((43, 43), None), longer, rng.choice([longer, decode]))
    kv_heads, value_dims = dealt(HEADS, 2, 1), dealt(DIM, 8, 24)
    scales, caps = dealt(None, None, 0.1), dealt(None, None, 2.0)
    # Which of the axes [batch, heads, q, kv] a bias has; the others are 1.
    biases = dealt(None, (True, True, True, True), rng.choice([(False, True, False, True), (True, False, True, True)]))
    sinks, dropout = dealt(False, False, True), dealt(False, False, True)
    hands = dealt(*([deck.pop() for _ in range(count)] for count in (1, 2, 3)))
    return [
        _Program(
            *places[i],
            kv_heads=kv_heads[i],
            value_dim=value_dims[i],
            scale=scales[i],
            logits_soft_cap=caps[i],
            bias=biases[i],
            has_sinks=sinks[i],
            has_dropout=dropout[i],
            masks=tuple(hands[i]),
            negated=tuple(rng.random() < 0.25 for _ in hands[i]),
            joined=tuple(rng.choice([operator.and_, operator.or_]) for _ in hands[i][1:]),
        )
        for i in range(PROGRAMS)
    ]


def _call(program: _Program, dtype: str, rng: np.random.Generator) -> AttentionCall:
    draw = Draw(dtype, rng, rng)
    query_length, key_length = program.lengths
    parts = [MASKS[name](draw, key_length) for name in program.masks]
    for i, (mask, mask_mod) in enumerate(parts):
        if program.negated[i]:
            parts[i] = ~mask, partial(_not, mask_mod)
    mask, mask_mod = parts[0]
    for join, (other, other_mod) in zip(program.joined, parts[1:], strict=True):
        mask, mask_mod = join(mask, other), partial(_joined, join, mask_mod, other_mod)
    sizes = BATCH, HEADS, query_length, key_length
    return AttentionCall(
        dtype,
        program.masks,
        mask,
        mask_mod,
        query=draw.floats(BATCH, query_length, HEADS, DIM),
        key=draw.floats(BATCH, key_length, program.kv_heads, DIM),
        value=draw.floats(BATCH, key_length, program.kv_heads, program.value_dim),
        cotangent=draw.floats(BATCH, query_length, HEADS, program.value_dim),
        bias=None
        if program.bias is None
        else draw.floats(*(size if has_axis else 1 for size, has_axis in zip(sizes, program.bias, strict=True))),
        scale=program.scale,
        first=program.starts or (0,) * BATCH,
        offset=None if program.starts is None else np.array(program.starts, np.int32),
        logits_soft_cap=program.logits_soft_cap,
        sinks=draw.floats(HEADS) if program.has_sinks else None,
        dropout_key=rng.integers(0, 2**32, 2, np.uint32) if program.has_dropout else None,
    )


def _not(mask_mod: MaskMod, *pair: Any) -> Any:
    return ~mask_mod(*pair)


def _joined(join: Callable[[Any, Any], Any], one: MaskMod, other: MaskMod, *pair: Any) -> Any:
    return join(one(*pair), other(*pair))


@lru_cache
def generate(dtype: str, count: int, seed: int) -> tuple[AttentionCall, ...]:
    """``count`` calls, of one program after the other. The same seed makes the same calls."""
    rng = np.random.default_rng([seed, list(DTYPES).index(dtype)])
    programs = _programs(seed)[dtype]
    return tuple(_call(programs[i % PROGRAMS], dtype, rng) for i in range(count))


# More keys than the blocked kernel takes at once when it chooses its tiles.
LONG = 1500


def _long_documents() -> tuple[Mask, MaskMod]:
    """The ids are arguments of the program, so that it makes its own lists of tiles."""
    ids = np.searchsorted([100, 400, 1350], np.arange(LONG)[None], side="right").astype(np.int32)
    table = torch.from_numpy(ids)
    return Causal() & Segments(ids), lambda b, h, q, kv: (kv <= q) & (table[b, q] == table[b, kv])


# One for each dtype, since each is a compilation. The kernel takes a window of 700 at once.
_LONG_MASKS: dict[str, Callable[[], tuple[Mask, MaskMod]]] = {
    "float32": lambda: (Causal(), lambda b, h, q, kv: kv <= q),
    "float16": lambda: (SlidingWindow(700), lambda b, h, q, kv: (kv <= q) & (kv > q - 700)),
    "bfloat16": _long_documents,
    "float64": lambda: (Causal(), lambda b, h, q, kv: kv <= q),
}


@lru_cache
def generate_long(dtype: str, seed: int) -> tuple[AttentionCall, ...]:
    """A call with as many keys as the rule for tiles is made for: one example, two heads that share keys."""
    rng = np.random.default_rng([seed, list(DTYPES).index(dtype), LONG])
    mask, mask_mod = _LONG_MASKS[dtype]()
    query, key, value, cotangent = (
        rng.standard_normal((1, LONG, heads, DIM)).astype(DTYPES[dtype]) for heads in (2, 1, 1, 2)
    )
    nothing: Any = dict.fromkeys(("bias", "scale", "offset", "logits_soft_cap", "sinks", "dropout_key"))
    return (AttentionCall(dtype, ("long",), mask, mask_mod, query, key, value, cotangent, first=(0,), **nothing),)
