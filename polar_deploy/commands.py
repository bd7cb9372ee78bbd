"""A command with sub-commands, each of them a module with a docstring, `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from polar_deploy.errors import MachineError, PolarDeployError, UsageError
from polar_deploy.workspace import DISK_FULL


def dispatch(package: str, modules: Mapping[str, tuple[str, str]], argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code (see the README). Only its own module is imported.

    Args:
        package: what the modules belong to, such as "polar_deploy.engines".
        modules: sub-command -> (module of the package, one line of help).
        argv: the command line; None: this process's own.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(package, modules, argv).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any name, on a terminal that knows ASCII only
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except PolarDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"error: out of memory: {error}\n  what to do: use a smaller batch or network", file=sys.stderr)
        return MachineError.exit_code
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it ends
        return 128 + signal.SIGPIPE
    except OSError as error:  # of files that nobody opened with more care
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}\n  what to do: check path, permissions and free space", file=sys.stderr)
        return (MachineError if error.errno in DISK_FULL else UsageError).exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


def _parser(package: str, modules: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {package}", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module_name, help_text) in modules.items():
        asked_for = bool(argv) and argv[0] == name
        module = import_module(f"{package}.{module_name}") if asked_for else None
        description = module.__doc__ if module else None
        command = commands.add_parser(
            name,
            help=help_text,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if module:
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
