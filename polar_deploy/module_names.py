"""Which module of the network each node of an exported graph was computed in, and names that say so."""

from __future__ import annotations

import ast
from collections.abc import Collection

import onnx

from polar_deploy.onnx_files import metadata

_SCOPES = "pkg.torch.onnx.name_scopes"  # modules around a node, the outermost first, and the node itself
_REWRITTEN = "pkg.onnxscript.rewriter.rule_name"


def module_of(node: onnx.NodeProto) -> str | None:
    """The path of the module that a node of an exported graph was computed in; None where that is not told."""
    scopes = _scopes(node)
    return scopes[-1] if scopes else None


def name_nodes(graph: onnx.GraphProto, modules: Collection[str]) -> None:
    """Name nodes MODULE/OPERATOR, as `layer1.0.conv1/Conv`; those of the network itself OPERATOR.

    Further ones in a module have _1, _2, ... at the end. The exporter's own names count through the whole graph
    (`node_Conv_8`), so that they tell nothing, and differ between two graphs of one network. Nodes that tell no module
    keep their names.

    Args:
        modules: paths of all modules.
    """
    named = [(node, _computed_in(node, modules)) for node in graph.node]
    taken = {node.name for node, path in named if path is None}
    for node, path in named:
        if path is None:
            continue
        first = name = f"{path}/{node.op_type}" if path else node.op_type
        count = 0
        while name in taken:
            count += 1
            name = f"{first}_{count}"
        taken.add(name)
        node.name = name


def modules_of(graph: onnx.GraphProto) -> set[str]:
    """Paths of all modules that nodes tell of."""
    return {path for node in graph.node for path in _scopes(node)}


def _computed_in(node: onnx.NodeProto, modules: Collection[str]) -> str | None:
    """As `module_of`, but a layer that BatchNormalization was folded into belongs where its weight does."""
    if _REWRITTEN in metadata(node):
        owners = (name.rpartition(".")[0] for name in node.input)
        return next((owner for owner in owners if owner and owner in modules), module_of(node))
    return module_of(node)


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Paths of the modules around a node, the network's own ("") first."""
    told = metadata(node).get(_SCOPES)
    scopes = ast.literal_eval(told)[:-1] if told else []
    if any(scope.startswith("_empty_nn_module_stack") for scope in scopes):
        return []
    return [scope.partition("@")[0] for scope in scopes]  # what is called for the second time has its number there
