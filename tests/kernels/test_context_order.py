"""Orders of tokens over devices: as even as any known one for the mask, and attention is that of the sequence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmask
from jaxmask import Causal, Full, Mask, Padding, Prefix, Segments, SlidingWindow, balanced_order, reorder, restore
from jaxmask.kernels.call import checked_call
from jaxmask.spmd.plan import Plan, plan_of
from tests.kernels.test_attention import TOLERANCE, arrays_of, quickly, with_gradients
from tests.kernels.test_context import SCHEMES, on_mesh
from tests.oracles.attention import assert_close, defined

LENGTH, SHARDS, BLOCK = 64, 4, 4
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 7, (2, LENGTH)), 1)
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "sliding": SlidingWindow(9),
    "documents": Causal() & Segments(IDS),
    "padding": Causal() & Padding(np.arange(LENGTH) < np.array([[50], [64]])),
    "sinks": SlidingWindow(9) | Causal() & Prefix(4),
    "full": Full(),
}


def zigzag(length: int, shards: int) -> Any:
    chunks = np.arange(length).reshape(2 * shards, -1)
    return np.concatenate([chunks[[i, 2 * shards - 1 - i]].reshape(-1) for i in range(shards)])


def striped(length: int, shards: int, block: int) -> Any:
    return np.arange(length).reshape(-1, shards, block).swapaxes(0, 1).reshape(-1)


def planned(mask: Mask, positions: Any, shards: int) -> Plan:
    x = jax.ShapeDtypeStruct((2, len(positions), 1, 8), jnp.float32)
    return plan_of(checked_call(x, x, x, mask, positions=positions), shards)


@given(st.sampled_from(list(MASKS)), st.sampled_from([2, 4, 8]))
def test_a_balanced_order_is_a_permutation_as_even_as_the_best_known(name: str, shards: int) -> None:
    mask, block = MASKS[name], LENGTH // shards // 8 or 1
    order = balanced_order(mask, LENGTH, shards, block=block)
    assert np.array_equal(np.sort(order), np.arange(LENGTH))
    known = np.arange(LENGTH), zigzag(LENGTH, shards), striped(LENGTH, shards, block)
    found = planned(mask, order, shards)
    assert found.imbalance <= min(planned(mask, positions, shards).imbalance for positions in known) + 1e-9
    assert found.fetched <= (shards - 1) * LENGTH // shards


def test_even_work_in_order_stays_in_order() -> None:
    np.testing.assert_array_equal(balanced_order(Full(), LENGTH, SHARDS), np.arange(LENGTH))


@pytest.mark.parametrize("seed", [1, 2, 7])
def test_documents_are_evened_without_fetching_all_keys(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(np.log(4096), 1, 99).astype(int).clip(64)
    ids = np.repeat(np.arange(99), lengths)[: 2**17][None]
    mask = Causal() & Segments(ids)
    orders = np.arange(2**17), zigzag(2**17, 8), striped(2**17, 8, 512)
    contiguous, halved, dealt = (planned(mask, positions, 8) for positions in orders)
    found = planned(mask, balanced_order(mask, 2**17, 8), 8)
    assert contiguous.imbalance > 1.5
    # In tiles of 128 tokens, though blocks are of 512.
    assert found.imbalance <= min(contiguous.imbalance, halved.imbalance, dealt.imbalance)
    assert found.imbalance < 1.05
    assert found.fetched < 0.8 * dealt.fetched


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("name", ["documents", "padding"])
def test_arrays_of_a_mask_are_read_by_position(name: str, as_array: Any) -> None:
    arrays, cotangent = arrays_of(LENGTH, LENGTH)
    order = zigzag(LENGTH, SHARDS)
    moved = {key: reorder(x, order) for key, x in arrays.items()}

    def attend(moved: Any) -> Any:
        return jaxmask.attention(**moved, mask=MASKS[name], positions=as_array(order))

    found = quickly(with_gradients, static_argnums=0)(attend, moved, reorder(cotangent, order))
    found = {key: restore(x, order) for key, x in found.items()}
    assert_close(
        found, defined(np.asarray(MASKS[name].dense(LENGTH, LENGTH)), cotangent, **arrays), TOLERANCE["float32"]
    )


@settings(max_examples=6)
@given(
    st.sampled_from(list(MASKS)),
    st.sampled_from([None, *SCHEMES]),
    st.sampled_from(["explicit", "told"]),
    st.sampled_from(["balanced", "zigzag", "traced"]),
)
def test_any_order_on_devices_is_the_sequence_in_order(name: str, scheme: Any, mode: str, kind: str) -> None:
    mask = MASKS[name]
    arrays, cotangent = arrays_of(LENGTH, LENGTH, kv_heads=4)
    order = zigzag(LENGTH, SHARDS) if kind == "zigzag" else balanced_order(mask, LENGTH, SHARDS, block=BLOCK)
    found = on_mesh(
        {key: reorder(x, order) for key, x in arrays.items()},
        reorder(cotangent, order),
        mode,
        spec=jax.sharding.PartitionSpec(None, "seq"),
        axes={"seq": SHARDS},
        mask=mask,
        positions=jnp.asarray(order) if kind == "traced" else order,
        context_parallel=scheme,
    )
    found = {key: restore(np.asarray(x), order) for key, x in found.items()}
    assert_close(found, defined(np.asarray(mask.dense(LENGTH, LENGTH)), cotangent, **arrays), TOLERANCE["float32"])


@given(st.permutations(range(6)), st.sampled_from([0, 1, -1]), st.sampled_from([np.asarray, jnp.asarray]))
def test_an_order_is_undone(order: list[int], axis: int, as_array: Any) -> None:
    x = RNG.integers(0, 9, (6, 6))
    moved = reorder(as_array(x), as_array(order), axis=axis)
    np.testing.assert_array_equal(moved, x.take(order, axis))
    np.testing.assert_array_equal(restore(moved, as_array(order), axis=axis), x)
