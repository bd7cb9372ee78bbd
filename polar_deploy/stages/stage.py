"""A stage: what it reads and writes, when it has to run again, and the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.errors import UsageError

if TYPE_CHECKING:
    from polar_deploy.stages.artefacts import Artefact
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint

TORCH = (("torch", "train"), ("torchvision", "train"), ("safetensors", "train"))
ONNXRUNTIME = (("onnxruntime", "ort"),)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        run: does it.
        fingerprint: of settings, data, machine and program that concern it; when it changes, the stage runs again.
        reads, writes: files of the run's folder.
        given: files of the user's that it reads.
        looks_at: more files that it reads, where they are.
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
