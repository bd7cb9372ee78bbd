"""Gates on a network of the user's, in the loop that trains it.

    gates = Gates(model, example_inputs, budget="latency=0.67", steps=len(loader) * epochs)
    for x, y in batches:
        loss = criterion(model(x), y) + gates.loss()
        optimizer.zero_grad(); loss.backward(); optimizer.step(); gates.step()
    gates.export("gated.onnx"); small = gates.cut()

`step` watches what each gate is worth while all are open, and at `close_from` tries what the outputs miss where layers
are narrower; it chooses what stays within the budget, closes the rest little by little, and fixes all at `freeze_at`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from polar_deploy import devices
from polar_deploy.costs import Floats, State
from polar_deploy.devices import Chosen
from polar_deploy.errors import ContentError
from polar_deploy.export import Example, device_of
from polar_deploy.gating import budgets, masking, processes, rehearsal
from polar_deploy.gating.analysis import Analysis, analyse, require_values
from polar_deploy.gating.choice import Limits, Measured, choose, choose_measured, require_reachable, smallest
from polar_deploy.gating.latency import latency_cost
from polar_deploy.gating.sampling import SampleGates
from polar_deploy.gating.schedule import Schedule, closing
from polar_deploy.gating.sensitivity import Call, measure
from polar_deploy.gating.utility import Begin, Observer
from polar_deploy.latency import LatencyTable
from polar_deploy.surgery.choices import Block, Site
from polar_deploy.surgery.facts import Bools

Phase = Literal["open", "learning", "frozen"]
WATCH_EVERY = 8  # steps; a step that is watched costs a fifth more
WATCH_FIRST = 16  # observations that are made as fast as possible
FORMAT = 2


class Gates:
    """Gates on every channel and block of `model` that can go, closed until a budget is met while it is trained.

    The model stays the user's own: hooks multiply what its modules read by masks that lie beside their parameters.

    Args:
        model: any network, or any submodule of one; its parameters and modes stay as they are.
        example_inputs: what its forward takes: a tensor, a tuple of arguments, or a dictionary of named ones; only
            shapes and types matter. The first axis is the batch.
        budget: what is left of the full cost, a share in (0, 1): 0.5, "macs=0.5,params=0.6", "latency=0.67", or a
            mapping. Every one is kept to.
        steps: calls of `step` in the whole run.
        ignore: patterns of the paths of modules that get no mask, nor what is inside of them, such as "head".
        align: widths become multiples of this, since most runtimes compute so many channels at a time; layers narrower
            than twice of it use the largest of 16, 8, 1 that is at most half of their width.
        device: whose widths are taken, and not the multiples of `align`, and whose costs stand for latency where there
            is no `latency_table`: a name of `polar_deploy.devices`, the path of such a file, or what
            `polar_deploy.devices.choose` gives for a precision.
        min_width: share of its channels that a layer keeps at least.
        blocks: whether whole residual branches have gates, too.
        heads: whether heads of attention have gates; `cut` needs modules that read their number from an attribute.
        mode: "batch": one decision for all samples. "sample": as in the method of Zhi et al., a light network decides
            for each sample, and a polarizing loss makes all samples agree.
        close_from, freeze_at: shares of the run at which gates begin to close, and at which they are fixed; None: 0.07
            after `close_from`, 0.25 where samples decide. What stays is chosen at `close_from`: a network that is
            trained from nothing should have learned something by then.
        latency_table: for a latency budget: what `polar_deploy.engines table` measured, or the path of its file;
            without one, what `device` says.
        measured: for a latency budget: measures which share of the full latency a sub-network takes, given as open
            gates by the names of sites and blocks. What is chosen is then tightened until it keeps to the budget as
            it runs, not only as a table adds it up.
        rehearse: random states that are closed, cut and counted before anything is trained.
        analysis: what `polar_deploy.gating.analysis.analyse` found for a network of the same structure: saves the
            export. `example_inputs`, `ignore`, `blocks` and `heads` are not looked at then.

    Attributes:
        phase: "open" before anything closes, "learning" while gates close, or "frozen".
        opened: bool [gates], what is open as things stand.
        sites, blocks: where the gates are.
        analysis: what was found of the model; can be given to others of the same structure.

    Raises:
        UsageError: there is no gate, the budget is out of reach, latency is asked without a table, an argument is out
            of its range, or the model has gates already, or parameters without values or shapes.
        ContentError: the model does not take the example, or its export fails or does not lead back to its modules.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        budget: float | str | Mapping[str, float] = 0.5,
        steps: int = 1000,
        *,
        ignore: Sequence[str] = (),
        align: int = 8,
        device: str | Chosen | None = None,
        min_width: float = 0.25,
        blocks: bool = True,
        heads: bool = False,
        mode: Literal["batch", "sample"] = "batch",
        close_from: float = 0.05,
        freeze_at: float | None = None,
        latency_table: LatencyTable | Path | str | None = None,
        measured: Measured | None = None,
        rehearse: int = 2,
        analysis: Analysis | None = None,
    ) -> None:
        self.budget = budgets.asked(budget)
        self.schedule = Schedule.of(steps, close_from, freeze_at, mode)
        self.model, self.mode = model, mode
        require_values(model)  # as `analyse` does, where one is given
        masking.require_bare(model)
        self.analysis = analysis or analyse(
            model, Example.of(example_inputs), ignore=ignore, blocks=blocks, heads=heads
        )
        chosen = devices.given(device)
        self._limits = Limits.of(self.analysis.choices, align, min_width, chosen.offers if chosen else None)
        self._costs = dict(self.analysis.choices.costs)
        if "latency" in self.budget:
            self._costs["latency"] = latency_cost(budgets.latency_source(latency_table, chosen), self.analysis.choices)
        require_reachable(self.analysis.choices, self._limits, self._costs, self.budget)
        self._handles = masking.attach(model, self.analysis.places, [m.width for m in self.analysis.choices.masks])
        self._values = torch.ones(self.analysis.choices.gates, device="cpu")  # of the masks, 0 to 1 while gates close
        self._measured = measured if "latency" in self.budget else None
        self._step = 0
        self._stance: Any = None  # what torch.compile is to do while a step is watched
        self.phase: Phase = "open"
        self.opened = np.ones(self.analysis.choices.gates, bool)
        self._stay = self.opened.copy()  # what was chosen
        carriers = masking.Carriers(model, self.analysis.places)
        self._observer = Observer(carriers, self.analysis.gate_of(device_of(model)), len(self.opened))
        self._sampler = SampleGates(carriers, self.analysis, self._observer) if mode == "sample" else None
        self._handles.append(model.register_forward_pre_hook(Begin(self._observer), with_kwargs=True))
        self._watch()
        if rehearse:
            try:
                rehearsal.rehearse(model, self.analysis, rehearse)
            except BaseException:
                self.detach()  # the model stays as it was
                raise

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where gates for channels are; gates are numbered through sites, then blocks."""
        return self.analysis.choices.sites

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual branches that can go whole."""
        return self.analysis.choices.blocks

    @property
    def ungated(self) -> dict[str, str]:
        """Layers whose channels have no gate, with the reason; their cost counts."""
        return self.analysis.ungated

    @property
    def share(self) -> Tensor:
        """Float [gates]: share of the last step's samples that opened each gate; mode "batch": 0 or 1."""
        if self._sampler is not None and self.phase == "learning":
            return self._sampler.share.detach().cpu()
        return torch.from_numpy(self.opened).float()

    @property
    def freezes_next(self) -> bool:
        """Whether the next `step` fixes the gates."""
        return self.phase != "frozen" and self._step + 1 >= self.schedule.frozen_at

    @property
    def utility(self) -> Tensor:
        """Float [gates]: what each gate is worth, all together 1; zeros before the first step."""
        return self._observer.utility

    @property
    def full(self) -> dict[str, int]:
        """MACs (at batch 1) and parameters of the whole network."""
        return {name: round(cost.full) for name, cost in self.analysis.choices.costs.items()}

    def smallest(self) -> dict[str, float]:
        """Costs, as shares of the full network's, of the smallest sub-network that can be reached."""
        state = smallest(self.analysis.choices, self._limits, self.analysis.choices.costs)
        return {name: cost.share(state) for name, cost in self._costs.items()}

    def promise(self, opened: Bools | None = None) -> dict[str, int]:
        """MACs (at batch 1) and parameters that a state bool [gates] leaves; None: as things stand."""
        state = self.state(opened)
        return {name: round(cost.absolute(state)) for name, cost in self.analysis.choices.costs.items()}

    def cost(self, opened: Bools | None = None) -> dict[str, float]:
        """Costs of a state bool [gates], as shares of the full network's; None: as things stand."""
        state = self.state(opened)
        return {name: cost.share(state) for name, cost in self._costs.items()}

    def state(self, opened: Bools | None = None) -> State:
        """Widths of sites, and which blocks are open, in a state bool [gates]; None: as things stand."""
        return self.analysis.choices.state(self.opened if opened is None else opened)

    def loss(self) -> Tensor:
        """What the gates add to the loss of the forward pass before: zero in mode "batch" and when they are fixed."""
        if self._sampler is not None and self.phase == "learning":
            return self._sampler.loss(torch.from_numpy(self.opened))
        return torch.zeros((), device=device_of(self.model))

    def step(self) -> None:
        """To be called after each step of the optimizer."""
        self._step += 1
        seen, calls = self._observer.conclude(), self._observer.calls()
        if self.phase == "frozen":
            return
        if self.phase == "open":
            self._learn(seen)
            if self._step >= self.schedule.chosen_at and self._observer.observations:
                self._stay, self.phase = self._choose(calls), "learning"
        elif self._sampler is not None:
            self._sampler.step(self.schedule.progress(self._step))
        if self._step >= self.schedule.frozen_at:
            self._observer.require_observed(self._step)
            self.freeze()
            return
        self._close()
        self._watch()

    def discard(self) -> None:
        """Forget the passes since the last `step`, which failed and are made again."""
        self._observer.conclude()
        self._observer.calls()
        if self._sampler is not None:
            self._sampler.discard()

    def freeze(self, opened: Bools | None = None) -> None:
        """Fix the gates: to a state bool [gates], or to the best one within the budget by what was learned.

        Raises:
            UsageError: the state is of another length, or closes all of what cannot go whole.
        """
        if opened is None:
            opened = self._choose() if self.phase == "open" else self._stay
        self.analysis.choices.require_possible(np.asarray(opened, bool))
        self.opened, self.phase = np.array(opened, bool), "frozen"
        self._values = torch.from_numpy(self.opened).float()
        self._write()
        self._watch()

    def sync(self, copy: nn.Module) -> None:
        """Give a copy of the model (an average of its weights, say) the masks as they stand."""
        masking.write(copy, self.analysis, self._values)

    def export(self, path: Path | str, **names: Sequence[str]) -> None:
        """Write the gated model as ONNX, all layers at full size, each mask as one Mul.

        `polar-deploy surgery` makes the small one of it.

        Args:
            path: the .onnx file, written atomically, and only when ONNX Runtime, if installed, has found it right.
            names: `inputs` and `outputs`, names of the graph's tensors; else the exporter's.

        Raises:
            ContentError: PyTorch cannot export the model, or the graph does not do what the model does.
            UsageError: there are not as many names as tensors, or gates are closing.
        """
        from polar_deploy.gating.deploy import export_checked

        self.schedule.require_fixed(self.phase, self._step)
        export_checked(self.model, self.analysis, Path(path), **names)

    def cut(self) -> nn.Module:
        """A copy of the model without what is closed: a smaller network that computes the same; the model stays.

        Raises:
            ContentError: it cannot be cut as a module; the message names the layer. Its ONNX graph still can.
            UsageError: gates are closing.
        """
        from polar_deploy.gating.cut import cut

        self.schedule.require_fixed(self.phase, self._step)
        return cut(self.model, self.analysis, self.opened)

    def merge(self, small: nn.Module) -> None:
        """Put what a network that `cut` made has learned since into its places in the model.

        What is closed keeps the values that it had: nothing reads it.

        Raises:
            UsageError: `small` was not cut from this model, with the gates as they stand.
        """
        from polar_deploy.gating.cut import merge

        merge(self.model, small, self.analysis, self.opened)

    def detach(self) -> None:
        """Take all hooks and masks off the model."""
        self._run_eagerly(False)
        masking.listen(self._observer, on=False)
        if self._sampler is not None:
            masking.listen(self._sampler, on=False)
        masking.detach(self.model, self.analysis.places, self._handles)
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on: phase, masks, what was learned, budget and schedule."""
        return {
            "format": FORMAT,
            "sites": self._signature(),
            "budget": dict(self.budget),
            "schedule": [self.schedule.steps, self.schedule.close_from, self.schedule.freeze_at],
            "step": self._step,
            "phase": self.phase,
            "opened": torch.from_numpy(self.opened.copy()),
            "stay": torch.from_numpy(self._stay.copy()),
            "values": self._values.clone(),
            "observer": self._observer.state_dict(),
            "sampler": self._sampler.state_dict() if self._sampler is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; budget and schedule are the state's.

        Raises:
            ContentError: it is of another network, of another mode, or of a latency that nothing tells here.
        """
        if state.get("format") != FORMAT or state.get("sites") != self._signature():
            raise ContentError(
                f"the state is of other gates than those of {type(self.model).__name__}",
                "make Gates with the same model, ignore and blocks as when it was saved",
            )
        if (state["sampler"] is None) != (self._sampler is None):
            raise ContentError(f"the state is not of mode {self.mode!r}", "make Gates in the mode it was saved in")
        self.budget = budgets.require_known(state["budget"], self._costs)
        self.schedule = Schedule(*state["schedule"])
        self._step, self.phase = int(state["step"]), state["phase"]
        self.opened, self._stay = (state[name].cpu().numpy().copy() for name in ("opened", "stay"))
        self._values = state["values"].cpu().clone()
        self._observer.load_state_dict(state["observer"])
        if self._sampler is not None:
            self._sampler.load_state_dict(state["sampler"])
            self._sampler.cool(self.schedule.progress(self._step))
        self._write()
        self._watch()

    def _signature(self) -> list[list[Any]]:
        return [[name, kind, len(gates)] for gates, name, kind in self.analysis.choices.owners()]

    def _learn(self, seen: Tensor | None) -> None:
        """Take in what the step before showed."""
        if self._is_watched(self._step - 1):
            seen = processes.mean_of_seen(seen, len(self.opened))
        if seen is not None:
            self._observer.learn(seen)

    def _choose(self, calls: Sequence[Call] | None = None) -> Bools:
        """The best state within the budget, in all processes the same; `calls`: passes to measure sensitivities on."""
        self._observer.warn_of_unseen(self.analysis.choices.owners())
        worth = self._worth if self._observer.observations else np.ones(len(self.opened))
        tried = None if calls is None else measure(self.model, self.analysis, calls, self._limits.widths, worth)
        given = self.analysis.choices, self._limits, self._costs, self.budget, worth, tried
        if self._measured is None:
            return processes.of_the_first(choose(*given))
        return processes.of_the_first(choose_measured(*given, self._measured) if processes.is_first() else self.opened)

    @property
    def _worth(self) -> Floats:
        return self.utility.double().numpy()

    def _close(self) -> None:
        """Masks go a little way to what was chosen."""
        if self.phase == "learning":
            values = closing(self._stay, self._worth, self.schedule.closed(self._step))
            self._values, self.opened = torch.from_numpy(values).float(), values > 0
            self._write()

    def _write(self) -> None:
        masking.write(self.model, self.analysis, self._values)

    def _is_watched(self, step: int) -> bool:
        """Whether the step after `step` steps is watched: while all are open, since gradients vanish in what closes."""
        return self.phase == "open" and step % (2 if step < 2 * WATCH_FIRST else WATCH_EVERY) == 0

    def _watch(self) -> None:
        """Look at the next step, or not."""
        watched = self._is_watched(self._step)
        sampling = self._sampler is not None and self.phase == "learning"
        self._observer.keeps_calls = chooses = self.phase == "open" and self._step + 1 >= self.schedule.chosen_at
        masking.listen(self._observer, on=watched)
        if self._sampler is not None:
            masking.listen(self._sampler, on=sampling)
        self._run_eagerly((watched or sampling or chooses) and masking.is_compiled())

    def _run_eagerly(self, on: bool) -> None:
        """The next step as written, or compiled again: compiled code shows nothing."""
        if on and self._stance is None:
            self._stance = torch.compiler.set_stance("force_eager")
        elif not on and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
