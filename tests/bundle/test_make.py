"""The bundle stage: what it writes, and that it is the same each time."""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from polar_deploy import data, recipes
from polar_deploy.bundle.manifest import Manifest
from polar_deploy.documents import part
from tests.conftest import ROOT, Miniature, Outcome, contents, polar
from tests.support.bundle_commands import bundle, manifest
from tests.support.schemas import schema, valid


def again(miniature: Miniature, folder: Path, *options: object, without: tuple[str, ...] = ()) -> Outcome:
    """The miniature's command in a copy of its folder whose bundle has yet to be made."""
    miniature.copy(folder, *without, "bundle", "report")
    return polar("--recipe", miniature.folder / "run.yaml", "--out", folder, *options)


def test_the_manifest_is_as_its_schema_says(folder: Path) -> None:
    valid("bundle", manifest(folder))
    assert schema("bundle").schema == part.schema(Manifest)


def test_what_the_schema_refuses_and_what_the_types_refuse_is_the_same(folder: Path) -> None:
    """The types are stricter only where a schema cannot say it (one value against another)."""
    right = manifest(folder)
    wrong = [{**right, "extra": 1}, {**right, "name": "../x"}, {**right, "files": {"/etc/passwd": {}}}, []]
    assert not any(schema("bundle").is_valid(each) for each in wrong)


def test_every_file_is_listed_with_size_and_hash(folder: Path) -> None:
    listed = {name: (each["bytes"], each["sha256"]) for name, each in manifest(folder)["files"].items()}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert listed == {
        path.relative_to(folder).as_posix(): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def test_it_tells_nothing_about_whose_machine_it_was(miniature: Miniature, folder: Path) -> None:
    words = [str(miniature.folder), str(ROOT), str(Path.home()), "/tmp/"]
    # "root" is a word of its own, and weights hold any two or three letters.
    words += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [word for word in words if word.encode() in content] == [], path


def test_golden_outputs_are_those_of_the_graphs_on_validation_data(miniature: Miniature, folder: Path) -> None:
    inputs = np.load(folder / "golden/inputs/input.npy")
    reference = np.load(miniature.folder / "gated/reference.npz")
    np.testing.assert_array_equal(inputs, reference["inputs/input"])
    for name, torch_s in (("full", "full"), ("compressed", "gated")):
        session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
        golden = np.load(folder / f"golden/{name}/logits.npy")
        np.testing.assert_allclose(golden, session.run(None, {"input": inputs})[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(golden, reference[f"{torch_s}/logits"], rtol=0, atol=1e-4)


def test_metrics_and_provenance_are_those_of_the_run(miniature: Miniature, folder: Path) -> None:
    made, parity = manifest(folder), json.loads((miniature.folder / "parity.json").read_text())
    for key in ("full", "compressed", "drop", "interval", "samples"):
        assert made["metrics"]["accuracy"][key] == parity["accuracy"][key]
    assert [each["batch"] for each in made["metrics"]["latency"]] == [1, 8, 64]
    assert made["verdict"]["overall"] == parity["verdict"]["overall"]
    settings = recipes.load(miniature.folder / "run.yaml", {}).model_dump(mode="json")
    for place in ("data_dir", "full_weights", "latency_table"):
        del settings[place]
    assert made["provenance"]["settings"] == settings
    assert made["provenance"]["data"] == {"name": "digits", "sha256": data.load("digits").fingerprint()}
    assert (folder / "labels.txt").read_text().split() == [str(digit) for digit in range(10)]


def test_the_same_run_gives_the_same_bytes(miniature: Miniature, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert again(miniature, run).ran == ["bundle", "report"]
    assert contents(run / "bundle") == contents(miniature.folder / "bundle")


def test_without_the_full_network_and_with_random_golden_inputs(miniature: Miniature, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = again(miniature, run, "--no-with-full", "--golden", "random", "--set", "bundle.licence=MIT")
    assert outcome.ran == ["bundle", "report"]
    made = manifest(run / "bundle")
    assert (made["licence"], made["networks"]["full"], made["golden"]["source"]) == ("MIT", None, "random")
    assert not (run / "bundle/full").exists()
    data_s = np.load(miniature.folder / "bundle/golden/inputs/input.npy")
    inputs = np.load(run / "bundle/golden/inputs/input.npy")
    assert np.abs(inputs[:, None] - data_s[None]).mean(axis=(2, 3, 4)).min() > 0.1  # nobody's picture
    verified = bundle("verify", run / "bundle")
    assert verified.code == 0
    assert "the bundle has no full network" in verified.out


def test_int8_is_bundled_with_both_graphs(miniature: Miniature, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = again(miniature, run, "--target", "ort-int8", without=("build", "parity"))
    assert outcome.code in (0, 5), outcome.err
    network = manifest(run / "bundle")["networks"]["compressed"]
    assert (network["fp32"], network["typed"]) == ("compressed/model.onnx", "engines/compressed.onnx")
    found = json.loads(bundle("verify", run / "bundle", "--no-timing", "--json").out)["golden"]
    assert found["onnx"]["compressed"]["difference"] < 1e-5
    assert 1e-4 < found["engines"]["compressed"]["difference"] < 0.25
    assert found["engines"]["compressed"]["tolerance"] == 0.25


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compressed/model.onnx", "is not the file that parity.json judges"),
        ("engines/full.onnx", "is not the file that parity.json judges"),
        ("engines/full.layers.json", "is not what was built"),
    ],
)
def test_other_files_than_those_that_were_judged_make_no_bundle(
    name: str, words: str, miniature: Miniature, tmp_path: Path
) -> None:
    run = miniature.copy(tmp_path / "run", "bundle", "report")
    (run / name).write_bytes((run / name).read_bytes() + b"\0")
    outcome = polar("--recipe", run / "run.yaml", "--out", run, "--from", "bundle")
    assert outcome.code == 4
    assert f"{run / name} {words}" in outcome.err
    assert not (run / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        (("--set", "build.tf32=true"), "build"),
        (("--set", "build.batches=[1,4,16]"), "build"),
        (("--seed", "1"), "export"),
        (("--min-speedup", "0.4"), "parity"),
    ],
)
def test_settings_that_the_run_did_not_have_make_no_bundle(
    options: tuple[str, ...], stage: str, miniature: Miniature, tmp_path: Path
) -> None:
    run = miniature.copy(tmp_path / "run", "bundle", "report")
    outcome = polar("--recipe", miniature.folder / "run.yaml", "--out", run, *options, "--from", "bundle")
    assert outcome.code in (2, 4)
    assert f"--from {stage}" in outcome.err
    assert not (run / "bundle").exists()


def test_what_is_not_known_of_the_training_is_not_told(miniature: Miniature, tmp_path: Path) -> None:
    run = miniature.copy(tmp_path / "run", "bundle", "report")
    outcome = polar("--recipe", miniature.folder / "run.yaml", "--out", run, "--budget", "0.4", "--from", "bundle")
    assert outcome.code == 0, outcome.err
    told = manifest(run / "bundle")["provenance"]["settings"]
    assert not {"budget", "align", "gates", "training"} & told.keys()
    assert told["seed"] == 0


def test_the_bundle_of_an_earlier_verdict_is_gone(miniature: Miniature, tmp_path: Path) -> None:
    run = miniature.copy(tmp_path / "run")
    command = ("--recipe", miniature.folder / "run.yaml", "--out", run, "--min-speedup", "100")
    assert polar(*command, "--until", "parity").code == 1
    assert not (run / "bundle").exists()
    outcome = polar(*command, "--from", "report")
    assert "bundle verify" not in outcome.out
    assert json.loads((run / "report.json").read_text())["bundle"] is None


def test_the_report_and_the_last_line_tell_how_to_verify_it(miniature: Miniature, tmp_path: Path) -> None:
    outcome = again(miniature, tmp_path / "run")
    told = hashlib.sha256((tmp_path / "run/bundle/manifest.json").read_bytes()).hexdigest()
    assert outcome.out.endswith(f"  polar-deploy bundle verify bundle --manifest-sha256 {told}\n")
    sizes = [path.stat().st_size for path in (tmp_path / "run/bundle").rglob("*") if path.is_file()]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["bundle"] == {"manifest_sha256": told, "bytes": sum(sizes)}


@pytest.mark.parametrize("licence", ["\x1b[2J", "x" * 3000])
def test_a_licence_that_no_bundle_can_have_is_refused_at_once(licence: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model": "resnet20", "bundle": {"licence": licence}}))
    outcome = polar("--recipe", tmp_path / "recipe.yaml", "--data", "digits", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert "bundle.licence" in outcome.err
    assert not (tmp_path / "run").exists()


def test_where_few_images_validate_golden_samples_come_from_training(miniature: Miniature, tmp_path: Path) -> None:
    run = miniature.copy(tmp_path / "run", "bundle", "report")
    stored = dict(np.load(run / "gated/reference.npz"))
    np.savez(run / "gated/reference.npz", **{name: values[:5] for name, values in stored.items()})
    assert polar("--recipe", miniature.folder / "run.yaml", "--out", run, "--from", "bundle").code == 0
    inputs = np.load(run / "bundle/golden/inputs/input.npy")
    assert inputs.shape == (32, 3, 16, 16)
    assert len({image.tobytes() for image in inputs}) == 32


def test_an_engine_that_is_no_longer_right_makes_no_bundle(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polar_deploy.bundle import golden

    monkeypatch.setitem(golden.TOLERANCE, "fp32", -1.0)
    outcome: Any = again(miniature, tmp_path / "run")
    assert outcome.code == 4
    assert "is off by" in outcome.err
    assert not (tmp_path / "run/bundle").exists()


def test_the_page_in_the_bundle_is_for_its_readers(miniature: Miniature, folder: Path) -> None:
    """No picture of anybody's data, no command that takes the run; the run's own page has both."""
    delivered, own = ((place / "report.html").read_text() for place in (folder, miniature.folder))
    assert "bundle verify BUNDLE --manifest-sha256 HASH" in delivered
    assert "polar-deploy run" not in delivered
    assert "data:image" not in delivered
    assert "polar-deploy run" in own
    assert ("data:image" in own) == bool(json.loads((miniature.folder / "report.json").read_text())["worst_samples"])
