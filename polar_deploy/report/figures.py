"""The pictures of the page, each from the figures of report.json that it shows; one without figures is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from polar_deploy.report import charts, formats
from polar_deploy.report.charts import Bar, Cell, Curve, Estimate
from polar_deploy.report.skyline import skyline

MOST_ROWS = 60  # of a map; the rest stands in a table
MOST_CLASSES = 20


def draw(report: dict[str, Any]) -> dict[str, Markup | list[Markup]]:
    """All pictures that this run has figures for, by name."""
    found = {
        "accuracy": _accuracy(report),
        "classes": _classes(report["classes"], report["metric"]),
        "speed": _speed(report),
        "distributions": [_distribution(each) for each in report["latency"] if each["quantiles_ms"]["full"]],
        "network": skyline(report["network"]["layers"], report["blocks"]["removed"]),
        "savings": _savings(report),
        "saved_ms": _saved_ms(report["predicted"]),
        "learning": _learning(report),
        "budget": _budget(report),
        "closing": _closing(report),
        "polarization": _polarization(report["history"]["gated"]),
        "training": _training(report["training"]),
    }
    return {name: figure for name, figure in found.items() if figure}


def _accuracy(report: dict[str, Any]) -> Markup | None:
    graphs = ("by what was removed (FP32 graphs)", report["graphs"])
    named = [("compressed against full engine", report["accuracy"]), graphs]
    for name in ("full", "compressed"):
        precision = report["precision"][name]
        named.append((f"by {precision['asked']} in the {name} engine", precision["loss"]))
    if report["accuracy"] and all(each is None or not each.get("drop") for _, each in named[2:]):
        named = named[:1]  # engines that give what their FP32 graphs give: nothing to tell apart
    metric = report["metric"]
    if metric is None:
        return None
    unit = formats.difference_unit(metric["unit"])
    rows = [
        Estimate(
            label,
            -each["drop"],
            -each["interval"][1],
            -each["interval"][0],
            formats.change(each["drop"], metric["unit"]),
        )
        for label, each in named
        if each
    ]
    if not rows:
        return None
    allowed = report["verdict"]["max_drop"]
    return charts.intervals(
        f"{formats.heading(metric['name'])}, change in "
        f"{'percentage points' if unit == 'points' else unit or 'its unit'}",
        "; ".join(f"{row.label}: {row.shown}, 95 % from {row.low:.2f} to {row.high:.2f}" for row in rows)
        + f". A drop of {allowed:g} is allowed.",
        rows,
        f"change{f' in {unit}' if unit else ''}, with 95 % interval",
        bound=(-allowed, f"−{allowed:g} allowed"),
        good=1,
    )


def _classes(classes: Sequence[Mapping[str, Any]] | None, metric: Mapping[str, str] | None) -> Markup | None:
    """The classes that change: all of few, the ends of many."""
    ordered = sorted((each for each in classes or () if each["drop"]), key=lambda each: -each["drop"])
    if not classes or not ordered or metric is None:
        return None
    unit = metric["unit"]
    shown = ordered if len(ordered) <= MOST_CLASSES else [*ordered[:14], *ordered[-6:]]
    rows = [
        Bar(
            f"{each['name']} ({each['samples']})",
            -each["drop"],
            f"{formats.change(each['drop'], unit)}, now {formats.score(each['compressed'], unit)}",
            "loss" if each["drop"] > 0 else "gain",
        )
        for each in shown
    ]
    losing = sum(each["drop"] > 0 for each in classes)
    about = (
        f"{losing} of {len(classes)} classes lose {metric['name']}; {ordered[0]['name']} changes by {rows[0].shown}."
    )
    title = "Change by class" + (", in percentage points" if unit == "%" else f", in {unit}" if unit else "")
    return charts.bars(title, about, rows, signed=True)


def _speed(report: dict[str, Any]) -> Markup | None:
    measured = [(f"batch {each['batch']}", each["speedup_with_noise"], each["decided"]) for each in report["latency"]]
    return speedups("Speed-up over the full engine", measured, report["verdict"]) if measured else None


def speedups(title: str, measured: Sequence[tuple[str, Mapping[str, float], bool]], asked: Mapping[str, Any]) -> Markup:
    """Speed-ups against what is asked.

    Args:
        title: of the picture.
        measured: what each is of, its median with an interval, and whether it was decided.
        asked: `min_speedup`, and the `batch` at which it is asked.
    """
    rows = [
        Estimate(
            label,
            speedup["median"],
            speedup["low"],
            speedup["high"],
            formats.times(speedup["median"]) if decided else "too noisy to tell",
            decided,
        )
        for label, speedup, decided in measured
    ]
    least = asked["min_speedup"]
    told = "; ".join(f"{row.label}: {row.shown}, 95 % from {row.low:.2f} to {row.high:.2f}" for row in rows)
    return charts.intervals(
        title,
        f"{told}. At batch {asked['batch']}, {least:g} is asked.",
        rows,
        "times as fast, with 95 % interval",
        bound=(least, f"{least:g}× asked"),
        good=1,
    )


def _distribution(measured: Mapping[str, Any]) -> Markup:
    both = [(name, name, measured["quantiles_ms"][name]) for name in ("full", "compressed")]
    told = "; ".join(
        f"{name}: median {formats.milliseconds(measured[name]['median_ms'])}, 99th percentile "
        f"{formats.milliseconds(measured[name]['tail']['p99']['value_ms'])}"
        for name, _, _ in both
    )
    return charts.distribution(f"Latency at batch {measured['batch']}", f"{told}.", both)


def _savings(report: dict[str, Any]) -> Markup:
    """Whole costs in parts; milliseconds as they were measured."""
    rows = []
    for key, label in (("macs", "MACs"), ("params", "parameters")):
        parts, full = report["savings"][key], report[key]["full"]
        pieces = [
            (style, parts[name] / full, f"{100 * parts[name] / full:.0f} % {word}")
            for name, style, word in (
                ("left", "small", "left"),
                ("narrowed", "mild", "narrowed"),
                ("removed", "gone", "removed"),
            )
        ]
        rows.append((f"{label}: {formats.short(full)} → {formats.short(parts['left'])}", pieces))
    for each in report["latency"]:
        full, compressed = each["full"]["median_ms"], each["compressed"]["median_ms"]
        left = min(1.0, compressed / full)
        pieces = [("small", left, f"{100 * left:.0f} % left"), ("mild", 1 - left, f"{100 * (1 - left):.0f} % saved")]
        shown = f"{formats.milliseconds(full)} → {formats.milliseconds(compressed)}"
        rows.append((f"latency at batch {each['batch']}: {shown}", pieces))
    told = "; ".join(f"{label}: {', '.join(piece[2] for piece in pieces)}" for label, pieces in rows)
    return charts.shares("Where the savings came from", f"{told}.", rows)


def _saved_ms(predicted: Mapping[str, Any] | None) -> Markup | None:
    if predicted is None:
        return None
    saved = sorted((each for each in predicted["saved"] if each["ms"] > 0), key=lambda each: -each["ms"])[:16]
    if not saved:
        return None
    rows = [Bar(f"{each['name']} ({each['kind']})", each["ms"], formats.milliseconds(each["ms"])) for each in saved]
    about = f"By the latency table at batch {predicted['batch']}, most comes from {rows[0].label}: {rows[0].shown}."
    return charts.bars("Milliseconds saved, by place", about, rows)


def _learning(report: dict[str, Any]) -> Markup | None:
    """The metric in validation of both networks; of a final run, which has none, in training."""
    metric = report["metric"]
    if metric is None:
        return None
    unit = metric["unit"]
    history = report["history"]
    key = "val_score" if any(each.get("val_score") is not None for each in history["gated"]) else "train_score"
    lines = []
    for name, style, label in (("full", "full", "full network"), ("gated", "compressed", "with gates")):
        points = [(each["epoch"], each[key]) for each in history[name] if each.get(key) is not None and each["epoch"]]
        if points:
            lines.append(Curve(label, points, style))
    if not lines:
        return None
    given = [each["val_score"] for each in history["full"] if not each["epoch"] and each["val_score"] is not None]
    levels = [(given[0], "full network, as given")] if given else []
    what = "Validation" if key == "val_score" else "Training"
    last = "; ".join(f"{each.label} ends at {formats.score(each.points[-1][1], unit)}" for each in lines)
    return charts.curves(
        f"{what} {metric['name']}",
        f"{last}.",
        lines,
        "epoch",
        unit=f" {unit}".rstrip(),
        marks=_frozen(report),
        levels=levels,
    )


def _frozen(report: Mapping[str, Any]) -> list[tuple[float, str]]:
    return [(report["freeze"]["epoch"], "gates fixed")] if report["freeze"] else []


def _budget(report: dict[str, Any]) -> Markup | None:
    history, asked = report["history"]["gated"], report["budget"]["asked"]
    lines = [
        Curve(name, [(0, 1.0), *((each["epoch"], each["costs"][name]) for each in history if "costs" in each)], style)
        for name, style in zip(asked, ("compressed", "full", "third"), strict=False)
    ]
    if not history or len(lines[0].points) < 2:
        return None
    told = "; ".join(
        f"{each.label} comes down to {each.points[-1][1]:.3f}, {asked[each.label]:g} asked" for each in lines
    )
    levels = [(share, f"{name} asked: {share:g}") for name, share in asked.items()]
    return charts.curves(
        "Cost against budget", f"{told}.", lines, "epoch", marks=_frozen(report), levels=levels, low=0.0, high=1.05
    )


def _closing(report: dict[str, Any]) -> Markup | None:
    """When each place for gates was narrowed: those that were, the largest loss first where there are many."""
    epochs = len([each for each in report["history"]["gated"] if "costs" in each])
    changed = [site for site in report["sites"] if site["changes"]]
    if not changed or not epochs:
        return None
    if len(changed) > MOST_ROWS:
        kept = sorted(changed, key=lambda site: site["open"] / site["width"])[:MOST_ROWS]
        changed = [site for site in changed if site in kept]
    rows = [(f"{site['name']}", _cells(site, epochs)) for site in changed]
    about = f"{len(changed)} of {len(report['sites'])} places for gates changed while the network was trained."
    return charts.rows_over_time("When gates closed", about, rows, "epoch", marks=_frozen(report))


def _cells(site: Mapping[str, Any], epochs: int) -> list[Cell]:
    """Stretches of epochs in which as many gates of a site were open."""
    changes = [[0, site["width"]], *site["changes"]]
    ends = [each[0] for each in changes[1:]] + [epochs]
    return [
        Cell(
            start,
            end,
            opened / site["width"],
            f"{site['name']}, epoch {start} to {end}: {opened} of {site['width']} open",
        )
        for (start, opened), end in zip(changes, ends, strict=True)
    ]


def _polarization(history: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Gates by the share of samples (or steps) that open them, epoch by epoch: they move to both ends."""
    learned = [each for each in history if "shares" in each]
    if not learned:
        return None
    bins = len(learned[0]["shares"])
    rows = []
    for index in reversed(range(bins)):
        cells = [
            Cell(
                each["epoch"] - 1,
                each["epoch"],
                (each["shares"][index] / (sum(each["shares"]) or 1)) ** 0.5,
                f"epoch {each['epoch']}: {each['shares'][index]} gates",
            )
            for each in learned
        ]
        rows.append((f"open for {100 * index // bins}–{100 * (index + 1) // bins} %", cells))
    last = learned[-1]
    about = f"In epoch {last['epoch']}, {100 * last['undecided']:.1f} % of the gates were still undecided."
    return charts.rows_over_time("Polarization of the gates", about, rows, "epoch, while gates learn", marks=())


def _training(training: Mapping[str, Mapping[str, Any] | None]) -> Markup | None:
    full, gated = training["full"], training["gated"]
    if gated is None:
        return None
    rows = []
    for label, each, style in (
        ("training once: the full network", full, "full"),
        ("training with gates", gated, "small"),
    ):
        if each:
            energy = f", {formats.short(each['joules'], 'J')}" if each["joules"] is not None else ""
            shown = f"{formats.seconds(each['seconds'])}, {formats.short(each['macs'])} MACs{energy}"
            rows.append(Bar(f"{label}, {each['epochs']} epochs", each["seconds"], shown, style))
    return charts.bars("What training took", "; ".join(f"{row.label}: {row.shown}" for row in rows) + ".", rows)
