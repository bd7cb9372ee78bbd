"""What gates cost: attaching them, the choice under a budget, and a training step with them beside a plain one.

On one core. The steps are paired: eight plain ones and eight with gates, of which one is watched, in turn; the ratio is
the median of all pairs. That is the dearest phase of a run: later no step is watched.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import write_result
from polar_deploy import Gates
from polar_deploy.gating.choice import Limits, choose
from polar_deploy.gating.gates import WATCH_EVERY, WATCH_FIRST
from polar_deploy.tasks.classification import classifier

PAIRS = 12
RUN = 8000  # steps of the whole run: the pairs lie before its first choice


def networks() -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    """Builder, pixels, batch."""
    import torchvision

    from polar_deploy import models

    return {
        "resnet20": (lambda: models.build("resnet20", classifier(10, 32)), 32, 64),
        "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 64, 8),
    }


def attach(name: str) -> tuple[Gates, dict[str, Any]]:
    """Gates on a torchvision network at 224 pixels, export and analysis included."""
    import torchvision

    network = torchvision.models.get_model(name, weights=None)
    start, busy = time.monotonic(), time.process_time()
    gates = Gates(network, torch.zeros(1, 3, 224, 224), budget=0.5, rehearse=0)
    seconds, cpu = time.monotonic() - start, time.process_time() - busy
    return gates, {
        "network": name,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "gates": gates.utility.numel(),
    }


def choice(gates: Gates, align: int) -> dict[str, Any]:
    """Seconds of the choice at half of the MACs, for utilities drawn at random."""
    choices = gates.analysis.choices
    worth = np.random.default_rng(0).gamma(0.5, size=choices.gates)
    limits = Limits.of(choices, align, 0.25)
    start = time.monotonic()
    opened = choose(choices, limits, choices.costs, {"macs": 0.5}, worth)
    return {
        "align": align,
        "seconds": round(time.monotonic() - start, 3),
        "macs": round(choices.costs["macs"].share(choices.state(opened)), 5),
    }


def steps(name: str) -> dict[str, Any]:
    """The ratio of steps with gates to plain ones."""
    build, pixels, batch = networks()[name]
    torch.manual_seed(0)
    plain, gated = build(), build()
    gates = Gates(gated, torch.zeros(2, 3, pixels, pixels), budget=0.5, steps=RUN, align=8, rehearse=0)
    run = [_trainer(plain, None, batch, pixels), _trainer(gated, gates, batch, pixels)]
    gates.load_state_dict(gates.state_dict() | {"step": 2 * WATCH_FIRST})  # the first steps are watched more often
    ratios = []
    for pair in range(PAIRS):
        seconds = {}
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            for _ in range(WATCH_EVERY):
                run[which]()
            seconds[which] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    step = min(seconds[0], seconds[1]) / WATCH_EVERY
    return {
        "network": name,
        "batch": batch,
        "step_seconds": round(step, 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }


def _trainer(network: nn.Module, gates: Gates | None, batch: int, pixels: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(0, 10, (batch,))

    def step() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        if gates is not None:
            loss = loss + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if gates is not None:
            gates.step()

    return step


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    small, first = attach("resnet50")
    choices = [choice(small, align) for align in (1, 8)]
    large, second = attach("efficientnet_v2_l")
    more = [choice(large, align) for align in (1, 8)]
    paired = [steps(name) for name in networks()]
    bars = {
        "attaching to ResNet-50: at most 20 s": first["seconds"] <= 20,
        "attaching to EfficientNetV2-L: at most 90 s": second["seconds"] <= 90,
        "choice for ResNet-50 at align 1: at most 2 s": choices[0]["seconds"] <= 2,
        "choice for EfficientNetV2-L: at most 10 s": more[0]["seconds"] <= 10,
        "a step with gates: at most 1.05 of a plain one": all(each["ratio"] <= 1.05 for each in paired),
    }
    figures = {"attach": [first, second], "choice": {"resnet50": choices, "efficientnet_v2_l": more}, "steps": paired}
    return write_result("gates", bars, figures)


if __name__ == "__main__":
    sys.exit(main())
