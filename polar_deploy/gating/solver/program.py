"""A model as a mixed-integer program, and the solver (HiGHS, through SciPy)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy.costs import Factor, Floats
from polar_deploy.gating.solver.levels import EVERYWHERE, Blocks, Flags, Integers, Model, Product, key_of, span


@dataclass(frozen=True)
class Linear:
    """constant + values @ columns of a program."""

    columns: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    values: Floats = field(default_factory=lambda: np.zeros(0))
    constant: float = 0.0

    def __add__(self, other: Linear) -> Linear:
        columns, values = np.r_[self.columns, other.columns], np.r_[self.values, other.values]
        return Linear(columns, values, self.constant + other.constant)

    def __mul__(self, scale: float) -> Linear:
        return Linear(self.columns, self.values * scale, self.constant * scale)


@dataclass(frozen=True)
class Answer:
    """What the solver found: levels [S], open blocks [B] (None if nothing), and the bound that it proved."""

    found: tuple[Integers, Flags] | None
    bound: float
    done: bool  # not stopped by a limit


class Program:
    """The mixed-integer program of a model; rows of budgets are added by `spend`."""

    def __init__(self, model: Model, *, whole: bool = True) -> None:
        self.model, self._whole_levels = model, whole
        self._low: list[Floats] = []
        self._high: list[Floats] = []
        self._whole: list[npt.NDArray[np.int64]] = []
        self.columns = 0
        self.rows = 0
        self._entries: list[tuple[Integers, Integers, Floats]] = []  # row, column, value
        self._limits: list[tuple[Floats, Floats]] = []
        self._gates: dict[Blocks, int] = {}
        self._shared: dict[Any, Any] = {}
        self._open = self._new(len(model.blocks), 0, 1, whole=True)
        self._levels = [self._one_hot(site) for site in range(len(model.utility))]
        for block, outer in enumerate(model.outer):
            for other in sorted(outer):
                self.row(self._one(self._open[block]) + self._one(self._open[other]) * -1, high=0.0)
        for kept in model.alive:
            self.row(self._sum(self._open[sorted(kept)]), low=1.0)
        self.shares = self._shares()

    # Columns and rows.

    def _new(self, count: int, low: float, high: float, *, whole: bool = False) -> Integers:
        self._low.append(np.full(count, float(low)))
        self._high.append(np.full(count, float(high)))
        self._whole.append(np.full(count, int(whole), dtype=np.int64))
        self.columns += count
        return np.arange(self.columns - count, self.columns)

    def row(self, expression: Linear, low: float = -inf, high: float = inf) -> None:
        """low <= expression <= high."""
        self._entries.append((np.full(len(expression.columns), self.rows), expression.columns, expression.values))
        self._limits.append((np.array([low - expression.constant]), np.array([high - expression.constant])))
        self.rows += 1

    def _between(self, columns: Integers, switches: Integers, low: float, high: float) -> None:
        """low * switch <= column <= high * switch, for many at once."""
        count = len(columns)
        ones, none, free = np.ones(count), np.zeros(count), np.full(count, inf)
        for limit, limits in ((low, (none, free)), (high, (-free, none))):
            rows = np.arange(self.rows, self.rows + count)
            self._entries += [(rows, columns, ones), (rows, switches, np.full(count, -limit))]
            self._limits.append(limits)
            self.rows += count

    @staticmethod
    def _one(column: int) -> Linear:
        return Linear(np.array([column]), np.ones(1))

    @staticmethod
    def _sum(columns: Integers, values: Floats | None = None) -> Linear:
        return Linear(columns, np.ones(len(columns)) if values is None else values)

    # What stands for what.

    def _gate(self, blocks: Blocks) -> Linear:
        """1 while all of these blocks are open, else 0."""
        inner = self.model.innermost(blocks)
        if not inner:
            return Linear(constant=1.0)
        if len(inner) == 1:
            return self._one(self._open[next(iter(inner))])
        if inner not in self._gates:
            self._gates[inner] = column = int(self._new(1, 0, 1)[0])
            for block in sorted(inner):
                self.row(self._one(column) + self._one(self._open[block]) * -1, high=0.0)
            everything = self._sum(self._open[sorted(inner)]) * -1
            self.row(self._one(column) + everything, low=1.0 - len(inner))
        return self._one(self._gates[inner])

    def _one_hot(self, site: int) -> Integers:
        levels = self._new(len(self.model.utility[site]), 0, 1, whole=self._whole_levels)
        self.row(self._sum(levels) + self._gate(self.model.inside[site]) * -1, 0.0, 0.0)
        return levels

    def _covers(self, site: int, blocks: Blocks) -> bool:
        """Whether a site is only there while all of these blocks are open."""
        return self.model.around(self.model.inside[site]) >= blocks

    def _table(self, site: int, table: Floats, blocks: Blocks) -> Linear:
        """A site's number while `blocks` are open, else 0, for a site that they cover."""
        if self.model.around(self.model.inside[site]) == self.model.around(blocks):
            return self._sum(self._levels[site], table)
        return self._gate(blocks) * float(table[0]) + self._sum(self._levels[site], table - table[0])

    def _gated(self, factor: Factor, blocks: Blocks) -> Linear:
        """A factor while `blocks` are open, else 0."""
        total = self._gate(blocks) * factor.constant
        wider = {site: table for site, table in factor.tables.items() if not self._covers(site, blocks)}
        for site, table in factor.tables.items():
            if site not in wider:
                total = total + self._table(site, table, blocks)
        return total + self._switched(wider, blocks) if wider else total

    def _switched(self, tables: Mapping[int, Floats], blocks: Blocks) -> Linear:
        """The sum of tables over sites while `blocks` are open, else 0, as a column of its own."""
        key = ("switched", blocks, key_of(Factor(0.0, tables)))
        if key not in self._shared:
            (low, high), gate, inner = span(tables), self._gate(blocks), self._gated(Factor(0.0, tables), EVERYWHERE)
            column = self._one(int(self._new(1, min(low, 0.0), max(high, 0.0))[0]))
            self.row(column + gate * -low, low=0.0)
            self.row(column + gate * -high, high=0.0)
            self.row(column + inner * -1 + gate * -low, high=-low)
            self.row(column + inner * -1 + gate * -high, low=-high)
            self._shared[key] = column
        return self._shared[key]  # type: ignore[no-any-return]

    def _product(self, product: Product) -> Linear:
        """The product of both factors while its blocks are open, else 0."""
        blocks = product.blocks
        first, second = sorted(product.factors, key=lambda factor: self._effort(factor, blocks))
        if not first.tables:
            return self._gated(second, blocks) * first.constant
        covered = all(self._covers(site, blocks) for site in first.tables)
        rest = first.constant
        total = Linear()
        for site, table in first.tables.items():
            exact = self.model.around(self.model.inside[site]) == self.model.around(blocks if covered else EVERYWHERE)
            shift = 0.0 if exact else float(table[0])
            total = total + self._spread(site, table - shift, second, EVERYWHERE if covered else blocks)
            rest += shift
        return total + self._gated(second, blocks) * rest if rest else total

    def _effort(self, factor: Factor, blocks: Blocks) -> tuple[bool, int]:
        """How little it is to expand a product over this factor."""
        levels = sum(len(table) for table in factor.tables.values())
        return not all(self._covers(site, blocks) for site in factor.tables), levels

    def _spread(self, site: int, weights: Floats, factor: Factor, blocks: Blocks) -> Linear:
        """sum over levels k of weights[k] * [site is at level k] * factor (while `blocks` are open)."""
        levels = self._levels[site]
        tables = dict(factor.tables)
        own = tables.pop(site) if site in tables and not blocks else np.zeros(len(levels))
        constant = 0.0 if blocks else factor.constant  # a gated factor's constant is no constant
        inner = Factor(factor.constant - constant, tables)
        linear = self._sum(levels, weights * (own + constant))
        if not inner.tables and not inner.constant:
            return linear
        return linear + self._sum(self._parts(site, inner, blocks), weights)

    def _parts(self, site: int, factor: Factor, blocks: Blocks) -> Integers:
        """Columns [levels]: the factor (while `blocks` are open) where the site is at that level, else 0."""
        key = ("parts", site, blocks, key_of(factor))
        if key not in self._shared:
            low, high = span(factor.tables)
            low, high = low + factor.constant, high + factor.constant
            if blocks:
                low, high = min(low, 0.0), max(high, 0.0)
            levels = self._levels[site]
            parts = self._new(len(levels), min(low, 0.0), max(high, 0.0))
            self._between(parts, levels, low, high)
            whole = self._sum(parts) + self._valued(factor, blocks) * -1
            if self.model.inside[site]:
                whole = whole + self._absent(site, factor, blocks, low, high)
            self.row(whole, 0.0, 0.0)
            self._shared[key] = parts
        return self._shared[key]  # type: ignore[no-any-return]

    def _absent(self, site: int, factor: Factor, blocks: Blocks, low: float, high: float) -> Linear:
        """The factor while the site is not there, else 0."""
        if not blocks:  # sites that go together with this one are then at level 0
            removed = {s: t for s, t in factor.tables.items() if self.model.inside[s] >= self.model.inside[site]}
            least, most = span(removed)
            first = sum(float(table[0]) for table in removed.values())
            low, high = low - least + first, high - most + first
        column = self._one(int(self._new(1, min(low, 0.0), max(high, 0.0))[0]))
        gate = self._gate(self.model.inside[site])
        self.row(column + gate * low, low=low)
        self.row(column + gate * high, high=high)
        return column

    def _valued(self, factor: Factor, blocks: Blocks) -> Linear:
        """A factor (while `blocks` are open) as a column of its own."""
        key = ("valued", blocks, key_of(factor))
        if key not in self._shared:
            column = self._one(int(self._new(1, -inf, inf)[0]))
            parts = self._gated(factor, blocks)
            if len(factor.tables) > 1 and not blocks:
                one = (self._valued(Factor(0.0, {site: table}), blocks) for site, table in factor.tables.items())
                parts = sum(one, start=Linear(constant=factor.constant))
            self.row(column + parts * -1, 0.0, 0.0)
            self._shared[key] = column
        return self._shared[key]  # type: ignore[no-any-return]

    def _shares(self) -> list[Linear]:
        """The costs of the state, [K], as shares of the full network's."""
        parts = [self._product(product) for product in self.model.products]
        prices = [product.price for product in self.model.products]
        return [
            joined([part * float(price[k]) for part, price in zip(parts, prices, strict=True) if price[k]])
            for k in range(len(self.model.asked))
        ]

    def utility(self) -> Linear:
        """The utility of the state."""
        sites = [self._sum(levels, u) for levels, u in zip(self._levels, self.model.utility, strict=True)]
        return joined([*sites, self._sum(self._open, self.model.blocks)])

    def opened(self) -> Linear:
        """How many blocks are open."""
        return self._sum(self._open)

    def new_column(self, low: float, high: float, *, whole: bool = False) -> Linear:
        """A variable besides."""
        return self._one(int(self._new(1, low, high, whole=whole)[0]))

    def maximise(self, target: Linear, *, gap: float, nodes: int, seconds: float, relaxed: bool = False) -> Answer:
        """The state with the most of `target`."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        objective = np.zeros(self.columns)
        np.add.at(objective, target.columns, target.values)
        size = max(float(np.abs(objective).max()), 1e-300)
        rows, columns, values = (np.concatenate(each) for each in zip(*self._entries, strict=True))
        low, high = (np.concatenate(each) for each in zip(*self._limits, strict=True))
        matrix = csr_matrix((values, (rows, columns)), shape=(self.rows, self.columns))
        with _stdout_aside():
            result = milp(
                c=objective * (-100 / size),
                integrality=np.concatenate(self._whole) * (not relaxed),
                bounds=Bounds(np.concatenate(self._low), np.concatenate(self._high)),
                constraints=LinearConstraint(matrix, low, high),
                options={"mip_rel_gap": gap, "node_limit": nodes, "time_limit": max(seconds, 0.05)},
            )
        dual = result.fun if relaxed and result.status == 0 else getattr(result, "mip_dual_bound", None)
        bound = inf if dual is None else -dual * size / 100 + target.constant
        if result.status == 2:
            return Answer(None, -inf, True)
        found = None if result.x is None or relaxed else self._state(result.x)
        return Answer(found, bound, result.status == 0)

    def _state(self, values: Floats) -> tuple[Integers, Flags]:
        levels = np.array([int(values[levels].argmax()) for levels in self._levels], dtype=np.int64)
        return levels, values[self._open] > 0.5


def joined(parts: Sequence[Linear]) -> Linear:
    if not parts:
        return Linear()
    columns, values = np.concatenate([p.columns for p in parts]), np.concatenate([p.values for p in parts])
    return Linear(columns, values, sum(part.constant for part in parts))


@contextmanager
def _stdout_aside() -> Iterator[None]:
    """Inside, what a library writes to stdout goes nowhere: HiGHS leaves a line for its makers there now and then."""
    sys.stdout.flush()
    before, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)
