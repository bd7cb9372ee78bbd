"""The table of operators: every module of this folder lists its handlers in `HANDLERS`, by ONNX operator type."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from polar_deploy.surgery.operator import Operator, Unknown

if TYPE_CHECKING:
    from polar_deploy.surgery.graph import Node

UNKNOWN = Unknown()


@cache
def table() -> dict[str, Operator]:
    """All handlers, by operator type of the standard ONNX domain."""
    handlers: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(__path__):
        handlers.update(importlib.import_module(f"{__name__}.{module.name}").HANDLERS)
    return handlers


def handler(node: Node) -> Operator:
    """The handler of a node; `UNKNOWN` for operators of other domains and for those that nobody wrote one for."""
    return UNKNOWN if node.domain not in (None, "", "ai.onnx") else table().get(node.op, UNKNOWN)
