"""The Llama family: which :class:`Decoder` a configuration of Transformers is, and where its weights go."""

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from jaxmask.flax.models.decoder import Decoder, DecoderConfig, DecoderLayer, Llama3Scaling, Rope
from torch_compat.models.names import Names, Transform, embedding, linear, norm, same

_ACTIVATIONS: dict[str, Any] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def llama(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """Llama, and SmolLM, which is a Llama. It has no windows, whatever a config says."""
    bias = config.attention_bias
    return _decoder(config, kinds=["full_attention"], qkv_bias=bias, out_bias=bias, hidden_bias=config.mlp_bias)


def mistral(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """Mistral. All layers have the same window."""
    return _decoder(config, kinds=["sliding_attention" if config.sliding_window else "full_attention"])


def qwen2(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """Qwen 2 and 2.5."""
    return _decoder(config, qkv_bias=True)


def qwen3(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """Qwen 3."""
    bias = config.attention_bias
    return _decoder(config, qkv_bias=bias, out_bias=bias, qk_norm="weighted")


def gemma(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """The first Gemma."""
    bias = config.attention_bias
    scale = config.hidden_size**0.5
    return _decoder(config, qkv_bias=bias, out_bias=bias, embedding_scale=scale)


def gemma2(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """Gemma 2."""
    return _gemma(config, attention_cap=config.attn_logit_softcapping, logits_cap=config.final_logit_softcapping)


def gemma3(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """The text model of Gemma 3."""
    # Transformers' model ignores the attn_logit_softcapping of this configuration.
    return _gemma(config, qk_norm="weighted", logits_cap=config.final_logit_softcapping)


def gemma3_with_images(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """The text model of a Gemma 3 that takes images."""
    return gemma3(config.text_config)


def paligemma(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """The text model of PaliGemma, or of PaliGemma 2."""
    # Its text is causal but for a prefix, whatever the configuration of the text model says.
    text = copy.copy(config.text_config)
    text.use_bidirectional_attention = False
    match text.model_type:
        case "gemma":
            module, ours = gemma(text)
        case "gemma2":
            module, ours = gemma2(text)
        case other:
            raise ValueError(f"model_type of text_config must be 'gemma' or 'gemma2' for PaliGemma, got {other!r}")
    return module, replace(ours, blocks_exceed_window=any(layer.window is not None for layer in ours.layers))


def llama4(config: Any) -> tuple[type[Decoder], DecoderConfig]:
    """The text model of Llama 4 without mixtures of experts."""
    if config.moe_layers:
        raise ValueError(
            f"moe_layers of the config must be [] for a Decoder, which has no mixtures of experts, got "
            f"{list(config.moe_layers)}"
        )
    temperature = (config.floor_scale, config.attn_scale) if config.attn_temperature_tuning else None
    return _decoder(
        config,
        hidden_dim=config.intermediate_size_mlp,
        has_rope=config.no_rope_layers,
        temperature=temperature,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        qk_norm="plain" if config.use_qk_norm else None,
    )


def _gemma(config: Any, **more: Any) -> tuple[type[Decoder], DecoderConfig]:
    return _decoder(
        config,
        activation=config.hidden_activation,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        post_norm=True,
        embedding_scale=config.hidden_size**0.5,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        **more,
    )


def _decoder(
    config: Any,
    *,
    activation: str | None = None,
    hidden_dim: int | None = None,
    kinds: list[str] | None = None,
    has_rope: list[int] | None = None,
    temperature: tuple[float, float] | None = None,
    **more: Any,
) -> tuple[type[Decoder], DecoderConfig]:
    for name, wanted in (("is_causal", True), ("use_bidirectional_attention", False)):
        if bool(given := getattr(config, name, wanted)) is not wanted:
            raise ValueError(f"{name} of the config must be {wanted} for a Decoder, which is causal, got {given!r}")
    count = config.num_hidden_layers
    kinds = kinds or getattr(config, "layer_types", None) or ["full_attention"]
    layers: list[DecoderLayer] = []
    for kind, rope in zip((kinds * count)[:count], has_rope or [1] * count, strict=True):
        layers.append(
            DecoderLayer(
                window=config.sliding_window if kind == "sliding_attention" else None,
                chunk=config.attention_chunk_size if kind == "chunked_attention" else None,
                rope=_rope(config, kind) if rope else None,
                temperature=None if rope else temperature,
            )
        )
    activation = activation or config.hidden_act
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act of the config must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    return Decoder, DecoderConfig(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        hidden_dim=hidden_dim or config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        layers=tuple(layers),
        epsilon=config.rms_norm_eps,
        activation=_ACTIVATIONS[activation],
        tied=config.tie_word_embeddings,
        **more,
    )


def _rope(config: Any, kind: str) -> Rope:
    rope = config.rope_parameters
    rope = rope.get(kind, rope)
    match rope["rope_type"]:
        case "default":
            return Rope(rope["rope_theta"])
        case "linear":
            return Rope(rope["rope_theta"], factor=rope["factor"])
        case "llama3":
            scaling = Llama3Scaling(
                rope["factor"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
                rope["original_max_position_embeddings"],
            )
            return Rope(rope["rope_theta"], scaling=scaling)
        case other:
            raise ValueError(f"rope_type of the config must be one of default, linear, llama3, got {other!r}")


def decoder_names(
    config: DecoderConfig,
    *,
    feed_forward: str = "mlp",
    before_feed_forward: str = "post_attention_layernorm",
    scale: Transform = same,
    interleaved: bool = False,
) -> Names:
    """Where the weights of a decoder go.

    Args:
        config: of our decoder.
        feed_forward, before_feed_forward: the names of the feed-forward layer and of the norm before it.
        scale: turns the weight of a norm into our scale.
        interleaved: whether rotary embeddings rotate neighbours. Ours rotate the elements of two halves.
    """
    rms_norm = partial(norm, bias=False)
    names = embedding("model.embed_tokens", "embedding") | rms_norm("model.norm", "norm", transform=scale)
    if not config.tied:
        names |= linear("lm_head", "head", bias=False)
    for i, layer in enumerate(config.layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        order = partial(_halves, dim=config.head_dim) if interleaved and layer.rope is not None else same
        group = config.heads // config.kv_heads
        for short, name, size in (("q", "query", group), ("k", "key", 1), ("v", "value", 1)):
            names |= linear(
                f"{theirs}.self_attn.{short}_proj",
                f"{ours}.attention.query_key_value",
                bias=config.qkv_bias,
                transform=same if short == "v" else order,
                size=size,
                axis=1,
                split=(3, 1),
            )
            if config.qk_norm == "weighted" and short != "v":
                names |= rms_norm(f"{theirs}.self_attn.{short}_norm", f"{ours}.attention.{name}_norm", transform=scale)
        names |= linear(f"{theirs}.self_attn.o_proj", f"{ours}.attention.out", bias=config.out_bias, split=(1, 2))
        for name, our_name, size, split in (
            ("gate", "gate_up", 1, (2, 1)),
            ("up", "gate_up", 1, (2, 1)),
            ("down", "down", None, (1, 1)),
        ):
            names |= linear(
                f"{theirs}.{feed_forward}.{name}_proj",
                f"{ours}.feed_forward.{our_name}",
                bias=config.hidden_bias,
                size=size,
                split=split,
            )
        norms = {"input_layernorm": "attention_norm", before_feed_forward: "feed_forward_norm"}
        if config.post_norm:
            norms |= {
                "post_attention_layernorm": "attention_post_norm",
                "post_feedforward_layernorm": "feed_forward_post_norm",
            }
        for name, our_name in norms.items():
            names |= rms_norm(f"{theirs}.{name}", f"{ours}.{our_name}", transform=scale)
    return names


def gemma_names(config: DecoderConfig) -> Names:
    """Where the weights of Gemma go. Its norms add 1 to their weights."""
    # The first Gemma has no norms after attention and feed-forward, and calls the one before by another's name.
    before = "pre_feedforward_layernorm" if config.post_norm else "post_attention_layernorm"
    return decoder_names(config, before_feed_forward=before, scale=lambda weight: 1 + weight)


def text_rename(name: str) -> str:
    """The name that a weight of a model with images has in its text model alone."""
    # The second is the name in checkpoints of old.
    return re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name).removeprefix("language_model.")


def llama4_names(config: DecoderConfig) -> Names:
    """Where the weights of Llama 4 go. Its rotary embeddings rotate neighbours, as complex numbers."""
    return decoder_names(config, feed_forward="feed_forward", interleaved=True)


def _halves(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """The rows of each head, first those with even indices and then the others."""
    heads = weight.reshape(-1, dim // 2, 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)
