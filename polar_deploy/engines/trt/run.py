"""Running and timing a plan, by TensorRT's own API and CUDA's runtime.

Whoever makes a `TrtEngine` has asked `targets.lacks_to_run` before. Everything is freed in order, each context before
its engine and that before its runtime, when the objects go or at `close`.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from polar_deploy import gpu
from polar_deploy.documents.parity import Conditions
from polar_deploy.engines import cuda, nvml
from polar_deploy.engines.base import Array, fitting
from polar_deploy.engines.trt import library
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.tensors import Arrays, TensorSpec, count

_BUILD_AGAIN = "build again here: --from build"
_TYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,  # its bits
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
_FLOATS = ("FLOAT", "HALF", "BF16")


@dataclass(frozen=True)
class IOTensor:
    """One of the engine's inputs or outputs: its name, the shape of one sample of it, TensorRT's word for its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def spec(self) -> TensorSpec:
        """As `Engine` tells it."""
        return TensorSpec(self.shape, "float32" if self.kind in _FLOATS else np.dtype(_TYPES[self.kind]).name)

    def write(self, values: Array, memory: Array) -> None:
        """Put values into an array of this type, floats rounded to nearest."""
        from polar_deploy.precision.bf16 import rounded_bits

        memory[...] = rounded_bits(values) if self.kind == "BF16" else values

    def read(self, memory: Array) -> Array:
        """A copy of an array of this type; of floats in float32."""
        if self.kind == "BF16":
            return (memory.astype(np.uint32) << 16).view(np.float32)
        return memory.astype(np.float32) if self.kind in _FLOATS else memory.copy()


class TrtEngine:
    """One plan. `Engine` of the base module.

    Args:
        path: the plan.
        trt: the library's module.
        logger: of the library, see `library.logger`.
        host_code: whether the plan may bring code for the CPU along, as one that later versions can run does.

    Raises:
        MachineError: no GPU, or not enough memory.
        ContentError: the library cannot read the plan, or more than the batch varies in it.
    """

    def __init__(self, path: Path, trt: ModuleType, logger: Any, *, host_code: bool = False) -> None:
        self.path, self._trt, self._logger, self._host_code = path, trt, logger, host_code
        self._lane: _Lane | None = None
        with ExitStack() as owned:
            self._engine = _held(owned, _deserialised(path, trt, logger, owned, host_code=host_code))
            self._sources, self._results = io_tensors(self._engine, trt, path)
            self._owned = owned.pop_all()
        weakref.finalize(self, self._owned.close)
        self.inputs = {edge.name: edge.spec for edge in self._sources}
        self.outputs = {edge.name: edge.spec for edge in self._results}
        smallest, _usual, largest = self._engine[0].get_tensor_profile_shape(self._sources[0].name, 0)
        self.batches: tuple[int, int | None] = (smallest[0], largest[0])

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name. As `Engine` says."""
        given = fitting(inputs, self, str(self.path))
        if self._lane is None:
            with ExitStack() as owned:
                self._lane = self._open(owned, self.batches[1] or count(given))
                self._owned.callback(owned.pop_all().close)
        self._lane.send(given)
        if not self._lane.enqueue():
            raise self._refusal("refuses to run it")
        return self._lane.receive()

    def timer(self, inputs: Arrays) -> TrtTimer:
        """Copy `inputs` to the GPU, once, and give a clock: CUDA events around CUDA graphs."""
        return TrtTimer(self, fitting(inputs, self, str(self.path)))

    def duplicate(self) -> TrtEngine:
        """The plan, deserialised once more."""
        return TrtEngine(self.path, self._trt, self._logger, host_code=self._host_code)

    def conditions(self) -> Conditions | None:
        """The GPU's state."""
        return nvml.conditions()

    def close(self) -> None:
        """Free everything, timers included. The engine is of no use afterwards."""
        self._lane = None
        self._owned.close()

    def _open(self, owner: ExitStack, batch: int) -> _Lane:
        """A context with memory for `batch` samples."""
        lane = _Lane(self._sources, self._results, batch, owner)
        context = _held(owner, _context(self._engine[0], self._trt))
        if context[0] is None:
            raise self._refusal("makes no context for it")
        lane.bind(context)
        return lane

    def _refusal(self, what: str) -> MachineError:
        said = library.drain_errors(self._logger)
        memory = "memory" in said.lower()
        todo = "end what else uses the GPU, or build with a smaller largest batch (--batch)" if memory else _BUILD_AGAIN
        return MachineError(f"{self.path}: {self._trt.__name__} {what}: {said}", todo)


class TrtTimer:
    """`Timer` of the base module: milliseconds of one of n inferences on inputs that lie on the GPU already.

    Attributes:
        captured: whether a CUDA graph is launched; else TensorRT enqueues each time, which takes more of the CPU.
    """

    def __init__(self, engine: TrtEngine, inputs: Arrays) -> None:
        self._engine = engine  # which has to outlive the context
        with ExitStack() as owned:
            lane = engine._open(owned, count(inputs))
            lane.send(inputs)
            if not lane.enqueue():  # not captured: the first run after a change of shape sets things up
                raise engine._refusal("refuses to run it")
            cuda.call("cudaStreamSynchronize", lane.stream)
            launch = cuda.graph(owned, lane.stream, lane.enqueue) if lane.capturable() else None
            self._events, self._stream = (cuda.event(owned), cuda.event(owned)), lane.stream
            close = owned.pop_all().close
        self.captured = launch is not None
        if launch is None:
            library.drain_errors(engine._logger)  # why it was not captured, is no error
        self._launch, self._enqueue = launch, lane.enqueue
        weakref.finalize(self, close)
        engine._owned.callback(close)  # whichever comes first; the second finds nothing left

    def __call__(self, inferences: int) -> float:
        """Run `inferences` back to back; return milliseconds of one."""
        start, end = self._events
        cuda.call("cudaEventRecord", start, self._stream)
        for _ in range(inferences):
            if self._launch is not None:
                self._launch()
            elif not self._enqueue():
                raise self._engine._refusal("refuses to run it")
        cuda.call("cudaEventRecord", end, self._stream)
        cuda.call("cudaEventSynchronize", end)
        return float(cuda.call("cudaEventElapsedTime", start, end)) / inferences


class _Lane:
    """A context, its stream, and the memory on both sides for up to `batch` samples. Freed by `owner`."""

    def __init__(self, sources: list[IOTensor], results: list[IOTensor], batch: int, owner: ExitStack) -> None:
        self.sources, self.results = sources, results
        self.stream = cuda.stream(owner)
        shapes = {edge.name: ((batch, *edge.shape), _TYPES[edge.kind]) for edge in (*sources, *results)}
        self.pinned = {name: cuda.pinned(owner, *shape) for name, shape in shapes.items()}
        self.addresses = {name: cuda.device(owner, memory.nbytes) for name, memory in self.pinned.items()}
        self.batch = 0

    def bind(self, context: list[Any]) -> None:
        """Take a context, in a list that empties when it is freed, and tell it where the memory is."""
        self.context = context
        for name, address in self.addresses.items():
            if not context[0].set_tensor_address(name, address):
                raise ContentError(f"the plan does not take an address for its {name}", _BUILD_AGAIN)

    def send(self, inputs: Arrays) -> None:
        """Put the copy of `inputs` [B, …] to the GPU on the stream; the next runs are of B samples."""
        self.batch = count(inputs)
        for edge in self.sources:
            part = self.pinned[edge.name][: self.batch]
            edge.write(inputs[edge.name], part)
            cuda.send(part, self.addresses[edge.name], self.stream)
            if not self.context[0].set_input_shape(edge.name, part.shape):
                raise ContentError(f"the plan does not take {edge.name} of shape {part.shape}", _BUILD_AGAIN)

    def enqueue(self) -> bool:
        """Put one inference on the stream."""
        return bool(self.context[0].execute_async_v3(int(self.stream)))

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold an inference, as far as the library tells beforehand (RTX does)."""
        ask = getattr(self.context[0], "is_stream_capturable", None)
        return ask is None or bool(ask(int(self.stream)))

    def receive(self) -> dict[str, Array]:
        """Wait for the outputs, by name."""
        parts = {edge.name: self.pinned[edge.name][: self.batch] for edge in self.results}
        for name, part in parts.items():
            cuda.fetch(self.addresses[name], part, self.stream)
        cuda.call("cudaStreamSynchronize", self.stream)
        return {edge.name: edge.read(parts[edge.name]) for edge in self.results}


def io_tensors(engine: list[Any], trt: ModuleType, path: Path) -> tuple[list[IOTensor], list[IOTensor]]:
    """Inputs and outputs of the held engine; ContentError unless the batch is all that varies."""
    names = [engine[0].get_tensor_name(index) for index in range(engine[0].num_io_tensors)]
    found: dict[Any, list[IOTensor]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    for name in names:
        shape, kind = tuple(engine[0].get_tensor_shape(name)), str(engine[0].get_tensor_dtype(name).name)
        known = bool(shape) and shape[0] == -1 and min(shape[1:], default=1) > 0 and kind in _TYPES
        if not known:
            raise ContentError(
                f"{path}: a plan must have inputs and outputs of which the first axis, the batch, alone varies, but "
                f"{name} is {kind} {list(shape)}",
                _BUILD_AGAIN,
            )
        found[engine[0].get_tensor_mode(name)].append(IOTensor(name, shape[1:], kind))
    sources, results = found.values()
    if not sources or not results:
        raise ContentError(f"{path}: the plan has {len(sources)} inputs and {len(results)} outputs", _BUILD_AGAIN)
    return sources, results


def _deserialised(path: Path, trt: ModuleType, logger: Any, owner: ExitStack, *, host_code: bool) -> Any:
    """The engine in a plan. Its runtime is freed by `owner`."""
    try:
        gpu.first()  # without one, the library ends the process
    except gpu.NoGpuError as error:
        raise MachineError(f"{path} cannot run here: {error}", "run it on a machine with a GPU") from error
    runtime = _held(owner, trt.Runtime(logger))
    runtime[0].engine_host_code_allowed = host_code
    engine = runtime[0].deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ContentError(
            f"{path} is a corrupt plan: {trt.__name__} says: {library.drain_errors(logger)}", _BUILD_AGAIN
        )
    return engine


def _context(engine: Any, trt: ModuleType) -> Any:
    """An execution context, or None.

    TensorRT for RTX compiles kernels for the shape it is given in the background and goes on with slower ones until
    then; what is timed, or recorded in a CUDA graph, has to be the final ones.
    """
    strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return engine.create_execution_context(config)


def _held(owner: ExitStack, thing: Any) -> list[Any]:
    """A list of one thing, which `owner` empties. Nothing else may keep it, an error's traceback included, so that the
    library frees it just then."""
    cell = [thing]
    owner.callback(cell.clear)
    return cell
