"""A sliding window at decoding: the mask of a published example, beside jaxmask's.

The gemma example of Flax makes its window from the last two axes of the attention mask (``Attention.__call__`` in
``examples/gemma/modules.py`` of google/flax, as of July 2026)::

    sliding_mask = triu(ones, -sliding_window_size + 1) * tril(ones, sliding_window_size - 1)

For a whole text the mask is ``[batch, length, length]``, and this is the window. For a step of decoding it is ``[batch,
1, cache_size]`` (``_compute_attention_masks`` in ``sampler.py``): the one row is row 0, wherever the token is, and its
window are the first keys of the cache. So from the token after the first window on, decoding attends to other keys than
the whole text does. With a description the position is said, as the offset, and both are the same.

    python examples/gemma_window.py
"""

import argparse

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxmask import SlidingWindow, attention


def gemma_mask(attn_mask: jax.Array, window: int) -> jax.Array:
    """The window as the example has it, ``[batch, q, kv]``."""
    ones = jnp.ones(attn_mask.shape, attn_mask.dtype)
    return jnp.triu(ones, 1 - window) * jnp.tril(ones, window - 1) * attn_mask


def softmax_attention(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    """Attention by its definition, for a mask of all pairs."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -2.3819763e38), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def differences(window: int, length: int) -> tuple[jax.Array, jax.Array]:
    """How far decoding is from the whole text, at each token: by the mask of the example, and by jaxmask's."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, length, 4, 32))
    causal = jnp.tril(jnp.ones((1, length, length), bool))  # as make_causal_attn_mask makes it
    theirs = softmax_attention(query, key, value, gemma_mask(causal, window))
    ours = attention(query, key, value, SlidingWindow(window))

    @jax.jit
    def step(t: jax.Array, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = (jnp.arange(length) <= t)[None, None]  # as _compute_attention_masks makes it
        return (
            softmax_attention(query, key, value, gemma_mask(seen, window)),
            attention(query, key, value, SlidingWindow(window), offset=t),
        )

    by_theirs, by_ours = zip(*(step(jnp.int32(t), query[:, t : t + 1]) for t in range(length)), strict=True)

    def apart(steps: tuple[jax.Array, ...], whole: jax.Array) -> jax.Array:
        return jnp.abs(jnp.concatenate(steps, 1) - whole).max((0, 2, 3))

    return apart(by_theirs, theirs), apart(by_ours, ours)


def main() -> None:
    """Print the differences, and the first token at which they are more than rounding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    arguments = parser.parse_args()
    theirs, ours = differences(arguments.window, arguments.length)
    console = Console(width=80)
    table = Table(
        "token", "the example", "jaxmask", title=f"decoding against the whole text, window {arguments.window}"
    )
    for t, (one, another) in enumerate(zip(theirs, ours, strict=True)):
        table.add_row(str(t + 1), f"{one:.0e}", f"{another:.0e}", style="red" if one > 1e-4 else "")
    console.print(table)
    wrong = jnp.flatnonzero(theirs > 1e-4)
    first = f"from token {int(wrong[0]) + 1} on, up to {theirs.max():.1f}" if wrong.size else "nowhere"
    console.print(f"the example differs from itself {first}", highlight=False)
    agrees = "less than 1e-6" if ours.max() < 1e-6 else f"{ours.max():.0e}"
    console.print(f"jaxmask differs from itself by {agrees}", highlight=False)


if __name__ == "__main__":
    main()
