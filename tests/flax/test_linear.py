"""The products of the models: those of PyTorch's linear layer, and weights that are not copied for a few tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmask.flax.models.layers import Linear, project

SHAPES = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 9), st.integers(1, 24))


@settings(max_examples=30)
@given(SHAPES, st.booleans(), st.integers(0, 2**32 - 1))
def test_linear_and_its_gradients_are_those_of_pytorch(
    shapes: tuple[list[int], int, int], use_bias: bool, seed: int
) -> None:
    (leading, size, to), generator = shapes, np.random.default_rng(seed)
    ours = Linear({"dim": size}, {"hidden": to}, use_bias=use_bias, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    theirs = torch.nn.Linear(size, to, bias=use_bias)
    ours.weight[...] = jnp.asarray(theirs.weight.detach().numpy())
    if ours.bias is not None:
        ours.bias[...] = jnp.asarray(theirs.bias.detach().numpy())
    x, cotangent = (generator.standard_normal((*leading, last)).astype(np.float32) for last in (size, to))
    tensor = torch.from_numpy(x).requires_grad_()
    expected = theirs(tensor)
    gradients = torch.autograd.grad(expected, [tensor, *theirs.parameters()], torch.from_numpy(cotangent))
    graph, state = nnx.split(ours)

    @jax.jit
    def run(state: Any, x: Any, cotangent: Any) -> Any:
        actual, pullback = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return actual, *pullback(cotangent)

    actual, of_state, of_x = run(state, x, cotangent)
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=1e-5)
    ours_of = [of_x, *(of_state[name][...] for name, _ in theirs.named_parameters())]
    for gradient, theirs_of in zip(ours_of, gradients, strict=True):
        np.testing.assert_allclose(gradient, theirs_of, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 8, 63, 64, 65, 512])
def test_the_larger_of_tokens_and_weights_is_on_the_left(tokens: int) -> None:
    x, weight = jnp.ones((1, tokens, 16)), jnp.ones((64, 16))
    equations = jax.make_jaxpr(project)(x, weight).eqns
    (product,) = [equation for equation in equations if equation.primitive.name == "dot_general"]
    sizes: Any = [operand.aval.size for operand in product.invars]
    assert sizes == sorted((x.size, weight.size), reverse=True)
