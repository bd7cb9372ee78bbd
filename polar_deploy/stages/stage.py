"""A stage: what it reads and writes, when it has to run again, and the function that does it.

Its fingerprint is what it follows from besides the files that it reads: one hash, for stamps, for checkpoints and for
latency tables. The rule for a new version of polar_deploy on the folder of an old one:

- What takes minutes (export, surgery, build, parity, bundle, report) is made again, by the new version: where surgery
  was mended, nobody goes on with what the old one cut.
- What takes hours (full, gates) stays, and a half-trained network goes on from its checkpoint: weights are judged by
  parity, whoever trained them. It is trained again only where `TRAINING` was raised: what releases before trained is
  wrong, not merely less good. The changelog says so, and the stage says that it begins again.
- A latency table is measured again, unless a half-trained network was chosen by it: its budget shall not move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy import __version__
from polar_deploy.errors import UsageError
from polar_deploy.workspace import Fingerprint, digest

if TYPE_CHECKING:
    from polar_deploy.stages.artefacts import Artefact
    from polar_deploy.stages.context import RunContext

TORCH = (("torch", "train"), ("torchvision", "train"), ("safetensors", "train"))
ONNXRUNTIME = (("onnxruntime", "ort"),)
TRAINING = 1  # raised when weights, gates or checkpoints of releases before must not be used any more


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        run: does it.
        fingerprint: of settings, data, machine and program that concern it; when it changes, the stage runs again.
        reads, writes: files of the run's folder.
        given: files of the user's that it reads.
        looks_at: more files that it reads, where they are.
        trained: those of them that took hours: before they are made otherwise, what is there is kept.
        scratch: files that are removed when it is finished.
        packages: what it imports: (module, the extra of this package that brings it).
        builds_network: whether it needs the user's network as a module.
        reads_data: whether it needs the data set.
        cacheable: whether what it wrote may be kept the next time; else it runs again.
    """

    name: str
    run: Callable[[RunContext], None]
    fingerprint: Callable[[RunContext], Fingerprint]
    reads: tuple[Artefact, ...]
    writes: tuple[Artefact, ...]
    given: Callable[[RunContext], list[Path]] = lambda run: []
    looks_at: tuple[Artefact, ...] = ()
    trained: tuple[Artefact, ...] = ()
    scratch: tuple[Artefact, ...] = ()
    packages: tuple[tuple[str, str], ...] = ()
    builds_network: bool = False
    reads_data: bool = False
    cacheable: Callable[[RunContext], bool] = lambda run: True

    def inputs(self, run: RunContext) -> list[Path]:
        """The files it reads, the user's own among them, and the weights of large graphs beside these.

        Raises:
            UsageError: one is missing.
        """
        own = [run.path(artefact) for artefact in self.reads if artefact.expected(run)]
        for path in own:
            if not path.is_file():
                raise UsageError(f"stage {self.name} needs {path}, which is not there", "run the stage that writes it")
        there = [path for path in map(run.path, self.looks_at) if path.is_file()]
        return _with_data(own) + there + self.given(run)

    def outputs(self, run: RunContext) -> list[Path]:
        """The files it writes, with the weights of large graphs beside these; of a folder those that are there."""
        files = [run.path(each) for each in self.writes if each.expected(run) and not each.is_folder]
        folders = [run.path(each) for each in self.writes if each.is_folder]
        return _with_data(files) + sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def _with_data(paths: list[Path]) -> list[Path]:
    from polar_deploy import onnx_files  # not above: with numpy, and help shall answer at once

    return onnx_files.with_data(paths)


def fingerprint(depends_on: object, *, trained: bool = False) -> Fingerprint:
    """The fingerprint of a result.

    Args:
        depends_on: settings, data and machine that it depends on, as plain JSON.
        trained: whether it is trained, and so outlives a new version.
    """
    program = f"training {TRAINING}" if trained else f"polar_deploy {__version__}"
    return Fingerprint(digest(depends_on), program)
