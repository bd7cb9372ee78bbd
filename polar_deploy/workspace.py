"""A run's folder: atomic files, stamps that tell what is up to date, and a lock against a second run.

Nothing here looks at the clock: a stage is up to date when the content of its settings, inputs and outputs is.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polar_deploy import limits
from polar_deploy.disk import LEFTOVER, full_disk_noticed, translated
from polar_deploy.errors import ContentError, UsageError

_CHUNK = 1 << 20  # bytes read at once


# --------------------------------------------------------------------------- files


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary file to write; it becomes `path`, whole and on the disk, when the block ends well.

    The temporary file is a hidden sibling with the same suffix. Folders above `path` are made. If the block fails, or
    the process is killed, `path` stays as it was.

    Raises:
        MachineError: the disk is full, or broken.
        UsageError: the place cannot be written: read-only, no permission, a file where a folder should be.
    """
    path = Path(path)
    tmp = _aside(path)
    with translated(path):
        if path.exists() and not path.is_file():  # a device or a pipe would be replaced
            raise UsageError(f"{path} is not a regular file", "give the path of a file, new or old")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with full_disk_noticed(path):
                yield tmp
            _fsync(tmp)
            os.replace(tmp, path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
        _fsync(path.parent)  # the new name is safe only when the folder is


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `path`, whole and on the disk, when the block ends well.

    What `path` was before is gone then. If the block fails, or the process is killed, it stays as it was; a kill just
    between the two leaves none.

    Raises:
        As `atomic_path`.
    """
    tmp, old = _aside(path), _aside(path)
    with translated(path):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UsageError(f"{path} is not a folder", "choose another place, or move that file away")
        tmp.mkdir(parents=True)
        try:
            with full_disk_noticed(path):
                yield tmp
            for written in [*tmp.rglob("*"), tmp]:
                _fsync(written)
            _swap(tmp, path, old)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)  # what cannot be removed has a name that nobody reads
        _fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, at once: a kill leaves it whole, or under a name that nobody reads.

    Raises:
        UsageError: the place is read-only.
    """
    old = _aside(path)
    with translated(path):
        if path.is_dir():
            os.replace(path, old)
            shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    """A hidden sibling with the same suffix, which the next run clears away."""
    made = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    limits.note_temporary(made)
    return made


def _swap(new: Path, path: Path, old: Path) -> None:
    """Put `new` where `path` is, and what is there to `old`; back again if that fails."""
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise


def json_text(value: object) -> str:
    """`value` as JSON: one space of indent, keys in the given order, NaN and Inf refused."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_text(path: Path | str, text: str) -> None:
    """Write a text, atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as `json_text`, atomically."""
    write_text(path, json_text(value))


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        ContentError: it is not JSON (NaN and Inf are not).
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{path} is not JSON: {error}", "let the stage that writes it run again") from error


def sha256(path: Path | str) -> str:
    """Hash a file's content, 64 hex digits. A file that cannot be read raises UsageError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def digest(value: object) -> str:
    """Hash plain JSON data, whatever the order of its keys; 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _unreadable(path: Path | str, error: OSError) -> UsageError:
    return UsageError(f"cannot read {path}: {error.strerror}", "check the path and its permissions")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------- the folder of a run


@dataclass(frozen=True)
class Fingerprint:
    """What a result follows from besides the files that were read.

    Attributes:
        settings: a hash of the settings, the data and the machine that it depends on.
        program: who makes it: a version of this package, or what stands for several of them.
    """

    settings: str
    program: str

    def __str__(self) -> str:
        """One text for both, for whatever is kept beside a file."""
        return f"{self.settings} {self.program}"


class Workspace:
    """The folder of one run. Making one makes the folder.

    Raises:
        UsageError: the folder cannot be made: a file is in its place, or the place is read-only.
        MachineError: the disk is full.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        with translated(self.folder):
            self._new = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the file `name`, such as "full/model.onnx", lies."""
        return self.folder / name

    @contextmanager
    def locked(self, patience: float = 0) -> Iterator[None]:
        """Keep other runs out of the folder, and clear away what a killed run left half-written.

        The operating system holds the lock, so a dead process never does. A folder that was made for this, and in which
        nothing was written, goes again.

        Args:
            patience: seconds to wait for another run to end.

        Raises:
            UsageError: another process works in this folder; the message has its number. Or it is read-only.
        """
        import filelock  # 60 ms

        lock, holder = filelock.FileLock(self.path(".lock")), self.path(".lock.pid")
        with translated(self.path(".lock")):
            try:
                lock.acquire(timeout=patience)
            except filelock.Timeout as error:
                number = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "?"
                what = f"another run (process {number}) works in {self.folder}"
                raise UsageError(what, "wait for it to end, or give another folder with --out") from error
        try:
            with translated(holder):
                holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
                self._remove_leftovers()
            yield
        finally:
            holder.unlink(missing_ok=True)
            self._remove_unused()
            lock.release()

    def is_current(self, stage: str, fingerprint: Fingerprint, inputs: Iterable[Path], outputs: Iterable[Path]) -> bool:
        """Tell whether `stage` was finished with these settings and inputs, and all that it wrote is still whole.

        Args:
            stage: name of the stage.
            fingerprint: of settings, data, machine and program that concern the stage.
            inputs: files the stage reads, inside or outside of the folder.
            outputs: files the stage writes.
        """
        stamp = self._stamp_path(stage)
        try:
            return bool(read_json(stamp) == self._state(fingerprint, inputs, outputs))
        except (UsageError, ContentError):
            return False  # no stamp, a damaged one, or a file is missing: the stage has to run

    def has_stamp(self, stage: str) -> bool:
        """Tell whether `stage` was finished once, be it with other settings."""
        return self._stamp_path(stage).is_file()

    def has_other_settings(self, stage: str, fingerprint: Fingerprint) -> bool:
        """Tell whether `stage` was finished with other settings, by any program; False: without a stamp, too."""
        made = self._made(stage)
        return made is not None and made.settings != fingerprint.settings

    def is_of_another(self, stage: str, fingerprint: Fingerprint, inputs: Iterable[Path]) -> bool:
        """Tell whether `stage` was finished with other settings or inputs or by another program, or nobody knows."""
        if not self.has_stamp(stage):
            return False
        now = self._state(fingerprint, inputs, ())
        try:
            before = read_json(self._stamp_path(stage))
        except ContentError:
            return True
        return not isinstance(before, dict) or any(before.get(key) != now[key] for key in now if key != "outputs")

    def other_program(self, stage: str, fingerprint: Fingerprint) -> str | None:
        """The program by which `stage` was finished with these settings, if it was another one than now."""
        made = self._made(stage)
        same = made is None or made.settings != fingerprint.settings or made.program == fingerprint.program
        return None if same or made is None else made.program

    def _made(self, stage: str) -> Fingerprint | None:
        """The fingerprint in a stage's stamp; None: there is no stamp. A damaged one is nobody's."""
        try:
            stamp = read_json(self._stamp_path(stage))
        except (UsageError, ContentError):
            return None
        stamp = stamp if isinstance(stamp, dict) else {}
        return Fingerprint(str(stamp.get("settings")), str(stamp.get("program")))

    def stamp(self, stage: str, fingerprint: Fingerprint, inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
        """Write down that `stage` is finished. Arguments as for `is_current`; all files must be there."""
        write_json(self._stamp_path(stage), self._state(fingerprint, inputs, outputs))

    def invalidate(self, stage: str) -> None:
        """Remove the stamp of `stage`: to be called before the stage starts to write."""
        stamp = self._stamp_path(stage)
        with translated(stamp):
            stamp.unlink(missing_ok=True)

    def _stamp_path(self, stage: str) -> Path:
        return self.path(f"stamps/{stage}.json")

    def _state(self, fingerprint: Fingerprint, inputs: Iterable[Path], outputs: Iterable[Path]) -> dict[str, object]:
        return {
            "schema": 2,
            "settings": fingerprint.settings,
            "program": fingerprint.program,
            "inputs": self._hashes(inputs),
            "outputs": self._hashes(outputs),
        }

    def _hashes(self, paths: Iterable[Path]) -> dict[str, str]:
        """Hash files by their name inside the folder; outside files by their place in the list: no private paths."""
        folder = self.folder.resolve()
        hashes = {}
        for index, path in enumerate(paths):
            place = Path(path).resolve()
            inside = place.is_relative_to(folder)
            hashes[place.relative_to(folder).as_posix() if inside else f"outside {index}"] = sha256(place)
        return hashes

    def _remove_unused(self) -> None:
        if self._new and os.listdir(self.folder) == [".lock"]:
            self.path(".lock").unlink()
            for folder in self._new:
                if not os.listdir(folder):
                    folder.rmdir()

    def _remove_leftovers(self) -> None:
        for path in list(self.folder.rglob(".*.tmp*")):
            if LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
