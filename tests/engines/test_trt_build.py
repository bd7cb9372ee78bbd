"""Plans from typed graphs, by the real TensorRT for RTX, which builds without a GPU; TensorRT itself does not."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy import engines, gpu, targets
from polar_deploy.config import Build
from polar_deploy.documents.build import Built, Plan
from polar_deploy.engines import child, trt
from polar_deploy.engines.base import Made
from polar_deploy.engines.trt import builder, library, require_plan_fits
from polar_deploy.errors import ContentError, MachineError, PolarDeployError, UsageError
from polar_deploy.workspace import write_json
from tests.support.classifiers import classifier, model, saved
from tests.support.schemas import valid

RTX = targets.parse("rtx-fp32")
pytestmark = [  # polygraphy keeps a timing cache, which TensorRT for RTX takes but does not fill
    pytest.mark.filterwarnings(f"ignore::DeprecationWarning:{module}") for module in ("polygraphy", "tensorrt_rtx")
]
needs_rtx = pytest.mark.skipif(bool(targets.lacks_to_build(RTX)), reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One engine, built in a child process as the run does it."""
    folder = tmp_path_factory.mktemp("built")
    source = saved(classifier(16), folder / "a.onnx")
    return folder / "engines", engines.build(
        source, folder / "engines", "full", RTX, Build(batches=(2, 4, 16))
    ).as_json()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build without a child, which takes most of a second; polygraphy needs the variable when it is imported."""
    monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
    monkeypatch.setattr(child, "call", lambda function, request, what: builder.run(request))


@needs_rtx
def test_engine_is_described(built: tuple[Path, dict[str, Any]]) -> None:
    folder, entry = built
    version = library.version(library.of(RTX))
    assert len(version.split(".")) == 4
    assert {path.name for path in folder.iterdir()} == {"full.onnx", "full.plan", "full.layers.json"}
    assert set(entry["files"]) == {"full.onnx", "full.plan", "full.layers.json"}
    assert (entry["backend"], entry["provider"], entry["tf32"]) == ("rtx", "TensorRT for RTX", False)
    assert entry["versions"]["TensorRT for RTX"] == version
    plan = entry["plan"]
    assert (plan["file"], plan["version"], plan["timing_cache"]) == ("full.plan", version, None)
    assert plan["profile"] == {"min": 2, "opt": 4, "max": 16}
    assert "8.9" in plan["capabilities"]
    assert not plan["version_compatible"]
    valid("build", {"schema": 2, "target": RTX.name, "engines": {"full": entry, "compressed": entry}})


@needs_rtx
def test_layers_are_those_of_the_network(built: tuple[Path, dict[str, Any]]) -> None:
    folder, entry = built
    content = json.loads((folder / "full.layers.json").read_text())
    assert (content["schema"], content["name"], content["read_from"]) == (1, "full", "network before the build")
    assert content["reformats"] is None  # the builder puts them in
    types = {layer["name"]: (layer["op"], layer["type"]) for layer in content["layers"]}
    assert types["conv"] == ("convolution", "fp32")
    assert types["fc"] == ("matrix_multiply", "fp32")
    assert entry["precision"]["found"]["fp32"] == sum(kind == "fp32" for _, kind in types.values())


def half_typed() -> onnx.ModelProto:
    """All in FP16, input and output included."""
    network = classifier()
    for tensor in network.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*network.graph.input, *network.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return network


def quantised(*, weights: bool) -> onnx.ModelProto:
    """The convolution reads INT8; its weights are INT8 only if asked, as without them nothing is gained."""
    network = classifier()
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    network.graph.initializer.extend([scale, zero])
    conv, pairs = network.graph.node[0], ["input", "conv.weight"] if weights else ["input"]
    for index, name in enumerate(pairs):
        nodes = [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}.q"], name=f"{name}.q"),
            helper.make_node("DequantizeLinear", [f"{name}.q", "scale", "zero"], [f"{name}.d"], name=f"{name}.d"),
        ]
        conv.input[index] = f"{name}.d"
        for node in reversed(nodes):
            network.graph.node.insert(0, node)
    return network


def direct(network: onnx.ModelProto | bytes, folder: Path, target: str, **options: Any) -> Made:
    """Build what `precision` would have written."""
    path = folder / "full.onnx"
    path.write_bytes(network if isinstance(network, bytes) else network.SerializeToString())
    return trt.build(path, folder, "full", targets.parse(target), Build(**options))


@needs_rtx
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("network", "target", "computing"),
    [
        (half_typed, "rtx-fp16", {"conv": "fp16", "fc": "fp16"}),
        (lambda: quantised(weights=True), "rtx-int8", {"conv": "int8", "fc": "fp32"}),
    ],
)
def test_precision_is_that_of_the_graph(
    network: Callable[[], onnx.ModelProto], target: str, computing: dict[str, str], tmp_path: Path
) -> None:
    made = direct(network(), tmp_path, target, capabilities=("8.9",))
    found = json.loads((tmp_path / "full.layers.json").read_text())["layers"]
    assert {layer["name"]: layer["type"] for layer in found if layer["name"] in computing} == computing
    assert isinstance(made.engine.plan, Plan)
    assert made.engine.plan.capabilities == ["8.9"]


@needs_rtx
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("network", "target", "options", "kind", "message"),
    [
        (classifier, "rtx-fp16", {}, ContentError, "no layer of the engine computes in fp16: 2 in fp32"),
        (half_typed, "rtx-fp32", {}, ContentError, "no layer of the engine computes in fp32: 2 in fp16"),
        (lambda: quantised(weights=False), "rtx-int8", {}, ContentError, "no layer .* computes in int8: 2 in fp32"),
        (lambda: b"", "rtx-fp32", {}, ContentError, r"must have inputs and outputs .*, but it has: neither"),
        (lambda: b"text\n" * 9, "rtx-fp32", {}, ContentError, r"must have inputs and outputs .*, but it has: neither"),
        (
            classifier,
            "rtx-fp32",
            {"capabilities": ("9.0",)},
            UsageError,
            r"build\.capabilities: this TensorRT for RTX builds for 7\.5, .*, not for 9\.0",
        ),
        (
            classifier,
            "rtx-fp32",
            {"capabilities": ("7.5",)},
            ContentError,
            r"Cannot compile operation 'fc' for Turing \(SM75\): FP32 GEMM",
        ),
    ],
)
def test_what_is_not_the_target_is_refused(
    network: Callable[[], onnx.ModelProto | bytes],
    target: str,
    options: dict[str, Any],
    kind: type[PolarDeployError],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=message):
        direct(network(), tmp_path, target, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["full.onnx"]


def changed(index: int, **fields: Any) -> onnx.ModelProto:
    """The classifier with other fields in one node."""
    network = classifier()
    for field, value in fields.items():
        setattr(network.graph.node[index], field, value)
    return network


def mixed() -> onnx.ModelProto:
    """A convolution of FP32 values with FP16 weights."""
    network = classifier()
    tensor = network.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return network


def doubled() -> onnx.ModelProto:
    """All in FP64."""
    network = classifier()
    for tensor in network.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*network.graph.input, *network.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return network


def custom() -> onnx.ModelProto:
    nodes = [helper.make_node("Fancy", ["input"], ["logits"], name="head", domain="my.ops")]
    return model(nodes, {}, classes=3, size=8, domains=("my.ops",))


def fixed_batch() -> onnx.ModelProto:
    network = classifier()
    network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return network


UNSUPPORTED = r"full\.onnx: TensorRT for RTX says: node 'relu' \(operator Bernoulli\): UNSUPPORTED_NODE$"


@needs_rtx
@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: changed(1, op_type="Bernoulli"), UNSUPPORTED),
        (lambda: changed(1, op_type="Bernoulli", name=""), r"node number 1 \(operator Bernoulli\): UNSUPPORTED_NODE$"),
        (custom, r"node 'head' \(operator Fancy\): INVALID_NODE: .*Plugin not found"),
        (fixed_batch, r"the batch, alone varies, but it has: input \[1, 3, 8, 8\], logits \[1, 4\]$"),
        (doubled, r"a\.onnx: tensor 'conv\.weight' of node 'conv' \(operator Conv\) is DOUBLE"),
    ],
)
def test_bad_network_is_one_error_that_says_where(
    network: Callable[[], onnx.ModelProto], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ContentError) as error:
        engines.build(saved(network(), tmp_path / "a.onnx"), tmp_path, "full", RTX, Build())
    assert re.search(message, error.value.what), error.value.what
    assert not (tmp_path / "full.plan").exists()


@needs_rtx
@pytest.mark.usefixtures("in_process")
def test_types_that_do_not_fit_are_named(tmp_path: Path) -> None:
    message = r"node 'conv' \(operator Conv\): INVALID_NODE: .*`input` type is Float but `kernel` is of type Half"
    with pytest.raises(ContentError, match=message) as error:
        direct(mixed(), tmp_path, "rtx-fp32")
    assert "Cuda Runtime" not in error.value.what  # that there is no GPU is beside the point


@needs_rtx
def test_child_hands_on_what_the_library_refuses(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match=UNSUPPORTED.removesuffix("$")):
        engines.build(saved(changed(1, op_type="Bernoulli"), tmp_path / "a.onnx"), tmp_path, "full", RTX, Build())


INSPECTED = {
    "Name": "conv + relu",
    "LayerType": "CaskConvolution",
    "ParameterType": "Convolution",
    "Inputs": [{"Dimensions": [8, 3, 8, 8], "Format/Datatype": "Channel major FP16 format where channel % 4 == 0"}],
    "Outputs": [{"Dimensions": [8, 8, 8, 8], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
    "Weights": {"Type": "Half", "Count": 216},
}


@needs_rtx
@pytest.mark.usefixtures("in_process")
def test_tensorrt_is_proven_by_the_engine_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that TensorRT goes, with TensorRT for RTX in its place; only the inspector needs a GPU."""
    monkeypatch.setattr(library, "load", lambda backend: importlib.import_module("tensorrt_rtx"))
    found = [INSPECTED]
    monkeypatch.setattr(builder._Builder, "_inspected", lambda self, plan: {"Layers": found})
    monkeypatch.setattr(builder, "_gpu_here", lambda: gpu.Gpu("NVIDIA L4", (8, 9)))
    monkeypatch.setattr(gpu, "cuda_version", lambda: "12.8")
    made = direct(half_typed(), tmp_path, "trt-fp16", workspace=64, optimization_level=2)
    assert made.found == {"fp16": 1}
    plan = made.engine.plan
    assert isinstance(plan, Plan)
    assert (plan.gpu, plan.capabilities, plan.cuda) == ("NVIDIA L4", ["8.9"], "12.8")
    assert plan.timing_cache == "timing.cache"
    assert not (tmp_path / "timing.cache.lock").exists()
    assert "--memPoolSize=workspace:64M" in (plan.trtexec or "")
    content = json.loads((tmp_path / "full.layers.json").read_text())
    assert (content["read_from"], content["reformats"], content["padded_channels"]) == ("engine inspector", 0, 0)

    found[0] = INSPECTED | {"Weights": {"Type": "Float", "Count": 216}}
    with pytest.raises(ContentError, match="no layer of the engine computes in fp16: 1 in fp32"):
        direct(half_typed(), tmp_path, "trt-fp16")


@pytest.mark.parametrize(
    ("said", "kind", "todo"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", MachineError, "free some memory"),
        ("Cuda Runtime (out of memory)", MachineError, "free some memory"),
        ("Unable to load library: libnvinfer_lean.so.10", UsageError, "drop build.version_compatible"),
        ("Error Code 10: Internal Error (Could not find any implementation for node conv.)", ContentError, "docs/"),
    ],
)
def test_why_the_library_gives_up(said: str, kind: type[PolarDeployError], todo: str) -> None:
    error = builder._refused(f"a.onnx: TensorRT says: {said}")
    assert type(error) is kind
    assert todo in error.todo


PLAN = {
    "file": "full.plan",
    "library": "TensorRT",
    "version": "10.6.0.26",
    "gpu": "NVIDIA L4",
    "capabilities": ["8.9"],
    "version_compatible": False,
    "hardware_compatible": False,
    **dict.fromkeys(("cuda", "driver", "timing_cache", "trtexec")),
    "profile": {"min": 1, "opt": 8, "max": 64},
}
ANY = {"gpu": None, "capabilities": ["8.9", "12.0"]}  # as TensorRT for RTX builds


@pytest.mark.parametrize(
    ("change", "version", "here", "message"),
    [
        ({}, "10.6.0.26", ("NVIDIA L4", (8, 9)), None),
        ({}, "10.6.0.27", ("NVIDIA L4", (8, 9)), "full.plan was built with TensorRT 10.6.0.26, here is 10.6.0.27"),
        (
            {},
            "10.6.0.26",
            ("NVIDIA A10", (8, 6)),
            "full.plan was built for NVIDIA L4 (compute capability 8.9), here is NVIDIA A10 (8.6)",
        ),
        (
            {},
            "10.6.0.26",
            ("NVIDIA L40", (8, 9)),
            "full.plan was built for NVIDIA L4 (compute capability 8.9), here is NVIDIA L40 (8.9)",
        ),
        (ANY, "10.6.0.26", ("NVIDIA L40", (8, 9)), None),
        (
            ANY,
            "10.6.0.26",
            ("NVIDIA T4", (7, 5)),
            "full.plan was built for GPUs (compute capability 8.9, 12.0), here is NVIDIA T4 (7.5)",
        ),
        ({"version_compatible": True}, "10.13.3.9", ("NVIDIA L4", (8, 9)), None),
        (
            {"version_compatible": True},
            "10.3.0.30",
            ("NVIDIA L4", (8, 9)),
            "full.plan was built with TensorRT 10.6.0.26, here is 10.3.0.30",
        ),
        (
            {"version_compatible": True},
            "11.4.0.106",
            ("NVIDIA L4", (8, 9)),
            "full.plan was built with TensorRT 10.6.0.26, here is 11.4.0.106",
        ),
        ({"hardware_compatible": True}, "10.6.0.26", ("NVIDIA H100", (9, 0)), None),
        (
            {"hardware_compatible": True},
            "10.6.0.26",
            ("NVIDIA T4", (7, 5)),
            "full.plan was built for NVIDIA L4 (compute capability 8.9), here is NVIDIA T4 (7.5)",
        ),
    ],
)
def test_plan_is_for_one_version_and_one_gpu(
    change: dict[str, Any],
    version: str,
    here: tuple[str, tuple[int, int]],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "first", lambda: gpu.Gpu(*here))
    if message is None:
        require_plan_fits(Path("full.plan"), Plan(**PLAN | change), version)
        return
    with pytest.raises(MachineError) as error:
        require_plan_fits(Path("full.plan"), Plan(**PLAN | change), version)
    assert error.value.what == message
    assert error.value.todo == "build again here: --from build"


@pytest.mark.parametrize("plan", [{}, {**PLAN, "capabilities": ["new"]}, {**PLAN, "capabilities": None}])
def test_plan_that_is_not_described_is_refused(plan: Any, tmp_path: Path) -> None:
    entry = {"provider": "TensorRT", "versions": {"TensorRT": "10.6.0.26"}, "tf32": False, "plan": plan}
    write_json(tmp_path / "build.json", {"schema": 2, "target": "trt-fp16", "engines": {"full": entry}})
    with pytest.raises(ContentError, match=r"build\.json: engines\.full\.plan"):
        Built.read(tmp_path / "build.json")


def test_without_a_description_no_plan_is_loaded() -> None:
    with pytest.raises(ContentError, match=r"full\.plan: build\.json does not say what the plan is for"):
        trt.require_fit(Path("full.plan"), targets.parse("trt-fp16"), None)


def test_trtexec_line_says_all_that_we_set() -> None:
    options = Build(batches=(1, 8, 64), workspace=256, optimization_level=5, version_compatible=True)
    assert builder.trtexec("full", {"input": (3, 32, 32)}, options).split() == [
        "trtexec",
        "--onnx=engines/full.onnx",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        "--noTF32",
        "--versionCompatible",
        "--memPoolSize=workspace:256M",
        "--builderOptimizationLevel=5",
        "--minShapes=input:1x3x32x32",
        "--optShapes=input:8x3x32x32",
        "--maxShapes=input:64x3x32x32",
        "--timingCacheFile=engines/timing.cache",
        "--saveEngine=engines/full.plan",
    ]
