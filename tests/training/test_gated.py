"""The one pass: when gates learn and freeze, what the freeze promises, the teacher, and exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polar_deploy.errors import ContentError
from polar_deploy.gating.cost import WINDOW, Constraint
from polar_deploy.gating.gate import Phase
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.progress import Progress
from polar_deploy.training import loop
from polar_deploy.training.checkpoint import State
from polar_deploy.training.gated import OnePass, consensus, undecided
from polar_deploy.training.loop import Fit
from tests.tiny import layer_macs
from tests.training.runs import CLASSES, TRAIN, BreakIn, Broken, data, fit, network, settings, train, without_seconds

EPOCHS, FREEZE = 8, 4


def _gates(run: Fit) -> GatedNetwork:
    assert isinstance(run.network, GatedNetwork)
    return run.network


def _share_of_macs(open_gates: Tensor) -> float:
    parts = open_gates.reshape(3, 17)
    inner, blocks = parts[:, :16].sum(1).int().tolist(), parts[:, 16].bool().tolist()
    kept = layer_macs(tuple(inner), tuple(blocks), classes=CLASSES)  # type: ignore[arg-type]
    return kept / layer_macs(classes=CLASSES)


def _teacher() -> nn.Module:
    return network(gated=False, seed=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, State]:
    """An unbroken run with a teacher."""
    run = fit(settings(), tmp_path_factory.mktemp("whole"), gated=True, epochs=EPOCHS)
    return run, train(run, teacher=_teacher())


@pytest.mark.parametrize("epoch", [3, FREEZE, FREEZE + 1, FREEZE + 3])
def test_a_run_broken_before_or_after_the_freeze_ends_the_same(
    tmp_path: Path, whole: tuple[Fit, State], epoch: int
) -> None:
    run, expected = whole
    with pytest.raises(Broken):
        train(fit(settings(), tmp_path, gated=True, epochs=EPOCHS), teacher=_teacher(), progress=BreakIn(epoch))
    torch.manual_seed(epoch)
    resumed = fit(settings(), tmp_path, gated=True, epochs=EPOCHS)
    state = train(resumed, teacher=_teacher())
    assert without_seconds(state.records) == without_seconds(expected.records)
    assert state.notes == expected.notes
    theirs = resumed.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in run.network.state_dict().items())
    assert torch.equal(_gates(resumed).open(), _gates(run).open())


def test_the_frozen_network_lies_in_the_window_of_its_budget(whole: tuple[Fit, State]) -> None:
    run, state = whole
    share = _share_of_macs(_gates(run).open())
    assert 0.5 - WINDOW <= share <= 0.5
    assert all(record["cost"] == pytest.approx(share) for record in state.records[FREEZE - 1 :])
    assert all(record["budget"] == 0.5 for record in state.records)
    assert all(record["costs"] == {"macs": record["cost"]} for record in state.records)


def test_the_freeze_is_recorded_with_what_it_changed(whole: tuple[Fit, State]) -> None:
    run, state = whole
    assert [("freeze" in record, "undecided" in record) for record in state.records] == (
        [(False, True)] * (FREEZE - 1) + [(True, False)] + [(False, False)] * (EPOCHS - FREEZE)
    )
    freeze = state.notes["freeze"]
    assert freeze == state.records[FREEZE - 1]["freeze"]
    assert freeze["epoch"] == FREEZE
    share = torch.tensor(freeze["share"])
    assert ((share >= 0) & (share <= 1)).all()
    assert freeze["undecided"] == pytest.approx(((share > 0.05) & (share < 0.95)).float().mean().item())
    assert freeze["changed"] == ((share >= 0.5) != (_gates(run).open() > 0)).sum().item()
    assert freeze["val_after"] == state.records[FREEZE - 1]["val_accuracy"]
    assert 0 <= freeze["val_before"] <= 100


def test_the_network_learns_with_half_of_its_macs(whole: tuple[Fit, State]) -> None:
    run, state = whole
    assert state.records[-1]["val_accuracy"] > 60  # of 4 classes
    assert state.records[-1]["val_accuracy"] == loop.evaluate(run.network, run.validation)
    assert {gate.phase for gate in _gates(run).gates} == {"frozen"}


class _Phases(Progress):
    """Notes the gates' phase, temperature and cost at every step."""

    def __init__(self, watched: GatedNetwork) -> None:
        super().__init__(quiet=True)
        self.watched = watched
        self.phases: list[tuple[Phase, float]] = []
        self.states: list[Tensor] = []

    def step(self, fraction: float) -> None:
        gate = self.watched.gates[0]
        self.phases.append((gate.phase, gate.temperature))
        self.states.append(self.watched.open().clone())


def test_gates_are_off_then_learn_then_rest(tmp_path: Path) -> None:
    wanted = settings(gates={"start": 0.3, "freeze": 0.6, "temperature": (2.0, 0.5)})
    run = fit(wanted, tmp_path, gated=True, epochs=5)
    steps, told = TRAIN // 32, _Phases(_gates(run))
    state = train(run, progress=told)
    phases = [phase for phase, _ in told.phases]
    assert phases == ["off"] * 6 + ["learning"] * 6 + ["frozen"] * 8  # of 20 steps: from 0.3 to 0.6
    assert told.phases[0][1] == told.phases[6][1] == 2.0
    assert told.phases[9][1] == pytest.approx(1.0)  # half way, geometrically
    assert told.phases[12][1] == pytest.approx(0.5)
    assert "freeze" in state.records[2]
    assert state.records[0]["cost"] == 1
    assert "undecided" not in state.records[0]
    assert "undecided" in state.records[1]
    assert all(torch.equal(each, told.states[3 * steps]) for each in told.states[3 * steps :])


def test_gates_rest_exactly_as_frozen_while_weights_go_on(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=4)
    with pytest.raises(Broken):
        train(run, progress=BreakIn(3))  # frozen after epoch 2
    half_way = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    train(run)
    after = run.network.state_dict()
    gates = {name for name in after if ".gates." in name}
    assert all(torch.equal(after[name], half_way[name]) for name in gates)
    assert not torch.equal(after["net.linear.weight"], half_way["net.linear.weight"])


def test_one_epoch_is_enough_to_freeze(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=1)
    state = train(run)
    assert state.records[0]["freeze"]["epoch"] == 1
    assert _share_of_macs(_gates(run).open()) <= 0.5
    assert state.records[0]["cost"] == pytest.approx(_share_of_macs(_gates(run).open()))


def test_a_final_run_uses_all_images_and_validates_nothing(tmp_path: Path) -> None:
    run = fit(settings(training={"final": True}), tmp_path, gated=True, epochs=2)
    state = train(run)
    assert len(run.train) == len(data()[1])
    assert [record["val_accuracy"] for record in state.records] == [None, None]
    assert (state.notes["freeze"]["val_before"], state.notes["freeze"]["val_after"]) == (None, None)


def test_gates_decide_for_each_sample_where_asked(tmp_path: Path) -> None:
    run = fit(settings(gates={"mode": "sample"}), tmp_path, gated=True, epochs=2)
    state = train(run)
    assert {gate.mode for gate in _gates(run).gates} == {"sample"}
    assert _share_of_macs(_gates(run).open()) <= 0.5
    assert "freeze" in state.notes


def test_the_tightest_of_several_budgets_is_shown(tmp_path: Path) -> None:
    run = fit(settings(budget={"macs": 0.9, "params": 0.5}), tmp_path, gated=True, epochs=2)
    last = train(run).records[-1]
    assert last["budget"] == 0.5
    assert last["cost"] == last["costs"]["params"] <= 0.5
    assert last["costs"]["macs"] == pytest.approx(_share_of_macs(_gates(run).open()))


def test_weights_have_the_rate_of_the_gated_run_and_gates_their_own(tmp_path: Path) -> None:
    wanted = settings(training={"lr": 0.05, "gated_lr": 0.01, "warmup": 0.0}, gates={"travel": 30.0, "steering": 2.0})
    run = fit(wanted, tmp_path, gated=True, epochs=4)
    method = OnePass(run, _constraint(run), None)
    method.before_step(0.0)
    weights, gates = method.optimizers()
    assert weights.param_groups[0]["lr"] == pytest.approx(0.01)
    steps = (0.5 - 0.05) * 4 * (TRAIN // 32)
    # Steering gives each of 51 logits a slope of at most 2 / 51: `travel` in all.
    assert gates.param_groups[0]["lr"] * steps * 2.0 / 51 == pytest.approx(30.0)
    assert gates.param_groups[0]["weight_decay"] == gates.param_groups[0]["momentum"] == 0


def _constraint(run: Fit) -> Constraint:
    return Constraint({"macs": _gates(run).cost_model()}, {"macs": 0.5})


def test_the_teacher_has_its_share_of_the_loss(tmp_path: Path) -> None:
    wanted = settings(training={"distill": 0.3, "distill_temperature": 4.0})
    run, teacher = fit(wanted, tmp_path, gated=True, epochs=4), _teacher()
    images, labels = next(run.train.epoch(0))
    losses = {}
    for name, who in (("alone", None), ("taught", teacher)):
        method = OnePass(run, _constraint(run), who)
        method.before_step(0.0)  # gates off
        torch.manual_seed(0)
        losses[name], logits = method.loss(images, labels)
    assert not teacher.training
    wanted_odds, given = (teacher(images) / 4).softmax(1), (logits / 4).log_softmax(1)
    divergence = (wanted_odds * (wanted_odds.log() - given)).sum(1).mean() * 16
    assert losses["taught"].item() == pytest.approx((0.7 * losses["alone"] + 0.3 * divergence).item(), rel=1e-4)


def test_gates_add_their_loss_only_while_they_learn(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=4)
    images, labels = next(run.train.epoch(0))
    method = OnePass(run, _constraint(run), None)
    for done, learning in ((0.0, False), (0.2, True), (0.7, False)):
        method.before_step(done)
        torch.manual_seed(0)
        loss, logits = method.loss(images, labels)
        plain = torch.nn.functional.cross_entropy(logits, labels)
        assert (loss.item() != pytest.approx(plain.item())) == learning


def test_consensus_is_the_share_of_training_samples_that_open_each_gate(tmp_path: Path) -> None:
    run = fit(settings(gates={"mode": "sample"}), tmp_path, gated=True, epochs=4)
    gates = _gates(run)
    for gate in gates.gates:
        nn.init.normal_(gate.logit.weight, std=2.0)
    gates.set_phase("learning")
    share = consensus(gates, run)
    opened = torch.zeros(gates.masks)
    with torch.no_grad():
        for images, _ in run.train.plain():
            for image in images:  # one by one: in mode "sample" a batch changes nothing
                gates(image[None])
                opened += torch.cat([gate.logits[0] for gate in gates.gates]) > 0
    torch.testing.assert_close(share, opened / TRAIN)
    assert ((share > 0) & (share < 1)).any()


def test_gates_are_undecided_between_5_and_95_percent() -> None:
    assert undecided(torch.tensor([0.0, 0.04, 0.06, 0.5, 0.94, 0.96, 1.0, 1.0])) == pytest.approx(3 / 8)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=True, epochs=2)
    with torch.no_grad():
        next(iter(_gates(run).network_parameters())).fill_(float("inf"))
    with pytest.raises(ContentError, match="in epoch 1 of 2 of stage gates"):
        train(run)
