"""The model repository for Triton: its configuration is read by Triton's own definition of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format

from polar_deploy.bundle.read import read
from polar_deploy.targets import TARGETS
from tests.conftest import Outcome, contents
from tests.support.bundle_commands import bundle
from tests.support.bundles import LABELS, PLAN, write_bundle

IMAGE = {"data_type": "TYPE_FP32", "dims": ["3", "8", "8"]}
NATIVE = {"input": {"dtype": "fp16"}, "output": {"dtype": "fp16"}}


@cache
def definition() -> Any:
    """model_config_pb2 of NVIDIA's client; importing its package as a whole would take gRPC."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None, "pip install tritonclient"
    assert package.origin is not None
    path = Path(package.origin).parent / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(place: Path) -> dict[str, Any]:
    """A model's configuration as Triton reads it; fields that are not set are left out."""
    text = (place / "config.pbtxt").read_text(encoding="utf-8")
    message = text_format.Parse(text, definition().ModelConfig())
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def written(tmp_path: Path, target: str, *options: str, **changes: Any) -> Path:
    """Write the model of a bundle for `target`; its folder."""
    outcome = triton(tmp_path, target, *options, **changes)
    assert (outcome.code, outcome.err) == (0, "")
    (place,) = (tmp_path / "models").iterdir()
    return place


WITH_TF32 = {"build": {"tf32": True}, "networks": {name: {"tf32": True} for name in ("compressed", "full")}}
TWO_AT_LEAST = {"build": {"batches": [2, 8, 64]}, "verdict": {"asked": {"batch": 2}}}


def triton(tmp_path: Path, target: str, *options: object, **changes: Any) -> Outcome:
    folder = tmp_path / "bundle"
    if not folder.exists():
        write_bundle(folder, target, **changes)
    return bundle("triton", folder, tmp_path / "models", *options)


@pytest.mark.parametrize("target", TARGETS)
def test_the_bundles_of_these_tests_are_valid(tmp_path: Path, target: str) -> None:
    found = read(write_bundle(tmp_path / "bundle", target))
    assert (found.manifest.target, tuple(found.labels), set(found.outputs)) == (target, LABELS, {"compressed", "full"})


# --------------------------------------------------------------------------- what is written


def test_a_graph_for_the_cpu(tmp_path: Path) -> None:
    place = written(tmp_path, "ort-fp32")
    assert config(place) == {
        "name": "net-pictures",
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        "version_policy": {"all": {}},
        "max_batch_size": 64,
        "input": [{"name": "input", **IMAGE}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["6"], "label_filename": "labels.txt"}],
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {"intra_op_thread_count": {"string_value": "1"}},
        "dynamic_batching": {"preferred_batch_size": [8, 64], "max_queue_delay_microseconds": "100"},
        "model_warmup": [
            {"name": "batch 1", "batch_size": 1, "inputs": {"input": {**IMAGE, "random_data": True}}},
            {"name": "batch 8", "batch_size": 8, "inputs": {"input": {**IMAGE, "random_data": True}}},
        ],
    }
    assert set(contents(place)) == {"config.pbtxt", "labels.txt", "1/model.onnx"}
    assert (place / "labels.txt").read_text(encoding="utf-8") == 'cat\ndog\nthe "owl"\nFüchse\nhen\nnewt\n'
    same_bytes(place / "1/model.onnx", tmp_path / "bundle/compressed/model.onnx")


def test_a_plan(tmp_path: Path) -> None:
    place = written(tmp_path, "trt-fp16", "--trust-plan")
    assert config(place) == {
        "name": "net-pictures",
        "backend": "tensorrt",
        "default_model_filename": "model.plan",
        "version_policy": {"all": {}},
        "max_batch_size": 64,
        "input": [{"name": "input", **IMAGE}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["6"], "label_filename": "labels.txt"}],
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "dynamic_batching": {"preferred_batch_size": [8, 64], "max_queue_delay_microseconds": "100"},
        "model_warmup": [
            {"name": "batch 1", "batch_size": 1, "inputs": {"input": {**IMAGE, "random_data": True}}},
            {"name": "batch 8", "batch_size": 8, "inputs": {"input": {**IMAGE, "random_data": True}}},
        ],
    }
    assert set(contents(place)) == {"config.pbtxt", "labels.txt", "1/model.plan"}
    assert (place / "1/model.plan").read_bytes() == PLAN + b"compressed"


def test_a_typed_graph_for_the_gpu_runs_as_it_was_measured(tmp_path: Path) -> None:
    place = written(tmp_path, "ort-cuda-fp16", **NATIVE)
    found = config(place)
    assert found["input"][0]["data_type"] == found["output"][0]["data_type"] == "TYPE_FP16"
    assert found["model_warmup"][0]["inputs"]["input"]["data_type"] == "TYPE_FP16"
    assert found["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    accelerator = {"name": "cuda", "parameters": {"use_tf32": "0"}}  # on by default
    assert found["optimization"] == {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}
    assert "parameters" not in found
    same_bytes(place / "1/model.onnx", tmp_path / "bundle/engines/compressed.onnx")


def test_threads_and_tf32_are_those_of_the_engine(tmp_path: Path) -> None:
    cpu = written(tmp_path / "cpu", "ort-int8", networks={"compressed": {"threads": 3}})
    assert config(cpu)["parameters"] == {"intra_op_thread_count": {"string_value": "3"}}
    gpu = written(tmp_path / "gpu", "ort-cuda-fp32", **WITH_TF32)
    (accelerator,) = config(gpu)["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
    assert accelerator["parameters"] == {"use_tf32": "1"}


def test_a_typed_graph_for_openvino(tmp_path: Path) -> None:
    outcome = triton(tmp_path, "ov-int8", networks={"compressed": {"threads": 2}})
    place = tmp_path / "models/net-pictures"
    found = config(place)
    assert (found["backend"], found["default_model_filename"]) == ("openvino", "model.onnx")
    assert found["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    told = {key: value["string_value"] for key, value in found["parameters"].items()}
    assert told == {"INFERENCE_NUM_THREADS": "2", "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    same_bytes(place / "1/model.onnx", tmp_path / "bundle/engines/compressed.onnx")
    assert "it computes FP32 layers in BF16; --backend onnxruntime serves FP32 as such\n" in outcome.out


def test_bf16_is_what_triton_s_openvino_computes_in(tmp_path: Path) -> None:
    assert "cannot be told" not in triton(tmp_path, "ov-bf16").out


def test_onnx_runtime_serves_the_fp32_graph_of_openvino_s_bundle_on_the_cpu(tmp_path: Path) -> None:
    place = written(tmp_path, "ov-bf16", "--backend", "onnxruntime")
    assert config(place)["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    same_bytes(place / "1/model.onnx", tmp_path / "bundle/compressed/model.onnx")


@pytest.mark.parametrize("target", ["trt-fp16", "rtx-fp16"])
def test_onnx_runtime_serves_the_fp32_graph_of_a_bundle_with_plans(tmp_path: Path, target: str) -> None:
    outcome = triton(tmp_path, target, "--backend", "onnxruntime", **NATIVE)  # untrusted: a graph is no code
    assert outcome.code == 0
    assert f"it is compressed/model.onnx: in FP32, not in the {target} of" in outcome.out
    found = config(tmp_path / "models/net-pictures")
    assert found["input"][0]["data_type"] == found["output"][0]["data_type"] == "TYPE_FP32"
    assert found["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    same_bytes(tmp_path / "models/net-pictures/1/model.onnx", tmp_path / "bundle/compressed/model.onnx")


def test_types_of_a_plan_are_the_manifest_s(tmp_path: Path) -> None:
    found = config(written(tmp_path, "trt-bf16", "--trust-plan", input={"dtype": "bf16"}))
    assert (found["input"][0]["data_type"], found["output"][0]["data_type"]) == ("TYPE_BF16", "TYPE_FP32")


@pytest.mark.parametrize(
    ("batches", "preferred", "warm"),
    [([1, 1, 1], None, [1]), ([1, 1, 16], [16], [1]), ([1, 4, 4], [4], [1, 4]), ([1, 4, 32], [4, 32], [1, 4])],
)
def test_batches(tmp_path: Path, batches: list[int], preferred: list[int] | None, warm: list[int]) -> None:
    found = config(written(tmp_path, "trt-fp32", "--trust-plan", build={"batches": batches}))
    assert found["max_batch_size"] == batches[2]
    assert found.get("dynamic_batching", {}).get("preferred_batch_size") == preferred
    assert [each["batch_size"] for each in found["model_warmup"]] == warm


def test_the_full_network_is_another_model(tmp_path: Path) -> None:
    triton(tmp_path, "ort-fp32")
    assert triton(tmp_path, "ort-fp32", "--network", "full").code == 0
    assert config(tmp_path / "models/net-pictures_full")["name"] == "net-pictures_full"
    same_bytes(tmp_path / "models/net-pictures_full/1/model.onnx", tmp_path / "bundle/full/model.onnx")
    same_bytes(tmp_path / "models/net-pictures/1/model.onnx", tmp_path / "bundle/compressed/model.onnx")


def test_what_a_plan_needs_is_told(tmp_path: Path) -> None:
    plan = {"version_compatible": True, "hardware_compatible": True, "gpu": None, "capabilities": ["8.6", "8.9"]}
    exact = triton(tmp_path / "a", "trt-fp16", "--trust-plan").out
    assert "a Triton whose TensorRT is 10.13.3.9, on NVIDIA L4 (compute capability 8.9)\n" in exact
    wide = triton(tmp_path / "b", "trt-fp16", "--trust-plan", networks={"compressed": {"plan": plan}}).out
    assert "TensorRT is 10.13.3.9 or a later 10, on a GPU (compute capability 8.6 or 8.9 or later)\n" in wide
    assert "--backend-config=tensorrt,version-compatible=true\n" in wide


def test_an_archive_will_do(tmp_path: Path) -> None:
    file = tmp_path / "net.zip"
    bundle("archive", write_bundle(tmp_path / "bundle"), file)
    assert bundle("triton", file, tmp_path / "models").code == 0
    same_bytes(tmp_path / "models/net-pictures/1/model.onnx", tmp_path / "bundle/compressed/model.onnx")


@pytest.mark.parametrize(
    "name", ['"', "'", "\\", '\\"', 'a" } input { name: "b', "# {", r"\x41\n\u0041", "Größe 🖼", "?"]
)
def test_names_of_edges_are_quoted(tmp_path: Path, name: str) -> None:
    found = config(written(tmp_path, "ort-fp32", input={"name": name}, output={"name": f"{name}'"}))
    assert [each["name"] for each in found["input"]] == [name]
    assert [each["name"] for each in found["output"]] == [f"{name}'"]
    assert [list(each["inputs"]) for each in found["model_warmup"]] == [[name], [name]]


# --------------------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "untrusted": ("trt-fp16", {}, (), "the plan is not trusted"),
    "RTX": ("rtx-fp16", {}, ("--trust-plan",), "Triton has no backend for TensorRT for RTX"),
    "RTX as TensorRT": ("rtx-fp16", {}, ("--backend", "tensorrt", "--trust-plan"), "no backend for TensorRT for RTX"),
    "a plan of ORT": ("ort-fp32", {}, ("--backend", "tensorrt", "--trust-plan"), "ort-fp32 has no plan"),
    "OpenVINO's graph of ORT": ("ort-int8", {}, ("--backend", "openvino"), "ort-int8 has no graph for OpenVINO"),
    "no full network": ("ort-fp32", {"full": False}, ("--network", "full"), "has no full network"),
    "batches of 2": ("trt-fp16", TWO_AT_LEAST, ("--trust-plan",), "takes 2 images or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    target, changes, options, words = REFUSED[case]
    refused(triton(tmp_path, target, *options, **changes), words, tmp_path)


def test_a_graph_takes_single_images_whatever_the_plan_does(tmp_path: Path) -> None:
    place = written(tmp_path, "trt-fp16", "--backend", "onnxruntime", **TWO_AT_LEAST)
    assert config(place)["max_batch_size"] == 64


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../net", "a/b", "/net", ".net", "-net", 'a"', "a\n", "a b", "x" * 201]
)
def test_a_name_that_is_a_path_or_worse(tmp_path: Path, name: str) -> None:
    refused(triton(tmp_path, "ort-fp32", f"--name={name}"), "is no name for a model", tmp_path)


def test_only_the_right_sha256_makes_a_plan_trusted(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", "trt-fp16")
    right = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for options in ((), ("--backend", "onnxruntime")):
        refused(triton(tmp_path, "", "--manifest-sha256", "0" * 64, *options), right, tmp_path, code=4)
    assert triton(tmp_path, "", "--manifest-sha256", right).code == 0


def test_not_into_the_bundle(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    before = contents(folder)
    refused(bundle("triton", folder, folder / "models"), "lies in the bundle", tmp_path)
    assert contents(folder) == before


# --------------------------------------------------------------------------- engines that were built here


def rebuilt(tmp_path: Path, **changes: Any) -> Path:
    """What `verify --rebuild --engines` leaves, as far as it concerns Triton."""
    manifest = write_bundle(tmp_path / "bundle", "trt-fp16") / "manifest.json"
    plan = {
        "file": "compressed.plan",
        "library": "TensorRT",
        "version": "10.14.1.48",
        "gpu": "Orin",
        "capabilities": ["8.7"],
        "version_compatible": False,
        "hardware_compatible": False,
        **dict.fromkeys(("cuda", "driver", "timing_cache", "trtexec")),
        "profile": {"min": 1, "opt": 8, "max": 64},
    }
    files = {"compressed.plan": {"bytes": 5, "sha256": hashlib.sha256(b"built").hexdigest()}}
    types = {"io_dtype": "fp32", "types": {"fp16": 1}, "high_precision_layers": [], "calibration": None}
    entry = {
        "backend": "trt",
        "provider": "TensorRT",
        "tf32": False,
        "versions": {"TensorRT": "10.14.1.48"},
        "precision": {"asked": "fp16", "found": {"fp16": 1}, **types},
        "macs": 1,
        "params": 1,
        "seconds": 1.0,
        "files": files,
        "plan": plan,
    }
    document = {
        "schema": 2,
        "target": "trt-fp16",
        "bundle": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "engines": {"compressed": entry},
    }
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "compressed.plan").write_bytes(b"built")
    (folder / "build.json").write_text(json.dumps(document | changes))
    return folder


def test_a_plan_that_was_built_here_needs_no_trust(tmp_path: Path) -> None:
    outcome = triton(tmp_path, "", "--engines", rebuilt(tmp_path))
    assert outcome.code == 0
    assert "TensorRT is 10.14.1.48, on Orin (compute capability 8.7)" in outcome.out
    assert (tmp_path / "models/net-pictures/1/model.plan").read_bytes() == b"built"


@pytest.mark.parametrize(
    ("changes", "words", "code"),
    [
        ({"bundle": "0" * 64}, "has engines of another bundle", 2),
        ({"engines": {}}, "does not list engines of a bundle", 4),
        ({"engines": {"compressed": {"files": {}, "plan": {}}}}, "does not list engines of a bundle", 4),
        ({"engines": {"compressed": {"files": {"compressed.plan": {"sha256": "1"}}, "plan": {}}}}, "not list", 4),
        ({"engines": 7}, "does not list engines of a bundle", 4),
    ],
)
def test_engines_of_something_else(tmp_path: Path, changes: dict[str, Any], words: str, code: int) -> None:
    refused(triton(tmp_path, "", "--engines", rebuilt(tmp_path, **changes)), words, tmp_path, code=code)


def test_engines_that_were_changed_or_are_gone(tmp_path: Path) -> None:
    folder = rebuilt(tmp_path)
    (folder / "compressed.plan").write_bytes(b"other")
    refused(triton(tmp_path, "", "--engines", folder), "is not the file that was built", tmp_path, code=4)
    (folder / "compressed.plan").unlink()
    refused(triton(tmp_path, "", "--engines", folder), "cannot read", tmp_path)
    (folder / "build.json").unlink()
    refused(triton(tmp_path, "", "--engines", folder), "cannot read", tmp_path)


def test_onnx_runtime_takes_no_engines(tmp_path: Path) -> None:
    options = ("--engines", rebuilt(tmp_path), "--backend", "onnxruntime")
    refused(triton(tmp_path, "", *options), "ONNX Runtime does not serve", tmp_path)


# --------------------------------------------------------------------------- what lies there already


def test_the_same_bundle_again_gives_the_same_bytes(tmp_path: Path) -> None:
    place = written(tmp_path, "ort-fp32")
    before = contents(place)
    assert triton(tmp_path, "ort-fp32").code == 0
    assert contents(place) == before


def test_a_model_of_ours_is_replaced(tmp_path: Path) -> None:
    place = written(tmp_path, "trt-fp16", "--trust-plan")
    assert triton(tmp_path, "", "--backend", "onnxruntime").code == 0
    assert set(contents(place)) == {"config.pbtxt", "labels.txt", "1/model.onnx"}
    assert config(place)["backend"] == "onnxruntime"
    (tmp_path / "models/empty").mkdir()
    assert triton(tmp_path, "", "--trust-plan", "--name", "empty").code == 0


def test_versions_of_a_model_lie_side_by_side(tmp_path: Path) -> None:
    place = written(tmp_path, "ort-fp32", "--name", "m")
    assert triton(tmp_path, "", "--name", "m", "--version", "12", "--network", "full").code == 0
    assert triton(tmp_path, "", "--name", "m", "--version", "2").code == 0
    versions = {"1/model.onnx": "compressed", "2/model.onnx": "compressed", "12/model.onnx": "full"}
    assert set(contents(place)) == {"config.pbtxt", "labels.txt", *versions}
    for file, network in versions.items():
        same_bytes(place / file, tmp_path / f"bundle/{network}/model.onnx")
    sha256 = hashlib.sha256((tmp_path / "bundle/manifest.json").read_bytes()).hexdigest()
    told = (place / "config.pbtxt").read_text(encoding="utf-8").splitlines()[1:4]
    assert told == [f"#   {version}: {sha256}" for version in (1, 2, 12)]
    assert config(place)["version_policy"] == {"all": {}}

    before = contents(place)
    write_bundle(tmp_path / "other", "ort-fp32", build={"batches": [1, 4, 16]})
    outcome = bundle("triton", tmp_path / "other", tmp_path / "models", "--name", "m", "--version", "3")
    assert outcome.code == 2
    assert "is a model with another configuration, or other labels" in outcome.err
    assert contents(place) == before
    assert triton(tmp_path, "", "--name", "m", "--version", "0").code == 2


def a_version_more(place: Path) -> None:
    (place / "2").mkdir()
    (place / "2/model.onnx").write_bytes(b"theirs")


def a_link(place: Path) -> None:
    (place / "labels.txt").unlink()
    (place / "labels.txt").symlink_to("/etc/passwd")


def a_model_that_triton_configures(place: Path) -> None:
    (place / "config.pbtxt").unlink()


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file more": (lambda place: (place / "notes.txt").write_text("theirs"), "notes.txt"),
    "a version more": (a_version_more, "2"),
    "an empty version": (lambda place: (place / "2").mkdir(), "2"),
    "a link": (a_link, "labels.txt"),
    "no configuration": (a_model_that_triton_configures, "1"),
    "their configuration": (lambda place: (place / "config.pbtxt").write_text('backend: "onnxruntime"'), "1"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_wrote_stays_as_it_is(tmp_path: Path, case: str) -> None:
    place = written(tmp_path, "ort-fp32")
    change, named = FOREIGN[case]
    change(place)
    before = sorted((path, path.is_symlink() or path.is_dir() or path.read_bytes()) for path in place.rglob("*"))
    outcome = triton(tmp_path, "ort-fp32")
    assert outcome.code == 2
    assert f"net-pictures has '{named}', which `bundle triton` did not write" in outcome.err
    after = sorted((path, path.is_symlink() or path.is_dir() or path.read_bytes()) for path in place.rglob("*"))
    assert after == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["net-pictures"]


def test_a_file_in_the_place_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/net-pictures").write_text("theirs")
    outcome = triton(tmp_path, "ort-fp32")
    assert (outcome.code, (tmp_path / "models/net-pictures").read_text()) == (2, "theirs")
    assert "is not a folder" in outcome.err


def same_bytes(one: Path, other: Path) -> None:
    assert one.read_bytes() == other.read_bytes()


def refused(outcome: Outcome, words: str, tmp_path: Path, code: int = 2) -> None:
    """One error with its way out, and nothing written."""
    assert (outcome.code, outcome.out) == (code, "")
    assert words in outcome.err
    assert outcome.err.startswith("error: ")
    assert "\n  what to do: " in outcome.err
    assert not (tmp_path / "models").exists()
