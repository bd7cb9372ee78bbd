"""Pictures for README and docs, of real runs: `python -m benchmarks.pictures RUN`, such as that of `make demo`.

Takes Debian's chromium. Writes docs/report.png, the top of the page, and docs/network.png, what is left of the network.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks import chromium
from benchmarks.common import ROOT


def main() -> int:
    """Take the pictures."""
    page = (Path(sys.argv[1]) / "report.html").resolve()
    with tempfile.TemporaryDirectory() as folder:
        top, network = Path(folder, "top.png"), Path(folder, "network.png")
        chromium.picture(page.as_uri(), top, 1120, 1210)
        chromium.picture(_alone(page, "network", Path(folder)).as_uri(), network, 1120, 640)
        for source, name in ((top, "report.png"), (network, "network.png")):
            Image.open(source).convert("RGB").quantize(128).save(ROOT / "docs" / name, optimize=True)
    return 0


def _alone(page: Path, section: str, folder: Path) -> Path:
    """A page with one section of another, in its style."""
    text = page.read_text(encoding="utf-8")
    head = text.partition("<body>")[0]
    (body,) = re.findall(rf'<section aria-labelledby="{section}">.*?</figure>', text, re.DOTALL)
    path = folder / f"{section}.html"
    path.write_text(f"{head}<body><main>{body}</section></main></body>", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
