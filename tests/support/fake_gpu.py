"""A GPU of NumPy: as much of CUDA's runtime and of TensorRT as running a plan takes, with their rules.

Work on a stream waits until it is synchronised, copies have to stay within memory that was asked for, a stream in
capture records instead of running, and all is noted in the order in which it is freed.
"""

from __future__ import annotations

import enum
import json
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

MS = 0.25  # that one inference takes


class Error(enum.IntEnum):
    """Of cudaError_t."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Stream:
    """A queue. `record` is a list while it is captured."""

    def __init__(self, number: int) -> None:
        self.number, self.waiting, self.record, self.spoilt = number, [], None, False  # type: ignore[var-annotated]

    def __int__(self) -> int:
        return self.number

    def put(self, work: Callable[[], None]) -> None:
        (self.waiting if self.record is None else self.record).append(work)

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


class Cuda:
    """`cuda.bindings.runtime`. `memory` bytes can be had; a function in `broken` gives that error."""

    cudaError_t = Error
    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, memory: int = 1 << 20) -> None:
        self.memory, self.log, self.clock, self.sticky = memory, [], 0.0, 0  # type: ignore[var-annotated]
        self.broken: dict[str, Error] = {}
        self.blocks: dict[str, dict[int, np.ndarray]] = {"device": {}, "host": {}}
        self.streams: dict[int, Stream] = {}
        self.launches = 0

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        broken = object.__getattribute__(self, "broken") if name.startswith("cuda") else {}
        if name not in broken:
            return found
        alone = found.__annotations__["return"] == "tuple[Error]"
        return lambda *_: (broken[name],) if alone else (broken[name], None)

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error(0), {2: b"out of memory", 700: b"an illegal memory access was encountered"}.get(error, b"bad")

    def cudaGetLastError(self) -> tuple[int]:
        error, self.sticky = self.sticky, 0
        return (error,)

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        return self._allocate("device", size)

    def cudaMallocHost(self, size: int) -> tuple[Error, int | None]:
        return self._allocate("host", size)

    def cudaFree(self, devPtr: int) -> tuple[Error]:
        return self._release("device", devPtr)

    def cudaFreeHost(self, ptr: int) -> tuple[Error]:
        return self._release("host", ptr)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: Stream) -> tuple[Error]:
        where = ("device", "host") if kind == 1 else ("host", "device")
        target, source = self.at(where[0], dst, count), self.at(where[1], src, count)
        if target is None or source is None:
            return (Error.cudaErrorInvalidValue,)
        stream.put(lambda: np.copyto(target, source))
        return (Error(0),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, Stream]:
        made = self.streams[len(self.streams) + 7] = Stream(len(self.streams) + 7)
        return Error(0), made

    def cudaStreamDestroy(self, stream: Stream) -> tuple[Error]:
        self.log.append("stream")
        return (Error(0),)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[Error]:
        stream.run()
        return (Error(0),)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[Error]:
        assert not stream.waiting
        stream.record, stream.spoilt = [], False
        return (Error(0),)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[Error, list[Any] | None]:
        record, stream.record = stream.record, None
        if stream.spoilt:
            self.sticky = Error.cudaErrorStreamCaptureUnsupported
            return Error.cudaErrorStreamCaptureUnsupported, None
        return Error(0), record

    def cudaGraphInstantiate(self, graph: list[Any], flags: int) -> tuple[Error, tuple[Any, ...]]:
        return Error(0), tuple(graph)

    def cudaGraphLaunch(self, graphExec: tuple[Any, ...], stream: Stream) -> tuple[Error]:
        self.launches += 1
        for work in graphExec:
            stream.put(work)
        return (Error(0),)

    def cudaGraphDestroy(self, graph: list[Any]) -> tuple[Error]:
        self.log.append("graph")
        return (Error(0),)

    def cudaGraphExecDestroy(self, graphExec: tuple[Any, ...]) -> tuple[Error]:
        self.log.append("launcher")
        return (Error(0),)

    def cudaEventCreate(self) -> tuple[Error, SimpleNamespace]:
        return Error(0), SimpleNamespace(time=None, stream=None)

    def cudaEventRecord(self, event: SimpleNamespace, stream: Stream) -> tuple[Error]:
        event.stream = stream
        stream.put(lambda: setattr(event, "time", self.clock))
        return (Error(0),)

    def cudaEventSynchronize(self, event: SimpleNamespace) -> tuple[Error]:
        event.stream.run()
        return (Error(0),)

    def cudaEventElapsedTime(self, start: SimpleNamespace, end: SimpleNamespace) -> tuple[Error, float | None]:
        if start.time is None or end.time is None:
            return Error.cudaErrorNotReady, None
        return Error(0), end.time - start.time

    def cudaEventDestroy(self, event: SimpleNamespace) -> tuple[Error]:
        self.log.append("event")
        return (Error(0),)

    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> tuple[Error, bytes]:
        return Error(0), b"0000:65:00.0\0"[:length]

    def at(self, side: str, address: int, size: int) -> np.ndarray | None:
        """The bytes there, if all of them were asked for."""
        for start, block in self.blocks[side].items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        return None

    def _allocate(self, side: str, size: int) -> tuple[Error, int | None]:
        if size + sum(len(block) for block in self.blocks[side].values()) > self.memory:
            return Error.cudaErrorMemoryAllocation, None
        block = np.full(size, 0xAB, np.uint8)
        self.blocks[side][block.ctypes.data] = block
        return Error(0), block.ctypes.data

    def _release(self, side: str, address: int) -> tuple[Error]:
        del self.blocks[side][address]
        self.log.append(side)
        return (Error(0),)


class Noted:
    """Notes when it goes; `kept` is what it must outlive."""

    def __init__(self, log: list[str], word: str) -> None:
        self._log, self._word = log, word

    def __del__(self) -> None:
        self._log.append(self._word)


class Context(Noted):
    """Logits of class k: the sum of the image times k + 1."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine._log, "context")
        self.plan, self.cuda, self.trt = engine.plan, engine.cuda, engine.trt
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.plan["profile"]
        if name != "images" or not smallest <= shape[0] <= largest or list(shape[1:]) != self.plan["shape"]:
            return False
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in ("images", "logits")

    def execute_async_v3(self, stream_handle: int) -> bool:
        stream = self.cuda.streams[stream_handle]
        if self.shape is None or self.addresses.keys() != {"images", "logits"} or self.plan.get("fails"):
            self.trt.say("the context is not ready")
            return False
        if stream.record is not None and not self.plan.get("capturable", True):
            stream.spoilt = True
            self.trt.say("operation not permitted when stream is capturing")
            return False
        self.runs += 1
        stream.put(partial(_compute, self.cuda, self.plan, self.shape, dict(self.addresses)))
        return True


class Engine(Noted):
    """A deserialised plan."""

    def __init__(self, trt: Trt, plan: dict[str, Any]) -> None:
        super().__init__(trt.cuda.log, "engine")
        self.trt, self.cuda, self.plan = trt, trt.cuda, plan
        self.tensors = plan.get("tensors") or {
            "logits": ["OUTPUT", [-1, plan["classes"]]],
            "images": ["INPUT", [-1, *plan["shape"]]],
        }
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode[self.tensors[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][1])

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.plan["kind"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert (name, profile_index) == ("images", 0)
        return [(batch, *self.plan["shape"]) for batch in self.plan["profile"]]

    def create_execution_context(self, config: Any = None) -> Context | None:
        self.trt.configs.append(config)
        if self.plan.get("contextless"):
            self.trt.say("OutOfMemory: requested size was 4294967296 bytes")
            return None
        return Context(self)

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None)


class Trt:
    """The module `tensorrt`, or with `rtx` that of TensorRT for RTX."""

    __name__ = "tensorrt"

    def __init__(self, cuda: Cuda, *, rtx: bool = False) -> None:
        self.cuda, self.configs, self.host_code = cuda, [], []  # type: ignore[var-annotated]
        self.logger = SimpleNamespace(errors=deque(maxlen=20))
        self.TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, logger: Any) -> Any:
        trt = self

        class Runtime(Noted):
            engine_host_code_allowed = False

            def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
                trt.host_code.append(self.engine_host_code_allowed)
                if not plan.startswith(b"{"):
                    trt.say("Serialization assertion failed: magic tag does not match")
                    return None
                return Engine(trt, json.loads(plan))

        assert logger is self.logger
        return Runtime(self.cuda.log, "runtime")

    def say(self, text: str) -> None:
        self.logger.errors.append(text)


def plan(path: Path, **other: Any) -> Path:
    """Write a plan: 3 x 2 x 2 images, 4 classes, batches 2, 3 and 5, unless something else is said."""
    path.write_text(json.dumps({"shape": [3, 2, 2], "classes": 4, "profile": [2, 3, 5], "kind": "FLOAT"} | other))
    return path


def _compute(cuda: Cuda, plan: dict[str, Any], shape: tuple[int, ...], addresses: dict[str, int]) -> None:
    kind, classes = _NUMPY[plan["kind"]], plan["classes"]
    source = cuda.at("device", addresses["images"], math.prod(shape) * kind.itemsize)
    target = cuda.at("device", addresses["logits"], shape[0] * classes * kind.itemsize)
    assert source is not None
    assert target is not None
    images = _wide(source, plan["kind"]).reshape(shape)
    logits = images.sum(axis=(1, 2, 3))[:, None] * np.arange(1, classes + 1, dtype=np.float32)
    target[:] = _narrow(logits, plan["kind"]).reshape(-1).view(np.uint8)
    cuda.clock += MS


_NUMPY = {"FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}


def _wide(memory: np.ndarray, kind: str) -> np.ndarray:
    if kind == "BF16":
        return (memory.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return memory.view(_NUMPY[kind]).astype(np.float32)


def _narrow(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "BF16":  # exact in these tests
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, _NUMPY[kind])
