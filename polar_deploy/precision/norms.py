"""Norms that are written out stay FP32 in a graph of FP16 or BF16, as ONNX's own norms compute inside (`stash_type`).

A square ends FP16 at 256, and a variance that is a difference of larger numbers is noise once they are rounded. Which
samples meet that is chance, so that a few of them prove nothing: what is wide is told by the form of the graph.
"""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from polar_deploy.documents.build import WiderLayer
from polar_deploy.precision import graph

_WHY = "it is a norm, or begins one that is written out, which needs FP32 inside as ONNX's own norms do"
_MEANS = frozenset({"ReduceMean", "ReduceSum", "GlobalAveragePool"})
_NORMS = frozenset({"ReduceL2", "ReduceSumSquare"})
# Norms of one node that have no `stash_type` to ask for FP32.
_STASHLESS = frozenset({"LpNormalization", "MeanVarianceNormalization"})
_SHAPES = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_MEETS = frozenset({"Add", "Div", "Mul", "Sub"})
_ARITHMETIC = _SHAPES | _MEETS | {"Abs", "Clip", "Max", "Neg", "Pow", "Reciprocal", "Sqrt", "Where"}


def written_out(model: onnx.ModelProto) -> tuple[set[str], list[WiderLayer]]:
    """Find norms that are written out: LayerNorm before opset 17, RMSNorm, GRN, division by a vector's length.

    A norm that is one node is none of them, unless ONNX leaves open in which type it computes inside.

    Args:
        model: as `graph.load` gives it.

    Returns:
        The names of their nodes, from the mean that is taken off to the node that divides by the deviation; and the
        nodes that square, as build.json lists them.
    """
    search = _Search(model)
    search.run()
    squares = [node for node in model.graph.node if node.name in search.squares]
    return search.wide, [
        WiderLayer(layer=node.name, operator=node.op_type, error=None, type="fp32", why=_WHY) for node in squares
    ]


class _Search:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes, self.makers = model.graph.node, graph.makers(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.averages: dict[str, bool] = {}  # what is computed of averages and constants alone; whether of squares
        self.squares: set[str] = set()
        self.wide: set[str] = set()

    def run(self) -> None:
        """Find `squares` and `wide`, by name."""
        for node in self.nodes:
            if node.op_type in _STASHLESS:
                self.squares.add(node.name)
                self.wide.add(node.name)
                continue
            operands = node.input[:1] if node.op_type in _SHAPES | _MEANS | _NORMS else node.input
            variable = [name for name in operands if name and name not in self.constants]
            of_squares = [self.averages[name] for name in variable if name in self.averages]
            if node.op_type in _MEANS | _NORMS:
                square = node if node.op_type in _NORMS else self._origin(node.input[0])
                if square is not None and (square is node or self._squares(square)):
                    self.squares.add(square.name)
                    of_squares.append(True)
                self.averages[node.output[0]] = any(of_squares)
            elif node.op_type in _ARITHMETIC and variable and len(of_squares) == len(variable):
                self.averages[node.output[0]] = any(of_squares)
            elif node.op_type not in _MEETS:
                continue
            if any(of_squares):
                self._add(node)

    def _origin(self, tensor: str) -> onnx.NodeProto | None:
        """The node that makes a tensor's numbers, whatever shape they had then."""
        node = self.makers.get(tensor)
        while node is not None and node.op_type in _SHAPES:
            node = self.makers.get(node.input[0])
        return node

    def _squares(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Pow":
            exponent = self.constants.get(node.input[1])
            return exponent is not None and bool((numpy_helper.to_array(exponent) == 2).all())
        return node.op_type == "Mul" and node.input[0] == node.input[1]

    def _add(self, node: onnx.NodeProto) -> None:
        """A node of a norm, and the nodes of the norm that it reads: averages, squares, what a mean is taken off."""
        if node.name in self.wide:
            return
        self.wide.add(node.name)
        for name in node.input:
            origin = self._origin(name)
            if origin is not None and (
                origin.output[0] in self.averages
                or origin.name in self.squares
                or (origin.op_type == "Sub" and not self.averages.keys().isdisjoint(origin.input))
            ):
                self._add(self.makers[name])
