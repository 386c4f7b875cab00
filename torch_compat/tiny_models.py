"""Transformers' own models, with their masks and with ours in their place: outputs compared bit for bit.

The models are small and random, for a mask does not know what it masks. Their windows are shorter than the text.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import torch
import transformers

from jaxmask.hf import masking_utils
from torch_compat.bridge import same_bits, to_jax, to_torch

PROMPT, STEPS, WINDOW = 7, 8, 4
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}
_ALTERNATING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# Each by the name of its class and of that of its configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": WINDOW}),
    "Gemma-2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER | _ALTERNATING),
    "Gemma-3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | _ALTERNATING),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER | _ALTERNATING | {"use_sliding_window": True}),
    "BERT": ("BertModel", "BertConfig", _SIZES),
    "BERT as a decoder": ("BertLMHeadModel", "BertConfig", _SIZES | {"is_decoder": True}),
}


@dataclass(frozen=True)
class ModelCheck:
    """How the outputs of a model compare, over every attention implementation, cache and step."""

    model: str
    attentions: tuple[str, ...]
    runs: int
    outputs: int
    identical_outputs: int
    # How many masks jaxmask made for them. None, and nothing was compared.
    masks: int
    # Without any mask the outputs of each run must come out different, or it would say nothing about masks.
    mask_matters: bool

    @property
    def agrees(self) -> bool:
        """Whether jaxmask's masks are as good as the model's own."""
        return self.identical_outputs == self.outputs and self.masks >= self.outputs and self.mask_matters

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{self.model} ({' and '.join(self.attentions)}), {self.runs} runs: {self.identical_outputs} of "
            f"{self.outputs} outputs identical under {self.masks} masks of jaxmask"
            + ("" if self.mask_matters else "; and under no mask, so that this shows nothing")
        )


def check(name: str) -> ModelCheck:
    """Run a model with its own masks, with ours, and with none: a prompt padded on the left, then token by token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of_model, of_config, arguments = MODELS[name]
        model = getattr(transformers, of_model)(getattr(transformers, of_config)(**arguments)).eval()
        tokens = torch.randint(_SIZES["vocab_size"], (2, PROMPT + STEPS))
    valid = torch.ones_like(tokens)
    valid[1, :3] = 0
    masks = outputs = identical = runs = 0
    mask_matters = True
    attentions = ("eager", "sdpa") if model._supports_sdpa else ("eager",)
    for attention in attentions:
        model.set_attn_implementation(attention)
        for cache in _caches(model.config):
            own = _outputs(model, tokens, valid, cache)
            with _masks_in_place(model, _bridged) as calls:
                ours = _outputs(model, tokens, valid, cache)
            with _masks_in_place(model, _without_mask):
                unmasked = _outputs(model, tokens, valid, cache)
            runs += 1
            masks += len(calls)
            outputs += len(own)
            identical += sum(map(same_bits, own, ours))
            mask_matters &= not all(map(same_bits, own, unmasked))
    return ModelCheck(name, attentions, runs, outputs, identical, masks, mask_matters)


def _caches(config: Any) -> list[Callable[[], Any] | None]:
    if not getattr(config, "is_decoder", True):
        return [None]
    static = partial(transformers.StaticCache, config=config, max_cache_len=PROMPT + STEPS + 3)
    return [partial(transformers.DynamicCache, config=config), static]


@contextmanager
def _one_thread() -> Generator[None]:
    """Matrices as small as these are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
@torch.no_grad()
def _outputs(
    model: Any, tokens: torch.Tensor, valid: torch.Tensor, make_cache: Callable[[], Any] | None
) -> list[torch.Tensor]:
    """What the model says of all tokens at once, or of the prompt and then of one token after another."""
    if make_cache is None:
        return [model(tokens, attention_mask=valid)[0]]
    cache = make_cache()
    outputs: list[torch.Tensor] = []
    for start, end in [(0, PROMPT), *((step, step + 1) for step in range(PROMPT, PROMPT + STEPS))]:
        step = model(tokens[:, start:end], attention_mask=valid[:, :end], past_key_values=cache, use_cache=True)
        outputs.append(step[0])
    return outputs


@contextmanager
def _masks_in_place(model: Any, replacement: Callable[[str, list[str]], Callable[..., Any]]) -> Generator[list[str]]:
    """The model's module with other functions in place of those that make masks; yields the names of those called."""
    module = sys.modules[type(model).__module__]
    originals = {name: value for name, value in vars(module).items() if name in vars(masking_utils) and callable(value)}
    calls: list[str] = []
    try:
        for name in originals:
            if name.startswith("create_"):
                setattr(module, name, replacement(name, calls))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def _bridged(name: str, calls: list[str]) -> Callable[..., Any]:
    """Our function of that name, on tensors of PyTorch."""

    def create(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        arguments, named = jax.tree.map(_to_jax, (arguments, named))
        return jax.tree.map(to_torch, getattr(masking_utils, name)(*arguments, **named))

    return create


def _to_jax(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return to_jax(value.to(torch.int32) if value.dtype == torch.int64 else value)


def _without_mask(name: str, calls: list[str]) -> Callable[..., None]:
    return lambda *arguments, **named: None
