"""T5: which :class:`jaxmask.flax.T5` a configuration of Transformers is, and where its weights go."""

from typing import Any

from jaxmask.flax.models.t5 import T5, T5Config
from torch_compat.models.names import Names, embedding, linear, norm


def t5(config: Any) -> tuple[type[T5], T5Config]:
    """T5 as it was first published, whose words are the weights of its logits, too."""
    supported: dict[str, Any] = {
        "feed_forward_proj": "relu",
        "scale_decoder_outputs": True,
        "num_decoder_layers": config.num_layers,
    }
    for name, value in supported.items():
        if (given := getattr(config, name, value)) != value:
            raise ValueError(f"{name} of the config must be {value!r} for T5, got {given!r}")
    return T5, T5Config(
        vocab_size=config.vocab_size,
        dim=config.d_model,
        hidden_dim=config.d_ff,
        layers=config.num_layers,
        heads=config.num_heads,
        head_dim=config.d_kv,
        buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        epsilon=config.layer_norm_epsilon,
    )


def t5_names(config: T5Config) -> Names:
    """Where the weights of T5 go."""
    names = embedding("shared", "words")
    for stack, kinds in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        names |= norm(f"{stack}.final_layer_norm", f"{stack}.norm", bias=False)
        # The first layer's, which all layers use.
        names |= embedding(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.distances")
        for i in range(config.layers):
            theirs, ours = f"{stack}.block.{i}.layer", f"{stack}.layers.{i}"
            for j, kind in enumerate(kinds):
                names |= norm(f"{theirs}.{j}.layer_norm", f"{ours}.{kind}_norm", bias=False)
                attention = {"self": "SelfAttention", "cross": "EncDecAttention"}[kind]
                for letter, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                    names |= linear(
                        f"{theirs}.{j}.{attention}.{letter}",
                        f"{ours}.{kind}_attention.{name}",
                        bias=False,
                        split=(1, 2) if letter == "o" else (2, 1),
                    )
            last = f"{theirs}.{len(kinds)}"
            names |= norm(f"{last}.layer_norm", f"{ours}.mlp_norm", bias=False)
            names |= linear(f"{last}.DenseReluDense.wi", f"{ours}.up", bias=False)
            names |= linear(f"{last}.DenseReluDense.wo", f"{ours}.down", bias=False)
    return names
