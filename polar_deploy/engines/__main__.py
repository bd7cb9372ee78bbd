"""The commands around engines: `python -m polar_deploy.engines doctor`, `... table`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy.commands import dispatch

_COMMANDS = {
    "doctor": ("doctor", "what this machine can build and run, and what to install for the rest"),
    "table": ("table", "measure what each gated layer costs at each width, for --budget latency="),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (see the README)."""
    return dispatch("polar_deploy.engines", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
