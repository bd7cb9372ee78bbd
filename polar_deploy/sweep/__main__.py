"""The same as `polar-deploy sweep`: `python -m polar_deploy.sweep FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (see docs/cli.md)."""
    return cli.alone("sweep", "polar_deploy.sweep", argv)


if __name__ == "__main__":
    sys.exit(main())
