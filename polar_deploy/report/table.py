"""The table at the end of a run: full network against compressed network, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_STYLES = {"pass": "bold green", "fail": "bold red", "undecided": "bold yellow"}


def table(report: dict[str, Any], console: Console) -> None:
    """Print report.json as one table on `console`; 80 columns are enough."""
    from rich.table import Table

    title = f"{report['model']} on {report['data']}, {report['target']}, full network {report['full']}"
    grid = Table(title=title, caption=_verdict(report["verdict"]), caption_style="", caption_justify="left")
    grid.add_column("")
    for heading in ("full", "compressed"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("difference")
    for row in _rows(report):
        grid.add_row(*row)
    console.print(grid)


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    accuracy, blocks = report["accuracy"], report["blocks"]
    low, high = accuracy["interval"]
    change = f"{-accuracy['drop']:+.2f} points ({-high:+.2f} to {-low:+.2f})"
    rows = [("accuracy", f"{accuracy['full']:.2f} %", f"{accuracy['compressed']:.2f} %", change)]
    for label, key, unit in (("MACs", "macs", ""), ("parameters", "params", ""), ("file size", "bytes", "B")):
        full, compressed, ratio = (report[key][name] for name in ("full", "compressed", "ratio"))
        rows.append((label, _short(full, unit), _short(compressed, unit), f"{100 * ratio:.1f} % of full"))
    for measured in report["latency"]:
        rows.extend(_latency(measured))
    kept = blocks["total"] - blocks["removed"]
    rows.append(("gated blocks", str(blocks["total"]), str(kept), f"{blocks['removed']} of {blocks['total']} removed"))
    return rows


def _latency(measured: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Two rows for one batch size: median with the speed-up, and the 99th percentile."""
    label, speedup = f"batch {measured['batch']}", measured["speedup"]
    full, compressed = measured["full"], measured["compressed"]
    answer = f"{speedup['median']:.2f}× as fast ({speedup['low']:.2f} to {speedup['high']:.2f})"
    if not measured["decided"]:
        answer = f"undecided: noise of {100 * abs(measured['control']['median'] - 1):.1f} %"
    return [
        (f"latency, {label}", _milliseconds(full["median_ms"]), _milliseconds(compressed["median_ms"]), answer),
        (f"p99, {label}", _milliseconds(full["p99_ms"]), _milliseconds(compressed["p99_ms"]), ""),
    ]


def _verdict(verdict: dict[str, Any]) -> Text:
    """The overall result, then each part with its reason, on lines of their own."""
    from rich.text import Text

    overall = verdict["overall"]["result"]
    text = Text.assemble("verdict: ", (overall.upper(), _STYLES[overall]))
    for part in ("accuracy", "latency"):
        result = verdict[part]["result"]
        text.append("\n").append(result, _STYLES[result]).append(f": {verdict[part]['reason']}")
    return text


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def _short(count: int, unit: str) -> str:
    """1234567 -> "1.23 M"; with the unit B -> "1.23 MB"."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count} {unit}".strip()
