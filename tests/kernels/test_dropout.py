"""Dropout drops what its definition says: the pairs follow from the key and their indices alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

import jaxmask
from jaxmask import Causal
from jaxmask.kernels import blocked
from jaxmask.kernels.dropout import threefry
from tests.kernels.test_attention import MASKS, OFFSET, arrays_of, called, ours, written_out
from tests.oracles.attention import assert_close, defined

RATE = 0.3
KEY = jax.random.key(7)


def factor(key: Any, batch: int, heads: int, queries: int, keys: int) -> Any:
    """What each weight is multiplied by, pair by pair."""
    words = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
    q, kv = (np.asarray(x, np.uint32).ravel() for x in np.indices((queries, keys)))
    bits = np.empty((batch, heads, queries, keys), np.uint32)
    for b in range(batch):
        for h in range(heads):
            own = threefry_2x32(words, np.array([b, h], np.uint32))
            bits[b, h] = np.asarray(threefry_2x32(own, np.concatenate((q, kv))))[: q.size].reshape(queries, keys)
    return np.where(bits < round(RATE * 2**32), 0, 1 / (1 - RATE))


def test_random_bits_are_those_of_jax() -> None:
    words, x, y = np.random.default_rng(0).integers(0, 2**32, (3, 100), np.uint32)
    found = jnp.concatenate(threefry(words[:2], x, y))
    np.testing.assert_array_equal(found, threefry_2x32(jnp.asarray(words[:2]), jnp.concatenate((x, y))))


@ours
@pytest.mark.parametrize("name", ["packed", "heads"])
def test_output_and_gradients_are_defined(attend: Any, name: str) -> None:
    arrays, cotangent = arrays_of()
    arrays["sinks"] = jnp.array([0.0, 2.0, -30.0, 3.0])
    allowed = written_out(MASKS[name])
    dropped = factor(KEY, arrays["query"].shape[0], arrays["query"].shape[2], *allowed.shape[2:])
    expected = defined(allowed, cotangent, **arrays, dropout=dropped)
    found = called(attend, arrays, cotangent, mask=MASKS[name], offset=OFFSET, dropout_rate=RATE, dropout_rng=KEY)
    assert_close(found, expected, 2e-6)


@ours
def test_in_float64_what_is_kept_grows_in_float64(attend: Any) -> None:
    with jax.enable_x64(True):
        arrays, cotangent = arrays_of(dtype=jnp.float64)
        allowed = written_out(MASKS["packed"])
        dropped = factor(KEY, arrays["query"].shape[0], arrays["query"].shape[2], *allowed.shape[2:])
        how = {"mask": MASKS["packed"], "offset": OFFSET, "dropout_rate": RATE, "dropout_rng": KEY}
        found = called(attend, arrays, cotangent, **how)
    assert_close(found, defined(allowed, cotangent, **arrays, dropout=dropped), 1e-14)


def weights_of(attend: Any, keys: int, **how: Any) -> Any:
    """The weights of attention with dropout, relative to those without, ``[batch, q, heads, kv]``."""
    arrays, _ = arrays_of(keys, keys, dim_v=keys)
    value = jnp.broadcast_to(jnp.eye(keys)[None, :, None], arrays["value"].shape)
    attend = partial(attend, arrays["query"], arrays["key"], value)
    return np.asarray(attend(dropout_rate=RATE, dropout_rng=KEY, **how)) / np.asarray(attend(**how))


@pytest.mark.parametrize("block", [(8, 16), (40, 40), (7, 13), 33])
def test_every_tiling_drops_the_same_pairs(block: Any) -> None:
    found = weights_of(partial(blocked.attention, block=block), 40, mask=jaxmask.Full())
    expected = weights_of(partial(jaxmask.attention, implementation="xla"), 40)
    np.testing.assert_array_equal(found == 0, expected == 0)


def test_the_rate_and_the_mean_hold_to_the_last_ragged_tile() -> None:
    found = weights_of(partial(blocked.attention, block=(64, 64)), 150, mask=jaxmask.Full())
    for part in (found, found[:, 128:], found[..., 128:], found[:, 128:, :, 128:]):
        deviation = np.sqrt(RATE * (1 - RATE) / part.size)
        assert abs((part == 0).mean() - RATE) < 5 * deviation
        assert abs(part.mean() - 1) < 5 * deviation / (1 - RATE)


def test_examples_and_heads_drop_pairs_of_their_own_unless_they_are_told_to_share() -> None:
    own, shared = (weights_of(jaxmask.attention, 40, broadcast_dropout=yes) == 0 for yes in (False, True))
    assert (own != own[:1, :, :1]).any((1, 3))[1].all()
    assert (own != own[:1, :, :1]).any((1, 3))[0, 1:].all()
    assert (shared == shared[:1, :, :1]).all()


def test_a_raw_key_and_keys_of_every_generator_are_taken() -> None:
    arrays, _ = arrays_of()
    attend = partial(jaxmask.attention, **arrays, mask=Causal(), offset=OFFSET, dropout_rate=RATE)
    np.testing.assert_array_equal(
        attend(dropout_rng=jax.random.key(3, impl="threefry2x32")),
        attend(dropout_rng=jax.random.PRNGKey(3, impl="threefry2x32")),
    )
    assert attend(dropout_rng=jax.random.key(3, impl="rbg")).any()


def test_other_keys_compile_nothing() -> None:
    arrays, _ = arrays_of()
    attend = partial(jaxmask.attention, **arrays, mask=Causal(), offset=OFFSET, dropout_rate=RATE)
    traced: list[Any] = []
    step = jax.jit(lambda key: traced.append(key) or attend(dropout_rng=key))
    outs = [step(key) for key in jax.random.split(KEY, 3)]
    assert len(traced) == 1
    assert (outs[0] != outs[1]).any()
