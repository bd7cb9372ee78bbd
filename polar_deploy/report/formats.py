"""Figures as people read them, in the table and on the page."""

from __future__ import annotations


def short(count: float, unit: str = "") -> str:
    """1234567 -> "1.23 M"; with the unit B -> "1.23 MB"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:g} {unit}".strip()


def milliseconds(value: float) -> str:
    """0.3046 -> "0.305 ms"."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def seconds(value: float) -> str:
    """93 -> "93 s", 5400 -> "1.5 h"."""
    if value < 600:
        return f"{value:,.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def relative(value: float | None) -> str:
    """A difference as a share of the scale; None: something is not finite."""
    return "not finite" if value is None else f"{value:.1e}"


def heading(name: str) -> str:
    """A metric's name as the first word of a line: "Accuracy", "Mean IoU"; "mAP" and "R2" stay as they are."""
    first = name.split(" ")[0]
    return name if first != first.lower() else name[:1].upper() + name[1:]


def change(drop: float, unit: str) -> str:
    """A drop as a change of a score that has a unit: "−0.50 points", "−0.012 m"."""
    if unit == "%":
        return f"{points(drop)} points"
    return f"{0 - drop:+.3g} {unit}".replace("-", "−").rstrip() if drop else f"±0 {unit}".rstrip()


def points(drop: float) -> str:
    """A drop in percentage points as a change: 0.5 -> "−0.50"."""
    return f"{0 - round(drop, 2):+.2f}".replace("-", "−") if round(drop, 2) else "±0.00"


def percent(value: float) -> str:
    """98.88 -> "98.88 %"."""
    return f"{value:.2f} %"


def score(value: float | None, unit: str) -> str:
    """A metric's score in its unit: "98.88 %", "0.4213 m"; None: not known."""
    return "–" if value is None else percent(value) if unit == "%" else f"{value:.4g} {unit}".rstrip()


def share(value: float) -> str:
    """0.549 -> "54.9 %"."""
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    """1.611 -> "1.61×"."""
    return f"{value:.2f}×"
