"""The one error for whatever is wrong with a bundle."""

from __future__ import annotations

from pathlib import Path

from polar_deploy.errors import ContentError, UsageError, printable

_LONGEST = 4000  # characters
_TODO = "do not use it; ask for the bundle again, and for the manifest's sha256 by another way"


def refused(place: Path | str, what: str) -> ContentError:
    """The error for a file that is not what it should be."""
    return ContentError(printable(f"{place} {what}")[:_LONGEST], _TODO)


def require_outside(path: Path, bundle: Path) -> None:
    """Raise UsageError where something would be written into the bundle, which must not change."""
    if path.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"{path} lies in the bundle, which must not change", "give a place outside of it")
