"""The long checks, run for a moment, so that they keep step with what they check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import bar_typed_graphs, gpu_engines, surgery_models
from polar_deploy import surgery, targets
from polar_deploy.engines import timing
from tests.support.residual import images, residual


@pytest.mark.parametrize("target", bar_typed_graphs.BOUNDS)
def test_typed_graphs(target: str, tmp_path: Path) -> None:
    found = bar_typed_graphs.trial(3, target, tmp_path)
    if bar_typed_graphs._not_here(targets.parse(target)) is None:
        assert found["off"] <= bar_typed_graphs.BOUNDS[target], found
        differ, rounded = found.get("steps", (0, 1))
        assert differ / rounded <= bar_typed_graphs.STEPS


def test_typed_graphs_tells_what_was_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bar_typed_graphs.RandomNetwork, "draw", lambda self: 1 / 0)
    assert bar_typed_graphs.trial(0, "ort-int8", tmp_path)["raised"] == "ZeroDivisionError: division by zero"


def test_engines_of_a_gpu_as_far_as_a_cpu_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engines, "SECONDS", (0.0, 0.1))
    monkeypatch.setattr(gpu_engines, "ROUNDS", 1)
    monkeypatch.setattr(timing, "_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(timing, "NOISE", 0.5)
    full = onnx.shape_inference.infer_shapes(residual())
    (first, second) = (site for site in gpu_engines._inner(full))
    masks = {site: np.arange(site.width) % 2 for site in (first, second)}
    half = surgery.compress(surgery_models.gated(full, masks))
    assert half.report["macs"][1] < 0.75 * half.report["macs"][0]
    onnx.save(full, tmp_path / "full.onnx")
    onnx.save(half.model, tmp_path / "half.onnx")
    given = {"test": images(64), "calibration": images(8), "labels": np.zeros(64, np.int64)}
    target = targets.parse("ort-fp32")
    found = gpu_engines.examine(target, tmp_path, tmp_path / "engines", given)
    assert found["accuracy"]["half"]["relative_difference"] < 1e-5
    assert [each["batch"] for each in found["latency"]] == list(gpu_engines.BATCHES)
    bars = gpu_engines.judge("residual ort-fp32", target, found, trained=True)
    assert bars == {
        "residual ort-fp32: layers run in fp32": True,
        "residual ort-fp32: a copy is no other engine": True,
        "residual ort-fp32: all logits are finite": True,
    }
