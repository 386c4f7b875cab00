"""The gallery: a picture, a line of code, the tiles and the kernels of each mask in ``exhibits.py``."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from docutils import nodes
from exhibits import ARXIV, EXHIBITS, KINDS, Exhibit
from implementations import simulated
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from jaxmask import explain
from jaxmask.draw.notebook import svg

# tokamax says that it has not been tuned for a GPU which is not there.
logging.getLogger("absl").setLevel(logging.ERROR)
DRAWN, LENGTH, HEADS, DIM = 64, 8192, 8, 128


def kernels(exhibit: Exhibit) -> dict[str, str]:
    """The implementation that attention takes for the mask on each platform, in bfloat16."""
    mask = exhibit.mask(LENGTH)
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS if mask.shape[1] == 1 else mask.shape[1], DIM), jnp.bfloat16)
    taken: dict[str, str] = {}
    for platform in ("cpu", "gpu", "tpu"):
        with simulated("pallas" if platform == "gpu" else ""):
            taken[platform.upper()] = explain(x, x, x, mask, offset=0, platform=platform).implementation
    return taken


class Gallery(SphinxDirective):
    """``{gallery}``: all exhibits, and what chooses those of a kind."""

    def run(self) -> list[nodes.Node]:
        """Make the nodes."""
        for name in ("exhibits.py", "gallery.py"):
            self.env.note_dependency(str(Path(__file__).with_name(name)))
        cards = nodes.container(classes=["gallery"])
        cards += nodes.raw("", _choices(), format="html")
        cards += [self._card(exhibit) for exhibit in EXHIBITS]
        return [cards]

    def _card(self, exhibit: Exhibit) -> nodes.section:
        card = nodes.section(ids=[nodes.make_id(exhibit.title)], classes=["card", exhibit.kind])
        card += nodes.title("", exhibit.title)
        at = exhibit.mask(DRAWN).dense(DRAWN, DRAWN, offset=0)
        pictures = "".join(svg(np.asarray(head, np.int8) * 2) for head in at[0])
        card += nodes.raw("", f'<div class="pictures">{pictures}</div>', format="html")
        code = nodes.literal_block(exhibit.code, exhibit.code, language="python", classes=["code"])
        card += code
        source: nodes.Node = nodes.Text(exhibit.source)
        if exhibit.paper:
            source = nodes.reference("", exhibit.source, refuri=ARXIV + exhibit.paper)
        card += nodes.paragraph("", "", source)
        empty, partial, full = exhibit.mask(LENGTH).tiles(LENGTH, LENGTH, offset=0).counts.tolist()
        share = empty / (empty + partial + full)
        text = f"{share:.1%} of the tiles are empty: {empty:,} EMPTY, {partial:,} PARTIAL, {full:,} FULL"
        card += nodes.paragraph("", text)
        line = nodes.paragraph(classes=["kernels"])
        for platform, kernel in kernels(exhibit).items():
            line += [nodes.Text(f"{platform} "), nodes.literal("", kernel), nodes.Text("  ")]
        card += line
        return card


def _choices() -> str:
    """Buttons, by which a style sheet hides the others."""
    kinds = {"all": "all", **KINDS}
    buttons = (
        f'<label><input type="radio" name="kind" id="kind-{kind}"{" checked" * (kind == "all")}/> {title}</label>'
        for kind, title in kinds.items()
    )
    hidden = ", ".join(f".gallery:has(#kind-{kind}:checked) .card:not(.{kind})" for kind in KINDS)
    return f'<style>{hidden} {{ display: none; }}</style><form class="kinds">{" ".join(buttons)}</form>'


def setup(app: Sphinx) -> dict[str, bool]:
    """An extension of Sphinx."""
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
