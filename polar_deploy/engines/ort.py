"""ONNX Runtime on the CPU, FP32.

The artefact is the typed ONNX graph. ONNX Runtime optimises it each time it is loaded and the result is never kept:
it has layouts and fused operators of this very CPU inside and is not portable. What the engine really ran is read
from the runtime's own profile of one inference and written beside it, as `NAME.layers.json`.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import __version__
from polar_deploy.engines import network
from polar_deploy.engines.base import Array, Timer, require_shape
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.workspace import atomic_path, sha256, write_json

if TYPE_CHECKING:
    import onnxruntime

    from polar_deploy.targets import Target

PROVIDER = "CPUExecutionProvider"
THREADS = 1  # the figure that a shared machine disturbs least, and that compares between machines
_NO_PLAN = "none: the graph that ONNX Runtime optimises when it loads the ONNX file is not portable, so it is not kept"
_PRECISIONS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}  # the profile's names


class OrtEngine:
    """One session on one ONNX file. `Engine` of the base module; `threads` is what an inference uses.

    Raises:
        UsageError: no such file.
        ContentError: not ONNX, an operator that ONNX Runtime does not have, or not a classifier of images.
    """

    def __init__(self, path: Path, threads: int = THREADS) -> None:
        self.path = path
        self.threads = threads
        self._session = _session(path, _options(threads))
        self._input, self.input_shape = _image_input(self._session, path)
        self._output = _logits_output(self._session, path)

    def infer(self, images: Array) -> Array:
        """Normalised images [B,C,H,W] -> logits [B,classes]."""
        require_shape(images, self.input_shape, str(self.path))
        with _translated(self.path):
            logits: Array = self._session.run([self._output], {self._input: images})[0]
        return logits

    def timer(self, images: Array) -> Timer:
        """Bind `images` [B,C,H,W]; the clock is the host's, as the CPU has no other."""
        require_shape(images, self.input_shape, str(self.path))
        session, binding = self._session, self._session.io_binding()
        binding.bind_cpu_input(self._input, np.ascontiguousarray(images))
        binding.bind_output(self._output)

        def milliseconds(inferences: int) -> float:
            with _translated(self.path):
                start = time.perf_counter_ns()
                for _ in range(inferences):
                    session.run_with_iobinding(binding)
                return (time.perf_counter_ns() - start) / inferences / 1e6

        return milliseconds

    def duplicate(self) -> OrtEngine:
        """A second session, loaded from the same file."""
        return OrtEngine(self.path, self.threads)


def build(source: Path, folder: Path, name: str, target: Target) -> dict[str, Any]:
    """Write `folder/NAME.onnx` (checked, every float FP32) and `folder/NAME.layers.json` (what ran, in which type).

    Returns the engine's entry in build.json. Raises as `Backend.build` says.
    """
    import onnx
    import onnxruntime

    from polar_deploy.surgery import cost

    start = time.perf_counter()
    model = network.read(source)
    network.require_fp32(model, source)
    onnx_path, layers_path = folder / f"{name}.onnx", folder / f"{name}.layers.json"
    layers = read_layers(source)
    found = require_precision(layers, target.precision, source)
    with atomic_path(onnx_path) as path:
        onnx.save(model, path)
    write_json(layers_path, {"schema": 1, "name": name, "read_from": "profile of one inference", "layers": layers})
    seconds = time.perf_counter() - start
    costs = cost(model)
    return {
        "backend": target.backend,
        "provider": PROVIDER,
        "threads": THREADS,
        "versions": {"polar_deploy": __version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "precision": {"asked": target.precision, "found": found},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in (onnx_path, layers_path)
        },
        "plan": _NO_PLAN,
        "macs": costs.macs,
        "params": costs.params,
        "seconds": round(seconds, 3),
    }


def load(folder: Path, name: str) -> OrtEngine:
    """Load the engine that `build` wrote as `folder/NAME.onnx`."""
    return OrtEngine(folder / f"{name}.onnx")


def read_layers(path: Path) -> list[dict[str, Any]]:
    """Run one inference under ONNX Runtime's profiler and list the layers that ran, in order.

    Each is {"name", "op", "provider", "inputs", "type"}: `inputs` the element types read, `type` the one written.
    """
    with tempfile.TemporaryDirectory(prefix="polar_deploy-") as folder:
        options = _options(THREADS)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(path, options)
        name, shape = _image_input(session, path)
        with _translated(path):
            session.run(None, {name: np.zeros((1, *shape), np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_layer(event) for event in events if event["cat"] == "Node"]


def require_precision(layers: list[dict[str, Any]], precision: str, path: Path) -> dict[str, int]:
    """Count layers by element type; ContentError if floats of another precision ran, or none of the one asked."""
    found = Counter(layer["type"] for layer in layers)
    for layer in layers:
        if layer["type"] in _PRECISIONS.values() and layer["type"] != precision:
            raise ContentError(
                f"{path}: layer {layer['name']!r} ({layer['op']}) runs in {layer['type']}, the target is {precision}",
                "export the network in FP32, or choose another target",
            )
    if precision not in found:
        raise ContentError(f"{path}: no layer of the engine runs in {precision}", "check that the file is a network")
    return dict(found.most_common())


def _layer(event: dict[str, Any]) -> dict[str, Any]:
    arguments = event["args"]
    inputs, outputs = (
        [_PRECISIONS.get(kind, kind) for tensor in arguments[key] for kind in tensor]
        for key in ("input_type_shape", "output_type_shape")
    )
    return {
        # ONNX Runtime numbers the layers that it puts in itself, differently each time
        "name": re.sub(r"_token_\d+$", "", event["name"].removesuffix("_kernel_time")),
        "op": arguments["op_name"],
        "provider": arguments["provider"],
        "inputs": inputs,
        "type": outputs[0] if outputs else "none",
    }


def _options(threads: int) -> onnxruntime.SessionOptions:
    """Options under which two live sessions do not disturb each other (spinning threads steal the other's time)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # fatal: what fails is raised, and reported once
    return options


def _session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    import onnxruntime

    with _translated(path):
        return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn what ONNX Runtime raises about the network in `path` into an error that names node and operator."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    # They have no base class in common but Exception; a run with bound inputs raises RuntimeError instead.
    own = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    raised: tuple[type[Exception], ...] = (RuntimeError, *own)
    try:
        yield
    except raised as error:
        model = network.read(path)  # which has a better word for a file that is missing, damaged or no ONNX
        message = network.one_line(error)
        what = f"{path}: {network.blame(model, message)}ONNX Runtime says: {message}"
        if "Failed to allocate memory" in message:
            raise MachineError(what, "free some memory, or use smaller batches or images") from error
        raise ContentError(what, "export the network with operators that this ONNX Runtime has") from error


def _image_input(session: onnxruntime.InferenceSession, path: Path) -> tuple[str, tuple[int, int, int]]:
    """Name and [C,H,W] of the only input; ContentError unless it is [any batch,C,H,W] of FP32."""
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].type == "tensor(float)":
        match inputs[0].shape:
            case [str() | None, int(channels), int(height), int(width)]:
                return inputs[0].name, (channels, height, width)
    raise _wrong_edge(path, "input", "[any batch, channels, height, width]", inputs)


def _logits_output(session: onnxruntime.InferenceSession, path: Path) -> str:
    """Name of the only output; ContentError unless it is [any batch,classes] of FP32."""
    outputs = session.get_outputs()
    if len(outputs) == 1 and outputs[0].type == "tensor(float)" and len(outputs[0].shape) == 2:
        return str(outputs[0].name)
    raise _wrong_edge(path, "output", "[any batch, classes]", outputs)


def _wrong_edge(path: Path, edge: str, expected: str, found: list[onnxruntime.NodeArg]) -> ContentError:
    listed = ", ".join(f"{value.name} {value.type} {value.shape}" for value in found)
    return ContentError(
        f"{path}: the network must have one float {edge} of shape {expected}, but it has: {listed}",
        "export a classifier of images with a dynamic batch",
    )
