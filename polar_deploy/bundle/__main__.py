"""What an edge team does with a bundle: `python -m polar_deploy.bundle verify DIR`, `... run`, `... triton`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as `polar-deploy bundle` does; return its exit code."""
    return cli.alone("bundle", "polar_deploy.bundle", argv)


if __name__ == "__main__":
    sys.exit(main())
