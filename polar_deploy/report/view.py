"""Open the page of a run in the browser, and print where it lies."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path

from polar_deploy.errors import UsageError
from polar_deploy.report import outdated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report view`."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--no-browser", action="store_true", help="print the path alone")


def run(arguments: argparse.Namespace) -> int:
    """Print the path of report.html, and open it where there is a screen."""
    page = arguments.folder / "report.html"
    if not page.is_file():
        raise UsageError(f"there is no {page}", "give a run's folder; `--from report` makes a page that is missing")
    outdated.warn(arguments.folder, "report")
    print(page.resolve())
    if not arguments.no_browser and _has_screen():
        webbrowser.open(page.resolve().as_uri())
    return 0


def _has_screen() -> bool:
    """Whether a browser would have a window of its own: one in the terminal would take that over."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
