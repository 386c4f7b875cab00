"""The site: ``make docs`` builds it into ``docs/_build/html``, and a warning fails.

It is built, read and searched without a network. Links to other projects are known from ``inventories``.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import inventories  # noqa: E402

project = "jaxmask"
author = copyright = "The jaxmask authors"  # noqa: A001
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "signatures",
    "gallery",
    "svg",
]
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# The notebooks are shown with the outputs that are stored in them, which `make notebooks` checks.
nb_execution_mode = "off"
(DOCS / "notebooks").mkdir(exist_ok=True)
for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(notebook, DOCS / "notebooks")

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures.py writes them, and so that of the function itself in place of its overloads
maximum_signature_line_length = 72
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
add_module_names = False
python_use_unqualified_type_names = True
default_role = None
nitpicky = True
intersphinx_mapping = inventories.write(DOCS / "_build" / "inventories")

html_theme = "furo"
html_title = "jaxmask"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style, pygments_dark_style = "default", "github-dark"
html_theme_options = {"navigation_with_keys": False}
