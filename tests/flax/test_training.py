"""Training on packed documents is training on the documents one by one, in PyTorch."""

# pyright: reportMissingTypeStubs=false

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import jaxmask
from jaxmask import Segments
from tests.helpers.tiny import tiny_llama
from torch_compat.models import load

LENGTHS, LENGTH, STEPS, RATE = (9, 4, 13), 32, 3, 0.5
VOCAB = 64


def documents() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(1, VOCAB, length) for length in LENGTHS]


def packed() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids ``[1, length]``; -1 for the padding at the end."""
    tokens, ids = np.zeros((1, LENGTH), int), np.full((1, LENGTH), -1, np.int32)
    tokens[0, : sum(LENGTHS)] = np.concatenate(documents())
    ids[0, : sum(LENGTHS)] = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return tokens, ids


def loss_of(model: Any, tokens: Any, ids: Any, implementation: Any = None) -> Any:
    """The mean over all tokens that follow one of their document."""
    valid = jnp.asarray(ids) >= 0
    logits, _ = model(tokens, valid, mask=Segments(jnp.asarray(ids)), implementation=implementation)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    counts = valid[:, 1:] & (ids[:, 1:] == ids[:, :-1])
    return jnp.where(counts, losses, 0).sum() / counts.sum()


def loss_of_transformers(model: Any) -> torch.Tensor:
    """The same, of one document after the other."""
    losses = []
    for document in documents():
        tokens = torch.from_numpy(document)[None]
        logits = model(tokens).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))
    total: Any = sum(losses)
    return total / sum(length - 1 for length in LENGTHS)


def test_packed_documents_train_as_documents_one_by_one_in_pytorch() -> None:
    theirs = tiny_llama(initializer_range=0.1)
    ours = load(theirs)
    graph, state = nnx.split(jax.tree.map(jnp.copy, ours))
    tokens, ids = (jnp.asarray(x) for x in packed())
    optimizer = optax.sgd(RATE)
    moments = optimizer.init(state)
    step = jax.jit(jax.value_and_grad(lambda state: loss_of(nnx.merge(graph, state), tokens, ids)))
    torch_optimizer = torch.optim.SGD(theirs.parameters(), lr=RATE)
    for _ in range(STEPS):
        loss, gradients = step(state)
        torch_optimizer.zero_grad()
        wanted = loss_of_transformers(theirs)
        wanted.backward()
        np.testing.assert_allclose(loss, wanted.item(), rtol=0, atol=1e-5)
        with torch.no_grad():
            as_weights = tiny_llama(initializer_range=0.1)
            for weight, parameter in zip(as_weights.parameters(), theirs.parameters(), strict=True):
                weight.copy_(parameter.grad)
        wanted_gradients = jax.tree.leaves(nnx.split(load(as_weights))[1])
        for actual, right in zip(jax.tree.leaves(gradients), wanted_gradients, strict=True):
            np.testing.assert_allclose(actual, right, rtol=0, atol=1e-5)
        updates, moments = optimizer.update(gradients, moments)
        state = optax.apply_updates(state, updates)
        torch_optimizer.step()
    np.testing.assert_allclose(step(state)[0], loss_of_transformers(theirs).item(), rtol=0, atol=1e-5)


def test_gradients_are_finite_where_rows_have_nothing_to_attend_to() -> None:
    """A wholly empty example, and the padding behind the documents."""
    graph, state = nnx.split(load(tiny_llama(initializer_range=0.1)))
    tokens, ids = packed()
    tokens, ids = np.concatenate((tokens, tokens)), np.concatenate((ids, np.full_like(ids, -1)))
    for implementation in ("xla", "blocked"):
        # One program takes a fraction of the time of as many as there are operations.
        loss, gradients = jax.jit(
            jax.value_and_grad(
                lambda state, implementation=implementation: loss_of(
                    nnx.merge(graph, state), tokens, ids, implementation
                )
            )
        )(state)
        assert jnp.isfinite(loss)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_mask_of_documents_matters() -> None:
    model = load(tiny_llama(initializer_range=0.1))
    tokens, ids = packed()
    without = model(tokens, ids >= 0, mask=jaxmask.Full())[0]
    assert np.abs(model(tokens, ids >= 0, mask=Segments(ids))[0] - without).max() > 1e-3
