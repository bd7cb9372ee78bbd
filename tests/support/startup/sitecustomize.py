"""Coverage, which slows down all Python code, does not look on while other people's modules are imported.

Python imports a file of this name at its start: children of tests find it by `PYTHONPATH`. `tests/conftest.py` imports
it for the tests' own process. PyTorch takes half as long again under coverage, and it is not alone.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

PACKAGE = str(Path(__file__).parents[3] / "polar_deploy")
_exec_module = SourceFileLoader.exec_module
_threads = threading.local()


def exec_module(loader: SourceFileLoader, module: ModuleType) -> None:
    """Run a module's code; traced, if it is this package's, even where somebody else's module imports it."""
    now = sys.gettrace()
    if now is not None:
        _threads.tracer = now
    wanted = getattr(_threads, "tracer", None) if loader.path.startswith(PACKAGE) else None
    if wanted is now:
        _exec_module(loader, module)
        return
    sys.settrace(wanted)
    try:
        _exec_module(loader, module)
    finally:
        sys.settrace(now)


if sys.gettrace() is not None:
    SourceFileLoader.exec_module = exec_module  # type: ignore[method-assign]
