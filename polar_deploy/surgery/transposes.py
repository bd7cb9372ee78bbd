"""Reshape, Transpose, Reshape that are one Transpose of the last two axes, as PyTorch exports attention.

In between, the heads are joined with the batch, where channels cannot be followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Node


def join_transposes(graph: Graph) -> None:
    """Makes one Transpose of each three of them."""
    for node in graph.nodes:
        around = _reshapes_around(graph, node)
        if around is not None:
            rank = len(graph.shape(around[0].inputs[0]) or ())
            graph.stand_for(node, *around, "perm", [*range(rank - 2), rank - 1, rank - 2])


def _reshapes_around(graph: Graph, node: Node) -> tuple[Node, Node] | None:
    """The Reshapes before and behind a Transpose that do no more than to join and split the leading axes."""
    if node.op != "Transpose" or node.attrs.get("perm") != [0, 2, 1] or not node.inputs[0].inputs:
        return None
    before, readers = node.inputs[0].inputs[0], node.outputs[0].outputs
    if before.op != "Reshape" or len(readers) != 1 or readers[0].op != "Reshape":
        return None
    between, after = (node.inputs[0], node.outputs[0]), readers[0]
    if any(len(tensor.outputs) != 1 or not graph.is_private(tensor.name) for tensor in between):
        return None
    given, joined, split = (graph.shape(t) for t in (before.inputs[0], between[0], after.outputs[0]))
    if given is None or joined is None or split is None or None in given or len(given) < 4 or len(joined) != 3:
        return None
    same = joined[1:] == given[-2:] and split == (*given[:-2], given[-1], given[-2])
    return (before, after) if same else None
