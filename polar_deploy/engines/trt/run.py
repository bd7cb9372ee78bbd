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
import numpy.typing as npt

from polar_deploy import gpu
from polar_deploy.engines import cuda, nvml
from polar_deploy.engines.base import Array, require_shape
from polar_deploy.engines.trt import library
from polar_deploy.errors import ContentError, MachineError

_BUILD_AGAIN = "build again here: --from build"
_TYPES: dict[str, type[np.generic]] = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16}  # BF16: its bits


@dataclass(frozen=True)
class IOTensor:
    """The engine's input or output: its name, the shape of one image's part of it, TensorRT's word for its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    def write(self, values: Array, memory: npt.NDArray[Any]) -> None:
        """Put float32 values into an array of this type, rounded to nearest."""
        from polar_deploy.precision.bf16 import rounded_bits

        memory[...] = rounded_bits(values) if self.kind == "BF16" else values

    def read(self, memory: npt.NDArray[Any]) -> Array:
        """A float32 copy of an array of this type."""
        if self.kind == "BF16":
            return (memory.astype(np.uint32) << 16).view(np.float32)
        return memory.astype(np.float32)


class TrtEngine:
    """One plan. `Engine` of the base module.

    Args:
        path: the plan.
        trt: the library's module.
        logger: of the library, see `library.logger`.
        host_code: whether the plan may bring code for the CPU along, as one that later versions can run does.

    Raises:
        MachineError: no GPU, or not enough memory.
        ContentError: the library cannot read the plan, or it is not a classifier of images.
    """

    def __init__(self, path: Path, trt: ModuleType, logger: Any, *, host_code: bool = False) -> None:
        self.path, self._trt, self._logger, self._host_code = path, trt, logger, host_code
        self._lane: _Lane | None = None
        with ExitStack() as owned:
            self._engine = _held(owned, _deserialised(path, trt, logger, owned, host_code=host_code))
            self._input, self._output = io_tensors(self._engine, trt, path)
            self._owned = owned.pop_all()
        weakref.finalize(self, self._owned.close)
        smallest, _usual, largest = self._engine[0].get_tensor_profile_shape(self._input.name, 0)
        self.batches: tuple[int, int | None] = (smallest[0], largest[0])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self._input.shape
        return channels, height, width

    def infer(self, images: Array) -> Array:
        """Normalised images [B,C,H,W] -> logits [B,classes], both float32 whatever types the plan has."""
        require_shape(images, self, str(self.path))
        if self._lane is None:
            with ExitStack() as owned:
                self._lane = self._open(owned, self.batches[1] or len(images))
                self._owned.callback(owned.pop_all().close)
        self._lane.send(images)
        if not self._lane.enqueue():
            raise self._refusal("refuses to run it")
        return self._lane.receive()

    def timer(self, images: Array) -> TrtTimer:
        """Copy `images` [B,C,H,W] to the GPU, once, and give a clock: CUDA events around CUDA graphs."""
        require_shape(images, self, str(self.path))
        return TrtTimer(self, images)

    def duplicate(self) -> TrtEngine:
        """The plan, deserialised once more."""
        return TrtEngine(self.path, self._trt, self._logger, host_code=self._host_code)

    def conditions(self) -> dict[str, Any] | None:
        """The GPU's state."""
        return nvml.conditions()

    def close(self) -> None:
        """Free everything, timers included. The engine is of no use afterwards."""
        self._lane = None
        self._owned.close()

    def _open(self, owner: ExitStack, batch: int) -> _Lane:
        """A context with memory for `batch` images."""
        lane = _Lane(self._input, self._output, batch, owner)
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
    """`Timer` of the base module: milliseconds of one of n inferences on images that lie on the GPU already.

    Attributes:
        captured: whether a CUDA graph is launched; else TensorRT enqueues each time, which takes more of the CPU.
    """

    def __init__(self, engine: TrtEngine, images: Array) -> None:
        self._engine = engine  # which has to outlive the context
        with ExitStack() as owned:
            lane = engine._open(owned, len(images))
            lane.send(images)
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
    """A context, its stream, and the memory on both sides for up to `batch` images. Freed by `owner`."""

    def __init__(self, source: IOTensor, result: IOTensor, batch: int, owner: ExitStack) -> None:
        self.source, self.result = source, result
        self.stream = cuda.stream(owner)
        self.images, self.logits = (
            cuda.pinned(owner, (batch, *edge.shape), _TYPES[edge.kind]) for edge in (source, result)
        )
        self.addresses = cuda.device(owner, self.images.nbytes), cuda.device(owner, self.logits.nbytes)
        self.batch = 0

    def bind(self, context: list[Any]) -> None:
        """Take a context, in a list that empties when it is freed, and tell it where the memory is."""
        self.context = context
        for edge, address in zip((self.source, self.result), self.addresses, strict=True):
            if not context[0].set_tensor_address(edge.name, address):
                raise ContentError(f"the plan does not take an address for its {edge.name}", _BUILD_AGAIN)

    def send(self, images: Array) -> None:
        """Put the copy of `images` [B,C,H,W] to the GPU on the stream; the next runs are of B images."""
        self.batch = len(images)
        part = self.images[: self.batch]
        self.source.write(images, part)
        cuda.send(part, self.addresses[0], self.stream)
        if not self.context[0].set_input_shape(self.source.name, images.shape):
            raise ContentError(f"the plan does not take images of shape {images.shape}", _BUILD_AGAIN)

    def enqueue(self) -> bool:
        """Put one inference on the stream."""
        return bool(self.context[0].execute_async_v3(int(self.stream)))

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold an inference, as far as the library tells beforehand (RTX does)."""
        ask = getattr(self.context[0], "is_stream_capturable", None)
        return ask is None or bool(ask(int(self.stream)))

    def receive(self) -> Array:
        """Wait for the logits [B,classes]."""
        part = self.logits[: self.batch]
        cuda.fetch(self.addresses[1], part, self.stream)
        cuda.call("cudaStreamSynchronize", self.stream)
        return self.result.read(part)


def io_tensors(engine: list[Any], trt: ModuleType, path: Path) -> tuple[IOTensor, IOTensor]:
    """Input [batch,C,H,W] and output [batch,classes] of the held engine; ContentError unless it has just these."""
    names = [engine[0].get_tensor_name(index) for index in range(engine[0].num_io_tensors)]
    found: dict[Any, list[IOTensor]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    for name in names:
        shape, kind = tuple(engine[0].get_tensor_shape(name)), str(engine[0].get_tensor_dtype(name).name)
        found[engine[0].get_tensor_mode(name)].append(IOTensor(name, shape[1:], kind))
    match list(found.values()):
        case [[source], [result]] if (len(source.shape), len(result.shape)) == (3, 1) and {
            source.kind,
            result.kind,
        } <= _TYPES.keys():
            return source, result
    listed = ", ".join(f"{edge.name} {edge.kind} {list(edge.shape)}" for each in found.values() for edge in each)
    raise ContentError(
        f"{path}: a plan must have one float input [batch, channels, height, width] and one float output [batch, "
        f"classes], but an image of this one has: {listed}",
        _BUILD_AGAIN,
    )


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
