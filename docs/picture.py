"""Draw ``masks.svg``, the picture of the README: eight masks, each under the code that describes it.

python docs/picture.py
"""

from html import escape
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from svg import coloured

from jaxmask import Causal, Chunked, Mask, Padding, Prefix, Segments, SlidingWindow, Window
from jaxmask.draw.notebook import svg

LENGTH = 10
# The size of a panel and of its title, in pixels, and how many panels stand in a row.
WIDTH, SIDE, TITLE, COLUMNS = 250, 180, 28, 4
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


def panel(code: str, mask: Mask, x: float, y: float) -> str:
    """A mask under its code."""
    states = np.asarray(mask.dense(LENGTH, LENGTH))[0, 0] * np.int8(2)
    place = f'<svg x="{x + (WIDTH - SIDE) / 2:g}" y="{y + TITLE:g}"'
    title = f'<text x="{x + WIDTH / 2:g}" y="{y + TITLE - 9:g}">{escape(code)}</text>'
    return title + place + svg(states, SIDE / LENGTH).removeprefix("<svg")


def page() -> str:
    """The picture."""
    height = SIDE + TITLE + 12
    panels = "".join(
        panel(code, mask, i % COLUMNS * WIDTH, i // COLUMNS * height) for i, (code, mask) in enumerate(MASKS.items())
    )
    size = f"{COLUMNS * WIDTH} {len(MASKS) // COLUMNS * height + TITLE}"
    about = f'<text x="{COLUMNS * WIDTH / 2:g}" y="{2 * height + 16:g}">rows are queries, columns are keys</text>'
    text = 'fill="currentColor" font-family="ui-monospace, monospace" font-size="10.5" text-anchor="middle"'
    return coloured(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" {text}>{panels}{about}</svg>')


if __name__ == "__main__":
    Path(__file__).with_name("masks.svg").write_text(page(), encoding="utf-8")
