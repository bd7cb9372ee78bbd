"""Every attribute that our code takes of TensorRT is there, or asked for first, in 10.6 and in 11, and in that for RTX.

    python -m benchmarks.bar_trt_surface
    python -m benchmarks.bar_trt_surface --ten TEN --eleven ELEVEN --python python3.12

TEN holds TensorRT 10.6: its native libraries in `lib/`, its bindings for the Python that is named in `site/`; it is
fetched by ../shared (1.1 GB) where it is not given. ELEVEN holds what pip installs of tensorrt-cu13-bindings without
what that depends on: the few functions that they want of the native libraries, of gigabytes, are compiled as stubs
(with `cc`). Only names are looked at, nothing is made, so no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tensorrt_rtx

import polar_deploy.engines.trt
from benchmarks import trt_surface
from benchmarks.common import SHARED, write_result
from benchmarks.trt_surface import MODULE, Surface, Use

FETCH = SHARED / "tensorrt" / "fetch.sh"
SOURCES = sorted(Path(polar_deploy.engines.trt.__file__).parent.glob("*.py"))
# Taken only where the target is one of TensorRT for RTX
RTX_ONLY = {"module.ComputeCapability", "ComputeCapability.__members__"}
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def main() -> int:
    """Run the bar; 0 if it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the Python that both bindings are for")
    parser.add_argument("--ten", type=Path, metavar="FOLDER", help="TensorRT 10.6: lib/ and site/")
    parser.add_argument("--eleven", type=Path, metavar="FOLDER", help="the bindings of TensorRT 11")
    arguments = parser.parse_args()
    if arguments.ten is None and not FETCH.is_file():
        print("skipped: no TensorRT 10.6 given, nor a way to fetch it in ../shared")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        ten = arguments.ten or fetch_ten(arguments.python, scratch / "ten")
        eleven = arguments.eleven or fetch_eleven(arguments.python, scratch / "eleven")
        compile_stubs(scratch)
        surfaces = {
            "TensorRT 10": read(arguments.python, "tensorrt", ten / "site", ten / "lib"),
            "TensorRT 11": read(arguments.python, "tensorrt_bindings", eleven, scratch),
        }
    surfaces["TensorRT for RTX"] = trt_surface.surface(tensorrt_rtx)
    wanted = trt_surface.uses(SOURCES, trt_surface.merged(surfaces.values()))
    lacks = {name: lacking(wanted, offered, rtx="RTX" in name) for name, offered in surfaces.items()}
    bars = {f"all that is taken unguarded is in {name}": not found for name, found in lacks.items()}
    figures = {
        "bindings": {name: offered[MODULE]["__version__"] for name, offered in surfaces.items()},
        "lacking": {name: [f"{use} ({use.file}:{use.line})" for use in found] for name, found in lacks.items()},
        "rtx_only": sorted(RTX_ONLY),
        "uses": trt_surface.as_rows(wanted, surfaces),
    }
    return write_result("trt-surface", bars, figures)


def lacking(wanted: list[Use], offered: Surface, *, rtx: bool) -> list[Use]:
    """What bindings lack of what is taken without asking first."""
    needed = [use for use in wanted if not use.guard and (rtx or str(use) not in RTX_ONLY)]
    return trt_surface.missing(needed, offered)


def read(python: str, module: str, packages: Path, libraries: Path) -> Surface:
    """What bindings offer, read by the Python that they are for."""
    environment = os.environ | {"PYTHONPATH": str(packages), "LD_LIBRARY_PATH": str(libraries)}
    command = [python, trt_surface.__file__, module]
    found: Surface = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    return found


def fetch_ten(python: str, folder: Path) -> Path:
    """TensorRT 10.6 with its native libraries, which its bindings need to be imported."""
    version = "import sys; print('%d.%d' % sys.version_info[:2])"
    number = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["bash", str(FETCH), str(folder), number], check=True)
    return folder


def fetch_eleven(python: str, folder: Path) -> Path:
    """The bindings of TensorRT 11 alone."""
    package = "tensorrt-cu13-bindings==11.*"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), package], check=True)
    return folder


def compile_stubs(folder: Path) -> None:
    """Write libraries of TensorRT 11's names, whose functions give 0."""
    source = folder / "stubs.c"
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in _FUNCTIONS), encoding="utf-8")
    for name in _LIBRARIES:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
