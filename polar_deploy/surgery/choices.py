"""What could go from a network before anything is closed: which channels can only go together, and what that saves.

A network is given with the places where channels may be closed (`Mask`): there, a Mul by a constant, one number a
channel, is put in front of the readers of a tensor. Everything else is the answer of surgery's own facts on that graph
(`survey`): coupled sets of channels that go when all masks close them are *gates*; gates that save the same are a
*site*; a mask on a residual branch that nothing else reads is a *block*. Costs are sums of products of widths
(`polar_deploy.costs`), read off the same facts, and `Choices.measure` closes a state, cuts it and counts what is left,
so that promise and result can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from polar_deploy.costs import Cost, Layer, State, Term
from polar_deploy.errors import UsageError
from polar_deploy.surgery import rounds
from polar_deploy.surgery.count import count
from polar_deploy.surgery.detached import Array, DetachedModel

if TYPE_CHECKING:
    import onnx

    from polar_deploy.surgery.facts import Bools, Ints

NEVER = -1  # number of the gate of a channel that has none
FLOATS = (1, 10, 11, 16)  # element types of ONNX: FLOAT, FLOAT16, DOUBLE, BFLOAT16
MASK = "polar_deploy.mask"  # metadata of a Mul that closes channels


@dataclass(frozen=True)
class Mask:
    """A place where channels can be closed.

    Attributes:
        name: unique among the masks; the metadata of the Mul says it.
        tensor: the value that is multiplied.
        readers: positions, among the graph's nodes, of those that read the product instead.
        rank: of the tensor.
        axis: of the channels, counted from the front.
        width: channels along it.
        block: whether all of it opens and closes at once: the output of a residual branch.
    """

    name: str
    tensor: str
    readers: tuple[int, ...]
    rank: int
    axis: int
    width: int
    block: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its constant."""
        return (self.width, *(1,) * (self.rank - self.axis - 1))


@dataclass(frozen=True)
class Site:
    """Gates that save the same, so that a cost depends only on how many of them are open.

    Attributes:
        name: of the first layer that writes its channels; unique.
        kind: "stream" where several layers write them (the sum of residual branches), else "channel".
        gates: their numbers, in the order of the channels.
        size: channels that one gate closes in what that layer writes: more than one for groups of a convolution.
        blocks: indices of the blocks whose closing removes all of the site.
    """

    name: str
    kind: Literal["channel", "stream"]
    gates: range
    size: int = 1
    blocks: frozenset[int] = frozenset()

    @property
    def width(self) -> int:
        """How many gates stand here."""
        return len(self.gates)


@dataclass(frozen=True)
class Block:
    """A residual branch that can go whole.

    Attributes:
        mask: the index of its mask.
        gate: its number.
        channels: int [width of the mask], the gate of each channel of what the branch is added to, or `NEVER`.
        nodes: positions, in the masked graph, of what is computed for this branch alone.
    """

    name: str
    mask: int
    gate: int
    channels: Ints = field(compare=False, repr=False)
    nodes: frozenset[int] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Choices:
    """The gates of a network.

    Attributes:
        detached: the graph with its masks, all open.
        masks: where channels can be closed.
        gate_of: for each mask, int [width], the number of the gate that closes each channel, or `NEVER`.
        sites, blocks: in the order of execution; gates are numbered through sites, then blocks.
        alive: sets of blocks (indices) of which at least one has to stay.
        costs: "macs" and "params".
        layers: what the MACs are made of.
        additions: elements of the sums of computed tensors.
        reasons: why layers whose channels have no gate have none, and branches that are no blocks.
        folding: BatchNormalizations that will be folded into the layer before them, by their label, and whether that
            layer gets a bias from it: they count as that bias.
    """

    detached: DetachedModel
    masks: tuple[Mask, ...]
    gate_of: tuple[Ints, ...]
    sites: tuple[Site, ...]
    blocks: tuple[Block, ...]
    alive: tuple[frozenset[int], ...]
    costs: dict[str, Cost]
    layers: tuple[Layer, ...]
    additions: tuple[Term, ...]
    reasons: dict[str, str]
    folding: dict[str, bool]

    @property
    def gates(self) -> int:
        """How many gates there are."""
        return sum(site.width for site in self.sites) + len(self.blocks)

    def with_gates_alone(self) -> tuple[Choices, list[int]]:
        """The same without masks that close nothing, and which are left; the others stay in the graph, open."""
        used = [index for index, gates in enumerate(self.gate_of) if (gates != NEVER).any()]
        blocks = tuple(replace(block, mask=used.index(block.mask)) for block in self.blocks)
        masks, gate_of = tuple(self.masks[i] for i in used), tuple(self.gate_of[i] for i in used)
        return replace(self, masks=masks, gate_of=gate_of, blocks=blocks), used

    def owners(self) -> list[tuple[range, str, str]]:
        """Sites and blocks as (their gates, name, kind), in the order of the gates."""
        found: list[tuple[range, str, str]] = [(site.gates, site.name, site.kind) for site in self.sites]
        return found + [(range(block.gate, block.gate + 1), block.name, "block") for block in self.blocks]

    def values(self, opened: Bools) -> list[Bools]:
        """For each mask, bool [width], what is open under the state bool [gates] of all gates."""
        known = np.append(np.asarray(opened, bool), True)  # `NEVER` is the last one
        return [known[gates] for gates in self.gate_of]

    def state(self, opened: Bools) -> State:
        """Widths and blocks of the state bool [gates] of all gates."""
        widths = tuple(int(np.count_nonzero(opened[site.gates.start : site.gates.stop])) for site in self.sites)
        return State(widths, tuple(bool(opened[block.gate]) for block in self.blocks))

    def require_possible(self, opened: Bools) -> None:
        """Raise UsageError where a state is not bool [gates], or closes all of what cannot go whole."""
        if opened.shape != (self.gates,):
            raise UsageError(f"{opened.shape} gates were given, the network has {self.gates}", "give one value a gate")
        state = self.state(opened)
        for site, width in zip(self.sites, state.widths, strict=True):
            if not width and all(state.blocks[block] for block in site.blocks):
                raise UsageError(
                    f"all {site.width} gates of {site.name} are closed, and a layer cannot be left without channels",
                    "leave one of them open, or close the block that it is in, where it is in one",
                )
        for either in self.alive:
            if not any(state.blocks[block] for block in either):
                names = ", ".join(self.blocks[block].name for block in sorted(either))
                raise UsageError(f"all of the blocks {names} are closed", "leave one of them open")

    def with_masks(self, detached: DetachedModel, opened: Bools) -> DetachedModel:
        """A graph with these masks, `self.detached` or one of other weights, at the state bool [gates] of all gates."""
        values = zip(self.masks, self.values(opened), strict=True)
        return with_values(detached, {constant_name(mask): value.reshape(mask.shape) for mask, value in values})

    def measure(self, opened: Bools) -> dict[str, int]:
        """Costs of what surgery makes of the graph with the gates closed that are not in bool [gates]."""
        last = rounds.operate(self.with_masks(self.detached, opened))[-1]
        norms = {at: self.folding[label] for at, label in enumerate(last.labels) if label in self.folding}
        cost = count(last.model.model, norms)
        return {"macs": cost.macs, "params": cost.params}


def find(
    detached: DetachedModel,
    masks: Sequence[Mask],
    name_of: Callable[[int], str | None],
    layers: Mapping[str, Collection[int]] | None = None,
) -> Choices:
    """The gates of a graph whose channels can be closed at `masks`.

    Args:
        detached: the whole network; the values of its weights do not matter, but none should be zero.
        masks: where channels can be closed.
        name_of: what the layer at a node's position is called, None where that is not known.
        layers: the positions of the nodes that compute with the weights of each layer, by its name; None: of all nodes
            that multiply by a constant, by `name_of`.
    """
    from polar_deploy.surgery import ungated
    from polar_deploy.surgery.pricing import Pricing
    from polar_deploy.surgery.survey import Survey

    masked = insert(detached, masks)
    survey = Survey(detached, masked, masks, name_of, layers)
    pricing = Pricing(survey, survey.units())
    return Choices(
        detached=masked,
        masks=tuple(masks),
        gate_of=pricing.gate_of,
        sites=pricing.sites,
        blocks=pricing.blocks,
        alive=pricing.alive,
        costs={"macs": pricing.cost("macs"), "params": pricing.cost("params")},
        layers=pricing.layers(),
        additions=pricing.additions(),
        reasons={**survey.reasons, **ungated.reasons(survey, pricing.gated)},
        folding=pricing.folding,
    )


def insert(detached: DetachedModel, masks: Sequence[Mask]) -> DetachedModel:
    """The graph with a Mul by ones for each mask, each with a constant of its own."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(detached.model)
    before: dict[int, list[onnx.NodeProto]] = {}
    for mask in masks:
        constant, product = constant_name(mask), f"polar_deploy.masked.{mask.name}"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(mask.shape, np.float32), constant))
        node = onnx.helper.make_node("Mul", [mask.tensor, constant], [product], name=product)
        node.metadata_props.add(key=MASK, value=mask.name)
        for position in mask.readers:
            reader = model.graph.node[position]
            for index, name in enumerate(reader.input):
                if name == mask.tensor:
                    reader.input[index] = product
        before.setdefault(min(mask.readers), []).append(node)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for position, node in enumerate(nodes):
        model.graph.node.extend([*before.get(position, ()), node])
    return replace(detached, model=model)


def constant_name(mask: Mask) -> str:
    """The name of a mask's constant in the graph."""
    return f"polar_deploy.mask.{mask.name}"


def without_values(detached: DetachedModel, parameters: set[str]) -> DetachedModel:
    """The graph with other values, none of them zero, in place of those of the named parameters.

    What can go from a network is a matter of its structure: a layer that starts at zero is no dead one.
    """
    draw = np.random.default_rng(0)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in detached.model.graph.initializer}
    wanted = [name for name in shapes if name in parameters]
    return with_values(detached, {name: 0.5 + draw.random(shapes[name], np.float32) for name in wanted})


def with_values(detached: DetachedModel, values: Mapping[str, Array]) -> DetachedModel:
    """The graph with these values in place of its own; constants that hold no floating-point numbers stay."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(detached.model)
    arrays = dict(detached.arrays)
    for tensor in model.graph.initializer:
        if tensor.name in values and tensor.data_type in FLOATS:
            array = values[tensor.name].astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            if tensor.name in arrays:
                arrays[tensor.name] = array
            else:
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return replace(detached, model=model, arrays=arrays)
