"""Exact removal of dead channels and blocks from any ONNX graph in which gates, or zero filters, close channels.

    from polar_deploy.surgery import compress_file
    compress_file(Path("gated.onnx"), Path("compressed.onnx"))

Facts come first (`facts`: constants forward, need backward; `sets`: what can only go together), cuts after (`cut`).
What an operator does to channels stands in one handler a family (`ops`). Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from polar_deploy.surgery.count import Cost

__all__ = ["Surgery", "compress", "compress_file", "cost"]


@dataclass(frozen=True)
class Surgery:
    """The smaller model, and the report as it stands in `surgery.json`."""

    model: onnx.ModelProto
    report: dict[str, Any]


def compress(model: onnx.ModelProto, *, verify: bool = True) -> Surgery:
    """Removes what is dead from `model`, which is left as it is, and proves that the function is the same.

    Raises:
        ContentError: the model is invalid, or the proof failed.
        MachineError: ONNX Runtime is not installed and `verify` is set.
    """
    from polar_deploy.surgery.model import check_model

    check_model(model)
    return _compress(model, verify=verify)


def compress_file(source: Path, target: Path, *, report: Path | None = None, verify: bool = True) -> Surgery:
    """Reads `source`, writes the smaller model to `target` and, if asked, the report; both whole or not at all.

    Raises:
        UsageError: `source` is missing, or a place cannot be written.
        ContentError: the model is invalid, or the proof failed.
        MachineError: ONNX Runtime is not installed and `verify` is set; no space.
    """
    from polar_deploy.surgery.model import read_model
    from polar_deploy.workspace import atomic_path, write_json

    surgery = _compress(read_model(source), verify=verify)
    with atomic_path(target) as tmp:
        tmp.write_bytes(surgery.model.SerializeToString(deterministic=True))
    if report is not None:
        write_json(report, surgery.report)
    return surgery


def cost(model: onnx.ModelProto) -> Cost:
    """MACs and parameters of a model: Conv, Gemm and MatMul at batch 1 and the model's input size, see `Cost`."""
    from polar_deploy.surgery.count import count

    return count(model)


def _compress(model: onnx.ModelProto, *, verify: bool) -> Surgery:
    """`compress` of a model that was checked."""
    from polar_deploy.surgery import report
    from polar_deploy.surgery import verify as proof
    from polar_deploy.surgery.model import check_model
    from polar_deploy.surgery.rounds import operate

    before = cost(model)
    rounds = operate(model)
    smaller = rounds[-1].model
    check_model(smaller, "the cut graph")
    after = cost(smaller)
    proven = proof.verify(model, smaller) if verify else None
    return Surgery(smaller, report.build(rounds, (before, after), proven))
