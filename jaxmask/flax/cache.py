"""A cache of keys and values: a pytree of static shape that knows the position of every key it holds.

A layer that keeps all keys holds the token at position ``p`` in slot ``p``. A layer with a window is a ring buffer and
holds it in slot ``p % window``. Padding takes no slot. So the number of tokens in a row tells what each slot holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, SupportsIndex, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer

from jaxmask import checks, serialization
from jaxmask.dispatch import Implementation, Sharding, attention
from jaxmask.kernels.call import Arguments
from jaxmask.mask import Mask
from jaxmask.masks import Window

Valid = Bool[Array | np.ndarray, "batch q"] | Integer[Array | np.ndarray, "batch q"]


class KeysAndValues(NamedTuple):
    """The keys and values that the queries of a step may attend to, as :func:`jaxmask.attention` takes them.

    Args:
        key, value: ``[batch, kv, kv_heads, dim]``.
        offset: int32 ``[batch]``, the position of the first query of the step.
        key_positions: int32 ``[batch, kv]``, negative for an empty slot.
    """

    key: Float[Array, "batch kv kv_heads dim"]
    value: Float[Array, "batch kv kv_heads dim"]
    offset: Int[Array, "batch"]
    key_positions: Int[Array, "batch kv"]


Seen = KeysAndValues  # the name it had before


class _Pytree:
    """The base of dataclasses that JAX also builds from shapes, whose fields a run-time type checker must not check."""

    __no_type_check__ = True


@partial(jax.tree_util.register_dataclass, data_fields=("offset", "before", "after", "fits"), meta_fields=("count",))
@dataclass(frozen=True, eq=False)
class Step(_Pytree):
    """The positions of the new tokens of a step, the same in every layer. :meth:`Cache.step` makes it.

    Args:
        count: the number of new tokens in each row, padding included; static.
        offset: int32 ``[batch]``, the position of the first of them; negative where a row begins with padding.
        before, after: int32 ``[batch]``, the number of tokens in each row before and after the step, without padding.
        fits: bool ``[batch]``, whether the row has room for them. A compiled program cannot raise, so
            :meth:`LayerCache.attend` returns NaN for a row without room.
    """

    count: int
    offset: Int[Array, "batch"]
    before: Int[Array, "batch"]
    after: Int[Array, "batch"]
    fits: Bool[Array, "batch"]

    @property
    def positions(self) -> Int[Array, "batch q"]:
        """The position of each new token, for rotary embeddings. At padding it means nothing."""
        return self.offset[:, None] + np.arange(self.count, dtype=np.int32)[None]

    def is_new(self, positions: Int[Array, "batch kv"]) -> Bool[Array, "batch kv"]:
        """Whether each position is that of a token of this step."""
        return (positions >= self.before[:, None]) & (positions < self.after[:, None])

    def or_nan(self, array: Float[Array, "batch *rest"]) -> Float[Array, "batch *rest"]:
        """The array, with NaN in the rows without room."""
        return jnp.where(jnp.expand_dims(self.fits, tuple(range(1, array.ndim))), array, jnp.nan)

    def end(self, layers: "Sequence[LayerCache]") -> "Cache":
        """The cache after the step, made of the layers that :meth:`LayerCache.attend` returned."""
        return Cache(tuple(layers), self.after)


@partial(jax.tree_util.register_dataclass, data_fields=("key", "value"), meta_fields=("is_ring",))
@dataclass(frozen=True, eq=False)
class LayerCache(_Pytree):
    """The keys and values of one layer.

    Args:
        key, value: ``[batch, slots, kv_heads, dim]``.
        is_ring: whether a new token takes the slot of the oldest one.
    """

    key: Float[Array, "batch slots kv_heads dim"]
    value: Float[Array, "batch slots kv_heads dim"]
    is_ring: bool

    def positions(self, tokens: Int[Array, "batch"]) -> Int[Array, "batch slots"]:
        """The position of the key in each slot once a row has ``tokens`` tokens; negative for an empty slot."""
        slots, last = self.key.shape[1], tokens[:, None] - 1
        return last - (last - np.arange(slots, dtype=np.int32)[None]) % slots

    def update(
        self, step: Step, key: Float[Array, "batch q kv_heads dim"], value: Float[Array, "batch q kv_heads dim"]
    ) -> tuple["LayerCache", KeysAndValues]:
        """Store the new keys and values.

        Returns:
            The layer with them, and what the queries of the step may attend to. A ring that takes several tokens at
            once overwrites keys that the first of them still attend to. Those keys are included.

        Raises:
            ValueError: the shapes do not fit the cache.
            TypeError: the dtypes do not fit the cache.
        """
        for name, new, old in (("key", key, self.key), ("value", value, self.value)):
            checks.array(name, new, "f", 4)
            shape = (old.shape[0], step.count, *old.shape[2:])
            if new.shape != shape:
                raise ValueError(
                    f"{name} must be [batch, q, kv_heads, dim] = {list(shape)}, for the tokens of the step and the "
                    f"heads of the cache, got {checks.describe(new)}"
                )
            if new.dtype != old.dtype:
                raise TypeError(
                    f"{name} must have the dtype of the cache, {old.dtype}, got {checks.describe(new)}; give "
                    "Cache.empty the dtype of the model"
                )
        layer = LayerCache(self._write(step, self.key, key), self._write(step, self.value, value), self.is_ring)
        if not self.is_ring or step.count == 1:
            return layer, KeysAndValues(layer.key, layer.value, step.offset, self.positions(step.after))
        positions = jnp.where(step.is_new(step.positions), step.positions, -1)
        return layer, KeysAndValues(
            jnp.concatenate((self.key, step.or_nan(key)), 1),
            jnp.concatenate((self.value, step.or_nan(value)), 1),
            step.offset,
            jnp.concatenate((self.positions(step.before), positions), 1),
        )

    def _write(
        self, step: Step, old: Float[Array, "batch slots kv_heads dim"], new: Float[Array, "batch q kv_heads dim"]
    ) -> Float[Array, "batch slots kv_heads dim"]:
        """``old`` with ``new`` in the slots of its tokens."""
        slots, count = old.shape[1], step.count
        if self.is_ring and count > 1:
            start, window, positions = None, old, self.positions(step.after)
        else:  # touch only as many slots as there are new tokens
            start = step.before % slots if self.is_ring else jnp.clip(step.before, 0, slots - count)
            window = jax.vmap(partial(lax.dynamic_slice_in_dim, slice_size=count))(old, start)
            first = step.before if self.is_ring else start
            positions = first[:, None] + np.arange(count, dtype=np.int32)[None]
        index = jnp.clip(positions - step.offset[:, None], 0, count - 1)
        new = jnp.take_along_axis(new, index[..., None, None], 1)
        window = step.or_nan(jnp.where(step.is_new(positions)[..., None, None], new, window))
        if start is None:
            return window
        return jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=0))(old, window, start)

    def attend(
        self,
        step: Step,
        query: Float[Array, "batch q heads dim"],
        key: Float[Array, "batch q kv_heads dim"],
        value: Float[Array, "batch q kv_heads dim"],
        mask: Mask,
        *,
        sharding: Sharding | None = None,
        implementation: Implementation | None = None,
        **arguments: Unpack[Arguments],
    ) -> tuple[Any, "LayerCache"]:
        """Store the new keys and values, then attend to all that the layer holds.

        Args:
            step: from :meth:`Cache.step`.
            query, key, value: of the new tokens.
            mask: the keys that a query attends to, by position. Padding, empty slots, and in a ring all keys before the
                window are left out.
            sharding, implementation: as in :func:`jaxmask.attention`.
            **arguments: the others of :func:`jaxmask.attention`, but ``offset`` and ``key_positions``, which the cache
                knows. ``query_positions`` are those of new tokens that do not follow each other.

        Returns:
            What :func:`jaxmask.attention` returns, and the layer with the new keys and values.

        Raises:
            ValueError, TypeError: as in :meth:`update` and :func:`jaxmask.attention`.
        """
        for name in ("offset", "key_positions"):
            if name in arguments:
                raise ValueError(f"{name} must be left out, for the cache knows it")
        if checks.array("query", query, "f", 4).shape[1] != step.count:
            raise ValueError(f"query must have the {step.count} tokens of the step, got {checks.describe(query)}")
        layer, keys = self.update(step, key, value)
        mask = mask & Window(self.key.shape[1] - 1, None) if self.is_ring else mask
        if arguments.get("query_positions") is None:
            arguments["offset"] = keys.offset
        arguments["key_positions"] = keys.key_positions
        attend: Any = attention
        how = {"sharding": sharding, "implementation": implementation, **arguments}
        result = attend(query, keys.key, keys.value, mask, **how)
        return jax.tree.map(step.or_nan, result), layer


@partial(jax.tree_util.register_dataclass, data_fields=("layers", "tokens"), meta_fields=())
@dataclass(frozen=True, eq=False)
class Cache(_Pytree):
    """The keys and values of all layers of a model. Each step returns another cache, of the same shape.

    Args:
        layers: one for each layer of the model.
        tokens: int32 ``[batch]``, the number of tokens in each row, without padding.

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
        batch: SupportsIndex,
        length: SupportsIndex,
        *,
        layers: Sequence[SupportsIndex | None] | Int[np.ndarray, "layers"],
        kv_heads: SupportsIndex,
        dim: SupportsIndex,
        dtype: DTypeLike = jnp.float32,
    ) -> "Cache":
        """A cache without tokens.

        Args:
            batch: the number of rows.
            length: the number of tokens that a row has room for.
            layers: the window of each layer: the number of keys that a query may look back on, itself included, or
                ``None`` for all. A layer whose window is shorter than ``length`` is a ring, and is never full.
            kv_heads, dim: the number and the size of the heads of key and value.
            dtype: of key and value.

        Raises:
            TypeError: a size is not a Python or NumPy integer.
            ValueError: a size is less than 1, or there is no layer.
        """
        batch, length = checks.integer("batch", batch, 1), checks.integer("length", length, 1, checks.MOST_POSITIONS)
        heads = checks.integer("kv_heads", kv_heads, 1), checks.integer("dim", dim, 1)
        if not isinstance(layers, Sequence | np.ndarray) or isinstance(layers, str):
            raise TypeError(f"layers must be a sequence of windows, one for each layer, got {checks.describe(layers)}")
        dtype, windows = checks.float_dtype(dtype), tuple(layers)
        if not windows:
            raise ValueError("layers must give the window of each layer, or None for one that keeps all, got none")
        empty: list[LayerCache] = []
        for i, window in enumerate(windows):
            slots = length if window is None else min(checks.integer(f"layers[{i}]", window, 1), length)
            # Two arrays, for one cannot be donated twice.
            key, value = (jnp.zeros((batch, slots, *heads), dtype) for _ in range(2))
            empty.append(LayerCache(key, value, is_ring=slots < length))
        return Cache(tuple(empty), jnp.zeros(batch, jnp.int32))

    def step(self, count: SupportsIndex, valid: Valid | None = None) -> Step:
        """Begin a step of ``count`` new tokens in each row.

        Args:
            count: the number of new tokens, padding included; static.
            valid: bool or 0/1, true for tokens, false for padding; ``None`` if there is no padding. Padding may be on
                either side of a row's tokens, but not between them, and may differ from row to row. Where integers are
                traced, all but 0 are true.

        Raises:
            ValueError: a row has no room, or has padding between tokens. What is traced cannot be refused: that row
                becomes NaN. Integers of ``valid`` are other than 0 and 1.
            TypeError: ``valid`` is neither bool nor integer, or ``count`` is not an integer.
        """
        count, batch = checks.integer("count", count, 1), len(self.tokens)
        offset, new, fits = self.tokens, count, jnp.ones(batch, bool)
        if valid is not None:
            new, padding, is_consecutive = consecutive(as_valid(valid, (batch, count)))
            offset, fits = offset - padding, jnp.asarray(is_consecutive)
        after = self.tokens + new
        room = min((layer.key.shape[1] for layer in self.layers if not layer.is_ring), default=None)
        if room is not None:
            most = count if checks.is_traced(after) else max(count, int(after.max()))
            if most > room:
                raise ValueError(
                    f"the cache has room for {room} tokens in a row, got {count} new ones, which would make {most}; "
                    "give Cache.empty a greater length"
                )
            fits = fits & (after <= room)
        return Step(count, offset, self.tokens, after, fits)


export.register_namedtuple_serialization(KeysAndValues, serialized_name="jaxmask.flax.cache.KeysAndValues")
serialization.register_dataclass(Cache, data_fields=("layers", "tokens"), meta_fields=())
serialization.register_dataclass(LayerCache, data_fields=("key", "value"), meta_fields=("is_ring",))
serialization.register_dataclass(Step, data_fields=("offset", "before", "after", "fits"), meta_fields=("count",))


def as_valid(valid: Valid, shape: tuple[int, ...]) -> Bool[Array | np.ndarray, "batch q"]:
    """``valid`` as bools; an error for anything but a bool or 0/1 ``[batch, q]`` array of this shape."""
    if checks.array("valid", valid, "bi", 2, hint="; it is 1 for tokens and 0 for padding").shape != shape:
        raise ValueError(
            f"valid must be [batch, q] = {list(shape)}, true for tokens and false for padding, got "
            f"{checks.describe(valid)}"
        )
    is_known = valid.dtype != np.bool_ and not checks.is_traced(valid)
    return checks.bools("valid", np.asarray(valid) if is_known else valid)


def consecutive(
    valid: Bool[Array | np.ndarray, "batch q"],
) -> tuple[Int[Array | np.ndarray, "batch"], Int[Array | np.ndarray, "batch"], Bool[Array | np.ndarray, "batch"]]:
    """The number of tokens in each row, the amount of padding before them, and whether no padding is between them.

    Raises:
        ValueError: padding is known to be between tokens.
    """
    # NumPy computes at trace time, so that a known array is refused inside a jit, too.
    valid = valid if checks.is_traced(valid) else np.asarray(valid)
    count, padding = valid.sum(1, dtype=np.int32), valid.argmax(1).astype(np.int32)
    index = np.arange(valid.shape[1], dtype=np.int32)[None] - padding[:, None]
    fits = (valid == ((index >= 0) & (index < count[:, None]))).all(1)
    if not checks.is_traced(fits) and not fits.all():
        raise ValueError(
            f"valid must have padding before or after the tokens of a row, not between them, got {valid!r}"
        )
    return count, padding, fits
