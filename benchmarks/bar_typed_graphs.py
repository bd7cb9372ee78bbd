"""Typed graphs of random networks, as they run, beside FP64; and how the time of the INT8 step grows with the layers.

300 networks of convolutions (plain, strided, grouped, transposed), sums, joins, pooling, padding, slices, norms, gates
and Gemm with factors, some with a second output, in INT8 in all dialects, FP16 and BF16; computed by the kernels of
their runtime, where that runs on this CPU. Of every tenth one TensorRT for RTX builds plans, where it is installed. The
integers that ONNX Runtime's kernels give are held against the graph as it is written, in FP64, and tract's, where that
is installed (`pip install tract`). FP32 itself is off where a norm divides by next to nothing: such a network may be
off twice as far as ONNX Runtime is in FP32.
Ten minutes on one core.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import write_result
from polar_deploy import engines, precision, targets
from polar_deploy.backends.tensorrt import RTX
from polar_deploy.config import Build
from polar_deploy.errors import ContentError, PolarDeployError
from polar_deploy.precision import calibration
from polar_deploy.precision.rounding import computed_wide
from polar_deploy.surgery.runtime import in_float64, reference
from polar_deploy.tensors import Arrays

NETWORKS, SIDE = 300, 12
BUILT = 10  # of so many networks one is built, too
STEPS = 1e-4  # share of the rounded activations that may be another step in integer kernels than as the graph says
# Target -> how far an output may be off: INT8 has three times the bound of a layer, see `precision.proof`.
BOUNDS = {
    "ort-int8": 0.3,
    "ort-cuda-fp16": 0.02,
    "rtx-int8": 0.3,
    "rtx-fp16": 0.02,
    "trt-bf16": 0.15,
    "ov-fp32": 1e-4,
    "ov-int8": 0.3,
    "ov-bf16": 0.15,
}
LAYERS = (50, 200, 800)


class RandomNetwork:
    """Draws nodes one behind the other; all tensors but the logits are [batch,channels,height,width]."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.seen: list[tuple[str, int, int]] = [("input", 3, SIDE)]

    def draw(self) -> onnx.ModelProto:
        self.conv()
        steps = [self.conv, self.activation, self.add, self.join, self.pool, self.norm, self.gate, self.move]
        for _ in range(int(self.rng.integers(3, 12))):
            self.rng.choice(steps)()
        extra = self.seen[int(self.rng.integers(1, len(self.seen)))] if self.rng.random() < 0.3 else None
        self.head()
        return self.model(extra)

    def constant(self, *shape: int, scale: float = 1.0, value: Any = None) -> str:
        name = f"k{len(self.constants)}"
        drawn = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        self.constants[name] = drawn if value is None else np.asarray(value)
        return name

    def node(self, operator: str, inputs: Sequence[str], channels: int, size: int, **attributes: Any) -> None:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"{operator}{len(self.nodes)}", **attributes))
        self.seen.append((name, channels, size))

    def pick(self) -> tuple[str, int, int]:
        """A tensor: mostly the last one."""
        return self.seen[-1] if self.rng.random() < 0.7 else self.seen[int(self.rng.integers(1, len(self.seen)))]

    def conv(self) -> None:
        source, into, size = self.pick() if len(self.seen) > 1 else self.seen[0]
        groups = 2 if into % 2 == 0 and self.rng.random() < 0.3 else 1
        out, bias = 2 * int(self.rng.integers(2, 6)), self.rng.random() < 0.7
        if self.rng.random() < 0.15:
            weight = self.constant(into, out // groups, 2, 2, scale=1 / np.sqrt(into / groups))
            inputs = [source, weight, *([self.constant(out)] if bias else [])]
            self.node("ConvTranspose", inputs, out, 2 * size, strides=[2, 2], group=groups)
            return
        stride = 2 if size % 2 == 0 and size > 3 and self.rng.random() < 0.3 else 1
        weight = self.constant(out, into // groups, 3, 3, scale=1 / np.sqrt(9 * into / groups))
        inputs = [source, weight, *([self.constant(out)] if bias else [])]
        attributes = {"pads": [1] * 4, "strides": [stride] * 2, "group": groups}
        self.node("Conv", inputs, out, (size + stride - 1) // stride, **attributes)

    def activation(self) -> None:
        source, channels, size = self.pick()
        operator = str(self.rng.choice(["Relu", "Relu", "Clip", "Sigmoid", "LeakyRelu", "HardSwish"]))
        bounds = [self.constant(value=np.float32(each)) for each in (self.rng.choice([-1, 0, 0.5]), 6)]
        self.node(operator, [source, *(bounds if operator == "Clip" else [])], channels, size)

    def add(self) -> None:
        source, channels, size = self.pick()
        others = [name for name, c, s in self.seen[1:] if (c, s) == (channels, size)]
        self.node("Add", [source, str(self.rng.choice(others))], channels, size)

    def join(self) -> None:
        source, channels, size = self.pick()
        name, more, _ = next(each for each in self.seen[::-1] if each[2] == size)
        self.node("Concat", [source, name], channels + more, size, axis=1)

    def pool(self) -> None:
        source, channels, size = self.pick()
        operator = str(self.rng.choice(["MaxPool", "AveragePool"]))
        self.node(operator, [source], channels, size, kernel_shape=[3, 3], pads=[1] * 4)

    def norm(self) -> None:
        source, channels, size = self.pick()
        values = [self.rng.uniform(0.5, 2, channels) for _ in range(4)]
        names = [self.constant(value=value.astype(np.float32)) for value in values]
        if self.rng.random() < 0.5:
            self.node("BatchNormalization", [source, *names], channels, size)
        else:
            self.node("GroupNormalization", [source, *names[:2]], channels, size, num_groups=1)

    def gate(self) -> None:
        source, channels, size = self.pick()
        self.node("Mul", [source, self.constant(1, channels, 1, 1)], channels, size)

    def move(self) -> None:
        source, channels, size = self.pick()
        if channels > 3 and self.rng.random() < 0.5:
            bounds = [self.constant(value=np.array([each])) for each in (1, 3, 1)]
            self.node("Slice", [source, *bounds], 2, size)
        else:
            pads = self.constant(value=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
            number = [self.constant(value=np.float32(0.5))] if self.rng.random() < 0.3 else []
            self.node("Pad", [source, pads, *number], channels, size + 2)

    def head(self) -> None:
        source, channels, _ = self.seen[-1]
        self.nodes.append(helper.make_node("GlobalAveragePool", [source], ["mean"], name="mean"))
        self.nodes.append(helper.make_node("Flatten", ["mean"], ["flat"], name="flat"))
        rows = self.rng.random() < 0.5
        weight = self.constant(*((5, channels) if rows else (channels, 5)))
        shape = [(5,), (1, 5), (1,), ()][int(self.rng.integers(4))]
        bias = self.constant(value=self.rng.standard_normal(shape).astype(np.float32))
        alpha, beta = (float(self.rng.choice([1.0, 0.5, 2.0])) for _ in range(2))
        attributes = {"transB": int(rows), "alpha": alpha, "beta": beta}
        self.nodes.append(helper.make_node("Gemm", ["flat", weight, bias], ["logits"], name="head", **attributes))

    def model(self, extra: tuple[str, int, int] | None) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])]
        if extra:
            name, channels, size = extra
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, size, size]))
        source = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "random", [source], outputs, constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), np.float32)


def outputs(model: onnx.ModelProto, batch: Arrays) -> dict[str, np.ndarray]:
    """As the graph is written: nothing is fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return {
        name: np.asarray(each, np.float64) for name, each in zip(names, session.run(names, dict(batch)), strict=True)
    }


def exact_outputs(model: onnx.ModelProto, batch: Arrays) -> dict[str, np.ndarray]:
    """As the graph is written, in FP64; in FP32 where onnx's reference fails (a transposed convolution in groups)."""
    inputs = {name: value.astype(np.float64) for name, value in batch.items()}
    try:
        return {name: np.asarray(value) for name, value in reference(in_float64(model), "FP64")(inputs).items()}
    except ContentError:
        return outputs(model, batch)


def trial(seed: int, target: str, folder: Path) -> dict[str, Any]:
    """One network for one target: how far its worst output is off on images that it was not proven with."""
    said: dict[str, Any] = {"seed": seed, "target": target}
    try:
        return said | _tried(seed, targets.parse(target), folder)
    except PolarDeployError as error:
        return said | {"refused": error.what.split(": ", 1)[-1]}
    except Exception as error:  # noqa: BLE001  (what the bar is about: nothing but a refusal)
        return said | {"raised": f"{type(error).__name__}: {error}"}


@dataclass(frozen=True)
class Subject:
    """A network, and what it gives for images that no calibration sees. rounding: how far FP32 itself is off."""

    network: onnx.ModelProto
    batch: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    rounding: float

    @classmethod
    @lru_cache(1)  # for all targets
    def of(cls, seed: int) -> Subject:
        """The network of a seed."""
        network, batch = RandomNetwork(seed).draw(), {"input": images(8, 1)}
        expected = exact_outputs(network, batch)
        return cls(network, batch, expected, _apart(outputs(network, batch), expected))


def _tried(seed: int, target: targets.Target, folder: Path) -> dict[str, Any]:
    subject, kernels = Subject.of(seed), engines.kernels(target)
    network, batch = subject.network, subject.batch
    paths, samples = (folder / "a.onnx", folder / "b.onnx"), {"input": images(64, 2)}
    onnx.save(network, paths[0])
    written = precision.write(*paths, target, Build(), samples, kernels)
    typed = onnx.load(paths[1])
    found = outputs(computed_wide(typed), batch) if kernels is None else kernels.outputs(typed, batch, paths[1])
    off = _apart(found, subject.expected)
    within = off <= max(BOUNDS[target.name], 2 * subject.rounding)
    said = {"off": off, "within": within, "kept": [each.layer for each in written.high_precision_layers]}
    if target.name == "ort-int8":
        said |= integers(typed, batch, folder)
    if seed % BUILT == 0 and target.backend is RTX and not targets.lacks_to_build(target):
        made = engines.build(paths[0], folder, "built", target, Build(), samples)
        said["built"] = made.precision.found
    return said


def _apart(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """How far the worst output is off: RMS, as a share of its size."""
    return max(float(np.linalg.norm(found[name] - exact) / np.linalg.norm(exact)) for name, exact in expected.items())


def integers(typed: onnx.ModelProto, batch: Arrays, folder: Path) -> dict[str, Any]:
    """How many rounded activations are another step in ONNX Runtime's integer kernels, and in tract, than as the graph
    is written, in FP64. "tract" is missing where it is not installed, or cannot run it."""
    opened = with_integers(typed)
    exact = exact_outputs(opened, batch)
    found = {"steps": calibration.outputs(opened, batch, folder / "c.onnx", fused=True)}
    if importlib.util.find_spec("tract") is not None:
        import tract

        onnx.save(opened, folder / "c.onnx")
        try:
            given = tract.onnx().load(str(folder / "c.onnx")).into_model().into_runnable().run([batch["input"]])
        except Exception as error:  # noqa: BLE001  (of any kind: it is not what is on trial here)
            return {name: _unlike(each, exact) for name, each in found.items()} | {"no_tract": str(error)[:200]}
        found["tract"] = dict(zip(exact, (each.to_numpy() for each in given), strict=True))
    return {name: _unlike(each, exact) for name, each in found.items()}


def with_integers(typed: onnx.ModelProto) -> onnx.ModelProto:
    """The graph, whose rounded activations are outputs, too."""
    opened = onnx.ModelProto()
    opened.CopyFrom(typed)
    for node in typed.graph.node:
        if node.op_type == "QuantizeLinear":
            opened.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None))
    return opened


def _unlike(found: Mapping[str, np.ndarray], exact: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """How many of the rounded activations differ, of how many, up to the first tensor in which one does: what is behind
    it reads other numbers."""
    differ = seen = 0
    for name in (name for name in exact if name.endswith("_quantized")):
        differ += int((found[name] != exact[name]).sum())
        seen += exact[name].size
        if differ:
            break
    return differ, seen


def residual_chain(layers: int) -> onnx.ModelProto:
    """Half as many residual blocks, on [batch,8,8,8]."""
    nodes, constants, last = [], [], "input"
    for index in range(layers // 2):
        rng = np.random.default_rng(index)
        for half in "ab":
            values = rng.standard_normal((8, 8, 3, 3)) * (0.1 if half == "a" else 0.03)
            constants.append(numpy_helper.from_array(values.astype(np.float32), f"{half}{index}"))
        nodes += [
            helper.make_node("Conv", [last, f"a{index}"], [f"c{index}"], f"first{index}", pads=[1] * 4),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"),
            helper.make_node("Conv", [f"r{index}", f"b{index}"], [f"d{index}"], f"second{index}", pads=[1] * 4),
            helper.make_node("Add", [last, f"d{index}"], [f"s{index}"], f"sum{index}"),
        ]
        last = f"s{index}"
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8, 8, 8]) for name in ("input", last)]
    graph = helper.make_graph(nodes, "chain", edges[:1], edges[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def growth(folder: Path) -> dict[str, list[float]]:
    """CPU seconds of the whole INT8 step by number of layers."""
    found: dict[str, list[float]] = {}
    for target in ("ort-int8", "rtx-int8"):
        found[target] = []
        for layers in LAYERS:
            onnx.save(residual_chain(layers), folder / "chain.onnx")
            batch = {"input": np.random.default_rng(0).standard_normal((16, 8, 8, 8), np.float32)}
            taken = []
            for _ in range(3):
                start = time.process_time()
                options = Build(max_layer_error=10)
                paths, what = (folder / "chain.onnx", folder / "typed.onnx"), targets.parse(target)
                precision.write(*paths, what, options, batch, engines.kernels(what))
                taken.append(time.process_time() - start)
            found[target].append(round(min(taken), 3))
    return found


def main(networks: int = NETWORKS) -> int:
    """Run the bars; 0 if all are met."""
    left_out = {name: lack for name in BOUNDS if (lack := _not_here(targets.parse(name)))}
    bounds = {name: bound for name, bound in BOUNDS.items() if name not in left_out}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trials = [trial(seed, target, folder) for seed in range(networks) for target in bounds]
        seconds = growth(folder)
    done = {target: [each for each in trials if each["target"] == target and "off" in each] for target in bounds}
    off = {target: [each["off"] for each in found] for target, found in done.items()}
    raised, more = [each for each in trials if "raised" in each], LAYERS[-1] / LAYERS[0]
    counted = {name: [each[name] for each in trials if name in each] for name in ("steps", "tract")}
    steps = {name: sum(n for n, _ in each) / sum(m for _, m in each) for name, each in counted.items() if each}
    bars = {
        **{
            f"{target} within {bounds[target]}": all(each["within"] for each in found) for target, found in done.items()
        },
        f"integer kernels give other steps for at most {STEPS} of the rounded activations": steps["steps"] <= STEPS,
        "no exception but a refusal in one sentence": not raised,
        **{f"{name}: time grows as layers do, times 1.2": s[-1] / s[0] <= 1.2 * more for name, s in seconds.items()},
    }
    result = {
        "networks": networks,
        "left_out": left_out,
        "off": {target: {"median": float(np.median(each)), "most": max(each)} for target, each in off.items()},
        "other_steps": {name: {"networks": len(counted[name]), "share": each} for name, each in steps.items()},
        "no_tract": dict(Counter(each["no_tract"] for each in trials if "no_tract" in each)),
        "kept_wide": dict(Counter(each["target"] for each in trials if each.get("kept"))),
        "built": dict(Counter(each["target"] for each in trials if "built" in each)),
        "refused": dict(Counter(each["refused"] for each in trials if "refused" in each)),
        "raised": raised,
        "seconds": {"layers": LAYERS, **seconds},
    }
    return write_result("typed-graphs", bars, result)


def _not_here(target: targets.Target) -> str | None:
    """Why a target's own kernels cannot be asked here; None: they can, or nobody asks them on a CPU."""
    if target.backend.gpu is not None:
        return None
    return "; ".join(targets.lacks_to_build(target) + targets.lacks_to_run(target)) or None


if __name__ == "__main__":
    raise SystemExit(main())
