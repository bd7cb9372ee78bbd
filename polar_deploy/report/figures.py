"""The pictures of the page, each from the figures of report.json that it shows; one without figures is left out."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from polar_deploy.documents.parity import Interval, Metric, known_drop
from polar_deploy.documents.report import NamedClass, Predicted, Report, Site, Timed, Trained, Trainings
from polar_deploy.documents.training_log import Curves
from polar_deploy.report import charts, formats
from polar_deploy.report.charts import Bar, Cell, Curve, Estimate
from polar_deploy.report.skyline import skyline
from polar_deploy.tasks.metric import difference_unit

MOST_ROWS = 60  # of a map; the rest stands in a table
MOST_CLASSES = 20


def draw(report: Report) -> dict[str, Markup | list[Markup]]:
    """All pictures that this run has figures for, by name."""
    found = {
        "accuracy": _accuracy(report),
        "classes": _classes(report.classes, report.metric),
        "speed": _speed(report),
        "distributions": [_distribution(each) for each in report.latency if each.quantiles_ms.full],
        "network": skyline(report.network.layers, report.blocks.removed),
        "savings": _savings(report),
        "saved_ms": _saved_ms(report.predicted),
        "learning": _learning(report),
        "budget": _budget(report),
        "closing": _closing(report),
        "polarization": _polarization(report.history.gated),
        "training": _training(report.training),
    }
    return {name: figure for name, figure in found.items() if figure}


def _accuracy(report: Report) -> Markup | None:
    named = [
        ("compressed against full engine", known_drop(report.accuracy)),
        ("by what was removed (FP32 graphs)", known_drop(report.graphs)),
    ]
    precisions = report.precision.named().items()
    if report.accuracy and not any(each.loss and each.loss.drop for _, each in precisions):
        named = named[:1]  # engines that give what their FP32 graphs give: nothing to tell apart
    else:
        named += [(f"by {each.asked} in the {name} engine", known_drop(each.loss)) for name, each in precisions]
    metric = report.metric
    if metric is None:
        return None
    unit = difference_unit(metric.unit)
    rows = [
        Estimate(label, -known[0], -known[2], -known[1], formats.change(known[0], metric.unit))
        for label, known in named
        if known
    ]
    if not rows:
        return None
    allowed = report.verdict.max_drop
    return charts.intervals(
        f"{formats.heading(metric.name)}, change in {'percentage points' if unit == 'points' else unit or 'its unit'}",
        "; ".join(f"{row.label}: {row.shown}, 95 % from {row.low:.2f} to {row.high:.2f}" for row in rows)
        + f". A drop of {allowed:g} is allowed.",
        rows,
        f"change{f' in {unit}' if unit else ''}, with 95 % interval",
        bound=(-allowed, f"−{allowed:g} allowed"),
    )


def _classes(classes: Sequence[NamedClass] | None, metric: Metric | None) -> Markup | None:
    """The classes that change: all of few, the ends of many."""
    ordered = sorted((each for each in classes or () if each.drop), key=lambda each: -each.drop)
    if not classes or not ordered or metric is None:
        return None
    unit = metric.unit
    shown = ordered if len(ordered) <= MOST_CLASSES else [*ordered[:14], *ordered[-6:]]
    rows = [
        Bar(
            f"{each.name} ({each.samples})",
            -each.drop,
            f"{formats.change(each.drop, unit)}, now {formats.score(each.compressed, unit)}",
            "loss" if each.drop > 0 else "gain",
        )
        for each in shown
    ]
    losing = sum(each.drop > 0 for each in classes)
    about = f"{losing} of {len(classes)} classes lose {metric.name}; {ordered[0].name} changes by {rows[0].shown}."
    title = "Change by class" + (", in percentage points" if unit == "%" else f", in {unit}" if unit else "")
    return charts.bars(title, about, rows, signed=True)


def _speed(report: Report) -> Markup | None:
    measured = [(f"batch {each.batch}", each.speedup_with_noise, each.decided) for each in report.latency]
    return (
        speedups("Speed-up over the full engine", measured, report.verdict.min_speedup, report.verdict.batch)
        if measured
        else None
    )


def speedups(title: str, measured: Sequence[tuple[str, Interval, bool]], least: float, batch: int) -> Markup:
    """Speed-ups against what is asked.

    Args:
        title: of the picture.
        measured: what each is of, its median with an interval, and whether it was decided.
        least: what is asked, at this `batch`.
    """
    rows = [
        Estimate(
            label,
            speedup.median,
            speedup.low,
            speedup.high,
            formats.times(speedup.median) if decided else "too noisy to tell",
            decided,
        )
        for label, speedup, decided in measured
    ]
    told = "; ".join(f"{row.label}: {row.shown}, 95 % from {row.low:.2f} to {row.high:.2f}" for row in rows)
    return charts.intervals(
        title,
        f"{told}. At batch {batch}, {least:g} is asked.",
        rows,
        "times as fast, with 95 % interval",
        bound=(least, f"{least:g}× asked"),
    )


def _distribution(measured: Timed) -> Markup:
    both = [(name, name, quantiles) for name, quantiles in measured.quantiles_ms.named().items()]
    told = "; ".join(
        f"{name}: median {formats.milliseconds(latency.median_ms)}, 99th percentile "
        f"{formats.milliseconds(latency.tail['p99'].value_ms)}"
        for name, latency in (("full", measured.full), ("compressed", measured.compressed))
    )
    return charts.distribution(f"Latency at batch {measured.batch}", f"{told}.", both)


def _savings(report: Report) -> Markup:
    """Whole costs in parts; milliseconds as they were measured."""
    rows = []
    for label, full, parts in (
        ("MACs", report.macs.full, report.savings.macs),
        ("parameters", report.params.full, report.savings.params),
    ):
        pieces = [
            (style, part / full, f"{100 * part / full:.0f} % {word}")
            for part, style, word in (
                (parts.left, "small", "left"),
                (parts.narrowed, "mild", "narrowed"),
                (parts.removed, "gone", "removed"),
            )
        ]
        rows.append((f"{label}: {formats.short(full)} → {formats.short(parts.left)}", pieces))
    for each in report.latency:
        before, after = each.full.median_ms, each.compressed.median_ms
        left = min(1.0, after / before)
        pieces = [("small", left, f"{100 * after / before:.0f} % left")]
        if left < 1:
            pieces.append(("mild", 1 - left, f"{100 * (1 - left):.0f} % saved"))
        shown = f"{formats.milliseconds(before)} → {formats.milliseconds(after)}"
        rows.append((f"latency at batch {each.batch}: {shown}", pieces))
    told = "; ".join(f"{label}: {', '.join(piece[2] for piece in pieces)}" for label, pieces in rows)
    return charts.shares("Where the savings came from", f"{told}.", rows)


def _saved_ms(predicted: Predicted | None) -> Markup | None:
    if predicted is None:
        return None
    saved = sorted((each for each in predicted.saved if each.ms > 0), key=lambda each: -each.ms)[:16]
    if not saved:
        return None
    rows = [Bar(f"{each.name} ({each.kind})", each.ms, formats.milliseconds(each.ms)) for each in saved]
    about = f"By the latency table at batch {predicted.batch}, most comes from {rows[0].label}: {rows[0].shown}."
    return charts.bars("Milliseconds saved, by place", about, rows)


def _learning(report: Report) -> Markup | None:
    """The metric in validation of both networks; of a final run, which has none, in training."""
    metric = report.metric
    if metric is None:
        return None
    unit = metric.unit
    history = report.history
    validated = any(each.val_score is not None for each in history.gated)
    lines = []
    for epochs, style, label in ((history.full, "full", "full network"), (history.gated, "compressed", "with gates")):
        scores = ((each.epoch, each.val_score if validated else each.train_score) for each in epochs if each.epoch)
        points = [(epoch, score) for epoch, score in scores if score is not None]
        if points:
            lines.append(Curve(label, points, style))
    if not lines:
        return None
    given = [each.val_score for each in history.full if not each.epoch and each.val_score is not None]
    levels = [(given[0], "full network, as given")] if given else []
    what = "Validation" if validated else "Training"
    last = "; ".join(f"{each.label} ends at {formats.score(each.points[-1][1], unit)}" for each in lines)
    return charts.curves(
        f"{what} {metric.name}",
        f"{last}.",
        lines,
        "epoch",
        unit=f" {unit}".rstrip(),
        marks=_frozen(report),
        levels=levels,
    )


def _frozen(report: Report) -> list[tuple[float, str]]:
    return [(report.freeze.epoch, "gates fixed")] if report.freeze else []


def _budget(report: Report) -> Markup | None:
    history, asked = report.history.gated, report.budget.asked
    lines = [
        Curve(name, [(0, 1.0), *((each.epoch, each.costs[name]) for each in history if each.costs)], style)
        for name, style in zip(asked, ("compressed", "full", "third"), strict=False)
    ]
    if not history or len(lines[0].points) < 2:
        return None
    told = "; ".join(
        f"{each.label} comes down to {each.points[-1][1]:.3f}, {share:g} asked"
        for each, share in zip(lines, asked.values(), strict=False)
    )
    levels = [(share, f"{name} asked: {share:g}") for name, share in asked.items()]
    return charts.curves(
        "Cost against budget", f"{told}.", lines, "epoch", marks=_frozen(report), levels=levels, low=0.0, high=1.05
    )


def _closing(report: Report) -> Markup | None:
    """When each place for gates was narrowed: those that were, the largest loss first where there are many."""
    epochs = len([each for each in report.history.gated if each.costs])
    changed = [site for site in report.sites if site.changes]
    if not changed or not epochs:
        return None
    if len(changed) > MOST_ROWS:
        kept = sorted(changed, key=lambda site: site.open / site.width)[:MOST_ROWS]
        changed = [site for site in changed if site in kept]
    rows = [(f"{site.name}", _cells(site, epochs)) for site in changed]
    about = f"{len(changed)} of {len(report.sites)} places for gates changed while the network was trained."
    return charts.rows_over_time("When gates closed", about, rows, "epoch", marks=_frozen(report))


def _cells(site: Site, epochs: int) -> list[Cell]:
    """Stretches of epochs in which as many gates of a site were open."""
    changes = [(0, site.width), *site.changes]
    ends = [each[0] for each in changes[1:]] + [epochs]
    return [
        Cell(
            start,
            end,
            opened / site.width,
            f"{site.name}, epoch {start} to {end}: {opened} of {site.width} open",
        )
        for (start, opened), end in zip(changes, ends, strict=True)
    ]


def _polarization(history: Sequence[Curves]) -> Markup | None:
    """Gates by the share of samples (or steps) that open them, epoch by epoch: they move to both ends."""
    learned = [(each.epoch, each.shares) for each in history if each.shares]
    if not learned:
        return None
    bins = len(learned[0][1])
    rows = []
    for index in reversed(range(bins)):
        cells = [
            Cell(epoch - 1, epoch, (shares[index] / (sum(shares) or 1)) ** 0.5, f"epoch {epoch}: {shares[index]} gates")
            for epoch, shares in learned
        ]
        rows.append((f"open for {100 * index // bins}–{100 * (index + 1) // bins} %", cells))
    epoch, undecided = [(each.epoch, each.undecided) for each in history if each.undecided is not None][-1]
    about = f"In epoch {epoch}, {100 * undecided:.1f} % of the gates were still undecided."
    return charts.rows_over_time("Polarization of the gates", about, rows, "epoch, while gates learn", marks=())


def _training(training: Trainings[Trained | None]) -> Markup | None:
    full, gated = training.full, training.gated
    if gated is None:
        return None
    rows = []
    for label, each, style in (
        ("training once: the full network", full, "full"),
        ("training with gates", gated, "small"),
    ):
        if each:
            energy = f", {formats.short(each.joules, 'J')}" if each.joules is not None else ""
            shown = f"{formats.seconds(each.seconds)}, {formats.short(each.macs)} MACs{energy}"
            rows.append(Bar(f"{label}, {each.epochs} epochs", each.seconds, shown, style))
    return charts.bars("What training took", "; ".join(f"{row.label}: {row.shown}" for row in rows) + ".", rows)
