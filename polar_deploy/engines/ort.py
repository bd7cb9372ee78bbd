"""ONNX Runtime, on the CPU or on an NVIDIA GPU.

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
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import onnx_files
from polar_deploy.backends.onnx_runtime import ORT, ORT_CUDA, ORT_TRT, OnnxRuntime
from polar_deploy.documents.build import EngineFacts, Plan
from polar_deploy.documents.layers import Layer, Layers
from polar_deploy.documents.parity import Conditions
from polar_deploy.engines.base import Array, Made, Timer, fitting, specs
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.ort_session import open_session, session_options, translated
from polar_deploy.precision import calibration
from polar_deploy.precision.graph import count_wider
from polar_deploy.precision.proof import Kernels
from polar_deploy.tensors import Arrays

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx
    import onnxruntime

    from polar_deploy.config import Build
    from polar_deploy.targets import Target

THREADS = 1  # the figure that a shared machine disturbs least, and that compares between machines
_NO_PLAN = "none: the graph that ONNX Runtime optimises when it loads the ONNX file is not portable, so it is not kept"
# the profile's names; integers wider than a byte are shapes and indices, and no precision
_PRECISIONS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "double": "fp64",
    "int8": "int8",
    "uint8": "int8",
}
_COMPUTING = re.compile("Conv|Gemm|MatMul")  # layers with weights
# of inputs and outputs that engines take
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    **{f"tensor({name})": getattr(np, name) for name in ("int64", "int32", "int16", "int8", "uint8", "uint16")},
    "tensor(bool)": np.bool_,
}


class OrtEngine:
    """One session on one ONNX file. `Engine` of the base module.

    Args:
        path: an ONNX file.
        backend: one of `backends.onnx_runtime`, whose provider runs it.
        threads: CPU threads of an inference.
        tf32: on a GPU, whether FP32 may be computed as TF32.

    Raises:
        UsageError: no such file.
        ContentError: not ONNX, an operator that ONNX Runtime does not have, or an input or output without a dynamic
            batch.
        MachineError: the provider does not start here.
    """

    batches = (1, None)

    def __init__(self, path: Path, backend: OnnxRuntime = ORT, threads: int = THREADS, *, tf32: bool = False) -> None:
        self.path, self.backend, self.threads, self.tf32 = path, backend, threads, tf32
        self._session = _session(path, session_options(threads=threads), backend, tf32=tf32)
        taken, given = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = specs("input", _told(taken), path)
        self.outputs = specs("output", _told(given), path)
        self._types = {value.name: _TYPES[value.type] for value in taken}

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name. As `Engine` says."""
        given = self._given(inputs)
        with _translated(self.path):
            found = self._session.run(list(self.outputs), given)
        return {name: _widened(values) for name, values in zip(self.outputs, found, strict=True)}

    def timer(self, inputs: Arrays) -> Timer:
        """Bind `inputs` where the engine runs; the clock is the host's, the device is waited for."""
        import onnxruntime

        # what registers a plugin is the package for CPUs, which has no memory on a GPU
        device = "cpu" if self.backend.gpu is None or self.backend.plugin else "cuda"
        session, binding = self._session, self._session.io_binding()
        held = {name: np.ascontiguousarray(values) for name, values in self._given(inputs).items()}
        for name, values in held.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(values, device, 0))
        for name in self.outputs:
            binding.bind_output(name, device)

        def milliseconds(inferences: int) -> float:
            with _translated(self.path):
                start = time.perf_counter_ns()
                for _ in range(inferences):
                    session.run_with_iobinding(binding)
                binding.synchronize_outputs()
                return (time.perf_counter_ns() - start) / inferences / 1e6

        return milliseconds

    def _given(self, inputs: Arrays) -> dict[str, Array]:
        """What the session takes: floats in the types of its own."""
        chosen = fitting(inputs, self, str(self.path))
        return {name: values.astype(self._types[name], copy=False) for name, values in chosen.items()}

    def duplicate(self) -> OrtEngine:
        """A second session, loaded from the same file."""
        return OrtEngine(self.path, self.backend, self.threads, tf32=self.tf32)

    def conditions(self) -> Conditions | None:
        """The GPU's state; None on the CPU."""
        if self.backend.gpu is None:
            return None
        from polar_deploy.engines import nvml

        return nvml.conditions()


def build(onnx_path: Path, folder: Path, name: str, target: Target, options: Build) -> Made:
    """Write `folder/NAME.layers.json`: what ran, in which type. The rest as `Runtime.build` says."""
    import onnxruntime

    layers_path, backend = folder / f"{name}.layers.json", _backend(target)
    layers = read_layers(onnx_path, backend, tf32=options.tf32)
    if backend.proves_types:
        wider = count_wider(onnx_path, target.precision)
        found = require_precision(layers, target.precision, onnx_path, backend.provider, wider)
    else:
        found = require_fused(layers, onnx_path, backend.provider)
    Layers(schema=1, name=name, read_from="profile of one inference", layers=layers).write(layers_path)
    engine = EngineFacts(
        provider=backend.provider,
        threads=THREADS,
        tf32=options.tf32,
        versions={"onnxruntime": onnxruntime.__version__},
        plan=_NO_PLAN,
    )
    return Made(engine, found, (onnx_path.name, layers_path.name))


def kernels(target: Target) -> Kernels | None:
    """Those that Q/DQ pairs are fused into, on the CPU. As `Runtime.kernels` says."""
    if target.backend.gpu is not None:
        return None
    return Kernels(target.backend.library, _fused)


def _fused(model: onnx.ModelProto, inputs: Arrays, path: Path) -> dict[str, npt.NDArray[np.float64]]:
    return calibration.outputs(model, inputs, path, fused=True)


def load(artefact: Path, target: Target, plan: Plan | None, *, tf32: bool) -> OrtEngine:
    """Load the typed ONNX file that `build` looked at."""
    return OrtEngine(artefact, _backend(target), tf32=tf32)


def require_fit(artefact: Path, target: Target, plan: Plan | None) -> None:
    """Nothing to ask: an ONNX file is for any machine that the target runs on. As `Runtime.require_fit` says."""


def _backend(target: Target) -> OnnxRuntime:
    assert isinstance(target.backend, OnnxRuntime)
    return target.backend


def read_layers(path: Path, backend: OnnxRuntime, *, tf32: bool) -> list[Layer]:
    """Run one inference under ONNX Runtime's profiler and list the layers that ran, in order."""
    with tempfile.TemporaryDirectory(prefix="polar_deploy-") as folder:
        options = session_options(threads=THREADS)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(path, options, backend, tf32=tf32)
        taken = session.get_inputs()
        shapes = specs("input", _told(taken), path)
        with _translated(path):
            session.run(
                None,
                {value.name: np.zeros((1, *shapes[value.name].sizes), _TYPES[value.type]) for value in taken},
            )
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [_layer(event) for event in events if event["cat"] == "Node"]


def require_precision(
    layers: list[Layer], precision: str, path: Path, provider: str = ORT.provider, wider: int = 0
) -> dict[str, int]:
    """Count layers by the type they write; ContentError unless the layers with weights run as and where they should.

    In a float precision all of them have to, but for those that the graph keeps `wider` on purpose. For INT8 half:
    which ones stay wider is measured, and reported.
    """
    computing = [layer for layer in layers if _COMPUTING.search(layer.op)]
    odd = [layer for layer in computing if not _runs_in(precision, layer)]
    if len(odd) == len(computing):
        raise ContentError(f"{path}: no layer of the engine runs in {precision}", "check that the file is a network")
    odd = [] if len(odd) <= (len(computing) // 2 if precision == "int8" else wider) else odd
    elsewhere = [layer for layer in computing if layer.provider != provider]
    for layer in (*odd, *elsewhere):
        raise ContentError(
            f"{path}: layer {layer.name!r} ({layer.op}) runs in {layer.type} on {layer.provider}, the "
            f"target is {precision} on {provider}",
            "export the network in FP32, or choose another target",
        )
    return dict(Counter(layer.type for layer in layers).most_common())


def require_fused(layers: list[Layer], path: Path, provider: str) -> dict[str, int]:
    """Count layers by the type they write, where whole parts of the network are one layer of a provider's.

    In which type it computes what is inside, it does not tell: what is found is what goes in and out.

    Raises:
        ContentError: a layer with weights runs elsewhere, or nothing at all in this provider.
    """
    stray = next((each for each in layers if _COMPUTING.search(each.op) and each.provider != provider), None)
    if stray or not any(layer.provider == provider for layer in layers):
        where = f"layer {stray.name!r} ({stray.op}) runs on {stray.provider}" if stray else "nothing runs there"
        raise ContentError(f"{path}: the target is for {provider}, but {where}", "choose another target")
    return dict(Counter(layer.type for layer in layers).most_common())


def _runs_in(precision: str, layer: Layer) -> bool:
    """Whether a layer computes in a precision. Kernels of INT8 read scales in FP32, and may write FP32."""
    read = {*layer.inputs, layer.type} & {*_PRECISIONS.values()}
    return precision in read if precision == "int8" else read == {precision}


def _layer(event: Any) -> Layer:
    arguments = event["args"]
    inputs, outputs = (
        [_PRECISIONS.get(kind, kind) for tensor in arguments[key] for kind in tensor]
        for key in ("input_type_shape", "output_type_shape")
    )
    return Layer(
        # ONNX Runtime numbers the layers that it puts in itself, differently each time
        name=re.sub(r"_token_\d+$", "", event["name"].removesuffix("_kernel_time")),
        op=arguments["op_name"],
        provider=arguments["provider"],
        inputs=inputs,
        type=outputs[0] if outputs else "none",
    )


def _session(
    path: Path, options: onnxruntime.SessionOptions, backend: OnnxRuntime, *, tf32: bool
) -> onnxruntime.InferenceSession:
    """Load a network. What the provider cannot run may fall to the CPU, but the provider itself has to start."""
    settings = {ORT_CUDA: {"use_tf32": str(int(tf32))}, ORT_TRT: {"trt_fp16_enable": "1"}}.get(backend, {})
    providers = None if backend.plugin else [(backend.provider, settings), *([] if backend is ORT else [ORT.provider])]
    with _translated(path):
        if backend.plugin:
            _register(backend.plugin, options)
        session = open_session(path, options, providers=providers)
    if backend.provider not in session.get_providers():
        raise MachineError(
            f"ONNX Runtime does not start its {backend.provider} here: it has {', '.join(session.get_providers())}",
            "install the package that fits this GPU's CUDA; its own messages say what it lacks",
        )
    session.disable_fallback()  # else what fails on the GPU later runs on the CPU, without a word
    return session


def _register(plugin: str, options: onnxruntime.SessionOptions) -> None:
    """Ask for a provider that comes in a package of its own, on all of its devices."""
    import onnxruntime

    module = import_module(plugin)
    name = module.get_ep_name()

    def devices() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]

    if not devices():
        onnxruntime.register_execution_provider_library(name, module.get_library_path())
    if not (found := devices()):
        raise MachineError(f"{plugin} finds no device here", "see whether its package is the one for this CUDA")
    options.add_provider_for_devices(found, {})


def _translated(path: Path) -> AbstractContextManager[None]:
    """Turn what ONNX Runtime raises about the network in `path` into an error that names node and operator."""

    def what(message: str) -> str:
        model = onnx_files.read(path)  # which has a better word for a file that is missing, damaged or no ONNX
        return f"{path}: {onnx_files.blame(model, message)}ONNX Runtime says: {message}"

    return translated(what)


def _told(values: list[onnxruntime.NodeArg]) -> dict[str, tuple[str | None, list[Any]]]:
    """For `specs`: what a session tells of its inputs or outputs."""
    return {value.name: (_dtype(value.type), value.shape) for value in values}


def _dtype(kind: str) -> str | None:
    if kind not in _TYPES:
        return None
    return "float32" if np.dtype(_TYPES[kind]).kind == "f" else np.dtype(_TYPES[kind]).name


def _widened(values: Array) -> Array:
    return np.asarray(values, np.float32) if values.dtype.kind == "f" else values
