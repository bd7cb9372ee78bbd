"""The one pass: when gates learn and freeze, what the freeze promises, the teacher, and exact resume."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from polar_deploy.costs import WINDOW
from polar_deploy.documents.training_log import Epoch
from polar_deploy.errors import ContentError
from polar_deploy.gating import masking
from polar_deploy.gating.gates import Gates
from polar_deploy.gating.schedule import closing
from polar_deploy.progress import Progress
from polar_deploy.training import loop
from polar_deploy.training.checkpoint import State
from polar_deploy.training.gated import OnePass, undecided
from polar_deploy.training.loop import TrainingJob
from tests.support.tiny import BLOCKS, SITES, costs
from tests.training.runs import (
    CLASSES,
    TRAIN,
    BreakIn,
    Broken,
    analysis,
    data,
    fit,
    gates,
    network,
    pair,
    settings,
    train,
    without_seconds,
)

EPOCHS, FREEZE = 8, 4
STEPS = TRAIN // 32  # an epoch


def _shares(on: Gates) -> dict[str, float]:
    """What is left of both costs, counted by hand."""
    counts, first = {}, 0
    for name, width in {**SITES, **dict.fromkeys(BLOCKS, 1)}.items():
        counts[name] = int(on.opened[first : first + width].sum())
        first += width
    assert first == len(on.opened)
    full = costs(SITES | dict.fromkeys(BLOCKS, 1), CLASSES)
    return {name: kept / full[name] for name, kept in costs(counts, CLASSES).items()}


def _teacher() -> nn.Module:
    return network(seed=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, Gates, State]:
    """An unbroken run with a teacher."""
    run = fit(settings(), tmp_path_factory.mktemp("whole"), gated=True, epochs=EPOCHS)
    on = gates(run)
    return run, on, train(run, on, teacher=_teacher())


@pytest.mark.parametrize("epoch", [1, 3, FREEZE, FREEZE + 1, FREEZE + 3])
def test_a_run_broken_before_or_after_the_freeze_ends_the_same(
    tmp_path: Path, whole: tuple[TrainingJob, Gates, State], epoch: int
) -> None:
    run, on, expected = whole
    broken = fit(settings(), tmp_path, gated=True, epochs=EPOCHS)
    with pytest.raises(Broken):
        train(broken, gates(broken), teacher=_teacher(), progress=BreakIn(epoch))
    torch.manual_seed(epoch)
    resumed = fit(settings(), tmp_path, gated=True, epochs=EPOCHS)
    again = gates(resumed)
    state = train(resumed, again, teacher=_teacher())
    assert without_seconds(state.records) == without_seconds(expected.records)
    assert state.freeze == expected.freeze
    theirs = resumed.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in run.network.state_dict().items())
    assert again.opened.tolist() == on.opened.tolist()
    assert torch.equal(again.utility, on.utility)


def test_a_run_in_mode_sample_broken_while_gates_learn_ends_the_same(tmp_path: Path) -> None:
    wanted = settings(gates={"mode": "sample"})

    def started(name: str, seed: int) -> tuple[TrainingJob, Gates]:
        run, _ = fit(wanted, tmp_path / name, gated=True, epochs=4), analysis()
        torch.manual_seed(seed)  # of what decides for each sample
        return run, gates(run)

    with pytest.raises(Broken):
        train(*started("broken", 3), progress=BreakIn(2))
    (one, first), (other, second) = started("whole", 3), started("broken", 4)
    expected, state = train(one, first), train(other, second)
    assert without_seconds(state.records) == without_seconds(expected.records)
    assert second.opened.tolist() == first.opened.tolist()
    theirs = other.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.network.state_dict().items())


def test_the_frozen_network_lies_in_the_window_of_its_budget(whole: tuple[TrainingJob, Gates, State]) -> None:
    _, on, state = whole
    share = _shares(on)["macs"]
    assert 0.5 - WINDOW <= share <= 0.5
    assert all(record.cost == pytest.approx(share) for record in state.records[FREEZE - 1 :])
    assert all(record.budget == 0.5 for record in state.records)
    assert all(record.costs == {"macs": record.cost} for record in state.records)


def test_the_freeze_is_recorded_with_what_it_changed(whole: tuple[TrainingJob, Gates, State]) -> None:
    _, on, state = whole
    assert [(record.freeze is not None, record.undecided is not None) for record in state.records] == (
        [(False, True)] * (FREEZE - 1) + [(True, False)] + [(False, False)] * (EPOCHS - FREEZE)
    )
    freeze = state.freeze
    assert freeze == state.records[FREEZE - 1].freeze
    assert freeze is not None
    assert freeze.epoch == FREEZE
    share = torch.tensor(freeze.share)
    assert len(share) == len(on.opened)
    assert ((share == 0) | (share == 1)).all()  # one decision for all samples
    assert freeze.undecided == 0
    assert freeze.val_estimated == state.records[FREEZE - 1].val_score  # the freeze ends this epoch
    assert 0 <= freeze.val_before <= 100
    assert 0 <= freeze.val_after <= 100
    assert freeze.cut


def test_the_network_learns_with_half_of_its_macs(whole: tuple[TrainingJob, Gates, State]) -> None:
    run, on, state = whole
    assert state.records[-1].val_score > 60  # of 4 classes
    assert state.records[-1].val_score == loop.evaluate(run.task, run.network, run.validation)
    assert on.phase == "frozen"


def test_an_evaluation_in_the_middle_of_a_step_sees_the_masks_and_not_what_samples_decided(tmp_path: Path) -> None:
    """As that before the freeze is one, of which `val_before` tells."""
    run = fit(settings(gates={"mode": "sample", "close_from": 0.0}), tmp_path, gated=True, epochs=4)
    on = gates(run)
    method, batch = OnePass(run, on, None), next(run.train.epoch(0))
    for parameter in run.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.loss(batch)[0].backward()
    method.after_step()
    assert on.phase == "learning"
    state = on.state_dict()
    for name, value in state["sampler"].items():
        if name.endswith("logit.bias"):
            value[::2] = -5.0  # every sample closes half of the gates, whose masks have hardly moved
    on.load_state_dict(state)
    method.loss(batch)
    assert on.share.min() == 0
    bare = network()
    bare.load_state_dict(run.network.state_dict())
    masking.attach(bare, analysis().places, [mask.width for mask in analysis().choices.masks])
    masking.write(bare, analysis(), on.state_dict()["values"])
    with torch.no_grad():
        torch.testing.assert_close(run.network.eval()(*batch.inputs.values()), bare.eval()(*batch.inputs.values()))


class _Watch(Progress):
    """Notes phase, choice and masks after every step."""

    def __init__(self, run: TrainingJob, on: Gates) -> None:
        super().__init__(quiet=True)
        self.run, self.on = run, on
        self.phases: list[str] = []
        self.opened: list[list[bool]] = []
        self.masks: list[torch.Tensor] = []

    def step(self, fraction: float) -> None:
        self.phases.append(self.on.phase)
        self.opened.append(self.on.opened.tolist())
        masks = masking.read(self.run.network, analysis().places)
        self.masks.append(torch.cat([mask.flatten() for mask in masks]))


def test_gates_are_open_then_close_little_by_little_then_rest(tmp_path: Path) -> None:
    run = fit(settings(gates={"close_from": 0.3, "freeze_at": 0.65}), tmp_path, gated=True, epochs=5)
    on = gates(run)
    told = _Watch(run, on)
    state = train(run, on, progress=told)
    assert told.phases == ["open"] * 5 + ["learning"] * 7 + ["frozen"] * 8  # of 20 steps: from 0.3 to 0.65
    assert all((masks == 1).all() for masks in told.masks[:5])
    most = max((after - before).abs().max() for before, after in zip(told.masks[:11], told.masks[1:12], strict=True))
    assert 0 < most <= 1.0
    assert all(((masks == 0) | (masks == 1)).all() for masks in told.masks[12:])
    assert all(torch.equal(masks, told.masks[12]) for masks in told.masks[12:])
    assert all(opened == told.opened[12] for opened in told.opened[12:])
    assert state.records[0].cost == 1
    assert state.records[0].undecided is None
    assert state.records[1].undecided is not None
    assert [record.freeze is not None for record in state.records] == [
        False,
        False,
        False,
        True,
        False,
    ]  # in the 13th step
    assert state.freeze.epoch == 4


def test_the_worthless_close_first_and_a_tenth_of_all_at_a_time() -> None:
    stay = np.array([True, *[False] * 20])
    worth = np.array([0.0, *range(20, 0, -1)])  # the last is worth least
    assert (closing(stay, worth, 0.0) == 1).all()
    half = closing(stay, worth, 0.5)  # turns 0.05, 0.10, ... are over at 0.55 - 0.1 and begin at 0.55
    np.testing.assert_allclose(half, [1, *[1] * 10, 0.5, *[0] * 9], atol=1e-9)
    assert closing(stay, worth, 1.0).tolist() == stay.tolist()


def test_gates_rest_exactly_as_frozen_while_weights_go_on(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=4)
    on = gates(run)
    with pytest.raises(Broken):
        train(run, on, progress=BreakIn(3))  # frozen after epoch 2
    opened, weight = on.opened.tolist(), run.network.linear.weight.detach().clone()
    masks = masking.read(run.network, analysis().places)
    train(run, on)
    assert on.opened.tolist() == opened
    after = masking.read(run.network, analysis().places)
    assert all(torch.equal(one, other) for one, other in zip(masks, after, strict=True))
    assert not torch.equal(run.network.linear.weight, weight)


def test_masks_are_no_part_of_what_is_saved(whole: tuple[TrainingJob, Gates, State]) -> None:
    run, _, _ = whole
    assert run.network.state_dict().keys() == network().state_dict().keys()


def test_one_epoch_is_enough_to_freeze(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=1)
    on = gates(run)
    state = train(run, on)
    assert state.records[0].freeze.epoch == 1
    assert 0.5 - WINDOW <= _shares(on)["macs"] <= 0.5
    assert state.records[0].cost == pytest.approx(_shares(on)["macs"])


def test_a_final_run_uses_all_images_and_validates_nothing(tmp_path: Path) -> None:
    run = fit(settings(training={"train_on_validation": True}), tmp_path, gated=True, epochs=2)
    state = train(run, gates(run))
    assert len(run.train) == len(data()[1])
    assert [record.val_score for record in state.records] == [None, None]
    assert (state.freeze.val_before, state.freeze.val_after) == (None, None)


def test_gates_decide_for_each_sample_where_asked(tmp_path: Path) -> None:
    run = fit(settings(gates={"mode": "sample"}), tmp_path, gated=True, epochs=2)
    on = gates(run)
    state = train(run, on)
    assert on.mode == "sample"
    assert 0.5 - WINDOW <= _shares(on)["macs"] <= 0.5
    share = torch.tensor(state.freeze.share)
    assert ((share >= 0) & (share <= 1)).all()
    assert torch.allclose(share * 32, (share * 32).round(), atol=0.002)  # of a batch of 32, to four digits
    assert state.freeze.undecided == pytest.approx(((share > 0.05) & (share < 0.95)).float().mean().item())


def test_the_tightest_of_several_budgets_is_shown(tmp_path: Path) -> None:
    run = fit(settings(budget={"macs": 0.9, "params": 0.5}), tmp_path, gated=True, epochs=2)
    on = gates(run)
    last = train(run, on).records[-1]
    assert last.budget == 0.5
    assert last.cost == last.costs["params"] <= 0.5
    assert last.costs == pytest.approx(_shares(on))


def test_weights_have_the_rate_of_the_gated_run(tmp_path: Path) -> None:
    wanted = settings(training={"lr": 0.05, "gated_lr": 0.01, "warmup": 0.0})
    run = fit(wanted, tmp_path, gated=True, epochs=4)
    method = OnePass(run, gates(run), None)
    method.before_step(0.0)
    (weights,) = method.optimizers()
    assert [group["lr"] for group in weights.param_groups] == [pytest.approx(0.01)]
    held = {id(parameter) for group in weights.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in run.network.parameters()}
    method.before_step(0.5)
    assert weights.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("looks_at", [1.0, 0.4])
def test_the_teacher_has_its_share_of_the_loss_and_sees_its_part_of_the_batch(tmp_path: Path, looks_at: float) -> None:
    wanted = settings(training={"distill": 0.3, "distill_temperature": 4.0, "distill_share": looks_at})
    run, teacher = fit(wanted, tmp_path, gated=True, epochs=4), _teacher()
    batch = next(run.train.epoch(0))
    images, _ = pair(batch)
    on, losses = gates(run), {}
    for name, who in (("alone", None), ("taught", teacher)):
        torch.manual_seed(0)
        losses[name], outputs = OnePass(run, on, who).loss(batch)
    assert not teacher.training
    seen = math.ceil(looks_at * len(images))
    assert looks_at == 1 or seen < len(images)
    wanted_odds, given = (teacher(images[:seen]) / 4).softmax(1), (outputs["logits"][:seen] / 4).log_softmax(1)
    divergence = (wanted_odds * (wanted_odds.log() - given)).sum(1).mean() * 16
    weight = 0.3 * seen / len(images)
    expected = (1 - weight) * losses["alone"] + weight * divergence
    assert losses["taught"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_gates_add_their_loss_only_while_samples_decide(tmp_path: Path, mode: str) -> None:
    run = fit(settings(gates={"mode": mode, "close_from": 0.25, "freeze_at": 0.75}), tmp_path, gated=True, epochs=2)
    on = gates(run)
    method, added, phases, shares = OnePass(run, on, None), [], [], []
    (optimizer,) = method.optimizers()
    run.network.train()
    for epoch in range(2):
        for batch in run.train.epoch(epoch):
            phases.append(on.phase)
            loss, outputs = method.loss(batch)
            added.append(loss.item() - torch.nn.functional.cross_entropy(outputs["logits"], pair(batch)[1]).item())
            shares.append(on.share)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
        record = method.after_epoch(Epoch(epoch=epoch + 1))
        if epoch == 0:
            assert record.undecided == undecided(torch.stack(shares).mean(0))  # of all of the epoch's samples
    assert phases == ["open"] * 2 + ["learning"] * 4 + ["frozen"] * 2  # of 8 steps: from 0.25 to 0.75
    learning = [value > 1e-3 for value in added]
    assert learning == [mode == "sample" and phase == "learning" for phase in phases]
    assert all(abs(value) < 1e-6 for value, said in zip(added, learning, strict=True) if not said)


def test_gates_of_a_run_that_broke_in_a_step_hear_nothing_of_the_next(tmp_path: Path) -> None:
    """A notebook's cell is run again: modules of the new network may lie where those of the old one lay."""
    run = fit(settings(), tmp_path, gated=True, epochs=1)
    on = gates(run)
    OnePass(run, on, None).loss(next(run.train.epoch(0)))  # and no step
    observer = weakref.ref(on._observer)
    del run, on
    gc.collect()
    assert observer() is None


def test_gates_are_undecided_between_5_and_95_percent() -> None:
    assert undecided(torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0, 1.0])) == pytest.approx(3 / 8)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=2)
    with torch.no_grad():
        next(run.network.parameters()).fill_(float("inf"))
    with pytest.raises(ContentError, match="in epoch 1 of 2 of stage gates"):
        train(run, gates(run))
