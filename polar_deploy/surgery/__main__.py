"""`python -m polar_deploy.surgery IN.onnx OUT.onnx`: the exact ONNX surgery on its own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from polar_deploy.commands import add_debug, guarded
from polar_deploy.surgery import compress_file

WIDTH = 120  # characters, where the table goes into a file


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0 done, 2 usage, 3 this machine lacks something, 4 invalid content."""
    return guarded(lambda: _run(arguments), arguments)


def _run(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m polar_deploy.surgery",
        description="Fold the gates of an ONNX graph and remove dead channels and blocks: same function, smaller.",
    )
    parser.add_argument("source", metavar="IN.onnx", type=Path, help="any ONNX model")
    parser.add_argument("target", metavar="OUT.onnx", type=Path, help="the smaller model")
    parser.add_argument("--report", metavar="R.json", type=Path, help="write what was cut, and what was not and why")
    parser.add_argument("--no-verify", action="store_true", help="skip the proof in ONNX Runtime")
    parser.add_argument(
        "--allow-unverified", action="store_true", help="write the model even where the proof cannot be made"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_debug(parser)
    args = parser.parse_args(arguments)
    report = compress_file(
        args.source,
        args.target,
        report=args.report,
        verify=not args.no_verify,
        allow_unverified=args.allow_unverified,
    )
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return 0
    from polar_deploy.progress import console
    from polar_deploy.surgery.report import show

    show(report, console(width=None if sys.stdout.isatty() else WIDTH))
    return 0


if __name__ == "__main__":
    sys.exit(main())
