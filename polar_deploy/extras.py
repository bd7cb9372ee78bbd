"""How what is missing is installed: the package is on no index, so that its extras come from the checkout."""

from __future__ import annotations


def install(*extras: str) -> str:
    """The command that installs extras of this package, and where to give it."""
    return f"in the checkout: pip install '.[{','.join(extras)}]'"
