from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from polar_deploy import engines, targets
from polar_deploy.backends.onnx_runtime import OnnxRuntime
from polar_deploy.config import Build
from polar_deploy.documents.layers import Layer
from polar_deploy.engines import ort, timing
from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.ort_session import session_options
from polar_deploy.tensors import TensorSpec
from polar_deploy.workspace import write_json
from tests.support.classifiers import classifier, model, saved, two_inputs
from tests.support.schemas import valid

TARGET = targets.parse("ort-fp32")
IMAGES = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)


def logits(engine: engines.Engine, images: np.ndarray = IMAGES) -> np.ndarray:
    return engine.infer({"input": images})["logits"]


@pytest.fixture
def built(tmp_path: Path) -> dict[str, object]:
    full = saved(classifier(16), tmp_path / "full.onnx")
    compressed = saved(classifier(4), tmp_path / "compressed.onnx")
    made = engines.build_all(full, compressed, tmp_path / "engines", TARGET, Build())
    made.write(tmp_path / "engines/build.json")
    return made.as_json()


def test_every_target_has_its_backend() -> None:
    for target in targets.TARGETS.values():
        runtime = importlib.import_module(f"polar_deploy.engines.{target.backend.runtime}")
        assert all(callable(getattr(runtime, name)) for name in ("build", "load", "require_fit"))


def test_build_json(built: dict, tmp_path: Path) -> None:
    valid("build", built)
    for name, channels in (("full", 16), ("compressed", 4)):
        entry = built["engines"][name]
        files = {path.name: path for path in (tmp_path / "engines").iterdir() if path.name.startswith(f"{name}.")}
        assert set(entry["files"]) == set(files) == {f"{name}.onnx", f"{name}.layers.json"}
        for file, path in files.items():
            content = path.read_bytes()
            assert entry["files"][file] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert entry["precision"]["asked"] == "fp32"
        assert set(entry["precision"]["found"]) == {"fp32"}
        assert entry["provider"] == "CPUExecutionProvider"
        assert entry["versions"]["onnxruntime"] == onnxruntime.__version__
        assert entry["macs"] == channels * 27 * 64 + channels * 4
        assert "not portable" in entry["plan"]


def test_layers_are_those_that_ran(built: dict, tmp_path: Path) -> None:
    layers = json.loads((tmp_path / "engines/full.layers.json").read_text())["layers"]
    assert built["engines"]["full"]["precision"]["found"]["fp32"] == len(layers)
    operators = [layer["op"] for layer in layers]
    assert {"Conv", "Gemm"} <= set(operators)
    assert "Relu" not in operators  # ONNX Runtime fuses it into the Conv
    conv = next(layer for layer in layers if layer["op"] == "Conv")
    assert (conv["type"], conv["inputs"], conv["provider"]) == ("fp32", ["fp32"] * 3, "CPUExecutionProvider")


def test_typed_graph_is_the_network(built: dict, tmp_path: Path) -> None:
    typed, source = onnx.load(tmp_path / "engines/full.onnx"), classifier(16)
    assert typed.graph == source.graph


def test_engine_computes_what_onnx_says(built: dict, tmp_path: Path) -> None:
    engine = engines.load(tmp_path / "engines", "full", TARGET)
    expected = ReferenceEvaluator(classifier(16)).run(None, {"input": IMAGES})[0]
    assert (engine.inputs, engine.outputs) == ({"input": TensorSpec((3, 8, 8))}, {"logits": TensorSpec((4,))})
    for count in (5, 1):
        np.testing.assert_allclose(logits(engine, IMAGES[:count]), expected[:count], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits(engine.duplicate()), logits(engine))


def test_engines_are_timed(built: dict, tmp_path: Path) -> None:
    full, compressed = (engines.load(tmp_path / "engines", name, TARGET) for name in ("full", "compressed"))
    result = timing.compare(full, compressed, {"input": IMAGES}, pairs=12, seconds=(0.1, 0.5))
    assert result.batch == 5
    assert 0 < result.best.compressed.median_ms < 50
    assert result.best.inferences > 1  # these networks take microseconds


def test_sessions_do_not_spin_and_use_one_thread() -> None:
    options = session_options(threads=1)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.skipif(not targets.lacks_to_build(targets.parse("trt-fp16")), reason="this machine can build it")
def test_a_target_that_this_machine_lacks_is_refused(tmp_path: Path) -> None:
    target = targets.parse("trt-fp16")
    with pytest.raises(MachineError, match="target trt-fp16 cannot be built here"):
        engines.build_all(tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path, target, Build())
    with pytest.raises(MachineError, match="an engine for trt-fp16 cannot run here"):
        engines.load(tmp_path, "full", target)


def test_missing_engine_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*build\.json"):
        engines.load(tmp_path, "full", TARGET)


@pytest.mark.parametrize("content", [[], {}, {"target": "ort-fp32", "engines": {"full": {"files": ["full.onnx"]}}}])
def test_build_json_that_lists_nothing_is_refused(content: object, tmp_path: Path) -> None:
    write_json(tmp_path / "build.json", content)
    with pytest.raises(ContentError, match=r"build\.json: \w+"):
        engines.load(tmp_path, "full", TARGET)


def test_engine_of_another_target_is_refused(built: dict, tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="built for ort-fp32, not ort-int8"):
        engines.load(tmp_path / "engines", "full", targets.parse("ort-int8"))


def test_file_that_is_not_the_one_built_is_refused(built: dict, tmp_path: Path) -> None:
    path = tmp_path / "engines/full.onnx"
    saved(classifier(16, seed=1), path)
    with pytest.raises(ContentError, match=r"full\.onnx is not the file that was built: its sha256 is [0-9a-f]{12}…"):
        engines.load(path.parent, "full", TARGET)
    assert logits(engines.load(path.parent, "compressed", TARGET)).shape == (5, 4)


@pytest.mark.parametrize("content", [b"", b"text\n" * 50])
def test_damaged_engine_is_a_content_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "full.onnx").write_bytes(content)
    with pytest.raises(ContentError, match=r"is empty|not an ONNX file"):
        ort.OrtEngine(tmp_path / "full.onnx")


def build(network: onnx.ModelProto, tmp_path: Path) -> None:
    engines.build(saved(network, tmp_path / "a.onnx"), tmp_path / "engines", "full", TARGET, Build())


def test_custom_operator_names_node_and_operator(tmp_path: Path) -> None:
    nodes = [helper.make_node("Fancy", ["input"], ["logits"], name="head", domain="my.ops")]
    with pytest.raises(ContentError, match=r"node 'head' \(operator my\.ops:Fancy\)"):
        build(model(nodes, {}, classes=3, size=8, domains=("my.ops",)), tmp_path)
    assert not (tmp_path / "engines/full.layers.json").exists()


def test_other_float_types_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    network = classifier()
    network.graph.initializer[1].data_type = TensorProto.FLOAT16
    network.graph.initializer[1].raw_data = network.graph.initializer[1].raw_data[::2]
    with pytest.raises(ContentError, match=r"tensor 'conv\.bias' of node 'conv' \(operator Conv\) is FLOAT16"):
        build(network, tmp_path)
    assert not (tmp_path / "engines").exists()


def test_fixed_batch_is_refused(tmp_path: Path) -> None:
    network = classifier()
    network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ContentError, match=r"each input must have a batch of any size .* input float32 \[1, 3, 8, 8\]"):
        build(network, tmp_path)


def test_inputs_and_outputs_of_any_number_and_type(tmp_path: Path) -> None:
    engine = ort.OrtEngine(saved(two_inputs(), tmp_path / "a.onnx"))
    assert engine.inputs == {"image": TensorSpec((2, 3)), "row": TensorSpec((), "int64")}
    assert engine.outputs == {"picked": TensorSpec((3,)), "found": TensorSpec((2,), "bool")}
    given = {"row": np.array([1, 0, 1]), "image": np.arange(18, dtype=np.float32).reshape(3, 2, 3)}
    found = engine.infer(given)
    np.testing.assert_array_equal(found["picked"], [[3, 4, 5], [6, 7, 8], [15, 16, 17]])
    np.testing.assert_array_equal(found["found"], [[False, False], [True, True], [True, True]])
    assert engine.timer(given)(2) > 0


def test_images_of_another_size_are_refused(built: dict, tmp_path: Path) -> None:
    engine = engines.load(tmp_path / "engines", "full", TARGET)
    larger = np.zeros((2, 3, 9, 8), np.float32)
    for use in (engine.infer, engine.timer):
        with pytest.raises(ContentError, match=r"input as float32 \[B, 3, 8, 8\], but got float32 \[2, 3, 9, 8\]"):
            use({"input": larger})


def test_failure_in_the_run_names_the_node(tmp_path: Path) -> None:
    """Reshape to a size that the batch cannot fill: valid, loads, fails when it runs."""
    nodes = [
        helper.make_node("Flatten", ["input"], ["f"]),
        helper.make_node("Reshape", ["f", "shape"], ["logits"], name="wrong"),
    ]
    path = saved(model(nodes, {"shape": np.array([7, 10])}, classes=10, size=8), tmp_path / "a.onnx")
    with pytest.raises(ContentError, match=r"node 'wrong' \(operator Reshape\)"):
        logits(ort.OrtEngine(path))
    with pytest.raises(ContentError, match=r"node 'wrong' \(operator Reshape\)"):
        ort.OrtEngine(path).timer({"input": IMAGES})(1)


def test_too_little_memory_is_the_machines_fault(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Expand", ["input", "shape"], ["e"], name="huge"),
        helper.make_node("ReduceMean", ["e", "axes"], ["logits"], keepdims=0),
    ]
    weights = {"shape": np.array([1, 3, 8_000_000, 8_000_000]), "axes": np.array([2, 3])}
    small = model(nodes, weights, classes=3, size=1)
    with pytest.raises(MachineError, match="allocate memory"):
        logits(ort.OrtEngine(saved(small, tmp_path / "a.onnx")), np.zeros((1, 3, 1, 1), np.float32))


def layer(name: str, op: str, kind: str, **told: Any) -> Layer:
    return Layer(**{"name": name, "op": op, "inputs": [kind, kind], "type": kind, "provider": ort.ORT.provider} | told)


def test_layers_of_another_precision_are_an_error() -> None:
    layers = [layer("conv", "Conv", "fp32"), layer("fc", "Gemm", "fp16")]
    with pytest.raises(ContentError, match=r"layer 'fc' \(Gemm\) runs in fp16 .*, the target is fp32"):
        ort.require_precision(layers, "fp32", Path("a.onnx"))
    for lacking in ([], [layer("conv", "FusedConv", "fp32")]):
        for precision in ("fp16", "int8"):
            with pytest.raises(ContentError, match=f"no layer of the engine runs in {precision}"):
                ort.require_precision(lacking, precision, Path("a.onnx"))


def test_narrower_layers_are_an_error_in_fp32_too() -> None:
    quantised = layer("conv", "QLinearConv", "int8", inputs=["int8", "fp32", "int8"])  # it reads FP32 scales
    with pytest.raises(ContentError, match=r"layer 'conv' .* runs in int8"):
        ort.require_precision([quantised, layer("fc", "Gemm", "fp32")], "fp32", Path("a.onnx"))


def test_layers_without_weights_prove_nothing() -> None:
    with pytest.raises(ContentError, match="no layer of the engine runs in fp16"):
        ort.require_precision([layer("relu", "Relu", "fp16")], "fp16", Path("a.onnx"))


def test_layers_on_another_device_are_an_error() -> None:
    with pytest.raises(ContentError, match=r"'conv' \(Conv\) runs in fp16 on CPUExecutionProvider, .* on CUDAExec"):
        ort.require_precision([layer("conv", "Conv", "fp16")], "fp16", Path("a.onnx"), ort.ORT_CUDA.provider)


def test_what_a_provider_fuses_has_to_be_all_that_computes() -> None:
    provider = ort.ORT_TRT.provider
    fused = layer("TRTKernel_graph_network", "TRTKernel", "fp32", provider=provider)
    beside = layer("shape", "Reshape", "fp32")
    assert ort.require_fused([fused, beside], Path("a.onnx"), provider) == {"fp32": 2}
    with pytest.raises(ContentError, match=r"the target is for Tensorrt.*, but layer 'conv' \(Conv\) runs on CPU"):
        ort.require_fused([fused, layer("conv", "Conv", "fp16")], Path("a.onnx"), provider)
    with pytest.raises(ContentError, match="but nothing runs there"):
        ort.require_fused([beside], Path("a.onnx"), provider)


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("backend", [ort.ORT_CUDA, ort.ORT_TRT])
def test_a_provider_that_does_not_start_is_an_error(backend: OnnxRuntime, tmp_path: Path) -> None:
    if backend.provider in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {backend.provider}")
    with pytest.raises(MachineError, match=f"ONNX Runtime does not start its {backend.provider} here: it has CPU"):
        ort.OrtEngine(saved(classifier(), tmp_path / "a.onnx"), backend)


def test_a_plugin_is_registered_once_and_asked_for_on_its_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    devices: list[SimpleNamespace] = []
    given: list[object] = []
    module = SimpleNamespace(get_ep_name=lambda: "Nv", get_library_path=lambda: "libnv.so")

    def register(name: str, path: str) -> None:
        given.append((name, path))
        devices.append(SimpleNamespace(ep_name=name))

    options = SimpleNamespace(add_provider_for_devices=lambda found, settings: given.append((found, settings)))
    monkeypatch.setitem(sys.modules, "plugin_of_a_test", module)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [SimpleNamespace(ep_name="CPU"), *devices])
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    for _ in range(2):
        ort._register("plugin_of_a_test", options)
    assert given == [("Nv", "libnv.so"), (devices, {}), (devices, {})]
    devices.clear()
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda name, path: None)
    with pytest.raises(MachineError, match="plugin_of_a_test finds no device here"):
        ort._register("plugin_of_a_test", options)


def test_int8_has_to_be_half_of_the_layers() -> None:
    layers = [layer("a", "QLinearConv", "int8"), layer("b", "Conv", "fp32"), layer("c", "Conv", "fp32")]
    with pytest.raises(ContentError, match=r"layer 'b' .* runs in fp32"):
        ort.require_precision(layers, "int8", Path("a.onnx"))


def test_file_that_is_not_listed_is_refused(built: dict, tmp_path: Path) -> None:
    del built["engines"]["full"]["files"]["full.onnx"]
    write_json(tmp_path / "engines/build.json", built)
    with pytest.raises(ContentError, match=r"build\.json does not list full\.onnx"):
        engines.load(tmp_path / "engines", "full", TARGET)


def test_int8_may_leave_layers_wider() -> None:
    layers = [layer("conv", "QLinearConv", "int8"), layer("pool", "MaxPool", "int8"), layer("fc", "Gemm", "fp32")]
    assert ort.require_precision(layers, "int8", Path("a.onnx")) == {"int8": 2, "fp32": 1}


def test_half_precision_edges_are_cast(tmp_path: Path) -> None:
    network = classifier()
    for value in (*network.graph.input, *network.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in network.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    found = logits(ort.OrtEngine(saved(network, tmp_path / "half.onnx")))
    assert found.dtype == np.float32
    expected = ReferenceEvaluator(classifier()).run(None, {"input": IMAGES})[0]
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
