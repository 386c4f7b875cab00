"""Keys and values that are kept for the tokens to come: pytrees of static shape, which say where everything is.

A token at position ``p`` of its row is in slot ``p`` of a layer that keeps all, and in slot ``p % window`` of a layer
with a window, which is a ring buffer. Padding has no slot. So the number of tokens in each row says what is where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxmask import checks
from jaxmask.dispatch import attention
from jaxmask.mask import Mask
from jaxmask.masks import Window


class Seen(NamedTuple):
    """What the queries of a step may attend to, as :func:`jaxmask.attention` takes it.

    Args:
        key, value: ``[batch, kv, kv_heads, dim]``.
        offset: int32 ``[batch]``, the position of the first query of the step.
        key_positions: int32 ``[batch, kv]``, negative where there is no token.
    """

    key: Float[Array, "batch kv kv_heads dim"]
    value: Float[Array, "batch kv kv_heads dim"]
    offset: Int[Array, "batch"]
    key_positions: Int[Array, "batch kv"]


@partial(jax.tree_util.register_dataclass, data_fields=("offset", "before", "after", "fits"), meta_fields=("count",))
@dataclass(frozen=True, eq=False)
class Step:
    """Where the new tokens of a step are, in every layer. :meth:`Cache.step` makes it.

    Args:
        count: how many new tokens each row is given, padding included; static.
        offset: int32 ``[batch]``, the position of the first of them. Negative where a row begins with padding.
        before, after: int32 ``[batch]``, how many tokens a row has before and after the step, padding not included.
        fits: bool ``[batch]``, whether the row has room for them. A compiled program cannot raise: where it has none,
            what :meth:`LayerCache.attend` returns is NaN, and nothing subtly wrong.
    """

    count: int
    offset: Int[Array, "batch"]
    before: Int[Array, "batch"]
    after: Int[Array, "batch"]
    fits: Bool[Array, "batch"]

    @property
    def positions(self) -> Int[Array, "batch q"]:
        """The position of each new token, as rotary embeddings take it; that of padding is of no consequence."""
        return self.offset[:, None] + np.arange(self.count, dtype=np.int32)

    def is_new(self, positions: Int[Array, "batch kv"]) -> Bool[Array, "batch kv"]:
        """Whether these are positions of tokens of the step."""
        return (positions >= self.before[:, None]) & (positions < self.after[:, None])

    def or_nan(self, array: Float[Array, "batch q heads dim"]) -> Float[Array, "batch q heads dim"]:
        """NaN in the rows that have no room."""
        return jnp.where(self.fits[:, None, None, None], array, jnp.nan)

    def end(self, layers: "Sequence[LayerCache]") -> "Cache":
        """The cache after the step, of the layers as :meth:`LayerCache.attend` returned them."""
        return Cache(tuple(layers), self.after)


@partial(jax.tree_util.register_dataclass, data_fields=("key", "value"), meta_fields=("is_ring",))
@dataclass(frozen=True, eq=False)
class LayerCache:
    """The keys and values of one layer.

    Args:
        key, value: ``[batch, slots, kv_heads, dim]``.
        is_ring: whether a new token takes the slot of the oldest one.
    """

    key: Float[Array, "batch slots kv_heads dim"]
    value: Float[Array, "batch slots kv_heads dim"]
    is_ring: bool

    def positions(self, tokens: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """The position of what is in each slot when rows have that many tokens; negative where there is nothing."""
        slots, last = self.key.shape[1], tokens[:, None] - 1
        return last - (last - np.arange(slots, dtype=np.int32)) % slots

    def update(
        self, step: Step, key: Float[Array, "batch q kv_heads dim"], value: Float[Array, "batch q kv_heads dim"]
    ) -> "tuple[LayerCache, Seen]":
        """Store the new keys and values.

        Returns:
            The layer with them, and all that the queries of the step may attend to: of a ring that takes many tokens at
            once, also those whose slots are taken by the end of the step.

        Raises:
            ValueError: the shapes do not fit the cache.
            TypeError: nor do the dtypes.
        """
        for name, new, kept in (("key", key, self.key), ("value", value, self.value)):
            checks.array(name, new, "f", 4)
            wanted = (kept.shape[0], step.count, *kept.shape[2:])
            if new.shape != wanted:
                raise ValueError(
                    f"{name} must be [batch, q, kv_heads, dim] = {list(wanted)}, one for each token of the step and as "
                    f"the cache was made, got {checks.describe(new)}"
                )
            if new.dtype != kept.dtype:
                raise TypeError(
                    f"{name} must have the dtype of the cache, {kept.dtype}, got {checks.describe(new)}; give "
                    "Cache.empty the dtype of the model"
                )
        after = LayerCache(self._write(step, self.key, key), self._write(step, self.value, value), self.is_ring)
        if not self.is_ring or step.count == 1:
            return after, Seen(after.key, after.value, step.offset, self.positions(step.after))
        new = jnp.where(step.is_new(step.positions), step.positions, -1)
        return after, Seen(
            jnp.concatenate((self.key, step.or_nan(key)), 1),
            jnp.concatenate((self.value, step.or_nan(value)), 1),
            step.offset,
            jnp.concatenate((self.positions(step.before), new), 1),
        )

    def _write(self, step: Step, kept: Any, new: Any) -> Any:
        """``kept`` with ``new`` in the slots of its tokens."""
        slots, count = kept.shape[1], step.count
        if self.is_ring and count > 1:
            start, window, positions = None, kept, self.positions(step.after)
        else:  # only as many slots are touched as there are new tokens
            start = step.before % slots if self.is_ring else jnp.clip(step.before, 0, slots - count)
            window = jax.vmap(partial(lax.dynamic_slice_in_dim, slice_size=count))(kept, start)
            first = step.before if self.is_ring else start
            positions = first[:, None] + np.arange(count, dtype=np.int32)
        index = jnp.clip(positions - step.offset[:, None], 0, count - 1)
        new = jnp.take_along_axis(new, index[..., None, None], 1)
        window = step.or_nan(jnp.where(step.is_new(positions)[..., None, None], new, window))
        if start is None:
            return window
        return jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=0))(kept, window, start)

    def attend(
        self,
        step: Step,
        query: Float[Array, "batch q heads dim"],
        key: Float[Array, "batch q kv_heads dim"],
        value: Float[Array, "batch q kv_heads dim"],
        mask: Mask,
        **how: Any,
    ) -> tuple[Float[Array, "batch q heads dim"], "LayerCache"]:
        """Store the new keys and values, and attend to all that are kept: :meth:`update`, and then ``attention``.

        Args:
            step: from :meth:`Cache.step`.
            query, key, value: of the new tokens.
            mask: which keys a query attends to, in positions; padding and empty slots are never among them, and in a
                ring nothing before its window, be it still at hand.
            how: ``bias``, ``scale``, ``logits_soft_cap``, ``implementation`` of :func:`jaxmask.attention`.

        Returns:
            The output, and the layer with the new keys and values.
        """
        after, seen = self.update(step, key, value)
        if self.is_ring:
            mask = mask & Window(self.key.shape[1] - 1, None)
        out = attention(query, seen.key, seen.value, mask, offset=seen.offset, key_positions=seen.key_positions, **how)
        return step.or_nan(out), after


@partial(jax.tree_util.register_dataclass, data_fields=("layers", "tokens"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Cache:
    """The keys and values of all layers of a model. :meth:`empty` makes it; each step gives another, of the same shape.

    Args:
        layers: one for each layer.
        tokens: int32 ``[batch]``, how many tokens each row has, padding not included.

    >>> import jaxmask
    >>> cache = Cache.empty(2, 8, layers=[None, 4], kv_heads=1, dim=4)  # one layer that keeps all, one with a window
    >>> masks = jaxmask.Causal(), jaxmask.SlidingWindow(4)
    >>> def run(cache, x, valid=None):
    ...     step = cache.step(x.shape[1], valid)
    ...     layers = []
    ...     for layer, mask in zip(cache.layers, masks):
    ...         x, layer = layer.attend(step, x, x, x, mask)
    ...         layers.append(layer)
    ...     return x, step.end(layers)
    >>> prompts = jnp.array([[False, False, True], [True, True, True]])  # padded on the left
    >>> out, cache = run(cache, jnp.ones((2, 3, 1, 4)), prompts)
    >>> out, cache = run(cache, jnp.ones((2, 1, 1, 4)))
    >>> cache.tokens.tolist()
    [2, 4]
    """

    layers: tuple[LayerCache, ...]
    tokens: Int[Array, "batch"]

    @staticmethod
    def empty(
        batch: int,
        length: int,
        *,
        layers: Sequence[int | None],
        kv_heads: int,
        dim: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "Cache":
        """A cache without tokens.

        Args:
            batch: the number of rows.
            length: how many tokens a row may have.
            layers: for each layer its window, the number of keys that a query may look back on, itself included; or
                ``None`` for all. A layer whose window is shorter than ``length`` is a ring, and never full.
            kv_heads, dim: of key and value.
            dtype: of key and value.

        Raises:
            TypeError, ValueError: a size is not an integer of at least 1.
        """
        batch, length = checks.integer("batch", batch, 1), checks.integer("length", length, 1)
        kv_heads, dim = checks.integer("kv_heads", kv_heads, 1), checks.integer("dim", dim, 1)
        if not layers:
            raise ValueError("layers must give the window of each layer, or None for one that keeps all, got none")
        slots = [length if each is None else min(checks.integer("layers", each, 1), length) for each in layers]
        dtype = checks.float_dtype(dtype)
        shapes = [(batch, each, kv_heads, dim) for each in slots]
        # Arrays of their own, so that they can be donated.
        kept = [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), shape[1] < length) for shape in shapes]
        return Cache(tuple(kept), jnp.zeros(batch, jnp.int32))

    def step(self, count: int, valid: Bool[Array | np.ndarray, "batch q"] | None = None) -> Step:
        """Begin a step of ``count`` new tokens for each row.

        Args:
            count: how many, padding included; static.
            valid: which of them are tokens and no padding; ``None`` for all. Padding may be on either side, and differ
                from row to row. Between two tokens of a row there is none.

        Raises:
            ValueError: there is no room, or padding between tokens, as far as is known when the program is traced.
            TypeError: ``valid`` is not bool.
        """
        count, batch = checks.integer("count", count, 1), len(self.tokens)
        before, offset, new, fits = self.tokens, self.tokens, count, jnp.ones(batch, bool)
        if valid is not None:
            check_valid(valid, (batch, count))
            new, padding, fits = consecutive(valid)
            offset = before - padding
        after = before + new
        room = min((layer.key.shape[1] for layer in self.layers if not layer.is_ring), default=None)
        if room is not None:
            most = count if checks.is_traced(after) else max(count, int(after.max()))
            if most > room:
                raise ValueError(
                    f"the cache has room for {room} tokens in a row, got {count} new ones, which would make {most}: "
                    "make it with a greater length"
                )
            fits = fits & (after <= room)
        return Step(count, offset, before, after, fits)


def check_valid(valid: Any, shape: tuple[int, ...]) -> None:
    """Refuse what does not say of each of ``[batch, q]`` tokens whether it is one."""
    if checks.array("valid", valid, "b", 2).shape != shape:
        raise ValueError(
            f"valid must say of each of {' x '.join(map(str, shape))} tokens whether it is one, got "
            f"{checks.describe(valid)}"
        )


def consecutive(valid: Any) -> tuple[Any, Any, Any]:
    """Of each row the number of tokens, the padding before them, and whether there is none between them.

    Raises:
        ValueError: there is, as far as is known when the program is traced.
    """
    # In NumPy where it is known, so that it can be refused in the middle of a trace.
    valid = valid if checks.is_traced(valid) else np.asarray(valid)
    count, padding = valid.sum(1, dtype=np.int32), valid.argmax(1).astype(np.int32)
    index = np.arange(valid.shape[1]) - padding[:, None]
    fits = (valid == ((index >= 0) & (index < count[:, None]))).all(1)
    if not checks.is_traced(fits) and not fits.all():
        raise ValueError(
            f"valid must have padding before or after the tokens of a row, not between them, got {valid!r}"
        )
    return count, padding, fits
