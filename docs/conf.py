"""The site: `make docs`. Sphinx reads these pages as they are, and the API reference from docstrings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package of this checkout

from sphinx.ext.autodoc.mock import MockFinder

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
autodoc_mock_imports = ["lightning", "transformers"]  # large, and only base classes of ours come from them

default_role = "code"  # docstrings write `name`
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # an attribute is documented once, in its class


def _code_is_literal(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings show code as an indented block behind a blank line; reStructuredText wants `::` before it."""
    for i in range(len(lines) - 1, 0, -1):
        above, here = lines[i - 1], lines[i]
        if not above and here.startswith(" ") and i > 1 and lines[i - 2] and _indent(here) >= _indent(lines[i - 2]) + 4:
            lines[i - 1 : i] = ["", f"{' ' * _indent(lines[i - 2])}::", ""]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: Any) -> None:
    """Code blocks before napoleon, which has the priority 500."""
    # autodoc has its mocks while it imports our modules, and then looks for the sources of their base classes
    sys.meta_path.insert(0, MockFinder(autodoc_mock_imports))
    app.connect("autodoc-process-docstring", _code_is_literal, priority=400)
