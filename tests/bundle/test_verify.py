"""`bundle verify`: what it decides on this machine, and what it leaves to another one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from polar_deploy import data, targets
from tests.conftest import ROOT, Miniature, contents, polar
from tests.support.bundle_commands import bundle, change, manifest, put

QUIET = ("--no-timing", "--json")
TORCHLESS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from polar_deploy.bundle.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def torchless(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process in which nobody can import torch."""
    command = [sys.executable, "-c", TORCHLESS, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def verified(*arguments: object) -> tuple[int, Any]:
    """Exit code and the JSON document."""
    outcome = bundle("verify", *arguments, *QUIET)
    return outcome.code, json.loads(outcome.out) if outcome.out else outcome.err


def weights(folder: Path, name: str, index: int, change_it: Any) -> None:
    """Change one weight tensor of a network; size and hash in the manifest are right again."""
    model = onnx.load(folder / name)
    tensor = [each for each in model.graph.initializer if len(each.dims) == 4][index]
    values = numpy_helper.to_array(tensor).copy()
    change_it(values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    put(folder, name, model.SerializeToString())


def test_without_torch(folder: Path) -> None:
    """`benchmarks.bar_bundle` times it."""
    done = torchless("verify", folder, "--no-timing")
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict: PASS (golden)" in done.stdout


def test_the_maker_s_own_machine_finds_what_the_maker_found(folder: Path) -> None:
    code, found = verified(folder)
    assert code == 0
    assert found["engines"] == "as delivered"
    assert set(found["golden"]["engines"]) == {"compressed", "full"}
    assert all(each["pass"] and each["difference"] < 1e-5 for each in found["golden"]["engines"].values())
    assert (found["latency"], found["accuracy"]) == (None, None)
    assert {name: each["result"] for name, each in found["verdict"].items()} == {"golden": "pass", "overall": "pass"}


def test_the_archive_is_as_good_as_the_folder(folder: Path, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        assert bundle("archive", folder, tmp_path / name).code == 0
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert verified(tmp_path / "one.zip") == verified(folder)


@pytest.mark.parametrize("name", ["compressed", "full"])
def test_a_network_with_other_weights_fails(name: str, folder: Path) -> None:
    weights(folder, f"{name}/model.onnx", 0, lambda values: values.__setitem__(0, 0))
    code, found = verified(folder)
    assert code == 1
    assert f"of the {name} network is off by" in found["verdict"]["overall"]["reason"]
    assert not found["golden"]["engines"][name]["pass"]


def test_a_network_that_gives_nan_fails(folder: Path) -> None:
    weights(folder, "compressed/model.onnx", 0, lambda values: values.fill(np.nan))
    code, found = verified(folder)
    assert code == 1
    assert "not finite" in found["verdict"]["golden"]["reason"]


@pytest.mark.parametrize(("asked", "expected"), [(1e-6, "pass"), (1e6, "fail")])
def test_latency_is_judged_here(asked: float, expected: str, folder: Path) -> None:
    change(folder, "verdict", "asked", "min_speedup", to=asked)
    outcome = bundle("verify", folder, "--json")
    found = json.loads(outcome.out)
    measured = found["latency"]["rounds"][found["latency"]["chosen"]]
    assert measured["full"]["median_ms"] > 0
    decided = expected if found["latency"]["decided"] else "undecided"  # a machine may be too noisy
    assert found["verdict"]["latency"]["result"] == found["verdict"]["overall"]["result"] == decided
    assert outcome.code == {"pass": 0, "fail": 1, "undecided": 5}[decided]


# --------------------------------------------------------------------------- accuracy


@pytest.fixture(scope="module")
def digits() -> data.Split:
    return data.load("digits").test


def right(folder: Path, split: data.Split) -> float:
    """Percent that the compressed graph gets right, with the pre-processing written out."""
    import onnxruntime

    made = manifest(folder)["preprocessing"]
    pixels = split.images[np.arange(len(split.labels))].astype(np.float64) * made["scale"]
    images = ((pixels - made["mean"]) / made["std"]).transpose(0, 3, 1, 2).astype(np.float32)
    session = onnxruntime.InferenceSession(folder / "compressed/model.onnx", providers=["CPUExecutionProvider"])
    return 100 * float((session.run(None, {"input": images})[0].argmax(1) == split.labels).mean())


@pytest.mark.parametrize("form", ["arrays", "pictures"])
def test_accuracy_is_measured_on_a_test_set(form: str, folder: Path, digits: data.Split, tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir()
    images = digits.images[np.arange(len(digits.labels))]
    if form == "arrays":
        np.savez(place / "test.npz", images=images, labels=digits.labels)
    else:
        for index, (picture, label) in enumerate(zip(images, digits.labels, strict=True)):
            (place / str(label)).mkdir(exist_ok=True)
            Image.fromarray(picture).save(place / str(label) / f"{index}.png")
    code, found = verified(folder, "--data", place)
    assert code == 0
    assert found["accuracy"]["compressed"] == pytest.approx(right(folder, digits), abs=0.3)
    assert found["verdict"]["accuracy"]["result"] == "pass"


def test_labels_lead_to_no_folder_outside_of_the_test_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for place in (tmp_path / "elsewhere", tmp_path / "data/inside"):
        place.mkdir()
        Image.new("RGB", (16, 16)).save(place / "0.png")
    for label in ("../elsewhere", str(tmp_path / "elsewhere"), "inside", "", "."):
        put(folder, "labels.txt", f"{label}\n".encode() * 10)
        change(folder, "provenance", "data", "name", to="mine")
        outcome = bundle("verify", folder, "--data", tmp_path / "data")
        assert outcome.code == 2
        assert "has no test set" in outcome.err


def test_accuracy_that_is_lost_fails(folder: Path, digits: data.Split, tmp_path: Path) -> None:
    change(folder, "verdict", "asked", "max_drop", to=0.0)
    full = np.load(folder / "golden/full/logits.npy").argmax(1)
    made = manifest(folder)["preprocessing"]
    pictures = np.load(folder / "golden/inputs/input.npy").transpose(0, 2, 3, 1) * np.array(made["std"]) + made["mean"]
    wrong = np.load(folder / "golden/compressed/logits.npy").argmax(1) != full
    assert wrong.any()  # labels that make the full network right and the compressed one wrong
    np.savez(tmp_path / "test.npz", images=np.rint(255 * pictures[wrong]).astype(np.uint8), labels=full[wrong])
    code, found = verified(folder, "--data", tmp_path)
    assert code == 1
    reason = found["verdict"]["accuracy"]["reason"]
    assert reason.startswith("accuracy drops by 100.00 points (95 %: ")
    assert "only 0 is allowed" in reason


@pytest.mark.parametrize(
    ("change_it", "words"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: (folder / "data").mkdir(), "has no test set"),
    ],
)
def test_no_test_set_where_it_should_be(change_it: Any, words: str, folder: Path) -> None:
    change(folder, "provenance", "data", "name", to="os:system")  # nobody must import that
    change_it(folder.parent)
    outcome = bundle("verify", folder, "--data", folder.parent / "data")
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_nothing_is_downloaded_to_measure_accuracy(folder: Path, tmp_path: Path) -> None:
    change(folder, "provenance", "data", "name", to="cifar10")
    (tmp_path / "data").mkdir()
    outcome = bundle("verify", folder, "--data", tmp_path / "data")
    assert outcome.code == 2
    assert f"cifar10 is not in {tmp_path / 'data'}" in outcome.err
    assert list((tmp_path / "data").iterdir()) == []


# --------------------------------------------------------------------------- trust


def test_the_manifest_s_hash_is_compared(folder: Path) -> None:
    told = verified(folder)[1]["bundle"]["manifest_sha256"]
    assert verified(folder, "--manifest-sha256", told.upper())[0] == 0
    change(folder, "licence", to="another")
    Image.new("RGB", (20, 20)).save(folder.parent / "picture.png")
    picture = folder.parent / "picture.png"
    for command in (("verify", folder), ("run", folder, picture), ("run", folder, picture, "--fp32")):
        outcome = bundle(*command, "--manifest-sha256", told)
        assert (outcome.code, outcome.out) == (4, "")
        assert f"not the {told} that was given" in outcome.err


def test_nothing_is_written_into_the_bundle(folder: Path) -> None:
    before = contents(folder)
    for command in (
        ("archive", folder, folder / "bundle.zip"),
        ("verify", folder, "--rebuild", "--engines", folder / "here"),
        ("triton", folder, folder / "models"),
    ):
        outcome = bundle(*command)
        assert outcome.code == 2
        assert "lies in the bundle, which must not change" in outcome.err
    assert contents(folder) == before


@pytest.mark.parametrize("arguments", [("verify",), ("verify", "nowhere"), ("unknown",), ()])
def test_wrong_command_lines(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(bundle(*arguments).code)
    assert ended.value.code == 2


# --------------------------------------------------------------------------- built here, run elsewhere


@pytest.mark.skipif(bool(targets.lacks_to_build(targets.parse("rtx-fp16"))), reason="TensorRT for RTX is not installed")
@pytest.mark.skipif(not targets.lacks_to_run(targets.parse("rtx-fp16")), reason="this machine can run the plan")
def test_a_plan_that_cannot_run_here_leaves_it_to_the_device(miniature: Miniature, tmp_path: Path) -> None:
    run = miniature.copy(tmp_path / "run", "build", "parity", "bundle", "report")
    made = polar("--recipe", run / "run.yaml", "--target", "rtx-fp16", "--out", run, "--from", "build")
    assert made.code == 5, made.err
    document = manifest(run / "bundle")
    plan = document["networks"]["compressed"]["plan"]
    assert (plan["library"], plan["file"]) == ("TensorRT for RTX", "engines/compressed.plan")
    assert len(plan["version"].split(".")) == 4
    assert document["verdict"]["overall"]["result"] == "undecided"
    for options in ((), ("--trust-plan",), ("--rebuild",)):
        outcome = bundle("verify", run / "bundle", "--no-timing", *options)
        assert outcome.code == 5
        for words in ("plan not loadable here: no NVIDIA driver", "ONNX verified", "rebuild needed on the device"):
            assert words in outcome.out
        assert "verdict: UNDECIDED" in outcome.out


def test_what_was_found_here_stands_beside_the_makers_figures_on_a_page(folder: Path, tmp_path: Path) -> None:
    """Names from the manifest are a stranger's: text on the page. Both machines' figures are there."""
    evil = "<script>alert(1)</script>"
    change(folder, "metrics", "machine", "cpu", to=evil)
    change(folder, "metrics", "latency", 0, "speedup", to={"median": 1.5, "low": 1.25, "high": 1.75})
    page = tmp_path / "verified.html"
    outcome = bundle("verify", folder, "--json", "--html", page)
    found, text = json.loads(outcome.out), page.read_text()
    assert evil not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "1.50× (1.25–1.75)" in text
    here = found["latency"]["rounds"][found["latency"]["chosen"]]
    assert f"{here['compressed']['median_ms']:.3g}" in text
    assert found["bundle"]["manifest_sha256"] in text
    assert not re.search("https?:", text)


def test_the_page_says_what_could_not_be_found(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "verified.html"
    assert bundle("verify", folder, "--no-timing", "--html", page).code == 0
    assert ">Verified: the bundle is whole, and right on this device</h1>" in page.read_text()
    weights(folder, "compressed/model.onnx", 0, lambda values: values.fill(0.5))
    assert bundle("verify", folder, "--no-timing", "--html", page).code == 1
    assert ">Not verified: the bundle fails on this device</h1>" in page.read_text()
