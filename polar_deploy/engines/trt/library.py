"""TensorRT or TensorRT for RTX, whichever a backend needs: one API under two names. The only place that imports them.

Importing is harmless everywhere. Without a GPU, TensorRT's Builder and Runtime and TensorRT for RTX's Runtime end the
process, so whoever makes one asks `targets` before, and builds in a child process.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from polar_deploy.backends.tensorrt import TensorRT
from polar_deploy.errors import one_line
from polar_deploy.targets import Target

_KEPT = 20  # messages


def of(target: Target) -> TensorRT:
    """Which of the two libraries a target is for."""
    assert isinstance(target.backend, TensorRT)
    return target.backend


def load(backend: TensorRT) -> ModuleType:
    """The library's module."""
    return import_module(backend.module)


@cache
def logger(backend: TensorRT) -> Any:
    """The one logger of this process (TensorRT keeps the first it gets); `recent_errors` has what it heard."""
    trt = load(backend)

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors, and prints them at once where a crash would take them along."""

        echo = False

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, message: str) -> None:
            """Called by the library."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(one_line(message))
                if self.echo:
                    print(self.errors[-1], file=sys.stderr, flush=True)

    return Logger()


def recent_errors(backend: TensorRT) -> str:
    """The library's last errors, on one line; they are forgotten then."""
    return drain_errors(logger(backend))


def drain_errors(logger: Any) -> str:
    """As `recent_errors`, of a logger."""
    words = "; ".join(logger.errors) or "the library says nothing more"
    logger.errors.clear()
    return words


def version(backend: TensorRT) -> str:
    """The library's version in four parts, such as "10.6.0.26": plans are tied to it, and the module may tell less."""
    module_version = str(load(backend).__version__)
    for path in _loaded(backend.shared_library):
        library = ctypes.CDLL(path)
        parts = [getattr(library, f"getInferLib{part}Version", None) for part in ("Major", "Minor", "Patch", "Build")]
        if all(parts):
            return ".".join(str(part()) for part in parts if part)
    return module_version


def _loaded(name: str) -> list[str]:
    """Where this process has loaded libraries from whose files begin with `name`."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return [path for path in paths if Path(path).name.startswith(name)]
