"""What runs a stranger's file does it within limits, and leaves nothing behind when it is ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from PIL import Image

from polar_deploy import limits
from polar_deploy.errors import ContentError
from polar_deploy.limits import processor_time
from tests.conftest import child_environment
from tests.support.bundle_commands import manifest, put
from tests.support.bundles import write_bundle
from tests.support.greedy import endless, huge, inflated

CODE = """
import os, sys, time
from pathlib import Path
from polar_deploy.commands import guarded
from polar_deploy.errors import OutOfMemoryError
from polar_deploy.limits import Limits, confined
from polar_deploy.workspace import atomic_path

def command():
    {body}
    return 5

sys.exit(guarded(lambda: confined(command, "it", Limits({seconds}, {memory})), []))
"""


def started(body: str, folder: Path, *, seconds: float = 60, memory: float = 4e9) -> subprocess.Popen[str]:
    code = CODE.format(body=body, seconds=seconds, memory=int(memory))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=child_environment() | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(body: str, folder: Path, *, seconds: float = 60, memory: float = 4e9) -> tuple[int, str, str]:
    """Exit code, output and errors of a command with limits, whose body is `body`."""
    with started(body, folder, seconds=seconds, memory=memory) as process:
        out, err = process.communicate(timeout=60)
    assert [path for path in folder.iterdir() if path.name.startswith(("polar_deploy-", "."))] == []
    return process.returncode, out, err


def test_a_command_within_its_limits_ends_as_it_would_without(tmp_path: Path) -> None:
    assert ended("print('said'); print(os.getppid() > 1)", tmp_path) == (5, "said\nTrue\n", "")
    assert ended("raise OSError('x')", tmp_path)[0] == 70


@pytest.mark.parametrize("body", ["time.sleep(60)", "sum(range(10**12))"])
def test_what_takes_too_long_is_ended(body: str, tmp_path: Path) -> None:
    start = time.monotonic()
    code, out, err = ended(body, tmp_path, seconds=0.5)
    assert (code, out) == (4, "")
    assert err.startswith("error: it takes longer than its limit of 0.5 s\n  what to do: do not use the file; ")
    assert time.monotonic() - start < 50


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("bytearray(10**11)", "it takes more memory than its limit of 1 GB\n"),
        (
            "import numpy; numpy.ones(10**11)",
            "it takes more memory than its limit of 1 GB: Unable to allocate 745. GiB",
        ),
        ("raise OutOfMemoryError('no room', '')", "it takes more memory than its limit of 1 GB: no room\n"),
        (
            "raise OSError(12, 'Cannot allocate memory', 'folder')",
            "it takes more memory than its limit of 1 GB: [Errno 12]",
        ),
        ("os.abort()", "it died of SIGABRT; its limits were 60 s and 1 GB\n"),
        ("os.kill(os.getpid(), 9)", "it died of SIGKILL; "),
        ("os._exit(1)", "it was ended by a library, with code 1; its limits were 60 s and 1 GB\n"),
        ("os._exit(0)", "it was ended by a library, with code 0; "),
    ],
    ids=["memory", "numpy", "library", "system", "abort", "kill", "exit", "exit well"],
)
def test_what_takes_too_much_or_dies_is_one_sentence(body: str, words: str, tmp_path: Path) -> None:
    code, out, err = ended(body, tmp_path, memory=1e9)
    assert (code, out) == (4, "")
    assert err.startswith(f"error: {words}")
    assert "  what to do: do not use the file; " in err


def test_any_error_where_there_is_no_memory_at_all_is_for_the_lack_of_it(tmp_path: Path) -> None:
    """Python's compiler was seen to call a dataclass wrong."""
    code, out, err = ended("raise TypeError('nonsense')", tmp_path, memory=1e6)
    assert (code, out) == (4, "")
    assert err.startswith("error: it takes more memory than its limit of 0.001 GB\n"), err
    assert ended("raise TypeError('nonsense')", tmp_path)[0] == 70


def test_what_was_half_written_is_removed(tmp_path: Path) -> None:
    body = (
        "import tempfile\n"
        "    tempfile.mkdtemp()\n"
        "    with atomic_path('out.onnx') as tmp:\n"
        "        tmp.write_bytes(bytes(1000)); time.sleep(60)"
    )
    assert ended(body, tmp_path, seconds=1)[0] == 4
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_does_not_hear_ctrl_c_is_ended(tmp_path: Path) -> None:
    body = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', os.getpid(), flush=True)\n"
    with started(body + "    time.sleep(60)", tmp_path) as process:
        assert process.stdout
        child = process.stdout.readline().split()[1]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not Path("/proc", child).exists()


def test_a_child_that_hears_ctrl_c_says_so_once(tmp_path: Path) -> None:
    with started("print(os.getpid(), flush=True); time.sleep(60)", tmp_path) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        for each in (child, process.pid):  # as a terminal does it
            os.kill(each, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


# --------------------------------------------------------------------------- the commands


def spin(deaf: int = 0) -> None:
    """Never ends by itself, and swallows so many errors."""
    for _ in range(deaf):
        with suppress(ContentError):
            spin()
    while True:
        pass


@pytest.mark.parametrize("deaf", [0, 2])
def test_processor_time_ends_python_code_and_nothing_behind_it(deaf: int) -> None:
    with pytest.raises(ContentError, match=r"counting takes longer than 0\.05 s"), processor_time(0.05, "counting"):
        spin(deaf)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    with processor_time(0.05, "sleeping"):
        time.sleep(0.1)  # no processor time


def test_other_threads_have_no_limit_on_processor_time() -> None:
    with ThreadPoolExecutor(1) as pool, processor_time(60, "the main thread"):
        pool.submit(lambda: processor_time(0.001, "another").__enter__()).result()
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 1


def picture(folder: Path) -> Path:
    Image.new("RGB", (20, 20)).save(folder / "picture.png")
    return folder / "picture.png"


def command(*arguments: object, traced: bool = True) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "polar_deploy", *map(str, arguments)]
    environment = child_environment(traced=traced)
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=120)


@pytest.mark.parametrize(
    ("model", "limit", "words"),
    [
        (huge("ConstantOfShape"), ("--memory-limit", 2), "takes more memory than its limit of 2 GB: ONNX Runtime"),
        (huge("Expand", "r"), ("--memory-limit", 2), "takes more memory than its limit of 2 GB: ONNX Runtime"),
        (endless(), ("--time-limit", 4), "takes longer than its limit of 4 s\n"),
    ],
    ids=["constant", "computed", "endless"],
)
def test_surgery_ends_within_its_limits(
    model: onnx.ModelProto, limit: tuple[str, int], words: str, tmp_path: Path
) -> None:
    onnx.save(model, tmp_path / "in.onnx")
    done = command("surgery", tmp_path / "in.onnx", tmp_path / "out.onnx", *limit)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: python -m polar_deploy surgery {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_a_bundle_ends_within_its_limits(tmp_path: Path) -> None:
    delivered = write_bundle(tmp_path / "bundle")
    assert command("bundle", "verify", delivered, "--no-timing").returncode == 0
    name = manifest(delivered)["networks"]["compressed"]["fp32"]
    put(delivered, name, inflated(onnx.load(delivered / name)).SerializeToString())
    for each in (("verify", delivered), ("run", delivered, picture(tmp_path), "--fp32")):
        done = command("bundle", *each, "--memory-limit", 2)
        assert (done.returncode, done.stdout) == (4, "")
        assert f"bundle {each[0]} takes more memory than its limit of 2 GB" in done.stderr
    assert command("bundle", "triton", delivered, tmp_path / "models").returncode == 0  # which runs nothing
    # Coverage itself would find no memory to write down what it saw
    done = command("bundle", "verify", delivered, "--no-timing", "--memory-limit", 0.01, traced=False)
    assert done.returncode == 4
    assert re.search("memory|died of", done.stderr), done.stderr
    done = command("bundle", "verify", delivered, "--time-limit", 0.05)
    assert (done.returncode, done.stdout) == (4, "")
    assert "bundle verify takes longer than its limit of 0.05 s" in done.stderr


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_is_a_number_above_zero(limit: str, tmp_path: Path) -> None:
    done = command("surgery", "a.onnx", "b.onnx", "--time-limit", limit)
    assert done.returncode == 2
    assert f"{limit}" in done.stderr.splitlines()[-1]


# --------------------------------------------------------------------------- what is free


@pytest.mark.parametrize(
    ("maximum", "current", "expected"), [("1000000", "700000", 350_000), ("max", "700000", None), ("5", "700", 0)]
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maximum: str, current: str, expected: int | None
) -> None:
    whole = limits.available_memory()
    assert whole > 0
    (tmp_path / "memory.max").write_text(f"{maximum}\n")
    (tmp_path / "memory.current").write_text(f"{current}\n")
    (tmp_path / "memory.stat").write_text(f"anon 650000\ninactive_file {50_000 if maximum != '5' else 0}\n")
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    given = limits.available_memory()
    assert given > 10**6 if expected is None else given == expected
