"""Operators on several tensors, element by element; comparisons and truth values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from tests.surgery.entries.entry import Add, Entry, positive, small
from tests.surgery.entries.norms import batch_norm
from tests.surgery.random_graphs import RandomGraph


def with_constant(
    operator: str, numbers: Callable[..., Any] = RandomGraph.normal, prepare: Add = lambda g, x: x
) -> Add:
    """An operator on an image and a constant: one number, one a channel, or one an element in space."""

    def add(g: RandomGraph, x: str) -> str:
        width, space = g.width[x], g.space[x]
        shape = g.pick((g.per_channel(width), (1,), (), (1, width, *space), (1, 1, *space)))
        values = numbers(g, *shape).astype(np.float32)
        x = prepare(g, x)
        if operator not in ("Div", "Pow", "PRelu") and g.chance(3):
            return g.op(operator, values, x, width=width, space=space)
        return g.op(operator, x, values)

    return add


def with_another(operator: str, prepare: Add = lambda g, y: y, count: int = 1) -> Add:
    """An operator on images of equal shape."""

    def add(g: RandomGraph, x: str) -> str:
        others = [prepare(g, g.partner(x)) for _ in range(1 if count == 1 else g.pick((1, 0, 2)))]
        return g.op(operator, *([*others, x] if g.chance(3) and operator not in ("Div", "Pow") else [x, *others]))

    return add


def _residual(g: RandomGraph, x: str) -> str:
    """A residual block, often with its branch closed: whole, or channel by channel."""
    width, branch = g.width[x], x
    if g.chance(5):
        branch = batch_norm(g, branch)
    branch = g.gated(g.act(g.conv_of(branch, g.pick((4, 6, 8)), kernel=g.pick((1, 3)))))
    branch = g.conv_of(branch, width, kernel=3)
    branch = g.gated(branch) if g.chance(6) else branch
    return g.act(g.op("Add", *((branch, x) if g.chance(5) else (x, branch))))


def _where(g: RandomGraph, x: str) -> str:
    """Where with a constant mask over the channels, over space, or over both."""
    width, space = g.width[x], g.space[x]
    shape = g.pick(((1, width, 1, 1), (width, 1, 1), (1, 1, *space), (1, width, *space)))
    mask = g.random.random(shape) < 0.5
    other = g.partner(x) if g.chance(5) else g.pick((np.float32(0), np.float32(0.7), g.normal(width, 1, 1)))
    return g.op("Where", mask, *((x, other) if g.chance(5) else (other, x)), width=width, space=space)


def _where_computed(g: RandomGraph, x: str) -> str:
    """Continuous all the same: where x > 0 then x, else -0.3 x."""
    return g.op("Where", g.op("Greater", x, np.float32(0)), x, g.op("Mul", x, np.float32(-0.3)), space=g.space[x])


def comparison(operator: str) -> Add:
    """The larger (or smaller) of two images by way of truth values."""

    def add(g: RandomGraph, x: str) -> str:
        y = g.partner(x) if g.chance(5) else np.float32(0)
        return g.op("Where", g.op(operator, x, y), x, y, space=g.space[x])

    return add


def logic(operator: str) -> Add:
    """And, Or, Xor of two comparisons; what it switches is continuous where they change."""

    def add(g: RandomGraph, x: str) -> str:
        one, other = (g.op("Greater", x, np.float32(bound)) for bound in (0, 0.5))
        chosen = g.op(operator, one, other)
        return g.op("Mul", x, g.op("Cast", chosen, to=onnx.TensorProto.FLOAT))

    return add


def _not(g: RandomGraph, x: str) -> str:
    return g.op("Where", g.op("Not", g.op("Less", x, np.float32(0))), x, np.float32(0), space=g.space[x])


def _equal(g: RandomGraph, x: str) -> str:
    """Equal to zero, as behind a gate: there a constant instead."""
    return g.op("Where", g.op("Equal", x, np.float32(0)), np.float32(0.25), x, width=g.width[x], space=g.space[x])


def unless(operator: str) -> Add:
    """IsNaN and IsInf, as exporters guard a tensor."""
    return lambda g, x: g.op("Where", g.op(operator, x), np.float32(0), x, width=g.width[x], space=g.space[x])


def _excite(g: RandomGraph, x: str) -> str:
    """Squeeze and excite as in EfficientNet."""
    s = g.op("GlobalAveragePool", x, space=(1, 1))
    s = g.gated(g.act(g.conv_of(s, 4)))
    return g.op("Mul", x, g.op(g.pick(("Sigmoid", "HardSigmoid")), g.conv_of(s, g.width[x])))


def _mod(g: RandomGraph, x: str) -> str:
    return g.op("Mod", x, g.around_one(g.width[x], 1, 1), fmod=1)


ENTRIES: dict[str, Entry] = {
    "Add": Entry(with_another("Add")),
    "Add residual": Entry(_residual),
    "Add constant": Entry(with_constant("Add"), fixed=True),
    "Sub": Entry(with_another("Sub")),
    "Sub constant": Entry(with_constant("Sub"), fixed=True),
    "Mul": Entry(with_another("Mul", lambda g, y: g.op("Sigmoid", y))),
    "Mul gate": Entry(lambda g, x: g.gated(x)),
    "Mul constant": Entry(with_constant("Mul", RandomGraph.around_one), fixed=True),
    "Mul excite": Entry(_excite),
    "Div": Entry(with_another("Div", positive)),
    "Div constant": Entry(with_constant("Div", RandomGraph.around_one), fixed=True),
    "Pow": Entry(with_constant("Pow", lambda g, *shape: g.random.integers(1, 4, shape), small), fixed=True),
    "Mod": Entry(_mod, 10),
    "PRelu": Entry(with_constant("PRelu"), fixed=True),
    "Max": Entry(with_another("Max", count=2)),
    "Max constant": Entry(with_constant("Max"), fixed=True),
    "Min": Entry(with_another("Min", count=2)),
    "Min constant": Entry(with_constant("Min"), fixed=True),
    "Sum": Entry(with_another("Sum", count=2)),
    "Mean": Entry(with_another("Mean", count=2)),
    "Where": Entry(_where, fixed=True),
    "Where computed": Entry(_where_computed),
    **{name: Entry(comparison(name)) for name in ("Greater", "Less")},
    **{name: Entry(comparison(name), 12) for name in ("GreaterOrEqual", "LessOrEqual")},
    **{name: Entry(logic(name)) for name in ("And", "Or", "Xor")},
    "Not": Entry(_not),
    "Equal": Entry(_equal, 11),
    "IsNaN": Entry(unless("IsNaN")),
    "IsInf": Entry(unless("IsInf"), 10),
}
