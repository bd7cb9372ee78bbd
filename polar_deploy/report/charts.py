"""The kinds of pictures on the page: intervals, curves, bars, shares and maps. Each takes plain figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from polar_deploy.report.svg import (
    WIDTH,
    Scale,
    axis_x,
    axis_y,
    box,
    cut,
    joined,
    line,
    picture,
    spanning,
    tag,
    text,
)

ROW = 34  # height of a row with a label above its mark


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, and what is written beside it; `sure` False: the measurement decides nothing."""

    label: str
    value: float
    low: float
    high: float
    shown: str
    sure: bool = True


def intervals(title: str, about: str, rows: Sequence[Estimate], axis: str, *, bound: tuple[float, str]) -> Markup:
    """Each estimate on a line of its own, against a bound; values above it are allowed."""
    left, right, top = 8.0, WIDTH - 8.0, 26.0
    bottom = top + ROW * len(rows)
    scale = spanning([bound[0], *(end for row in rows for end in (row.low, row.high))], left, right, 0.08)
    edge = scale(bound[0])
    parts = [
        box(edge, top, right - edge, bottom - top, "allowed"),
        axis_x(scale, bottom, bottom + 4, axis),
        line(edge, top - 6, edge, top, "bound"),
        text(min(max(edge, left + 60), right - 60), top - 10, bound[1], "middle", "strong"),
    ]
    for index, row in enumerate(rows):
        y = top + ROW * (index + 0.68)
        mark = "mark" if row.sure else "mark unsure"
        parts += [
            line(edge, y - 7, edge, y + 7, "bound"),
            text(left + 4, y - 11, row.label, class_="label"),
            text(right - 4, y - 11, row.shown, "end", "number"),
            line(scale(row.low), y, scale(row.high), y, f"{mark} whisker"),
            tag("circle", cx=scale(row.value), cy=y, r=5, class_=mark),
        ]
    return picture(title, about, WIDTH, bottom + 38, parts)


@dataclass(frozen=True)
class Curve:
    """Points joined by a line. `style` is a class of the style sheet."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str


def curves(
    title: str,
    about: str,
    lines: Sequence[Curve],
    axis: str,
    *,
    unit: str = "",
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    low: float | None = None,
    high: float | None = None,
) -> Markup:
    """Curves over what is counted; `marks` are vertical lines, `levels` horizontal ones, each with a word."""
    left, right, top, bottom = 48.0, WIDTH - 10.0, 42.0, 222.0
    xs = [x for curve in lines for x, _ in curve.points]
    ys = [y for curve in lines for _, y in curve.points] + [level for level, _ in levels]
    across = Scale(min(xs), max(xs), left, right) if min(xs) < max(xs) else spanning(xs, left, right)
    up = spanning(ys, bottom, top)
    up = Scale(up.low if low is None else low, up.high if high is None else high, bottom, top)
    parts = [axis_y(up, left, right, unit), axis_x(across, bottom, bottom + 4, axis, whole=True)]
    for x, word in marks:
        near_end = across(x) > right - 90
        at = across(x) + (-5 if near_end else 5)
        parts += [line(across(x), top - 12, across(x), bottom, "moment")]
        parts += [text(at, top - 4, word, "end" if near_end else "start", "tick")]
    for y, word in levels:
        parts += [line(left, up(y), right, up(y), "bound"), text(right - 3, up(y) - 5, word, "end", "tick")]
    for curve in lines:
        path = "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in curve.points)
        parts.append(tag("path", tag("title", curve.label), d=path, class_=f"curve {curve.style}"))
    return picture(title, about, WIDTH, bottom + 40, [*parts, legend(lines, left)])


def legend(entries: Sequence[Curve], left: float) -> Markup:
    """What each line is, above the picture."""
    parts, x = [], left
    for entry in entries:
        parts.append(line(x, 13, x + 18, 13, f"curve {entry.style}"))
        parts.append(text(x + 23, 17, entry.label, class_="label"))
        x += 23 + 6.7 * len(entry.label) + 16
    return joined(parts)


@dataclass(frozen=True)
class Point:
    """One thing by two figures, each with its interval, and the word that stands beside it.

    `front`: which line of the best ones it belongs to; None: something else is as good in both figures.
    """

    label: str
    about: str
    x: tuple[float, float, float]  # low, value, high
    y: tuple[float, float, float]
    style: str
    front: object = None


def scatter(title: str, about: str, points: Sequence[Point], across: str, up: str) -> Markup:
    """Points with their intervals, and the line of the best ones; to the left and above is better."""
    left, right, top, bottom = 52.0, WIDTH - 14.0, 30.0, 300.0
    xs, ys = (
        spanning([x for p in points for x in p.x], left, right),
        spanning([y for p in points for y in p.y], bottom, top),
    )
    parts = [axis_y(ys, left, right), axis_x(xs, bottom, bottom + 4, across), text(left, top - 16, up, class_="tick")]
    for front in dict.fromkeys(point.front for point in points if point.front is not None):
        best = sorted((point.x[1], point.y[1]) for point in points if point.front == front)
        steps = "".join(f"H{xs(x):.1f}V{ys(y):.1f}" for x, y in best[1:])
        parts.append(tag("path", d=f"M{xs(best[0][0]):.1f} {ys(best[0][1]):.1f}{steps}", class_="curve front"))
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = xs(point.x[1]), ys(point.y[1])
        taken.append(_free_place(x, y, taken))
        parts.append(
            tag(
                "g",
                tag("title", point.about),
                line(xs(point.x[0]), y, xs(point.x[2]), y, f"{point.style} thin"),
                line(x, ys(point.y[0]), x, ys(point.y[2]), f"{point.style} thin"),
                tag("circle", cx=x, cy=y, r=6, class_=point.style),
                text(*taken[-1], point.label, class_="number"),
            )
        )
    return picture(title, about, WIDTH, bottom + 38, parts)


def _free_place(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a short label beside (x, y) covers none of those that are there, if there is such a place."""
    places = [(x + right, y + down) for down in (-7.0, 16.0, -20.0, 29.0) for right in (9.0, -16.0)]
    return next((p for p in places if all(abs(p[0] - a) > 18 or abs(p[1] - b) > 12 for a, b in taken)), places[0])


@dataclass(frozen=True)
class Bar:
    """One bar; `part` of it is filled, the whole is drawn as an outline."""

    label: str
    value: float
    shown: str
    style: str = "small"


def bars(title: str, about: str, rows: Sequence[Bar], *, signed: bool = False) -> Markup:
    """Horizontal bars with their labels above them. Signed ones go to both sides of a middle line."""
    left, right = 8.0, WIDTH - 8.0
    most = max((abs(row.value) for row in rows), default=0.0) or 1.0
    scale = Scale(-most if signed else 0.0, most, left, right)
    parts = []
    for index, row in enumerate(rows):
        y = ROW * index + 4.0
        start, end = sorted((scale(0.0), scale(row.value)))
        parts += [
            text(left, y + 11, cut(row.label, 44), class_="label"),
            text(right, y + 11, row.shown, "end", "number"),
            box(left, y + 16, right - left, 9, "track", rx=2),
            box(
                start,
                y + 16,
                max(end - start, 1.5) if row.value else 0,
                9,
                row.style,
                f"{row.label}: {row.shown}",
                rx=2,
            ),
        ]
    if signed:
        parts.append(line(scale(0.0), 4, scale(0.0), ROW * len(rows), "axis"))
    return picture(title, about, WIDTH, ROW * len(rows) + 6, parts)


def shares(title: str, about: str, rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Markup:
    """Whole bars in parts. A row is a label and its parts: (style, share of the whole, what is written into it)."""
    left, right, parts = 8.0, WIDTH - 8.0, []
    for index, (label, pieces) in enumerate(rows):
        y, x = 50.0 * index + 4, left
        parts.append(text(left, y + 11, label, class_="label"))
        for style, share, shown in pieces:
            width = (right - left) * max(share, 0.0)
            parts.append(box(x, y + 17, width, 22, style, shown))
            if width > 7.2 * len(shown):
                parts.append(text(x + width / 2, y + 32, shown, "middle", f"on-{style}"))
            x += width
    return picture(title, about, WIDTH, 50.0 * len(rows) + 2, parts)


@dataclass(frozen=True)
class Cell:
    """A stretch of a row, from one x to another, that is as dark as `share` (0 to 1) says."""

    start: float
    end: float
    share: float
    about: str


def rows_over_time(
    title: str, about: str, rows: Sequence[tuple[str, Sequence[Cell]]], axis: str, *, marks: Sequence[tuple[float, str]]
) -> Markup:
    """A map: one row a thing, time to the right, in what is counted."""
    left, right, top, height = 150.0, WIDTH - 10.0, 22.0, 13.0
    bottom = top + height * len(rows)
    ends = [end for _, cells in rows for cell in cells for end in (cell.start, cell.end)]
    scale = Scale(min(ends), max(ends), left, right)
    parts: list[Markup] = []
    for index, (label, cells) in enumerate(rows):
        y = top + height * index
        parts.append(text(left - 6, y + 10, cut(label, 22), "end", "tick"))
        for cell in cells:
            x, width = scale(cell.start), scale(cell.end) - scale(cell.start)
            parts.append(box(x, y + 0.5, width, height - 1, "track", cell.about))
            parts.append(box(x, y + 0.5, width, height - 1, "heat", cell.about, fill_opacity=round(cell.share, 3)))
    for x, word in marks:
        parts += [line(scale(x), top - 4, scale(x), bottom, "moment"), text(scale(x) + 4, top - 8, word, class_="tick")]
    parts.append(axis_x(scale, bottom, bottom + 4, axis, whole=True))
    return picture(title, about, WIDTH, bottom + 40, parts)


def distribution(title: str, about: str, lines: Sequence[tuple[str, str, Sequence[float]]]) -> Markup:
    """How often a value lies where: from evenly spaced quantiles, each stretch between two holds the same share.

    lines: (label, style, quantiles ascending); the last twentieth is left out, it would squeeze the rest.
    """
    left, right, bottom, top = 10.0, WIDTH - 10.0, 170.0, 30.0
    shown = {label: values[: max(2, len(values) - len(values) // 20)] for label, _, values in lines}
    scale = spanning([end for values in shown.values() for end in (values[0], values[-1])], left, right, 0.04)
    bins = 60
    heights = {label: _histogram(values, scale, bins) for label, values in shown.items()}
    most = max(max(each) for each in heights.values()) or 1.0
    parts = [axis_x(scale, bottom, bottom + 4, "milliseconds")]
    for label, style, values in lines:
        steps = [bottom - (bottom - top) * each / most for each in heights[label]]
        width = (right - left) / bins
        outline = "".join(f"L{left + i * width:.1f} {y:.1f}H{left + (i + 1) * width:.1f}" for i, y in enumerate(steps))
        parts.append(tag("path", tag("title", label), d=f"M{left} {bottom}{outline}V{bottom}Z", class_=f"area {style}"))
        median = scale(values[len(values) // 2])
        parts.append(line(median, top - 6, median, bottom, f"curve {style} dashed"))
    entries = [Curve(label, (), style) for label, style, _ in lines]
    return picture(title, about, WIDTH, bottom + 40, [*parts, legend(entries, left)])


def _histogram(quantiles: Sequence[float], scale: Scale, bins: int) -> list[float]:
    """What share of the samples falls into each of `bins` equal parts of the scale."""
    found = [0.0] * bins
    span = (scale.high - scale.low) / bins
    weight = 1 / max(len(quantiles) - 1, 1)
    for low, high in pairwise(quantiles):
        for index in range(bins):
            start, end = scale.low + index * span, scale.low + (index + 1) * span
            if high == low:
                found[index] += weight * (start <= low < end)
            else:
                found[index] += weight * max(0.0, min(high, end) - max(low, start)) / (high - low)
    return found
