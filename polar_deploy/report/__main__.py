"""What a person does with reports: `python -m polar_deploy.report view RUN`, `... gates RUN`, `... compare RUN RUN`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy.commands import dispatch

_COMMANDS = {
    "view": ("view", "open the page of a run"),
    "gates": ("gates", "draw which gates of a run stayed open"),
    "compare": ("compare", "several runs side by side, as a table and as Pareto plots"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (see the README)."""
    return dispatch("polar_deploy.report", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
