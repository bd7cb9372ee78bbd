"""PyTorch to ONNX: dynamic batch, gates as products with constants, checked against PyTorch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from polar_deploy.errors import ContentError, MachineError
from polar_deploy.gating.network import GATES, gate_key
from polar_deploy.gating.sites import Site
from polar_deploy.workspace import atomic_path

OPSET = 18  # the exporter's own; lower ones are converted, and not always
INPUT, OUTPUT = "input", "logits"
SITE, KIND = "polar_deploy.site", "polar_deploy.kind"  # metadata of a gate's Mul
TOLERANCE = 1e-5  # of the output's scale
_SCOPES = "pkg.torch.onnx.name_scopes"


def export(network: nn.Module, input_size: int, path: Path, sites: Sequence[Site] = ()) -> onnx.ModelProto:
    """Write `network` (images [batch, 3, S, S] to logits [batch, classes]) as ONNX; it is left in evaluation mode.

    Args:
        network: on any device; for a gated network, what `GatedNetwork.static` returns.
        input_size: S, pixels.
        path: the .onnx file, written atomically.
        sites: the sites of the gates in it; each gate's Mul gets its site's name and kind as node metadata.

    Raises:
        ContentError: PyTorch cannot export this network, or a gate did not come through as one Mul.
    """
    device = next(network.parameters()).device
    network = network.to("cpu").eval()
    # Batch 2: a batch of 1 would be baked in. The exporter prints its progress to stdout, which belongs to results.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                network,
                (torch.zeros(2, 3, input_size, input_size),),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many types of its own
            raise ContentError(
                f"PyTorch cannot export {type(network).__name__}: {type(error).__name__}: {_first_line(error, said)}",
                "replace the operator it names, or write the layer with plain modules",
            ) from error
        finally:
            network.to(device)
        assert program is not None
        model: onnx.ModelProto = program.model_proto
    _name_gates(model, sites)
    with atomic_path(path) as temporary:
        onnx.save(model, temporary)
    return model


def check(path: Path, inputs: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference between ONNX Runtime on `path` and `expected`, as a share of the output's scale.

    Args:
        inputs: float32 [N, 3, S, S].
        expected: float32 [N, classes], from PyTorch.

    Raises:
        ContentError: the difference is above `TOLERANCE`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(
            "onnxruntime is not installed, so no export can be checked", "install the extra 'ort'"
        ) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.run([OUTPUT], {INPUT: inputs})
    difference = float(np.abs(given - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise ContentError(
            f"{path} differs from PyTorch by {difference:.2g} of the output's scale (allowed: {TOLERANCE})",
            "report this network: its export to ONNX is not faithful",
        )
    return difference


@torch.no_grad()
def outputs(network: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Logits float32 [N, classes] of `network` on the CPU in evaluation mode, for float32 [N, 3, S, S]."""
    device = next(network.parameters()).device
    logits: np.ndarray = network.to("cpu").eval()(torch.from_numpy(inputs)).numpy()
    network.to(device)
    return logits


def write_reference(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as .npz, atomically."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def _name_gates(model: onnx.ModelProto, sites: Sequence[Site]) -> None:
    """Mark each gate's Mul with its site; drop the exporter's notes, which hold paths of this machine.

    Gates are found by the scope of the node: initializers that are equal byte for byte have been merged under one
    name, so that a constant's name says nothing about its layer.
    """
    by_scope = {f"{GATES}.{gate_key(site)}": site for site in sites}
    found = []
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
        site = next((by_scope[s] for s in by_scope if f"'{s}'" in scopes), None)
        del node.metadata_props[:]
        if site is not None and node.op_type == "Mul":
            node.metadata_props.add(key=SITE, value=site.name)
            node.metadata_props.add(key=KIND, value=site.kind)
            found.append(site.name)
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    if sorted(found) != sorted(site.name for site in sites):
        lost = sorted({site.name for site in sites} ^ set(found)) or found
        raise ContentError(
            f"the export lost or doubled the gates of {', '.join(lost[:3])}",
            "report this network: each gate must come through the exporter as one Mul",
        )


def _first_line(error: Exception, said: io.StringIO) -> str:
    text = str(error).strip() or said.getvalue().strip()
    return text.splitlines()[0] if text else "no message"
