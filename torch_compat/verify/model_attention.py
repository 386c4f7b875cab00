"""Attention in Transformers' own models, layer by layer, and ours of the same queries, keys and values.

The mask of a layer is written from the model's configuration in our vocabulary, as in a port of the model. The mask
that the model makes for itself is not looked at.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jaxmask import Causal, Full, Mask, Padding, SlidingWindow, Window
from torch_compat.bridge import to_jax
from torch_compat.verify.attention import IMPLEMENTATIONS, TOLERANCES
from torch_compat.verify.model_checks import Measure, ModelCheck
from torch_compat.verify.tiny_models import attentions_of, make, outputs_of

# A decoder takes the prompt, and then all other tokens after a cache. Either part has several tiles.
LENGTH, PROMPT = 43, 24
TOLERANCE = TOLERANCES["float32"]


def _causal(config: Any) -> list[Mask]:
    """The size of a window counts the query's own key."""
    kinds = getattr(config, "layer_types", ["full_attention"] * config.num_hidden_layers)
    return [SlidingWindow(config.sliding_window) if kind == "sliding_attention" else Causal() for kind in kinds]


def _modernbert(config: Any) -> list[Mask]:
    """A window has ``local_attention`` keys besides the query's own, half of them on each side."""
    half = config.local_attention // 2
    return [Window(half, half) if kind == "sliding_attention" else Full() for kind in config.layer_types]


# The mask of each layer, but for padding.
MASKS: dict[str, Callable[[Any], list[Mask]]] = {
    "Qwen3": _causal,
    "OLMo-2": _causal,
    "gpt-oss": _causal,
    "ModernBERT": _modernbert,
}


@dataclass(frozen=True)
class _Call:
    """What a layer asked of attention, and the output of its own function in float64: ``[batch, length, heads, dim]``.

    ``valid`` says of each key ``[batch, kv]`` whether it is a token. The queries are the last of these.
    """

    layer: int
    query: Any
    key: Any
    value: Any
    scale: float
    sinks: Any
    valid: np.ndarray
    output: np.ndarray

    def difference(self, operation: str, mask: Mask, sinks: Any) -> float:
        """The largest difference of our output from theirs, relative to the largest element of its row.

        What comes out for padding is left out. No token attends to it, and each model has its own idea of it.
        """
        offset = self.key.shape[1] - self.query.shape[1]
        arguments: dict[str, Any] = {"bias": None, "sinks": sinks, "scale": self.scale, "offset": offset}
        ours = np.asarray(IMPLEMENTATIONS[operation](self.query, self.key, self.value, mask=mask, **arguments))
        is_token = self.valid[:, offset:]
        largest = abs(self.output[is_token]).max(-1, keepdims=True)
        return float((abs(ours - self.output)[is_token] / largest).max())


def check(name: str) -> ModelCheck:
    """Compare every layer of a model, in a batch that is padded on both sides: at once, or in two parts by a cache."""
    model, tokens = make(name, LENGTH)
    valid = torch.ones_like(tokens)
    valid[0, -5:] = valid[1, :9] = 0
    attentions, masks = attentions_of(model), MASKS[name](model.config)
    # Without the configuration, no layer of the cache forgets the keys before its window.
    cache = DynamicCache if model.can_generate() else None
    calls: list[_Call] = []
    for attention in attentions:
        model.set_attn_implementation(attention)
        with _recorded(model, attention, valid, calls):
            outputs_of(model, tokens, valid, cache, (PROMPT, LENGTH))

    def measure(operation: str) -> Measure:
        differences = [
            call.difference(operation, masks[call.layer] & Padding(call.valid), call.sinks) for call in calls
        ]
        return Measure(f"difference of {operation}", float(np.max(differences)), at_most=TOLERANCE)

    # Otherwise the outputs would say nothing about masks and sinks.
    without = {"its mask": [call.difference("attention_xla", Full(), call.sinks) for call in calls]}
    if calls[0].sinks is not None:
        without["its sinks"] = [
            call.difference("attention_xla", masks[call.layer] & Padding(call.valid), None) for call in calls
        ]
    return ModelCheck(
        f"attention of {name} ({' and '.join(attentions)}), {LENGTH} tokens",
        (
            Measure.count("calls by layers compared", len(calls), len(attentions) * len(masks) * (2 if cache else 1)),
            measure("attention_xla"),
            measure("attention_blocked"),
            *(
                Measure(
                    f"difference of each layer without {what}", float(np.min(differences)), at_least=100 * TOLERANCE
                )
                for what, differences in without.items()
            ),
        ),
    )


@contextmanager
def _recorded(model: Any, attention: str, valid: torch.Tensor, calls: list[_Call]) -> Generator[None]:
    """Record the calls of an implementation of attention by the layers of the model."""
    eager = vars(sys.modules[type(model).__module__])["eager_attention_forward"]
    original = ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager)

    def record(layer: Any, query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
        exact, _ = original(layer, query.double(), key.double(), value.double(), mask, **arguments)
        sinks = arguments.get("s_aux")
        calls.append(
            _Call(
                layer.layer_idx,
                *(to_jax(x.transpose(1, 2)) for x in (query, key, value)),
                scale=arguments["scaling"],
                sinks=None if sinks is None else to_jax(sinks.detach()),
                valid=valid[:, : key.shape[2]].bool().numpy(),
                output=exact.numpy(),
            )
        )
        return original(layer, query, key, value, mask, **arguments)

    ALL_ATTENTION_FUNCTIONS[attention] = record
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[attention]
