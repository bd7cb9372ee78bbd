"""The commands around devices: `python -m polar_deploy.devices list`, `... show NAME`, `... measure`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as `polar-deploy devices` does; return its exit code."""
    return cli.alone("devices", "polar_deploy.devices", argv)


if __name__ == "__main__":
    sys.exit(main())
