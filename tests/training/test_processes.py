"""Two processes that train together end where one ends, and each goes on where the other stopped.

Both start once for all tests: `_work` runs every case, and writes what came out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from polar_deploy.resolved import ResolvedSettings
from polar_deploy.training import loop
from polar_deploy.training.batch_norm import of_whole_batch
from polar_deploy.training.checkpoint import State
from tests.support.processes import together
from tests.training import runs
from tests.training.runs import CPU, BreakIn, Broken, fit, gates, network, settings, train

EPOCHS = 3
CLOSE = {"rtol": 0.0, "atol": 1e-6}


@dataclass(frozen=True)
class Case:
    """A way to train; `mode` of its gates, or None for none."""

    mode: str | None = None
    batch_size: int = 32
    accumulate: int = 1

    @property
    def settings(self) -> ResolvedSettings:
        training = {"batch_size": self.batch_size, "accumulate": self.accumulate, "lr": 0.02, "gated_lr": 0.02}
        return settings(training=training, gates={"mode": self.mode or "batch", "close_from": 0.2, "freeze_at": 0.6})


CASES = {
    "full": Case(),
    "accumulated": Case(accumulate=2),
    "uneven": Case(batch_size=31),
    "batch": Case("batch"),
    "sample": Case("sample"),
}


def trained(case: Case, folder: Path, breaks_in: int | None = None) -> tuple[dict[str, Tensor], State]:
    """Weights and state of a run, which may be broken off before.

    In float64: in float32 the sums of two processes differ in the last digit, which makes one of a million ReLUs that
    are near zero open in one run and not in the other.
    """
    run = fit(case.settings, folder, gated=case.mode is not None, epochs=EPOCHS)
    run.network.double().register_forward_pre_hook(lambda module, given: (given[0].double(),))
    run.network.pool[1].p = 0.0  # each process drops others
    teacher = loop.prepare(network(seed=3), run.settings, CPU) if case.mode else None
    state = train(run, gates(run) if case.mode else None, teacher=teacher, progress=breaks_in and BreakIn(breaks_in))
    return run.network.state_dict(), state


def _norms() -> dict[str, Tensor]:
    """Output, gradients and running statistics of two BatchNorms on this process's third, or two thirds, of a batch."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 3, 3) * torch.arange(1, 6).view(1, 5, 1, 1) + 40
    wanted = torch.randn(6, 5, 3, 3)
    norm, other = nn.BatchNorm2d(5), nn.BatchNorm1d(5, affine=False, momentum=0.3)
    nn.init.normal_(norm.weight)
    rows = slice(2 * dist.get_rank(), 2 + 4 * dist.get_rank()) if dist.is_initialized() else slice(None)
    own = x[rows].clone().requires_grad_()
    with of_whole_batch():
        made = norm(own)
        F.mse_loss(made, wanted[rows], reduction="sum").backward()
        other(made.detach().flatten(2))
    return {
        "made": made.detach(),
        "of_x": own.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        **{f"running {name}": value for name, value in norm.named_buffers()},
        **{f"plain {name}": value for name, value in other.named_buffers()},
    }


def _work(rank: int, port: int, folder: Path, known: Any) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    runs.analysis = lambda: known
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(_norms(), folder / f"norms{rank}.pt")
        for name, case in CASES.items():
            weights, state = trained(case, folder / name)
            torch.save((weights, [each.as_json() for each in state.records]), folder / f"{name}{rank}.pt")
        with pytest.raises(Broken):
            trained(CASES["batch"], folder / "two_then_one", breaks_in=3)
        torch.save(trained(CASES["batch"], folder / "one_then_two"), folder / f"one_then_two{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done all cases."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(Broken):
        trained(CASES["batch"], folder / "one_then_two", breaks_in=3)
    together(_work, folder, runs.analysis())
    return folder


def _same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(given[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(name: str, two: Path, tmp_path: Path) -> None:
    expected, state = trained(CASES[name], tmp_path)
    (first, records), (second, _) = (torch.load(two / f"{name}{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    _same(first, expected)
    for given, record in zip(records, state.records, strict=True):
        wanted = record.as_json()
        for key in ("loss", "train_score", "val_score", "samples", "work"):
            assert given[key] == pytest.approx(wanted[key], abs=2e-5), key
        for key in ("open", "undecided", "shares", "cost"):
            assert given.get(key) == wanted.get(key), key
    if CASES[name].mode:
        (freeze,) = (each["freeze"] for each in records if "freeze" in each)
        assert 0 < freeze["share"].count(0.0) < len(freeze["share"])
        wanted = state.freeze.as_json()
        assert freeze["share"] == pytest.approx(wanted["share"], abs=1e-3)
        assert freeze | {"share": None} == wanted | {"share": None}


def test_statistics_and_gradients_are_those_of_the_whole_batch(two: Path) -> None:
    whole = _norms()  # PyTorch's own, on all of it
    first, second = (torch.load(two / f"norms{rank}.pt") for rank in range(2))
    for name in ("made", "of_x"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole[name], rtol=1e-4, atol=1e-4)
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], whole[name], rtol=1e-4, atol=1e-4)
    for name in whole.keys() - {"made", "of_x", "weight", "bias"}:
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("order", ["two_then_one", "one_then_two"])
def test_a_run_goes_on_with_another_number_of_processes(order: str, two: Path, tmp_path: Path) -> None:
    whole, expected = trained(CASES["batch"], tmp_path)
    path = two / order
    assert len((path / "training.jsonl").read_text().splitlines()) == (2 if order == "two_then_one" else EPOCHS)
    weights, state = (
        trained(CASES["batch"], path)
        if order == "two_then_one"
        else torch.load(two / f"{order}0.pt", weights_only=False)
    )
    _same(weights, whole)
    assert state.records[-1].open == expected.records[-1].open
