"""The table at the end of a run: full network against compressed network, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_deploy.report.formats import difference_unit, milliseconds, relative, score, short

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
    blocks, rows = report["blocks"], _accuracy(report)
    for label, key, unit in (("MACs", "macs", ""), ("parameters", "params", ""), ("file size", "bytes", "B")):
        full, compressed, ratio = (report[key][name] for name in ("full", "compressed", "ratio"))
        rows.append((label, short(full, unit), short(compressed, unit), f"{100 * ratio:.1f} % of full"))
    for measured in report["latency"]:
        rows.extend(_latency(measured))
    if report["predicted"]:
        rows.append(_predicted(report["predicted"], report["latency"]))
    if report["latency"]:
        rows.extend(_at_largest(report["latency"][-1]))
    rows.extend(_layers(report["layers"]))
    kept = blocks["total"] - blocks["removed"]
    if trained := _training(report["training"]):
        rows.append(trained)
    rows.append(("gated blocks", str(blocks["total"]), str(kept), f"{blocks['removed']} of {blocks['total']} removed"))
    return rows


def _accuracy(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Scores of the engines, or of their FP32 graphs where they cannot run; and what the precision costs."""
    scores, metric = report["accuracy"] or report["graphs"], report["metric"]
    rows: list[tuple[str, str, str, str]] = []
    if scores:
        low, high = scores["interval"]
        change = f"{-scores['drop']:+.2f} {difference_unit(metric['unit'])} ({-high:+.2f} to {-low:+.2f})"
        label = metric["name"] if report["accuracy"] else f"{metric['name']}, graphs"
        full_score, compressed_score = (score(scores[name], metric["unit"]) for name in ("full", "compressed"))
        rows.append((label, full_score, compressed_score, change))
    elif report["outputs"]:
        apart = f"differ by {relative(report['outputs']['relative_difference'])}"
        rows.append(("outputs", "", "", apart))
    full, compressed = (report["precision"][name] for name in ("full", "compressed"))
    asked = full["asked"]
    if full["loss"] and compressed["loss"]:
        plain, pruned, agree = _losses(full["loss"], compressed["loss"], metric)
        rows.append(("engine for graph" if asked == "fp32" else f"{asked} for fp32", plain, pruned, agree))
    rows.extend(_graphs(report))
    if full["high_precision_layers"] or compressed["high_precision_layers"]:
        rows.append(
            (
                "layers kept wider",
                str(len(full["high_precision_layers"])),
                str(len(compressed["high_precision_layers"])),
                "see build.json",
            )
        )
    return rows


def _losses(full: dict[str, Any], compressed: dict[str, Any], metric: dict[str, Any] | None) -> tuple[str, str, str]:
    """What the precision costs both engines: in the metric, or else in their outputs."""
    if metric is None:
        return relative(full["relative_difference"]), relative(compressed["relative_difference"]), "of the outputs"
    plain, pruned = (f"{0 - each['drop']:+.2f}" for each in (full, compressed))
    agree = f"; {compressed['agreement']:.2f} % agree" if "agreement" in compressed else ""
    return plain, pruned, f"{difference_unit(metric['unit'])}{agree}"


def _graphs(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What pruning costs in FP32, and what export and surgery changed: the losses that no engine makes."""
    rows = []
    if report["accuracy"] and report["graphs"] and report["precision"]["full"]["asked"] != "fp32":
        graphs = report["graphs"]
        change, unit = f"{-graphs['drop']:+.2f} {difference_unit(report['metric']['unit'])}", report["metric"]["unit"]
        rows.append(("as FP32 graphs", score(graphs["full"], unit), score(graphs["compressed"], unit), change))
    if report["export"]:
        full, gated = (relative(report["export"][name]) for name in ("full", "gated"))
        surgery = f"surgery {relative(report['surgery']['relative_difference'])}" if report["surgery"] else ""
        rows.append(("export, largest", full, gated, surgery))
    return rows


def _layers(layers: dict[str, dict[str, int | None]]) -> list[tuple[str, str, str, str]]:
    """What the engines run, and what of that only moves values about."""
    notes = {"layers": "", "reformats": "change a format only", "padded_channels": "fill up formats"}
    rows = []
    for key, note in notes.items():
        full, compressed = layers["full"][key], layers["compressed"][key]
        if full is not None and compressed is not None:
            rows.append((key.replace("_", " "), str(full), str(compressed), note))
    return rows


def _predicted(predicted: dict[str, Any], latency: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """What the latency table promised, and by how much what was measured differs from it."""
    full, compressed = predicted["full_ms"], predicted["compressed_ms"]
    row = (f"by table, batch {predicted['batch']}", milliseconds(full), milliseconds(compressed))
    measured = [each["speedup"]["median"] for each in latency if each["batch"] == predicted["batch"]]
    off = f", off by {100 * (compressed / full * measured[0] - 1):+.1f} %" if measured else ""
    return (*row, f"{full / compressed:.2f}× as fast{off}")


def _training(training: dict[str, dict[str, Any] | None]) -> tuple[str, str, str, str] | None:
    """What training took; None where the gated network was not trained here."""
    full, gated = training["full"], training["gated"]
    if gated is None:
        return None
    kinds = {"seconds": "time", "macs": "MACs", "joules": "energy"}
    ratio = ", ".join(
        f"{gated[key] / full[key]:.2f}× {words}" for key, words in kinds.items() if full and full[key] and gated[key]
    )
    before, after = (f"{each['seconds']:,.0f} s" if each else "given" for each in (full, gated))
    return ("training", before, after, ratio)


def _at_largest(measured: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Throughput, and energy where the device counts it, at the largest batch."""
    full, compressed = (measured["images_per_second"][name] for name in ("full", "compressed"))
    rows = [("images a second", f"{full:,.0f}", f"{compressed:,.0f}", f"at batch {measured['batch']}")]
    full, compressed = (measured["energy_mj"][name] for name in ("full", "compressed"))
    if full and compressed:
        most, less = (f"{energy / measured['batch']:.3g} mJ" for energy in (full, compressed))
        rows.append(("energy an image", most, less, f"{100 * compressed / full:.1f} % of full"))
    return rows


def _latency(measured: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Two rows for one batch size: median with the speed-up, and the 99th percentile."""
    label, speedup = f"batch {measured['batch']}", measured["speedup_with_noise"]
    full, compressed = measured["full"], measured["compressed"]
    answer = f"{speedup['median']:.2f}× as fast ({speedup['low']:.2f} to {speedup['high']:.2f})"
    if not measured["decided"]:
        answer = f"undecided: noise of {100 * abs(measured['control']['median'] - 1):.1f} %"
    before, after = (each["tail"]["p99"] for each in (full, compressed))
    few = "too few samples for an interval" if None in (before["high_ms"], after["high_ms"]) else ""
    return [
        (f"latency, {label}", milliseconds(full["median_ms"]), milliseconds(compressed["median_ms"]), answer),
        (f"p99, {label}", milliseconds(before["value_ms"]), milliseconds(after["value_ms"]), few),
    ]


def _verdict(verdict: dict[str, Any]) -> Text:
    """The overall result, then each part with its reason, on lines of their own."""
    from rich.text import Text

    overall = verdict["overall"]["result"]
    text = Text.assemble("verdict: ", (overall.upper(), _STYLES[overall]))
    for part in ("accuracy", "latency"):
        result = verdict[part]["result"]
        text.append("\n").append(result, _STYLES[result]).append(f": {verdict[part]['reason']}")
    return text if overall == "pass" else text.append("\nwhat to do: report.html, and docs/what-now.md")
