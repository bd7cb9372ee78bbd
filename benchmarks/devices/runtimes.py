"""Times of a runtime on this machine, at every width: `python -m benchmarks.devices.runtimes NAME [ROUNDS]`.

Run it from the project's folder with the Python of an environment that has the runtime, onnx and numpy; names are those
of `RUNTIMES`. One thread, processor time. In each round every width runs once, in another order, right after the
reference: a width's cost is the median of the ratios, times the median time of the reference. Copies of the reference
take part as its own width and as the control; how far the control is off stands in the file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.devices.staircase import EVERY, OUTER, SOME, write

Run = Callable[[], object]
PIXELS = 28
REFERENCE, CONTROL = 64, 0  # widths; both are copies of what every other one runs after
LOADS = 5  # times that every network is loaded anew: where its memory lies decides, too


def model(layer: str, width: int) -> onnx.ModelProto:
    """OUTER channels, `width` between two layers, OUTER channels; a depthwise layer stands between them."""
    random = np.random.default_rng(0)
    kernel = 3 if layer == "conv3x3" else 1
    nodes, weights = [], []

    def conv(x: str, y: str, channels: int, given: int, kernel: int, group: int = 1) -> None:
        weight = random.normal(size=(channels, given // group, kernel, kernel)) / (kernel * given**0.5)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{y}_weight"))
        weights.append(numpy_helper.from_array(random.normal(size=channels).astype(np.float32), f"{y}_bias"))
        inputs = [x, f"{y}_weight", f"{y}_bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"{y}_sum"], name=y, pads=[kernel // 2] * 4, group=group))
        nodes.append(helper.make_node("Relu", [f"{y}_sum"], [y]))

    conv("x", "first", width, OUTER, kernel)
    if layer == "depthwise3x3":
        conv("first", "depthwise", width, width, 3, group=width)
    conv("depthwise" if layer == "depthwise3x3" else "first", "y", OUTER, width, kernel)
    shape = [1, OUTER, PIXELS, PIXELS]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def sample() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, OUTER, PIXELS, PIXELS)).astype(np.float32)


def onnx_runtime(path: Path) -> Run:
    return onnx_runtime_of(path, sample().shape)


def onnx_runtime_of(path: Path, shape: Sequence[int]) -> Run:
    """A model of one input of that shape, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=tuple(shape)).astype(np.float32)
    return lambda: session.run(None, {session.get_inputs()[0].name: x})


def onnx_runtime_int8(path: Path) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [sample()]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return {"x": self.left.pop()} if self.left else None

    quantize_static(
        str(path),
        str(path.with_suffix(".int8.onnx")),
        Samples(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return onnx_runtime(path.with_suffix(".int8.onnx"))


def openvino(path: Path) -> Run:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(sample()))
    return request.infer


def mnn(path: Path) -> Run:
    import MNN

    made = path.with_suffix(".mnn")
    command = [str(Path(sys.executable).with_name("mnnconvert")), "-f", "ONNX", "--modelFile", str(path)]
    subprocess.run([*command, "--MNNModel", str(made), "--bizCode", "x"], check=True, capture_output=True)
    interpreter = MNN.Interpreter(str(made))
    session = interpreter.createSession({"numThread": 1, "backend": "CPU", "precision": "normal"})
    run: Run = lambda: interpreter.runSession(session)  # noqa: E731
    return run


def ncnn(path: Path) -> Run:
    import ncnn

    graph = onnx.load(path).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    lines, data, last = ["Input x 0 1 x"], b"", "x"
    for node in (node for node in graph.node if node.op_type == "Conv"):
        weight, bias = values[node.input[1]], values[node.input[2]]
        group = next(each.i for each in node.attribute if each.name == "group")
        kernel = weight.shape[-1]
        kind, extra = ("ConvolutionDepthWise", f" 7={group}") if group > 1 else ("Convolution", "")
        sizes = f"0={len(weight)} 1={kernel} 4={kernel // 2} 5=1 6={weight.size} 9=1{extra}"
        lines.append(f"{kind} {node.name} 1 1 {last} {node.name} {sizes}")
        data += b"\0\0\0\0" + weight.tobytes() + bias.tobytes()
        last = node.name
    text = "\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]) + "\n"
    path.with_suffix(".param").write_text(text)
    path.with_suffix(".bin").write_bytes(data)
    network = ncnn.Net()
    network.opt.num_threads = 1
    network.load_param(str(path.with_suffix(".param")))
    network.load_model(str(path.with_suffix(".bin")))
    x = ncnn.Mat(sample()[0])

    def run() -> object:
        extractor = network.create_extractor()
        extractor.input("x", x)
        return extractor.extract(last)

    return run


def tract_(path: Path) -> Run:
    import tract

    runnable = tract.onnx().load(str(path)).into_model().into_runnable()
    x = sample()
    return lambda: runnable.run([x])


# name -> title, its package, precision, how a model is loaded
RUNTIMES: dict[str, tuple[str, str, str, Callable[[Path], Run]]] = {
    "onnxruntime-x86": ("ONNX Runtime on an x86 CPU", "onnxruntime", "fp32", onnx_runtime),
    "onnxruntime-x86-int8": ("ONNX Runtime on an x86 CPU, INT8", "onnxruntime", "int8", onnx_runtime_int8),
    "openvino-x86": ("OpenVINO on an x86 CPU", "openvino", "fp32", openvino),
    "mnn-x86": ("MNN on an x86 CPU", "mnn", "fp32", mnn),
    "ncnn-x86": ("ncnn on an x86 CPU", "ncnn", "fp32", ncnn),
    "tract-x86": ("tract on an x86 CPU", "tract", "fp32", tract_),
}


def seconds(run: Run, times: int) -> float:
    """Processor time of a run, which other programs disturb less than the clock on the wall."""
    run()  # its weights are in the cache from here on
    begin = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - begin) / times


def ratios(reference: Run, runs: Mapping[int, Run], rounds: int) -> tuple[dict[int, float], float]:
    """Cost of each over the reference's, and the reference's milliseconds."""
    for run in (reference, *runs.values()):
        seconds(run, 5)
    times = max(1, round(1e-3 / seconds(reference, 20)))
    random, base = np.random.default_rng(0), []
    found: dict[int, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key in random.permutation(list(runs)):
            first, own = seconds(reference, times), seconds(runs[int(key)], times)
            found[int(key)].append(own / first)
            base.append(first)
    return {key: statistics.median(each) for key, each in found.items()}, 1e3 * statistics.median(base)


def machine() -> str:
    """The processor, and which instructions of interest it has."""
    text = Path("/proc/cpuinfo").read_text()
    field = {line.split(":")[0].strip(): line.partition(":")[2].strip() for line in text.splitlines() if ":" in line}
    flags = field["flags"].split()
    has = [each for each in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if each in flags]
    return f"x86-64 with {', '.join(has)}"


def sweep(load: Callable[[Path], Run], layer: str, widths: Sequence[int], rounds: int) -> tuple[dict[str, Any], float]:
    """One sweep of the file, and how far its control was off."""
    loads = []
    for _ in range(LOADS):
        with tempfile.TemporaryDirectory() as folder:
            loaded: list[Run] = []
            for width in (REFERENCE, CONTROL, *widths):
                path = Path(folder) / f"{len(loaded)}.onnx"
                onnx.save(model(layer, width or REFERENCE), path)
                loaded.append(load(path))
            runs = dict(zip((CONTROL, *widths), loaded[1:], strict=True))
            loads.append(ratios(loaded[0], runs, max(3, rounds // LOADS)))
    found = {width: statistics.median(ratio[width] for ratio, _ in loads) for width in loads[0][0]}
    base, control = statistics.median(base for _, base in loads), found.pop(CONTROL) / found[REFERENCE] - 1
    order = sorted(found)
    costs = [round(base * found[width], 5) for width in order]
    return {"layer": layer, "varies": "between", "widths": order, "cost": costs}, control


def main(name: str, rounds: int = 101) -> None:
    """Measure and write the file."""
    title, package, precision, load = RUNTIMES[name]
    sweeps, controls = [], []
    for layer, widths in (("conv3x3", EVERY), ("conv1x1", SOME), ("depthwise3x3", SOME)):
        found, control = sweep(load, layer, widths, rounds)
        sweeps.append({"precision": precision, **found})
        controls.append(control)
        print(json.dumps(found), f"control {control:+.3f}", flush=True)
    method = (
        f"processor time, median of {rounds} runs paired with a run of width {REFERENCE}, all widths in turn, loaded "
        f"{LOADS} times, one thread, batch 1, {PIXELS} x {PIXELS} pixels, {OUTER} channels around the width that "
        f"varies, while other programs ran; the control was off by {max(map(abs, controls)):.1%} at most"
    )
    source = {
        "kind": "measured",
        "tool": package,
        "version": version(package),
        "date": str(date.today()),
        "method": method,
        "machine": machine(),
        "script": "benchmarks/devices/runtimes.py",
    }
    write(name, {"title": title, "source": source, "unit": "ms", "sweeps": sweeps})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
