"""The training loop: the rate, what is written, what stops it, and that a broken run ends like an unbroken one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polar_deploy.documents.training_log import Epoch
from polar_deploy.errors import ContentError
from polar_deploy.progress import Progress
from polar_deploy.tasks import Batch
from polar_deploy.tasks.classification import classifier
from polar_deploy.training import loop
from polar_deploy.training.batches import EVALUATION_BATCH, ImageBatches
from tests.training.runs import (
    CPU,
    NORMALIZE,
    SIZE,
    TRAIN,
    VALIDATION,
    BreakIn,
    Broken,
    data,
    fit,
    network,
    pair,
    settings,
    train,
    without_seconds,
)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_rate_warms_up_and_falls_to_zero_in_a_cosine(warmup: float) -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": []}], lr=1.0)

    def rate(done: float) -> float:
        loop.set_rate(optimizer, 0.4, warmup, done)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        return float(first)

    assert rate(warmup) == pytest.approx(0.4)
    assert rate((1 + warmup) / 2) == pytest.approx(0.2)
    assert rate(1.0) == pytest.approx(0, abs=1e-12)
    assert rate(warmup + (1 - warmup) / 4) == pytest.approx(0.4 * (1 + math.sqrt(0.5)) / 2)
    if warmup:
        assert 0 < rate(0.0) < 0.02  # not zero: the first step is a step too
        slopes = [rate((part + 0.25) * warmup) - rate(part * warmup) for part in (0.0, 0.25, 0.5)]
        assert slopes == pytest.approx([slopes[0]] * 3)


def test_sgd_has_the_settings_momentum_and_decay() -> None:
    weight = nn.Linear(1, 1)
    made = loop.sgd(weight, settings(training={"momentum": 0.8, "weight_decay": 1e-3, "lr": 0.2})).param_groups[0]
    assert (made["lr"], made["momentum"], made["weight_decay"], made["nesterov"]) == (0.2, 0.8, 1e-3, True)
    assert not loop.sgd(weight, settings(training={"momentum": 0.0})).param_groups[0]["nesterov"]


def test_cross_entropy_smooths_labels() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0])
    wanted = torch.tensor([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    task = classifier(3, SIZE, settings(training={"label_smoothing": 0.1}).training)
    batch = Batch({}, {"label": labels})
    assert task.loss({"logits": logits.bfloat16()}, batch).dtype == torch.float32
    assert task.loss({"logits": logits}, batch).item() == pytest.approx(-(wanted * logits.log_softmax(1)).sum().item())


def test_preparing_sets_layout_and_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for channels_last in (True, False):
            wanted = settings(training={"channels_last": channels_last, "threads": 1})
            weight = loop.prepare(network(), wanted, CPU).block1.conv1.weight
            assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


class Shortcut(nn.Sequential):
    """Reads few channels at every second place, and tells how they lie in memory."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 24, 1, stride=2))
        self[1].register_forward_hook(self._look)

    def _look(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """Called after what `prepare` hooks in, which changes what the layer is given."""
        self.strides = [each.stride()[-1] for each in (args[0], self[1].weight)]


@pytest.mark.parametrize(("channels", "strides"), [(4, [1, 1]), (15, [1, 1]), (16, [16, 16])])
def test_what_onednn_would_write_past_the_end_of_is_kept_from_it(channels: int, strides: list[int]) -> None:
    """Not tried with the kernel itself, which damages memory: uxlfoundation/oneDNN#6035."""
    shortcut = loop.prepare(Shortcut(channels), settings(), CPU)
    shortcut(torch.zeros(2, 3, 10, 10).to(memory_format=torch.channels_last))
    assert shortcut.strides == strides


def test_the_device_is_the_gpu_where_there_is_one() -> None:
    assert loop.choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_accuracy_is_counted_in_evaluation_mode_and_the_mode_restored(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=False, epochs=1)
    assert run.validation is not None
    run.network.train()
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    given = loop.evaluate(run.task, run.network, run.validation)
    assert run.network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.network.state_dict().items())
    images, labels = (torch.from_numpy(array[TRAIN:]) for array in data())
    normal = (images / 255 - torch.tensor(NORMALIZE.mean)) / torch.tensor(NORMALIZE.std)
    guessed = run.network.eval()(normal.permute(0, 3, 1, 2)).argmax(1)
    assert given == pytest.approx(100 * (guessed == labels).sum().item() / VALIDATION)
    loop.evaluate(run.task, run.network, run.validation)
    assert not run.network.training


def test_accuracy_of_the_first_images_looks_at_no_image_more() -> None:
    class First(nn.Module):
        """Says class 0, and counts what it is asked."""

        asked = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.asked += len(x)
            return F.one_hot(torch.zeros(len(x), dtype=torch.long), 2).float()

    count = EVALUATION_BATCH * 3
    labels = (np.arange(count) >= EVALUATION_BATCH).astype(np.int64)  # the first batch is of class 0, no other is
    pixels = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    batches = ImageBatches(pixels, labels, np.arange(count), settings(), CPU)
    network = First()
    assert loop.evaluate(classifier(2, SIZE), network, batches, EVALUATION_BATCH) == 100
    assert loop.evaluate(classifier(2, SIZE), network, batches, EVALUATION_BATCH + 1) == pytest.approx(100 * 500 / 501)
    assert network.asked == EVALUATION_BATCH * 2 + 1
    assert loop.evaluate(classifier(2, SIZE), network, batches) == pytest.approx(100 / 3)


def test_a_run_learns_and_logs_every_epoch(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=False, epochs=4)
    state = train(run)
    assert state.epoch == 4
    assert state.records[-1].val_score > 60  # of 4 classes
    assert state.records[-1].loss < state.records[0].loss
    assert state.records[-1].val_score == loop.evaluate(run.task, run.network, run.validation)
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record.as_json() for record in state.records]
    assert [record.epoch for record in state.records] == [1, 2, 3, 4]


def test_a_first_step_is_that_of_plain_sgd(tmp_path: Path) -> None:
    run = fit(settings(training={"batch_size": 128, "warmup": 0.0}), tmp_path, gated=False, epochs=1)
    by_hand = loop.prepare(network(), run.settings, CPU)
    train(run)
    torch.manual_seed(run.settings.seed * 1_000_003)  # dropout's draws
    ((images, labels),) = map(pair, run.train.epoch(0))
    F.cross_entropy(by_hand(images), labels).backward()
    for given, parameter in zip(run.network.parameters(), by_hand.parameters(), strict=True):
        gradient = parameter.grad + 5e-4 * parameter.detach()
        torch.testing.assert_close(given, parameter - 0.05 * 1.9 * gradient)  # Nesterov: 1 + momentum at the first step


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_run_broken_in_an_epoch_ends_with_the_same_weights_and_records(tmp_path: Path, channels_last: bool) -> None:
    wanted = settings(training={"channels_last": channels_last})
    whole = fit(wanted, tmp_path / "whole", gated=False, epochs=4)
    expected = train(whole)
    with pytest.raises(Broken):
        train(fit(wanted, tmp_path / "broken", gated=False, epochs=4), progress=BreakIn(3))
    assert len((tmp_path / "broken/training.jsonl").read_text().splitlines()) == 2
    resumed = fit(wanted, tmp_path / "broken", gated=False, epochs=4)
    state = train(resumed)
    assert without_seconds(state.records) == without_seconds(expected.records)
    theirs = resumed.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.network.state_dict().items())
    assert len((tmp_path / "broken/training.jsonl").read_text().splitlines()) == 4


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    expected = train(fit(settings(), tmp_path, gated=False, epochs=2))
    again = fit(settings(), tmp_path, gated=False, epochs=2)
    assert train(again, progress=BreakIn(1)) == expected
    assert loop.evaluate(again.task, again.network, again.validation) == expected.records[-1].val_score


def test_a_checkpoint_of_other_settings_is_not_resumed(tmp_path: Path) -> None:
    train(fit(settings(), tmp_path, gated=False, epochs=2, key="one"))
    with pytest.raises(Broken):
        train(fit(settings(), tmp_path, gated=False, epochs=2, key="another"), progress=BreakIn(1))


def test_without_validation_there_is_no_validation_accuracy(tmp_path: Path) -> None:
    run = fit(settings(training={"train_on_validation": True}), tmp_path, gated=False, epochs=1)
    assert len(run.train) == TRAIN + VALIDATION
    assert train(run).records[0].val_score is None


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=False, epochs=2)
    with torch.no_grad():
        run.network.linear.bias.fill_(math.nan)
    with pytest.raises(ContentError, match="the loss is nan in epoch 1 of 2 of stage full") as caught:
        train(run)
    assert "training.lr" in caught.value.todo
    assert not list(tmp_path.iterdir())


class _Told(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[object] = []

    def stage(self, name: str, total_epochs: int | None = None, done: int = 0) -> None:
        self.said.append((name, total_epochs, done))

    def step(self, fraction: float) -> None:
        self.said.append(fraction)

    def epoch(self, *, score: str | None, **facts: object) -> None:
        self.said.append(score)


def test_progress_hears_of_stage_steps_and_epochs(tmp_path: Path) -> None:
    told, run = _Told(), fit(settings(), tmp_path, gated=False, epochs=1)
    state = train(run, progress=told)
    steps = TRAIN // 32
    parts = [(step + 1) / steps for step in range(steps)]
    assert told.said == [("full", 1, 0), *parts, f"val {state.records[0].val_score:.1f}%"]
    final = fit(settings(training={"train_on_validation": True}), tmp_path / "final", gated=False, epochs=1)
    score = train(final, progress=told).records[0].train_score  # there is no validation
    assert told.said[-1] == f"train {score:.1f}%"


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_log_is_whole_after_a_kill_between_checkpoint_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    whole = Epoch.write_all

    def killed(path: Path, records: Sequence[Epoch]) -> None:
        if len(records) == epochs:
            raise KeyboardInterrupt
        whole(path, records)

    monkeypatch.setattr(Epoch, "write_all", staticmethod(killed))
    with pytest.raises(KeyboardInterrupt):
        train(fit(settings(), tmp_path, gated=False, epochs=epochs))
    monkeypatch.undo()
    train(fit(settings(), tmp_path, gated=False, epochs=epochs))
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == epochs
