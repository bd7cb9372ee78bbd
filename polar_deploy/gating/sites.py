"""Where gates go: behind the activations inside blocks (a gate a channel) and on residual branches (one gate)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from polar_deploy.gating.graph import Traced

_CARRIES = ("same", "flatten", "depthwise", "mul", "concat")


@dataclass(frozen=True)
class Site:
    """One place for gates.

    Attributes:
        name: the module path of the gated activation (`layer1.0.relu1`), or of the block whose branch is gated
            (`layer1.0.add`); unique in the network.
        kind: "channel" (a gate for each of `width` channels) or "block" (one gate for all of them).
        width: channels of the gated tensor.
        node: the fx node whose output is gated.
        source: the fx node whose output the gates look at: the input of the layer that writes a channel site, the
            shortcut of a block site.
    """

    name: str
    kind: Literal["channel", "block"]
    width: int
    node: fx.Node
    source: fx.Node

    @property
    def gates(self) -> int:
        """How many gates stand here."""
        return self.width if self.kind == "channel" else 1


def find_sites(traced: Traced, *, blocks: bool = True) -> list[Site]:
    """All sites of a network, in the order of execution; `blocks=False` leaves block gates out.

    A channel site is an activation that is read, perhaps through pooling, dropout, a depthwise convolution,
    a squeeze-excite product or a Concat, by mixing layers alone: then closing a channel removes a filter before it
    and a weight column behind it. Activations on a residual stream (behind an Add), in a squeeze-excite branch and
    around grouped convolutions are left out; of two activations in a chain (before and behind a depthwise
    convolution) the last one is the site. A block site is the branch of an Add whose other side is a shortcut.
    """
    names = _Names()
    sites = []
    for node in traced.module.graph.nodes:
        if traced.kind[node] == "activation":
            writer = _writer(traced, node)
            if writer is not None and _read_by_mixers(traced, node) and not _squeezes(traced, node):
                sites.append(Site(names(node), "channel", traced.channels(node), node, writer.all_input_nodes[0]))
        elif blocks and traced.kind[node] == "add":
            ends = _branch_and_shortcut(traced, node)
            if ends is not None:
                branch, shortcut = ends
                sites.append(Site(names(node), "block", traced.channels(branch), branch, shortcut))
    return sites


class _Names:
    """Names of nodes in terms of the model's modules; a second node under the same name gets `#2`."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, node: fx.Node) -> str:
        if node.op == "call_module":
            name = str(node.target)
        else:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            scope = str(stack[-1][0]) if stack else ""
            target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
            name = ".".join(part for part in (scope, str(target).strip("_").removeprefix("i")) if part)
        self._seen[name] = self._seen.get(name, 0) + 1
        return name if self._seen[name] == 1 else f"{name}#{self._seen[name]}"


def _writer(traced: Traced, node: fx.Node) -> fx.Node | None:
    """The mixing layer whose filters become the channels of `node`, if only channel-wise steps lie between."""
    while True:
        inputs = node.all_input_nodes
        if len(inputs) != 1:
            return None
        node = inputs[0]
        kind = traced.kind[node]
        if kind == "mixer":
            return node
        if kind not in ("same", "depthwise", "activation"):
            return None


def _read_by_mixers(traced: Traced, node: fx.Node) -> bool:
    """Whether every path from `node` ends in a mixing layer and none meets another activation or a wall first."""
    readers = traced.readers(node)
    return bool(readers) and all(
        traced.kind[reader] == "mixer" or (traced.kind[reader] in _CARRIES and _read_by_mixers(traced, reader))
        for reader in readers
    )


def _squeezes(traced: Traced, node: fx.Node) -> bool:
    """Whether `node` is the inner activation of a squeeze-excite branch: all its readers end in a sigmoid."""
    readers = traced.readers(node)
    return bool(readers) and all(
        traced.kind[reader] == "sigmoid" or (traced.kind[reader] in ("mixer", "same") and _squeezes(traced, reader))
        for reader in readers
    )


def _branch_and_shortcut(traced: Traced, add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two sides of a residual Add: the branch has mixing layers, the shortcut none or one (a projection).

    A shortcut that pads channels (option A of He et al.) would leave the stream with channels that are zero here
    and alive behind the next block: nothing could be removed for them, so such a block is not offered for removal.
    """
    if len(add.args) != 2 or not all(isinstance(side, fx.Node) for side in add.args):
        return None
    left, right = add.all_input_nodes if len(add.all_input_nodes) == 2 else (None, None)
    if left is None or right is None or traced.shape.get(left) != traced.shape.get(right):
        return None
    above = {side: set(_above(side)) for side in (left, right)}
    for branch, shortcut in ((left, right), (right, left)):
        own, other = above[branch] - above[shortcut], above[shortcut] - above[branch]
        layers = sum(traced.kind[node] in ("mixer", "depthwise", "grouped") for node in own)
        projections = [traced.kind[node] for node in other if traced.kind[node] != "same"]
        if branch in own and layers >= 1 and (not projections or (projections == ["mixer"] and layers >= 2)):
            return (branch, shortcut) if list(branch.users) == [add] else None
    return None


def _above(node: fx.Node) -> Iterator[fx.Node]:
    """`node` and everything it is computed from."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
            yield current
