"""BERT: which :class:`Encoder` a configuration of Transformers is, and where its weights go."""

from typing import Any

from jaxmask.flax.models.encoder import Encoder, EncoderConfig
from torch_compat.models.names import Names, embedding, linear, norm


def bert(config: Any) -> tuple[type[Encoder], EncoderConfig]:
    """BERT without a head."""
    supported: dict[str, Any] = {"hidden_act": "gelu", "is_decoder": False, "position_embedding_type": "absolute"}
    for name, value in supported.items():
        if (given := getattr(config, name, value)) != value:
            raise ValueError(f"{name} of the config must be {value!r} for Encoder, got {given!r}")
    return Encoder, EncoderConfig(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        max_length=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        epsilon=config.layer_norm_eps,
    )


def bert_names(config: EncoderConfig) -> Names:
    """Where the weights of an encoder go."""
    names: Names = {}
    for theirs, ours in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        names |= embedding(f"embeddings.{theirs}_embeddings", ours)
    names |= norm("embeddings.LayerNorm", "norm")
    for i in range(config.layers):
        theirs, ours = f"encoder.layer.{i}", f"layers.{i}"
        for name in ("query", "key", "value"):
            names |= linear(f"{theirs}.attention.self.{name}", f"{ours}.{name}", split=(2, 1))
        names |= linear(f"{theirs}.attention.output.dense", f"{ours}.out", split=(1, 2))
        names |= norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        names |= linear(f"{theirs}.intermediate.dense", f"{ours}.up")
        names |= linear(f"{theirs}.output.dense", f"{ours}.down")
        names |= norm(f"{theirs}.output.LayerNorm", f"{ours}.mlp_norm")
    return names


def bert_rename(name: str) -> str:
    """The name of a weight in an encoder without a head, with PyTorch's names for norms."""
    # A model with a head has its encoder under a name. The oldest checkpoints have TensorFlow's names for norms.
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
