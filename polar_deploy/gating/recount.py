"""Numbers that modules keep beside their parameters and a forward counts on: how many heads there are, for one.

Nothing says what such a number counts. So those that may have shrunk with a layer are found by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from polar_deploy.costs import State
from polar_deploy.errors import ContentError
from polar_deploy.surgery.choices import Choices

MOST = 6  # kinds of numbers whose subsets are tried


@dataclass(frozen=True)
class Number:
    """An attribute of a module, as it is and as it would be if it had shrunk like a layer inside."""

    module: nn.Module
    name: str
    old: int
    new: int

    @property
    def kind(self) -> tuple[str, str]:
        """Modules of one type count alike."""
        return type(self.module).__qualname__, self.name


def recount(small: nn.Module, choices: Choices, state: State, check: Callable[[], None]) -> None:
    """Write into the modules of a cut network the numbers that make `check` hold, as many of them as possible.

    Raises:
        ContentError: none do, or there are more than `MOST` kinds; what `check` says of the network as it is.
    """
    numbers = _numbers(small, choices, state)
    kinds = sorted({number.kind for number in numbers})
    for size in range(len(kinds), 0, -1) if len(kinds) <= MOST else ():
        for chosen in combinations(kinds, size):
            changed = [number for number in numbers if number.kind in chosen]
            _write({number: number.new for number in changed})
            try:
                check()
            except ContentError:
                _write({number: number.old for number in changed})
            else:
                return
    check()


def _numbers(small: nn.Module, choices: Choices, state: State) -> list[Number]:
    """Multiples of a narrowed site's gates, in the module around the layer that it is named after."""
    found: dict[tuple[int, str], Number] = {}
    for site, left in zip(choices.sites, state.widths, strict=True):
        module = small.get_submodule(site.name.partition("#")[0].rpartition(".")[0])
        for name, value in vars(module).items():
            if type(value) is int and 0 < left < site.width and value > 0 and value % site.width == 0:
                found[id(module), name] = Number(module, name, value, value // site.width * left)
    return list(found.values())


def _write(values: dict[Number, int]) -> None:
    for number, value in values.items():
        setattr(number.module, number.name, value)
