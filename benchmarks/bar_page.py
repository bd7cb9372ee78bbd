"""The pages in a real browser, for desktop, phone and the dark: nothing on the console, no request, all pictures there.

Takes Debian's chromium. Pages forbid requests by a policy of their own: each would be an error on the console.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks import chromium
from benchmarks.common import run_pipeline, write_result
from polar_deploy.bundle.__main__ import main as bundle
from polar_deploy.report.__main__ import main as report

QUICK = ("--recipe", "digits", "--epochs", "4", "--budget", "macs=0.5", "--max-drop", "100")
_VIEWS = {
    "desktop": (1200, False),
    "phone": (390, False),
    "dark": (1200, True),
}  # pixels wide, and whether the dark is preferred
PAGES = ("run/report.html", "run/bundle/report.html", "compared.html", "verified.html")
# A page in a frame of its own width, and what the browser made of it.
_FRAME = """<!doctype html><iframe src="/{page}" style="border:0;width:{width}px;height:900px"></iframe>
<pre></pre><script>
addEventListener("load", () => setTimeout(() => {{
  const view = document.querySelector("iframe").contentWindow, shown = view.document;
  const boxes = [...shown.querySelectorAll("svg,img")].map((each) => each.getBoundingClientRect());
  const load = view.performance.getEntriesByType("navigation")[0];
  document.querySelector("pre").textContent = JSON.stringify({{
    pictures: boxes.length, empty: boxes.filter((box) => !box.width || !box.height).length,
    over: shown.documentElement.scrollWidth - {width}, milliseconds: load.loadEventEnd - load.startTime,
    requests: view.performance.getEntriesByType("resource").filter((each) => !each.name.startsWith("data:")).length,
    paper: view.getComputedStyle(shown.body).backgroundColor}});
}}, 300));</script>"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *said: object) -> None:
        """Say nothing."""


def main() -> int:
    """Run the bars; 0 if all are met."""
    if not chromium.is_here():
        print("chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = run_pipeline(folder / "run", *QUICK, "--min-speedup", "0.1")
        report(["compare", str(folder), "--html", str(folder / "compared.html")])
        bundle(["verify", str(folder / "run/bundle"), "--no-timing", "--html", str(folder / "verified.html")])
        sizes = {page: (folder / page).stat().st_size for page in PAGES}
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=name))
        Thread(target=server.serve_forever, daemon=True).start()
        seen = {page: {view: _seen(folder, page, view, server.server_port) for view in _VIEWS} for page in PAGES}
        server.shutdown()
    every = [each for views in seen.values() for each in views.values()]
    bars = {
        "the run has made its bundle": made["exit_code"] == 0,
        "at most 3 MB": all(size <= 3_000_000 for size in sizes.values()),
        "nothing on the console": all(not each["console"] for each in every),
        "no request": all(each["requests"] == 0 for each in every),
        "every picture has a size": all(each["empty"] == 0 for each in every),
        "nothing stands out at the side": all(each["over"] <= 0 for each in every),
        "open within a second": all(each["milliseconds"] <= 1000 for each in every),
        "dark where that is preferred": all(
            views["dark"]["paper"] != views["desktop"]["paper"] for views in seen.values()
        ),
    }
    return write_result("page", bars, {"bytes": sizes, "seen": seen})


def _seen(folder: Path, page: str, view: str, port: int) -> dict[str, Any]:
    """What the browser made of a page."""
    width, dark = _VIEWS[view]
    (folder / "frame.html").write_text(_FRAME.format(page=page, width=width))
    theme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    document, console = chromium.visit(
        f"http://127.0.0.1:{port}/frame.html", *theme, f"--window-size={width + 100},1000"
    )
    told = re.search(r"<pre>(\{.*?\})</pre>", document)
    found: dict[str, Any] = json.loads(told[1]) if told else {}
    return {**found, "milliseconds": round(found["milliseconds"], 1), "console": console}


if __name__ == "__main__":
    sys.exit(main())
