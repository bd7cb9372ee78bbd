"""Running a plan: memory, types, streams, graphs and events, on a GPU of NumPy; CUDA's own words where it is asked."""

from __future__ import annotations

import gc
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_deploy import gpu
from polar_deploy.engines import cuda
from polar_deploy.engines.trt.run import TrtEngine
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.tensors import TensorSpec
from tests.support import fake_gpu
from tests.support.fake_gpu import MS, Cuda, Error, Trt


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(cuda, "_runtime", lambda: made)
    monkeypatch.setattr(gpu, "first", lambda: gpu.Gpu("GPU of NumPy", (9, 0)))
    return made


def engine(device: Cuda, folder: Path, *, rtx: bool = False, **plan: Any) -> TrtEngine:
    trt: Any = Trt(device, rtx=rtx)
    return TrtEngine(fake_gpu.plan(folder / "a.plan", **plan), trt, trt.logger)


def images(count: int, seed: int = 0) -> np.ndarray:
    """Small multiples of 1/8: exact in every type, sums included."""
    return (np.random.default_rng(seed).integers(-8, 9, (count, 3, 2, 2)) / 8).astype(np.float32)


def given(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"images": images(count, seed)}


def logits(of: np.ndarray) -> np.ndarray:
    return np.array([[each.sum() * factor for factor in (1, 2, 3, 4)] for each in of], np.float32)


@pytest.mark.parametrize("kind", ["FLOAT", "HALF", "BF16"])
def test_every_batch_of_the_profile_is_answered(device: Cuda, tmp_path: Path, kind: str) -> None:
    net = engine(device, tmp_path, kind=kind)
    assert (net.inputs, net.batches) == ({"images": TensorSpec((3, 2, 2))}, (2, 5))
    for batch in (2, 5, 3, 4, 5):  # what a larger batch left behind must not be seen
        answer = net.infer(given(batch, seed=batch))["logits"]
        assert answer.dtype == np.float32
        np.testing.assert_array_equal(answer, logits(images(batch, seed=batch)))


def test_what_was_answered_stays(device: Cuda, tmp_path: Path) -> None:
    net = engine(device, tmp_path)
    first = net.infer(given(3))["logits"]
    net.infer(given(3, seed=1))
    np.testing.assert_array_equal(first, logits(images(3)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 2, 2), "a.plan was built for batches of 2 to 5, but got 1 samples"),
        ((6, 3, 2, 2), "a.plan was built for batches of 2 to 5, but got 6 samples"),
        ((2, 3, 2, 3), "a.plan takes images as float32 [B, 3, 2, 2], but got float32 [2, 3, 2, 3]"),
    ],
)
@pytest.mark.parametrize("use", ["infer", "timer"])
def test_other_shapes_are_refused(device: Cuda, tmp_path: Path, use: str, shape: tuple[int, ...], message: str) -> None:
    net = engine(device, tmp_path)
    with pytest.raises(ContentError) as error:
        getattr(net, use)({"images": np.zeros(shape, np.float32)})
    assert error.value.what == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1.0, 1.0),
        (1 + 2**-8, 1.0),  # halfway: to even
        (1 + 3 * 2**-8, 1 + 2**-6),
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (-1 - 2**-8 - 2**-20, -1 - 2**-7),
        (0.0, 0.0),
    ],
)
def test_bf16_rounds_to_nearest_even(device: Cuda, tmp_path: Path, value: float, stored: float) -> None:
    one = np.zeros((2, 3, 2, 2), np.float32)
    one[:, 0, 0, 0] = value
    assert engine(device, tmp_path, kind="BF16").infer({"images": one})["logits"][0, 0] == stored


def test_the_clock_launches_a_graph_and_counts_one_inference(device: Cuda, tmp_path: Path) -> None:
    clock = engine(device, tmp_path).timer(given(3))
    assert clock.captured
    before = device.clock
    assert [clock(1), clock(7)] == [MS, MS]
    assert device.launches == 8
    assert device.clock - before == 8 * MS


@pytest.mark.parametrize("broken", [None, "cudaGraphInstantiate"])
def test_without_a_graph_the_clock_enqueues(device: Cuda, tmp_path: Path, broken: str | None) -> None:
    net = engine(device, tmp_path, capturable=broken is not None)
    if broken:
        device.broken[broken] = Error.cudaErrorStreamCaptureUnsupported
    clock = net.timer(given(3))
    assert not clock.captured
    before = device.clock
    assert clock(4) == MS
    assert (device.launches, device.clock - before) == (0, 4 * MS)
    assert device.sticky == 0, "the library would take the error of the capture for its own"
    assert not net._logger.errors, "nor is it a reason for what fails later"
    assert device.log.count("graph") == (1 if broken else 0)


def test_a_context_that_cannot_be_captured_is_not_tried(
    device: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_gpu.Context, "is_stream_capturable", lambda self, stream: False, raising=False)
    device.broken["cudaStreamBeginCapture"] = Error.cudaErrorIllegalAddress
    assert not engine(device, tmp_path).timer(given(3)).captured


def test_clocks_and_inference_do_not_disturb_each_other(device: Cuda, tmp_path: Path) -> None:
    net = engine(device, tmp_path)
    small, large = net.timer(given(2)), net.timer(given(5))
    for clock in (small, large, small):
        assert clock(2) == MS
        np.testing.assert_array_equal(net.infer(given(3))["logits"], logits(images(3)))


def test_a_duplicate_shares_nothing(device: Cuda, tmp_path: Path) -> None:
    net = engine(device, tmp_path)
    twin = net.duplicate()
    net.close()
    np.testing.assert_array_equal(twin.infer(given(3))["logits"], logits(images(3)))


@pytest.mark.parametrize("explicit", [True, False])
def test_all_is_freed_in_order(device: Cuda, tmp_path: Path, explicit: bool) -> None:
    gc.disable()  # by reference counts alone, at once
    try:
        net: Any = engine(device, tmp_path)
        clock: Any = net.timer(given(2))
        net.infer(given(2))
        device.log.clear()
        if explicit:
            net.close()
        else:
            del net
            assert device.log == [], "the clock still needs the engine"
            del clock
        # the clock's events and graph, each context, then its memory and stream, at last the engine and its runtime
        of_clock = ["event", "event", "launcher", "context", "device", "device", "host", "host", "stream"]
        of_infer = ["context", "device", "device", "host", "host", "stream"]
        lanes = [*of_infer, *of_clock] if explicit else [*of_clock, *of_infer]
        assert device.log == [*lanes, "engine", "runtime"]
    finally:
        gc.enable()
    assert device.blocks == {"device": {}, "host": {}}


def test_a_clock_that_goes_frees_what_it_had(device: Cuda, tmp_path: Path) -> None:
    net = engine(device, tmp_path)
    clock: Any = net.timer(given(5))
    del clock
    assert device.blocks == {"device": {}, "host": {}}
    assert "engine" not in device.log


@pytest.mark.parametrize("use", ["infer", "timer"])
@pytest.mark.parametrize("memory", [100, 240, 300])  # 5 images: 240 bytes; 5 x 4 logits: 80
def test_out_of_memory_says_so_and_leaves_nothing_behind(device: Cuda, tmp_path: Path, memory: int, use: str) -> None:
    net, device.memory = engine(device, tmp_path), memory
    with pytest.raises(MachineError, match=r"cudaMallocHost of 0\.0 MiB failed: CUDA says out of memory") as error:
        getattr(net, use)(given(5))
    assert "--batch" in error.value.todo
    del error
    assert device.blocks == {"device": {}, "host": {}}
    device.memory = 400
    getattr(net, use)(given(5))


def test_the_first_call_that_fails_is_named(device: Cuda, tmp_path: Path) -> None:
    net = engine(device, tmp_path)
    device.broken |= dict.fromkeys(("cudaStreamSynchronize", "cudaFree"), Error.cudaErrorIllegalAddress)
    text = "cudaStreamSynchronize failed: CUDA says an illegal memory access was encountered (cudaErrorIllegalAddress)"
    with pytest.raises(MachineError) as error:
        net.infer(given(3))
    assert error.value.what == text
    net.close()  # cudaFree fails too, which is no news


@pytest.mark.parametrize("broken", ["cudaGraphLaunch", "cudaEventSynchronize", "cudaEventElapsedTime"])
def test_a_clock_that_breaks_gives_no_time(device: Cuda, tmp_path: Path, broken: str) -> None:
    device.broken[broken] = Error.cudaErrorIllegalAddress
    clock = engine(device, tmp_path).timer(given(3))
    with pytest.raises(MachineError, match=f"{broken} failed: CUDA says an illegal memory access"):
        clock(1)


@pytest.mark.parametrize("use", ["infer", "timer"])
@pytest.mark.parametrize(
    ("plan", "message", "todo"),
    [
        ({"fails": True}, "tensorrt refuses to run it: the context is not ready", "build again"),
        ({"contextless": True}, "tensorrt makes no context for it: OutOfMemory: requested size was 4294967296", "--b"),
    ],
)
def test_what_tensorrt_refuses_comes_with_its_words(
    device: Cuda, tmp_path: Path, use: str, plan: dict[str, Any], message: str, todo: str
) -> None:
    net = engine(device, tmp_path, **plan)
    with pytest.raises(MachineError) as error:
        getattr(net, use)(given(3))
    assert message in error.value.what
    assert todo in error.value.todo


def test_a_corrupt_plan_comes_with_the_librarys_words(device: Cuda, tmp_path: Path) -> None:
    trt: Any = Trt(device)
    (tmp_path / "a.plan").write_bytes(b"no plan")
    with pytest.raises(ContentError, match=r"a\.plan is a corrupt plan: .*magic tag does not match"):
        TrtEngine(tmp_path / "a.plan", trt, trt.logger)
    gc.collect()
    assert device.log == ["runtime"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "FP8"}, "logits is FP8 [-1, 4]"),
        ({"tensors": {"images": ["INPUT", [-1, 3, 2, 2]]}}, "1 inputs and 0 outputs"),
        ({"tensors": {"images": ["INPUT", [-1, -1]], "logits": ["OUTPUT", [-1, 4]]}}, "images is FLOAT [-1, -1]"),
    ],
)
def test_plans_of_other_networks_are_refused(device: Cuda, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ContentError) as error:
        engine(device, tmp_path, **change)
    assert words in error.value.what
    gc.collect()
    assert device.log == ["engine", "runtime"]


def test_only_rtx_is_told_to_compile_before_it_runs(device: Cuda, tmp_path: Path) -> None:
    for rtx in (False, True):
        net = engine(device, tmp_path, rtx=rtx)
        net.infer(given(2))
        trt: Any = net._trt
        strategies = [config and config.dynamic_shapes_kernel_specialization_strategy for config in trt.configs]
        assert strategies == (["eager"] if rtx else [None])


@pytest.mark.parametrize("allowed", [False, True])
def test_code_in_a_plan_is_run_only_where_allowed(device: Cuda, tmp_path: Path, allowed: bool) -> None:
    trt: Any = Trt(device)
    net = TrtEngine(fake_gpu.plan(tmp_path / "a.plan"), trt, trt.logger, host_code=allowed)
    net.duplicate()
    assert trt.host_code == [allowed, allowed]


def test_without_a_gpu_the_library_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> gpu.Gpu:
        raise gpu.NoGpuError("no NVIDIA driver")

    monkeypatch.setattr(gpu, "first", none)
    trt: Any = None  # its Runtime would end the process
    with pytest.raises(MachineError, match=r"a\.plan cannot run here: no NVIDIA driver"):
        TrtEngine(tmp_path / "a.plan", trt, None)


def _has_gpu() -> bool:
    try:
        gpu.first()
    except gpu.NoGpuError:
        return False
    return True


@pytest.mark.skipif(_has_gpu(), reason="here CUDA would answer")
def test_cudas_own_words_without_a_driver() -> None:
    pytest.importorskip("cuda.bindings", minversion="12.9")  # older ones raise where there is no driver
    with pytest.raises(MachineError, match=r"cudaMalloc of 1\.0 MiB failed: CUDA says .*driver.* \(cudaError"):
        cuda.call("cudaMalloc", 1 << 20)


@pytest.mark.skipif(_has_gpu(), reason="here CUDA would follow these addresses")
def test_cuda_takes_the_arguments_that_we_give() -> None:
    pytest.importorskip("cuda.bindings", minversion="12.9")
    real = pytest.importorskip("cuda.bindings.runtime")
    stream, event, host = real.cudaStream_t(77), real.cudaEvent_t(), np.zeros(4, np.float32)
    assert int(stream) == 77  # what TensorRT takes
    assert not real.cudaError_t.cudaSuccess
    calls: list[tuple[Any, ...]] = [
        (cuda.send, host, 4096, stream),
        (cuda.fetch, 4096, host, stream),
        (cuda.call, "cudaStreamCreateWithFlags", real.cudaStreamNonBlocking),
        (cuda.call, "cudaEventRecord", event, stream),
        (cuda.call, "cudaEventElapsedTime", event, event),
        (cuda.call, "cudaDeviceGetPCIBusId", 13, 0),
        (cuda.call, "cudaGraphInstantiate", real.cudaGraph_t(), 0),
        (cuda.call, "cudaGraphLaunch", real.cudaGraphExec_t(), stream),
    ]
    for function, *arguments in calls:  # a wrong argument would be a TypeError
        with pytest.raises(MachineError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice"):
            function(*arguments)
    assert len(real.cudaFree(4096)) == len(real.cudaFreeHost(4096)) == len(real.cudaGetLastError()) == 1


def test_the_fake_has_cudas_signatures() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for name, function in inspect.getmembers(Cuda, inspect.isfunction):
        if not name.startswith("cuda"):
            continue
        head = str(getattr(real, name).__doc__).splitlines()[0]  # cudaMemcpyAsync(dst, src, size_t count, kind: ...)
        words = [part.split(":")[0].split()[-1] for part in head.partition("(")[2].rstrip(")").split(",") if part]
        assert list(inspect.signature(function).parameters)[1:] == words, name
    for error in Error:
        assert getattr(real.cudaError_t, error.name) == error
    assert real.cudaStreamNonBlocking == Cuda.cudaStreamNonBlocking
    for kinds, theirs in (
        (Cuda.cudaMemcpyKind, real.cudaMemcpyKind),
        (Cuda.cudaStreamCaptureMode, real.cudaStreamCaptureMode),
    ):
        for name, value in vars(kinds).items():
            assert getattr(theirs, name) == value
