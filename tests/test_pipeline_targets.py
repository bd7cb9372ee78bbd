"""The command for targets of all kinds: trained here and built elsewhere, built here and not run, quantised."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import onnx
import pytest

from polar_deploy import targets
from polar_deploy.documents.parity import Interval, Round
from polar_deploy.workspace import read_json
from tests.conftest import MINIATURE, Miniature, Outcome, polar
from tests.support.bundle_commands import bundle
from tests.support.schemas import valid

RESNET20 = ("--model", "resnet20", "--data", "digits", "--epochs", "1", "--set", "training.threads=1")
needs_rtx = pytest.mark.skipif(
    bool(targets.lacks_to_build(targets.parse("rtx-fp16"))), reason="TensorRT for RTX is not installed"
)
has_gpu = not targets.lacks_to_run(targets.parse("rtx-fp16"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """ResNet-20 for TensorRT, as far as that goes anywhere."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcome = polar(*RESNET20, "--target", "trt-fp16", "--until", "surgery")
    return place / "runs" / "resnet20-digits-trt-fp16-s0", outcome


def test_train_here_and_build_elsewhere(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    assert (outcome.code, outcome.ran) == (0, ["full", "gates", "export", "surgery"]), outcome.err
    full, compressed = (onnx.load(folder / name / "model.onnx").graph for name in ("full", "compressed"))
    before, after = inner_widths(full), inner_widths(compressed)
    assert sorted(before) == [16] * 3 + [32] * 3 + [64] * 3
    assert all(width % 8 == 0 and width > 0 for width in after)
    assert sum(after) < sum(before)
    weights = {tensor.name: tensor.dims for tensor in compressed.initializer}
    wide = [weights[node.input[1]][0] for node in compressed.node if node.op_type == "Conv"]
    assert all(width % 8 == 0 for width in wide)  # the sums of blocks, too
    assert not (folder / "engines").exists()


def inner_widths(graph: onnx.GraphProto) -> list[int]:
    """Channels between the two convolutions of each block: Conv, Relu, Conv with no other reader in between."""
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    readers = {name: [node for node in graph.node if name in node.input] for n in graph.node for name in n.output}
    widths = []
    for conv in (node for node in graph.node if node.op_type == "Conv"):
        following = readers[conv.output[0]]
        if [node.op_type for node in following] != ["Relu"]:
            continue
        second = readers[following[0].output[0]]
        if [node.op_type for node in second] == ["Conv"]:
            out, into = weights[conv.input[1]][0], weights[second[0].input[1]][1]
            assert out == into
            assert math.prod(weights[second[0].input[1]][2:]) == 9
            widths.append(out)
    return widths


@needs_rtx
@pytest.mark.skipif(has_gpu, reason="this machine can run the engines")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_built_and_not_run_never_passes(precision: str, trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    outcome = polar(*RESNET20, "--target", f"rtx-{precision}", "--out", folder, "--from", "build", "--json")
    assert outcome.code == 5, outcome.err
    report = json.loads(outcome.out)
    assert report["accuracy"] is None
    assert report["latency"] == []
    assert report["not_run"].startswith("built, not run here: no NVIDIA driver")
    assert {report["verdict"][part]["result"] for part in ("accuracy", "latency", "overall")} == {"undecided"}
    assert "passed" not in outcome.out
    for name in ("engines/build.json", "parity.json", "report.json"):
        valid(Path(name).stem, read_json(folder / name))
    for name in ("full", "compressed"):
        assert (folder / "engines" / f"{name}.plan").stat().st_size > 10_000
        layers = read_json(folder / "engines" / f"{name}.layers.json")["layers"]
        convolutions = [layer for layer in layers if "conv" in layer["op"].lower()]
        assert len(convolutions) == sum(
            node.op_type == "Conv" for node in onnx.load(folder / name / "model.onnx").graph.node
        )
        assert {layer["type"] for layer in convolutions} == {precision}
    table = polar(*RESNET20, "--target", f"rtx-{precision}", "--out", folder, "--from", "build")
    assert (table.code, table.ran) == (5, [])
    assert "UNDECIDED" in table.out
    assert "built, not run here" in table.out


@pytest.mark.parametrize("target", ["ort-int8", "ov-int8"])
def test_int8_on_the_cpu_runs_and_is_judged(target: str, miniature: Miniature, tmp_path: Path) -> None:
    if lacks := targets.lacks_to_run(targets.parse(target)):
        pytest.skip("; ".join(lacks))
    folder = miniature.copy(tmp_path / "run", "build", "parity", "report")
    options = ("--target", target, "--max-drop", "20", "--min-speedup", "0.01", "--out", folder)
    outcome = polar(*MINIATURE, *options, "--from", "build")
    assert outcome.code in (0, 5), outcome.err
    build, parity = read_json(folder / "engines/build.json"), read_json(folder / "parity.json")
    for name in ("full", "compressed"):
        precision = build["engines"][name]["precision"]
        assert precision["asked"] == "int8"
        assert precision["found"]["int8"] > 5
        assert 480 <= precision["calibration"]["images"] <= 512  # some are held out, to see what layers lose
        assert 90 < parity["precision"][name]["agreement"] <= 100
        assert 0 < parity["precision"][name]["relative_difference"] < 0.5
    assert "int8 vs fp32" in outcome.out
    for name in ("engines/build.json", "parity.json", "report.json"):
        valid(Path(name).stem, read_json(folder / name))
    verified = bundle("verify", folder / "bundle", "--no-timing")
    assert verified.code == 0, verified.out + verified.err
    assert "engines   as delivered" in verified.out


def test_on_another_machine_engines_are_built_and_measured_again(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature.copy(tmp_path / "run")
    assert polar(*MINIATURE, "--out", folder, "--from", "build").ran == []
    monkeypatch.setattr(targets, "identity", lambda target: {"onnxruntime": "99.0"})
    assert polar(*MINIATURE, "--out", folder, "--from", "build").ran[:2] == ["build", "parity"]


def test_an_undecided_verdict_is_measured_again(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature.copy(tmp_path / "run")
    options = ("--out", folder, "--max-drop", "50", "--min-speedup", "0.01", "--from", "parity")
    with monkeypatch.context() as noisy:
        noisy.setattr(Round, "speedup_with_noise", Interval(1.0, 0.001, 1000.0))
        for _ in range(2):
            outcome = polar(*MINIATURE, *options)
            assert (outcome.code, outcome.ran[:1]) == (5, ["parity"])
    assert polar(*MINIATURE, *options).code == 0
    assert polar(*MINIATURE, *options).ran == []


@pytest.mark.parametrize("options", [("--target", "auto"), ("--set", "target=auto")])
def test_auto_takes_what_runs_here(options: tuple[str, ...]) -> None:
    outcome = polar(*MINIATURE, *options, "--dry-run", "--json")
    assert json.loads(outcome.out)["target"]["name"] == targets.choose().name
