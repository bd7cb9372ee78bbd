"""What a person does with reports: `python -m polar_deploy.report view RUN`, `... gates RUN`, `... compare RUN RUN`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, as `polar-deploy report` does; return its exit code."""
    return cli.alone("report", "polar_deploy.report", argv)


if __name__ == "__main__":
    sys.exit(main())
