"""The gallery."""

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """An extension of Sphinx."""
    return {"parallel_read_safe": True, "parallel_write_safe": True}
