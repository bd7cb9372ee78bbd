"""Measure what each width costs in ONNX Runtime on this machine, and write a file for --device."""

from __future__ import annotations

import argparse
import platform
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from polar_deploy import extras, onnx_files
from polar_deploy.devices.sweep import Run, Size, measured
from polar_deploy.errors import MachineError, UsageError
from polar_deploy.ort_session import open_session, session_options, translated
from polar_deploy.workspace import write_text

MOST_OFF = 0.05  # share by which the control may be off: beyond, the file would tell of the noise
_SAMPLES = 16  # for the ranges of INT8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("out", type=Path, help="the file to write, NAME.json")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="of the layers (default: fp32)")
    parser.add_argument("--rounds", type=int, default=75, help="runs of each width (default: 75: some minutes)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write the file.

    Raises:
        UsageError: the name will not do.
        MachineError: ONNX Runtime is not installed, or the machine is too noisy.
    """
    path: Path = arguments.out
    if path.suffix != ".json":
        raise UsageError(f"{path} is not named .json", "give it a name such as mine.json")
    if find_spec("onnxruntime") is None:
        raise MachineError("onnxruntime is not installed", f"install it, {extras.install('ort')}")
    import onnxruntime

    source = {
        "tool": "onnxruntime",
        "version": onnxruntime.__version__,
        "date": str(date.today()),
        "script": "polar_deploy/devices/measure.py",
        "machine": platform.machine(),
    }
    load = session if arguments.precision == "fp32" else session_int8
    device, off = measured(path.stem.lower(), arguments.precision, source, load, arguments.rounds)
    if off > MOST_OFF:
        raise MachineError(
            f"the machine is too noisy: a network and its own copy differ by {off:.0%}, {MOST_OFF:.0%} is allowed",
            "stop what else runs on it, or ask for more --rounds",
        )
    write_text(path, device.text())
    widths = ", ".join(map(str, device.offered(device.precisions[0])))
    print(f"{path}: {widths} channels pay; the control was off by {off:.1%}")
    return 0


def session(path: Path, size: Size) -> Run:
    """An ONNX file with one input of that size in ONNX Runtime, on one thread."""
    with translated(f"{path}: ONNX Runtime cannot run it"):
        made = open_session(path, session_options(threads=1))
    given = {made.get_inputs()[0].name: np.random.default_rng(1).normal(size=size).astype(np.float32)}
    return lambda: made.run(None, given)


def session_int8(path: Path, size: Size) -> Run:
    """The same in the types of `ort-int8`, in a file beside it, written once."""
    from polar_deploy import precision, targets
    from polar_deploy.config import Build

    typed = path.with_suffix(".int8.onnx")
    if not typed.exists():
        model = onnx_files.read(path)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"  # INT8 is calibrated with several samples at once
        source = path.with_suffix(".batches.onnx")
        onnx_files.write(model, source)
        samples = np.random.default_rng(0).standard_normal((_SAMPLES, *size[1:]), np.float32)
        precision.write(source, typed, targets.parse("ort-int8"), Build(), {model.graph.input[0].name: samples})
    return session(typed, size)
