"""A cache of keys and values: a pytree of static shape that knows the position of every key it holds.

A layer that keeps all keys holds the token at position ``p`` in slot ``p``. A layer with a window is a ring buffer and
holds it in slot ``p % window``. Padding takes no slot. So the number of tokens in a row tells what each slot holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, SupportsIndex, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Integer

from jaxmask import checks, serialization, spmd
from jaxmask.dispatch import Implementation, Sharding, attention
from jaxmask.indices import Index
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


# Keys and values.
_Pair = tuple[Array, Array]


class _Division(NamedTuple):
    """How the slots of a layer are divided over devices.

    Args:
        mesh: the devices.
        examples, axes, heads: the axes of the mesh that divide rows, slots and heads.
        shards: how many devices divide the slots.
    """

    mesh: Any
    examples: tuple[str, ...] | None
    axes: tuple[str, ...]
    heads: tuple[str, ...] | None
    shards: int

    def run(self, store: Any, *arguments: Any) -> Any:
        """Call a function of a step, slots and new tokens on each device. Both trees that it returns are as slots."""
        of_slots, of_new = (PartitionSpec(self.examples, axes, self.heads) for axes in (self.axes, None))
        specs = [PartitionSpec(self.examples), of_slots, of_new]
        return spmd.on_devices(store, self.mesh, specs, (of_slots, of_slots), list(arguments))


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
        return self._positions(tokens, np.arange(self.key.shape[1], dtype=np.int32)[None])

    def _positions(self, tokens: Int[Array, "batch"], slots: Index) -> Int[Array, "batch some"]:
        """The positions of the keys in some of the slots."""
        last = tokens[:, None] - 1
        return last - (last - slots) % self.key.shape[1]

    def update(
        self,
        step: Step,
        key: Float[Array, "batch q kv_heads dim"],
        value: Float[Array, "batch q kv_heads dim"],
        *,
        sharding: Sharding | None = None,
    ) -> tuple["LayerCache", KeysAndValues]:
        """Store the new keys and values.

        Args:
            step: from :meth:`Cache.step`.
            key, value: of the new tokens.
            sharding: that of the layer, where it divides the slots over the devices of a mesh whose axes are automatic.
                Each device then writes the slots that it has. Explicit axes need it not.

        Returns:
            The layer with them, and what the queries of the step may attend to. A ring that takes several tokens at
            once overwrites keys that the first of them still attend to. Those keys are included. Where slots are
            divided, each device has a share of the new keys after its own.

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
        division = self._division(sharding)
        shards = 1 if division is None else division.shards
        # Each device has as many of the new keys.
        padding = -step.count % shards

        def store(step: Step, old: _Pair, new: _Pair) -> tuple[_Pair, _Pair]:
            """The slots of a device, and the keys that it attends to."""
            shard = 0 if division is None else lax.axis_index(division.axes)
            written = jax.tree.map(partial(self._write, step, shard), old, new)
            if not self._sees_overwritten(step):
                return written, written
            share = (step.count + padding) // shards

            def beside(old: Array, new: Array) -> Array:
                new = jnp.pad(step.or_nan(new), ((0, 0), (0, padding), (0, 0), (0, 0)))
                return jnp.concatenate((old, lax.dynamic_slice_in_dim(new, shard * share, share, 1)), 1)

            return written, jax.tree.map(beside, old, new)

        arguments = step, (self.key, self.value), (key, value)
        stored, (key, value) = store(*arguments) if division is None else division.run(store, *arguments)
        layer = LayerCache(stored[0], stored[1], self.is_ring)
        if not self._sees_overwritten(step):
            return layer, KeysAndValues(key, value, step.offset, self.positions(step.after))
        positions = jnp.where(step.is_new(step.positions), step.positions, -1)
        positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
        parts = [x.reshape(len(x), shards, -1) for x in (self.positions(step.before), positions)]
        return layer, KeysAndValues(key, value, step.offset, jnp.concatenate(parts, 2).reshape(len(positions), -1))

    def _division(self, sharding: Sharding | None) -> "_Division | None":
        """How the slots are divided over devices; ``None`` where they are not."""
        found = spmd.division_of(self.key, sharding)
        if found is None or not found[1][1]:
            return None
        mesh, axes = found
        sizes = [math.prod(mesh.shape[axis] for axis in of_axis) for of_axis in axes]
        for what, argument, size, shards in zip(
            ("rows", "slots"), ("batch", "length"), self.key.shape, sizes, strict=False
        ):
            if size % shards:
                raise ValueError(
                    f"the {size} {what} of the layer do not divide over {shards} devices: leave them whole, as the "
                    f"slots of a window may be, or give Cache.empty a {argument} that does"
                )
        # Where the heads of keys do not divide, every device has all of them.
        heads = axes[2] if self.key.shape[2] % sizes[2] == 0 else ()
        return _Division(mesh, axes[0] or None, axes[1], heads or None, sizes[1])

    def _sees_overwritten(self, step: Step) -> bool:
        """Whether queries of the step attend to keys that its tokens overwrite."""
        return self.is_ring and step.count > 1

    def _write(
        self,
        step: Step,
        shard: Any,
        old: Float[Array, "batch own kv_heads dim"],
        new: Float[Array, "batch q kv_heads dim"],
    ) -> Float[Array, "batch own kv_heads dim"]:
        """``old``, the slots of this shard, with ``new`` in those of its tokens."""
        size, count = old.shape[1], step.count
        first = shard * np.int32(size)
        if count >= size or self._sees_overwritten(step):
            start, window = None, old
            positions = self._positions(step.after, first + np.arange(size, dtype=np.int32)[None])
        else:  # touch only as many slots as there are new tokens
            slot = step.before % self.key.shape[1] if self.is_ring else step.before
            start = jnp.clip(slot - first, 0, size - count)
            window = jax.vmap(partial(lax.dynamic_slice_in_dim, slice_size=count))(old, start)
            positions = (step.before - slot + first + start)[:, None] + np.arange(count, dtype=np.int32)[None]
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

        The slots of a layer may be divided over the devices of a mesh, and the queries be whole. No key is sent then:
        each device writes the slots that it has and attends to them, and what they find is merged.

        Args:
            step: from :meth:`Cache.step`.
            query, key, value: of the new tokens.
            mask: the keys that a query attends to, by position. Padding, empty slots, and in a ring all keys before the
                window are left out.
            sharding: that of the layer, ``P("data", "seq", "model")`` for its rows, its slots and its heads, where the
                axes of the mesh are automatic.
            implementation: as in :func:`jaxmask.attention`.
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
        layer, keys = self.update(step, key, value, sharding=sharding)
        mask = mask & Window(self.key.shape[1] - 1, None) if self.is_ring else mask
        if arguments.get("query_positions") is None:
            arguments["offset"] = keys.offset
        arguments["key_positions"] = keys.key_positions
        attend: Any = attention
        how = {"sharding": sharding, "implementation": implementation, **arguments}
        if sharding is not None and self._division(sharding) is not None:
            how["context_parallel"] = "merge"
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
