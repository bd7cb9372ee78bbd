"""Draw which gates of a run stayed open, place by place.

Reads gated/gates.json: the rest of the run need not be there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.documents.gates import GateSite, GateStates
from polar_deploy.errors import UsageError
from polar_deploy.report import outdated

if TYPE_CHECKING:
    from rich.console import Console

BAR = 32  # characters of the widest place, at most
_BESIDE = 24  # characters for the kind and the numbers
_SIGNS = {True: ("█", "░"), False: ("#", ".")}  # open and closed, where a terminal knows Unicode and where not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gates show`."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder, whose gates stage has run")


def run(arguments: argparse.Namespace) -> int:
    """Draw the gates of a run.

    Raises:
        UsageError: this is no run's folder, or its gates stage has not run.
    """
    from polar_deploy.progress import console

    path = arguments.folder / "gated/gates.json"
    if not path.is_file():
        todo = "give the folder of a run (its --out); what a graph lost, the surgery.json beside it tells"
        raise UsageError(f"there is no {path}", todo)
    states = GateStates.read(path)
    outdated.warn(arguments.folder, "gates")
    draw(states, console())
    return 0


def draw(gates: GateStates, console: Console) -> None:
    """One line a place: kind, name, a bar as long as it is wide and filled as far as it is open, and the numbers."""
    sites = gates.sites
    widest = max(site.width for site in sites)
    signs = _SIGNS[console.encoding.lower().startswith("utf")]
    named = max(len(site.name) for site in sites)
    bar = min(BAR, max(8, console.width - named - _BESIDE))  # names tell more than lengths of bars do
    longest = min(named, max(12, console.width - bar - _BESIDE))
    for site in sites:
        console.print(_line(site, longest, bar / widest, signs), markup=False, highlight=False, no_wrap=True, crop=True)
    for name, share in gates.achieved.items():
        console.print(f"{name}: {share:.3f} of the full network's, {gates.budget[name]:g} asked", highlight=False)


def _line(site: GateSite, longest: int, scale: float, signs: tuple[str, str]) -> str:
    opened, width, name = len(site.open), site.width, site.name
    name = name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[longest // 2 - longest :]}"
    head = f"{site.kind:<8}{name:<{longest}}  "
    if site.kind == "block":
        return head + ("stays" if opened else "removed")
    length = max(1, round(scale * width))
    filled = max(1, round(length * opened / width))
    narrowed = f"{opened} of {width}" if opened < width else f"{width}"
    return f"{head}{signs[0] * filled}{signs[1] * (length - filled)} {narrowed}"
