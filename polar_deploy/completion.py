"""Print a script that makes the tab key of your shell complete commands and options.

bash:  polar-deploy completion bash > ~/.local/share/bash-completion/completions/polar-deploy
zsh:   polar-deploy completion zsh > ~/.zfunc/_polar-deploy     (a folder of $fpath)

Make the folder first, if there is none (mkdir -p); the next shell has it. In bash it takes the package bash-completion.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from polar_deploy import extras
from polar_deploy.errors import MachineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `polar-deploy completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script it is")


def run(arguments: argparse.Namespace) -> int:
    """Print the script. It is made of the parsers themselves, so that it knows every option."""
    if find_spec("shtab") is None:
        raise MachineError("shtab is not installed", f"install it, {extras.install('completion')}")
    import shtab

    from polar_deploy import cli

    parser = cli.parser(cli.COMMANDS, "polar-deploy", None)
    _complete_files(parser)
    print(shtab.complete(parser, arguments.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Mark what is a file or a folder, in all commands."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner)
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
