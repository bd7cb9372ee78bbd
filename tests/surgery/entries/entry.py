"""What an entry of the table of random operators is, and what many of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.surgery.random_graphs import RandomGraph

Add = Callable[[RandomGraph, str], str]  # takes the name of an image, returns that of another one


class Entry(NamedTuple):
    """One way to add an operator. since, until: opsets; fixed: needs height and width as numbers."""

    add: Add
    since: int = 9
    until: int = 99
    fixed: bool = False


def unary(operator: str, prepare: Add = lambda g, x: x, **attributes: Any) -> Add:
    """An operator on one tensor, behind whatever keeps its numbers tame."""
    return lambda g, x: g.op(operator, prepare(g, x), **attributes)


def plain(names: Sequence[str], since: int = 9, prepare: Add = lambda g, x: x) -> dict[str, Entry]:
    """Operators on one tensor, without attributes."""
    return {name: Entry(unary(name, prepare), since) for name in names}


def small(g: RandomGraph, x: str) -> str:
    """Between -1 and 1."""
    return g.op("Tanh", x)


def inside(g: RandomGraph, x: str) -> str:
    """Between -0.9 and 0.9."""
    return g.op("Mul", small(g, x), np.float32(0.9))


def positive(g: RandomGraph, x: str) -> str:
    """From 0.5 on."""
    return g.op("Add", g.op("Abs", x), np.float32(0.5))
