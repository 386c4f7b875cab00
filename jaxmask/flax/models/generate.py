"""Text from a :class:`Decoder`: a prompt at once, and then token by token in one compiled loop."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int

from jaxmask import checks
from jaxmask.flax.cache import Cache
from jaxmask.flax.models.decoder import Decoder


class Generated(NamedTuple):
    """What :func:`generate` returns.

    Args:
        tokens: int32 ``[batch, max_new_tokens]``; after the end of a row, ``pad``; -1 where the logits are NaN.
        lengths: int32 ``[batch]``, how many tokens each row has, the one that ends it included.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, "batch"]


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as one batch, padded on the left.

    Args:
        prompts: the tokens of each, at least one.
        pad: the token to fill with.

    Returns:
        int32 ``[batch, length]`` tokens, and bool ``[batch, length]``, which are no padding.

    Raises:
        ValueError: there is no prompt, or one of them is empty, or a token does not fit an int32.
        TypeError: a token is no int.

    >>> tokens, valid = left_pad([[5, 6, 7], [8]])
    >>> tokens.tolist(), valid.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows or any(not row.size for row in rows):
        which = f"prompt {[row.size for row in rows].index(0)} is empty" if rows else "there is none"
        raise ValueError(f"prompts must each have a token, but {which}; begin it with the token that begins a text")
    for i, row in enumerate(rows):
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"prompts must be sequences of ints, but prompt {i} is {checks.describe(row)}")
        checks.fits_int32(f"prompt {i}", row)
    length = max(map(len, rows))
    tokens = np.stack([np.pad(row, (length - len(row), 0), constant_values=pad) for row in rows]).astype(np.int32)
    return tokens, np.arange(length) >= np.array([[length - len(row)] for row in rows])


def generate(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "batch length"],
    valid: Bool[Array | np.ndarray, "batch length"] | None = None,
    *,
    max_new_tokens: int,
    cache_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    end: Sequence[int] = (),
    pad: int = 0,
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Generated:
    """Continue prompts; at temperature 0, each as it would be alone, whatever the padding.

    It compiles for the shapes of the prompts and of ``end``, ``max_new_tokens``, ``cache_length``, ``top_k``, which
    settings are left out, and ``on_tokens``: each new function compiles the loop again, so keep it.

    Args:
        model: the decoder.
        tokens: the prompts.
        valid: which tokens are no padding, on either side; ``None`` for all. See :func:`left_pad`.
        max_new_tokens: how many to generate for each row at most, at least 1; static.
        cache_length: for how many tokens in a row the cache has room; ``None`` for as many as are needed.
        temperature: by which logits are divided before one is drawn; 0 takes the most likely, and needs no ``key``.
        top_k: to draw from the ``top_k`` most likely only.
        top_p: to draw from the most likely whose probabilities together reach ``top_p`` only.
        key: of ``jax.random``.
        end: tokens that end a row.
        pad: what follows in a row that has ended.
        on_tokens: called with each new token of every row, int32 ``[batch]``, and whether the row is still going on,
            bool ``[batch]``, as soon as they are there.

    Raises:
        ValueError: a prompt is empty or does not fit the cache; a setting is out of range.
        TypeError: an argument has the wrong type or dtype.

    Source of ``temperature``, ``top_k``, ``top_p``: the logits processors of these names in Transformers.

    >>> from jaxmask.flax import DecoderConfig, DecoderLayer
    >>> config = DecoderConfig(16, 8, 16, heads=2, kv_heads=1, head_dim=4, layers=(DecoderLayer(),))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> generate(model, *left_pad([[5, 6, 7], [8]]), max_new_tokens=3).tokens.shape
    (2, 3)
    """
    batch, length = checks.array("tokens", tokens, "i", 2).shape
    check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    new = int(max_new_tokens)
    if not batch or not length:
        raise ValueError(f"tokens must hold prompts of at least one token, got {checks.describe(tokens)}")
    needed = length + new - 1
    if cache_length is not None and needed > checks.integer("cache_length", cache_length, 1):
        raise ValueError(
            f"cache_length must be at least {needed}, for prompts of {length} tokens and {new} new ones, got "
            f"{cache_length}; leave it out, or make max_new_tokens smaller"
        )
    if temperature and key is None:
        raise ValueError(f"key is missing: to draw tokens at temperature {temperature}, say key=jax.random.key(seed)")
    if isinstance(end, int):
        raise TypeError(f"end must be a sequence of tokens, got {end}; say end=[{end}]")
    if top_k is not None:
        top_k = min(int(top_k), model.config.vocab_size)
    graph, state = nnx.split(model)
    cache = model.empty_cache(batch, needed if cache_length is None else cache_length)
    cache.step(length, valid)  # here, where what is wrong with valid can still be refused
    if valid is not None and not checks.is_traced(valid) and not (some := np.asarray(valid).any(1)).all():
        raise ValueError(f"each prompt must have a token, but by valid that of row {int(some.argmin())} has none")
    if not checks.is_traced(tokens) and not checks.is_traced(valid):
        given = np.asarray(tokens)[... if valid is None else np.asarray(valid)]
        if given.size and (given.min() < 0 or given.max() >= model.config.vocab_size):
            raise ValueError(
                f"tokens must be from 0 to {model.config.vocab_size - 1}, got {given.min()} to {given.max()}: is the "
                "tokenizer that of the model?"
            )
    logits, cache = prefill(graph, state, cache, jnp.asarray(tokens), None if valid is None else jnp.asarray(valid))
    draw = None if not temperature else (key, jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))
    ends = jnp.asarray(tuple(end), jnp.int32)
    how: Any = {"new": new, "top_k": top_k, "on_tokens": on_tokens}
    return decode(graph, state, cache, logits, draw, ends, jnp.int32(pad), **how)[0]


def check_settings(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """What :func:`generate` asks of its settings, for who wants to know before there is a model.

    Raises:
        ValueError: a setting is out of range.
        TypeError: it has the wrong type.
    """
    checks.integer("max_new_tokens", max_new_tokens, 1)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None:
        checks.integer("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(graph: Any, state: Any, cache: Cache, tokens: Any, valid: Any) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after each prompt, and the cache with the prompts."""
    logits, cache = nnx.merge(graph, state)(tokens, valid, cache=cache, last_only=True)
    return logits[:, 0], cache


@partial(jax.jit, static_argnums=0, static_argnames=("new", "top_k", "on_tokens"), donate_argnums=2)
def decode(
    graph: Any,
    state: Any,
    cache: Cache,
    logits: Any,
    draw: Any,
    ends: Any,
    pad: Any,
    *,
    new: int,
    top_k: int | None,
    on_tokens: Any,
) -> tuple[Generated, Cache]:
    """The loop: a token of the logits, and the logits of that token, until all rows have ended."""

    def choose(i: Any, logits: Any, is_done: Any, out: Any) -> Any:
        token = _choose(logits, i, draw, top_k)
        token = jnp.where(is_done, pad, token).astype(jnp.int32)
        if on_tokens is not None:
            io_callback(on_tokens, None, token, ~is_done, ordered=True)
        out = lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)
        return token, is_done | (token[:, None] == ends).any(1), out

    def body(carry: Any) -> Any:
        i, token, cache, is_done, lengths, out = carry
        logits, cache = nnx.merge(graph, state)(token[:, None], cache=cache)
        lengths = lengths + ~is_done
        token, is_done, out = choose(i, logits[:, 0], is_done, out)
        return i + 1, token, cache, is_done, lengths, out

    batch = logits.shape[0]
    start: Any = jnp.zeros(batch, bool), jnp.full((batch, new), pad, jnp.int32)
    token, is_done, out = choose(jnp.int32(0), logits, *start)
    carry = jnp.int32(1), token, cache, is_done, jnp.ones(batch, jnp.int32), out
    carry = lax.while_loop(lambda carry: (carry[0] < new) & ~carry[3].all(), body, carry)
    return Generated(carry[5], carry[4]), carry[2]


def _choose(logits: Any, i: Any, draw: Any, top_k: int | None) -> Any:
    if draw is None:
        token = logits.argmax(-1)
    else:
        key, temperature, top_p = draw
        token = jax.random.categorical(jax.random.fold_in(key, i), likely(logits, temperature, top_k, top_p))
    return jnp.where(jnp.isnan(logits).any(-1), -1, token)


def likely(
    logits: Float[Array, "batch vocab"], temperature: Any, top_k: int | None, top_p: Any
) -> Float[Array, "batch vocab"]:
    """The logits to draw from, float32, ``-inf`` where they are not likely enough; the likeliest always is.

    Source: ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and ``TopPLogitsWarper`` in Transformers, in that order.
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        logits = jnp.where(logits < lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None:
        order = jnp.argsort(logits, axis=-1)
        sums = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1).cumsum(-1)
        is_last = np.arange(logits.shape[-1]) == logits.shape[-1] - 1
        keep = (sums > 1 - top_p) | is_last
        keep = jnp.zeros_like(keep).at[jnp.arange(len(keep))[:, None], order].set(keep)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits
