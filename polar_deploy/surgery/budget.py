"""The budget is a promise about the compressed graph: hold it against what was counted there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError
from polar_deploy.surgery import cost


def require_kept(budget: Mapping[str, float], counted: Mapping[str, Any], full: Path, report: Path) -> None:
    """Raise ContentError where the compressed network has more of a cost than the budget leaves of the full one's.

    Args:
        budget: name of the cost -> the share that is asked. Latency is not counted but measured, and left out.
        counted: a report of surgery: name of the cost -> (before, after).
        full: the full network's ONNX file.
        report: where that report lies, for the message.
    """
    costs = cost(onnx_files.read(full, check=False))
    for name, asked in budget.items():
        if name == "latency":
            continue
        achieved = counted[name][1] / getattr(costs, name)
        if achieved > asked:
            raise ContentError(
                f"the compressed network has {achieved:.4f} of the full one's {name}, above the budget of {asked}: "
                "surgery could not remove all that the gates closed",
                f"see the cuts not made in {report}, and report this network",
            )
