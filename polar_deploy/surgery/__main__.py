"""`python -m polar_deploy.surgery IN.onnx OUT.onnx`: the exact ONNX surgery on its own."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery import compress_file

WIDTH = 120  # characters, where the table goes into a file


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0 done, 2 usage, 3 this machine lacks something, 4 invalid content."""
    parser = argparse.ArgumentParser(
        prog="python -m polar_deploy.surgery",
        description="Fold the gates of an ONNX graph and remove dead channels and blocks: same function, smaller.",
    )
    parser.add_argument("source", metavar="IN.onnx", type=Path, help="any ONNX model")
    parser.add_argument("target", metavar="OUT.onnx", type=Path, help="the smaller model")
    parser.add_argument("--report", metavar="R.json", type=Path, help="write what was cut, and what was not and why")
    parser.add_argument("--no-verify", action="store_true", help="skip the proof in ONNX Runtime")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of nodes, on a terminal that knows ASCII only
    try:
        report = compress_file(args.source, args.target, report=args.report, verify=not args.no_verify)
    except PolarDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
        return 0
    from rich.console import Console

    from polar_deploy.surgery.report import show

    show(report, Console(width=None if sys.stdout.isatty() else WIDTH))
    return 0


if __name__ == "__main__":
    sys.exit(main())
