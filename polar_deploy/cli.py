"""The command line: `polar-deploy COMMAND`, also `python -m polar_deploy COMMAND`.

The tree of commands is data. A command is a module with a docstring, `add_arguments(parser)` and `run(arguments)`,
which returns the exit code; it is imported only when it is asked for, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import NoReturn, TypeAlias

from polar_deploy import __version__
from polar_deploy.commands import INTERRUPTED, add_debug, guarded
from polar_deploy.errors import ContentError, OutOfMemoryError
from polar_deploy.limits import SECONDS, SHARE, Limits, available_memory, confined


@dataclass(frozen=True)
class Command:
    """One command: its module, one line of help, what is said after Ctrl-C, and whether it runs strangers' files."""

    module: str
    help: str
    interrupted: str = INTERRUPTED
    confined: bool = False


@dataclass(frozen=True)
class Group:
    """Commands under a common name."""

    help: str
    commands: Mapping[str, Command | Group]


Node: TypeAlias = "Command | Group"

_DOCTOR = Command("polar_deploy.engines.doctor", "what this machine can build and run, and what the rest takes")

COMMANDS = Group(
    "Turn a CNN into a smaller, faster engine while it trains, prove that it is still as good, and hand it over.",
    {
        "run": Command(
            "polar_deploy.pipeline",
            "train, cut, build, compare, bundle: all of it, or some stages",
            "interrupted; the same command goes on from here",
        ),
        "sweep": Command(
            "polar_deploy.sweep.command",
            "many runs, budgets × seeds × targets, trained side by side on Ray",
            "interrupted; the same command goes on from here",
        ),
        "surgery": Command(
            "polar_deploy.surgery.command", "cut closed channels and blocks out of an ONNX graph", confined=True
        ),
        "engines": Group(
            "what runs here, and how fast",
            {
                "doctor": _DOCTOR,
                "table": Command(
                    "polar_deploy.engines.table",
                    "measure what each gated layer costs at each width, for --budget latency=",
                ),
            },
        ),
        "bundle": Group(
            "what an edge team does with a bundle",
            {
                "verify": Command(
                    "polar_deploy.bundle.verify", "is it whole, right, and fast on this device?", confined=True
                ),
                "run": Command("polar_deploy.bundle.classify", "classify pictures", confined=True),
                "triton": Command(
                    "polar_deploy.bundle.triton", "write a model repository for NVIDIA Triton", confined=True
                ),
                "archive": Command("polar_deploy.bundle.archive", "write it as one .zip file", confined=True),
                "schema": Command("polar_deploy.bundle.schema", "print the JSON Schema of manifest.json"),
            },
        ),
        "gates": Group(
            "the gates of a run",
            {"show": Command("polar_deploy.report.gates", "draw which gates stayed open, place by place")},
        ),
        "report": Group(
            "the reports of runs",
            {
                "view": Command("polar_deploy.report.view", "open the page of a run"),
                "compare": Command(
                    "polar_deploy.report.compare", "several runs side by side, as a table and as Pareto plots"
                ),
            },
        ),
        "doctor": _DOCTOR,
        "settings": Command("polar_deploy.settings", "list every setting with its default, unit and meaning"),
        "devices": Group(
            "what widths cost on devices",
            {
                "list": Command(
                    "polar_deploy.devices.listing", "the devices whose widths are known, and where that comes from"
                ),
                "measure": Command(
                    "polar_deploy.devices.measure",
                    "measure widths in ONNX Runtime on this machine, and write such a file",
                ),
                "show": Command(
                    "polar_deploy.devices.show", "what each width costs on a device, and which are worth choosing"
                ),
            },
        ),
        "completion": Command("polar_deploy.completion", "print what makes the tab key complete all of this"),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polar-deploy`; return its exit code (see docs/cli.md)."""
    module = sys.argv[0].endswith("__main__.py")
    return run(COMMANDS, "python -m polar_deploy" if module else "polar-deploy", argv)


def alone(name: str, module: str) -> partial[int]:
    """The `main(argv)` of `python -m MODULE`, which runs one command, or group, as `polar-deploy NAME` does."""
    return partial(run, COMMANDS.commands[name], f"python -m {module}")


def run(node: Node, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a command, or one of a group's; return its exit code, whatever it raises.

    This process's own command line runs in a child process with limits where it reads strangers' files; a command line
    that a caller gives runs in the caller's process, without any.

    Args:
        node: what to run.
        prog: how the user calls it.
        argv: the command line; None: this process's own.
    """
    given = sys.argv[1:] if argv is None else list(argv)

    def command() -> int:
        arguments, unknown = parser(node, prog, given).parse_known_args(given)
        if unknown:
            _refuse(arguments.parser, unknown)
        limits = _limits(arguments) if argv is None and arguments.confined else None
        if limits:
            return confined(lambda: arguments.run(arguments), arguments.parser.prog, limits)
        try:
            code: int = arguments.run(arguments)
        except OutOfMemoryError as error:
            if not arguments.confined:
                raise
            raise ContentError(error.what, error.todo) from error  # the file asks for it, as in a child with limits
        return code

    return guarded(command, given, interrupted=_interrupted(node, _words(given)))


def parser(node: Node, prog: str, argv: Sequence[str] | None) -> argparse.ArgumentParser:
    """The parser of a part of the tree: all of it, or only what `argv` asks for."""
    made = argparse.ArgumentParser(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    _fill(made, node, None if argv is None else _words(argv))
    if node is COMMANDS:
        made.add_argument("-V", "--version", action="version", version=f"polar_deploy {__version__}")
    return made


def _words(argv: Sequence[str]) -> list[str]:
    """What is no option: names of commands come first, since options before them have no values."""
    return [word for word in argv if not word.startswith("-")]


def _fill(made: argparse.ArgumentParser, node: Node, words: Sequence[str] | None) -> None:
    if isinstance(node, Command):
        module = import_module(node.module)
        made.description = module.__doc__
        module.add_arguments(made)
        if node.confined:
            _add_limits(made)
        add_debug(made)
        made.set_defaults(run=module.run, parser=made, confined=node.confined)
        return
    made.description = node.help
    commands = made.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, child in node.commands.items():
        asked_for = words is None or words[:1] == [name]
        inner = commands.add_parser(
            name, help=child.help, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if asked_for:
            _fill(inner, child, None if words is None else words[1:])
    if words and words[0] not in node.commands and (near := get_close_matches(words[0], node.commands, n=1)):
        made.error(f"there is no command {words[0]}; did you mean {near[0]}?")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits, beyond which the command ends with exit code 4").add_argument
    add("--time-limit", metavar="SECONDS", type=_positive, default=SECONDS, help=f"default: {SECONDS:g}")
    add(
        "--memory-limit", metavar="GB", type=_positive, help=f"default: {SHARE:.0%} of what is free".replace("%", " %%")
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    asked = arguments.memory_limit
    return Limits(arguments.time_limit, int(SHARE * available_memory() if asked is None else asked * 1e9))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _refuse(command: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """End with what the command does not know, and its own usage; argparse would show that of the outermost one."""
    options = (each for each in unknown if each.startswith("-"))
    near = [match for each in options for match in get_close_matches(each, command._option_string_actions, n=1)]
    meant = f"; did you mean {near[0]}?" if near and near[0] not in unknown else ""
    command.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")


def _interrupted(node: Node, words: Sequence[str]) -> str:
    for word in words:
        if isinstance(node, Command):
            break
        if word not in node.commands:
            return INTERRUPTED
        node = node.commands[word]
    return node.interrupted if isinstance(node, Command) else INTERRUPTED
