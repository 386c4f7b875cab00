"""GPT-2 in the style of Transformers 4's Flax, with jaxmask's masks. Transformers 5 has no Flax models.

The attention module keeps the variables of the original, ``cached_key``, ``cached_value`` and ``cache_index``. What
made its mask was ``make_causal_mask`` of ``[max_length, max_length]``, a ``dynamic_slice`` of it at the index of the
cache, ``combine_masks`` with the padding, and ``lax.select`` for a bias. Here it is one line, and nothing of that size.

The weights are those of a PyTorch model, random and small. The logits of a padded batch are PyTorch's, and those of
decoding step by step are those of the whole text.

    python examples/flax_gpt2.py --plot decoding.png
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from jax import lax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from transformers import GPT2Config, GPT2LMHeadModel

from jaxmask import Causal, Padding, attention

CONFIG = GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)


class Attention(nn.Module):
    """Attention with a cache; its weights have the names of the checkpoint."""

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, decode: bool) -> jax.Array:
        """``valid`` is of the keys: of ``x``, or of all slots of the cache."""
        query, key, value = (
            part.reshape(*x.shape[:2], CONFIG.n_head, -1)
            for part in jnp.split(nn.Dense(3 * CONFIG.n_embd, name="c_attn")(x), 3, -1)
        )
        offset: Any = 0
        if decode:
            shape = (x.shape[0], CONFIG.n_positions, *key.shape[2:])
            cached_key = self.variable("cache", "cached_key", jnp.zeros, shape)
            cached_value = self.variable("cache", "cached_value", jnp.zeros, shape)
            cache_index = self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
            offset = cache_index.value
            key = cached_key.value = lax.dynamic_update_slice(cached_key.value, key, (0, offset, 0, 0))
            value = cached_value.value = lax.dynamic_update_slice(cached_value.value, value, (0, offset, 0, 0))
            cache_index.value = offset + x.shape[1]
        out = attention(query, key, value, Causal() & Padding(valid), offset=offset)
        return nn.Dense(CONFIG.n_embd, name="c_proj")(out.reshape(x.shape))


class MLP(nn.Module):
    """The feed-forward network."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(CONFIG.n_embd, name="c_proj")(nn.gelu(nn.Dense(4 * CONFIG.n_embd, name="c_fc")(x)))


class Block(nn.Module):
    """A layer."""

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, decode: bool) -> jax.Array:
        x = x + Attention(name="attn")(nn.LayerNorm(epsilon=1e-5, name="ln_1")(x), valid, decode)
        return x + MLP(name="mlp")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x))


class GPT2(nn.Module):
    """The model, from tokens to logits."""

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, valid: jax.Array, decode: bool = False) -> jax.Array:
        embed = nn.Embed(CONFIG.vocab_size, CONFIG.n_embd, name="wte")
        x = embed(tokens) + nn.Embed(CONFIG.n_positions, CONFIG.n_embd, name="wpe")(positions)
        for i in range(CONFIG.n_layer):
            x = Block(name=f"h_{i}")(x, valid, decode)
        return embed.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


def weights_of(model: Any) -> dict[str, Any]:
    """The weights of a PyTorch model under the names of Flax; GPT-2's kernels are those of ``nn.Dense``."""
    params: dict[str, Any] = {}
    for name, tensor in model.transformer.state_dict().items():
        *path, last = name.replace("h.", "h_", 1).split(".") if name.startswith("h.") else name.split(".")
        leaf = "bias" if last == "bias" else {"w": "embedding", "l": "scale"}.get(path[-1][0], "kernel")
        at = params
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = jnp.asarray(tensor.numpy())
    return {"params": params}


def main() -> None:
    """Compare with PyTorch, and decoding with the whole text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode one by one")
    parser.add_argument("--plot", type=Path, help="where to write a picture of the differences")
    arguments = parser.parse_args()
    console, length = Console(highlight=False), arguments.steps
    torch.manual_seed(0)
    theirs, ours = GPT2LMHeadModel(CONFIG).eval(), GPT2()
    variables = weights_of(theirs)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, length))
    valid = np.arange(length) >= np.array([[0], [2]])  # the second text is padded on the left
    positions = (valid.cumsum(1) - 1).clip(0)
    with torch.no_grad():
        wanted = theirs(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(valid).long(),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    whole = ours.apply(variables, tokens, positions, valid)
    difference = np.abs(np.asarray(whole) - wanted)[valid].max()
    console.print(f"logits of a padded batch differ from PyTorch's by {difference:.0e}")

    slots = np.ones((2, CONFIG.n_positions), bool)
    slots[:, :length] = valid
    step = jax.jit(lambda variables, *now: ours.apply(variables, *now, slots, decode=True, mutable="cache"))
    logits = []
    empty = jax.eval_shape(step, variables, tokens[:, :1], positions[:, :1])[1]
    state = variables | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    for t in track(range(length), "decoding"):
        now, cache = step(state, tokens[:, t : t + 1], positions[:, t : t + 1])
        state = variables | cache
        logits.append(now)
    apart = np.abs(np.concatenate(logits, 1) - np.asarray(whole)).max(-1)
    apart = np.where(valid, apart, 0).max(0)
    console.print(f"decoding {length} tokens differs from the whole text by {apart.max():.0e}")
    if arguments.plot:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        ax = figure.subplots()
        ax.semilogy(np.arange(1, length + 1), np.maximum(apart, 1e-9), ".-")
        ax.set(xlabel="token", ylabel="difference (lower is better)", title="decoding beside the whole text")
        figure.savefig(arguments.plot)
        console.print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
