"""Which target is fastest on this machine, as a small network that comes with the package finds it, in a minute.

The network is a residual one for 32 x 32 pixels, as ResNet-20 is, of four widths. What is fastest for it need not be
for another: large networks gain more from INT8, and TensorRT's start costs small ones more.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy import engines
from polar_deploy.config import Build
from polar_deploy.documents.doctor import Timed
from polar_deploy.errors import PolarDeployError, one_line
from polar_deploy.targets import Target

if TYPE_CHECKING:
    import onnx

    from polar_deploy.engines.base import Array, Engine, Timer

BATCHES = (1, 16)
SECONDS = 20.0  # for timing, all targets and batches together
PIXELS, CLASSES = 32, 10
_WIDTHS = (16, 32, 64)  # of the stages; each halves the picture
_ROUNDS = 25  # samples of each target, all of them in turn
_WARM_UP = 3  # inferences


def measure(targets: Iterable[Target], seconds: float = SECONDS) -> dict[str, Timed]:
    """Build the network for each target and time all of them in turn.

    Args:
        targets: those that build and run here.
        seconds: how long the timing may take, all in all.

    Returns:
        What was found, by name of the target.
    """
    with tempfile.TemporaryDirectory(prefix="polar_deploy-") as name:
        folder = Path(name)
        source = folder / "network.onnx"
        source.write_bytes(network().SerializeToString())
        found: dict[str, Timed] = {}
        ready: dict[str, Engine] = {}
        for target in targets:
            start = time.perf_counter()
            try:
                ready[target.name] = _engine(source, folder / target.name, target)
            except PolarDeployError as error:
                found[target.name] = Timed(error=one_line(error.what))
                continue
            found[target.name] = Timed(build_seconds=round(time.perf_counter() - start, 1), ms={})
        for batch in BATCHES:
            timers = {name: engine.timer(pictures(batch)) for name, engine in ready.items()}
            for name, milliseconds in _medians(timers, seconds / len(BATCHES)).items():
                ms = (found[name].ms or {}) | {str(batch): milliseconds}
                found[name] = found[name].model_copy(update={"ms": ms})
    return found


def network() -> onnx.ModelProto:
    """A residual classifier [batch,3,32,32] -> logits [batch,10], 27 million MACs, with random weights."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights = [], []

    def layer(x: str, name: str, given: int, width: int, stride: int = 1, kernel: int = 3) -> str:
        scale = (2 / (kernel * kernel * given)) ** 0.5
        weight = (random.standard_normal((width, given, kernel, kernel)) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        weights.append(numpy_helper.from_array(np.zeros(width, np.float32), f"{name}.bias"))
        inputs, pads = [x, f"{name}.weight", f"{name}.bias"], [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", inputs, [f"{name}.out"], name=name, pads=pads, strides=[stride] * 2))
        return f"{name}.out"

    def relu(x: str) -> str:
        nodes.append(helper.make_node("Relu", [x], [f"{x}.relu"], name=f"{x}.relu"))
        return f"{x}.relu"

    x, given = relu(layer("input", "first", 3, _WIDTHS[0])), _WIDTHS[0]
    for stage, width in enumerate(_WIDTHS):
        for block in range(2):
            name, stride = f"stage{stage}.block{block}", 1 + (given != width)
            y = layer(relu(layer(x, f"{name}.one", given, width, stride)), f"{name}.two", width, width)
            short = x if given == width else layer(x, f"{name}.short", given, width, stride, kernel=1)
            nodes.append(helper.make_node("Add", [y, short], [f"{name}.sum"], name=f"{name}.sum"))
            x, given = relu(f"{name}.sum"), width
    weights.append(numpy_helper.from_array(random.standard_normal((CLASSES, given)).astype(np.float32), "fc.weight"))
    weights.append(numpy_helper.from_array(np.zeros(CLASSES, np.float32), "fc.bias"))
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], name="fc", transB=1))
    ends: dict[str, list[str | int | None]] = {"input": ["batch", 3, PIXELS, PIXELS], "logits": ["batch", CLASSES]}
    given_end, made_end = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in ends.items())
    graph = helper.make_graph(nodes, "polar_deploy.quick", [given_end], [made_end], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pictures(batch: int) -> dict[str, Array]:
    """Random images [batch,3,32,32], by input: how long an inference takes does not depend on them."""
    return {"input": np.random.default_rng(1).standard_normal((batch, 3, PIXELS, PIXELS)).astype(np.float32)}


def _engine(source: Path, folder: Path, target: Target) -> Engine:
    folder.mkdir()
    options = Build(batches=(min(BATCHES), min(BATCHES), max(BATCHES)))
    built = engines.build(source, folder, "full", target, options, pictures(64))
    return engines.open_built(built, folder, "full", target)


def _medians(timers: dict[str, Timer], seconds: float) -> dict[str, float]:
    """Milliseconds of an inference of each, measured in turn, so that what disturbs one disturbs all."""
    once = {name: timer(_WARM_UP) for name, timer in timers.items()}
    budget = 1e3 * seconds / _ROUNDS / max(1, len(timers))  # milliseconds of a sample
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(_ROUNDS):
        for name, timer in timers.items():
            found[name].append(timer(max(1, round(budget / once[name]))))
    return {name: round(statistics.median(times), 4) for name, times in found.items()}
