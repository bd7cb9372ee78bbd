"""The folder of a run: what a kill, a full disk, a read-only place or a second run do to it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.workspace import (
    Fingerprint,
    Workspace,
    atomic_folder,
    atomic_path,
    digest,
    read_json,
    remove_folder,
    sha256,
    write_json,
)

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a child that runs `code`; `sys.argv[1:]` holds the arguments."""
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def said(child: subprocess.Popen[str]) -> str:
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------- atomic files


def test_the_file_appears_whole_and_its_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "model.onnx"
    with atomic_path(path) as tmp:
        tmp.write_bytes(b"half")
        assert not path.exists()
        assert tmp.parent == path.parent
        assert tmp.suffix == ".onnx"
        assert tmp.name.startswith(".model.")
        tmp.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == ["a/b/model.onnx"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_a_failed_writer_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_path(path) as tmp:
            tmp.write_bytes(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["weights.npz"]


WRITE_HALF = """
import sys, time
from polar_deploy.workspace import atomic_path
with atomic_path(sys.argv[1]) as tmp:
    tmp.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_file_and_the_next_run_clears_its_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "full" / "model.onnx"
    write_json(path, "old")
    keep = tmp_path / "full" / ".my.tmp.notes"  # not one of ours
    keep.touch()
    child = python(WRITE_HALF, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert read_json(path) == "old"
    assert len(names(tmp_path)) == 3

    with Workspace(tmp_path).locked():
        assert names(tmp_path / "full") == [".my.tmp.notes", "model.onnx"]


TRY = """
import sys, numpy, safetensors.numpy
from polar_deploy.errors import PolarDeployError
from polar_deploy.workspace import atomic_path
data = numpy.zeros(2**20, numpy.uint8)
writers = {
    "bytes": lambda tmp: tmp.write_bytes(data.tobytes()),
    "numpy": lambda tmp: numpy.save(tmp.open("wb"), data),
    "safetensors": lambda tmp: safetensors.numpy.save_file({"a": data}, tmp),
}
try:
    with atomic_path(sys.argv[1]) as tmp:
        writers[sys.argv[2]](tmp)
except PolarDeployError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A folder, and the command prefix under which that folder is a disk of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = (
        f'mount -t tmpfs -o size=256k tmpfs {disk} && echo old > {disk}/file && "$@" && ls -A {disk} && cat {disk}/file'
    )
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here: user namespaces are not allowed")
    return disk, prefix


@pytest.mark.parametrize("writer", ["bytes", "numpy", "safetensors"])
def test_a_full_disk_is_named_and_the_old_file_stays(small_disk: tuple[Path, tuple[str, ...]], writer: str) -> None:
    disk, prefix = small_disk
    out = said(python(TRY, disk / "file", writer, prefix=prefix))
    assert out.startswith(f"MachineError no space left to write {disk / 'file'}: ")
    assert "bytes are free" in out
    assert out.endswith("\nfile\nold\n")


def test_a_file_that_may_not_grow_is_a_full_disk_too(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
    restore = "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
    out = said(python(limit + TRY + restore, tmp_path / "file", "bytes"))
    assert out.startswith("MachineError no space left to write")
    assert names(tmp_path) == []


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that its owner may not write to, at a place where everybody may look."""
    folder = Path(tempfile.mkdtemp())
    (folder / "old").write_text("old")
    (folder / "inner").mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


# Root writes anywhere: the child goes on as nobody.
AS_NOBODY = """
import os, sys, filelock
from pathlib import Path
from polar_deploy.errors import PolarDeployError
from polar_deploy.workspace import Workspace, remove_folder, write_json
if os.getuid() == 0:
    os.setuid(65534)
folder = sys.argv[1]
def lock():
    with Workspace(folder).locked():
        pass
def remove():
    remove_folder(Path(folder, "inner"))
for attempt in (lambda: write_json(f"{folder}/old", 1), lambda: Workspace(f"{folder}/new"), lock, remove):
    try:
        attempt()
    except PolarDeployError as error:
        print(type(error).__name__, error.what)
"""


def test_a_read_only_folder_is_a_usage_error_and_stays_as_it_was(read_only: Path) -> None:
    lines = said(python(AS_NOBODY, read_only)).splitlines()
    assert lines == [
        f"UsageError cannot write {read_only}/old: Permission denied",
        f"UsageError cannot write {read_only}/new: Permission denied",
        f"UsageError cannot write {read_only}/.lock: Permission denied",
        f"UsageError cannot write {read_only}/inner: Permission denied",
    ]
    assert names(read_only) == ["old"]
    assert (read_only / "old").read_text() == "old"


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="is a file, not a folder"):
            Workspace(place)
    with pytest.raises(UsageError, match=r"cannot write .*file/model.json: .*file is a file, not a folder"):
        write_json(tmp_path / "file" / "model.json", 1)


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "model.json").mkdir()
    with pytest.raises(UsageError, match="not a regular file"):
        write_json(tmp_path / "model.json", 1)
    assert names(tmp_path) == []


def test_a_broken_disk_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="Input/output error"), atomic_path(tmp_path / "file"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_trouble_with_another_file_is_not_blamed_on_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"input\.npz"), atomic_path(tmp_path / "file"):
        (tmp_path / "input.npz").read_bytes()
    with pytest.raises(ConnectionResetError), atomic_path(tmp_path / "file"):
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
    with pytest.raises(ContentError, match="not an image"), atomic_path(tmp_path / "file"):
        raise ContentError("not an image", "look at it")


# --------------------------------------------------------------------------- JSON and hashes


def test_json_keeps_order_and_refuses_what_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"b": 1, "a": [0.5, "é"]})
    assert path.read_text() == '{\n "b": 1,\n "a": [\n  0.5,\n  "é"\n ]\n}\n'
    assert read_json(path) == {"b": 1, "a": [0.5, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert read_json(path)["b"] == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gates.json"
    path.write_bytes(content)
    with pytest.raises(ContentError, match=r"gates\.json is not JSON"):
        read_json(path)


def test_a_missing_file(tmp_path: Path) -> None:
    for read in (read_json, sha256):
        with pytest.raises(UsageError, match=r"cannot read .*gone\.json: No such file"):
            read(tmp_path / "gone.json")


def test_sha256_is_the_content_s(tmp_path: Path) -> None:
    content = os.urandom(2**20 + 7)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------- lock

HOLD = """
import sys, time
from polar_deploy.workspace import Workspace
with Workspace(sys.argv[1]).locked():
    print("ready", flush=True)
    time.sleep(60)
"""


def test_two_runs_do_not_share_a_folder_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    child = python(HOLD, tmp_path / "run")
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    workspace = Workspace(tmp_path / "run")
    with pytest.raises(UsageError, match=rf"another run \(process {child.pid}\) works in {workspace.folder}"):
        workspace.locked().__enter__()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with workspace.locked():
        assert (workspace.folder / ".lock.pid").read_text() == f"{os.getpid()}\n"
    with workspace.locked():
        pass
    assert names(workspace.folder) == [".lock"]


def test_a_folder_that_was_made_and_nothing_was_written_in_goes_again(tmp_path: Path) -> None:
    with Workspace(tmp_path / "runs/one").locked():
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with Workspace(tmp_path / "mine").locked():
        pass
    assert names(tmp_path / "mine") == [".lock"]
    with Workspace(tmp_path / "runs/one").locked():
        (tmp_path / "runs/one/file").write_text("written")
    assert names(tmp_path / "runs/one") == [".lock", "file"]


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(ZeroDivisionError), workspace.locked():
        raise ZeroDivisionError
    with workspace.locked():
        pass


# --------------------------------------------------------------------------- stamps

SETTINGS = {"lr": 0.1, "epochs": 3}
KEY = Fingerprint(digest(SETTINGS), "polar_deploy 1.2.3")


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Workspace, list[Path], list[Path]]:
    """A workspace in which stage `gates` is finished; its inputs (one inside, one outside) and outputs."""
    workspace = Workspace(tmp_path / "run")
    inputs = [workspace.path("full/model.onnx"), tmp_path / "home" / "mine.npz"]
    outputs = [workspace.path("gated/gates.json"), workspace.path("gated/weights.safetensors")]
    for path in (*inputs, *outputs):
        write_json(path, path.name)
    workspace.stamp("gates", KEY, inputs, outputs)
    return workspace, inputs, outputs


Finished = tuple[Workspace, list[Path], list[Path]]


def test_a_finished_stage_is_current(finished: Finished) -> None:
    workspace, inputs, outputs = finished
    assert workspace.is_current("gates", KEY, inputs, outputs)
    in_another_order = Fingerprint(digest(dict(reversed(SETTINGS.items()))), KEY.program)
    assert workspace.is_current("gates", in_another_order, inputs, outputs)


def test_clocks_and_a_moved_folder_mean_nothing(finished: Finished, tmp_path: Path) -> None:
    workspace, inputs, outputs = finished
    os.utime(inputs[0], (2e9, 2e9))
    os.utime(outputs[0], (0, 0))
    moved = Workspace(workspace.folder.rename(tmp_path / "elsewhere"))
    inputs = [moved.path("full/model.onnx"), inputs[1].rename(tmp_path / "yours.npz")]
    assert moved.is_current("gates", KEY, inputs, [moved.path("gated") / path.name for path in outputs])


def test_whatever_changed_makes_the_stage_run_again(finished: Finished) -> None:
    workspace, inputs, outputs = finished
    assert not workspace.is_current("export", KEY, inputs, outputs)
    other_settings = Fingerprint(digest(SETTINGS | {"lr": 0.2}), KEY.program)
    assert not workspace.is_current("gates", other_settings, inputs, outputs)
    other_program = Fingerprint(KEY.settings, "polar_deploy 1.2.4")
    assert not workspace.is_current("gates", other_program, inputs, outputs)
    assert not workspace.is_current("gates", KEY, inputs[:1], outputs)
    assert not workspace.is_current("gates", KEY, inputs, outputs[:1])
    for path in (*inputs, *outputs):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert not workspace.is_current("gates", KEY, inputs, outputs), path
        path.unlink()
        assert not workspace.is_current("gates", KEY, inputs, outputs), path
        path.write_bytes(content)
        assert workspace.is_current("gates", KEY, inputs, outputs), path


def test_a_forgotten_or_damaged_stamp_makes_the_stage_run_again(finished: Finished) -> None:
    workspace, inputs, outputs = finished
    stamp = workspace.path("stamps/gates.json")
    stamp.write_bytes(stamp.read_bytes()[:40])
    assert not workspace.is_current("gates", KEY, inputs, outputs)
    workspace.invalidate("gates")
    workspace.invalidate("gates")
    assert not stamp.exists()
    assert not workspace.is_current("gates", KEY, inputs, outputs)


def test_it_is_known_whether_settings_or_program_were_others(finished: Finished) -> None:
    workspace, inputs, _ = finished
    newer = Fingerprint(KEY.settings, "polar_deploy 1.2.4")
    other = Fingerprint(digest({}), "polar_deploy 1.2.4")
    assert [workspace.has_other_settings("gates", each) for each in (KEY, newer, other)] == [False, False, True]
    programs = [workspace.other_program("gates", each) for each in (KEY, newer, other)]
    assert programs == [None, "polar_deploy 1.2.3", None]
    assert not workspace.has_other_settings("export", KEY)  # nobody knows
    assert [workspace.is_of_another("gates", each, inputs) for each in (KEY, newer, other)] == [False, True, True]
    assert workspace.is_of_another("gates", KEY, [])
    assert not workspace.is_of_another("export", KEY, inputs)
    assert workspace.other_program("export", KEY) is None
    for damaged in ("[]", "{}", '{"settings": 1}'):
        workspace.path("stamps/gates.json").write_text(damaged)
        assert workspace.has_other_settings("gates", KEY)
        assert workspace.is_of_another("gates", KEY, inputs)
        assert workspace.other_program("gates", newer) is None


def test_stamps_tell_nothing_about_the_user(finished: Finished, tmp_path: Path) -> None:
    workspace, _, outputs = finished
    text = workspace.path("stamps/gates.json").read_text()
    assert str(tmp_path) not in text
    assert "mine" not in text
    assert list(json.loads(text)["outputs"]) == [f"gated/{path.name}" for path in outputs]


# --------------------------------------------------------------------------- folders


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for content in ("one", "two"):
        with atomic_folder(folder) as draft:
            (draft / "inner").mkdir()
            (draft / "inner/file").write_text(content)
            assert not folder.exists() or (folder / "inner/file").read_text() == "one"
        assert (folder / "inner/file").read_text() == content
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as draft:
        (draft / "file").write_text(str(1 / 0))
    assert [path.name for path in folder.parent.rglob("*")] == ["b", "inner", "file"]
    assert (folder / "inner/file").read_text() == "two"


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").touch()
    replace, calls = os.replace, []

    def broken(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:  # the new one in the old one's place
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(MachineError, match="Input/output error"), atomic_folder(tmp_path / "a") as draft:
        (draft / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


def test_what_is_no_folder_is_not_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="is not a folder"), atomic_folder(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "run/bundle").mkdir(parents=True)
    remove_folder(tmp_path / "run/bundle")
    remove_folder(tmp_path / "run/bundle")  # is none there any more
    assert list((tmp_path / "run").iterdir()) == []
