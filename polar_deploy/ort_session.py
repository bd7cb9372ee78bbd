"""The one door to sessions of ONNX Runtime: how they are opened, and what becomes of its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polar_deploy import extras, onnx_files
from polar_deploy.errors import ContentError, MachineError, OutOfMemoryError, PolarDeployError, one_line
from polar_deploy.limits import is_out_of_memory

if TYPE_CHECKING:
    import onnx
    import onnxruntime

CPU = ("CPUExecutionProvider",)
Level = Literal["none", "basic", "all"]  # none: the graph as it stands; basic: ONNX's own operators only
_LONGEST = 300  # characters of its messages, which may run over pages
_INSTALL = f"install it, {extras.install('ort')}"
# What ONNX Runtime says of valid graphs that it cannot run: no kernel for a type, custom operators, a newer opset,
# names that it wants to be unique.
_BEYOND = (
    *("NOT_IMPLEMENTED", "No Op registered", "not a registered", "guarantees* support", "IR version"),
    *("same node name", "are not supported", "Failed to construct locale"),
)


class BeyondRuntimeError(ContentError):
    """A valid graph that ONNX Runtime cannot run."""


def session_options(*, threads: int = 0, level: Level = "all", todo: str = _INSTALL) -> onnxruntime.SessionOptions:
    """Options under which live sessions do not disturb each other, and what fails is raised, and reported once.

    Args:
        threads: CPU threads of an inference; 0: one a core.
        level: how far the graph is optimised.
        todo: what to do where ONNX Runtime is not installed.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError("onnxruntime is not installed", todo) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "all": levels.ORT_ENABLE_ALL,
    }[level]
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads steal others' time
    return options


def open_session(
    model: Path | onnx.ModelProto,
    options: onnxruntime.SessionOptions | None = None,
    *,
    providers: Sequence[Any] | None = CPU,
) -> onnxruntime.InferenceSession:
    """Load a model, to be used inside of `translated`.

    Args:
        model: an ONNX file, or a model.
        options: None: those of `session_options`.
        providers: where it runs, the first that can; None: as the options say.

    Raises:
        MachineError: ONNX Runtime is not installed.
    """
    options = options or session_options()
    import onnxruntime

    chosen = None if providers is None else list(providers)
    if isinstance(model, Path):
        return onnxruntime.InferenceSession(str(model), options, providers=chosen)
    with onnx_files.loadable(model) as source:
        return onnxruntime.InferenceSession(source, options, providers=chosen)


@contextmanager
def translated(
    what: str | Callable[[str], str],
    todo: str = "export the network with operators that this ONNX Runtime has",
) -> Iterator[None]:
    """Turn what ONNX Runtime raises into an error of ours.

    Args:
        what: which model failed in what, a sentence that ONNX Runtime's own message follows; or makes one of it.
        todo: what to do.

    Raises:
        OutOfMemoryError: it got no memory.
        BeyondRuntimeError: it cannot run this graph, valid as it may be.
        ContentError: it finds the graph or its inputs wrong.
    """
    try:
        yield
    except PolarDeployError:
        raise
    except Exception as error:  # its own have no base class in common but this
        message = one_line(error) or type(error).__name__
        said = f"{what}: {message[:_LONGEST]}" if isinstance(what, str) else what(message)
        if isinstance(error, MemoryError) or is_out_of_memory(message):
            raise OutOfMemoryError(said, "free some memory, or use smaller batches or images") from error
        raise (BeyondRuntimeError if any(text in message for text in _BEYOND) else ContentError)(said, todo) from error
