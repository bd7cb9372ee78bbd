"""`python -m polar_deploy.devices measure`: what the sweep computes from times, and the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from polar_deploy import devices
from polar_deploy.devices import measure, sweep
from polar_deploy.devices.__main__ import main
from polar_deploy.devices.device import Kind


class Clock:
    """Processor time that passes only while something runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def load(self, path: Path, size: tuple[int, ...]) -> Callable[[], None]:
        """Takes as many milliseconds as there are channels between the layers, 10 more, and 2 for each sum."""
        graph = onnx.load(path).graph
        width = len(onnx.numpy_helper.to_array(graph.initializer[0]))
        sums = sum(node.op_type == "Add" for node in graph.node)

        def run() -> None:
            self.now += (10 + width + 2 * sums) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.process_time", clock)
    return clock


def test_a_sweep_gives_the_milliseconds_of_each_width(clock: Clock) -> None:
    costs, control = sweep.sweep(clock.load, "conv1x1", (8, 32), rounds=5)
    assert list(costs) == [8, 32, 64]  # the reference is among them
    assert costs == pytest.approx({8: 18, 32: 42, 64: 74}, rel=1e-4)
    assert control == pytest.approx(0, abs=1e-9)


def test_what_a_sum_costs(clock: Clock) -> None:
    # Four layers of 64 channels take 74 ms, a layer 18.5
    assert sweep.addition(clock.load, rounds=5) == pytest.approx(2 / 18.5, abs=1e-4)


def test_what_is_measured_is_written(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "session", clock.load)
    monkeypatch.setattr(sweep, "SWEEPS", {("conv3x3", 64, 28): (8, 16, 32)})
    path = tmp_path / "Mine.json"
    assert main(["measure", str(path), "--rounds", "5"]) == 0
    device = devices.load(str(path))
    assert device.name == "mine"
    assert device.staircase("fp32") == pytest.approx({8: 18, 16: 26, 32: 42, 64: 74}, rel=1e-4)
    assert device.offered("fp32") == (8, 16, 32, 64)
    assert device.addition == pytest.approx(2 / 18.5, abs=1e-4)
    assert '"widths": [8, 16, 32, 64]' in path.read_text()
    assert "8, 16, 32, 64 channels pay" in capsys.readouterr().out


def test_noise_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "sweep", lambda *_: ({32: 1.0, 64: 2.0}, -0.06))
    monkeypatch.setattr(sweep, "addition", lambda *_: 0.1)
    assert main(["measure", str(tmp_path / "mine.json")]) == 3
    assert "too noisy: a network and its own copy differ by 6%" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_needs_its_ending(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "mine"]) == 2
    assert "mine.json" in capsys.readouterr().err


@pytest.mark.parametrize(("layer", "around", "pixels"), sweep.SWEEPS)
@pytest.mark.parametrize("load", [measure.session, measure.session_int8])
def test_every_network_runs(
    load: Callable[[Path, tuple[int, ...]], Callable[[], object]],
    layer: Kind,
    around: int,
    pixels: int,
    tmp_path: Path,
) -> None:
    model, size = sweep.model(layer, 12, around, pixels), sweep.shape(around, pixels)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "model.onnx")
    (y,) = load(tmp_path / "model.onnx", size)()
    assert y.shape == size
    assert y.any()


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("load", [measure.session, measure.session_int8])
def test_a_network_with_branches_runs(
    load: Callable[[Path, tuple[int, ...]], Callable[[], object]], branches: bool, tmp_path: Path
) -> None:
    model = sweep.residual(branches)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "Add" for node in model.graph.node) == 3 * branches
    onnx.save(model, tmp_path / "model.onnx")
    (y,) = load(tmp_path / "model.onnx", sweep.shape())()
    assert y.any()
