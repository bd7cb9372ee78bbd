"""The demo's bundle in an environment of the core and ONNX Runtime alone: verified and timed; its size and its time.

Makes the environment with pip, so it needs a package index.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.common import bundle_command, edge_environment, run_pipeline, verify_bundle, write_result

REPEATS = 5


def main() -> int:
    """Run the bars; 0 if all are met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = run_pipeline(folder / "run", "--recipe", "digits")
        python, packages = edge_environment(folder / "environment")
        bundle = folder / "run/bundle"
        whole = [verify_bundle(python, bundle, "--no-timing") for _ in range(REPEATS)]
        timed = verify_bundle(python, bundle)
        archive = folder / "bundle.zip"
        bundle_command(python, "archive", bundle, archive)
        sizes = {
            path.relative_to(bundle).as_posix(): path.stat().st_size for path in bundle.rglob("*") if path.is_file()
        }
        figures = {
            "demo_exit_code": demo["exit_code"],
            "packages": packages,
            "verify_no_timing": whole,
            "verify": timed,
            "bytes": {"all": sum(sizes.values()), "archive": archive.stat().st_size, "files": sizes},
        }
    bars = {
        "the demo makes a bundle": demo["exit_code"] == 0,
        "no torch in the environment": "torch" not in packages,
        "verified without timing: exit code 0 in at most 3 s": all(
            each["exit_code"] == 0 and each["seconds"] <= 3 for each in whole
        ),
        "verified and timed: exit code 0": timed["exit_code"] == 0,
    }
    return write_result("bundle", bars, figures)


if __name__ == "__main__":
    sys.exit(main())
