"""The choice of a sub-network: which gates of each site stay, given what they are worth, under budgets.

How many stay where is a small integer program (`solver`) of what was measured (`sensitivity`), or of what gradients say
where nothing was; which ones is an order: the most useful first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from polar_deploy.costs import Cost, Floats, State
from polar_deploy.errors import UsageError
from polar_deploy.gating import solver
from polar_deploy.gating.schedule import is_number
from polar_deploy.gating.sensitivity import Sensitivity
from polar_deploy.gating.solver import Problem
from polar_deploy.surgery.choices import Choices, Site
from polar_deploy.surgery.facts import Bools

Measured = Callable[[Mapping[str, int]], float]  # open gates by site -> share of the full latency that is really left
TOLERANCE = 0.02  # of the latency budget: what measurements differ by anyway
ATTEMPTS = 3  # to choose what turns out to be within it


def alignment_of(width: int, align: int) -> int:
    """The multiple that a layer of `width` channels keeps to when the target asks for `align`.

    A layer narrower than twice the alignment uses the largest of 16, 8, 1 that is at most half its width.
    """
    return align if width >= 2 * align else next(a for a in (16, 8, 1) if a <= max(1, width // 2))


def widths(
    site: Site, align: int, min_width: float, offers: Callable[[int], bool] | None = None, beside: int = 0
) -> tuple[int, ...]:
    """How many gates of a site may be open, ascending; the last is all of them.

    A gate of several channels (a group of a grouped convolution) counts as so many. `offers`: whether the device
    likes so many channels; it takes the place of `align`. `beside`: channels of other sites, or that stay, in the
    widest layer that writes the site's: what goes is a multiple then, so that the layer keeps to multiples whatever
    the other sites lose.
    """
    least = max(1, ceil(min_width * site.width))
    if offers:
        return (*(gates for gates in range(least, site.width) if offers(beside + gates * site.size)), site.width)
    step = ceil(alignment_of(beside + site.width * site.size, align) / site.size)
    first = site.width % step if beside else 0
    return (*(gates for gates in range(first, site.width, step) if gates >= least), site.width)


@dataclass(frozen=True)
class Limits:
    """The widths that each site may take."""

    widths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, choices: Choices, align: int, min_width: float, offers: Callable[[int], bool] | None = None) -> Limits:
        """Multiples of `align` channels, or what a device `offers`; at least the share `min_width` of each site.

        Raises:
            UsageError: they are out of their ranges.
        """
        if not is_number(align) or align < 1 or align % 1:
            raise UsageError(f"align={align!r}", "give a number of channels, such as 1, 8 or 16")
        if not is_number(min_width) or not 0 <= min_width <= 1:
            raise UsageError(f"min_width={min_width!r}", "give the share of its channels that a layer keeps, 0 to 1")
        sites = zip(choices.sites, _beside(choices), strict=True)
        return cls(tuple(widths(site, align, min_width, offers, beside) for site, beside in sites))


def _beside(choices: Choices) -> list[int]:
    """For each site the most channels that a layer writes besides the site's own."""
    most = [0] * len(choices.sites)
    for layer in choices.layers:
        for written in layer.macs.factors[:1]:
            whole = written.constant + sum(table[-1] for table in written.tables.values())
            for site, table in written.tables.items():
                most[site] = max(most[site], round(whole - table[-1]))
    return most


def problem(
    choices: Choices,
    limits: Limits,
    costs: Mapping[str, Cost],
    asked: Mapping[str, float],
    worth: Floats,
    sensitivity: Sensitivity | None = None,
) -> Problem:
    """The integer program. worth: float [gates] >= 0, what each gate is worth by its gradients.

    What is kept is worth the error of the outputs that it saves, or without a `sensitivity` what its gates are
    together. A block is worth what it is itself, but not less than what is inside of it: its own gradient says too
    little of so large a step.
    """
    if sensitivity is None:
        curves = [np.concatenate([[0.0], np.cumsum(-np.sort(-worth[_of(site)]))]) for site in choices.sites]
        blocks = worth[[block.gate for block in choices.blocks]]
    else:
        curves, blocks = _saved(choices, limits, sensitivity), sensitivity.blocks
    given = zip(choices.sites, limits.widths, curves, strict=True)
    sites = tuple(solver.Site(allowed, curve, site.blocks) for site, allowed, curve in given)
    inside = [sum(float(site.utility[-1]) for site in sites if index in site.blocks) for index in range(len(blocks))]
    beyond = np.maximum(0.0, blocks - inside)
    return Problem(sites, beyond, {name: costs[name] for name in asked}, dict(asked), choices.alive)


def _saved(choices: Choices, limits: Limits, sensitivity: Sensitivity) -> list[Floats]:
    """For each site float [gates + 1]: the error that the n most useful ones save, against the least width allowed.

    Where narrowing all of a block's sites costs more than closing the block, they are worth as much less: a block
    that is hardly missed is not kept for the sake of its width.
    """
    curves = [
        np.interp(np.arange(site.width + 1), allowed, errors[0] - errors)
        for site, allowed, errors in zip(choices.sites, limits.widths, sensitivity.sites, strict=True)
    ]
    for block, error in sorted(enumerate(sensitivity.blocks), key=lambda each: _sites_in(choices, each[0])):
        inside = [index for index, site in enumerate(choices.sites) if block in site.blocks]
        excess = sum(float(curves[index][-1]) for index in inside) - float(error)
        if excess > 0:
            for index in inside:
                curves[index] = np.maximum(0.0, curves[index] - excess / len(inside))
    # Of two states that save the same, the larger one is the better.
    least = max([float(curve[-1]) for curve in curves] + [1e-300]) * 1e-9
    return [curve + least * np.arange(len(curve)) for curve in curves]


def _sites_in(choices: Choices, block: int) -> int:
    return sum(block in site.blocks for site in choices.sites)


def choose(
    choices: Choices,
    limits: Limits,
    costs: Mapping[str, Cost],
    asked: Mapping[str, float],
    worth: Floats,
    sensitivity: Sensitivity | None = None,
) -> Bools:
    """The state bool [gates] of most worth within the budgets.

    Raises:
        UsageError: no state is within them.
    """
    # No gate is worth nothing: of two states that keep the same, the larger one is the better.
    floor = max(float(worth.max()), 1e-300) * 1e-9
    worth = np.maximum(worth, floor)
    return opened(choices, solver.solve(problem(choices, limits, costs, asked, worth, sensitivity)).state, worth)


def choose_measured(
    choices: Choices,
    limits: Limits,
    costs: Mapping[str, Cost],
    asked: Mapping[str, float],
    worth: Floats,
    sensitivity: Sensitivity | None,
    measured: Measured,
) -> Bools:
    """The same, where what is chosen turns out to be within the latency budget when it runs.

    A latency table adds up savings of single sites, and a choice picks those that came out too large. So what was
    chosen is measured whole; while it takes longer than asked, it is chosen again under a budget that is as much below
    what `costs` say of it.

    Raises:
        UsageError: no state is within the budgets as `costs` have them.
    """
    best, aim = choose(choices, limits, costs, asked, worth, sensitivity), dict(asked)
    for _ in range(ATTEMPTS):
        found = measured(counts(choices, best))
        if found <= (1 + TOLERANCE) * asked["latency"]:
            break
        aim["latency"] = costs["latency"].share(choices.state(best)) * asked["latency"] / found
        if not is_reachable(choices, limits, costs, aim):
            break
        best = choose(choices, limits, costs, aim, worth, sensitivity)
    return best


def counts(choices: Choices, state: Bools) -> dict[str, int]:
    """Open gates by the names of sites and blocks, of a state bool [gates]."""
    return {name: int(state[own.start : own.stop].sum()) for own, name, _ in choices.owners()}


def opened(choices: Choices, state: State, worth: Floats) -> Bools:
    """The gates bool [gates] of a state: in each site those that are worth most."""
    gates = np.zeros(choices.gates, bool)
    for site, width in zip(choices.sites, state.widths, strict=True):
        gates[site.gates.start + np.argsort(-worth[_of(site)], kind="stable")[:width]] = True
    for block, is_open in zip(choices.blocks, state.blocks, strict=True):
        gates[block.gate] = is_open
    return gates


def smallest(choices: Choices, limits: Limits, costs: Mapping[str, Cost]) -> State:
    """The cheapest state: every site at its least width, every block closed that may be."""
    asked = dict.fromkeys(costs, 0.5)
    return solver.smallest(problem(choices, limits, costs, asked, np.ones(choices.gates)))


def is_reachable(choices: Choices, limits: Limits, costs: Mapping[str, Cost], asked: Mapping[str, float]) -> bool:
    """Whether some state is within the budgets."""
    asking = problem(choices, limits, costs, asked, np.ones(choices.gates))
    return _are_within(asking, solver.smallest(asking))


def require_reachable(choices: Choices, limits: Limits, costs: Mapping[str, Cost], asked: Mapping[str, float]) -> None:
    """Raise UsageError where no state is within the budgets."""
    asking = problem(choices, limits, costs, asked, np.ones(choices.gates))
    least = solver.smallest(asking)
    if not _are_within(asking, least):
        raise solver.unreachable(asking, least)


def _are_within(asking: Problem, state: State) -> bool:
    return all(share <= asking.asked[name] for name, share in asking.shares(state).items())


def _of(site: Site) -> slice:
    return slice(site.gates.start, site.gates.stop)
