"""Debian's chromium without a window: what a page says of itself, and pictures of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)


def is_here() -> bool:
    """Whether it is installed."""
    return shutil.which("chromium") is not None


def visit(address: str, *options: str) -> tuple[str, list[str]]:
    """The document after scripts have run, and every line that the page wrote to the console."""
    command = ["chromium", *_QUIET, *options, "--virtual-time-budget=3000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE)


def picture(address: str, path: Path, width: int, height: int, *, dark: bool = False) -> None:
    """A screenshot of the top of a page, in pixels."""
    theme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    size = (f"--window-size={width},{height}", f"--screenshot={path.resolve()}")
    subprocess.run(["chromium", *_QUIET, *theme, *size, address], capture_output=True, timeout=120, check=True)
