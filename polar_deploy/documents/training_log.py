"""training.jsonl: what training was like, one line an epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from polar_deploy.config import Count, CountOrNone, NonNegative, Share
from polar_deploy.documents.part import Open, Part
from polar_deploy.errors import ContentError, first_problem
from polar_deploy.workspace import write_text

if TYPE_CHECKING:
    from typing_extensions import Self


class Curves(Part):
    """What changes from epoch to epoch.

    Attributes:
        epoch: 0: the network as it was given.
        train_score, val_score: in the task's metric; None: it has none, or nothing to validate on was kept.
        costs: cost -> share of the full network's.
        undecided: share of the gates that not all samples agree on; where gates learn, as `shares`.
        shares: gates by the share of samples, or of steps, that opened them: from 0 to 1 in equal parts.
    """

    epoch: CountOrNone
    loss: float | None = None
    train_score: float | None = None
    val_score: float | None = None
    costs: dict[str, NonNegative] | None = None
    undecided: Share | None = None
    shares: list[CountOrNone] | None = None
    seconds: NonNegative | None = None


class Freeze(Part):
    """What fixing the gates changed: scores in validation before, after, and with statistics of norms anew."""

    epoch: CountOrNone
    undecided: Share
    val_before: float | None = None
    val_after: float | None = None
    val_estimated: float | None = None


class LoggedFreeze(Freeze, Open):
    """As it is logged.

    Attributes:
        share: of each gate: share of samples that opened it before it was fixed.
        cut: whether a smaller network was trained from then on.
    """

    share: list[Share] = Field(default_factory=list)
    cut: bool = False


class Epoch(Curves, Open):
    """A line.

    Attributes:
        given: the network was not trained.
        samples: that were trained on.
        work: multiply-accumulates of each, forward and backward, teacher and search included, in forward passes of the
            full network. None where nothing was trained.
        open: gates that are open at each site.
        freeze: where gates were fixed in this epoch.
        cost, budget: of the tightest budget: share of the full network's that the gates leave, and what was asked.
        bf16: whether training computed in it, where it can.
        data_seconds: waiting for data; joules: what the machine counted; None: it counts nothing.
    """

    given: bool | None = None
    samples: Count | None = None
    work: NonNegative | None = None
    open: list[CountOrNone] | None = None
    freeze: LoggedFreeze | None = None
    cost: NonNegative | None = None
    budget: Share | None = None
    bf16: bool | None = None
    data_seconds: NonNegative | None = None
    joules: NonNegative | None = None

    @property
    def curves(self) -> Curves:
        """Without what is no curve."""
        return Curves(**{name: value for name, value in self.entries().items() if name in Curves.model_fields})

    @staticmethod
    def write_all(path: Path, epochs: Sequence[Epoch]) -> None:
        """The whole file anew: a resumed run leaves no line twice."""
        write_text(path, "".join(f"{json.dumps(each.as_json())}\n" for each in epochs))

    @classmethod
    def read_all(cls, path: Path) -> list[Self]:
        """The lines of a file; [] where there is none: that network was not trained here.

        Raises:
            ContentError: a line is not what the type says.
        """
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        try:
            return [cls.model_validate_json(line) for line in lines]
        except ValidationError as error:
            what = f"{path}: {first_problem(error, 'a line')}"
            raise ContentError(what, "let the stage that writes it run again") from error
