"""The commands around engines: `python -m polar_deploy.engines doctor`, `... table`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from polar_deploy.errors import MachineError, PolarDeployError

_COMMANDS = {
    "doctor": "what this machine can build and run, and what to install for the rest",
    "table": "measure what each gated layer costs at each width, for --budget latency=",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (see the README)."""
    parser = argparse.ArgumentParser(prog="python -m polar_deploy.engines", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in _COMMANDS.items():
        module = import_module(f"polar_deploy.engines.{name}")
        command = commands.add_parser(name, help=help_text, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except PolarDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"error: out of memory: {error}\n  what to do: use a smaller batch or network", file=sys.stderr)
        return MachineError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
