"""Mixed precision: what was asked for, or what a step of the network takes less time in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polar_deploy.tasks import Batch
from polar_deploy.tasks.classification import classifier
from polar_deploy.training.full import Plain
from polar_deploy.training.mixed import MixedPrecision
from tests.training.runs import CLASSES, CPU, SIZE, BreakIn, Broken, fit, settings, train, without_seconds

TASK = classifier(CLASSES, SIZE, settings().training)
TWO = Batch({"input": torch.ones(2, 3, SIZE, SIZE)}, {"label": torch.tensor([0, 1])})


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that computes in bf16."""
    _has(monkeypatch, avx512_bf16=True)


def _has(monkeypatch: pytest.MonkeyPatch, **units: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **units}, raising=False)


class Slow(nn.Module):
    """A classifier whose passes take longer in one type than in the other."""

    def __init__(self, slow: torch.dtype) -> None:
        super().__init__()
        self.layer, self.slow = nn.Linear(3 * SIZE * SIZE, CLASSES), slow

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        made: Tensor = self.layer(images.flatten(1))
        end = time.process_time() + (0.02 if made.dtype == self.slow else 0)
        while time.process_time() < end:
            pass
        return {"logits": made}


class Unable(nn.Linear):
    """A classifier that has no kernel for bf16."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        made = super().forward(images.flatten(1))
        if made.dtype == torch.bfloat16:
            raise RuntimeError("\"kernel\" not implemented for 'BFloat16'\nat some line")
        return {"logits": made}


def _dtype(mixed: MixedPrecision) -> torch.dtype:
    with mixed.autocast():
        return F.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype


@pytest.mark.parametrize(("amp", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_is_what_was_asked_for(amp: str, dtype: torch.dtype) -> None:
    assert _dtype(MixedPrecision(amp, CPU)) == dtype


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16", "sve_bf16"])
@pytest.mark.parametrize(("slow", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_on_a_cpu_with_a_unit_for_bf16_steps_are_measured(
    name: str, slow: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has(monkeypatch, **{name: True})
    mixed = MixedPrecision("auto", CPU)
    assert mixed.bf16 is None
    said = mixed.settle(Slow(slow), TASK, TWO)
    assert _dtype(mixed) == dtype
    assert said.startswith(f"computes in {'bf16' if dtype == torch.bfloat16 else 'FP32'}; in bf16 a step takes ")


def test_a_cpu_without_one_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, amx_bf16=False)
    assert MixedPrecision("auto", CPU).bf16 is False


def test_a_gpu_that_emulates_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it supports bf16 unless it is asked without its emulation."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert MixedPrecision("auto", torch.device("cuda")).bf16 is False


@pytest.mark.usefixtures("unit")
def test_what_has_no_bf16_is_trained_in_fp32() -> None:
    mixed = MixedPrecision("auto", CPU)
    said = mixed.settle(Unable(3 * SIZE * SIZE, CLASSES), TASK, TWO)
    assert said == "computes in FP32; in bf16 a step fails: \"kernel\" not implemented for 'BFloat16'"
    assert mixed.bf16 is False


@pytest.mark.usefixtures("unit")
def test_a_resumed_run_computes_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured anew it could come out otherwise, and with it the weights."""
    auto = settings(training={"amp": "auto"})
    monkeypatch.setattr(MixedPrecision, "_share", lambda *_: 0.5)
    whole = train(fit(auto, tmp_path / "whole", gated=False, epochs=2))
    assert [each.bf16 for each in whole.records] == [True, True]
    with pytest.raises(Broken):
        train(fit(auto, tmp_path / "broken", gated=False, epochs=2), progress=BreakIn(2))
    monkeypatch.setattr(MixedPrecision, "_share", lambda *_: 2.0)
    resumed = train(fit(auto, tmp_path / "broken", gated=False, epochs=2))
    assert without_seconds(resumed.records) == without_seconds(whole.records)


def test_full_precision_and_bf16_give_nearly_the_same_loss(tmp_path: Path) -> None:
    losses = []
    for amp in ("fp32", "bf16"):
        run = fit(settings(training={"amp": amp}), tmp_path, gated=False, epochs=1)
        images = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        run.network.eval()
        loss, outputs = Plain(run).loss(Batch({"input": images}, {"label": torch.arange(8) % 4}))
        assert outputs["logits"].dtype == (torch.float32 if amp == "fp32" else torch.bfloat16)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
