"""The table at the end of a run: full network against compressed network, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polar_deploy.documents.parity import Loss, Metric, known_drop
from polar_deploy.documents.part import Pair
from polar_deploy.documents.report import EngineLayers, Predicted, Report, Timed, Trained, Trainings
from polar_deploy.report.advice import advise
from polar_deploy.report.formats import milliseconds, relative, score, short
from polar_deploy.tasks.metric import difference_unit, signed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Row = tuple[str, str, str, str]
_STYLES = {"pass": "bold green", "fail": "bold red", "undecided": "bold yellow"}


def table(report: Report, console: Console) -> None:
    """Print report.json as one table on `console`; 80 columns are enough."""
    from rich.table import Table

    title = f"{report.model} on {report.data}, {report.target}, full network {report.full}"
    grid = Table(title=title, caption=_verdict(report), caption_style="", caption_justify="left")
    grid.add_column("")
    for heading in ("full", "compressed"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("difference")
    for row in _rows(report):
        grid.add_row(*row)
    console.print(grid)


def _rows(report: Report) -> list[Row]:
    blocks, rows = report.blocks, [*_accuracy(report), *_budget(report)]
    for label, cost, unit in (
        ("MACs", report.macs, ""),
        ("parameters", report.params, ""),
        ("file size", report.bytes, "B"),
    ):
        shown = f"{100 * cost.ratio:.1f} % of full"
        rows.append((label, short(cost.full, unit), short(cost.compressed, unit), shown))
    for measured in report.latency:
        rows.extend(_latency(measured))
    if report.predicted:
        rows.append(_predicted(report.predicted, report.latency))
    if report.latency:
        rows.extend(_at_largest(report.latency[-1]))
    rows.extend(_layers(report.layers))
    if trained := _training(report.training):
        rows.append(trained)
    if blocks.total:
        kept = blocks.total - blocks.removed
        rows.append(("gated blocks", str(blocks.total), str(kept), f"{blocks.removed} of {blocks.total} removed"))
    return rows


def _accuracy(report: Report) -> list[Row]:
    """Scores of the engines, or of their FP32 graphs where they cannot run; and what the precision costs."""
    scores, metric, rows = report.counted, report.metric, []
    if scores and metric:
        change = ""
        if known := known_drop(scores):
            drop, low, high = known
            change = f"{signed(-drop)} {difference_unit(metric.unit)} ({signed(-high)} to {signed(-low)})"
        label = metric.name if report.accuracy else f"{metric.name}, graphs"
        rows.append((label, score(scores.full, metric.unit), score(scores.compressed, metric.unit), change))
    elif report.outputs:
        rows.append(("outputs", "", "", f"differ by {relative(report.outputs.relative_difference)}"))
    full, compressed = report.precision.full, report.precision.compressed
    if full.loss and compressed.loss:
        label = "engine vs graph" if full.asked == "fp32" else f"{full.asked} vs fp32"
        rows.append((label, *_losses(full.loss, compressed.loss, metric)))
    rows.extend(_graphs(report))
    wider, pruned = len(full.high_precision_layers), len(compressed.high_precision_layers)
    if wider or pruned:
        rows.append(("layers kept wider", str(wider), str(pruned), "see build.json"))
    return rows


def _budget(report: Report) -> list[Row]:
    """What was asked for, what was chosen by it, and how a latency came out: the verdict asks whether it is faster."""
    rows = []
    for name, share in report.budget.achieved.items():
        told = f"{report.budget.asked[name]:g} asked"
        if name == "latency" and (speedup := _speedup(report.latency, report.predicted)):
            told += f", {1 / speedup:.3f} measured"
        rows.append((f"budget, {name}", "1", f"{share:.3f}", told))
    return rows


def _speedup(latency: Sequence[Timed], predicted: Predicted | None) -> float | None:
    """The median at the batch size of the latency table; None where there is none, or it was not measured."""
    return next((each.speedup.median for each in latency if predicted and each.batch == predicted.batch), None)


def _losses(full: Loss, compressed: Loss, metric: Metric | None) -> tuple[str, str, str]:
    """What the precision costs both engines: in the metric, or else in their outputs."""
    if metric is None or full.drop is None or compressed.drop is None:
        return relative(full.relative_difference), relative(compressed.relative_difference), "of the outputs"
    agree = f"; {compressed.agreement:.2f} % agree" if compressed.agreement is not None else ""
    return signed(-full.drop), signed(-compressed.drop), f"{difference_unit(metric.unit)}{agree}"


def _graphs(report: Report) -> list[Row]:
    """What pruning costs in FP32, and what export and surgery changed: the losses that no engine makes."""
    rows, graphs, metric = [], report.graphs, report.metric
    if report.accuracy and graphs and metric and report.precision.full.asked != "fp32":
        change = "" if graphs.drop is None else f"{signed(-graphs.drop)} {difference_unit(metric.unit)}"
        rows.append(("as FP32 graphs", score(graphs.full, metric.unit), score(graphs.compressed, metric.unit), change))
    if report.export:
        surgery = f"surgery: {relative(report.surgery.relative_difference)}" if report.surgery else ""
        rows.append(("export differs by", relative(report.export.full), relative(report.export.gated), surgery))
    return rows


def _layers(layers: Pair[EngineLayers]) -> list[Row]:
    """What the engines run, and what of that only moves values about."""
    full, compressed = layers.full, layers.compressed
    counts = (
        ("layers", full.layers, compressed.layers, ""),
        ("reformats", full.reformats, compressed.reformats, "change a format only"),
        ("padded channels", full.padded_channels, compressed.padded_channels, "fill up formats"),
    )
    return [(label, str(a), str(b), note) for label, a, b, note in counts if a is not None and b is not None]


def _predicted(predicted: Predicted, latency: Sequence[Timed]) -> Row:
    """What the latency table promised, and by how much what was measured differs from it."""
    full, compressed = predicted.full_ms, predicted.compressed_ms
    row = (f"by table, batch {predicted.batch}", milliseconds(full), milliseconds(compressed))
    speedup = _speedup(latency, predicted)
    off = f", off by {100 * (compressed / full * speedup - 1):+.1f} %" if speedup else ""
    return (*row, f"{full / compressed:.2f}× as fast{off}")


def _training(training: Trainings[Trained | None]) -> Row | None:
    """What training took; None where the gated network was not trained here."""
    full, gated = training.full, training.gated
    if gated is None:
        return None
    costs = (
        ((full.seconds, gated.seconds, "time"), (full.macs, gated.macs, "MACs"), (full.joules, gated.joules, "energy"))
        if full
        else ()
    )
    ratio = ", ".join(f"{after / before:.2f}× {words}" for before, after, words in costs if before and after)
    before, after = (f"{each.seconds:,.0f} s" if each else "given" for each in (full, gated))
    return ("training", before, after, ratio)


def _at_largest(measured: Timed) -> list[Row]:
    """Throughput, and energy where the device counts it, at the largest batch."""
    rate, energy = measured.images_per_second, measured.energy_mj
    rows = [("images a second", f"{rate.full:,.0f}", f"{rate.compressed:,.0f}", f"at batch {measured.batch}")]
    if energy.full and energy.compressed:
        most, less = (f"{each / measured.batch:.3g} mJ" for each in (energy.full, energy.compressed))
        rows.append(("energy an image", most, less, f"{100 * energy.compressed / energy.full:.1f} % of full"))
    return rows


def _latency(measured: Timed) -> list[Row]:
    """Two rows for one batch size: median with the speed-up, and the 99th percentile."""
    label, speedup = f"batch {measured.batch}", measured.speedup_with_noise
    full, compressed = measured.full, measured.compressed
    answer = f"{speedup.median:.2f}× as fast ({speedup.low:.2f} to {speedup.high:.2f})"
    if not measured.decided:
        answer = f"undecided: noise of {100 * abs(measured.control.median - 1):.1f} %"
    before, after = (each.tail["p99"] for each in (full, compressed))
    few = "too few samples for an interval" if None in (before.high_ms, after.high_ms) else ""
    return [
        (f"latency, {label}", milliseconds(full.median_ms), milliseconds(compressed.median_ms), answer),
        (f"p99, {label}", milliseconds(before.value_ms), milliseconds(after.value_ms), few),
    ]


def _verdict(report: Report) -> Text:
    """The overall result, then each part with its reason, then what helps most, on lines of their own."""
    from rich.text import Text

    verdict = report.verdict
    overall = verdict.overall.result
    text = Text.assemble("verdict: ", (overall.upper(), _STYLES[overall]))
    for each in (verdict.accuracy, verdict.latency):
        text.append("\n").append(each.result, _STYLES[each.result]).append(f": {each.reason}")
    if overall == "pass":
        return text
    step = advise(report).steps[0].text
    return text.append(f"\nwhat to do: {step} More in report.html, and in docs/what-now.md.")
