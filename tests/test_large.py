"""Networks that one file cannot hold: with a limit of 4 kB in place of 2 GB, from export to a bundle on the device.

A real one of more than 2 GB goes through the same code in the bar `large_bundle`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from polar_deploy import engines, onnx_files, targets
from polar_deploy.config import Build
from polar_deploy.errors import ContentError
from polar_deploy.precision.calibration import outputs
from polar_deploy.precision.rounding import computed_wide
from polar_deploy.surgery import detached
from polar_deploy.workspace import read_json
from tests.conftest import MINIATURE, contents, polar
from tests.support.bundle_commands import bundle, change, manifest, put
from tests.support.residual import constants, difference, images, residual, written

LIMIT = 4096  # bytes
ALL = [name for name, each in targets.TARGETS.items() if each.backend.name in ("ort", "ort-cuda", "ov", "trt")]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "MAX_MESSAGE", LIMIT)


def as_one(model: onnx.ModelProto) -> tuple[bytes, dict[str, Any]]:
    """A model without the order of its constants."""
    graph = onnx_files.without_weights(model)
    del graph.graph.initializer[:]
    return graph.SerializeToString(deterministic=True), {
        name: (str(value.dtype), value.tobytes()) for name, value in constants(model).items()
    }


def external(path: Path) -> set[str]:
    """Where the weights of an ONNX file lie."""
    tensors = onnx_files.read(path, external=False, check=False).graph.initializer if path.is_file() else ()
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def test_a_large_network_is_two_files_and_a_smaller_one_in_its_place_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a.onnx", tmp_path / "there/b.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(onnx_files, "MAX_MESSAGE", LIMIT)
        detached.save(residual(), path)
        detached.copy(path, other)
    assert onnx_files.with_data([path]) == [path, tmp_path / "a.onnx.data"]
    assert path.stat().st_size < 2 * LIMIT < (tmp_path / "a.onnx.data").stat().st_size
    detached.copy(path, tmp_path / "fits.onnx")
    assert onnx_files.with_data([tmp_path / "fits.onnx"]) == [tmp_path / "fits.onnx"]
    for each in (path, other):
        assert external(each) == {f"{each.name}.data"}
        assert as_one(onnx_files.read(each)) == as_one(residual())

    for write in (detached.save, lambda model, path: detached.save(detached.detach_weights(model), path)):
        write(residual(), path)
        assert onnx_files.with_data([path]) == [path]
        assert as_one(onnx_files.read(path)) == as_one(residual())
    detached.copy(path, other)
    assert onnx_files.with_data([other]) == [other]
    assert other.read_bytes() == path.read_bytes()


def test_weights_outside_of_the_models_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    onnx.save(residual(), tmp_path / "in/a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    model = onnx_files.read(tmp_path / "in/a.onnx", external=False, check=False)
    (tmp_path / "in/a.bin").rename(tmp_path / "a.bin")
    (tmp_path / "in/link.bin").symlink_to(tmp_path / "a.bin")
    for place in ("../a.bin", str(tmp_path / "a.bin"), "link.bin", "x/../../a.bin"):
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = place
        (tmp_path / "in/a.onnx").write_bytes(model.SerializeToString())
        for read in (onnx_files.read, detached.read):
            with pytest.raises(ContentError):
                read(tmp_path / "in/a.onnx")


@pytest.mark.parametrize("target", ALL)
def test_types_of_a_large_network_are_those_of_a_small_one(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = images(32) if target.endswith("int8") else None
    (tmp_path / "small").mkdir()
    small, said = written(residual(), target, tmp_path / "small", batch)
    monkeypatch.setattr(onnx_files, "MAX_MESSAGE", LIMIT)
    large, again = written(residual(), target, tmp_path, batch)
    assert said == again
    if target != "trt-int8":  # there it matters in which order ONNX Runtime writes two branches, which is another
        assert as_one(large)[1] == as_one(small)[1]
    found, expected = (outputs(computed_wide(each), {"input": images(4)}, tmp_path) for each in (large, small))
    assert difference(found["logits"], expected["logits"]) < (0.02 if target == "trt-int8" else 1e-6)
    assert (tmp_path / "typed.onnx.data").is_file() != target.endswith("fp32")  # FP32 is a copy of one file


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("target", ["ort-fp32", "ort-int8", "ov-fp32", "ov-int8", "rtx-fp32"])
def test_an_engine_of_a_large_network(target: str, tmp_path: Path) -> None:
    what = targets.parse(target)
    if lacks := targets.lacks_to_build(what):
        pytest.skip("; ".join(lacks))
    detached.save(residual(), tmp_path / "source.onnx")
    entry = engines.build(tmp_path / "source.onnx", tmp_path, "full", what, Build(), {"input": images(32)})
    assert "full.onnx.data" in entry.files
    engines.Built(schema=2, target=target, engines={"full": entry}).write(tmp_path / "build.json")
    if targets.lacks_to_run(what):
        return
    engine = engines.load(tmp_path, "full", what)
    assert np.isfinite(engine.infer({"input": images(4)})["logits"]).all()

    weights = bytearray((tmp_path / "full.onnx.data").read_bytes())
    weights[100] ^= 1
    (tmp_path / "full.onnx.data").write_bytes(weights)
    with pytest.raises(ContentError, match=r"full\.onnx\.data is not the file that was built"):
        engines.load(tmp_path, "full", what)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the miniature."""
    folder = tmp_path_factory.mktemp("large") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "MAX_MESSAGE", LIMIT)
        outcome = polar(*MINIATURE, "--out", folder, "--target", "ort-int8", "--set", "accept.accuracy_rule=point")
    assert outcome.code in (0, 5), outcome.err  # a busy machine may be too noisy to decide about latency
    return folder


def test_a_run(run: Path) -> None:
    for name in ("full/model", "gated/model", "compressed/model", "engines/full", "engines/compressed"):
        path = run / f"{name}.onnx"
        assert external(path) == {f"{path.name}.data"}, name
    assert {"full/model.onnx.data", "engines/full.onnx.data"} <= read_json(run / "parity.json")["files"].keys()
    document = manifest(run / "bundle")
    assert document["networks"]["compressed"]["fp32_data"] == "compressed/model.onnx.data"
    assert document["networks"]["full"]["typed_data"] == "engines/full.onnx.data"
    assert document["files"]["engines/full.onnx.data"]["bytes"] == (run / "engines/full.onnx.data").stat().st_size
    report = read_json(run / "report.json")
    assert report["bytes"]["full"] == sum((run / f"engines/full.onnx{end}").stat().st_size for end in ("", ".data"))


def test_weights_that_changed_make_the_stages_behind_run_again(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    assert polar(*MINIATURE, "--out", folder, "--target", "ort-int8", "--until", "surgery").ran == []
    (folder / "gated/model.onnx.data").write_bytes(b"\0" + (folder / "gated/model.onnx.data").read_bytes()[1:])
    assert "export" in polar(*MINIATURE, "--out", folder, "--target", "ort-int8", "--until", "surgery").ran


@pytest.mark.usefixtures("limited")
def test_its_bundle(run: Path, tmp_path: Path) -> None:
    folder, archive = run / "bundle", tmp_path / "b.zip"
    assert bundle("verify", folder, "--no-timing").code == 0
    assert bundle("archive", folder, archive).code == 0
    assert bundle("verify", archive, "--no-timing").code == 0
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    assert bundle("run", folder, tmp_path / "a.png").code == 0
    for backend in ((), ("--backend", "onnxruntime")):
        assert bundle("triton", folder, tmp_path / "models", "--name", "m", *backend).code == 0
        served = tmp_path / "models/m/1/model.onnx"
        assert external(served) == {"model.onnx.data"}
        assert as_one(onnx_files.read(served)) == as_one(onnx_files.read(folder / "engines/compressed.onnx"))


def referring(to: str) -> Callable[[Path], None]:
    """The graph looks for its weights elsewhere."""

    def changed(folder: Path) -> None:
        model = onnx_files.read(folder / "compressed/model.onnx", external=False, check=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = to
        put(folder, "compressed/model.onnx", model.SerializeToString())

    return changed


def shortened(folder: Path) -> None:
    name = "compressed/model.onnx.data"
    put(folder, name, (folder / name).read_bytes()[:-1])


def unnamed(folder: Path) -> None:
    change(folder, "networks", "compressed", "fp32_data", to=None)


def named_elsewhere(folder: Path) -> None:
    change(folder, "networks", "compressed", "fp32_data", to="full/model.onnx.data")


def whole(folder: Path) -> None:
    """All weights lie in the graph, and beside it."""
    put(folder, "compressed/model.onnx", onnx_files.read(folder / "compressed/model.onnx").SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (referring("../full/model.onnx.data"), "in another file"),
        (referring("/etc/hostname"), "in another file"),
        (referring("./model.onnx.data"), "in another file"),
        (referring("other.data"), "in another file"),
        (shortened, "is damaged"),
        (unnamed, "which nothing else names"),
        (named_elsewhere, "not in compressed/model.onnx.data"),
        (whole, "has no weights in compressed/model.onnx.data"),
    ],
)
def test_hostile_weights(spoil: Callable[[Path], None], says: str, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "bundle", tmp_path / "bundle"))
    spoil(folder)
    before = contents(folder)
    outcome = bundle("verify", folder, "--no-timing")
    assert outcome.code == 4, outcome.err
    assert says in outcome.err
    assert contents(folder) == before
