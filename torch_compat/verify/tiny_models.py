"""Transformers' own models with their masks and with ours in their place. Outputs are compared bit for bit.

The models are small and random, since masks do not depend on weights. Their windows are shorter than the text.
"""

import inspect
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import torch
import transformers

from jaxmask.hf import masking_utils
from torch_compat.bridge import same_bits, to_jax, to_torch
from torch_compat.verify.model_checks import Measure, ModelCheck

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
_ROTARY: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# By default they are beyond the vocabulary.
_TOKENS: dict[str, Any] = {f"{name}_token_id": None for name in ("pad", "bos", "eos", "cls", "sep")}

# The names of the class and of its configuration, and the configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | {"sliding_window": WINDOW}),
    "Gemma-2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER | _ALTERNATING),
    "Gemma-3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | _ALTERNATING),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER | _ALTERNATING | {"use_sliding_window": True}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | _ALTERNATING | {"use_sliding_window": True}),
    "OLMo-2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER | _TOKENS),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _DECODER | _ALTERNATING | _ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "ModernBERT": (
        "ModernBertModel",
        "ModernBertConfig",
        # Its config counts the keys on both sides.
        _SIZES | _TOKENS | {"local_attention": 2 * WINDOW, "layer_types": _ALTERNATING["layer_types"]},
    ),
    "BERT": ("BertModel", "BertConfig", _SIZES),
    "BERT as a decoder": ("BertLMHeadModel", "BertConfig", _SIZES | {"is_decoder": True}),
}


def check(name: str) -> ModelCheck:
    """Run a model with its own masks, with ours, and with none: a prompt padded on the left, then token by token."""
    model, tokens = make(name, PROMPT + STEPS)
    valid = torch.ones_like(tokens)
    valid[1, :3] = 0
    masks = outputs = identical = runs = masked = 0
    attentions = attentions_of(model)
    for attention in attentions:
        model.set_attn_implementation(attention)
        for cache in _caches(model):
            run = partial(outputs_of, model, tokens, valid, cache, range(PROMPT, PROMPT + STEPS + 1))
            expected = run()
            with _masks_in_place(model, _bridged) as calls:
                ours = run()
            with _masks_in_place(model, _without_mask):
                unmasked = run()
            runs += 1
            masks += len(calls)
            outputs += len(expected)
            identical += sum(map(same_bits, expected, ours))
            masked += not all(map(same_bits, expected, unmasked))
    return ModelCheck(
        f"{name} ({' and '.join(attentions)})",
        (
            Measure.count("outputs identical under jaxmask's masks", identical, outputs),
            # Without masks of ours, nothing was compared.
            Measure("masks of jaxmask", masks, at_least=outputs),
            # Otherwise the outputs would say nothing about masks.
            Measure.count("runs different without masks", masked, runs),
        ),
    )


def make(name: str, length: int) -> tuple[Any, torch.Tensor]:
    """A model with random weights, and tokens ``[2, length]`` for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of_model, of_config, arguments = MODELS[name]
        model = getattr(transformers, of_model)(getattr(transformers, of_config)(**arguments)).eval()
        return model, torch.randint(_SIZES["vocab_size"], (2, length))


def attentions_of(model: Any) -> tuple[str, ...]:
    """The implementations of attention that are compared."""
    return ("eager", "sdpa") if model._supports_sdpa else ("eager",)


def _caches(model: Any) -> list[Callable[[], Any] | None]:
    if not model.can_generate():
        return [None]
    static = partial(transformers.StaticCache, config=model.config, max_cache_len=PROMPT + STEPS + 3)
    return [partial(transformers.DynamicCache, config=model.config), static]


@contextmanager
def _one_thread() -> Generator[None]:
    """Run PyTorch on one thread, which is faster for matrices as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
@torch.no_grad()
def outputs_of(
    model: Any, tokens: torch.Tensor, valid: torch.Tensor, make_cache: Callable[[], Any] | None, ends: Iterable[int]
) -> list[torch.Tensor]:
    """The outputs for all tokens at once or, with a cache, for the tokens up to each of the ends."""
    if make_cache is None:
        return [model(tokens, attention_mask=valid)[0]]
    cache = make_cache()
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    outputs: list[torch.Tensor] = []
    for start, end in pairwise((0, *ends)):
        step = model(tokens[:, start:end], attention_mask=valid[:, :end], use_cache=True, **{cache_name: cache})
        outputs.append(step[0])
    return outputs


@contextmanager
def _masks_in_place(model: Any, replacement: Callable[[str, list[str]], Callable[..., Any]]) -> Generator[list[str]]:
    """Replace the functions that make masks in the model's module. Yields the names of those that are called."""
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
