"""Steps in several passes: because it was asked for, or because memory ran out; and computing the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polar_deploy.errors import UsageError
from polar_deploy.progress import Progress
from polar_deploy.training import loop
from tests.training.runs import VALIDATION, fit, gates, settings, train


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def holds(network: nn.Module, images: int, *, training: bool) -> None:
    """Give a network memory for so many images in that mode."""

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if module.training == training == torch.is_grad_enabled() and len(given[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    network.register_forward_pre_hook(look)


def without_dropout(run: loop.TrainingJob) -> loop.TrainingJob:
    run.network.pool[1].p = 0.0
    return run


@pytest.mark.parametrize("gated", [False, True])
def test_what_does_not_fit_is_made_in_more_passes(gated: bool, tmp_path: Path) -> None:
    told = Told()
    short = without_dropout(fit(settings(), tmp_path / "short", gated=gated, epochs=2))
    holds(short.network, 8, training=True)
    train(short, gates(short) if gated else None, progress=told)
    assert [note for note in told.notes if "memory" in note] == [
        f"{short.stage}: out of memory; goes on with 16 samples in a pass, 2 a step",
        f"{short.stage}: out of memory; goes on with 8 samples in a pass, 4 a step",
    ]
    wanted = without_dropout(fit(settings(training={"accumulate": 4}), tmp_path / "asked", gated=gated, epochs=2))
    train(wanted, gates(wanted) if gated else None)
    theirs = wanted.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in short.network.state_dict().items())


def test_passes_change_nothing_where_no_statistics_are_taken(tmp_path: Path) -> None:
    weights = []
    for accumulate in (1, 3):  # parts of 11, 11 and 10 images
        wanted = settings(training={"accumulate": accumulate, "lr": 0.01})
        run = without_dropout(fit(wanted, tmp_path / str(accumulate), gated=False, epochs=1))
        run.network.double().register_forward_pre_hook(lambda module, given: (given[0].double(),))
        for module in run.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.forward = nn.Identity().forward  # type: ignore[method-assign]
        record = train(run).records[-1]
        weights.append((record.model_dump(exclude={"seconds"}, exclude_unset=True), run.network.state_dict()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-4)
    for name, tensor in weights[0][1].items():
        torch.testing.assert_close(weights[1][1][name], tensor, rtol=0, atol=1e-7, msg=name)


def test_memory_for_not_even_one_image_ends_the_run(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=False, epochs=1)
    holds(run.network, 0, training=True)
    with pytest.raises(torch.OutOfMemoryError):
        train(run)


def test_evaluation_takes_smaller_batches(tmp_path: Path) -> None:
    run = fit(settings(), tmp_path, gated=False, epochs=1)
    assert run.validation is not None
    wanted = loop.evaluate(run.task, run.network, run.validation)
    holds(run.network, 5, training=False)
    assert VALIDATION > 5
    assert loop.evaluate(run.task, run.network, run.validation) == wanted
    holds(run.network, 0, training=False)
    with pytest.raises(torch.OutOfMemoryError):
        loop.evaluate(run.task, run.network, run.validation)


def test_more_passes_than_images_are_refused(tmp_path: Path) -> None:
    run = fit(settings(training={"accumulate": 33}), tmp_path, gated=False, epochs=1)
    with pytest.raises(UsageError, match="a step has 32 samples, for 1 process\\(es\\) with 33 passes each"):
        train(run)


def test_deterministic_holds_while_it_trains(tmp_path: Path) -> None:
    seen = []
    run = fit(settings(training={"deterministic": True}), tmp_path, gated=False, epochs=1)
    run.network.register_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    train(run)
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_is_not_deterministic_is_named(tmp_path: Path) -> None:
    def refuse(module: nn.Module, given: Any) -> None:
        torch.use_deterministic_algorithms(True)
        raise RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation")

    run = fit(settings(training={"deterministic": True}), tmp_path, gated=False, epochs=1)
    run.network.register_forward_pre_hook(refuse)
    with pytest.raises(UsageError, match="--deterministic: grid_sampler_2d_backward_cuda") as caught:
        train(run)
    assert "leave --deterministic out" in caught.value.todo
    assert not torch.are_deterministic_algorithms_enabled()
