"""One operation on one model: cut it, prove it; or hand it back as it is, and say why."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.errors import ContentError, MachineError
from polar_deploy.surgery import report, rounds
from polar_deploy.surgery.inline import inlined
from polar_deploy.surgery.observed import with_observed
from polar_deploy.surgery.runtime import onnx_runtime
from polar_deploy.surgery.validation import NotUnderstoodError
from polar_deploy.surgery.verify import NotVerifiedError, UndecidedError, inputs_taken, verify

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import DetachedModel
    from polar_deploy.surgery.verify import Proof

MOST_ATTEMPTS = 200  # at inputs for a model that surgery cannot follow


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
        seen = with_observed(inlined(self.before))
        done = rounds.operate(seen)
        after = self.before if done[-1].model is seen else done[-1].model
        path = self.write(after)
        proof = self._prove(after, path) if self.verify else None
        told = report.build(done, self.before, proof)
        for each in done:
            each.release()
        return after, told

    def _prove(self, after: DetachedModel, path: Path) -> Proof | str:
        """The proof, or why there is none, which is an error unless that is allowed or nothing was changed."""
        try:
            return verify(self.before.model, self.source(), path)
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
