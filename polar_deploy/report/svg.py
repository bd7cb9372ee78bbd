"""Scalable pictures from a few parts: escaped tags, scales, axes, and a frame that a screen reader can tell about.

Colours are classes, so that the page's style sheet decides them, in light and in dark mode. No plotting library writes
such pictures, nor draws the widths of a network.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from polar_deploy.errors import printable

WIDTH = 460  # of most pictures, in units of the page's pixels: about what a phone has


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """`<name …>children</name>`, all of it escaped; `class_` gives class, `stroke_width` gives stroke-width."""
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value))
        for key, value in attributes.items()
        if value is not None
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(name, Markup("").join(parts), joined(children))


def joined(children: Iterable[object]) -> Markup:
    """One after the other, text escaped."""
    return Markup("").join(escape(legible(child)) for child in children)


def legible(shown: object) -> object:
    """A text without signs that pages cannot show, or that turn the direction of writing; all else as it is."""
    if isinstance(shown, str) and not isinstance(shown, Markup):
        return printable(shown.encode("utf-8", "replace").decode())
    return shown


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def picture(
    title: str, about: str, width: float, height: float, body: Iterable[object], *, wide: bool = False
) -> Markup:
    """An `<svg>` that scales with the page and has a name and a description; `wide` ones may be scrolled sideways."""
    name = f"f{zlib.crc32((title + about).encode()):x}"  # the same in every run
    return tag(
        "svg",
        tag("title", title, id=f"{name}t"),
        tag("desc", about, id=f"{name}d"),
        *body,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{name}t {name}d",
        style=f"{f'min-width:{width:g}px;' if wide else ''}max-width:{width * 1.15:g}px",
    )


def text(x: float, y: float, content: object, anchor: str = "start", class_: str | None = None) -> Markup:
    """A line of text; `anchor` is start, middle or end."""
    return tag("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def box(x: float, y: float, width: float, height: float, class_: str, about: object = None, **more: object) -> Markup:
    """A rectangle that tells `about` itself when pointed at."""
    told = () if about is None else (tag("title", about),)
    return tag("rect", *told, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_, **more)


def cut(label: str, characters: int) -> str:
    """A label that fits: its end stays, since names of layers differ there."""
    return label if len(label) <= characters else f"…{label[1 - characters :]}"


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high`, shown from pixel `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)

    def ticks(self, count: int = 5, *, whole: bool = False) -> list[float]:
        """About so many round values (1, 2 or 5 times a power of ten) within; `whole`: of things that are counted."""
        span = self.high - self.low
        if span <= 0 or not math.isfinite(span):
            return [self.low]
        raw = max(span / count, 1.0 if whole else 0.0)
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * next(each for each in (1, 2, 5, 10) if each * power >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spanning(values: Sequence[float], start: float, end: float, room: float = 0.06) -> Scale:
    """A scale over finite values with some room at both ends."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = room * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, start, end)


def _number(value: float, unit: str = "") -> str:
    return f"{value:g}{unit}".replace("-", "−")


def axis_x(scale: Scale, top: float, bottom: float, label: str, *, whole: bool = False) -> Markup:
    """Grid lines and numbers below; the label stands under them."""
    parts = []
    for value in scale.ticks(whole=whole):
        x = scale(value)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 15, _number(value), "middle", "tick")]
    return joined([*parts, text((scale.start + scale.end) / 2, bottom + 31, label, "middle", "tick")])


def axis_y(scale: Scale, left: float, right: float, unit: str = "") -> Markup:
    """Grid lines, and numbers at the left."""
    parts = []
    for value in scale.ticks(4):
        y = scale(value)
        parts += [line(left, y, right, y, "grid"), text(left - 6, y + 4, _number(value, unit), "end", "tick")]
    return joined(parts)
