"""Text from a :class:`Decoder`: one call for the prompts, then a compiled loop that adds a token at a time."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxmask import checks
from jaxmask.flax.cache import Cache, Valid, as_valid
from jaxmask.flax.models import axes

OnTokens = Callable[[np.ndarray, np.ndarray], None]
# How to draw a token: a key, a temperature and top_p.
Draw = tuple[Array, Float[Array, ""], Float[Array, ""] | None]
# The number of tokens so far, the last of each row, the cache, which rows have ended, their lengths, and all tokens.
Carry = tuple[Array, Array, Cache | None, Array, Array, Array]
Weights = nnx.State[Hashable, object]


@runtime_checkable
class LanguageModel(Protocol):
    """What :func:`generate` needs of an ``nnx.Module``: a :class:`Decoder`, a :class:`T5Decoder`, or another.

    Its ``config`` has a ``vocab_size``.
    """

    config: Any

    def empty_cache(self, batch: SupportsIndex, length: SupportsIndex) -> Cache:
        """A cache for ``batch`` texts of at most ``length`` tokens."""
        ...

    def __call__(
        self, tokens: Any, valid: Any = None, *, cache: Cache | None = None, last_only: bool = False
    ) -> tuple[Float[Array, "batch #q vocab"], Cache | None]:
        """The logits for the token after each, and the cache with these tokens."""
        ...


class Generated(NamedTuple):
    """What :func:`generate` returns.

    Args:
        tokens: int32 ``[batch, max_new_tokens]``. ``pad`` follows the end of a row. NaN logits give -1.
        lengths: int32 ``[batch]``, the number of tokens in each row, with the one that ends it.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, "batch"]


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any lengths as one batch, padded on the left.

    Args:
        prompts: the tokens of each prompt, at least one.
        pad: the token to fill with.

    Returns:
        The tokens, int32 ``[batch, length]``, and which of them are not padding, bool ``[batch, length]``.

    Raises:
        ValueError: there is no prompt, a prompt is empty, or a token does not fit an int32.
        TypeError: a token is not an integer.

    >>> tokens, valid = left_pad([[5, 6, 7], [8]])
    >>> tokens.tolist(), valid.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    pad = checks.integer("pad", pad, -checks.INT32_MAX)
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


def _ends(end: Sequence[int]) -> Int[Array, "ends"]:
    return jnp.asarray([checks.integer(f"end[{i}]", token, 0) for i, token in enumerate(end)], jnp.int32)


def generate(
    model: LanguageModel,
    tokens: Integer[Array | np.ndarray, "batch length"],
    valid: Valid | None = None,
    *,
    max_new_tokens: int,
    block_sequence_ids: Integer[Array | np.ndarray, "batch length"] | None = None,
    embeddings: Float[Array | np.ndarray, "batch length dim"] | None = None,
    cache_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    end: Sequence[int] = (),
    pad: int = 0,
    on_tokens: OnTokens | None = None,
) -> Generated:
    """Continue prompts. At temperature 0, each continues as it would alone, whatever its padding.

    Other shapes of ``tokens`` or ``end`` compile again, and so do another ``max_new_tokens``, ``cache_length``,
    ``top_k`` or ``on_tokens``, and other settings that are ``None``. So pass the same function each time.

    Args:
        model: a :class:`Decoder`; or the decoder that ``T5.read`` returns for a text, which the tokens answer.
        tokens: the prompts.
        valid: bool or 0/1, true for tokens, false for padding on either side; ``None`` if there is none. See
            :func:`left_pad`.
        max_new_tokens: the most tokens to generate for each row, at least 1; static.
        block_sequence_ids, embeddings: of the prompts, where there are images or prefixes in them, as the model takes
            them. New tokens are causal. With embeddings, ``tokens`` may be any.
        cache_length: the number of tokens that a row of the cache has room for; ``None`` for as many as needed.
        temperature: divides the logits before a token is drawn. 0 takes the most likely token, and needs no ``key``.
        top_k: draw from the ``top_k`` most likely tokens only.
        top_p: draw from the most likely tokens whose probabilities together reach ``top_p`` only.
        key: from ``jax.random.key``.
        end: the tokens that end a row.
        pad: the token that fills a row after its end.
        on_tokens: called once for each step, as soon as it is done, with the new token of each row, int32 ``[batch]``,
            and whether the row was still going on, bool ``[batch]``.

    Raises:
        ValueError: a prompt is empty or does not fit the cache, or a setting is out of range.
        TypeError: an argument has the wrong type or dtype.

    Source of ``temperature``, ``top_k``, ``top_p``: the logits processors of these names in Transformers.

    >>> from jaxmask.flax import Decoder, DecoderConfig, DecoderLayer
    >>> config = DecoderConfig(16, 8, 16, heads=2, kv_heads=1, head_dim=4, layers=(DecoderLayer(),))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> generate(model, *left_pad([[5, 6, 7], [8]]), max_new_tokens=3).tokens.shape
    (2, 3)
    """
    batch, length = checks.array("tokens", tokens, "i", 2).shape
    check_settings(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    new, vocab_size = int(max_new_tokens), model.config.vocab_size
    if not batch or not length:
        raise ValueError(f"tokens must hold prompts of at least one token, got {checks.describe(tokens)}")
    needed = length + new - 1
    if cache_length is not None and needed > checks.integer("cache_length", cache_length, 1):
        raise ValueError(
            f"cache_length must be at least {needed}, for prompts of {length} tokens and {new} new ones, got "
            f"{cache_length}; leave it out, or make max_new_tokens smaller"
        )
    pad = checks.integer("pad", pad, -checks.INT32_MAX)
    if key is not None:
        checks.key("key", key)
    if temperature and key is None:
        raise ValueError(f"key is missing: to draw tokens at temperature {temperature}, say key=jax.random.key(seed)")
    if isinstance(end, int | np.integer):
        raise TypeError(f"end must be a sequence of tokens, got {end}; say end=[{end}]")
    valid = None if valid is None else as_valid(valid, tokens.shape)
    graph, state = nnx.split(model)
    cache = model.empty_cache(batch, needed if cache_length is None else cache_length)
    cache.step(length, valid)  # raises for a bad valid, which is traced in prefill
    if valid is not None and not checks.is_traced(valid) and not (has_token := np.asarray(valid).any(1)).all():
        raise ValueError(f"each prompt must have a token, but valid has none in row {int(has_token.argmin())}")
    if embeddings is None and not checks.is_traced(tokens) and not checks.is_traced(valid):
        given = np.asarray(tokens)[... if valid is None else np.asarray(valid)]
        if given.min() < 0 or given.max() >= vocab_size:
            raise ValueError(
                f"tokens must be from 0 to {vocab_size - 1}, got {given.min()} to {given.max()}: is the tokenizer that "
                "of the model?"
            )
    given = {"block_sequence_ids": block_sequence_ids, "embeddings": embeddings}
    if block_sequence_ids is not None:
        checks.fits_int32("block_sequence_ids", checks.array("block_sequence_ids", block_sequence_ids, "i", 2))
    images = {name: jnp.asarray(array) for name, array in given.items() if array is not None}
    valid = None if valid is None else jnp.asarray(valid)
    # Which rules of axes a program was traced with is not in the keys of JAX's cache.
    rules = axes.current_rules()
    prompts = jnp.asarray(tokens), valid, images
    mesh = jax.sharding.get_abstract_mesh()
    if not rules and AxisType.Explicit in mesh.axis_types:
        # Where the types put keys and values of prompts, so that they are written into the cache in place.
        like = jax.eval_shape(partial(prefill, graph), state, cache, *prompts)[1]
        cache = jax.tree.map(lambda x, to: axes.put(x, mesh, *to.sharding.spec), cache, like)
    logits, cache = prefill(graph, state, cache, *prompts, rules=rules)
    draw = None if not temperature else (key, jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))
    ends, top_k = _ends(end), None if top_k is None else min(int(top_k), vocab_size)
    how: Any = {"new": new, "top_k": top_k, "on_tokens": on_tokens, "rules": rules}
    return decode(graph, state, cache, logits, draw, ends, jnp.int32(pad), **how)[0]


def check_settings(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Check the settings of :func:`generate`, which needs no model.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a setting has the wrong type.
    """
    checks.integer("max_new_tokens", max_new_tokens, 1)
    if 0 < checks.real("temperature", temperature, 0) < checks.POSITIVE:
        raise ValueError(f"temperature must be 0 or fit a float32, got {temperature}")
    if top_k is not None:
        checks.integer("top_k", top_k, 1)
    if top_p is not None and not 0 < checks.real("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {checks.describe(top_p)}")


@partial(jax.jit, static_argnums=0, static_argnames="rules", donate_argnums=2)
def prefill(
    graph: nnx.GraphDef[Any],
    state: Weights,
    cache: Cache,
    tokens: Integer[Array, "batch length"],
    valid: Bool[Array, "batch length"] | None,
    images: dict[str, Any] | None = None,
    *,
    rules: axes.Current = (),
) -> tuple[Float[Array, "batch vocab"], Cache | None]:
    """The logits after each prompt, and the cache with the prompts.

    ``images`` are the arguments of the model that say where blocks and images are, by name. ``rules`` are those of
    axes, under which it is called.
    """
    logits, filled = nnx.merge(graph, state)(tokens, valid, cache=cache, last_only=True, **(images or {}))
    return logits[:, 0], filled


@partial(jax.jit, static_argnums=0, static_argnames=("new", "top_k", "on_tokens", "rules"), donate_argnums=2)
def decode(
    graph: nnx.GraphDef[Any],
    state: Weights,
    cache: Cache,
    logits: Float[Array, "batch vocab"],
    draw: Draw | None,
    ends: Int[Array, "ends"],
    pad: Int[Array, ""],
    *,
    new: int,
    top_k: int | None,
    on_tokens: OnTokens | None,
    rules: axes.Current = (),
) -> tuple[Generated, Cache | None]:
    """Choose a token by the logits and compute the logits after it, until all rows have ended.

    ``rules`` are those of axes, under which it is called.
    """

    def choose(i: Array, logits: Array, is_done: Array, tokens: Array) -> tuple[Array, Array, Array]:
        token = jnp.where(is_done, pad, _choose(logits, i, draw, top_k)).astype(jnp.int32)
        if on_tokens is not None:
            io_callback(on_tokens, None, token, ~is_done, ordered=True)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        return token, is_done | (token[:, None] == ends).any(1), tokens

    def body(carry: Carry) -> Carry:
        i, token, cache, is_done, lengths, tokens = carry
        logits, cache = nnx.merge(graph, state)(token[:, None], cache=cache)
        lengths = lengths + ~is_done
        token, is_done, tokens = choose(i, logits[:, 0], is_done, tokens)
        return i + 1, token, cache, is_done, lengths, tokens

    rows = partial(axes.rows_of, logits)
    token, is_done, tokens = choose(jnp.int32(0), logits, rows(value=False), rows(new, value=pad))
    carry = jnp.int32(1), token, cache, is_done, rows(value=jnp.int32(1)), tokens
    carry = lax.while_loop(lambda carry: (carry[0] < new) & ~carry[3].all(), body, carry)
    return Generated(carry[5], carry[4]), carry[2]


def _choose(logits: Float[Array, "batch vocab"], i: Array, draw: Draw | None, top_k: int | None) -> Int[Array, "batch"]:
    if draw is None:
        token = logits.argmax(-1)
    else:
        key, temperature, top_p = draw
        if (mesh := axes.explicit_mesh(logits)) is not None:
            logits = axes.put(logits, mesh, axes.spec(logits)[0])  # to sort them takes all of the vocabulary
        # By a small temperature a logit becomes infinite, and the difference to the largest one minus infinity at most.
        below = logits.astype(jnp.float32) - logits.max(-1, keepdims=True).astype(jnp.float32)
        token = jax.random.categorical(jax.random.fold_in(key, i), likely(below, temperature, top_k, top_p))
    return jnp.where(jnp.isnan(logits).any(-1), -1, token)


def likely(
    logits: Float[Array, "batch vocab"],
    temperature: Float[Array, ""] | float,
    top_k: int | None,
    top_p: Float[Array, ""] | float | None,
) -> Float[Array, "batch vocab"]:
    """The logits to draw from, float32, ``-inf`` for tokens that are not likely enough. The likeliest stays.

    Source: ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and ``TopPLogitsWarper`` in Transformers, in that order.
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        logits = jnp.where(logits < lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None:
        order = jnp.argsort(logits, axis=-1)
        sums = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1).cumsum(-1)
        keep = (sums > 1 - top_p).at[:, -1].set(True)
        # Back in the order of tokens. JAX has no scatter of rows that are sharded.
        keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), -1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits
