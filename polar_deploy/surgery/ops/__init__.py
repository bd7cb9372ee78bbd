"""The table of operators: every module of this folder lists its handlers by ONNX operator type.

Those of standard operators stand in `HANDLERS`, those of the domain com.microsoft in `MICROSOFT`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from polar_deploy.surgery.operator import Operator, UnsupportedOp

if TYPE_CHECKING:
    from polar_deploy.surgery.ir import Node

UNSUPPORTED = UnsupportedOp()
MICROSOFT = "com.microsoft"
NEWEST_OPSET = 28  # whose definitions the handlers follow; what an operator means since a later one is not known


@cache
def table() -> dict[str, Operator]:
    """All handlers, by operator type of the standard ONNX domain."""
    return _listed("HANDLERS")


@cache
def contributed() -> dict[str, Operator]:
    """All handlers, by operator type of the domain com.microsoft."""
    return _listed("MICROSOFT")


def _listed(name: str) -> dict[str, Operator]:
    handlers: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(__path__):
        handlers.update(getattr(importlib.import_module(f"{__name__}.{module.name}"), name, {}))
    return handlers


def handler(node: Node, opset: int) -> Operator:
    """The handler of a node; `UNSUPPORTED` where its operator has none, or none for its definition in this opset."""
    if node.domain == MICROSOFT:
        return contributed().get(node.op, UNSUPPORTED)
    if node.domain not in ("", "ai.onnx") or (opset > NEWEST_OPSET and is_newer(node.op, opset)):
        return UNSUPPORTED
    return table().get(node.op, UNSUPPORTED)


@cache
def is_newer(operator: str, opset: int) -> bool:
    """Whether the definition of an operator in `opset` is later than those that the handlers follow."""
    import onnx

    if opset > onnx.defs.onnx_opset_version():
        return True
    return onnx.defs.has(operator, opset) and onnx.defs.get_schema(operator, opset).since_version > NEWEST_OPSET
