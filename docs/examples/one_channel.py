"""One channel's life: a gate in PyTorch, a Mul in the graph, and then nothing. Read with docs/how-it-works.md.

python docs/examples/one_channel.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from polar_deploy import Gates
from polar_deploy.surgery import compress_file

CHANNEL = 5  # of what `first` writes


class Network(nn.Module):
    """Two convolutions and a classifier, images [B, 3, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10]."""
        x = torch.relu(self.norm(self.first(x)))
        logits: torch.Tensor = self.head(torch.relu(self.second(x)).mean((2, 3)))
        return logits


def masks(path: Path) -> list[str]:
    """The gates of an ONNX file: what they multiply, and the site that their metadata names."""
    found = []
    for node in onnx.load(path).graph.node:
        metadata = {each.key: each.value for each in node.metadata_props}
        if "polar_deploy.site" in metadata:
            found.append(f"{node.op_type} of {node.input[0]!r}, site {metadata['polar_deploy.site']!r}")
    return found


def run(path: Path, images: np.ndarray) -> np.ndarray:
    """Logits of an ONNX file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(None, {session.get_inputs()[0].name: images})[0]
    return logits


def main() -> None:
    """Follow it."""
    torch.manual_seed(0)
    model = Network().eval()

    # 1. The full network is exported, and surgery is asked what could go: those are the gates.
    gates = Gates(model, torch.zeros(1, 3, 16, 16), budget="macs=0.9", align=1)
    for site in gates.sites:
        print(f"1. site {site.name}: {site.width} channels, gates {site.gates.start} to {site.gates.stop - 1}")

    # 2. While a network trains, gates learn what they are worth, and a solver chooses. Here we choose ourselves.
    opened = np.ones(len(gates.opened), bool)
    opened[gates.sites[0].gates[CHANNEL]] = False
    gates.freeze(opened)
    macs = gates.full["macs"], gates.promise()["macs"]
    print(f"2. MACs: {macs[0]:,}; with channel {CHANNEL} of {gates.sites[0].name} closed {macs[1]:,}")

    # 3. The gate is a mask on the layer that reads the channel, not on the one that writes it.
    print(f"3. mask of `second`: {[int(value) for value in model.second.polar_deploy_input_mask.flatten()]}")

    with TemporaryDirectory() as folder:
        gated, small = Path(folder, "gated.onnx"), Path(folder, "small.onnx")

        # 4. In the exported graph each gate is a Mul by a constant, and all layers still have their full size.
        gates.export(gated)
        print(*(f"4. {each}" for each in masks(gated)), sep="\n")

        # 5. Surgery finds that nobody needs the channel: its filter goes, and the column that reads it.
        report = compress_file(gated, small)
        for layer in report["layers"]:
            print(f"5. {layer['operator']}: inputs {layer['in']}, outputs {layer['out']}, MACs {layer['macs']}")

        # 6. Same function, no gate, and as many MACs as were promised in step 2.
        images = torch.randn(4, 3, 16, 16)
        expected, found = model(images).detach().numpy(), run(small, images.numpy())
        print(f"6. gates left: {masks(small)}; MACs: {report['macs'][1]:,}, as promised; proven: {report['verified']}")
        print(f"6. the same logits as the model, to 1e-5: {np.allclose(expected, found, rtol=0, atol=1e-5)}")


if __name__ == "__main__":
    main()
