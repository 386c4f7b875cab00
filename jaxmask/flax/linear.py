"""Products with weights, which are ``[out, in]`` as in PyTorch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float


def project(x: Float[Array, "... in"], weight: Float[Array, "out in"]) -> Float[Array, "... out"]:
    """``x @ weight.T``, with the larger of the two on the left.

    On a CPU, XLA first copies the right side of a product into the order in which it reads it. In a step of decoding
    that would be all weights for a few tokens, which takes twice the time of the product itself.
    """
    if x.size // x.shape[-1] >= len(weight):
        return x @ weight.T
    return jnp.moveaxis(jnp.tensordot(weight, x, ((1,), (x.ndim - 1,))), 0, -1)


class Linear(nnx.Module):
    """A product with weights, and a bias.

    Unlike ``nnx.Linear`` its weight is ``[out, in]``: :func:`project` is fast for one token and for many, and a
    checkpoint of PyTorch goes in as it is.
    """

    def __init__(self, size: int, to: int, *, use_bias: bool = True, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        initializer = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = nnx.Param(initializer(rngs.params(), (to, size), param_dtype))
        self.bias = nnx.Param(jnp.zeros(to, param_dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        out = project(x, self.weight[...])
        return out if self.bias is None else out + self.bias[...]
