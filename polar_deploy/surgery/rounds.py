"""Facts, sets and cuts, again and again until nothing changes. One round is nearly always enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.errors import ContentError
from polar_deploy.surgery import cut, sets
from polar_deploy.surgery.arrays import all_of, any_of
from polar_deploy.surgery.detached import are_same
from polar_deploy.surgery.graph import Graph
from polar_deploy.surgery.validation import NotUnderstoodError

if TYPE_CHECKING:
    from polar_deploy.surgery.cut import Cut
    from polar_deploy.surgery.detached import DetachedModel
    from polar_deploy.surgery.facts import Facts
    from polar_deploy.surgery.sets import Sets


@dataclass(frozen=True)
class Round:
    """What was known of a graph, what was decided and done, and the smaller model that came of it."""

    facts: Facts
    sets: Sets
    cut: Cut
    model: DetachedModel

    @property
    def labels(self) -> list[str]:
        """What reports call the nodes of the model."""
        graph = self.facts.graph  # has left Constant nodes behind, which a model keeps where nothing else is changed
        return [graph.label(node) for node in (graph.nodes if graph.is_changed else graph.original_nodes)]

    def release(self) -> None:
        """Takes facts and graph apart, once the report is written: Python need not search them for garbage."""
        self.facts.graph.release()
        self.facts.steps.clear()
        self.facts.alive.clear()

    @property
    def needs_another_round(self) -> bool:
        """Whether the cut has left more to do: facts that hold only now."""
        if not self.facts.total:
            return False
        changed = bool(self.cut.dropped) or not all_of(self.facts.kept)
        return changed and (
            self._has_idle_channels or self._has_new_constants or self._has_new_gates or self._has_new_neighbours
        )

    @property
    def _has_idle_channels(self) -> bool:
        """Channels that stay though nobody needs them: what held them may be gone, or be known to be zero by now."""
        return any_of(self.facts.kept & ~self.facts.needed)

    @property
    def _has_new_constants(self) -> bool:
        """Tensors that are constant throughout by now: their readers can do without them."""
        kept = self.facts.kept
        known = self.facts.by_tensor(np.logical_and, self.facts.gathered("constant") | ~kept)
        new = known & self.facts.by_tensor(np.logical_or, kept)
        return any(new and not c.was_constant for new, c in zip(new.tolist(), self.facts.everything(), strict=True))

    @property
    def _has_new_gates(self) -> bool:
        """Products and choices of which one side was computed, and is a constant now."""
        graph = self.facts.graph
        products = [step for step in self.facts.alive if step.node.op in ("Mul", "Where") and step.replaced]
        return any(graph.contains(step.node) for step in products)

    @property
    def _has_new_neighbours(self) -> bool:
        """Products that a constant could not leave, while gates went: the Add behind may be next to them now."""
        gates = any(node.op in ("Mul", "Where") for node in self.cut.dropped)
        notes = (note for channels in self.facts.everything() for note in channels.notes)
        return gates and any(note.operator == "MatMul" and note.channels is not None for note in notes)


def operate(model: DetachedModel) -> list[Round]:
    """Cuts a model. Returns the rounds; the last one holds the result, which was checked as the input was.

    A round that changed nothing is not among them, unless it is the first.
    """
    rounds: list[Round] = []
    while not rounds or rounds[-1].needs_another_round:
        graph = Graph(rounds[-1].model, rounds[-1].labels) if rounds else Graph(model)
        facts, plan = sets.plan(graph)
        found = Round(facts, plan, cut.apply(facts), graph.to_detached())
        if rounds and are_same(found.model, rounds[-1].model):
            break
        rounds.append(found)
    result = rounds[-1].model
    if result is not model:
        try:
            result.skeleton.check("the cut graph")
            result.skeleton.at_batch_1()
        except NotUnderstoodError as error:
            model.skeleton.at_batch_1()  # raises where the graph as given fits no sizes either, which is no bug
            raise ContentError(error.what, "please report this graph as a bug of polar_deploy.surgery") from error
    return rounds
