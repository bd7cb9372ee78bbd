"""What a disk refuses, told as errors that say what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polar_deploy.errors import MachineError, PolarDeployError, UsageError

LEFTOVER = re.compile(r"\.(.*)\.[0-9a-f]{8}\.tmp(\.[^.]*)?")  # how `workspace` names what is not yet whole
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BROKEN = {errno.EIO, errno.ESTALE, errno.ENODEV}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG}
_FULL_BELOW = 65536  # bytes: less than any file worth writing


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn an OSError about `path`, its folders or its temporary file into an error that says what to do.

    Raises:
        MachineError: the disk is full, or broken.
        UsageError: the place cannot be written: read-only, no permission, a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, path):
            raise  # some other file, which the block read
        if error.errno in DISK_FULL:
            raise _disk_full(path) from error
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            what = f"cannot write {path}: {error.filename} is a file, not a folder"
            raise UsageError(what, "choose another place, or move that file away") from error
        what = f"cannot write {path}: {error.strerror}"
        if error.errno in _FORBIDDEN:
            raise UsageError(what, "choose a place that you may write to, or mend its permissions") from error
        if error.errno in _BROKEN:
            raise MachineError(what, "check the disk, or choose another place") from error
        raise  # not about a disk at all: the network, for one


def _concerns(error: OSError, path: Path) -> bool:
    if not isinstance(error.filename, (str, bytes)):
        return True  # a write names no file
    named = Path(os.fsdecode(error.filename))
    is_temporary = named.parent == path.parent and LEFTOVER.fullmatch(named.name) is not None
    return is_temporary or path.is_relative_to(named)


@contextmanager
def full_disk_noticed(path: Path) -> Iterator[None]:
    """Tell a full disk from the errors of libraries that hide it (numpy, safetensors, torch).

    It must look while the temporary file still fills the disk.

    Raises:
        MachineError: the disk is full.
    """
    try:
        yield
    except PolarDeployError:
        raise
    except Exception as error:
        named = getattr(error, "errno", None) in DISK_FULL or os.strerror(errno.ENOSPC) in str(error)
        if named or shutil.disk_usage(path.parent).free < _FULL_BELOW:
            raise _disk_full(path) from error
        raise


def _meant(path: Path) -> Path:
    """What a file that is written inside a folder aside is a part of, by the name that people know."""
    for each in reversed((path, *path.parents)):  # the outermost one
        if aside := LEFTOVER.fullmatch(each.name):
            return each.with_name(f"{aside[1]}{aside[2] or ''}")
    return path


def _disk_full(path: Path) -> MachineError:
    folder = path
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    what = f"no space left to write {_meant(path)}: {free:,} bytes are free there (or a quota is used up)"
    return MachineError(what, "free some space or choose another place, then give the same command again")
