"""A network with gates: the traced model, its sites, and one `Gate` module at each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor, fx, nn

from polar_deploy.config import Gates
from polar_deploy.errors import UsageError
from polar_deploy.gating.cost import Constraint, CostModel, offsets
from polar_deploy.gating.gate import Gate, Phase
from polar_deploy.gating.graph import Traced, trace
from polar_deploy.gating.latency import LatencyModel
from polar_deploy.gating.losses import find_price, polarization, steering
from polar_deploy.gating.sites import Site, find_sites
from polar_deploy.latency import LatencyTable

GATES = "gates"  # submodule of the traced network that holds the gates


class GatedNetwork(nn.Module):
    """`model` with a gate at every site; until `phase` changes it computes exactly what `model` does.

    Args:
        model: a classifier of images [B, 3, S, S]; its parameters are shared, under their own names.
        input_size: S, pixels.
        mode: "batch" or "sample", see `Gate`.
        blocks: whether whole residual branches get a gate.

    Raises:
        UsageError: the model cannot be traced, or has no place for a gate.
    """

    def __init__(
        self, model: nn.Module, input_size: int, *, mode: Literal["batch", "sample"] = "batch", blocks: bool = True
    ) -> None:
        super().__init__()
        self.traced = trace(model, input_size)
        self.sites = find_sites(self.traced, blocks=blocks)
        if not self.sites:
            raise UsageError(
                f"no place for a gate was found in {type(model).__name__}",
                "use a network with activations between its convolutions, or with residual blocks",
            )
        self.starts = offsets(self.sites)
        self.masks = sum(site.gates for site in self.sites)
        self.gates = [Gate(s.gates, self.traced.channels(s.source), mode, self.masks) for s in self.sites]
        self.net = _insert(self.traced, self.sites, self.gates)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, 3, S, S]."""
        logits: Tensor = self.net(images)
        return logits

    def cost_model(self, cost: str = "macs") -> CostModel:
        """The cost of this network as a function of its gates."""
        return CostModel(self.traced, self.sites, cost)  # type: ignore[arg-type]

    def constraint(self, asked: Mapping[str, float], table: LatencyTable | None = None) -> Constraint:
        """The budgets `asked` of this network; one for latency needs the table.

        Raises:
            ContentError: the table is of another network.
        """
        models: dict[str, CostModel | LatencyModel] = {}
        for name in asked:
            if name == "latency":
                assert table is not None
                models[name] = LatencyModel(table, self.sites)
            else:
                models[name] = self.cost_model(name)
        return Constraint(models, asked)

    def network_parameters(self) -> list[nn.Parameter]:
        """The parameters of the network itself."""
        return [p for name, p in self.net.named_parameters() if not name.startswith(f"{GATES}.")]

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of the gates."""
        return [p for gate in self.gates for p in gate.parameters()]

    def set_phase(self, phase: Phase) -> None:
        """Switch every gate to "off", "learning" or "frozen"."""
        for gate in self.gates:
            gate.phase = phase

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of every gate's sigmoid (> 0)."""
        for gate in self.gates:
            gate.temperature = temperature

    def open(self) -> Tensor:
        """State of all gates, 0 or 1, [G]."""
        return torch.cat([gate.open for gate in self.gates])

    def share(self) -> Tensor:
        """Share of the last batch's samples that open each gate, [G], differentiable in the learning phase."""
        return torch.cat([gate.share for gate in self.gates])

    def utility(self) -> Tensor:
        """Running estimate of the loss that closing each gate would add, [G]."""
        return torch.cat([gate.utility for gate in self.gates])

    def freeze(self, open_gates: Tensor) -> None:
        """Fix all gates to a 0/1 vector [G]."""
        for site, start, gate in zip(self.sites, self.starts, self.gates, strict=True):
            gate.freeze(open_gates[start : start + site.gates].to(gate.open))

    def floor(self, utility: Tensor, min_width: float) -> Tensor:
        """The gates that must not close: in each layer the `min_width` share of most utility; bool [G]."""
        protected = torch.zeros(self.masks, dtype=torch.bool, device=utility.device)
        for site, start in zip(self.sites, self.starts, strict=True):
            if site.kind == "channel":
                keep = max(1, ceil(min_width * site.width))
                top = torch.topk(utility[start : start + site.width], keep).indices
                protected[start + top] = True
        return protected

    def gate_loss(self, constraint: Constraint, target: float, settings: Gates) -> Tensor:
        """Loss of the gates after a forward pass: polarization, and steering to the excess `target`."""
        logits = torch.cat([gate.logits for gate in self.gates], dim=1)
        with torch.no_grad():
            utility = self.utility().double()
            marginal = constraint.marginal(self.open())
            protected = self.floor(utility, settings.min_width)
            price = find_price(constraint, utility, marginal, protected, target)
        steer = steering(logits, utility, price, marginal, protected)
        return settings.polarization * polarization(self.share()) + settings.steering * steer

    def static(self) -> fx.GraphModule:
        """A copy that multiplies by the frozen gates as constants [1, C, 1, 1] (or [1, C]), for export.

        The copy shares its weights with this network.
        """
        constants = [_Constant(gate.open, site, self.traced) for site, gate in zip(self.sites, self.gates, strict=True)]
        return _insert(self.traced, self.sites, constants)


class _Constant(nn.Module):
    """A frozen gate: a product with a constant, one value a channel."""

    mask: Tensor

    def __init__(self, open_gates: Tensor, site: Site, traced: Traced) -> None:
        super().__init__()
        ones = (1,) * (len(traced.shape[site.node]) - 2)
        self.register_buffer("mask", open_gates.detach().clone().expand(site.width).reshape(1, site.width, *ones))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return x * self.mask


def gate_key(site: Site) -> str:
    """Name of a site's gate module below `GATES` (a module's name must not hold dots)."""
    return site.name.replace(".", "__").replace("#", "__n")


def _insert(traced: Traced, sites: Sequence[Site], gates: Sequence[nn.Module]) -> fx.GraphModule:
    """A new graph module over the same layers in which every reader of a site reads its gate instead."""
    graph = fx.Graph()
    now: dict[fx.Node, fx.Node] = {}  # a node of the traced graph -> what its readers read in the new one
    graph.output(graph.graph_copy(traced.module.graph, now))
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    root = {target: attrgetter(target)(traced.module) for target in targets}
    for site, gate in zip(sites, gates, strict=True):
        node = now[site.node]
        readers = list(node.users)
        with graph.inserting_before(next(each for each in graph.nodes if each in node.users)):
            gated = graph.call_module(f"{GATES}.{gate_key(site)}", (node, now[site.source]))
        for reader in readers:
            reader.replace_input_with(node, gated)
        now[site.node] = gated
        root[f"{GATES}.{gate_key(site)}"] = gate
    module = fx.GraphModule(root, graph, class_name=type(traced.module).__name__)
    module.training = traced.module.training  # the layers are shared and keep their own mode
    return module
