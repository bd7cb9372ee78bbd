"""What hands a tensor on as it is, or as numbers of another kind: Identity, Dropout, Cast, CastLike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.dtype_limits import is_whole
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.ops.activation import ROUNDS, Unary

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Floats, Step
    from polar_deploy.surgery.operator import Operator


class Identity(Unary):
    """Identity and, in inference, Dropout."""

    def couple(self, step: Step) -> None:
        mask = step.made[1] if len(step.made) > 1 and step.made[1].name else None
        if mask is not None and (mask.outputs or not step.graph.is_private(mask.name)):
            raise Unsupported("its mask is used")
        if step.has(2) and np.any(step.parameter(2, "training mode")):
            raise Unsupported("it is in training mode")
        step.carry()


class Cast(Unary):
    """Cast and CastLike between all kinds of numbers and truth values.

    To integers: towards zero; to truth values: whether it is not zero. A constant that the new type cannot hold comes
    out as each runtime likes, so it is none. CastLike asks its second input for its type only.
    """

    def couple(self, step: Step) -> None:
        kinds = [step.graph.dtype(tensor).kind for tensor in (step.original[0], step.made[0])]
        if not set(kinds) <= set("biufV"):
            raise Unsupported("it casts from or to what is no number")
        step.carry()

    def apply(self, step: Step, values: Floats) -> Floats:
        dtype = _types(step)[1]
        if dtype.kind == "b":
            return np.asarray(values != 0, np.float64)
        return np.trunc(values) if is_whole(dtype) else values.astype(dtype).astype(np.float64)

    def change(self, step: Step) -> float | None:
        return ROUNDS if is_whole(_types(step)[1]) else None

    def nonfinite_risk(self, step: Step) -> Bools:
        before, after = _types(step)  # a narrower type overflows
        return np.full(len(step.output), not is_whole(after) and after.itemsize < before.itemsize)


def _types(step: Step) -> tuple[np.dtype[Any], np.dtype[Any]]:
    return step.graph.dtype(step.original[0]), step.graph.dtype(step.made[0])


HANDLERS: dict[str, Operator] = {
    **dict.fromkeys(("Identity", "Dropout"), Identity(lambda x, _: x, None)),
    **dict.fromkeys(("Cast", "CastLike"), Cast(lambda x, _: x, None, can_be_nonfinite=True)),
}
