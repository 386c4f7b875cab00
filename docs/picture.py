"""Draw the picture of the README: six masks, each under the code that describes it.

python docs/picture.py
"""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure

from jaxmask import Causal, Mask, Padding, Prefix, SlidingWindow, Window, plot

LENGTH = 10
valid = jnp.arange(LENGTH)[None] >= 3
MASKS: dict[str, Mask] = {
    "Causal()": Causal(),
    "Causal() & Padding(valid)": Causal() & Padding(valid),
    "Causal() | Prefix(4)": Causal() | Prefix(4),
    "SlidingWindow(3)": SlidingWindow(3),
    "SlidingWindow(3) | Causal() & Prefix(2)": SlidingWindow(3) | Causal() & Prefix(2),
    "Window(left=2, right=1)": Window(left=2, right=1),
}


def main() -> None:
    """Write ``masks.png`` beside this file."""
    figure = Figure(figsize=(8.2, 5.6), dpi=110, layout="constrained")
    for ax, (code, mask) in zip(figure.subplots(2, 3).flat, MASKS.items(), strict=True):
        plot(mask, LENGTH, ax=ax)
        ax.set_title(code, family="monospace", fontsize=8)
    figure.savefig(Path(__file__).with_name("masks.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
