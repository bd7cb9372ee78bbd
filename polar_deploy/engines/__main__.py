"""The commands around engines: `python -m polar_deploy.engines doctor`, `... table`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as `polar-deploy engines` does; return its exit code."""
    return cli.alone("engines", "polar_deploy.engines", argv)


if __name__ == "__main__":
    sys.exit(main())
