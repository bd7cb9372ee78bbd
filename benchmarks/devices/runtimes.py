"""Times of a runtime on this machine, one of `RUNTIMES`: `python -m benchmarks.devices.runtimes NAME [ROUNDS]`.

Run it from the project's folder with the Python of an environment that has the runtime, onnx, numpy and pydantic.
ONNX Runtime has a command of its own: `polar-deploy devices measure`. A CPU without AVX-512 computes fewer channels at
a time: its files are named NAME-avx2.
"""

from __future__ import annotations

import sys
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.devices.printed import printed_to
from benchmarks.devices.staircase import FOLDER
from polar_deploy import cpu
from polar_deploy.devices.measure import session, session_int8
from polar_deploy.devices.sweep import Load, Run, Size, measured


def sample(size: Size) -> np.ndarray:
    """The input of a network."""
    return np.random.default_rng(1).normal(size=size).astype(np.float32)


def openvino(path: Path, size: Size) -> Run:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(sample(size)))
    return request.infer


def mnn(path: Path, size: Size) -> Run:
    """Converted without the command `mnnconvert`, which tells its maker of every call and has pip install what it needs
    for that."""
    import _tools
    import MNN

    made = path.with_suffix(".mnn")
    options = {"-f": "ONNX", "--bizCode": "x", "--modelFile": str(path), "--MNNModel": str(made)}
    if not made.exists():
        with printed_to(path.with_suffix(".log")):
            _tools.mnnconvert(["mnnconvert", *chain.from_iterable(options.items())])
    interpreter = MNN.Interpreter(str(made))
    session = interpreter.createSession({"numThread": 1, "backend": "CPU", "precision": "normal"})
    interpreter.resizeTensor(interpreter.getSessionInput(session), size)  # which is [batch, …] in the file
    interpreter.resizeSession(session)
    run: Run = lambda: interpreter.runSession(session)  # noqa: E731
    return run


def ncnn(path: Path, size: Size) -> Run:
    """Convolutions one behind the other, as in a sweep: its converter is no package."""
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
    x = ncnn.Mat(sample(size)[0])

    def run() -> object:
        extractor = network.create_extractor()
        extractor.input("x", x)
        return extractor.extract(last)

    return run


def tract_(path: Path, size: Size) -> Run:
    import tract

    runnable = tract.onnx().load(str(path)).into_model().into_runnable()
    x = sample(size)
    return lambda: runnable.run([x])


def xnnpack(path: Path, size: Size) -> Run:
    """LiteRT hands what it can to XNNPACK, which is all of it; the same layers in INT8 with random weights."""
    from ai_edge_litert.interpreter import Interpreter

    from benchmarks.devices.tflite import convert

    made = path.with_suffix(".tflite")
    if not made.exists():
        convert(path, size, made)
    interpreter = Interpreter(str(made), num_threads=1)
    interpreter.allocate_tensors()
    run: Run = interpreter.invoke
    return run


# name -> title, its package, precision, how a model with an input of some size is loaded
RUNTIMES: dict[str, tuple[str, str, str, Load]] = {
    "onnxruntime-x86": ("ONNX Runtime on an x86 CPU", "onnxruntime", "fp32", session),
    "onnxruntime-x86-int8": ("ONNX Runtime on an x86 CPU, INT8", "onnxruntime", "int8", session_int8),
    "openvino-x86": ("OpenVINO on an x86 CPU", "openvino", "fp32", openvino),
    "mnn-x86": ("MNN on an x86 CPU", "mnn", "fp32", mnn),
    "ncnn-x86": ("ncnn on an x86 CPU", "ncnn", "fp32", ncnn),
    "tract-x86": ("tract on an x86 CPU", "tract", "fp32", tract_),
    "xnnpack-x86-int8": ("XNNPACK (LiteRT) on an x86 CPU, INT8", "ai-edge-litert", "int8", xnnpack),
}


def on_this_cpu(name: str) -> str:
    """The name of a runtime's file for the instructions that this CPU has."""
    return name if "avx512f" in cpu.instructions() else f"{name}-avx2"


def machine() -> str:
    """The processor, and which instructions of interest it has."""
    flags = cpu.instructions()
    has = [each for each in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if each in flags]
    return f"x86-64 with {', '.join(has)}"


def main(name: str, rounds: int = 75) -> None:
    """Measure and write the file."""
    title, package, precision, load = RUNTIMES[name]
    if on_this_cpu(name) != name:
        name, title = on_this_cpu(name), f"{title} with AVX2 alone"
    source = {
        "tool": package,
        "version": version(package),
        "date": str(date.today()),
        "script": "benchmarks/devices/runtimes.py",
        "machine": machine(),
    }
    device, off = measured(name, precision, source, load, rounds)
    made = device.model_copy(update={"title": title})
    (FOLDER / f"{name}.json").write_text(made.text(), encoding="utf-8")
    print(f"control {off:.1%}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
