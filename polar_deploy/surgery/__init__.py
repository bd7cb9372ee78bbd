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
    from polar_deploy.surgery.detached import DetachedModel

__all__ = ["Surgery", "compress", "compress_file", "cost"]


@dataclass(frozen=True)
class Surgery:
    """The smaller model, and the report as it stands in `surgery.json`."""

    model: onnx.ModelProto
    report: dict[str, Any]


def compress(model: onnx.ModelProto, *, verify: bool = True, allow_unverified: bool = False) -> Surgery:
    """Removes what is dead from `model`, which is left as it is, and proves that the function is the same.

    A model that ONNX Runtime runs and surgery cannot follow comes back as it is; the report says why.

    Args:
        verify: compare both graphs in ONNX Runtime.
        allow_unverified: return the cut model even where that cannot be done; the report says why.

    Raises:
        ContentError: the model is invalid, the proof failed, or (unless `allow_unverified`) it cannot be made.
        MachineError: ONNX Runtime is not installed and `verify` is set.
    """
    from tempfile import TemporaryDirectory

    from polar_deploy.surgery import detached
    from polar_deploy.surgery.operation import Operation

    with TemporaryDirectory() as folder:

        def source() -> Path:
            path = Path(folder, "before.onnx")
            if not path.exists():
                detached.write_files(before, path)
            return path

        def write(after: DetachedModel) -> Path:
            path = Path(folder, "after.onnx")
            if verify:
                detached.write_files(after, path)
            return path

        before = detached.detach_weights(model, check=False)
        after, told = Operation(before, "the model", source, write, verify, allow_unverified).run()
    return Surgery(model if after is None else detached.to_model(after), told)


def compress_file(
    source: Path, target: Path, *, report: Path | None = None, verify: bool = True, allow_unverified: bool = False
) -> dict[str, Any]:
    """Reads `source`, writes the smaller model to `target` and, if asked, the report; all whole or not at all.

    Where the weights of `source` lie in files of their own, those of `target` go to `TARGET.data` beside it. Arguments
    are as of `compress`.

    Returns:
        The report.

    Raises:
        UsageError: `source` is missing, or a place cannot be written.
        ContentError: the model is invalid, the proof failed, or (unless `allow_unverified`) it cannot be made.
        MachineError: ONNX Runtime is not installed and `verify` is set; no space.
    """
    from contextlib import ExitStack

    from polar_deploy.onnx_files import data_path
    from polar_deploy.surgery import detached
    from polar_deploy.surgery.operation import Operation
    from polar_deploy.workspace import atomic_path, json_text

    _check_places(source, target, report)
    before = detached.read(source, check=False)
    with ExitStack() as files:  # they are moved into place at the end, the last one entered first
        tmp = files.enter_context(atomic_path(target))
        places: list[Path] = []  # of the data, in the meantime

        def write(after: DetachedModel) -> Path:
            if after.needs_data_file and not places:
                places.append(files.enter_context(atomic_path(data_path(target))))
            detached.write(after, tmp, places[0] if after.needs_data_file else None)
            return tmp

        after, told = Operation(before, str(source), lambda: source, write, verify, allow_unverified).run()
        if after is None or after is before:
            write(before)
        if before.needs_data_file if after is None else after.needs_data_file:
            detached.refer_to(tmp, data_path(target).name)
        if report is not None:
            files.enter_context(atomic_path(report)).write_text(json_text(told), encoding="utf-8")
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
