"""What people get wrong, and what machines do to them: the right exit code, one clear message, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from tests.conftest import MINIATURE, Miniature, Outcome, child_environment, contents, polar
from tests.support.tiny import Tiny

TINY = ("--model", "tests.support.tiny:net", "--data", "digits", "--epochs", "1", "--set", "training.threads=1")
NOBODY = 65534


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """The command ended with `code`, one error that says all the `words`, and no traceback."""
    assert "Traceback" not in outcome.err
    assert outcome.code == code, outcome.err
    assert len(re.findall(r"^error: \S", outcome.err, re.MULTILINE)) == 1, outcome.err
    assert len(re.findall(r"^  what to do: \S", outcome.err, re.MULTILINE)) == 1, outcome.err
    assert [word for word in words if word not in outcome.err] == [], outcome.err
    assert outcome.out == ""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder: a refused command leaves it empty, so the default --out was not made."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert os.listdir(folder) == []


# --------------------------------------------------------------------------- the command line

WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "no model": ([], 2, ["no model", "--model resnet56"]),
    "unknown model": (["--model", "resnet65"], 2, ["'resnet65'", "resnet56"]),
    "unknown data": (["--model", "resnet20", "--data", "cifar11"], 2, ["'cifar11'", "cifar10"]),
    "unknown target": (["--model", "resnet20", "--target", "trt-pf16"], 2, ["'trt-pf16'", "did you mean trt-fp16?"]),
    "target of later": (["--model", "resnet20", "--target", "trt-fp8"], 2, ["trt-fp8", "use trt-fp16"]),
    "budget 0": ([*TINY, "--budget", "0"], 2, ["--budget 0", "greater than 0"]),
    "budget 1.5": ([*TINY, "--budget", "1.5"], 2, ["--budget 1.5", "less than 1"]),
    "budget nan": ([*TINY, "--budget", "nan"], 2, ["--budget nan", "finite"]),
    "budget is a word": ([*TINY, "--budget", "half"], 2, ["--budget half", "number"]),
    "budget of what": ([*TINY, "--budget", "flops=0.5"], 2, ["'flops'", "macs, params, latency"]),
    "budget too low": ([*TINY, "--budget", "0.01"], 2, ["macs=0.01 cannot be reached", "ask for at least macs=0.0"]),
    "budget latency, no such table": (
        [*TINY, "--budget", "latency=0.5", "--latency-table", "nowhere.json"],
        2,
        ["cannot read nowhere.json"],
    ),
    "seed -1": ([*TINY, "--seed", "-1"], 2, ["--seed", "-1", "greater than or equal to 0"]),
    "epochs 0": ([*TINY, "--epochs", "0"], 2, ["--epochs", "greater than or equal to 1"]),
    "epochs a word": ([*TINY, "--epochs", "ten"], 2, ["--epochs", "'ten'", "integer"]),
    "align 0": ([*TINY, "--align", "0"], 2, ["--align", "greater than or equal to 1"]),
    "from behind until": ([*TINY, "--from", "build", "--until", "gates"], 2, ["--from build", "--until gates"]),
    "unknown setting": ([*TINY, "--set", "training.lrr=1"], 2, ["'training.lrr'", "did you mean 'training.lr'?"]),
    "setting without value": ([*TINY, "--set", "training.lr"], 2, ["--set training.lr", "KEY=VALUE"]),
    "no weights file": ([*TINY, "--full-weights", "none.npz"], 2, ["none.npz", "do not exist"]),
    "weights of no kind": ([*TINY, "--full-weights", "weights.h5"], 2, ["weights.h5", ".safetensors"]),
    "no recipe file": (["--recipe", "none.yaml"], 2, ["none.yaml", "No such file"]),
    "no data folder": (["--model", "resnet20", "--data-dir", "nowhere"], 2, ["nowhere", "does not exist"]),
    "no module": (["--model", "no_such:net", "--data", "digits"], 2, ["no module no_such"]),
    "no function": (
        ["--model", "tests.support.tiny:nett", "--data", "digits"],
        2,
        ["tests.support.tiny has no function nett"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_command_line(case: str) -> None:
    arguments, code, words = WRONG[case]
    refused(polar(*arguments), code, *words)


RECIPES: dict[str, tuple[bytes, list[str]]] = {
    "unknown key": (b"model: resnet20\ndata: digits\n\ntrainign:\n  lr: 0.1\n", ["r.yaml:4", "'trainign'", "training"]),
    "unknown key in a group": (b"model: resnet20\ntraining:\n  epochs: 3\n  ler: 1\n", ["r.yaml:4", "'training.lr'"]),
    "value of another type": (b"model: resnet20\nseed: [1]\n", ["r.yaml:2", "seed"]),
    "budget out of range": (b"model: resnet20\nbudget:\n  macs: 1.5\n", ["r.yaml:3", "budget.macs", "less than 1"]),
    "not YAML": (b"model: resnet20\ndata: [digits\n", ["r.yaml:3", "not valid YAML"]),
    "a list": (b"- resnet20\n- digits\n", ["r.yaml:1", "list"]),
    "not text": (bytes(range(256)), ["r.yaml", "not valid YAML"]),
    "code": (b"model: !!python/object/apply:os.system ['true']\n", ["r.yaml:1", "not valid YAML"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_wrong_recipe(case: str, tmp_path: Path) -> None:
    content, words = RECIPES[case]
    (tmp_path / "r.yaml").write_bytes(content)
    refused(polar("--recipe", tmp_path / "r.yaml"), 2, *words)


# --------------------------------------------------------------------------- data


def write_data(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """`folder` with train.npz and test.npz."""
    folder.mkdir()
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", images=images, labels=labels)
    return folder


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IMAGES, LABELS = np.zeros((20, 32, 32, 3), np.uint8), np.arange(20) % 10


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (IMAGES, LABELS + 1, ["labels[9] is 10", "outside 0 to 9"]),
        (IMAGES, LABELS - 1, ["labels[0] is -1", "outside 0 to 9"]),
        (IMAGES, LABELS[:-1], ["labels has the shape [19]", "20 images"]),
        (IMAGES.astype(np.float32), LABELS, ["images is float32", "uint8"]),
        (IMAGES, LABELS * 0, ["class 1 has 0 training images"]),
    ],
    ids=["label 10", "label -1", "too few labels", "images of floats", "classes without images"],
)
def test_wrong_arrays(images: np.ndarray, labels: np.ndarray, words: list[str], tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", images, labels)
    outcome = polar("--model", "resnet20", "--data", "cifar10", "--data-dir", folder)
    refused(outcome, 4, str(folder / "train.npz"), *words)


def test_half_written_data(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data", IMAGES, LABELS)
    cut_in_half(folder / "test.npz")
    outcome = polar("--model", "resnet20", "--data", "cifar10", "--data-dir", folder)
    refused(outcome, 4, str(folder / "test.npz"), "cannot be read as .npz")


# --------------------------------------------------------------------------- weights


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.evidence),)


def test_weights_that_run_code(tmp_path: Path) -> None:
    weights, evidence = tmp_path / "weights.pth", tmp_path / "evidence"
    malice = {**Tiny(10).state_dict(), "extra": Malice(evidence)}
    torch.save(malice, weights)
    refused(polar(*TINY, "--full-weights", weights), 4, str(weights), "could run code")
    weights.write_bytes(pickle.dumps(malice, protocol=2))
    refused(polar(*TINY, "--full-weights", weights), 4, str(weights))
    assert not evidence.exists()


def test_weights_of_another_network(miniature: Miniature, tmp_path: Path) -> None:
    weights = miniature.folder / "full/weights.safetensors"
    command = ("--model", "resnet20", "--data", "digits", "--full-weights", weights)
    refused(polar(*command), 4, str(weights), "CifarResNet", "missing: conv1.weight")
    torch.save(Tiny(100).state_dict(), tmp_path / "weights.pth")
    shapes = "linear.weight [100, 24] in the file, [10, 24] in the network"
    refused(polar(*TINY, "--full-weights", tmp_path / "weights.pth"), 4, shapes)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(bad: float, miniature: Miniature, tmp_path: Path) -> None:
    state = load_file(miniature.folder / "full/weights.safetensors")
    state["linear.bias"][3] = bad
    save_file(state, tmp_path / "weights.safetensors")
    outcome = polar(*TINY, "--full-weights", tmp_path / "weights.safetensors")
    refused(outcome, 4, "weights.safetensors", "NaN or Inf: linear.bias")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_weights_cut_short(suffix: str, miniature: Miniature, tmp_path: Path) -> None:
    weights = tmp_path / f"weights{suffix}"
    state = load_file(miniature.folder / "full/weights.safetensors")
    if suffix == ".npz":
        np.savez(weights, **state)
    elif suffix == ".pth":
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, weights)
    else:
        save_file(state, weights)
    cut_in_half(weights)
    refused(polar(*TINY, "--full-weights", weights), 4, str(weights))


# --------------------------------------------------------------------------- the user's own network


class Own(nn.Module):
    """A network that works, to be spoilt."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv2(self.relu(self.conv1(x))).mean((2, 3)))


class FailsInForward(Own):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("my own mistake")


class FailsInTraining(Own):
    """Sound as far as anything can see before the first step."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.linear.weight.register_hook(self._fail)

    def _fail(self, gradient: Tensor) -> Tensor:
        raise ArithmeticError("my own mistake")


class Branches(Own):
    """What it does depends on its input: nothing that could be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def fails(classes: int) -> nn.Module:
    raise ArithmeticError("my own mistake")


def number(classes: int) -> int:
    return classes


def without_a_place_for_gates(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, classes))


OWN = {
    "fails": (4, ["ArithmeticError: my own mistake", "test_pipeline_bad_input.py, line "]),
    "number": (4, ["returned a int"]),
    "FailsInForward": (4, ["ArithmeticError: my own mistake"]),
    "FailsInTraining": (4, ["ArithmeticError", "my own mistake"]),
    "Branches": (4, ["PyTorch cannot export Branches", "control flow"]),
    "without_a_place_for_gates": (2, ["gate"]),
}


@pytest.mark.parametrize("function", OWN)
def test_own_network(function: str, tmp_path: Path) -> None:
    code, words = OWN[function]
    command = ("--model", f"{__name__}:{function}", "--data", "digits", "--epochs", "1", "--out", tmp_path / "run")
    refused(polar(*command, "--budget", "0.5", "--until", "gates"), code, *words)


def test_training_that_diverges(tmp_path: Path) -> None:
    outcome = polar(*TINY, "--set", "training.lr=1e30", "--out", tmp_path / "run", "--until", "full")
    refused(outcome, 4, "loss is", "epoch 1 of 1 of stage full", "lower training.lr")


# --------------------------------------------------------------------------- files between the stages


def test_a_folder_has_its_settings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: resnet20\n")
    outcome = polar("--from", "parity", "--out", tmp_path)
    refused(outcome, 2, "no model: ", f"give --recipe {tmp_path / 'run.yaml'}, the settings of that folder")


def test_a_stage_without_its_predecessors_files(tmp_path: Path) -> None:
    for stage in ("surgery", "build", "parity"):
        outcome = polar(*TINY, "--out", tmp_path / "run", "--from", stage)
        refused(outcome, 2, f"stage {stage} needs {tmp_path / 'run'}", "not there")
        assert not (tmp_path / "run").exists()


def damaged(miniature: Miniature, tmp_path: Path, name: str, change: Callable[[Path], object], stage: str) -> Outcome:
    """Run one stage on a copy of the miniature run whose file `name` was changed; nothing else must change."""
    folder = miniature.copy(tmp_path / "run")
    change(folder / name)
    before = contents(folder)
    outcome = polar(*MINIATURE, "--out", folder, "--from", stage, "--until", stage)
    after = contents(folder)
    assert not list(folder.rglob("*.tmp*"))
    assert set(after) == set(before) - {f"stamps/{stage}.json"}
    assert [file for file in after if after[file] != before[file]] == []
    return outcome


DAMAGED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "gated graph cut short": ("gated/model.onnx", cut_in_half, "surgery"),
    "gated graph empty": ("gated/model.onnx", lambda path: path.write_bytes(b""), "surgery"),
    "gated weights cut short": ("gated/weights.safetensors", cut_in_half, "export"),
    "gates cut short": ("gated/gates.json", cut_in_half, "export"),
    "compressed graph cut short": ("compressed/model.onnx", cut_in_half, "build"),
    "engine cut short": ("engines/full.onnx", cut_in_half, "parity"),
    "reference cut short": ("gated/reference.npz", cut_in_half, "parity"),
    "parity cut short": ("parity.json", cut_in_half, "report"),
    "samples cut short": ("worst-samples.npz", cut_in_half, "report"),
    "parity of nothing": ("parity.json", lambda path: path.write_text("{}"), "report"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_between_two_stages(case: str, miniature: Miniature, tmp_path: Path) -> None:
    name, change, stage = DAMAGED[case]
    refused(damaged(miniature, tmp_path, name, change, stage), 4, name)


def site(**changed: object) -> Callable[[Path], None]:
    """Change the first site of a gates.json, which is a stream of width 12; None takes a key away."""

    def change(path: Path) -> None:
        gates = json.loads(path.read_text())
        first = gates["sites"][0] | changed
        gates["sites"][0] = {key: value for key, value in first.items() if value is not None}
        path.write_text(json.dumps(gates))

    return change


GATES: dict[str, Callable[[Path], object]] = {
    "a gate that is not there": site(open=[0, 12]),
    "a gate before the first": site(open=[-1]),
    "a gate that is no number": site(open=["0"]),
    "no gates": site(open=None),
    "all gates closed": site(open=[]),
    "a site of another kind": site(kind="channel"),
    "a site of another name": site(name="elsewhere"),
    "a site of another width": site(width=8),
    "a list": lambda path: path.write_text("[]"),
    "no sites": lambda path: path.write_text('{"schema": 1}'),
}


@pytest.mark.parametrize("case", GATES)
def test_gates_that_do_not_fit_the_network(case: str, miniature: Miniature, tmp_path: Path) -> None:
    refused(damaged(miniature, tmp_path, "gated/gates.json", GATES[case], "export"), 4, "gates.json")


def test_a_graph_that_is_no_classifier(miniature: Miniature, tmp_path: Path) -> None:
    def without_output(path: Path) -> None:
        model = onnx.load(path)
        del model.graph.output[:]
        onnx.save(model, path)

    refused(damaged(miniature, tmp_path, "gated/model.onnx", without_output, "surgery"), 4, "gated/model.onnx")


# --------------------------------------------------------------------------- places that cannot be written


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(polar(*TINY, "--out", out), 2, str(tmp_path / "file"), "not a folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_another_run_in_the_folder(miniature: Miniature, tmp_path: Path) -> None:
    folder = miniature.copy(tmp_path / "run")
    code = "import sys; from polar_deploy.workspace import Workspace\n"
    code += "with Workspace(sys.argv[1]).locked(): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=child_environment(), stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "locked\n"
        before = contents(folder)
        with pytest.MonkeyPatch.context() as patch:  # asked first: neither settings nor networks are looked at
            patch.setattr("polar_deploy.stages.resolve.resolve", None)
            outcome = polar(*MINIATURE, "--out", folder)
        refused(outcome, 2, f"run in {folder}\n", f"another run (process {other.pid}) works in {folder}")
        assert contents(folder) == before
        other.communicate()
    assert polar(*MINIATURE, "--out", folder, "--until", "full").code == 0


def as_nobody(*arguments: object) -> Outcome:
    """Call the command in a fork that has given up root's right to write anywhere."""
    if os.getuid() != 0:
        return polar(*arguments)
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            outcome = polar(*arguments)
            os.write(writing, json.dumps([outcome.code, outcome.out, outcome.err]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    os.wait()
    return Outcome(*json.loads(said))


def test_a_read_only_place(miniature: Miniature) -> None:
    place = Path(tempfile.mkdtemp(prefix="polar_deploy-test-"))  # pytest's own folders are closed to others
    try:
        folder = miniature.copy(place / "run", "surgery")
        (folder / ".lock").unlink()
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = contents(place)
        stage = ("--from", "surgery", "--until", "surgery")
        refused(as_nobody(*MINIATURE, "--out", folder, *stage), 2, f"cannot write {folder}", "Permission denied")
        refused(as_nobody(*MINIATURE, "--out", place / "new"), 2, f"cannot write {place / 'new'}")
        assert contents(place) == before
        assert sorted(os.listdir(place)) == ["run"]
    finally:
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(place)


# A disk of its own, with the miniature run on it and hardly any room left: the run's surgery has to be done again, and
# a new run begins to train. What both do to the first run's files is listed.
FULL_DISK = """
disk=$1 miniature=$2; shift 2
mount -t tmpfs -o size=2m tmpfs "$disk" && cp -r "$miniature" "$disk/run" && cd "$disk" || exit 1
rm -r run/compressed run/stamps/surgery.json
head -c 4000000 /dev/zero > filling 2> /dev/null
truncate -s -24000 filling
before=$(find run -type f ! -name .lock -exec sha256sum {} + | sort)
"$@" --out run --until surgery --from surgery; echo "code $?"
"$@" --out new --until full; echo "code $?"
after=$(find run -type f ! -name .lock -exec sha256sum {} + | sort)
test "$before" = "$after" && echo untouched
find new -type f
"""


def test_a_full_disk(miniature: Miniature, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    if shutil.which("unshare") is None or subprocess.run([*unshare, f"mount -t tmpfs tmpfs {disk}"]).returncode:
        pytest.skip("a small disk cannot be mounted here: user namespaces are not allowed")
    command = [*unshare, FULL_DISK, "sh", str(disk), str(miniature.folder), sys.executable]
    command += ["-m", "polar_deploy.pipeline", *MINIATURE]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    codes, said = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    assert codes == ["code 3", "code 3"], done.stderr
    errors = re.findall(r"^error: no space left to write (\S+):", done.stderr, re.MULTILINE)
    assert errors == ["run/compressed/model.onnx", "new/full/checkpoint.safetensors"]
    assert "untouched" in said
    assert [name for name in said if ".tmp" in name or name.endswith(".safetensors")] == []
