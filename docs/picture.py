"""Draw the picture of the README: eight masks, each under the code that describes it.

python docs/picture.py
"""

from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jaxmask import Causal, Chunked, Mask, Padding, Prefix, Segments, SlidingWindow, Window, plot

LENGTH = 10
valid = jnp.arange(LENGTH)[None] >= 3
ids = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
MASKS: dict[str, Mask] = {
    "Causal()": Causal(),
    "Causal() & Padding(valid)": Causal() & Padding(valid),
    "Causal() | Prefix(4)": Causal() | Prefix(4),
    "SlidingWindow(3)": SlidingWindow(3),
    "SlidingWindow(3) | Causal() & Prefix(2)": SlidingWindow(3) | Causal() & Prefix(2),
    "Window(left=2, right=1)": Window(left=2, right=1),
    "Causal() & Segments(ids)": Causal() & Segments(ids),
    "Causal() & Chunked(4)": Causal() & Chunked(4),
}


def main() -> None:
    """Write ``masks.png`` beside this file."""
    figure = Figure(figsize=(11, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 4).flat
    for ax, (code, mask) in zip(axes, MASKS.items(), strict=True):
        plot(mask, LENGTH, ax=ax)
        ax.set_title(code, family="monospace", fontsize=8)
    colours = axes[0].images[0].cmap
    patches = [Patch(color=colours(share), label=label) for share, label in ((1.0, "may attend"), (0.0, "may not"))]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_name("masks.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
