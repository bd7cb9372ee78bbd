"""A network above 2 GB from its export to a verified bundle: no limit is lowered here, as it is in tests/test_large.py.

Random hidden layers, 2.3 GB of them, and a head that is fitted to the digits; in the gated network half of each hidden
layer is closed. A small run of the command makes the folder, then both networks take the places of its own. Takes 16 GB
of memory, 15 GB of disk, and ten minutes on one core.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, bundle_command, run_pipeline, verify_bundle, write_result
from polar_deploy import export
from polar_deploy.data import load, normalise
from polar_deploy.data.arrays import read_npz
from polar_deploy.export import Example

WIDTH, PIXELS = 17_000, 3 * 16 * 16
MOST = 2**31  # bytes: what protobuf holds
OPTIONS = (
    "--model",
    "tests.support.tiny:net",
    "--data",
    "digits",
    "--epochs",
    "1",
    "--budget",
    "0.5",
    "--batch",
    "1,1,1",
)


class Wide(nn.Module):
    """Three random hidden layers, each unit multiplied by `mask`, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        draw, sizes = torch.Generator().manual_seed(0), (PIXELS, WIDTH, WIDTH, WIDTH)
        self.hidden = nn.ModuleList(nn.utils.skip_init(nn.Linear, *each) for each in pairwise(sizes))
        for layer in self.hidden:
            nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5, generator=draw)
            nn.init.zeros_(layer.bias)
        self.head = nn.Linear(WIDTH, 10)
        self.register_buffer("mask", torch.ones(WIDTH))

    def features(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.hidden:
            x = torch.relu(layer(x)) * self.mask
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def fit(self, images: Tensor, labels: Tensor) -> None:
        """The head by ridge regression, in its dual form: there are far fewer images than units."""
        found = self.features(images).double()
        gram = found @ found.T
        wanted = nn.functional.one_hot(labels, 10).double() - 0.1
        ridge = 1e-3 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.double)
        self.head.weight.copy_((found.T @ torch.linalg.solve(gram + ridge, wanted)).T)
        self.head.bias.zero_()


@torch.no_grad()
def replace(run: Path) -> None:
    """Put the wide network, and the same with half of its units closed, in the place of a run's own."""
    train = load("digits").train
    images = torch.from_numpy(normalise(train.images, (0.305,) * 3, (0.318,) * 3))
    network, stored = Wide().eval(), read_npz(run / "gated/reference.npz")
    inputs = torch.from_numpy(stored["inputs/input"])
    for name in ("full", "gated"):
        network.mask[::2] = float(name == "full")
        network.fit(images, torch.from_numpy(train.labels))
        structure = export.structure(network, Example.of(inputs))
        export.save(structure, run / name / "model.onnx", inputs=("input",), outputs=("logits",))
        stored[f"{name}/logits"] = network(inputs).numpy()
        export.check(run / name / "model.onnx", {"input": inputs.numpy()}, {"logits": stored[f"{name}/logits"]})
    np.savez(run / "gated/reference.npz", **stored)


def main() -> int:
    """Run the bars; 0 if all are met."""
    if sys.argv[1:]:  # in a process of its own: its memory is the next one's
        replace(Path(sys.argv[1]))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, bundle = folder / "run", folder / "run/bundle"
        made = run_pipeline(run, *OPTIONS, "--until", "export")
        if made["exit_code"] != 0:
            raise SystemExit(f"the small run failed with exit code {made['exit_code']}")
        subprocess.run([sys.executable, "-m", "benchmarks.bar_large_bundle", str(run)], cwd=ROOT, check=True)
        wide = run_pipeline(run, *OPTIONS, "--from", "surgery", "--max-drop", "20", "--min-speedup", "1.02")
        sizes = {path.relative_to(run).as_posix(): path.stat().st_size for path in sorted(run.rglob("*.onnx*"))}
        verified = verify_bundle(Path(sys.executable), bundle, "--no-timing")
        served = bundle_command(Path(sys.executable), "triton", bundle, folder / "models", "--network", "full")
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    figures = {"run": wide, "bytes": sizes, "verify": verified, "largest_process_gb": round(largest / 1e9, 2)}
    bars = {
        "the full network's weights are more than 2 GB": sizes["full/model.onnx.data"] > MOST,
        "cut, built, judged and bundled: exit code 0": wide["exit_code"] == 0,
        "the bundle has the full network's weights": sizes.get("bundle/full/model.onnx.data", 0) > MOST,
        "bundle verify: exit code 0": verified["exit_code"] == 0,
        "bundle triton: exit code 0": served.returncode == 0,
    }
    return write_result("large-bundle", bars, figures)


if __name__ == "__main__":
    sys.exit(main())
