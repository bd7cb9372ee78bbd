"""Random graphs of many operators with random gates: whatever surgery does, the function stays."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.surgery.graphs import Net, cut

GRAPHS = 80
ACTIVATIONS = ("Relu", "LeakyRelu", "HardSwish", "Sigmoid", "Tanh", "Elu")


class RandomNet:
    """A growing graph; every step takes tensors made before, all 8 x 8 in space."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.net = Net(channels=int(self.random.integers(2, 5)), seed=seed)
        self.tensors = [self.net.conv("input", 8, "stem")]
        self.count = 0

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def pick(self) -> str:
        """Mostly the newest tensor, so that graphs are deep."""
        return self.tensors[-1] if self.random.random() < 0.7 else str(self.random.choice(self.tensors))

    def grow(self, steps: int) -> None:
        kinds = (
            "conv",
            "act",
            "gate",
            "gate",
            "bn",
            "add",
            "depthwise",
            "grouped",
            "concat",
            "pool",
            "excite",
            "mul",
            "pad",
        )
        for _ in range(steps):
            self.tensors.append(getattr(self, str(self.random.choice(kinds)))(self.pick()))

    def conv(self, x: str) -> str:
        return self.net.conv(
            x, int(self.random.choice([4, 6, 8])), self.name("conv"), kernel=int(self.random.choice([1, 3]))
        )

    def act(self, x: str) -> str:
        return self.net.node(str(self.random.choice(ACTIVATIONS)), [x], self.name("act"))

    def gate(self, x: str) -> str:
        width = self.net.width[x]
        kind = self.random.random()
        closed = np.flatnonzero(self.random.random(width) < (1 if kind < 0.15 else 0.5))
        if kind > 0.9:
            return self.net.scale(
                x, np.where(np.isin(np.arange(width), closed), 0, self.random.normal(size=width)), self.name("gate")
            )
        return self.net.gate(x, closed.tolist(), self.name("gate"), left=bool(self.random.random() < 0.5))

    def bn(self, x: str) -> str:
        return self.net.bn(x, self.name("bn"))

    def add(self, x: str) -> str:
        same = [t for t in self.tensors if self.net.width[t] == self.net.width[x]]
        return self.net.add(x, str(self.random.choice(same)), self.name("add"))

    def mul(self, x: str) -> str:
        same = [t for t in self.tensors if self.net.width[t] == self.net.width[x]]
        partner = self.net.node("Sigmoid", [str(self.random.choice(same))], self.name("sigmoid"))
        return self.net.node("Mul", [x, partner], self.name("mul"))

    def depthwise(self, x: str) -> str:
        width = self.net.width[x]
        return self.net.conv(x, width * int(self.random.choice([1, 2])), self.name("dw"), group=width)

    def grouped(self, x: str) -> str:
        group = 2 if self.net.width[x] % 2 == 0 else 1
        return self.net.conv(x, 8, self.name("grouped"), group=group)

    def concat(self, x: str) -> str:
        parts = [x, str(self.random.choice(self.tensors))]
        if self.random.random() < 0.3:
            parts.append(str(self.random.choice(self.tensors)))
        name = self.net.node("Concat", parts, self.name("concat"), axis=1)
        self.net.width[name] = sum(self.net.width[part] for part in parts)
        return name

    def pool(self, x: str) -> str:
        kind = str(self.random.choice(["MaxPool", "AveragePool"]))
        return self.net.node(kind, [x], self.name("pool"), kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def excite(self, x: str) -> str:
        s = self.net.node("GlobalAveragePool", [x], self.name("squeeze"))
        s = self.gate(self.net.relu(self.net.conv(s, 4, self.name("fc"), kernel=1), self.name("act")))
        s = self.net.node(
            "HardSigmoid", [self.net.conv(s, self.net.width[x], self.name("fc"), kernel=1)], self.name("act")
        )
        return self.net.node("Mul", [x, s], self.name("mul"))

    def pad(self, x: str) -> str:
        name = self.name("pad")
        front, back = self.random.integers(0, 3, 2)
        self.net.constant(f"{name}.pads", np.array([0, front, 0, 0, 0, back, 0, 0], np.int64))
        self.net.node("Pad", [x, f"{name}.pads"], name)
        self.net.width[name] += int(front + back)
        return name


def test_random_graphs_stay_the_same_function() -> None:
    shrunk = 0
    seen: Counter[str] = Counter()
    for seed in range(GRAPHS):
        graph = RandomNet(seed)
        graph.grow(int(graph.random.integers(6, 22)))
        outputs = [graph.net.head(graph.net.conv(graph.tensors[-1], 4, "last", kernel=1))]
        if graph.random.random() < 0.2:
            outputs.append(str(graph.random.choice(graph.tensors)))
        report = cut(graph.net.model(*outputs)).report
        alive = [layer for layer in report["layers"] if layer["out"][1]]
        shrunk += any(layer["out"][0] > layer["out"][1] or layer["in"][0] > layer["in"][1] for layer in alive)
        seen.update({name: before for name, (before, _) in report["operators"].items()})
        assert report["walls"] == []
    assert shrunk >= 0.6 * GRAPHS, f"only {shrunk} of {GRAPHS} graphs lost channels"
    assert min(seen[name] for name in ("Conv", "Mul", "Add", "Concat", "BatchNormalization", "Pad", "MaxPool")) >= 20, (
        seen
    )
