"""What `bundle triton` writes, served by a real tritonserver on loopback: golden samples, latency over HTTP, refusals.

The server is the one in nvidia-pytriton (PyPI), which needs no GPU; it has no ONNX Runtime backend, so that one of that
name in Python stands in (`triton_onnxruntime`). An environment with it is made once, in --environment. Full and
compressed network lie side by side, in FP32 and INT8, and once as two versions of one model. Five minutes on two cores,
and a download of 100 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, run_pipeline, write_result
from polar_deploy.bundle import golden
from polar_deploy.bundle.read import opened
from polar_deploy.tensors import Arrays, take

PACKAGES = ("nvidia-pytriton>=0.5.14", "onnxruntime>=1.19", "numpy<2")  # the server's stub knows numpy 1
BACKEND = Path(__file__).with_name("triton_onnxruntime.py")
RUNS = {
    "fp32": ("--model", "resnet20", "--target", "ort-fp32"),
    "int8": ("--model", "resnet20", "--target", "ort-int8"),
    "own": ("--model", "tests.support.tiny:net", "--target", "ort-fp32"),
}
QUICK = ("--data", "digits", "--epochs", "2", "--budget", "0.5", "--max-drop", "100", "--min-speedup", "0.01")
REQUESTS = 100  # for the median over HTTP
PATIENCE = 120.0  # seconds until the server has to answer


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-triton", help="with nvidia-pytriton in it")
    environment = parser.parse_args().environment.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = tritonserver(environment, folder)
        bundles = {run: bundled(folder / run, options) for run, options in RUNS.items()}
        repository = folder / "repository"
        models = {}
        for run, bundle in bundles.items():
            for network in ("full", "compressed"):
                models[f"{run}-{network}"] = (bundle, network)
                serve(bundle, repository, network, f"{run}-{network}")
        for version, network in enumerate(("full", "compressed"), 1):
            models[f"ab/versions/{version}"] = (bundles["fp32"], network)
            serve(bundles["fp32"], repository, network, "ab", version)
        with serving(server, repository, folder / "server.log") as address:
            answers = {model: answered(address, model, *of) for model, of in models.items()}
        refused = {what: refuses(server, repository, folder, what) for what in ("dims", "file", "key")}
    bars = {
        **{f"{model}: golden samples within the tolerance": each["pass"] for model, each in answers.items()},
        **{f"a repository with a wrong {what} is refused": no for what, no in refused.items()},
    }
    return write_result("triton", bars, {"models": answers})


def bundled(folder: Path, options: tuple[str, ...]) -> Path:
    """A bundle of a network that was hardly trained: what is served is to be the same, not good."""
    run = run_pipeline(folder, *options, *QUICK)
    if not (folder / "bundle" / "manifest.json").is_file():
        raise SystemExit(f"{run['command']} made no bundle (exit code {run['exit_code']})")
    return folder / "bundle"


def serve(bundle: Path, repository: Path, network: str, name: str, version: int = 1) -> None:
    """Write one model of the repository with the command that an edge team uses."""
    command = [sys.executable, "-m", "polar_deploy.bundle", "triton", str(bundle), str(repository)]
    options = ("--network", network, "--name", name, "--version", str(version))
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def tritonserver(environment: Path, folder: Path) -> dict[str, Any]:
    """The server, with a backend named onnxruntime: its binary, backends and environment variables."""
    python = environment / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    asked = "import pytriton, sys, sysconfig; print(pytriton.__path__[0], sysconfig.get_path('purelib'))"
    package, site = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.split()
    shipped, backends = Path(package) / "tritonserver", folder / "backends"
    shutil.copytree(shipped / "backends", backends)
    stub = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(shipped / "python_backend_stubs" / stub / "triton_python_backend_stub", backends / "python")
    (backends / "onnxruntime").mkdir(exist_ok=True)
    shutil.copy(BACKEND, backends / "onnxruntime" / "model.py")
    libraries = [
        str(Path(package).parent / "nvidia_pytriton.libs"),
        sysconfig.get_config_var("LIBDIR"),
        os.environ.get("LD_LIBRARY_PATH", ""),
    ]
    variables = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)), "TRITON_SITE": site}
    return {"binary": shipped / "bin" / "tritonserver", "backends": backends, "variables": {**os.environ, **variables}}


def start(server: dict[str, Any], repository: Path, log: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the server on loopback, with the configuration as it is written and no other."""
    options = {
        "model-repository": repository,
        "backend-directory": server["backends"],
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    command = [str(server["binary"]), *(f"--{name}={value}" for name, value in options.items())]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, "--disable-auto-complete-config"],
            stdout=file,
            stderr=file,
            env=server["variables"],
            start_new_session=True,
        )


@contextmanager
def serving(server: dict[str, Any], repository: Path, log: Path) -> Iterator[str]:
    """A server that is ready: its address. It is stopped by its own process id, and what it left behind with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(server, repository, log, port)
    address = f"http://127.0.0.1:{port}/v2"
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tritonserver does not serve {repository.name}:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):  # one that refuses a repository leaves its Python stubs
                os.killpg(process.pid, signal.SIGKILL)


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def infer(address: str, model: str, inputs: Arrays) -> dict[str, np.ndarray]:
    """The outputs for inputs of float32, over HTTP."""
    tensors = [
        {"name": name, "shape": each.shape, "datatype": "FP32", "data": each.ravel().tolist()}
        for name, each in inputs.items()
    ]
    request = urllib.request.Request(f"{address}/models/{model}/infer", json.dumps({"inputs": tensors}).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        given = json.load(response)["outputs"]
    return {each["name"]: np.asarray(each["data"], np.float32).reshape(each["shape"]) for each in given}


def answered(address: str, model: str, path: Path, network: str) -> dict[str, Any]:
    """The golden samples through the server, against the bundle's; and the median of single images."""
    with opened(path) as bundle:
        manifest, inputs, outputs = bundle.manifest, bundle.inputs, bundle.outputs[network]
        found = golden.check(outputs, infer(address, model, inputs), manifest.each()[network].precision.asked)
    one, times = take(inputs, slice(1)), []
    for _ in range(REQUESTS):
        begun = time.perf_counter()
        infer(address, model, one)
        times.append(1000 * (time.perf_counter() - begun))
    return {**found.as_json(), "p50_ms": round(statistics.median(times), 3)}


def refuses(server: dict[str, Any], repository: Path, folder: Path, what: str) -> bool:
    """Whether the server does not become ready with one model that is spoilt."""
    spoilt = folder / f"spoilt-{what}"
    shutil.copytree(repository, spoilt)
    model = next(each for each in sorted(spoilt.iterdir()) if each.is_dir())
    config = model / "config.pbtxt"
    text = config.read_text(encoding="utf-8")
    if what == "file":
        next((model / "1").iterdir()).unlink()
    else:
        wrong = text.replace("dims: [ 3,", "dims: [ 4,") if what == "dims" else text.replace("max_batch_size", "most")
        config.write_text(wrong, encoding="utf-8")
    try:
        with serving(server, spoilt, folder / f"{what}.log"):
            return False
    except RuntimeError:
        return True


if __name__ == "__main__":
    raise SystemExit(main())
