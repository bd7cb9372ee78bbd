"""The page about this machine: what is missing is named, with the line that installs it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnx
import pytest

from polar_deploy import cpu, engines, gpu, targets
from polar_deploy.documents.doctor import Timed
from polar_deploy.engines import doctor, machine, quick
from polar_deploy.errors import ContentError
from polar_deploy.gpu import Gpu
from polar_deploy.surgery import cost


def page(capsys: pytest.CaptureFixture[str]) -> str:
    assert doctor.run(argparse.Namespace(json=False, time=False)) == 0
    return capsys.readouterr().out


def no_gpu() -> None:
    raise gpu.NoGpuError("no NVIDIA driver (libcuda.so.1 is not found)")


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "first", no_gpu)
    monkeypatch.setattr(gpu, "every", no_gpu)


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = [Gpu("Tesla T4", (7, 5)), Gpu("Orin", (8, 7)), Gpu("H200", (9, 0))]
    monkeypatch.setattr(gpu, "first", lambda: boards[0])
    monkeypatch.setattr(gpu, "every", lambda: boards)
    monkeypatch.setattr(gpu, "cuda_version", lambda: "12.8")


def test_machine_without_a_gpu(without_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine()
    assert found.gpus == []
    assert found.as_json()["targets"]["ort-fp32"] == {
        "build": [],
        "run": [],
        "proves_types": True,
        "install": "in the checkout: pip install '.[ort]'",
    }
    assert "no NVIDIA driver (libcuda.so.1 is not found)" in found.targets["rtx-fp16"].run
    assert set(found.targets) == set(targets.TARGETS)
    shown = page(capsys)
    assert "GPU           none: no NVIDIA driver (libcuda.so.1 is not found)" in shown
    assert "--target auto  means ort-fp32 here" in shown
    assert "pip install '.[ort-gpu]'" in shown  # the brackets are no markup


def test_gpus_lack_what_their_architecture_lacks(with_gpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine()
    assert [each.lacks for each in found.gpus] == [["bf16", "fp8"], ["fp8"], []]
    assert "Tesla T4 has no BF16 (compute capability 7.5, 8.0 is needed)" in found.targets["trt-bf16"].build
    shown = page(capsys)
    assert "GPU           Tesla T4, compute capability 7.5, no BF16, FP8\n" in shown
    assert "GPU           H200, compute capability 9.0\n" in shown
    assert "driver        CUDA up to 12.8" in shown


def test_json_is_what_was_found(without_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(argparse.Namespace(json=True, time=False)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(doctor.examine().as_json()))


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("flags\t: fpu sse avx512f avx512_vnni", ["avx512_vnni"]),
        ("Features\t: fp asimd asimddp", ["asimddp"]),
        ("", []),
    ],
)
def test_dot_products_of_bytes_are_found(
    flags: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.int8_instructions() == found


def test_on_request_each_target_that_runs_here_is_timed(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, asked = quick.measure([targets.parse("ort-fp32")], seconds=0.1), []
    ms = measured["ort-fp32"].ms or {}
    assert ms.keys() == {"1", "16"}
    assert 0 < ms["1"] < ms["16"]
    monkeypatch.setattr(quick, "measure", lambda found: asked.extend(found) or measured)
    assert doctor.run(argparse.Namespace(json=True, time=True)) == 0
    assert json.loads(capsys.readouterr().out)["timed"] == {name: each.as_json() for name, each in measured.items()}
    found = doctor.examine().targets
    assert [each.name for each in asked] == [name for name in found if not found[name].build + found[name].run]
    assert "ort-fp32" in {each.name for each in asked}
    assert not any("trt" in each.name for each in asked)
    assert doctor.run(argparse.Namespace(json=False, time=True)) == 0
    assert "a small residual network, median milliseconds" in " ".join(capsys.readouterr().out.split())


def test_a_target_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ContentError("a layer runs\nin FP32", "")

    monkeypatch.setattr(engines, "build", fail)
    assert quick.measure([targets.parse("ort-fp32")]) == {"ort-fp32": Timed(error="a layer runs in FP32")}


def test_the_network_that_is_timed_has_the_costs_that_are_said() -> None:
    model = quick.network()
    onnx.checker.check_model(model, full_check=True)
    stages = 4 * 16 * 16 * 9 * 32**2 + 2 * (3.5 * 32 * 32 * 9 + 16 * 32) * 16**2
    assert cost(model).macs == 16 * 27 * 32**2 + stages + 640  # half a layer where a stage begins, and its shortcut
