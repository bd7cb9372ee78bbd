"""The tree of settings: frozen, and strict about ranges."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from polar_deploy.config import Budget, Gates, Normalize, Settings, Training
from polar_deploy.tasks import data_name


def test_settings_are_frozen_and_know_their_keys() -> None:
    settings = Settings(model="resnet20")
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings.model_validate({"model": "resnet20", "epochs": 3})


def test_the_defaults_are_those_of_the_command_line() -> None:
    settings = Settings(model="resnet20")
    assert (settings.target, settings.task, settings.seed) == ("ort-fp32", "classification", 0)
    assert data_name(settings) == "cifar10"
    assert settings.budget is None  # the target's
    assert (settings.accept.max_drop, settings.accept.min_speedup, settings.accept.batch) == (1.0, 1.02, 1)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.5, float("nan"), float("inf")])
def test_a_budget_is_a_share_between_0_and_1(share: float) -> None:
    for cost in ("macs", "params", "latency"):
        with pytest.raises(ValidationError):
            Budget.model_validate({cost: share})


def test_a_budget_names_a_cost() -> None:
    with pytest.raises(ValidationError, match="at least one of macs, params, latency"):
        Budget()
    assert Budget(params=0.6, latency=0.7).asked() == {"params": 0.6, "latency": 0.7}


def test_gates_freeze_after_they_start() -> None:
    with pytest.raises(ValidationError, match=r"gates\.close_from \(0\.5\) must lie before gates\.freeze_at \(0\.5\)"):
        Gates(close_from=0.5, freeze_at=0.5)


def test_gates_may_learn_to_the_end() -> None:
    assert Gates(freeze_at=1.0).freeze_at == 1


@pytest.mark.parametrize("freeze", [0, 1.01, float("nan")])
def test_gates_are_fixed_within_the_run(freeze: float) -> None:
    with pytest.raises(ValidationError):
        Gates(close_from=0.0, freeze_at=freeze)


@pytest.mark.parametrize("gone", ["polarization", "steering", "temperature", "travel"])
def test_gates_have_no_settings_of_before(gone: str) -> None:
    assert set(Gates.model_fields) == {"mode", "blocks", "heads", "close_from", "freeze_at", "min_width"}
    with pytest.raises(ValidationError, match="Extra inputs"):
        Gates.model_validate({gone: 1.0})


def test_no_number_is_nan() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Normalize(mean=(float("nan"), 0, 0), std=(1, 1, 1))
    with pytest.raises(ValidationError, match="finite"):
        Training(lr=float("inf"))
