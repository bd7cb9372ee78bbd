"""`python -m polar_deploy.surgery IN.onnx OUT.onnx`: the exact ONNX surgery on its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from polar_deploy import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, as `polar-deploy surgery` does; return its exit code."""
    return cli.alone("surgery", "polar_deploy.surgery", argv)


if __name__ == "__main__":
    sys.exit(main())
