"""Limits on time and memory for what reads a stranger's file, and what a process may still take.

A graph of a few hundred bytes can ask for 100 GB, or never end. So the commands that run such files do it in a child
process: what is beyond its limit ends there, and the machine goes on.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from polar_deploy.errors import ContentError, OutOfMemoryError, PolarDeployError, one_line

SECONDS = 3600.0  # default limit on time
_NO_ROOM = "failed to map segment"  # what the system's loader says of a library that does not fit into memory
SHARE = 0.8  # default limit on memory, of what is free
_GRACE = 5.0  # seconds that a child has for its own end after Ctrl-C
_GIGA = 1e9
_CGROUP = Path("/sys/fs/cgroup")  # version 2; tells a container's limit
_TEMPORARY = "temporary"  # the file in which the child notes what it has not finished
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_scratch: str | None = None  # in a child, the folder that its parent removes


@dataclass(frozen=True)
class Limits:
    """What a child process may take: seconds of wall-clock time, and bytes of memory in each of its processes."""

    seconds: float
    memory: int

    def __str__(self) -> str:
        return f"{self.seconds:g} s and {self.memory / _GIGA:.3g} GB"


def confined(command: Callable[[], int], name: str, limits: Limits) -> int:
    """Run a command in a child process, a fork of this one; return its exit code, here and in the child.

    So what follows the call happens twice, and has to be the end of the program: `sys.exit(confined(…))`. What a child
    that was ended leaves half-written is removed. Memory is what may be written to (RLIMIT_DATA): files that are
    mapped, and addresses that a GPU's driver sets aside, do not count. Call it while there is one thread only.

    Args:
        command: what to run.
        name: of the command, for messages.
        limits: what it may take.

    Raises:
        ContentError: the command took more than its limits, or died.
    """
    import tempfile

    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    ended, alive = os.pipe()  # the child's end is closed when the child is gone
    told, tell = os.pipe()  # of Ctrl-C, which the terminal sends to the child, too
    noted, note = os.pipe()  # that the exit code is the command's, and not that of a library which gave up
    before = signal.signal(signal.SIGINT, lambda *_: os.write(tell, b"!"))
    try:
        # The child leaves this block, too, and may have no memory left to clean up with: its parent does that.
        with tempfile.TemporaryDirectory(prefix="polar_deploy-", ignore_cleanup_errors=True) as scratch:
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGINT, before)
                os.close(ended)
                die_with(parent)
                return _inside(command, name, limits, scratch, note)
            os.close(alive)
            try:
                code = _wait(child, ended, told, name, limits)
                if not select.select([noted], [], [], 0)[0]:
                    what = f"{name} was ended by a library, with code {code}; its limits were {limits}"
                    raise ContentError(what, _todo("--memory-limit GB, in case that was it"))
                return code
            finally:
                _clear(Path(scratch, _TEMPORARY))
    finally:
        signal.signal(signal.SIGINT, before)
        for descriptor in (told, tell, noted, note, *([ended] if os.getpid() == parent else [])):
            os.close(descriptor)


def _inside(command: Callable[[], int], name: str, limits: Limits, scratch: str, note: int) -> int:
    """What the child does; it writes into `note` when the command has ended, however that was."""
    import tempfile

    global _scratch
    tempfile.tempdir = os.environ["TMPDIR"] = _scratch = scratch
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants gigabytes of a stranger's memory on the disk
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    memory = limits.memory if hard == resource.RLIM_INFINITY else min(limits.memory, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        return command()
    except Exception as error:
        known = _is_lack_of_memory(error)
        if not known and (isinstance(error, PolarDeployError) or _has_room()):
            raise
        what = f"{name} takes more memory than its limit of {memory / _GIGA:.3g} GB"
        said = one_line(error.what if isinstance(error, OutOfMemoryError) else error) if known else ""
        raise ContentError(f"{what}: {said}" if said else what, _todo("--memory-limit GB")) from error
    finally:
        os.write(note, b"!")


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):
        return _NO_ROOM in str(error)
    return isinstance(error, (MemoryError, OutOfMemoryError))


def _has_room() -> bool:
    """Whether there is a page to be had. Where there is none, libraries and Python's compiler raise what they like."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


def _wait(child: int, ended: int, told: int, name: str, limits: Limits) -> int:
    """The child's exit code, or an error that says how it ended. Whatever happens, there is no child afterwards."""
    try:
        ready = select.select([ended, told], [], [], limits.seconds)[0]
        interrupted = ended not in ready and told in ready
        if interrupted:  # the child may be deep inside of a library, and not hear it
            ready = select.select([ended], [], [], _GRACE)[0]
    finally:
        if not select.select([ended], [], [], 0)[0]:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not ready and interrupted:
        raise KeyboardInterrupt
    if not ready:
        raise ContentError(f"{name} takes longer than its limit of {limits.seconds:g} s", _todo("--time-limit SECONDS"))
    if os.WIFSIGNALED(status):
        what = f"{name} died of {signal.Signals(os.WTERMSIG(status)).name}; its limits were {limits}"
        raise ContentError(what, _todo("--memory-limit GB, in case that was it"))
    return os.WEXITSTATUS(status)


@contextmanager
def processor_time(seconds: float, name: str) -> Iterator[None]:
    """Inside, Python code ends once this process has taken so many seconds of processor time.

    Only the main thread can be ended so; in others there is no limit.

    Args:
        seconds: the limit.
        name: of what is computed, for the message.

    Raises:
        ContentError: it takes longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise ContentError(f"{name} takes longer than {seconds:g} s", "use smaller inputs, or a simpler graph")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: a library may swallow the first one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def _todo(option: str) -> str:
    return f"do not use the file; if you trust whoever made it, allow more with {option}"


def note_temporary(path: Path) -> None:
    """Remember a file or folder that is only there for a while, to be removed if this process is ended meanwhile."""
    if _scratch is not None:
        with Path(_scratch, _TEMPORARY).open("ab") as notes:
            notes.write(os.fsencode(path.absolute()) + b"\0")


def _clear(notes: Path) -> None:
    for name in notes.read_bytes().split(b"\0")[:-1] if notes.is_file() else ():
        path = Path(os.fsdecode(name))
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def die_with(parent: int) -> None:
    """Ask Linux to end this process when the one that waits for it is gone: nobody else would read its answer."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it went while this process started
            os._exit(1)


def is_out_of_memory(text: str) -> bool:
    """Whether a library's error says that it got no memory: "Failed to allocate memory", "std::bad_alloc"."""
    return any(words in text for words in ("Failed to allocate memory", "bad_alloc", "bad allocation"))


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that has less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = (int((_CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(stat["inactive_file"])  # makes room when it is asked for
        return min(free, max(0, limit - used + cached))
    except (OSError, ValueError, KeyError):  # no such group, or its limit is "max"
        return free
