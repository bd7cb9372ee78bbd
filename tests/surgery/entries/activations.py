"""Operators on one tensor, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.surgery.entries.entry import Entry, inside, plain, positive, small, unary
from tests.surgery.random_graphs import RandomGraph


def _clip(g: RandomGraph, x: str) -> str:
    low, high = g.pick(((0.0, 6.0), (-1.0, 1.0), (0.5, 2.0), (None, 1.0), (-0.5, None)))
    if g.opset < 11:
        bounds: dict[str, Any] = {name: bound for name, bound in (("min", low), ("max", high)) if bound is not None}
        return g.op("Clip", x, **bounds)
    return g.op("Clip", x, *("" if bound is None else np.float32(bound) for bound in (low, high)))


def _cast(g: RandomGraph, x: str) -> str:
    wide = g.op("Cast", x, to=onnx.TensorProto.DOUBLE)
    return g.op("Cast", g.op("Neg", wide) if g.chance(5) else wide, to=onnx.TensorProto.FLOAT)


def _cast_like(g: RandomGraph, x: str) -> str:
    wide = g.op("CastLike", x, np.ones(1, np.float64))
    return g.op("CastLike", wide, np.ones(1, np.float32))


ENTRIES: dict[str, Entry] = {
    **plain(("Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Softsign", "Erf")),
    **plain(("Abs", "Neg", "Identity", "Dropout", "Sin", "Cos", "Atan", "Asinh", "Shrink", "Sign", "Floor", "Ceil")),
    **plain(("Exp", "Tan", "Sinh", "Cosh"), prepare=small),
    **plain(("Asin", "Acos", "Atanh"), prepare=inside),
    **plain(("Sqrt", "Log", "Reciprocal"), prepare=positive),
    **plain(("ThresholdedRelu",), 10),
    **plain(("Round",), 11),
    **plain(("Celu",), 12),
    **plain(("HardSwish",), 14),
    **plain(("Mish",), 18),
    **plain(("Gelu",), 20),
    "Gelu tanh": Entry(unary("Gelu", approximate="tanh"), 20),
    "Acosh": Entry(unary("Acosh", lambda g, x: g.op("Add", positive(g, x), np.float32(1)))),
    "Clip": Entry(_clip),
    "Cast": Entry(_cast),
    "CastLike": Entry(_cast_like, 15),
}
