"""A small valid bundle for any target, made by hand: no run, no training, no GPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LABELS = ("cat", "dog", 'the "owl"', "Füchse", "hen", "newt")
PLAN = b"no plan: a few bytes in the place of one"
VERSION = "10.13.3.9"  # of the library that "built" it
SHA256 = "5" * 64
_WIDTHS = {"compressed": 4, "full": 8}  # channels of the only convolution
_TYPES = {
    "fp32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_LIBRARIES = {"trt": "TensorRT", "rtx": "TensorRT for RTX"}


def write_bundle(folder: Path, target: str = "ort-fp32", *, full: bool = True, **changes: Any) -> Path:
    """Write a valid bundle into a new folder and return it.

    Args:
        folder: where to.
        target: such as "trt-fp16"; a target with plans gets the bytes of `PLAN`.
        full: whether the full network is in it.
        changes: fields of the manifest, and `input` and `output` for those of its only input and output. Where they
            are mappings, only the fields in them are replaced. The graphs have the names, types and sizes that the
            manifest then says.
    """
    backend, _, precision = target.rpartition("-")
    names = ("compressed", "full") if full else ("compressed",)
    document = _document(target, backend, precision, names)
    for kind in ("input", "output"):
        document[f"{kind}s"][0] |= changes.pop(kind, {})
    document = _merged(document, changes)
    for name in names:
        document["networks"][name] |= _cost(document, _WIDTHS[name])
    for name in names:
        _write_network(folder, name, document, backend, precision)
    (source,), (result,) = document["inputs"], document["outputs"]
    inputs = np.random.default_rng(0).normal(size=(32, *source["shape"])).astype("<f4")
    document["golden"] |= {"full": None}
    for part, name, values in (
        ("inputs", source["name"], inputs),
        *((network, result["name"], logits(folder / network / "model.onnx", inputs)) for network in names),
    ):
        file = f"golden/{part}.npy"
        _write(folder / file, b"")
        np.save(folder / file, values)
        document["golden"][part] = {name: file}
    _write(folder / "labels.txt", "".join(f"{label}\n" for label in LABELS).encode())
    _write(folder / "compressed/surgery.json", b'{"schema": 1}\n')
    document.setdefault("files", _listed(folder))
    _write(folder / "manifest.json", json.dumps(document, indent=1, ensure_ascii=False).encode())
    return folder


def logits(graph: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime says on one thread: float32 [B,classes]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0], "<f4")


def _document(target: str, backend: str, precision: str, names: tuple[str, ...]) -> dict[str, Any]:
    verdict = {"result": "pass", "reason": "a test"}
    networks = {
        name: _network(name, target, backend, precision) if name in names else None for name in ("compressed", "full")
    }
    return {
        "schema": 2,
        "kind": "polar_deploy.bundle",
        "name": "net-pictures",
        "licence": "CC0",
        "target": target,
        "build": {"batches": [1, 8, 64]},
        "task": {"name": "classification", "metric": {"name": "accuracy", "unit": "%"}, "preprocessing": {}},
        "inputs": [{"name": "input", "shape": [3, 8, 8], "dtype": "fp32"}],
        "outputs": [{"name": "logits", "shape": [len(LABELS)], "dtype": "fp32"}],
        "preprocessing": {
            "channels": "RGB",
            "filter": "bilinear",
            "shorter_side": 11,
            "crop": 8,
            "scale": 1 / 255,
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.25, 0.3],
        },
        "labels": "labels.txt",
        "golden": {"source": "random", "samples": 32},
        "networks": networks,
        "surgery": "compressed/surgery.json",
        "metrics": {"machine": {}, "not_run": "a test", "accuracy": None, "fp32_graphs": None, "latency": []},
        "verdict": {"asked": {}, "accuracy": verdict, "latency": verdict, "overall": verdict},
        "provenance": {
            "polar_deploy": "1.0",
            "versions": {},
            "model": "net",
            "full": "trained",
            "data": {"name": "pictures", "sha256": SHA256},
            "settings": {},
        },
    }


def _network(name: str, target: str, backend: str, precision: str) -> dict[str, Any]:
    fp32 = f"{name}/model.onnx"
    return {
        "fp32": fp32,
        "typed": fp32 if precision == "fp32" else f"engines/{name}.onnx",
        "layers": f"engines/{name}.layers.json",
        "plan": _plan(name, backend) if backend in _LIBRARIES else None,
        "provider": {"ort": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}.get(backend, target),
        "threads": 1 if backend == "ort" else None,
        "tf32": False,
        "versions": {},
        "precision": {
            "asked": precision,
            "found": {precision: 2},
            "io_dtype": "fp32",
            "types": {precision: 2},
            "high_precision_layers": [],
            "calibration": None,
        },
        "reformats": None,
        "padded_channels": None,
    }


def _cost(document: dict[str, Any], width: int) -> dict[str, int]:
    """Of a convolution of 3 x 3 pixels, padded, and a linear layer, both with bias."""
    (classes,), (channels, height, side) = document["outputs"][0]["shape"], document["inputs"][0]["shape"]
    macs = 9 * channels * width * height * side + width * classes
    return {"macs": macs, "params": 9 * channels * width + width + width * classes + classes}


def _plan(name: str, backend: str) -> dict[str, Any]:
    return {
        "file": f"engines/{name}.plan",
        "library": _LIBRARIES[backend],
        "version": VERSION,
        "gpu": "NVIDIA L4",
        "capabilities": ["8.9"],
        "driver": "580.65.06",
        "cuda": "13.0",
        "version_compatible": False,
        "hardware_compatible": False,
        "timing_cache": "engines/timing.cache" if backend == "trt" else None,
        "profile": {"min": 1, "opt": 8, "max": 64},
        "trtexec": None,
    }


def _write_network(folder: Path, name: str, document: dict[str, Any], backend: str, precision: str) -> None:
    entry = document["networks"][name]
    _write(folder / entry["fp32"], _graph(document, _WIDTHS[name], "fp32"))
    if entry["typed"] != entry["fp32"]:
        _write(folder / entry["typed"], _graph(document, _WIDTHS[name], precision))
    _write(folder / entry["layers"], b'{"schema": 1, "layers": []}\n')
    if entry["plan"]:
        _write(folder / entry["plan"]["file"], PLAN + name.encode())
        if backend == "trt":
            _write(folder / entry["plan"]["timing_cache"], b"timings")


def _graph(document: dict[str, Any], width: int, precision: str) -> bytes:
    """Conv, Relu, GlobalAveragePool, Flatten, Gemm in a precision; the typed one with the manifest's types."""
    (source,), (result,) = document["inputs"], document["outputs"]
    (classes,) = result["shape"]
    kinds = ("fp32", "fp32") if precision == "fp32" else (source["dtype"], result["dtype"])
    inner, weights = _TYPES[precision if precision in _TYPES else "fp32"]
    rng = np.random.default_rng(width)
    shapes = {"w": (width, 3, 3, 3), "b": (width,), "v": (classes, width), "c": (classes,)}
    nodes = [
        helper.make_node("Cast", [source["name"]], ["x"], "cast_in", to=inner),
        *(_quantised() if precision == "int8" else [helper.make_node("Identity", ["x"], ["y"], "same")]),
        helper.make_node("Conv", ["y", "w", "b"], ["h"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "v", "c"], ["g"], "classify", transB=1),
        helper.make_node("Cast", ["g"], [result["name"]], "cast_out", to=_TYPES[kinds[1]][0]),
    ]
    initial = [numpy_helper.from_array(rng.normal(size=shape).astype(weights), name) for name, shape in shapes.items()]
    scale = [numpy_helper.from_array(np.float32(0.04), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(source["name"], _TYPES[kinds[0]][0], ["batch", *source["shape"]])],
        [helper.make_tensor_value_info(result["name"], _TYPES[kinds[1]][0], ["batch", classes])],
        [*initial, *(scale if precision == "int8" else [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _quantised() -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantise"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], "dequantise"),
    ]


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file."""
    contents = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _merged(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `document`, mappings field by field."""
    result = dict(document)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result
