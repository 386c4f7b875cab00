"""CPU seconds to compile 12 layers of attention at 2,048 tokens, relative to those of ``jax.nn``.

Each layer has arrays of its own, as in a model that is not scanned; float32, 8 heads, dim 64, causal.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxmask import Causal, attention

LAYERS, SHAPE, FLOOR = 12, (1, 2048, 8, 64), 1.3


def jax_nn(x: Any, w: Any) -> Any:
    """The peer, which writes all scores out."""
    return jax.nn.dot_product_attention(x * w, x, x, is_causal=True)


def ours(x: Any, w: Any) -> Any:
    """The implementation that is chosen on a CPU."""
    return attention(x * w, x, x, Causal())


def seconds(attend: Callable[[Any, Any], Any], *, with_gradients: bool) -> float:
    """The CPU seconds of tracing, lowering and compiling; all threads of the compiler count."""

    def loss(x: Any, weights: Any) -> Any:
        for w in weights:
            x = attend(x, w)
        return x.sum()

    x, weights = jax.ShapeDtypeStruct(SHAPE, jnp.float32), [jax.ShapeDtypeStruct((), jnp.float32)] * LAYERS
    jax.clear_caches()
    start = time.process_time()
    jax.jit(jax.grad(loss) if with_gradients else loss).lower(x, weights).compile()
    return time.process_time() - start


def main() -> None:
    """Print the ratio for the output alone, and with gradients."""
    console = Console()
    seconds(ours, with_gradients=True)  # imports and first uses count for neither
    for what, with_gradients in (("the output", False), ("with gradients", True)):
        mine, theirs = (
            min(seconds(attend, with_gradients=with_gradients) for _ in range(3)) for attend in (ours, jax_nn)
        )
        ratio = mine / theirs
        met = "met" if ratio <= FLOOR else "missed"
        console.print(f"{what}: {ratio:.2f}x of jax.nn, at most {FLOOR}x: {met}", highlight=False)


if __name__ == "__main__":
    main()
