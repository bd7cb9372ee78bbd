"""One operation on one model or file: cut it, prove it; or hand it back as it is, and say why."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.onnx_files import data_path
from polar_deploy.surgery import detached, report, rounds
from polar_deploy.surgery.count import count
from polar_deploy.surgery.defaults import with_defaults, without_defaults
from polar_deploy.surgery.inline import inlined
from polar_deploy.surgery.observed import with_observed
from polar_deploy.surgery.runtime import onnx_runtime
from polar_deploy.surgery.validation import NotUnderstoodError
from polar_deploy.surgery.verify import NotVerifiedError, UndecidedError, inputs_taken, verify
from polar_deploy.workspace import atomic_path, json_text

if TYPE_CHECKING:
    import onnx

    from polar_deploy.surgery.count import Cost
    from polar_deploy.surgery.detached import DetachedModel
    from polar_deploy.surgery.verify import Proof

MOST_ATTEMPTS = 200  # at inputs for a model that surgery cannot follow


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
    source: Path | str,
    target: Path | str,
    *,
    report: Path | str | None = None,
    verify: bool = True,
    allow_unverified: bool = False,
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
    source, target, report = Path(source), Path(target), Path(report) if report is not None else None
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
    if report is not None and report.resolve() in (source.resolve(), target.resolve()):
        raise UsageError(f"the report would replace the model {report}", "give the report a place of its own")


def cost(model: onnx.ModelProto) -> Cost:
    """MACs and parameters of a model, at batch 1 and its own input size; what counts, `Cost` says."""
    return count(model)


@contextmanager
def _no_search_for_garbage() -> Iterator[None]:
    """Holds back Python's search for unreachable cycles: nodes and tensors are in use to the end, all of them, and
    looking through them each time that there are more takes a quarter of the time on long graphs."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class Operation:
    """What is given, and what is asked for.

    before: the model as it was read, not checked yet.
    name: what errors call it.
    source: gives the path of a file that holds it.
    write: writes the cut model to where it belongs, and gives the path of a file that holds it.
    """

    before: DetachedModel
    name: str
    source: Callable[[], Path]
    write: Callable[[DetachedModel], Path]
    verify: bool
    allow_unverified: bool

    def run(self) -> tuple[DetachedModel | None, dict[str, Any]]:
        """The cut model, or None where the model stays as it is; and the report.

        Raises:
            ContentError: the model is invalid, the proof failed, or (unless allowed) no runtime takes the model. What a
                runtime takes, and what it does not tell about, stays as it is.
            MachineError: ONNX Runtime is not installed, and `verify` is set.
        """
        with _no_search_for_garbage():
            try:
                self.before.skeleton.check(self.name)
            except NotUnderstoodError as refusal:
                return self._as_it_is(refusal)
            try:
                return self._cut()
            except NotUnderstoodError as refusal:
                return self._without_strictness(refusal)
            except UndecidedError as doubt:
                return None, report.as_it_is(self.before.model, doubt.what, unproven=True)

    def _cut(self) -> tuple[DetachedModel, dict[str, Any]]:
        given = without_defaults(self.before)
        seen = with_observed(inlined(given))
        done = rounds.operate(seen)
        after = self.before if done[-1].model is seen else with_defaults(done[-1].model, self.before)
        path = self.write(after)
        proof = self._prove(given, after, path) if self.verify else None
        told = report.build(done, given, proof)
        for each in done:
            each.release()
        return after, told

    def _prove(self, given: DetachedModel, after: DetachedModel, path: Path) -> Proof | str:
        """The proof, or why there is none, which is an error unless that is allowed or nothing was changed.

        given: the model before, to whose inputs numbers are given, optional ones included.
        """
        try:
            return verify(given.model, self.source(), path)
        except NotVerifiedError as error:
            if not self.allow_unverified and after is not self.before:
                raise
            return error.what

    def _without_strictness(self, refusal: NotUnderstoodError) -> tuple[DetachedModel | None, dict[str, Any]]:
        """Where onnx finds the shapes wrong and ONNX Runtime takes the model: a cut with what is known of them."""
        try:
            onnx_runtime(self.source())
        except (ContentError, MachineError):
            raise refusal from None
        try:
            return replace(self, before=replace(self.before, strict=False))._cut()
        except ContentError:
            return self._as_it_is(refusal)

    def _as_it_is(self, refusal: NotUnderstoodError) -> tuple[None, dict[str, Any]]:
        """The report on a model that stays as it is. Raises `refusal` where ONNX Runtime does not run it."""
        try:
            inputs_taken(self.before.model, onnx_runtime(self.source()), MOST_ATTEMPTS)
        except (ContentError, MachineError):
            raise refusal from None
        return None, report.as_it_is(self.before.model, refusal.what)
