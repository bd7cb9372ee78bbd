"""What surgery asks of an operator: one handler a family, four questions.

A new operator is a new handler in a file of `polar_deploy.surgery.ops`; everything here has a default that is right
for operators that only move channels about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np

from polar_deploy.surgery.arrays import any_of
from polar_deploy.surgery.facts import Note, Unsupported

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    from polar_deploy.surgery.facts import Bools, Channels, Floats, Ints, Step

    PlanT = TypeVar("PlanT", default=Any)
else:
    from typing import TypeVar  # whose defaults need Python 3.13

    PlanT = TypeVar("PlanT")


class Retained(NamedTuple):
    """Channels that stay although nobody needs them, and why."""

    channels: Channels
    indices: Ints
    reason: str


class Operator(Generic[PlanT]):
    """Handler of an operator family. What `couple` finds out, a `PlanT`, it leaves in `step.plan` for the others.

    can_be_nonfinite: whether numbers of usual size can give something infinite, or no number at all (Exp, Log, Div).
    """

    can_be_nonfinite = False

    def couple(self, step: Step[PlanT]) -> None:
        """Opens the output's channels and links them with the inputs'.

        Raises:
            Unsupported: they cannot be followed.
        """
        raise NotImplementedError

    def constants(self, step: Step[PlanT]) -> None:
        """Forward: which output channels are constant. Default: what their one source says.

        Asked twice: before it is known what is needed and (`step.facts.after_cut`) after; the second answer counts for
        channels that nobody needs, and describes the graph after the cut.
        """
        for link in step.links:
            target, source = link.target, link.source
            if link.is_whole:
                target.constant[:], target.value[:], target.nonnegative[:] = (
                    source.constant,
                    source.value,
                    source.nonnegative,
                )
                continue
            target.constant[link.into] = source.constant[link.out_of]
            target.value[link.into] = source.value[link.out_of]
            target.nonnegative[link.into] = source.nonnegative[link.out_of]

    def need(self, step: Step[PlanT]) -> None:
        """Backward: marks the input channels that the needed output channels depend on. Default: along the links."""
        for link in step.links:
            if link.is_whole:
                link.source.needed |= link.target.needed
            else:
                link.source.needed[link.out_of[link.target.needed[link.into]]] = True

    def heads(self, step: Step[PlanT]) -> list[tuple[Channels, Ints]]:
        """Tensors of attention, each with the head [channels] that every one of its channels belongs to."""
        return []

    def retain(self, step: Step[PlanT]) -> list[Retained]:
        """Channels that must stay although nobody needs them, given the cut as planned, and why.

        Default: an operator that goes on working keeps one channel of each input.
        """
        if all(channels.is_removed for channels in step.outputs):
            return []
        first = np.zeros(1, np.int64)
        reason = "an operator must keep one input channel"
        data = [x for i, x in enumerate(step.inputs) if x is not None and i not in step.replaced]
        return [Retained(channels, first, reason) for channels in data if channels.is_removed]

    def nonfinite_risk(self, step: Step[PlanT]) -> Bools:
        """[output channels] where other finite inputs than those of the graph as given might come out infinite."""
        return np.full(len(step.output), self.can_be_nonfinite)

    def must_keep_values(self, step: Step[PlanT]) -> list[tuple[Channels, Bools]]:
        """Kept channels of inputs that nobody needs, and that must hold what they held all the same, given the cut.

        What the cut leaves there (zero, or what an opened gate lets through) might come out infinite: infinite times
        zero would then reach channels that somebody needs.
        """
        if not self.can_be_nonfinite:
            return []
        found = []
        for link in step.links:
            target, source = link.target, link.source
            free = target.kept & ~target.needed & ~target.constant
            if not any_of(free):
                continue
            unsure = (free & self.nonfinite_risk(step))[link.into]
            which = np.zeros(len(source), bool)
            which[link.out_of[unsure]] = True
            which &= ~source.needed
            if any_of(which):
                found.append((source, which))
        return found

    def slice(self, step: Step[PlanT]) -> None:
        """Cuts the node's constants and attributes to the channels that are kept. Default: there are none."""

    def gate(self, step: Step[PlanT]) -> Floats | None:
        """[output channels] the constants that the node multiplies its data with, where it is a gate; else None."""
        return None

    def scale_output(self, step: Step[PlanT], factors: Floats) -> bool:
        """Multiplies the kept output channels by `factors` by way of the node's constants. False: it cannot."""
        return False

    def through(self, step: Step[PlanT]) -> int | None:
        """The input that factors on the output can move to, channel by channel in the same order; None: there is none.

        What the node adds to that input is then scaled by `scale_addend`.
        """
        return None

    def scale_addend(self, step: Step[PlanT], factors: Floats) -> None:
        """Multiplies what the node adds to its input `through`. Default: nothing is added."""

    def scales_input(self, step: Step[PlanT]) -> bool:
        """Whether `scale_input` is possible."""
        return False

    def scale_input(self, step: Step[PlanT], factors: Floats) -> None:
        """Does to the node's constants what multiplying the kept channels of the first input by `factors` would do."""
        raise NotImplementedError


class UnsupportedOp(Operator[Note]):
    """Handler of operators that channels cannot be followed through. Its plan is the note that says why.

    Args:
        reason: for the report.
    """

    def __init__(self, reason: str = "this operator is not known to surgery") -> None:
        self.reason = reason

    def couple(self, step: Step[Note]) -> None:
        raise Unsupported(self.reason)

    def constants(self, step: Step[Note]) -> None:
        """Nothing is known."""

    def need(self, step: Step[Note]) -> None:
        """All of its inputs stay."""
        for channels in step.inputs:
            if channels is not None:
                channels.pin(step.plan)
