"""Draw the picture of the README: six masks, each under the code that describes it.

python docs/picture.py
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jaxmask import Causal, Mask, Padding, Prefix, SlidingWindow, Window

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
COLOURS = ListedColormap(["#eceef1", "#3b76d0"])


def draw(ax: Axes, code: str, mask: Mask) -> None:
    """One mask: a row for each query, a column for each key, blue where the query may look at the key."""
    ax.imshow(np.asarray(mask.dense(LENGTH, LENGTH)[0, 0]), cmap=COLOURS, vmin=0, vmax=1)
    ax.set_title(code, family="monospace", fontsize=8)
    ax.set_xticks(np.arange(LENGTH + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(LENGTH + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.2)
    ax.set(xticks=[], yticks=[], xlabel="key", ylabel="query")
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def main() -> None:
    """Write ``masks.png`` beside this file."""
    mpl.rcParams.update({"axes.labelsize": 8, "axes.labelcolor": "#666666"})
    figure = Figure(figsize=(8.2, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, (code, mask) in zip(axes.flat, MASKS.items(), strict=True):
        draw(ax, code, mask)
    figure.savefig(Path(__file__).with_name("masks.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
