"""What the tests of the whole command share: how it is called, and one miniature run that most of them look at."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from polar_deploy.pipeline import main
from polar_deploy.stages import NAMES, STAGES

ROOT = Path(__file__).parents[1]
# Three epochs are few, and the networks so small that neither is faster: what is asked leaves room for a bundle.
_LENIENT = ("--budget", "0.5", "--max-drop", "20", "--min-speedup", "0.5")
MINIATURE = ("--model", "tests.tiny:net", "--data", "digits", "--epochs", "3", "--set", "training.threads=1", *_LENIENT)


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote to its standard streams."""

    code: int
    out: str
    err: str

    @property
    def ran(self) -> list[str]:
        """The stages that it ran, in order."""
        return [line for line in self.err.splitlines() if line in NAMES]

    @property
    def up_to_date(self) -> list[str]:
        """The stages that it left as they were, in order."""
        return [name for name in NAMES if f"{name}: up to date\n" in self.err]


@dataclass(frozen=True)
class Miniature:
    """A whole run of a tiny network: its folder, which nobody may change, and how the command ended."""

    folder: Path
    outcome: Outcome

    def copy(self, target: Path, *without: str) -> Path:
        """Copy the folder to `target`, less what the stages `without` wrote."""
        shutil.copytree(self.folder, target)
        for name in without:
            (target / "stamps" / f"{name}.json").unlink()
            for written in STAGES[NAMES.index(name)].writes:
                path = target / written
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return target


def polar(*arguments: object) -> Outcome:
    """Call the pipeline in this process."""
    with _one_analysis():
        return called(main, *arguments)


_analyses: dict[object, Any] = {}


@contextlib.contextmanager
def _one_analysis() -> Iterator[None]:
    """What can go from a network is found once for all runs that begin with it: it takes two seconds each time."""
    import torch

    from polar_deploy.gating import analysis

    whole = analysis.analyse

    @torch.no_grad()
    def analyse(network: Any, example: Any, **how: Any) -> Any:
        values = tuple(float(parameter.sum()) for parameter in network.parameters())
        key = type(network), repr(network), values, example.tensors[0].shape, repr(how)
        if key not in _analyses:
            with torch.enable_grad():
                _analyses[key] = whole(network, example, **how)
        return _analyses[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "analyse", analyse)
        yield


def called(command: Callable[[Sequence[str]], int], *arguments: object) -> Outcome:
    """Call a command's `main` in this process; what libraries write past `sys.stdout` is caught too."""
    with _caught(1) as out, _caught(2) as err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command([str(argument) for argument in arguments])
        return Outcome(code, _text(out), _text(err))


@contextlib.contextmanager
def _caught(descriptor: int) -> Iterator[io.TextIOWrapper]:
    """Lead a file descriptor into a file, which is given."""
    saved = os.dup(descriptor)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)


def _text(file: io.TextIOWrapper) -> str:
    file.flush()
    file.seek(0)
    return file.read()


def contents(folder: Path) -> dict[str, str]:
    """Hash every file in a folder by its name in it, the lock aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def child_environment() -> dict[str, str]:
    """The environment of a child that runs the command somewhere else."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


OLD_RUNTIME = tuple(map(int, version("onnxruntime").split(".")[:2])) < (1, 24)  # the last one for Python 3.10
_CANNOT = re.compile("NOT_IMPLEMENTED|ONNX Runtime cannot run the graph|ONNXRuntimeError")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole runs come first: a worker that gets one at the end would keep the other one waiting."""
    items.sort(key=lambda item: item.path.parent != ROOT / "tests")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[object]:
    """Skip what the old ONNX Runtime has no kernel for: there is nothing to compare with. Newer ones have them all."""
    try:
        return (yield)
    except Exception as error:
        if OLD_RUNTIME and (said := _CANNOT.search(str(error))):
            pytest.skip(f"ONNX Runtime {version('onnxruntime')} cannot run this graph: {said[0]}")
        raise


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miniature]:
    """The one run that serves all tests: 440 k MACs, three epochs, every stage. Copy it to change it."""
    folder = tmp_path_factory.mktemp("miniature") / "run"
    outcome = polar(*MINIATURE, "--out", folder, "--json")
    before = contents(folder)
    yield Miniature(folder, outcome)
    assert contents(folder) == before, "a test changed the miniature run that all tests share"


@pytest.fixture(scope="session", autouse=True)
def _exporter_reads_itself_once() -> Iterator[None]:
    """PyTorch's exporter parses the sources of its 497 operators for each network anew: half of a small one's time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield
