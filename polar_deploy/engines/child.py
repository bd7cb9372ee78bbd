"""A function in a process of its own: a library that aborts ends the child alone, and the run tells what it wrote last.

python -m polar_deploy.engines.child package.module:function REQUEST.json ANSWER.json PARENT
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from polar_deploy.errors import ContentError, MachineError, OutOfMemoryError, PolarDeployError, UsageError
from polar_deploy.limits import die_with
from polar_deploy.workspace import read_json, write_json

_KINDS = {kind.__name__: kind for kind in (UsageError, MachineError, OutOfMemoryError, ContentError)}
_LAST_WORDS = 6  # lines


def call(function: str, request: dict[str, Any], what: str) -> dict[str, Any]:
    """Call "package.module:function" with a request, and return its answer; both are plain JSON.

    Args:
        what: what it does and to what, for messages, such as "building an engine of full.onnx".

    Raises:
        PolarDeployError: that the function raised.
        OutOfMemoryError: it ran out of memory.
        ContentError: it died, or raised anything else; the message has its last words.
    """
    with TemporaryDirectory(prefix="polar_deploy-") as name:
        folder = Path(name)
        asked, answered, said = folder / "request.json", folder / "answer.json", folder / "said.txt"
        write_json(asked, request)
        command = [sys.executable, "-m", __name__, function, str(asked), str(answered), str(os.getpid())]
        path = os.pathsep.join(part or "." for part in sys.path)  # the child has to find what this process found
        with said.open("wb") as output:
            code = _run(command, os.environ | {"PYTHONPATH": path}, output)
        if code != 0 or not answered.is_file():
            raise _died(code, said.read_text(encoding="utf-8", errors="replace"), what)
        answer: dict[str, Any] = read_json(answered)
    if "error" in answer:
        raise _KINDS[answer["error"]](answer["what"], answer["todo"])
    result: dict[str, Any] = answer["result"]
    return result


def _run(command: list[str], environment: dict[str, str], output: Any) -> int:
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as child:
        try:
            return child.wait()
        except BaseException:  # Ctrl-C, say
            child.kill()
            raise


def _died(code: int, said: str, what: str) -> PolarDeployError:
    lines = [line.strip() for line in said.splitlines() if line.strip(" ^~")]  # Python underlines what failed
    words = " | ".join(lines[-_LAST_WORDS:]) or "none"
    if code == -signal.SIGKILL or "MemoryError" in words or "out of memory" in words.lower():
        return OutOfMemoryError(
            f"{what} ran out of memory, or was killed for lack of it; last words: {words}",
            "free some memory, or lower build.workspace or the largest batch",
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return ContentError(
        f"{what} {how}; last words: {words}",
        "see whether `polar-deploy engines doctor` finds the machine in order; "
        "else another version of its library may take the network",
    )


def main(function: str, request: str, answer: str, parent: str) -> None:
    """What the child does. `parent` is the number of the process that waits for it."""
    die_with(int(parent))
    module, _, name = function.partition(":")
    try:
        result = {"result": getattr(import_module(module), name)(read_json(request))}
    except PolarDeployError as error:
        result = {"error": type(error).__name__, "what": error.what, "todo": error.todo}
    write_json(answer, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
