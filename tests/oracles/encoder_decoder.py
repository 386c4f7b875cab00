"""T5 in ``flax.nnx``, as small as it goes: a bias that is a function of positions, and attention across to the text."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmask import Causal, Mask, Padding, attention
from jaxmask.flax.models.layers import Linear
from torch_compat.models import Architecture, Names, embedding, linear, norm

# For each layer of the decoder, the keys and values of all positions up to the longest answer.
Buffers = list[tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Config:
    vocab_size: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    head_dim: int
    buckets: int
    max_distance: int
    epsilon: float


def bucket(distance: jax.Array, buckets: int, max_distance: int, both_ways: bool) -> jax.Array:
    """``T5Attention._relative_position_bucket``: exact for keys that are near, ever wider for those afar."""
    ahead = jnp.zeros_like(distance)
    if both_ways:
        buckets //= 2
        ahead = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance) if both_ways else jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The same arithmetic as the original's, for where one bucket ends is a matter of rounding.
    ratios = np.log(np.maximum(np.arange(max_distance), 1).astype(np.float32) / np.float32(exact))
    wide = exact + (ratios / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int32)
    table = jnp.asarray(np.where(np.arange(max_distance) < exact, np.arange(max_distance), wide))
    return ahead + jnp.where(distance < max_distance, table[jnp.minimum(distance, max_distance - 1)], buckets - 1)


class Attention(nnx.Module):
    def __init__(self, config: Config, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        inner, self.head_dim = config.heads * config.head_dim, config.head_dim

        def project(size: int, to: int) -> Linear:
            return Linear(size, to, use_bias=False, param_dtype=param_dtype, rngs=rngs)

        self.query, self.key, self.value = (project(config.dim, inner) for _ in range(3))
        self.out = project(inner, config.dim)

    def heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.heads(self.key(x)), self.heads(self.value(x))

    def __call__(self, x: jax.Array, keys: tuple[jax.Array, jax.Array], mask: Mask, **options: Any) -> jax.Array:
        # T5 does not scale: its initialisation does.
        attended = attention(self.heads(self.query(x)), *keys, mask, scale=1.0, **options)
        return self.out(attended.reshape(*x.shape[:2], -1))


class Layer(nnx.Module):
    def __init__(self, config: Config, *, crosses: bool, param_dtype: Any, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.self_norm, self.mlp_norm = _norm(config, options), _norm(config, options)
        self.self_attention = Attention(config, **options)
        if crosses:
            self.cross_norm = _norm(config, options)
            self.cross_attention = Attention(config, **options)
        self.up = Linear(config.dim, config.hidden_dim, use_bias=False, **options)
        self.down = Linear(config.hidden_dim, config.dim, use_bias=False, **options)

    def mlp(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.relu(self.up(self.mlp_norm(x))))


class Stack(nnx.Module):
    def __init__(self, config: Config, *, is_decoder: bool, param_dtype: Any, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.config, self.is_decoder = config, is_decoder
        self.distances = nnx.Embed(config.buckets, config.heads, **options)
        self.layers = nnx.List([Layer(config, crosses=is_decoder, **options) for _ in range(config.layers)])
        self.norm = _norm(config, options)

    def bias(self) -> Any:
        """What T5 adds to the scores: a number for each head and distance, and no array of them all."""
        config, both_ways = self.config, not self.is_decoder

        def bias(table: jax.Array, b: Any, h: Any, q: Any, kv: Any) -> jax.Array:
            return table[bucket(kv - q, config.buckets, config.max_distance, both_ways), h]

        return jax.tree_util.Partial(bias, self.distances.embedding[...])


class T5(nnx.Module):
    def __init__(self, config: Config, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.words = nnx.Embed(config.vocab_size, config.dim, **options)
        self.encoder = Stack(config, is_decoder=False, **options)
        self.decoder = Stack(config, is_decoder=True, **options)

    def encode(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        """``[batch, length, dim]``."""
        x, mask, bias = self.words(tokens), Padding(valid), self.encoder.bias()
        for layer in self.encoder.layers:
            normed = layer.self_norm(x)
            x = x + layer.self_attention(normed, layer.self_attention.keys(normed), mask, bias=bias)
            x = layer.mlp(x)
        return self.encoder.norm(x)

    def buffers(self, batch: int, length: int) -> Buffers:
        shape = (batch, length, self.config.heads, self.config.head_dim)
        return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.config.layers)]

    def decode(
        self, tokens: jax.Array, encoded: jax.Array, valid: jax.Array, buffers: Buffers, offset: Any
    ) -> tuple[jax.Array, Buffers]:
        """The logits of the tokens from position ``offset`` on, and the buffers with their keys."""
        x, bias, filled = self.words(tokens), self.decoder.bias(), list[tuple[jax.Array, jax.Array]]()
        for layer, buffer in zip(self.decoder.layers, buffers, strict=True):
            normed = layer.self_norm(x)
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, offset, axis=1)
                for old, new in zip(buffer, layer.self_attention.keys(normed), strict=True)
            )
            filled.append((keys, values))
            # What is not filled yet is ahead of every query.
            x = x + layer.self_attention(normed, (keys, values), Causal(), bias=bias, offset=offset)
            cross = layer.cross_attention
            x = x + cross(layer.cross_norm(x), cross.keys(encoded), Padding(valid))
            x = layer.mlp(x)
        return self.words.attend(self.decoder.norm(x) * self.config.dim**-0.5), filled


def _norm(config: Config, options: dict[str, Any]) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.dim, epsilon=config.epsilon, **options)


def _config(config: Any) -> tuple[type[T5], Config]:
    return T5, Config(
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


def _names(config: Config) -> Names:
    names = embedding("shared", "words")
    for stack in ("encoder", "decoder"):
        names |= norm(f"{stack}.final_layer_norm", f"{stack}.norm", bias=False)
        # The first layer's, which all layers use.
        names |= embedding(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.distances")
        attentions = [("SelfAttention", "self"), ("EncDecAttention", "cross")][: 2 if stack == "decoder" else 1]
        for i in range(config.layers):
            theirs, ours = f"{stack}.block.{i}.layer", f"{stack}.layers.{i}"
            for j, (attends, what) in enumerate(attentions):
                names |= norm(f"{theirs}.{j}.layer_norm", f"{ours}.{what}_norm", bias=False)
                for letter, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                    names |= linear(f"{theirs}.{j}.{attends}.{letter}", f"{ours}.{what}_attention.{name}", bias=False)
            last = f"{theirs}.{len(attentions)}"
            names |= norm(f"{last}.layer_norm", f"{ours}.mlp_norm", bias=False)
            names |= linear(f"{last}.DenseReluDense.wi", f"{ours}.up", bias=False)
            names |= linear(f"{last}.DenseReluDense.wo", f"{ours}.down", bias=False)
    return names


ARCHITECTURE = Architecture(
    _config,
    _names,
    ties={f"{name}.weight": "shared.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
)
