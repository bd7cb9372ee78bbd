"""--dry-run: the plan of each pipeline, with gates, costs and what its target needs; nothing is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polar_deploy import models, recipes
from polar_deploy.stages import NAMES
from polar_deploy.tasks.classification import classifier
from tests.conftest import polar

# recipe -> pixels, classes; channels at how many sites, blocks that may go, both counted in the papers' tables.
# A ResNet for CIFAR has 9 * (16 + 32 + 64) channels inside its blocks, and 64 in its streams: those of the first stage
# go on in the second, whose other 16 go on in the third with 32 more. A ResNet-50 has 64 in its stem, 7552 inside, and
# 256 + 512 + 1024 + 2048 in its streams; convolutions on shortcuts can go instead of their blocks.
PIPELINES = {
    "cifar10-resnet56": (32, 10, "1072 channels at 30 sites (3 streams), 27 blocks; 1 layer without"),
    "cifar100-resnet56": (32, 100, "1072 channels at 30 sites (3 streams), 27 blocks; 1 layer without"),
    "digits": (16, 10, "400 channels at 12 sites (3 streams), 9 blocks; 1 layer without"),
    "imagenet-resnet50": (224, 1000, "11456 channels at 37 sites (4 streams), 20 blocks; 1 layer without"),
    "tiny-imagenet-resnet18": (64, 200, "2880 channels at 12 sites (4 streams), 11 blocks; 1 layer without"),
}


def count_macs(network: nn.Module, pixels: int) -> int:
    """MACs at batch 1, by watching what each layer puts out."""
    counted = [0]

    def watch(layer: nn.Module, _: object, output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        counted[0] += output.numel() // output.shape[1] * weight.numel()

    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(watch)
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, pixels, pixels))
    return counted[0]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_pipeline_is_tried() -> None:
    assert sorted(PIPELINES) == sorted(recipes.shipped())


@pytest.mark.parametrize("name", PIPELINES)
def test_the_plan_of_each_pipeline(name: str, tmp_path: Path) -> None:
    pixels, classes, gates = PIPELINES[name]
    outcome = polar("--recipe", name, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    plan = dict(re.findall(r"^(folder|stages|gates|full|smallest|target) +(.+)$", outcome.out, re.MULTILINE))
    model = re.search(r"^model: (\w+)$", outcome.out, re.MULTILINE)
    assert model
    macs = count_macs(models.build(model[1], classifier(classes, pixels)), pixels)
    assert plan["stages"] == " → ".join(NAMES)
    assert plan["gates"] == gates
    assert "no gate   linear: its channels are an output" in outcome.out or "no gate   fc: its" in outcome.out
    counted = re.match(r"([\d.]+) ([MG]) MACs, [\d.]+ [kM] parameters$", plan["full"])
    assert counted
    assert float(counted[1]) * {"M": 1e6, "G": 1e9}[counted[2]] == pytest.approx(macs, rel=0.005)
    least = re.fullmatch(r"macs=([\d.]+), params=([\d.]+) of the full network", plan["smallest"])
    assert least
    assert 0 < float(least[1]) < 0.1
    target = re.search(r"^target: (\S+)$", outcome.out, re.MULTILINE)
    assert target
    assert target[1] in plan["target"]
    here = "can be built and run here"
    assert re.search(f"tensorrt .*is not installed|{here}" if "trt" in target[1] else here, plan["target"])
    default = "budget: {macs: null, params: null, latency: 0.6}" if here in plan["target"] else "budget: {macs: 0.5,"
    assert ("budget: {macs: 0.6," if name == "cifar100-resnet56" else default) in outcome.out
    assert os.listdir(tmp_path) == []


def test_the_plan_as_json_names_every_default_and_the_stages_asked_for() -> None:
    command = ("--model", "tests.support.tiny:net", "--data", "digits", "--target", "trt-fp16", "--seed", "7")
    outcome = polar(*command, "--dry-run", "--json", "--from", "gates", "--until", "surgery")
    plan = json.loads(outcome.out)
    assert plan["stages"] == ["gates", "export", "surgery"]
    assert plan["folder"] == "runs/tests.support.tiny.net-digits-trt-fp16-s7"
    ungated = {"linear": "its channels are an output of the network"}
    assert plan["gates"] == {"channel_sites": 5, "channels": 84, "streams": 2, "blocks": 4, "ungated": ungated}
    settings = plan["settings"]
    assert (settings["align"], settings["input_size"], settings["training"]["full_epochs"]) == (8, 16, 30)
    assert plan["target"]["align"] == 8


def test_a_plan_looks_at_the_weights_that_are_given(tmp_path: Path) -> None:
    command = ("--model", "tests.support.tiny:net", "--data", "digits", "--budget", "0.5", "--dry-run")
    outcome = polar(*command, "--full-weights", tmp_path / "none.npz")
    assert (outcome.code, outcome.out) == (2, "")
    assert "none.npz" in outcome.err
    np.savez(tmp_path / "other.npz", elsewhere=np.zeros(3, np.float32))
    outcome = polar(*command, "--full-weights", tmp_path / "other.npz")
    assert (outcome.code, outcome.out) == (4, "")


def test_the_default_budget_is_that_of_gates_that_were_trained_elsewhere(tmp_path: Path) -> None:
    """Trained where its target could not be measured, built where it can."""

    def budget() -> object:
        command = ("--model", "tests.support.tiny:net", "--data", "digits", "--out", tmp_path / "run")
        return json.loads(polar(*command, "--dry-run", "--json").out)["settings"]["budget"]

    assert budget() == {"macs": None, "params": None, "latency": 0.6}
    (tmp_path / "run" / "gated").mkdir(parents=True)
    gates = tmp_path / "run" / "gated" / "gates.json"
    gates.write_text('{"budget": {"macs": 0.5}}')
    assert budget() == {"macs": 0.5, "params": None, "latency": None}
    for damaged in ("[]", "{", '{"budget": {"macs": 2}}', '{"budget": 1}'):
        gates.write_text(damaged)
        assert budget() == {"macs": None, "params": None, "latency": 0.6}


@pytest.mark.parametrize("dry", [True, False])
def test_a_budget_that_cannot_be_reached(dry: bool, tmp_path: Path) -> None:
    command = ("--model", "tests.support.tiny:net", "--data", "digits")
    outcome = polar(*command, "--budget", "0.01", *(["--dry-run"] if dry else []))
    assert (outcome.code, outcome.out) == (2, "")
    # 3 channels of the stem, 8 behind the shortcut, and the head stay: (64*27*3 + 16*3*8 + 80) of 440 304 MACs
    assert "error: budget macs=0.01 cannot be reached" in outcome.err
    assert "0.013 of the full network's macs is left" in outcome.err
    advice = re.search(r"ask for at least macs=([\d.]+)", outcome.err)
    assert advice
    assert advice[1] == "0.013"
    reached = polar(*command, "--budget", advice[1], "--dry-run")
    assert reached.code == 0
    assert "smallest  macs=0.013, " in reached.out
    assert os.listdir(tmp_path) == []


def test_the_plan_with_the_widths_of_a_device() -> None:
    command = ("--model", "tests.support.tiny:net", "--data", "digits", "--target", "trt-int8", "--device", "rk3588")
    outcome = polar(*command, "--dry-run", "--json")
    plan = json.loads(outcome.out)
    assert plan["device"]["name"] == "rk3588"
    assert plan["device"]["precision"] == "int8"
    assert plan["device"]["widths"] == [32, 64, 96, 128]
    assert plan["target"]["align"] == 1
    # no layer of the network has more than 32 channels, and 32 is the least that pays: blocks alone can go
    blocks_alone = plan["smallest"]["macs"]
    assert blocks_alone > json.loads(polar(*command[:-2], "--dry-run", "--json").out)["smallest"]["macs"]
    shown = polar(*command, "--dry-run").out
    assert "device    rk3588, int8 (estimate, rknn-toolkit2 2.5.0): 32, 64, 96, 128 channels, and so on" in shown
    assert re.search(r"smallest  macs=[\d.]+, params=[\d.]+, latency=[\d.]+ of the full network", shown)


def test_a_device_tells_what_latency_can_be_reached() -> None:
    # trt-int8 cannot be measured here: without the device a latency budget would need a table
    command = ("--model", "tests.support.tiny:net", "--data", "digits", "--target", "trt-int8", "--until", "surgery")
    with_device = polar(*command, "--device", "ethos-u55-128", "--budget", "latency=0.6", "--dry-run", "--json")
    assert with_device.code == 0
    assert json.loads(with_device.out)["smallest"]["latency"] < 0.6
    too_little = polar(*command, "--device", "ethos-u55-128", "--budget", "latency=0.001", "--dry-run")
    assert too_little.code == 2
    assert "budget latency=0.001 cannot be reached" in too_little.err
    assert polar(*command, "--budget", "latency=0.6", "--dry-run").code == 2


def test_the_plan_without_a_device() -> None:
    outcome = polar("--model", "tests.support.tiny:net", "--data", "digits", "--dry-run", "--json")
    assert json.loads(outcome.out)["device"] is None


def test_a_device_that_is_not_known() -> None:
    outcome = polar("--model", "tests.support.tiny:net", "--data", "digits", "--device", "rk3589", "--dry-run")
    assert (outcome.code, outcome.out) == (2, "")
    assert "unknown device 'rk3589'" in outcome.err
    assert "did you mean rk3588?" in outcome.err


def test_a_device_and_an_alignment() -> None:
    command = ("--model", "tests.support.tiny:net", "--data", "digits", "--device", "rk3588", "--dry-run")
    outcome = polar(*command, "--align", "8")
    assert (outcome.code, outcome.out) == (2, "")
    assert "both a device (rk3588) and an alignment (8)" in outcome.err
    assert polar(*command, "--align", "1").code == 0


@pytest.mark.parametrize(
    ("options", "start", "freeze"),
    [
        ((), 0.05, 0.12),
        (("--set", "training.init_from=scratch"), 0.3, 0.55),
        (("--set", "gates.close_from=0.95"), 0.95, 1.0),
        (("--set", "gates.freeze_at=0.08"), 0.04, 0.08),
        (("--set", "gates.close_from=0.2", "--set", "gates.freeze_at=0.4"), 0.2, 0.4),
    ],
)
def test_gates_begin_to_close_when_weights_say_something(options: tuple[str, ...], start: float, freeze: float) -> None:
    outcome = polar("--model", "resnet20", "--data", "digits", "--dry-run", "--json", *options)
    assert outcome.code == 0, outcome.err
    gates = json.loads(outcome.out)["settings"]["gates"]
    assert (gates["close_from"], gates["freeze_at"]) == pytest.approx((start, freeze))
