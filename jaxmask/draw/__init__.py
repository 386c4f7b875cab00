"""Pictures of masks: in the terminal, by matplotlib, in a notebook."""

from jaxmask.draw.figure import plot
from jaxmask.draw.notebook import html, html_tiles
from jaxmask.draw.terminal import show, show_tiles
from jaxmask.mask import Mask
from jaxmask.tiles import TileMap

__all__ = ["html", "html_tiles", "plot", "show", "show_tiles"]

# Masks and tiles know nothing of drawing, which is built on them. So their pictures are given to them from here.
Mask._repr_html_ = html  # pyright: ignore[reportPrivateUsage]
TileMap._repr_html_ = html_tiles  # pyright: ignore[reportPrivateUsage]
TileMap.show = show_tiles
