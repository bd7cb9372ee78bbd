"""What a child process may do, good and bad: called by name in `test_child.py`."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from polar_deploy.errors import MachineError
from polar_deploy.workspace import write_json


def answer(request: dict[str, Any]) -> dict[str, Any]:
    print("what is printed is no answer")
    return {"got": request, "pid": os.getpid(), "path": sys.path}


def abort(request: dict[str, Any]) -> dict[str, Any]:
    """As a C++ library does it: words on the error stream, past Python, then SIGABRT."""
    os.write(2, b"first\nAssertion cudaRuntime >= 12 failed\nterminate called\n")
    os.abort()


def raise_own(request: dict[str, Any]) -> dict[str, Any]:
    raise MachineError("no room", "make some")


def raise_other(request: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("a bug in line 7")


def leave(request: dict[str, Any]) -> dict[str, Any]:
    os._exit(0)


def be_killed(request: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def run_out_of_memory(request: dict[str, Any]) -> dict[str, Any]:
    raise MemoryError


def sleep(request: dict[str, Any]) -> dict[str, Any]:
    if "mark" in request:
        write_json(request["mark"], os.getpid())
    time.sleep(60)
    return {}
