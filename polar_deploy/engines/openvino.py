"""OpenVINO on the CPU.

The artefact is the typed ONNX graph, as it is for ONNX Runtime: a file that can be checked and is no code. OpenVINO's
own cache of compiled models is neither, and its IR would be a second form of the same network to trust.

Left to itself OpenVINO computes FP32 graphs in BF16 where the CPU has units for it (in FP16 on ARM). Here the types
are those of the graph: `INFERENCE_PRECISION_HINT` is f32 for every target, which leaves BF16 tensors and Q/DQ pairs
what they are. What runs is read from the runtime's own graph and written beside it, as `NAME.layers.json`.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy import onnx_files
from polar_deploy.documents.build import EngineFacts, Plan
from polar_deploy.documents.layers import Layer, Layers
from polar_deploy.documents.parity import Conditions
from polar_deploy.engines.base import Array, Made, Timer, fitting, specs
from polar_deploy.errors import ContentError, OutOfMemoryError, one_line
from polar_deploy.precision.graph import count_wider
from polar_deploy.precision.proof import Kernels
from polar_deploy.tensors import Arrays, count

if TYPE_CHECKING:
    import onnx

    from polar_deploy.config import Build
    from polar_deploy.targets import Target

DEVICE = "CPU"
THREADS = 1  # as for ONNX Runtime: the figure that a shared machine disturbs least
_NO_PLAN = "none: what OpenVINO compiles from the ONNX file when it loads it is for this CPU alone, so it is not kept"
_TELEMETRY = "openvino_telemetry"
# The runtime's names of types; wider integers are shapes and indices, and no precision.
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "i8": "int8", "u8": "int8"}
# What OpenVINO puts in itself, numbered anew each time: its words, which but for constants are not ONNX's
_NUMBERED = re.compile(r"(Constant|Convert|FakeQuantize|Multiply|Subtract|(Group)?Convolution(BackpropData)?)_\d+")
_COMPUTING = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_MOST_COMPILED = 4  # batch sizes that an engine holds compiled


class OvEngine:
    """One ONNX file, compiled for each batch size that it is given. `Engine` of the base module.

    A network that is compiled for one batch size is up to 1.3 times as fast as one for any.

    Args:
        path: an ONNX file.
        threads: CPU threads of an inference.

    Raises:
        UsageError: no such file.
        ContentError: not ONNX, an operator that OpenVINO does not have, or inputs and outputs without a dynamic batch.
    """

    batches = (1, None)

    def __init__(self, path: Path, threads: int = THREADS) -> None:
        self.path, self.threads = path, threads
        onnx_files.read(path)  # OpenVINO tries other formats, aloud, on what is no ONNX file
        with _translated(path):
            self._model = _core().read_model(str(path))
        self.inputs = specs("input", _shapes(self._model.inputs), path)
        self.outputs = specs("output", _shapes(self._model.outputs), path)
        self._requests: dict[int, Any] = {}  # by batch size, the oldest first

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name. As `Engine` says."""
        given = fitting(inputs, self, str(self.path))
        batch = count(given)
        if batch not in self._requests:
            while len(self._requests) >= _MOST_COMPILED:
                del self._requests[next(iter(self._requests))]
            self._requests[batch] = self._request(batch)
        with _translated(self.path):
            found = self._requests[batch].infer({name: _contiguous(values) for name, values in given.items()})
        return {name: np.array(found[name]) for name in self.outputs}

    def timer(self, inputs: Arrays) -> Timer:
        """Bind `inputs` to a request of their own; the clock is the host's."""
        held = {name: _contiguous(values) for name, values in fitting(inputs, self, str(self.path)).items()}
        request = self._request(count(held))
        for name, values in held.items():
            request.set_tensor(name, _library().Tensor(values, shared_memory=True))

        def milliseconds(inferences: int) -> float:
            with _translated(self.path):
                start = time.perf_counter_ns()
                for _ in range(inferences):
                    request.infer(share_outputs=True)
                return (time.perf_counter_ns() - start) / inferences / 1e6

        return milliseconds

    def duplicate(self) -> OvEngine:
        """The same file, loaded a second time."""
        return OvEngine(self.path, self.threads)

    def conditions(self) -> Conditions | None:
        """None: a CPU tells nothing of its state."""
        return None

    def layers(self, batch: int) -> list[Layer]:
        """The layers that run for a batch size, in order."""
        with _translated(self.path):
            nodes = self._compiled(batch).get_runtime_model().get_ordered_ops()
            return [_layer(node) for node in _running(nodes)]

    def _request(self, batch: int) -> Any:
        with _translated(self.path):
            return self._compiled(batch).create_infer_request()

    def _compiled(self, batch: int) -> Any:
        model = self._model.clone()
        model.reshape({name: [batch, *spec.sizes] for name, spec in self.inputs.items()})
        return _compiled(_with_fp32_io(model), self.threads)


def build(onnx_path: Path, folder: Path, name: str, target: Target, options: Build) -> Made:
    """Write `folder/NAME.layers.json`: what runs at the usual batch, in which type. Else as `Runtime.build` says."""
    layers_path = folder / f"{name}.layers.json"
    layers = OvEngine(onnx_path).layers(options.batches[1])
    found = require_precision(layers, target.precision, onnx_path, count_wider(onnx_path, target.precision))
    Layers(schema=1, name=name, read_from="runtime graph", layers=layers).write(layers_path)
    engine = EngineFacts(
        provider=f"OpenVINO {DEVICE}",
        threads=THREADS,
        tf32=options.tf32,
        versions={"openvino": version("openvino")},
        plan=_NO_PLAN,
    )
    return Made(engine, found, (onnx_path.name, layers_path.name))


def kernels(target: Target) -> Kernels | None:
    """Those of this CPU. As `Runtime.kernels` says."""
    return Kernels(target.backend.library, _outputs)


def load(artefact: Path, target: Target, plan: Plan | None, *, tf32: bool) -> OvEngine:
    """Load the typed ONNX file that `build` looked at."""
    return OvEngine(artefact)


def require_fit(artefact: Path, target: Target, plan: Plan | None) -> None:
    """Nothing to ask: an ONNX file is for any machine that the target runs on. As `Runtime.require_fit` says."""


def require_precision(layers: list[Layer], precision: str, path: Path, wider: int = 0) -> dict[str, int]:
    """Count layers by the type they compute in; ContentError unless the layers with weights are of the target's.

    All of them have to be, but for those that the graph keeps `wider` on purpose. For INT8 half: which ones stay wider
    is measured, and reported. An FP32 engine computes nothing at all in less.
    """
    computing = [layer for layer in layers if layer.op in _COMPUTING]
    if all(layer.type != precision for layer in computing):
        raise ContentError(f"{path}: no layer of the engine runs in {precision}", "check that the file is a network")
    others = {*_PRECISIONS.values()} - {precision}
    odd = [layer for layer in (layers if precision == "fp32" else computing) if layer.type in others]
    if len(odd) > (len(computing) // 2 if precision == "int8" else wider):
        what = f"layer {odd[0].name!r} ({odd[0].op}, kernel {odd[0].kernel}) runs in {odd[0].type}"
        raise ContentError(
            f"{path}: {what}, the target is {precision}", "report this network and the version of OpenVINO"
        )
    return dict(Counter(layer.type for layer in layers if layer.type in _PRECISIONS.values()).most_common())


def _running(nodes: Iterable[Any]) -> Iterator[Any]:
    """The runtime's nodes that compute, in order: no input, no output, and nothing done once with constants."""
    constant: set[str] = set()
    for node in nodes:
        sources = [each.get_source_output().get_node().friendly_name for each in node.inputs()]
        if _told(node)["layerType"] == "Const" or (sources and constant.issuperset(sources)):
            constant.add(node.friendly_name)
        elif sources and node.outputs() and _told(node)["layerType"] != "Output":
            yield node


def _told(node: Any) -> dict[str, str]:
    return {key: str(value.astype(str)) for key, value in node.get_rt_info().items()}


def _layer(node: Any) -> Layer:
    """What the runtime tells of a node. Its precision is that of what it reads, weights aside."""
    told = _told(node)
    names = [name for name in told["originalLayersNames"].split(",") if name and not _NUMBERED.fullmatch(name)]
    inputs = [each.get_element_type().to_string() for each in node.inputs()]
    return Layer(
        name=",".join(names) or node.friendly_name,
        op=told["layerType"],
        kernel=told["primitiveType"],
        inputs=[_PRECISIONS.get(kind, kind) for kind in inputs],
        type=_PRECISIONS.get(told["runtimePrecision"], told["runtimePrecision"]),
    )


def _outputs(model: onnx.ModelProto, inputs: Arrays, path: Path) -> Mapping[str, npt.NDArray[np.float64]]:
    """What a network gives for inputs, by output, on as many threads as OpenVINO likes."""
    with _translated(path, model):
        with onnx_files.loadable(model) as source:
            compiled = _compiled(_with_fp32_io(_core().read_model(source)))
        names = [value.name for value in model.graph.output]
        found = compiled.infer_new_request(dict(inputs))
        return {name: np.asarray(found[name], np.float64) for name in names}


def _compiled(model: Any, threads: int | None = None) -> Any:
    """A model that computes in the types that it has, and nothing of which is bound to certain cores."""
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # two engines that are timed in turn would share a core
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return _core().compile_model(model, DEVICE, settings)


def _with_fp32_io(model: Any) -> Any:
    """A model that takes and gives FP32 wherever its inputs and outputs are of a float type."""
    library = _library()
    typed = library.preprocess.PrePostProcessor(model)
    for index, value in enumerate(model.inputs):
        if value.get_element_type().is_real():
            typed.input(index).tensor().set_element_type(library.Type.f32)
    for index, value in enumerate(model.outputs):
        if value.get_element_type().is_real():
            typed.output(index).tensor().set_element_type(library.Type.f32)
    return typed.build()


def _shapes(values: Iterable[Any]) -> dict[str, tuple[str | None, list[int | None]]]:
    """For `specs`: what a model tells of its inputs or outputs."""
    found = {}
    for value in values:
        kind = value.get_element_type()
        name = "float32" if kind.is_real() else np.dtype(kind.to_dtype()).name
        found[value.any_name] = name, [size.get_length() if size.is_static else None for size in value.partial_shape]
    return found


def _contiguous(values: Array) -> Array:
    return np.ascontiguousarray(values, np.float32 if values.dtype.kind == "f" else None)


@contextmanager
def _translated(path: Path, model: onnx.ModelProto | None = None) -> Iterator[None]:
    """Turn what OpenVINO raises about a network, that in `path` or else `model`, into an error that names the node."""
    try:
        yield
    except RuntimeError as error:  # all of its errors
        message, given = one_line(error), model or onnx_files.read(path)
        said = message.partition("failed with ")[2] or message
        what = f"{path}: {_unknown(given, message) or onnx_files.blame(given, message)}OpenVINO says: {said}"
        if "bad_alloc" in message or "allocate" in message:
            raise OutOfMemoryError(what, "free some memory, or use smaller batches or images") from error
        raise ContentError(what, "export the network with operators that this OpenVINO has") from error


def _unknown(model: onnx.ModelProto, message: str) -> str:
    """The first node of an operator that OpenVINO lacks, as `network.blame` has it: it lists operators, not nodes."""
    listed = re.search(r"operations: ([\w., ]+)", message)
    operators = re.split("[, ]+", listed[1]) if listed else []
    lacking = (node for node in model.graph.node if f"{node.domain}.{node.op_type}".lstrip(".") in operators)
    return next((f"{onnx_files.described(node)}: " for node in lacking), "")


@cache
def _core() -> Any:
    return _library().Core()


@cache
def _library() -> ModuleType:
    """OpenVINO, imported without the package by which it reports each import to its maker."""
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # importing it fails, which OpenVINO is ready for
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]
    return openvino  # type: ignore[no-any-return]
