"""Arguments of the functions in ``masking_utils``: a configuration, a cache that has seen tokens, a mask function.

Each is a description, from which either side makes its own object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache, Gemma2Config, StaticCache, cache_utils

from torch_compat.verify.cases import OnSide, Side


@dataclass(frozen=True)
class Config(OnSide):
    """A model's configuration. Attributes that are ``None`` are missing from it."""

    implementation: str = "sdpa"
    is_causal: bool | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: tuple[str, ...] | None = None

    def on(self, side: Side) -> Any:
        config = SimpleNamespace(_attn_implementation=self.implementation)
        for name in ("is_causal", "sliding_window", "attention_chunk_size", "layer_types"):
            if getattr(self, name) is not None:
                setattr(config, name, getattr(self, name))
        if side.is_torch:
            config.get_text_config = lambda: config
        return config


@dataclass(frozen=True)
class Cache(OnSide):
    """A cache with layers of these types that has seen ``seen`` tokens, in two steps.

    JAX gets the cache of Transformers itself, or a stand-in with the same answers in ints or arrays.
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
    """A cache that answers and stores nothing."""

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
    """A mask function in ``masking_utils``, by name: what it returns for ``arguments``, or the function itself."""

    name: str
    arguments: tuple[Any, ...] | None = None

    def on(self, side: Side) -> Any:
        function = getattr(side.masking_utils, self.name)
        return function if self.arguments is None else function(*map(side.value, self.arguments))


@dataclass(frozen=True)
class Plain(OnSide):
    """A function of four integers that a user could write for either framework."""

    name: str

    def on(self, side: Side) -> Any:
        return PLAIN[self.name]


@dataclass(frozen=True)
class Table(OnSide):
    """A user's function that looks a key up in a random table of bools ``[batch, keys]``."""

    batch_size: int
    length: int
    seed: int

    def on(self, side: Side) -> Any:
        return _looking_up(self, side.is_torch)


@cache
def _looking_up(table: Table, is_torch: bool) -> Callable[[Any, Any, Any, Any], Any]:
    # The same function each time, so that JAX compiles it once. JAX traces it, which takes a JAX array.
    allowed = np.random.default_rng(table.seed).random((table.batch_size, table.length)) < 0.5
    table_of_side: Any = torch.from_numpy(allowed) if is_torch else jnp.asarray(allowed)
    return lambda b, h, q, kv: table_of_side[b, kv]


PLAIN: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "every third key": lambda b, h, q, kv: kv % 3 == 0,
    "neighbours": lambda b, h, q, kv: abs(q - kv) <= 1,
    "another half in each example": lambda b, h, q, kv: (q + kv + b) % 2 == 0,
}
