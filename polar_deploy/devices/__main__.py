"""The commands around devices: `python -m polar_deploy.devices list`, `... show NAME`, `... measure`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy.commands import dispatch

_COMMANDS = {
    "list": ("listing", "the devices whose widths are known, and where that comes from"),
    "measure": ("measure", "measure widths in ONNX Runtime on this machine, and write such a file"),
    "show": ("show", "what each width costs on a device, and which are worth choosing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (see the README)."""
    return dispatch("polar_deploy.devices", _COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
