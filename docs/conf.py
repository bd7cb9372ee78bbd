"""The site: `make docs`. Sphinx reads these pages as they are, and the API reference from docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package of this checkout

from polar_deploy import __version__

project = "polar_deploy"
author = "the polar_deploy authors"
release = version = __version__
html_title = f"polar_deploy {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_copy_source = html_show_sourcelink = False

myst_heading_anchors = 3  # links such as devices.md#the-rule work here as they do on GitHub
myst_fence_as_directive = []
suppress_warnings = ["myst.header"]  # a page may begin a section with a smaller heading

default_role = "code"  # docstrings write `name`
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # an attribute is documented once, in its class
