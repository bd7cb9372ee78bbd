"""What the tests of the whole command share: how it is called, and one miniature run that most of them look at."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from polar_deploy.engines import timing
from polar_deploy.pipeline import main
from polar_deploy.stages import NAMES, STAGES

ROOT = Path(__file__).parents[1]
# Three epochs are few, and the networks so small that neither is faster: what is asked leaves room for a bundle. Nor
# is it measured whether bf16 pays: steps of so small a network take nearly as long in it, now more and now less.
_LENIENT = ("--budget", "0.5", "--max-drop", "20", "--min-speedup", "0.5")
MINIATURE = (
    "--model",
    "tests.support.tiny:net",
    "--data",
    "digits",
    "--epochs",
    "3",
    "--set",
    "training.threads=1",
    "--set",
    "training.amp=fp32",
    *_LENIENT,
)


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


def polar(*arguments: object, quick: bool = True) -> Outcome:
    """Call the pipeline in this process."""
    with analysed_once():
        return called(main, *arguments, quick=quick)


_analyses: dict[object, Any] = {}  # by network


@contextlib.contextmanager
def analysed_once() -> Iterator[None]:
    """What all runs of a network begin with is found out once: what can go from it takes a second or two each time."""
    from polar_deploy.gating import analysis

    whole = analysis.analyse

    def analyse(network: Any, example: Any, **how: Any) -> Any:
        shapes = [each.shape for each in (*network.parameters(), *example.tensors)]
        key = type(network), repr(network), repr(shapes), repr(how)
        if key not in _analyses:
            _analyses[key] = whole(network, example, **how)
        return _analyses[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "analyse", analyse)
        yield


_compare = timing.compare


@contextlib.contextmanager
def quick_clock() -> Iterator[None]:
    """Engines are compared for a tenth of a second a round: as a user has it, a run spends half of its time on it.

    The miniature run is timed as a user's is, and `tests/engines/test_timing.py` looks at the clock itself.
    """

    def compare(*engines: Any, singles: int = 0, **how: Any) -> timing.Timing:
        quick = {"pairs": 60, "seconds": (0.0, 0.1), "singles": min(singles, 60)}
        return _compare(*engines, **how | quick)

    with pytest.MonkeyPatch.context() as patch:
        if timing.compare is _compare:  # and no test has put something else there
            patch.setattr(timing, "compare", compare)
            patch.setattr(timing, "_WARM_UP_SECONDS", 0.1)
            patch.setattr(timing, "NOISE", 0.5)  # so short a round is noisy; and a busy machine decides all the same
        yield


def called(command: Callable[[Sequence[str]], int], *arguments: object, quick: bool = True) -> Outcome:
    """Call a command's `main` in this process; what libraries write past `sys.stdout` is caught too.

    quick: what it times it times as `quick_clock` says.
    """
    clock = quick_clock() if quick else contextlib.nullcontext()
    with (
        clock,
        _caught(1) as out,
        _caught(2) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
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


def child_environment(*, traced: bool = True) -> dict[str, str]:
    """The environment of a child that runs the command somewhere else.

    traced: coverage looks at it, and slows it down; of a process that is killed it would tell nothing.
    """
    kept = {name: value for name, value in os.environ.items() if traced or not name.startswith("COVERAGE_")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


OLD_RUNTIME = tuple(map(int, version("onnxruntime").split(".")[:2])) < (1, 24)  # the last one for Python 3.10
_CANNOT = re.compile("NOT_IMPLEMENTED|ONNX Runtime cannot run the graph|ONNXRuntimeError")


# Files that take longest, in this order: a worker that got one at the end would keep the other one waiting. The first
# makes the miniature run, which takes its time; the second does without.
_LONG = (
    "test_pipeline.py",
    "test_examples.py",
    "sweep/test_runs.py",
    "test_dry_run.py",
    "stages/test_distributed.py",
    "training/test_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then others of whole runs."""
    folder = ROOT / "tests"
    places = {folder / name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path.parent != folder))


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
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent  # of all workers: the first that asks makes the run, the others wait for it
    folder, ended = common / "miniature" / "run", common / "miniature.json"
    with FileLock(common / "miniature.lock"):
        if not ended.exists():
            outcome = polar(*MINIATURE, "--out", folder, "--json", quick=False)
            ended.write_text(json.dumps(asdict(outcome)))
    before = contents(folder)
    yield Miniature(folder, Outcome(**json.loads(ended.read_text())))
    assert contents(folder) == before, "a test changed the miniature run that all tests share"


@pytest.fixture(scope="session", autouse=True)
def _digits_are_resized_once() -> Iterator[None]:
    """To each size; half a second, in most tests that load them all that takes time."""
    from polar_deploy.data import digits

    resize = digits.resize
    pictures: dict[int, np.ndarray] = {}  # by size

    def resized(images: np.ndarray, size: int) -> np.ndarray:
        if size not in pictures:
            pictures[size] = resize(images, size)
        return pictures[size].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "resize", resized)
        yield


@pytest.fixture(scope="session", autouse=True)
def _exporter_reads_itself_once() -> Iterator[None]:
    """PyTorch's exporter parses the sources of its 497 operators for each network anew: half of a small one's time."""
    import torch
    from torch.export import decomp_utils, exported_program
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        for module in (decomp_utils, exported_program):  # and looks through PyTorch's 3,000 operators twice
            patch.setattr(module, "_collect_all_valid_cia_ops", _composite_operators)
        # and makes the types of an annotation, `Callable[...]` twice, for each of them and each of its kernels
        patch.setattr(torch._ops, "Callable", _Callable)
        yield


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_looked_for_in_what_is_new(_exporter_reads_itself_once: None) -> None:
    """Not in PyTorch and in what earlier files left, and less often: Python goes through all that lives each time.

    That was an eighth of the time of tests that export networks.
    """
    gc.set_threshold(10_000)
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What is frozen is not looked through at the end, either: nanobind would list all of it as leaked."""
    gc.unfreeze()


class _Quick(type):
    def __getitem__(cls, types: object) -> _Quick:
        return cls

    def __instancecheck__(cls, value: object) -> bool:
        return callable(value)


class _Callable(metaclass=_Quick):
    """`collections.abc.Callable`, whose types nobody reads."""


def _composite_operators() -> set[Any]:
    """What the exporter finds among all operators that are registered by now."""
    import torch
    from torch._export.utils import _collect_all_valid_cia_ops

    registered = len(torch._C._dispatch_get_all_op_names())
    if registered not in _composite:
        _composite[registered] = _collect_all_valid_cia_ops()
    return _composite[registered]


_composite: dict[int, set[Any]] = {}
