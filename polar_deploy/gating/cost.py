"""The cost of a network as its gates stand: a polynomial in the gates, exact at 0/1 and differentiable between.

Every layer reads `n_in` and writes `n_out` live channels and costs, in MACs at batch 1,

    cost(layer) = open(layer) * positions * kernel area * n_in * n_out          (dense; n_in = 1 for depthwise)

where a channel is live while all gates that could remove it are open, so n_in and n_out are sums of products of
gates, and `open(layer)` is the product of the block gates that hold the whole layer. Which gates could remove a
channel is found once, on the traced graph: forward (a gate closes its channel for all readers) and backward (a
channel all of whose readers ignore it need not be written). The formula is ours; it agrees with what graph surgery
removes, and the pipeline checks that on every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from polar_deploy.gating.graph import Traced
from polar_deploy.gating.latency import LatencyModel
from polar_deploy.gating.sites import Site

CostName = Literal["macs", "params"]
_Gates = frozenset[int]  # indices into the vector of all gates; a channel is live while all of them are open
_ALWAYS: _Gates = frozenset()
WINDOW = 0.01  # a budget counts as used up within 1 % of the full network's cost


@dataclass(frozen=True)
class _Layer:
    unit: float  # cost of one (input channel, output channel) pair
    bias: float  # cost of one output channel besides
    inputs: list[_Gates]
    outputs: list[_Gates]


class CostModel:
    """MACs (or parameters) of a gated network as a function of the vector of all gates.

    Args:
        traced: the network without gates.
        sites: its sites; gate i of site s has index `offsets[s] + i` in the vector.
        cost: "macs" (convolutions and linear layers at batch 1) or "params" (weights and biases after the
            BatchNorms are folded, as in the exported graph).
    """

    def __init__(self, traced: Traced, sites: Sequence[Site], cost: CostName = "macs") -> None:
        self.gates = sum(site.gates for site in sites)
        layers = _layers(traced, sites, offsets(sites), cost)
        self._unit = torch.tensor([layer.unit for layer in layers], dtype=torch.float64)
        self._bias = torch.tensor([layer.bias for layer in layers], dtype=torch.float64)
        whole = [_common(layer.outputs) for layer in layers]
        self._whole = _Products([[gates] for gates in whole], self.gates)
        self._inputs = _Products(
            [[g - w for g in layer.inputs] for layer, w in zip(layers, whole, strict=True)], self.gates
        )
        self._outputs = _Products(
            [[g - w for g in layer.outputs] for layer, w in zip(layers, whole, strict=True)], self.gates
        )
        self.full = float(self._absolute(torch.ones(self.gates, dtype=torch.float64)).sum())

    def __call__(self, gates: Tensor) -> Tensor:
        """Cost as a share of the full network's, for gates [G] in [0, 1]; differentiable, on the gates' device."""
        return self._absolute(gates.double()).sum() / self.full

    def absolute(self, gates: Tensor) -> int:
        """Cost in MACs or parameters for 0/1 gates [G]."""
        return round(float(self._absolute(gates.double()).sum()))

    def to(self, device: torch.device) -> CostModel:
        """Move the tables to a device, in place."""
        self._unit, self._bias = self._unit.to(device), self._bias.to(device)
        for products in (self._whole, self._inputs, self._outputs):
            products.to(device)
        return self

    def _absolute(self, gates: Tensor) -> Tensor:
        outputs = self._outputs(gates)
        return self._whole(gates) * outputs * (self._unit * self._inputs(gates) + self._bias)


class Constraint:
    """One or more budgets as one number: the excess, 1 for the full network, <= 0 where every budget is met.

        excess(gates) = max over budgets of (cost - asked) / (1 - asked)

    Args:
        models: the cost models by name.
        asked: the budgets by the same names, shares of the full network's cost in (0, 1).

    `linear`: whether all of them are, in the gates of any one site: MACs and parameters are (no product holds two gates
    of one site), latency is not.
    """

    def __init__(self, models: Mapping[str, CostModel | LatencyModel], asked: Mapping[str, float]) -> None:
        self.models, self.asked = dict(models), dict(asked)
        self.linear = not any(isinstance(model, LatencyModel) for model in self.models.values())

    def __call__(self, gates: Tensor) -> Tensor:
        """Excess for gates [G] in [0, 1]; differentiable."""
        return self._each(gates).max()

    def _each(self, gates: Tensor) -> Tensor:
        each = [(model(gates) - self.asked[name]) / (1 - self.asked[name]) for name, model in self.models.items()]
        return torch.stack(each)

    def marginal(self, gates: Tensor) -> Tensor:
        """What each gate adds to the tightest budget's excess, all others standing as in `gates` [G]; [G]."""
        excess, slopes = self.slopes(gates)
        return slopes[excess.argmax()].clamp_min(0.0)

    def changes(self, gates: Tensor, groups: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor]:
        """Excess of each budget [K], and what opening (step 1) or closing (-1) each of M groups adds to it [K, M].

        Args:
            gates: where from, 0 or 1, [G].
            groups: indices of gates, each time of one site.
            step: 1 or -1, for gates that are closed or open now.
        """
        excess, slopes = self.slopes(gates)
        added = [step * slopes[:, group].sum(dim=1) for group in groups]
        changes = torch.stack(added, dim=1) if added else slopes[:, :0]
        for row, (name, model) in enumerate(self.models.items()):
            if groups and isinstance(model, LatencyModel):
                moved = gates.double().repeat(len(groups), 1)
                for each, group in zip(moved, groups, strict=True):
                    each[group] += step
                changes[row] = (model(moved) - model(gates)) / (1 - self.asked[name])
        return excess, changes

    def resting(self, gates: Tensor) -> Tensor:
        """The gates that no budget depends on, as in a closed block; bool [G], for 0/1 gates [G]."""
        _, slopes = self.slopes(gates)
        rests = [
            model.resting(gates) if isinstance(model, LatencyModel) else slope == 0
            for slope, model in zip(slopes, self.models.values(), strict=True)
        ]
        return torch.stack(rests).all(dim=0)

    def slopes(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Excess of each budget [K] at `gates` [G], and its gradient [K, G].

        Where a cost is linear in the gates of one site, this is the exact difference between open and closed for one
        gate, and adds up for several gates of one site.
        """
        with torch.enable_grad():
            at = gates.detach().double().requires_grad_()
            excess = self._each(at)
            slopes = [torch.autograd.grad(each, at, retain_graph=True)[0] for each in excess]
        return excess.detach(), torch.stack(slopes)

    def achieved(self, gates: Tensor) -> dict[str, float]:
        """Each cost as a share of the full network's, for 0/1 gates [G]."""
        return {name: float(model(gates)) for name, model in self.models.items()}

    def in_window(self, gates: Tensor) -> bool:
        """Whether every budget is met and the tightest one is used up to 1 % of the full network's cost."""
        slack = [self.asked[name] - share for name, share in self.achieved(gates).items()]
        return 0 <= min(slack) <= WINDOW

    def to(self, device: torch.device) -> Constraint:
        """Move the tables to a device, in place."""
        for model in self.models.values():
            model.to(device)
        return self


class _Products:
    """For each layer the sum, over its channels, of the product of the gates of that channel.

    Equal products are computed once and counted: a layer of 512 ungated channels is one row.
    """

    def __init__(self, layers: Sequence[Sequence[_Gates]], gates: int) -> None:
        rows: dict[tuple[int, _Gates], int] = {}
        for index, channels in enumerate(layers):
            for channel in channels:
                rows[index, channel] = rows.get((index, channel), 0) + 1
        depth = max((len(channel) for _, channel in rows), default=0)
        padded = [sorted(channel) + [gates] * (depth - len(channel)) for _, channel in rows]
        self._layers = len(layers)
        self._gate = torch.tensor(padded, dtype=torch.long).reshape(len(rows), depth)
        self._layer = torch.tensor([index for index, _ in rows], dtype=torch.long)
        self._count = torch.tensor(list(rows.values()), dtype=torch.float64)

    def __call__(self, gates: Tensor) -> Tensor:
        padded = torch.cat([gates, gates.new_ones(1)])  # index G: always open
        live = padded[self._gate].prod(dim=1) * self._count
        return gates.new_zeros(self._layers).index_add(0, self._layer, live)

    def to(self, device: torch.device) -> None:
        self._gate, self._layer, self._count = self._gate.to(device), self._layer.to(device), self._count.to(device)


def offsets(sites: Sequence[Site]) -> list[int]:
    """Index of each site's first gate in the vector of all gates."""
    starts, total = [], 0
    for site in sites:
        starts.append(total)
        total += site.gates
    return starts


def _common(channels: Sequence[_Gates]) -> _Gates:
    return frozenset.intersection(*channels) if channels else _ALWAYS


def _layers(traced: Traced, sites: Sequence[Site], starts: Sequence[int], cost: CostName) -> list[_Layer]:
    gated: dict[fx.Node, list[_Gates]] = {}
    for site, start in zip(sites, starts, strict=True):
        gates = range(start, start + site.width) if site.kind == "channel" else [start] * site.width
        gated[site.node] = [frozenset({gate}) for gate in gates]
    alive = _alive(traced, gated)
    needed = _needed(traced, gated, alive)
    layers = []
    for node in traced.module.graph.nodes:
        layer = traced.layer(node) if node.op == "call_module" else None
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        source = node.all_input_nodes[0]
        outputs = needed[node]
        if traced.kind[node] == "mixer":
            read = [a | n for a, n in zip(alive[source], needed[source], strict=True)]
        elif traced.kind[node] == "depthwise":
            read, outputs = [_ALWAYS], [a | n for a, n in zip(alive[source], outputs, strict=True)]
        else:
            read, outputs = _fixed(layer, outputs)
        layers.append(_Layer(*_units(traced, node, layer, cost), read, outputs))
    return layers


def _fixed(layer: nn.Module, outputs: list[_Gates]) -> tuple[list[_Gates], list[_Gates]]:
    """A layer whose widths stay (grouped, shared, channels not on axis 1): it can only go as a whole."""
    whole = _common(outputs)
    if isinstance(layer, nn.Conv2d):
        return [_ALWAYS] * (layer.in_channels // layer.groups), [whole] * layer.out_channels
    assert isinstance(layer, nn.Linear)
    return [_ALWAYS] * layer.in_features, [whole] * layer.out_features


def _units(traced: Traced, node: fx.Node, layer: nn.Conv2d | nn.Linear, cost: CostName) -> tuple[float, float]:
    area = layer.kernel_size[0] * layer.kernel_size[1] if isinstance(layer, nn.Conv2d) else 1
    if cost == "params":
        folded = any(isinstance(_module(traced, user), nn.modules.batchnorm._BatchNorm) for user in node.users)
        return float(area), float(layer.bias is not None or folded)
    shape = traced.shape[node]
    positions = torch.Size(shape).numel() // (
        layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    )
    return float(area * positions), 0.0


def _module(traced: Traced, node: fx.Node) -> nn.Module | None:
    return traced.layer(node) if node.op == "call_module" else None


def _alive(traced: Traced, gated: dict[fx.Node, list[_Gates]]) -> dict[fx.Node, list[_Gates]]:
    """Forward: the gates each channel of each tensor comes through, so that it is zero when one of them closes."""
    alive: dict[fx.Node, list[_Gates]] = {}
    for node in traced.module.graph.nodes:
        width, kind = traced.channels(node), traced.kind[node]
        inputs = [alive[source] for source in node.all_input_nodes if traced.channels(source)]
        if kind in ("same", "activation") and inputs and len(inputs[0]) == width:
            channels = inputs[0]
        elif kind == "flatten":
            channels = [c for c in inputs[0] for _ in range(width // len(inputs[0]))]
        elif kind == "mul" and len(inputs) == 2 and len(inputs[0]) == len(inputs[1]) == width:
            channels = [a | b for a, b in zip(*inputs, strict=True)]
        elif kind == "concat" and sum(map(len, inputs)) == width:
            channels = [c for part in inputs for c in part]
        else:  # a layer's output is at least its bias; a sum is alive while one side is
            channels = [_ALWAYS] * width
        own = gated.get(node)
        alive[node] = [a | g for a, g in zip(channels, own, strict=True)] if own else channels
    return alive


def _needed(
    traced: Traced, gated: dict[fx.Node, list[_Gates]], alive: dict[fx.Node, list[_Gates]]
) -> dict[fx.Node, list[_Gates]]:
    """Backward: the gates behind which each channel is read, so that nobody needs it when one of them closes."""
    needed: dict[fx.Node, list[_Gates]] = {}
    for node in reversed(traced.module.graph.nodes):
        width = traced.channels(node)
        readers = traced.readers(node) if width else []  # a size or another scalar has no channels
        wants = [_wanted(traced, reader, node, needed, alive) for reader in readers]
        channels = [frozenset.intersection(*each) for each in zip(*wants, strict=True)] if wants else [_ALWAYS] * width
        own = gated.get(node)
        needed[node] = [n | g for n, g in zip(channels, own, strict=True)] if own else channels
    return needed


def _wanted(
    traced: Traced,
    reader: fx.Node,
    source: fx.Node,
    needed: dict[fx.Node, list[_Gates]],
    alive: dict[fx.Node, list[_Gates]],
) -> list[_Gates]:
    """What one reader needs of `source`'s channels."""
    out, kind, width = needed[reader], traced.kind[reader], traced.channels(source)
    if kind == "mul" and len(out) == width:  # what is multiplied by a closed channel is not needed either
        others = [alive[other] for other in reader.all_input_nodes if other is not source]
        return [c.union(*(other[i] for other in others if len(other) == width)) for i, c in enumerate(out)]
    if kind in ("same", "activation", "sigmoid", "depthwise", "add") and len(out) == width:
        return out
    if kind == "flatten":
        run = len(out) // width
        return [_common(out[channel * run : (channel + 1) * run]) for channel in range(width)]
    if kind == "concat" and sum(map(traced.channels, reader.all_input_nodes)) == len(out):
        wants, start = [], 0
        for part in reader.all_input_nodes:
            if part is source:
                wants.append(out[start : start + width])
            start += traced.channels(part)
        return [frozenset.intersection(*each) for each in zip(*wants, strict=True)]
    return [_common(out)] * width if reader.op != "output" else [_ALWAYS] * width
