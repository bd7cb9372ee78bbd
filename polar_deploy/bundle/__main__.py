"""What an edge team does with a bundle: `python -m polar_deploy.bundle verify DIR`, `... run`, `... triton`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy.commands import dispatch

_COMMANDS = {
    "verify": ("verify", "is it whole, right, and fast on this device?"),
    "run": ("classify", "classify pictures"),
    "triton": ("triton", "write a model repository for NVIDIA Triton"),
    "archive": ("archive", "write it as one .zip file"),
    "schema": ("schema", "print the JSON Schema of manifest.json"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (see docs/bundle.md)."""
    return dispatch("polar_deploy.bundle", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
