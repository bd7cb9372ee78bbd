"""report.html: report.json as one page that stands by itself, without scripts and without the network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polar_deploy.documents.report import Report
from polar_deploy.report import figures, formats
from polar_deploy.report.advice import advise
from polar_deploy.report.svg import legible

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from jinja2 import Environment
    from markupsafe import Markup

THUMBNAIL = 96  # pixels a side, at most
_FORMS: dict[str, Callable[[Any], str]] = {
    "count": lambda value: f"{value:,}",
    "short": formats.short,
    "bytes": lambda value: formats.short(value, "B"),
    "percent": formats.percent,
    "share": formats.share,
    "points": formats.points,
    "heading": formats.heading,
    "milliseconds": formats.milliseconds,
    "seconds": formats.seconds,
    "relative": formats.relative,
    "times": formats.times,
    "times3": lambda value: f"{value:.3f}×",
    "plain3": lambda value: f"{value:.3g}",
    "fixed2": lambda value: f"{value:.2f}",
    "whole": lambda value: f"{value:,.0f}",
    "plain": lambda value: "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value),
}


class Shown(NamedTuple):
    """The worst samples as the task draws them.

    Attributes:
        images: uint8 [N, H, W, 3], in the order of `worst_samples`.
        panels: what lies side by side in each; (): one picture alone.
    """

    images: npt.NDArray[np.uint8]
    panels: tuple[str, ...] = ()


class Thumbnail(NamedTuple):
    """A picture in a data URL, and the pixels that it takes."""

    url: str
    width: int
    height: int


def page(report: Report, samples: Shown | None = None, *, delivered: bool = False) -> str:
    """The page of a run.

    Args:
        report: report.json.
        samples: the pictures of its worst samples; None: they are not shown.
        delivered: for the bundle, whose readers have the engines, and not the run.
    """
    content = report.as_json()
    return render(
        "report.html.j2",
        report=report,
        advice=advise(report, delivered=delivered),
        delivered=delivered,
        timed=report.timed,
        figures=figures.draw(report),
        most_classes=figures.MOST_CLASSES,
        samples=[_picture(image, len(samples.panels) or 1) for image in samples.images] if samples else [],
        panels=samples.panels if samples else (),
        settings=_flat(report.recipe),
        value=lambda path, form="plain": value(content, path, form),
    )


def render(template: str, **values: object) -> str:
    """A page from one of the templates."""
    return str(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    """Templates, compiled once: all that is not markup is escaped, and a name that is not there is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("polar_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=legible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(_FORMS)
    return made


def value(report: Mapping[str, Any], path: str, form: str) -> Markup:
    """A figure of report.json as people read it, which says where it comes from and what it is exactly."""
    from markupsafe import Markup

    found: Any = report
    for key in path.split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return Markup('<data value="{}" data-of="{}">{}</data>').format(json.dumps(found), path, _FORMS[form](found))


def read_samples(path: Path) -> Shown:
    """The pictures that the parity stage kept.

    Raises:
        UsageError: there is no such file.
        ContentError: it is damaged.
    """
    from polar_deploy.data.arrays import read_npz

    arrays = read_npz(path, "images", "panels")
    return Shown(arrays["images"], tuple(map(str, arrays["panels"])))


def _picture(image: npt.NDArray[np.uint8], panels: int) -> Thumbnail:
    """A PNG in a data URL, and its size; each of the panels that lie side by side is `THUMBNAIL` wide at most."""
    from PIL import Image

    picture, file = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((THUMBNAIL * panels, THUMBNAIL))
    picture.save(file, "PNG", optimize=True)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    larger = max(1, THUMBNAIL // picture.height)  # small pictures are shown larger, pixel by pixel
    width, height = (larger * side for side in picture.size) if panels > 1 else (THUMBNAIL, THUMBNAIL)
    return Thumbnail(url, width, height)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Settings as they are given on the command line: ("training.lr", "0.1")."""
    rows: list[tuple[str, str]] = []
    for key, each in tree.items():
        if isinstance(each, dict):
            rows.extend(_flat(each, f"{prefix}{key}."))
        else:
            rows.append((f"{prefix}{key}", each if isinstance(each, str) else json.dumps(each)))
    return rows
