"""Does a device's file pay? Networks cut to the same MACs by three ways of choosing widths, and what each then costs.

    python -m benchmarks.devices.networks write FOLDER      # with this Python: the graphs, and their times here
    python -m benchmarks.devices.networks estimate FOLDER   # with the Python of rknn-toolkit2: its estimate of them

The utilities of gates are random and the same for the three ways: any width, multiples of 8, and what the device's file
offers. Whole blocks may go as well; `kept` is the share of all utility that a way keeps.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

NETWORKS = (("resnet20", 32, 10), ("resnet18", 64, 200))
SEEDS = range(2)
RKNN = (("rk3588", "fp16"),)  # its quantiser aborts on networks that were never trained
HERE = ("onnxruntime-x86", "fp32")
MACS = 0.5
ROUNDS = 101
RESULT = Path(__file__).parents[1] / "results" / "devices.json"


def write(folder: Path) -> None:
    """ONNX graphs NETWORK/WAY-SEED.onnx, and the times of those for ONNX Runtime."""
    import numpy as np
    import onnx
    import torch

    from polar_deploy import devices, models
    from polar_deploy.devices.measure import session
    from polar_deploy.devices.sweep import ratios
    from polar_deploy.export import Example
    from polar_deploy.gating.analysis import analyse
    from polar_deploy.gating.choice import Limits, choose
    from polar_deploy.surgery import detached, rounds

    ways: dict[str, Any] = {"any": (1, None), "eights": (8, None)}
    ways |= {f"{name}-{precision}": (1, devices.choose(name, precision).offers) for name, precision in (HERE, *RKNN)}
    rows = []
    for name, pixels, classes in NETWORKS:
        torch.manual_seed(0)
        network = models.build(name, classes, pixels).eval()
        choices = analyse(network, Example.of(torch.zeros(2, 3, pixels, pixels))).choices
        (folder / name).mkdir(parents=True, exist_ok=True)

        def save(path: Path, opened: np.ndarray, choices: Any = choices) -> None:
            small = rounds.operate(choices.with_masks(choices.detached, opened))[-1].model
            onnx.save(detached.to_model(small), path)

        save(folder / name / "full.onnx", np.ones(choices.gates, bool))
        for seed in SEEDS:
            worth = np.random.default_rng(seed).gamma(1, size=choices.gates)
            for way, (align, offers) in ways.items():
                limits = Limits.of(choices.sites, align, 0.25, offers)
                opened = choose(choices, limits, choices.costs, {"macs": MACS}, worth)
                path = folder / name / f"{way}-{seed}.onnx"
                save(path, opened)
                state = choices.state(opened)
                row = {"network": name, "way": way, "seed": seed, "macs": round(choices.costs["macs"].share(state), 4)}
                kept = float(worth[opened].sum() / worth.sum())
                rows.append(row | {"kept": round(kept, 4), "widths": state.widths, "blocks": sum(state.blocks)})
                print(row, flush=True)
        for seed in SEEDS:
            compared = ["any", "eights", "-".join(HERE)]
            paths = [folder / name / "full.onnx"] * 2 + [folder / name / f"{way}-{seed}.onnx" for way in compared]
            reference, *runs = (session(path, (1, 3, pixels, pixels)) for path in paths)
            found, _ = ratios(reference, dict(enumerate(runs)), ROUNDS)
            times = {way: round(found[0] / found[at], 4) for at, way in enumerate(compared, 1)}
            rows.append({"network": name, "seed": seed, "on": "-".join(HERE), "speed_up": times})
            rows[-1]["full"] = round(found[0], 4)
            print(rows[-1], flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


def estimate(folder: Path) -> None:
    """Cycles of all graphs that concern a Rockchip device, by rknn-toolkit2."""
    import numpy as np

    rows = json.loads(RESULT.read_text())
    for network, pixels, _ in NETWORKS:
        np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(1, 3, pixels, pixels)).astype(np.float32))
        for platform, precision in RKNN:
            full = _cycles(folder / network / "full.onnx", platform, precision, folder, pixels)
            for seed in SEEDS:
                compared = ["any", "eights", f"{platform}-{precision}"]
                paths = {way: folder / network / f"{way}-{seed}.onnx" for way in compared}
                times = {
                    way: round(full / _cycles(path, platform, precision, folder, pixels), 4)
                    for way, path in paths.items()
                }
                rows.append({"network": network, "seed": seed, "on": f"{platform}-{precision}", "speed_up": times})
                print(rows[-1], flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")


def _cycles(path: Path, platform: str, precision: str, folder: Path, pixels: int) -> float:
    from rknn.api import RKNN as Toolkit

    (folder / "samples.txt").write_text(str(folder / "x.npy"))
    with open(folder / "log", "wb") as log:
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            toolkit = Toolkit(verbose=True)
            toolkit.config(target_platform=platform)
            toolkit.load_onnx(str(path), inputs=["x"], input_size_list=[[1, 3, pixels, pixels]])
            toolkit.build(do_quantization=precision == "int8", dataset=str(folder / "samples.txt"))
            toolkit.release()
        finally:
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
    text = (folder / "log").read_text(errors="replace")
    return float(sum(int(total) for total in re.findall(r"D RKNN: .*\s\d+/\d+/(\d+)\s+\d+\s+\w+:", text)))


if __name__ == "__main__":
    {"write": write, "estimate": estimate}[sys.argv[1]](Path(sys.argv[2]))
