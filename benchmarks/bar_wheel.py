"""The package as an index has it: built, checked by twine, and installed into an environment that has nothing else.

Makes environments with pip, so it needs a package index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write_result

# What a user of the wheel looks for, and what a checkout alone has beside the package.
WANTED = {
    "types": "polar_deploy/py.typed",
    "recipe": "polar_deploy/pipelines/cifar10-resnet56.yaml",
    "example": "polar_deploy/examples/audio_1d.py",
    "schema": "polar_deploy/schemas/bundle.schema.json",
    "device": "polar_deploy/devices/onnxruntime-x86.json",
}
# Command, its exit code in an environment without any extra, and what it says
COMMANDS = (
    (("--version",), 0, "polar_deploy "),
    (("doctor",), 0, "pip install '.[ort]'"),
    (("settings", "lr"), 0, "training:"),
    (("devices", "list"), 0, "ethos-u55"),
    (("bundle", "schema"), 0, "polar_deploy.bundle"),
    (("run", "--recipe", "cifar10-resnet56", "--until", "surgery"), 3, "polar-deploy[train]"),
    (("surgery", "gated.onnx", "small.onnx", "--no-verify"), 0, "macs:"),
)


def main() -> int:
    """Run the bars; 0 if all are met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools = _environment(folder / "tools", "build", "twine")
        _checked(tools, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
        built = sorted((folder / "dist").iterdir())
        checked = subprocess.run([tools, "-m", "twine", "check", "--strict", *built], capture_output=True, text=True)
        wheel = next(path for path in built if path.suffix == ".whl")
        members, page = _content(wheel)
        bare = _environment(folder / "bare", str(wheel))
        packages = _checked(bare, "-m", "pip", "list", "--format=freeze").split()
        _gated(bare, folder)
        ran = [_run(bare.parent / "polar-deploy", folder, *each) for each in COMMANDS]
        typed = _types(folder, bare)
    links = re.findall(r"\]\(([^)]+)\)", page)
    figures = {
        "files": {path.name: "tar.gz" if path.name.endswith(".gz") else "wheel" for path in built},
        "twine": checked.stdout.splitlines(),
        "packages": packages,
        "commands": ran,
        "mypy": typed,
        "links": links,
    }
    bars = {
        "python -m build gives a source archive and a wheel": len(built) == 2,
        "twine check --strict passes": checked.returncode == 0,
        "no link of the index page leads to a file beside it": all(link.startswith("http") for link in links),
        **{f"in the wheel: {what} ({file})": file in members for what, file in WANTED.items()},
        "no torch, no runtime in the bare environment": not re.search(r"\b(torch|onnxruntime)==", " ".join(packages)),
        "each command does there what it should": all(each["as_it_should"] for each in ran),
        "mypy sees the types of the installed package": typed == "int",
    }
    return write_result("wheel", bars, figures)


def _environment(folder: Path, *packages: str) -> Path:
    """The interpreter of a fresh environment."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    _install(python, *packages)
    return python


def _install(python: Path, *packages: str) -> None:
    """Without compiling what is used once, which would take most of the time."""
    _checked(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile", *packages)


def _checked(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def _content(wheel: Path) -> tuple[set[str], str]:
    """Names of the files in a wheel, and the page that an index makes of it."""
    with zipfile.ZipFile(wheel) as files:
        names = {*files.namelist()}
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        return names, Parser().parsestr(files.read(metadata).decode("utf-8")).get_payload()


def _gated(python: Path, folder: Path) -> None:
    """Write `gated.onnx`: two layers, half of whose channels between them are closed."""
    code = """
import numpy as np, onnx
from onnx import TensorProto as T, helper as h, numpy_helper as n
values = {"a": np.ones((8, 3, 3, 3)), "gate": np.arange(8).reshape(1, 8, 1, 1) % 2, "b": np.ones((4, 8, 1, 1))}
nodes = [h.make_node(*each) for each in (
    ("Conv", ["x", "a"], ["c"]), ("Mul", ["c", "gate"], ["d"]), ("Conv", ["d", "b"], ["y"])
)]
x, y = h.make_tensor_value_info("x", T.FLOAT, ["n", 3, 8, 8]), h.make_tensor_value_info("y", T.FLOAT, ["n", 4, 6, 6])
weights = [n.from_array(value.astype(np.float32), name) for name, value in values.items()]
graph = h.make_graph(nodes, "gated", [x], [y], weights)
onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9), "gated.onnx")
"""
    subprocess.run([str(python), "-c", code], cwd=folder, check=True)


def _run(program: Path, folder: Path, arguments: tuple[str, ...], code: int, words: str) -> dict[str, Any]:
    """A command of the installed package, in a folder that is no checkout."""
    done = subprocess.run([str(program), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    return {
        "command": " ".join(arguments),
        "exit_code": done.returncode,
        "as_it_should": done.returncode == code and words in said and "Traceback" not in said,
    }


def _types(folder: Path, python: Path) -> str:
    """What mypy, added to the environment, says that `targets.parse("ort-fp32").align` is."""
    _install(python, "mypy")
    (folder / "use.py").write_text("from polar_deploy.targets import parse\nreveal_type(parse('ort-fp32').align)\n")
    done = subprocess.run(
        [str(python), "-m", "mypy", "use.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    found = re.search(r'Revealed type is "(?:builtins\.)?(\w+)"', done.stdout)
    return found[1] if found else done.stdout[:200]


if __name__ == "__main__":
    sys.exit(main())
