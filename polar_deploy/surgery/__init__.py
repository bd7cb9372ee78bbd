"""Exact removal of dead channels and blocks from any ONNX graph in which gates, or zero filters, close channels.

    from polar_deploy.surgery import compress_file
    compress_file(Path("gated.onnx"), Path("compressed.onnx"))

Facts come first (`facts`: constants forward, need backward; `sets`: what can only go together), cuts after (`cut`).
What an operator does to channels stands in one handler a family (`ops`). Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from tempfile import TemporaryDirectory

    from polar_deploy.surgery import report, rounds, stored
    from polar_deploy.surgery.verify import verify as prove

    before = stored.take(model)
    done = rounds.operate(before)
    proof = None
    if verify:
        with TemporaryDirectory() as folder:
            paths = Path(folder, "before.onnx"), Path(folder, "after.onnx")
            for path, one in zip(paths, (before, done[-1].model), strict=True):
                stored.write(one, path, path.with_suffix(".data") if one.needs_data_file else None)
            proof = prove(before.model, *paths)
    return Surgery(stored.to_model(done[-1].model), report.build(done, before.model, proof))


def compress_file(source: Path, target: Path, *, report: Path | None = None, verify: bool = True) -> dict[str, Any]:
    """Reads `source`, writes the smaller model to `target` and, if asked, the report; all whole or not at all.

    Where the weights of `source` lie in files of their own, those of `target` go to `TARGET.data` beside it.

    Returns:
        The report.

    Raises:
        UsageError: `source` is missing, or a place cannot be written.
        ContentError: the model is invalid, or the proof failed.
        MachineError: ONNX Runtime is not installed and `verify` is set; no space.
    """
    from contextlib import ExitStack

    from polar_deploy.surgery import report as reports
    from polar_deploy.surgery import rounds, stored
    from polar_deploy.surgery.verify import verify as prove
    from polar_deploy.workspace import atomic_path, write_json

    _check_places(source, target, report)
    before = stored.read(source)
    done = rounds.operate(before)
    after, proof = done[-1].model, None
    with ExitStack() as files:  # they are moved into place at the end, the last one entered first
        tmp = files.enter_context(atomic_path(target))
        data = target.with_name(f"{target.name}.data") if after.needs_data_file else None
        tmp_data = files.enter_context(atomic_path(data)) if data else None
        stored.write(after, tmp, tmp_data)
        if verify:
            proof = prove(before.model, source, tmp)
        if data:
            stored.refer_to(tmp, data.name)
        told = reports.build(done, before.model, proof)
        if report is not None:
            write_json(files.enter_context(atomic_path(report)), told)
    return told


def _check_places(source: Path, target: Path, report: Path | None) -> None:
    """Raises UsageError where the report would replace a model."""
    from polar_deploy.errors import UsageError

    if report is not None and report.resolve() in (source.resolve(), target.resolve()):
        raise UsageError(f"the report would replace the model {report}", "give the report a place of its own")


def cost(model: onnx.ModelProto) -> Cost:
    """MACs and parameters of a model: Conv, Gemm and MatMul at batch 1 and the model's input size, see `Cost`."""
    from polar_deploy.surgery.count import count

    return count(model)
