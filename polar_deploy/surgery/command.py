"""Fold the gates of an ONNX graph and remove dead channels and blocks: same function, smaller."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from polar_deploy.errors import UsageError, printable

WIDTH = 120  # characters, where the table goes into a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `polar-deploy surgery`."""
    add = parser.add_argument
    add("source", metavar="IN.onnx", type=Path, help="any ONNX model")
    add("target", metavar="OUT.onnx", type=Path, nargs="?", help="the smaller model")
    add("--explain", metavar="TENSOR", help="only tell what is known of a tensor's channels, and why they go or stay")
    add("--report", metavar="R.json", type=Path, help="write what was cut, and what was not and why")
    add("--no-verify", action="store_true", help="skip the proof in ONNX Runtime")
    add("--allow-unverified", action="store_true", help="write the model even where the proof cannot be made")
    add("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Cut, and show what became of each layer; the exit code is 0, errors are raised."""
    if arguments.explain is not None:
        from polar_deploy.surgery.explain import explain_file

        for line in explain_file(arguments.source, arguments.explain):
            print(printable(line))
        return 0
    if arguments.target is None:
        raise UsageError("no place for the smaller model", "give OUT.onnx, or ask about a tensor with --explain TENSOR")
    from polar_deploy.surgery import compress_file

    report = compress_file(
        arguments.source,
        arguments.target,
        report=arguments.report,
        verify=not arguments.no_verify,
        allow_unverified=arguments.allow_unverified,
    )
    if arguments.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return 0
    from polar_deploy.progress import console
    from polar_deploy.surgery.report import show

    show(report, console(least=72, width=None if sys.stdout.isatty() else WIDTH))
    return 0
