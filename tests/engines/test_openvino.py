"""OpenVINO's engines: built, loaded, run, timed; and what they compute in, which OpenVINO would choose itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy import engines, targets
from polar_deploy.config import Build
from polar_deploy.documents.layers import Layer
from polar_deploy.engines import openvino, timing
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.tensors import TensorSpec
from tests.support.classifiers import classifier, model, saved, two_inputs
from tests.support.residual import difference, images, residual
from tests.support.schemas import valid

TARGET = targets.parse("ov-fp32")
IMAGES = images(5, seed=3)


def logits(engine: engines.Engine, of: np.ndarray = IMAGES) -> np.ndarray:
    return engine.infer({"input": of})["logits"]


pytestmark = pytest.mark.skipif(bool(targets.lacks_to_run(TARGET)), reason="OpenVINO is not installed")


def target_of(precision: str) -> targets.Target:
    target = targets.parse(f"ov-{precision}")
    if lacks := targets.lacks_to_build(target):
        pytest.skip(lacks[0])
    return target


def built(tmp_path: Path, precision: str, network: onnx.ModelProto | None = None, **options: object) -> dict:
    """Build `network` as both engines into `tmp_path/engines`; what build.json says of one."""
    source = saved(network or residual(), tmp_path / "source.onnx")
    target = target_of(precision)
    made = engines.build_all(source, source, tmp_path / "engines", target, Build(**options), {"input": images(32)})
    made.write(tmp_path / "engines/build.json")
    return made.as_json()


def loaded(tmp_path: Path, precision: str) -> engines.Engine:
    return engines.load(tmp_path / "engines", "full", targets.parse(f"ov-{precision}"))


# How far each precision may be off: rounding errors, not more; and it has to be off, or it is another precision.
OFF = {"fp32": (0, 1e-5), "bf16": (1e-3, 0.02), "int8": (2e-3, 0.05)}


@pytest.mark.parametrize("precision", OFF)
def test_built_loaded_and_run(precision: str, tmp_path: Path) -> None:
    made = built(tmp_path, precision)
    valid("build", made)
    entry = made["engines"]["full"]
    assert set(entry["files"]) == {"full.onnx", "full.layers.json"}
    assert (entry["backend"], entry["provider"], entry["threads"]) == ("ov", "OpenVINO CPU", 1)
    assert entry["precision"]["types"] == {precision: 7}
    assert "not kept" in entry["plan"]
    engine, exact = loaded(tmp_path, precision), engines.reference_engine(tmp_path / "source.onnx")
    assert engine.inputs == {"input": TensorSpec((3, 8, 8))}
    for count in (5, 1, 2, 3, 4, 5):  # more sizes than are held compiled
        least, most = OFF[precision]
        assert least <= difference(logits(engine, IMAGES[:count]), logits(exact, IMAGES[:count])) <= most
    np.testing.assert_array_equal(logits(engine.duplicate()), logits(engine))


@pytest.mark.parametrize("precision", OFF)
def test_layers_are_those_that_run_in_the_precision_asked(precision: str, tmp_path: Path) -> None:
    entry = built(tmp_path, precision)["engines"]["full"]
    layers = json.loads((tmp_path / "engines/full.layers.json").read_text())["layers"]
    computing = [layer for layer in layers if layer["op"] in ("Convolution", "FullyConnected")]
    assert len(computing) == 7
    assert {layer["type"] for layer in computing} == {precision}
    assert sum(entry["precision"]["found"].values()) == len(layers)
    assert "relu1" in next(layer["name"] for layer in computing if "conv1" in layer["name"])  # fused into it
    assert not {layer["op"] for layer in layers} & {"Const", "Input", "Output"}
    again = openvino.OvEngine(tmp_path / "engines/full.onnx").layers(8)
    assert [each.as_json() for each in again] == layers  # under the same names


def test_fp32_is_not_computed_in_what_openvino_would_choose(tmp_path: Path) -> None:
    """On this machine that is BF16, if the CPU has units for it; what our settings prevent is shown beside."""
    target_of("bf16")
    path = saved(residual(), tmp_path / "a.onnx")
    core = openvino._core()
    chosen = core.compile_model(core.read_model(str(path)), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    types = {openvino._layer(node).type for node in openvino._running(chosen.get_runtime_model().get_ordered_ops())}
    assert "bf16" in types
    assert {layer.type for layer in openvino.OvEngine(path).layers(8)} == {"fp32"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_transposed_convolutions_are_computed_in_int8_without_groups(groups: int, bias: bool, tmp_path: Path) -> None:
    network = residual()
    rng = np.random.default_rng(0)
    weights = {"up.weight": rng.normal(0, 0.3, (8, 8 // groups, 2, 2)), "up.bias": rng.normal(0, 0.1, 8)}
    inputs = ["relu0.out", "up.weight", *(["up.bias"] if bias else [])]
    nodes = [
        helper.make_node("ConvTranspose", inputs, ["up.out"], name="up", strides=[2, 2], group=groups),
        helper.make_node("Relu", ["up.out"], ["up"], name="up.relu"),
    ]
    for node in nodes[::-1]:
        network.graph.node.insert(2, node)
    for node in network.graph.node:
        if node.name in ("conv1", "add1"):
            node.input[:] = ["up" if name == "relu0.out" else name for name in node.input]
    for name in weights if bias else ("up.weight",):
        network.graph.initializer.append(numpy_helper.from_array(weights[name].astype(np.float32), name))
    entry = built(tmp_path, "int8", network)["engines"]["full"]
    assert entry["precision"]["types"] == ({"int8": 8} if groups == 1 else {"int8": 7, "fp32": 1})
    assert [each["layer"] for each in entry["precision"]["high_precision_layers"]] == ([] if groups == 1 else ["up"])
    layers = json.loads((tmp_path / "engines/full.layers.json").read_text())["layers"]
    assert [layer["type"] for layer in layers if layer["op"] == "Deconvolution"] == ["int8" if groups == 1 else "fp32"]
    exact = logits(engines.reference_engine(tmp_path / "source.onnx"))
    assert difference(logits(loaded(tmp_path, "int8")), exact) < 0.05


def test_a_layer_that_stays_wide_runs_wide(tmp_path: Path) -> None:
    """BF16 writes FP32 around a subtraction of equal numbers: OpenVINO must not take that back."""
    network = residual()
    extra = [
        helper.make_node("Add", ["stem.out", "thousand"], ["up"], name="up"),
        helper.make_node("Sub", ["up", "thousand"], ["down"], name="down"),
    ]
    network.graph.initializer.append(helper.make_tensor("thousand", onnx.TensorProto.FLOAT, [], [1000.0]))
    for node in extra[::-1]:
        network.graph.node.insert(1, node)
    next(node for node in network.graph.node if node.name == "relu0").input[0] = "down"
    kept = built(tmp_path, "bf16", network)["engines"]["full"]["precision"]["high_precision_layers"]
    assert "up" in {each["layer"] for each in kept}
    exact = logits(engines.reference_engine(tmp_path / "source.onnx"))
    assert difference(logits(loaded(tmp_path, "bf16")), exact) < 0.03


def test_native_edges_take_and_give_fp32(tmp_path: Path) -> None:
    entry = built(tmp_path, "bf16", io_dtype="native")["engines"]["full"]
    assert entry["precision"]["io_dtype"] == "native"
    found = logits(loaded(tmp_path, "bf16"))
    assert found.dtype == np.float32
    assert difference(found, logits(engines.reference_engine(tmp_path / "source.onnx"))) < 0.02


def test_engines_are_timed(tmp_path: Path) -> None:
    built(tmp_path, "fp32")
    full, compressed = (engines.load(tmp_path / "engines", name, TARGET) for name in ("full", "compressed"))
    result = timing.compare(full, compressed, {"input": IMAGES}, pairs=12, seconds=(0.1, 0.5))
    assert result.batch == 5
    assert result.best.inferences > 1
    assert full.conditions() is None


def test_the_kernels_that_prove_a_graph_are_openvino_s(tmp_path: Path) -> None:
    kernels = engines.kernels(TARGET)
    assert kernels is not None
    assert kernels.library == "OpenVINO"
    network, path = residual(), tmp_path / "a.onnx"
    network.graph.output.append(helper.make_tensor_value_info("relu2.out", onnx.TensorProto.FLOAT, None))
    found = kernels.outputs(network, {"input": IMAGES}, path)
    exact = logits(engines.reference_engine(saved(residual(), path)))
    assert difference(found["logits"], exact) < 1e-5
    assert found["relu2.out"].shape == (5, 8, 8, 8)


# --------------------------------------------------------------------------- what is refused


def layer(name: str, op: str, kind: str) -> Layer:
    return Layer(name=name, op=op, kernel="jit", inputs=[kind], type=kind)


@pytest.mark.parametrize(
    ("layers", "precision", "says"),
    [
        ([layer("a", "Convolution", "fp32"), layer("b", "FullyConnected", "bf16")], "fp32", "'b' .* runs in bf16"),
        ([layer("a", "Convolution", "fp32"), layer("b", "Eltwise", "bf16")], "fp32", "'b' .* runs in bf16"),
        ([layer("a", "Convolution", "bf16"), layer("b", "MatMul", "fp32")], "bf16", "'b' .* runs in fp32"),
        ([layer(name, "Convolution", name) for name in ("int8", "bf16", "fp32")], "int8", "'bf16' .* runs in bf16"),
        ([layer("a", "Convolution", "fp32")], "bf16", "no layer of the engine runs in bf16"),
        ([layer("a", "Eltwise", "int8")], "int8", "no layer of the engine runs in int8"),
    ],
)
def test_layers_of_another_precision_are_an_error(layers: list[Layer], precision: str, says: str) -> None:
    with pytest.raises(ContentError, match=says):
        openvino.require_precision(layers, precision, Path("a.onnx"))


def test_layers_that_are_meant_to_be_wider_are_none() -> None:
    layers = [layer("a", "Convolution", "bf16"), layer("b", "MatMul", "fp32"), layer("c", "Reshape", "i32")]
    assert openvino.require_precision(layers, "bf16", Path("a.onnx"), wider=1) == {"bf16": 1, "fp32": 1}


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*a\.onnx"):
        openvino.OvEngine(tmp_path / "a.onnx")


@pytest.mark.parametrize("content", [b"", b"text\n" * 50, classifier().SerializeToString()[:300]])
def test_a_damaged_file_is_a_content_error(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(ContentError, match=r"a\.onnx (is empty|is not)"):
        openvino.OvEngine(tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_openvino_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["input"], ["f"], name="flatten"),
        helper.make_node("Fancy", ["f"], ["logits"], name="head", domain="my.ops"),
    ]
    path = saved(model(nodes, {}, classes=192, size=8, domains=("my.ops",)), tmp_path / "a.onnx")
    with pytest.raises(ContentError, match=r"node 'head' \(operator my\.ops:Fancy\): OpenVINO says: .*my\.ops\.Fancy"):
        openvino.OvEngine(path)


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    fixed = classifier()
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ContentError, match=r"each input must have a batch of any size .*input float32 \[1, 3, 8, 8\]"):
        openvino.OvEngine(saved(fixed, tmp_path / "a.onnx"))


def test_inputs_and_outputs_of_any_number_and_type(tmp_path: Path) -> None:
    path = saved(two_inputs(), tmp_path / "a.onnx")
    engine, exact = openvino.OvEngine(path), engines.reference_engine(path)
    assert (engine.inputs, engine.outputs) == (exact.inputs, exact.outputs)
    given = {"row": np.array([1, 0, 1]), "image": images(3)[:, :2, 0, :3]}
    found, expected = engine.infer(given), exact.infer(given)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert engine.timer(given)(2) > 0


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    engine = openvino.OvEngine(saved(classifier(), tmp_path / "a.onnx"))
    for use in (engine.infer, engine.timer):
        with pytest.raises(ContentError, match=r"input as float32 \[B, 3, 8, 8\], but got float32 \[2, 3, 9, 8\]"):
            use({"input": np.zeros((2, 3, 9, 8), np.float32)})


def test_nothing_is_reported_to_its_maker(tmp_path: Path) -> None:
    """OpenVINO's package for telemetry sends an event at import; it is not even imported, nor kept from others."""
    path = saved(classifier(), tmp_path / "a.onnx")
    code = (
        "import sys; from pathlib import Path; from polar_deploy.engines.openvino import OvEngine\n"
        f"OvEngine(Path({str(path)!r})); print('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
