"""The traced network: a torch.fx graph whose nodes are classified by what they do to channels.

Everything in `gating` reads the network through this table; an operator that is missing here is a wall: no gate is
placed whose channel would have to pass it, and its cost counts as fixed.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.ops import StochasticDepth

from polar_deploy.errors import UsageError

# What a node does to the channels (axis 1) of its input:
#   mixer       every output channel reads every input channel (dense convolution, linear layer)
#   depthwise   channel to channel, with weights of its own
#   grouped     a convolution in groups of several channels
#   activation  channel to channel; a gate may stand behind it
#   sigmoid     channel to channel, but not zero at zero: the end of a squeeze-excite branch
#   same        channel to channel (norm, pooling, dropout, identity)
#   flatten     each channel becomes a run of columns
#   add, mul, concat   join several tensors
#   shape       reads sizes, not values
#   other       a wall
_MODULES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.Linear, "mixer"),
    (
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.Hardtanh),
        "activation",
    ),
    ((nn.Sigmoid, nn.Hardsigmoid), "sigmoid"),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm), "same"),
    ((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), "same"),
    ((nn.Dropout, nn.Dropout2d, nn.Identity, StochasticDepth), "same"),
    (nn.Flatten, "flatten"),
)
_FUNCTIONS: dict[object, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), "add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), "mul"),
    **dict.fromkeys((torch.cat, torch.concat), "concat"),
    **dict.fromkeys((F.relu, torch.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu), "activation"),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, F.hardsigmoid), "sigmoid"),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout), "same"),
    torch.flatten: "flatten",
}
_METHODS = {
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("mul", "mul_"), "mul"),
    **dict.fromkeys(("relu", "relu_"), "activation"),
    **dict.fromkeys(("sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys(("contiguous", "clone"), "same"),
    **dict.fromkeys(("view", "reshape", "flatten"), "flatten"),
    "mean": "same",
    **dict.fromkeys(("size", "dim"), "shape"),
}


class _Tracer(fx.Tracer):
    """Keeps stochastic depth whole: traced through, it would bake the training mode into the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, StochasticDepth) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Traced:
    """A network as torch.fx sees it, with the shape of every tensor at batch 1 and the kind of every node."""

    module: fx.GraphModule
    shape: dict[fx.Node, tuple[int, ...]]
    kind: dict[fx.Node, str]

    def layer(self, node: fx.Node) -> nn.Module:
        """The module that a `call_module` node calls."""
        return self.module.get_submodule(str(node.target))

    def channels(self, node: fx.Node) -> int:
        """Width of a node's output: the length of axis 1, or 0 where it is no tensor with channels."""
        shape = self.shape.get(node, ())
        return shape[1] if len(shape) >= 2 else 0

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read values of `node`, not only its shape."""
        return [reader for reader in node.users if self.kind[reader] != "shape"]


def trace(model: nn.Module, input_size: int) -> Traced:
    """Trace a classifier of images [B, 3, input_size, input_size].

    Raises:
        UsageError: the model cannot be traced, or runs differently in training and evaluation mode in a way that
            tracing would freeze (`F.dropout(x, training=self.training)` instead of `nn.Dropout`).
    """
    modes = {layer: layer.training for layer in model.modules()}
    graphs: list[fx.Graph] = []
    for mode in (True, False):
        try:
            graphs.append(_Tracer().trace(model.train(mode)))
        except Exception as error:
            raise UsageError(
                f"the model cannot be traced by torch.fx: {type(error).__name__}: {error}",
                "make its forward() free of control flow that depends on values or shapes",
            ) from error
        finally:
            for layer, training in modes.items():
                layer.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise UsageError(
            "the model's graph differs between training and evaluation mode",
            "use modules such as nn.Dropout instead of functions that take self.training; switch auxiliary heads off",
        )
    module = fx.GraphModule(model, graphs[0])
    shape = _shapes(module, input_size)
    for layer, training in modes.items():
        layer.training = training
    calls = Counter(node.target for node in module.graph.nodes if node.op == "call_module")
    kind = {node: _kind(module, node, shape, calls) for node in module.graph.nodes}
    return Traced(module, shape, kind)


def _shapes(module: fx.GraphModule, input_size: int) -> dict[fx.Node, tuple[int, ...]]:
    parameter = next(module.parameters())
    with torch.no_grad():  # evaluation mode: BatchNorm at batch 1, and no running statistics are touched
        example = torch.zeros(1, 3, input_size, input_size, device=parameter.device)
        ShapeProp(module.eval()).propagate(example)
    return {
        node: tuple(node.meta["tensor_meta"].shape)
        for node in module.graph.nodes
        if hasattr(node.meta.get("tensor_meta"), "shape")
    }


def _kind(module: fx.GraphModule, node: fx.Node, shape: dict[fx.Node, tuple[int, ...]], calls: Counter[object]) -> str:
    if node.op == "call_module":
        return _module_kind(module.get_submodule(str(node.target)), shared=calls[node.target] > 1)
    if node.op == "call_function":
        kind = "shape" if node.target is getattr else _FUNCTIONS.get(node.target, "other")
    elif node.op == "call_method":
        kind = _METHODS.get(str(node.target), "other")
    else:
        return "other"
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node):
        if kind == "flatten" and not _flattens(shape.get(source, ()), shape.get(node, ())):
            return "other"
        if node.target == "mean" and shape.get(node, ())[:2] != shape.get(source, ())[:2]:
            return "other"
    return kind


def _module_kind(layer: nn.Module, *, shared: bool) -> str:
    weighted = isinstance(layer, (nn.Conv2d, nn.Linear))
    if weighted and shared:  # one weight read in two places: its widths would have to fit both
        return "other"
    if isinstance(layer, nn.Conv2d):
        if layer.groups == 1:
            return "mixer"
        return "depthwise" if layer.groups == layer.in_channels == layer.out_channels else "grouped"
    return next((kind for types, kind in _MODULES if isinstance(layer, types)), "other")


def _flattens(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a reshape keeps the batch axis and lays each channel out as one run of columns."""
    return (
        len(before) >= 2
        and len(after) == 2
        and before[0] == after[0]
        and torch.Size(before).numel() == torch.Size(after).numel()
    )
