"""The choice itself: a start, exchanges, programs on finer and finer grids, and a bound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import inf

import numpy as np

from polar_deploy.costs import WINDOW, Floats, State, rounded_up
from polar_deploy.errors import UsageError
from polar_deploy.gating.solver.exchange import Point, Search
from polar_deploy.gating.solver.levels import Flags, Integers, Model, by_levels, rises
from polar_deploy.gating.solver.problem import Problem, Solution
from polar_deploy.gating.solver.program import Program, joined

SCALE = 1e4  # of the rows of budgets, so that the solver's tolerance of 1e-6 is 1e-10 of the full network's cost
_BETTER = 1e-7  # what a program must improve a state by, as a share: what is left is as good as nothing
_BETTER_ON_GRID = 1e-5  # the same for a pass over a grid
_EXACT = 700  # widths in all: up to here one program holds all of them
_NODES = 2000  # of the branch and bound of a pass: a limit that, unlike time, is the same on every machine
_FOR_PASSES = 0.8  # of the time, for all programs of a large problem but the bound's
_CELLS = (1, 2, 4, 8, 16, 32, 64)  # for the bound, a site's levels divided by these: how far from it cells end


def solve(problem: Problem, seconds: float = 2.0) -> Solution:
    """The most useful state within the budgets.

    Up to some hundred widths in all the state is the best one there is, but for `_BETTER`, unless `seconds` are over
    before that is proven; `Solution.bound` says how far from the best one it can be at most.

    Args:
        problem: see `Problem`.
        seconds: at most so long for the program of a small problem, and for all of a large one. Most need a tenth of
            it; only where a program is cut off here may another machine choose differently.

    Raises:
        UsageError: no state meets the budgets.
    """
    model = by_levels(problem)
    choice = Choice(model, seconds)
    start = choice.start()
    if start is None:
        raise unreachable(problem, _state(problem, choice.least()))
    point, bound = choice.best(start)
    if not choice.search.in_window(point):
        point = choice.windowed(point)
    state = _state(problem, point)
    return Solution(state, point.utility, max(float(bound), point.utility), choice.search.in_window(point))


def smallest(problem: Problem) -> State:
    """The state that is furthest below the budget that it is least below: least widths, and no block that may go."""
    return _state(problem, Choice(by_levels(problem), 60.0).least())


def _state(problem: Problem, point: Point) -> State:
    widths = (site.widths[level] for site, level in zip(problem.sites, point.levels, strict=True))
    return State(tuple(widths), tuple(bool(each) for each in point.open))


def unreachable(problem: Problem, state: State) -> UsageError:
    """The error for budgets that no state meets; `state` is the one closest to it."""
    least = problem.shares(state)
    over = {name: least[name] - asked for name, asked in problem.asked.items() if least[name] > asked}
    name = max(over, key=lambda each: over[each])
    enough = {each: rounded_up(least[each]) for each in over}
    asked = " and ".join(f"{each}={share:.3f}" for each, share in enough.items())
    hopeless = [each for each, share in enough.items() if share >= 1]
    todo = f"no cut saves {hopeless[0]} here: ask for another budget" if hopeless else f"ask for at least {asked}"
    return UsageError(
        f"budget {name}={problem.asked[name]} cannot be reached: with every gate closed that may close, "
        f"{least[name]:.3f} of the full network's {name} is left",
        f"{todo}, or lower min_width or align",
    )


class Choice:
    """A model on its way to the state that is chosen."""

    def __init__(self, model: Model, seconds: float) -> None:
        self.model, self.seconds = model, seconds
        self.search = Search(model)
        self.sizes = np.array([len(each) for each in model.utility], dtype=np.int64)
        self.small = int(self.sizes.sum()) <= _EXACT

    def start(self) -> Point | None:
        """A good state within the budgets: the best found for prices of the costs, which are searched for by halving.

        None where there is none.
        """
        low, high = 1e-4, 1e4  # utility that the whole cost is worth, as a share of all utility
        point, best = self.search.point(self.sizes - 1, np.ones(len(self.model.blocks), dtype=bool)), None
        if self.search.fits(point):
            return point
        unit = max(abs(point.utility), 1e-12)
        for _ in range(14):
            price = float(np.sqrt(low * high))
            there = self.search.descended(point, np.full(len(self.model.asked), price * unit))
            if not self.search.fits(there):
                low, point = price, there
                continue
            high = price
            best = there if best is None or there.utility > best.utility else best
        if best is None:
            least = self.least()
            best = least if self.search.fits(least) else None
        return best

    def best(self, point: Point) -> tuple[Point, float]:
        """The best state and the bound, from one that fits."""
        started = time.monotonic()
        point = self.search.polished(point, rounds=40)
        full = [np.arange(size) for size in self.sizes]
        if self.small:
            point, bound = self._improved(point, full, _BETTER, self.seconds)
            if bound < inf:
                return point, bound
        for spacing in self._spacings():
            point = self._passed(point, spacing, _BETTER_ON_GRID)
        near = self._grid(point, np.ones_like(self.sizes), reach=3)
        left = _FOR_PASSES * self.seconds - (time.monotonic() - started)
        point, _ = self._improved(point, near, _BETTER, max(left, self.seconds / 8))
        return point, self._bound(point)

    def _passed(self, point: Point, spacing: Integers, by: float) -> Point:
        """A state improved on grids around it, and by exchanges, while that improves it by this share."""
        for _ in range(3):
            better, _ = self._improved(point, self._grid(point, spacing), by, self.seconds / 8)
            if better is point:
                break
            point = self.search.polished(better, rounds=40)
        return point

    def _spacings(self) -> Iterator[Integers]:
        """How far apart levels of a grid are, by site, from pass to pass."""
        spacing = np.maximum(1, self.sizes // 5)
        yield spacing
        while spacing.max(initial=1) > 1:
            spacing = np.maximum(1, spacing // 4)
            yield spacing

    def _grid(self, point: Point, spacing: Integers, reach: int = 2) -> list[Integers]:
        """Some levels of each site: around where it stands, or evenly spread where it is not there or has few."""
        here = self.search.present(point.open)
        steps = np.arange(-reach, reach + 1)
        near = [level + step * steps for level, step in zip(point.levels, spacing, strict=True)]
        spread = [np.linspace(0, size - 1, 5).round().astype(np.int64) for size in self.sizes]
        levels = [near[site] if here[site] and size > 5 else spread[site] for site, size in enumerate(self.sizes)]
        return [np.unique(np.clip(each, 0, size - 1)) for each, size in zip(levels, self.sizes, strict=True)]

    def _program(self, grid: Sequence[Integers], slack: Floats | None = None) -> Program:
        program = Program(self.model.restricted(grid))
        for share, asked in zip(program.shares, self.model.asked - (0 if slack is None else slack), strict=True):
            program.row(share * SCALE, high=asked * SCALE)
        return program

    def _point(self, grid: Sequence[Integers], found: tuple[Integers, Flags]) -> Point:
        levels = np.array([each[level] for each, level in zip(grid, found[0], strict=True)], dtype=np.int64)
        return self.search.point(levels, found[1])

    def _improved(self, point: Point, grid: Sequence[Integers], by: float, seconds: float) -> tuple[Point, float]:
        """The best state on a grid, if it is better than `point` by this share; the bound there, inf if not proven."""
        least = point.utility + by * max(abs(point.utility), 1e-6)
        slack = np.zeros(len(self.model.asked))
        for _ in range(5):
            program = self._program(grid, slack)
            program.row(program.utility(), low=least)
            answer = program.maximise(program.utility(), gap=by / 2, nodes=50 * _NODES, seconds=seconds)
            if answer.found is None:
                return point, least if answer.done else inf
            there = self._point(grid, answer.found)
            if self.search.fits(there):
                return (there if there.utility > point.utility else point), answer.bound if answer.done else inf
            slack = slack + np.maximum(there.costs - self.model.asked, 0.0) * 1.01  # within the solver's tolerance only
        return point, inf

    def _bound(self, point: Point) -> float:
        """What no state within the budgets has more utility than, from the linear program of a relaxed model."""
        everything = float(self.model.blocks.sum()) + sum(float(each.max()) for each in self.model.utility)
        here = self.search.present(point.open)
        middle = np.where(here, point.levels, self.sizes // 2)
        relaxed = self.model.relaxed([_ends(int(at), int(size)) for at, size in zip(middle, self.sizes, strict=True)])
        if relaxed is None:
            return everything
        program = Program(relaxed, whole=False)
        for share, asked in zip(program.shares, self.model.asked, strict=True):
            program.row(share * SCALE, high=asked * SCALE)
        answer = program.maximise(program.utility(), gap=0.0, nodes=1, seconds=60.0, relaxed=True)
        return min(everything, answer.bound + 1e-6 * abs(everything))  # 1e-6: the solver's tolerance

    def windowed(self, point: Point) -> Point:
        """The best state that also uses a budget up to `WINDOW`; if there is none, the one that is closest below."""
        full = [np.arange(size) for size in self.sizes]
        grids = [full] if self.small else [self._grid(point, spacing) for spacing in self._spacings()]
        for grid in grids:
            there = self._near(grid, closest=False)
            if there is not None:
                return there
        closest = [there for grid in grids if (there := self._near(grid, closest=True)) is not None]
        return max([point, *closest], key=lambda p: float((p.costs - self.model.asked).max()))

    def _near(self, grid: Sequence[Integers], *, closest: bool) -> Point | None:
        """The best state on a grid whose tightest budget is in the window, or the one in which it is tightest."""
        program = self._program(grid)
        excess = program.new_column(-4.0, 0.0)
        picked = [program.new_column(0, 1, whole=True) for _ in program.shares]
        program.row(joined(picked), 1.0, 1.0)
        for one, share, asked in zip(picked, program.shares, self.model.asked, strict=True):
            program.row((excess + share * -1 + one * 8) * SCALE, high=(8 - asked) * SCALE)
        if not closest:
            program.row(excess * SCALE, low=-WINDOW * SCALE)
        target = excess if closest else program.utility()
        answer = program.maximise(target, gap=0.0 if self.small else 1e-4, nodes=_NODES, seconds=self.seconds)
        there = None if answer.found is None else self._point(grid, answer.found)
        fits = there is not None and self.search.fits(there) and (closest or self.search.in_window(there))
        return there if fits else None

    def least(self) -> Point:
        """The state with the least excess over the budget that it exceeds most; of equal ones the cheapest."""
        closed = self.search.point(np.zeros(len(self.sizes), np.int64), np.zeros(len(self.model.blocks), dtype=bool))
        rising = all(rises(product) for product in self.model.products)
        if rising and not self.model.alive:
            return closed
        if rising:
            return self._least([np.zeros(1, dtype=np.int64) for _ in self.sizes]) or closed
        if self.sizes.sum() <= 4 * _EXACT:
            return self._least([np.arange(size) for size in self.sizes]) or closed
        best = closed
        for spacing in self._spacings():
            best = self._least(self._grid(best, spacing)) or best
        return best

    def _least(self, grid: Sequence[Integers]) -> Point | None:
        program = Program(self.model.restricted(grid))
        excess = program.new_column(-inf, inf)
        for share, asked in zip(program.shares, self.model.asked, strict=True):
            program.row(share * SCALE + excess * -SCALE, high=asked * SCALE)
        target = joined([excess, program.opened() * 1e-7, *(share * 1e-7 for share in program.shares)]) * -1
        answer = program.maximise(target, gap=0.0, nodes=100 * _NODES, seconds=self.seconds)
        return None if answer.found is None else self._point(grid, answer.found)


def _ends(level: int, size: int) -> Integers:
    """Where cells of levels end: finer close to `level`."""
    away = np.array([max(1, size // share) for share in _CELLS])
    return np.unique(np.clip(np.r_[0, level - away, level + away, size - 1], 0, size - 1))
