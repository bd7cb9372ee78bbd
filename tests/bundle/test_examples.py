"""The examples for those who run a bundle without polar_deploy: every line runs, and the figures are right."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polar_deploy.data import LazyImages, normalise
from tests.conftest import ROOT
from tests.support import fake_gpu
from tests.support.bundle_commands import put
from tests.support.bundles import LABELS, logits, write_bundle

ORT, TENSORRT = (ROOT / f"docs/examples/classify_{name}.py" for name in ("onnxruntime", "tensorrt"))
MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
GENTLE = [50.0, 60.0, 70.0]  # a std that keeps the fake GPU's logits, sums over the picture, small
# mode, width and height; what resizing to 11 pixels on the shorter side gives; corner of the 8 x 8 pixels in the centre
PICTURES = {
    "wide.png": ("RGB", (40, 17), (25, 11), (8, 2)),
    "high.bmp": ("RGB", (13, 29), (11, 24), (2, 8)),
    "exact.png": ("RGBA", (11, 11), (11, 11), (2, 2)),
    "tiny grey.png": ("L", (3, 4), (11, 14), (2, 3)),
}
EDGES: dict[str, Any] = {"input": {"name": "images"}, "output": {"name": "logits"}}
PROFILE: dict[str, Any] = {"networks": {"compressed": {"plan": {"profile": {"min": 2, "opt": 3, "max": 5}}}}}

Answer = dict[str, list[tuple[str, float]]]  # picture -> (label, percent), the likeliest first


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """A picture of each kind, each of another colour."""
    rng = np.random.default_rng(5)
    for name, (mode, (width, height), _, _) in PICTURES.items():
        colour = rng.integers(0, 256, 3) * 0.7 + rng.integers(0, 77, (height, width, 3))
        Image.fromarray(colour.astype(np.uint8)).convert(mode).save(tmp_path / name)
    return [str(tmp_path / name) for name in PICTURES]


def prepared(paths: list[str], mean: Any = MEAN, std: Any = STD) -> np.ndarray:
    """The pictures as the bundle's manifest says they are prepared, step by step."""
    rows = []
    for path, (_, _, size, (left, top)) in zip(paths, PICTURES.values(), strict=True):
        picture = Image.open(path).convert("RGB")
        picture = picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, np.float64)[top : top + 8, left : left + 8] / 255
        rows.append(((pixels - mean) / std).transpose(2, 0, 1))
    return np.stack(rows).astype(np.float32)


def answered(text: str) -> Answer:
    """What an example printed."""
    found: Answer = {}
    for line in text.splitlines():
        if guess := re.fullmatch(r" +(\d+\.\d\d) %  (.*)", line):
            found[list(found)[-1]].append((guess[2], float(guess[1])))
        else:
            found[line] = []
    return found


def require_right(found: Answer, paths: list[str], wanted: np.ndarray) -> None:
    """The five likeliest labels in order, each with its percentage; the test's pictures are not all alike."""
    assert list(found) == paths
    shares = np.exp(wanted - wanted.max(axis=1, keepdims=True), dtype=np.float64)
    percent = 100 * shares / shares.sum(axis=1, keepdims=True)
    for path, row in zip(paths, percent, strict=True):
        best = sorted(range(len(LABELS)), key=lambda index: -row[index])[:5]
        assert [share for _, share in found[path]] == pytest.approx([row[index] for index in best], abs=0.006)
        assert found[path][0][0] == LABELS[best[0]]
        assert dict(found[path]) == pytest.approx({LABELS[index]: row[index] for index in best}, abs=0.006)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.Cuda:
    """A GPU of NumPy, as modules that the example imports."""
    cuda = fake_gpu.Cuda()
    trt: Any = fake_gpu.Trt(cuda)
    trt.__version__ = "10.9.0.34"
    trt.Logger = lambda level: {"warning": trt.logger}[level]
    trt.Logger.WARNING = "warning"
    bindings = SimpleNamespace(runtime=cuda)
    modules = {"tensorrt": trt, "cuda": SimpleNamespace(bindings=bindings), "cuda.bindings": bindings}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return cuda


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run a script in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


# --------------------------------------------------------------------------- both


@pytest.mark.parametrize("script", [ORT, TENSORRT], ids=lambda script: script.stem)
def test_pictures_are_prepared_as_polar_deploy_does(script: Path, pictures: list[str], gpu: fake_gpu.Cuda) -> None:
    prepare = runpy.run_path(str(script), run_name="example")["prepare"]
    made = {"shorter_side": 11, "crop": 8, "scale": 1 / 255, "mean": MEAN.tolist(), "std": STD.tolist()}
    found = np.stack([prepare(path, made) for path in pictures])
    lazy = LazyImages(Path(), np.array(pictures, dtype=object), 11, 8)[np.arange(len(pictures))]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, normalise(lazy, tuple(MEAN), tuple(STD)))
    np.testing.assert_allclose(found, prepared(pictures), atol=1e-6)


@pytest.mark.parametrize("script", [ORT, TENSORRT], ids=lambda script: script.stem)
def test_they_stand_alone_and_say_how_they_are_called(
    script: Path, gpu: fake_gpu.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not re.search(r"^\s*(import|from) (polar_deploy|torch|tests)", script.read_text(encoding="utf-8"), re.M)
    with pytest.raises(SystemExit, match=f"python {script.name} BUNDLE picture.jpg"):
        run(script, monkeypatch, "bundle")


# --------------------------------------------------------------------------- ONNX Runtime


def test_onnx_runtime_as_a_program(tmp_path: Path, pictures: list[str]) -> None:
    folder = write_bundle(tmp_path / "bundle")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": ""}
    command = [sys.executable, str(ORT), str(folder), *pictures]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = logits(folder / "compressed/model.onnx", prepared(pictures))
    assert len(set(wanted.argmax(axis=1))) > 1, "pictures that are all alike prove little"
    require_right(answered(done.stdout), pictures, wanted)


@pytest.mark.parametrize(
    ("target", "graph"),
    [
        ("ort-int8", "engines/compressed.onnx"),
        ("ort-cuda-fp16", "engines/compressed.onnx"),
        ("trt-fp16", "compressed/model.onnx"),
        ("rtx-int8", "compressed/model.onnx"),
    ],
)
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_the_graph_that_suits_onnx_runtime(
    target: str,
    graph: str,
    tmp_path: Path,
    pictures: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind = np.float16 if target.endswith("fp16") else np.float32
    native: dict[str, Any] = {"input": {"dtype": "fp16"}, "output": {"dtype": "fp16"}} if kind is np.float16 else {}
    folder = write_bundle(tmp_path / "bundle", target, **native)
    run(ORT, monkeypatch, folder, *pictures)
    images = prepared(pictures)
    typed = images.astype(kind) if graph.startswith("engines") else images
    require_right(answered(capsys.readouterr().out), pictures, logits(folder / graph, typed))


# --------------------------------------------------------------------------- TensorRT


def trt_bundle(folder: Path, target: str = "trt-fp16", plan: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A bundle whose plan the fake TensorRT takes."""
    write_bundle(folder, target, **(EDGES | changes))
    made = fake_gpu.plan(folder.with_suffix(".plan"), **{"shape": [3, 8, 8], "classes": 6, **(plan or {})})
    if (folder / "engines/compressed.plan").exists():
        put(folder, "engines/compressed.plan", made.read_bytes())
    return folder


def test_tensorrt(
    tmp_path: Path,
    pictures: list[str],
    gpu: fake_gpu.Cuda,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trt_bundle(tmp_path / "bundle", preprocessing={"std": GENTLE}, **PROFILE)  # 4 pictures: batches of 3 and 1
    run(TENSORRT, monkeypatch, folder, *pictures)
    sums = prepared(pictures, std=np.array(GENTLE)).sum(axis=(1, 2, 3), dtype=np.float64)
    wanted = sums[:, None] * np.arange(1, 7)  # what the fake GPU computes
    assert len(set(wanted.argmax(axis=1))) > 1, "pictures that are all alike prove little"
    require_right(answered(capsys.readouterr().out), pictures, wanted)
    assert gpu.blocks == {"device": {}, "host": {}}
    assert gpu.log[-5:] == ["device", "host", "device", "host", "stream"]
    assert "context" in gpu.log[:-5]  # freed before the memory that it uses


def broken(function: str) -> Callable[[fake_gpu.Cuda], None]:
    return lambda gpu: gpu.broken.update({function: fake_gpu.Error.cudaErrorIllegalAddress})


def no_memory(gpu: fake_gpu.Cuda) -> None:
    gpu.memory = 1000


ENDS: dict[str, tuple[dict[str, Any], Callable[[fake_gpu.Cuda], None] | None, str]] = {
    "no plan": ({"target": "ort-fp32"}, None, "for ort-fp32: it has no plan of TensorRT"),
    "a plan of RTX": ({"target": "rtx-fp16"}, None, "for rtx-fp16: it has no plan of TensorRT"),
    "FP16 inputs": ({"input": {"name": "images", "dtype": "fp16"}}, None, "input and output are fp16 and fp32"),
    "another version": ({}, None, "TensorRT 10.9.0.34 does not take .* for 10.13.3.9 on "),
    "no context": ({"plan": {"contextless": True}}, None, "makes no context"),
    "other names": ({"input": {"name": "pixels"}}, None, "not what the manifest says"),
    "other batches": ({"plan": {"profile": [9, 9, 9]}}, None, "not what the manifest says"),
    "does not run": ({"plan": {"fails": True}}, None, "does not run the plan"),
    "no memory": ({}, no_memory, "CUDA: out of memory"),
    "no GPU": ({}, broken("cudaStreamCreateWithFlags"), "CUDA: an illegal memory access"),
    "a copy fails": ({}, broken("cudaMemcpyAsync"), "CUDA: an illegal memory access"),
    "a late error": ({}, broken("cudaStreamSynchronize"), "CUDA: an illegal memory access"),
}


@pytest.mark.parametrize("case", ENDS)
def test_tensorrt_ends_with_a_sentence(
    case: str, tmp_path: Path, pictures: list[str], gpu: fake_gpu.Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, spoil, words = ENDS[case]
    folder = trt_bundle(tmp_path / "bundle", **(PROFILE if changes.get("target") is None else {}), **changes)
    if case == "another version":
        put(folder, "engines/compressed.plan", b"made by another version")
    if spoil:
        spoil(gpu)
    with pytest.raises(SystemExit, match=words):
        run(TENSORRT, monkeypatch, folder, *pictures)
    assert gpu.blocks == {"device": {}, "host": {}}
