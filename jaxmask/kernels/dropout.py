"""Which pairs of a query and a key dropout drops: a function of a key and the indices of the pair, whatever the tiling.

The random bits are those of Threefry-2x32 with 20 rounds, JAX's default generator (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405): the key is that of the example and the head, and the counter is the pair.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, UInt32

from jaxmask.indices import Index, lookup

_FIRST = np.int32(0)
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "first_example", "first_head", "first_query", "keys"),
    meta_fields=("rate", "is_shared"),
)
@dataclass(frozen=True, eq=False)
class Dropout:
    """Dropout of attention weights. A pytree.

    Args:
        key: the seed, uint32 ``[2]``.
        rate: the probability that a pair is dropped; static.
        is_shared: whether all examples and heads drop the same pairs; static.
        first_example, first_head, first_query: what the indices of examples, heads and queries are counted from, in a
            shard.
        keys: the index of each key in the whole, int32 ``[kv]``, in a shard that has not all of them in order.
    """

    key: Any
    rate: float
    is_shared: bool
    first_example: Any = _FIRST
    first_head: Any = _FIRST
    first_query: Any = _FIRST
    keys: Any = None

    def factor(self, dtype: DTypeLike, b: Index, h: Index, q: Index, kv: Index) -> Float[Array, "..."]:
        """0 where the pair of these indices is dropped, else ``1 / (1 - rate)``."""
        key: Any = self.key
        if not self.is_shared:
            key = threefry(key, b + self.first_example, h + self.first_head)
        kv = kv if self.keys is None else lookup(self.keys, kv=kv)
        bits = threefry(key, q + self.first_query, kv)[0]
        threshold = jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(bits < threshold, 0, jnp.asarray(1 / (1 - self.rate), dtype))


def threefry(key: Any, x: Any, y: Any) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Two words of random bits for each counter ``(x, y)``, by Threefry-2x32."""
    schedule = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    x, y = (jnp.asarray(word).astype(jnp.uint32) for word in (x, y))
    x, y = x + schedule[0], y + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (y << jnp.uint32(rotation) | y >> jnp.uint32(32 - rotation))
        x, y = x + schedule[(group + 1) % 3], y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y
