"""The stopwatch tells engines apart that differ, and only those: ResNet-56 on CIFAR-sized images, ONNX Runtime.

A/A: an engine against its own copy, 20 times, is never called different. A slowdown of 10 %, by waiting after each
inference for a tenth of what it took, is found 20 times of 20. Ten minutes on a quiet machine.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write_cifar_network, write_result
from polar_deploy.documents.parity import Conditions
from polar_deploy.engines import Array, Engine, Timer, timing
from polar_deploy.engines.ort import OrtEngine
from polar_deploy.tensors import Arrays

REPETITIONS = 20
SLOWDOWN = 0.1


class Slowed:
    """An engine that takes a tenth longer, in real time."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.batches = engine.batches

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """As the engine itself."""
        return self.engine.infer(inputs)

    def timer(self, inputs: Arrays) -> Timer:
        """The engine's own work, then a wait."""
        work = self.engine.timer(inputs)

        def milliseconds(inferences: int) -> float:
            start = time.perf_counter_ns()
            work(inferences)
            end = start + (time.perf_counter_ns() - start) * (1 + SLOWDOWN)
            while time.perf_counter_ns() < end:
                pass
            return (time.perf_counter_ns() - start) / inferences / 1e6

        return milliseconds

    def duplicate(self) -> Slowed:
        """A slowed copy."""
        return Slowed(self.engine.duplicate())

    def conditions(self) -> Conditions | None:
        """As the engine itself."""
        return self.engine.conditions()


def main() -> int:
    """Run the bars; 0 if all are met."""
    images = {"input": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet56.onnx"
        write_cifar_network("resnet56", path)
        same = [timing.compare(OrtEngine(path), OrtEngine(path), images) for _ in range(REPETITIONS)]
        slower = [timing.compare(OrtEngine(path), Slowed(OrtEngine(path)), images) for _ in range(REPETITIONS)]
    found = [result.different and result.best.speedup.median < 1 for result in slower]
    bars = {
        "A/A: 0 of 20 called different": not any(result.different for result in same),
        "10 % slower: found 20 of 20": all(found),
    }
    figures = {"same": [_figures(each) for each in same], "slower": [_figures(each) for each in slower]}
    return write_result("latency-control", bars, figures)


def _figures(result: timing.Timing) -> dict[str, Any]:
    return {
        "speedup": asdict(result.best.speedup),
        "noise": result.best.noise,
        "rounds": len(result.rounds),
        "decided": result.decided,
        "different": result.different,
    }


if __name__ == "__main__":
    sys.exit(main())
