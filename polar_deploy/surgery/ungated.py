"""Why layers have no gates: what keeps the channels that they write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Note
from polar_deploy.surgery.survey import Survey, numbers

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Channels, Ints, Step

ENDS = {  # of the graph, by the operator of notes about them, which are no operator's
    "input": "its channels are those of an input of the network, one by one",
    "output": "its channels are an output of the network",
    "body": "the body of a loop or a condition reads it",
}
UNUSED = "nothing uses it in evaluation mode, with these example inputs"
UNKNOWN = "surgery cannot follow the channels that it writes"
COUPLED = "its channels go with others that no mask closes, or save nothing"
WHOLE = "; the branch that it is in can go whole"


def reasons(survey: Survey, gated: Bools) -> dict[str, str]:
    """For each layer none of whose channels has a gate, what keeps them.

    Args:
        gated: bool [channels of the graph].
    """
    kept, found = _Kept(survey), dict[str, str]()
    for name, nodes in survey.layers.items():
        steps = [step for node in nodes if (step := survey.steps.get(id(node))) is not None]
        written = [numbers(channels) for step in steps for channels in step.outputs]
        if any(gated[own].any() for own in written):
            continue
        why = next(filter(None, (*map(kept.why, written), *map(_note, steps))), UNKNOWN) if steps else UNUSED
        found[name] = why + (WHOLE if any(survey.blocks_of(step.node) for step in steps) else "")
    return found


def _note(step: Step) -> str | None:
    """What an operator that surgery does not follow says."""
    return step.plan.reason if isinstance(step.plan, Note) else None


class _Kept:
    """The first reason, for each set of channels that go together: somebody needs them, surgery left some of them when
    they were closed, or no mask can be put where they are read.
    """

    def __init__(self, survey: Survey) -> None:
        self._labels = survey.labels
        self._texts: list[str] = []
        self._text_of = np.full(len(self._labels), -1)
        names = {survey.graph.label(node): survey.name(node) for node in survey.graph.original_nodes}

        def said(note: Note) -> str:
            return ENDS.get(note.operator) or f"{note.operator} {names.get(note.node, note.node)}: {note.reason}"

        for channels in survey.facts.everything():
            if channels.pinned.any():
                note = next((note for note in channels.notes if note.channels is None), channels.notes[-1])
                self._tell(numbers(channels)[channels.pinned], said(note))
        for own, note in survey.stayed:
            self._tell(own, said(note))
        closable = np.zeros(len(self._labels), bool)
        for own in survey.closable.values():
            closable[self._labels[own]] = True
        for step in survey.facts.alive:
            passed = self._of(step.outputs)
            for channels in filter(None, step.inputs):
                read = numbers(channels)
                ends = ~np.isin(self._labels[read], passed) & ~closable[self._labels[read]]
                self._tell(read[ends], f"{step.node.op} {survey.name(step.node)} reads it, where no mask can be put")

    def why(self, own: Ints) -> str:
        """What keeps some of these channels of the graph."""
        texts = self._text_of[self._labels[own]]
        return self._texts[texts[texts >= 0][0]] if (texts >= 0).any() else COUPLED

    def _of(self, outputs: list[Channels]) -> Ints:
        found: Ints = self._labels[np.concatenate([np.empty(0, np.int64), *map(numbers, outputs)])]
        return found

    def _tell(self, own: Ints, text: str) -> None:
        labels = self._labels[own]
        self._text_of[labels[self._text_of[labels] < 0]] = len(self._texts)
        self._texts.append(text)
