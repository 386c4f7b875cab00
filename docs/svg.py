"""SVG for light and dark: one file, which other pages show as an image, and ours as a part of themselves."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

# An image cannot see the colours of its page, but what the reader prefers.
STYLE = "<style>:root{color:#24292f}@media(prefers-color-scheme:dark){:root{color:#d1d7e0}}</style>"
# What a figure of matplotlib draws in this colour is drawn in that of text.
INK = "#010203"


def coloured(svg: str) -> str:
    """An SVG whose ``currentColor`` suits the page."""
    return re.sub(r"(<svg[^>]*>)", rf"\1{STYLE}", svg, count=1) + "\n"


# How matplotlib is to draw a figure for :func:`of_figure`: texts as texts, everything in ink.
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxmask",
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
}


def of_figure(figure: Figure) -> str:
    """The SVG of a figure of matplotlib, without what differs from run to run, its ink the colour of text."""
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    return coloured(re.sub(r"\s*\n\s*", "\n", svg).strip())


class Svg(SphinxDirective):
    """``{svg} FILE``: a picture of this folder as a part of the page, whose colours it takes."""

    required_arguments = 1
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Make the node."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        svg = Path(path).read_text(encoding="utf-8").replace(STYLE, "").strip()
        alt = nodes.Text(self.options["alt"]).astext().replace('"', "&quot;")
        return [nodes.raw("", f'<div class="picture" role="img" aria-label="{alt}">{svg}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """An extension of Sphinx."""
    app.add_directive("svg", Svg)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
