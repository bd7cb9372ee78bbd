"""INT8: which nodes are rounded, calibrated on training images, and proven to be still the network.

Layers that INT8 hurts stay wider, as do those that the runtime's integer kernels compute otherwise than the graph says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from polar_deploy import onnx_files
from polar_deploy.documents.build import WiderLayer
from polar_deploy.errors import ContentError
from polar_deploy.precision import calibration, fp16, graph, layers, proof, qdq, saturation, sensitivity
from polar_deploy.precision.proof import Kernels, Reference
from polar_deploy.precision.qdq import ORT, SCHEMES, TRT, Scheme
from polar_deploy.precision.shield import shield
from polar_deploy.tensors import Arrays, count

if TYPE_CHECKING:
    from polar_deploy.config import Build

__all__ = ["ORT", "SCHEMES", "TRT", "Scheme", "to_int8"]


def to_int8(
    model: onnx.ModelProto,
    path: Path,
    scheme: Scheme,
    options: Build,
    samples: Arrays | None,
    kernels: Kernels | None = None,
) -> tuple[onnx.ModelProto, list[WiderLayer], dict[str, Any]]:
    """Write INT8 into a graph: the graph, the nodes that stay wider, and how it was calibrated.

    Args:
        model: FP32, as `graph.load` gives it.
        path: its file, for messages.
        scheme: `ORT` or `TRT`.
        options: `max_layer_error`, `calibration`, `reduce_range` and `io_dtype` are read.
        samples: inputs of training samples, by name.
        kernels: of the runtime that the graph is for, if they can be asked here.

    Raises:
        ContentError: no samples, or not such as the network takes; no layer that INT8 suits.
    """
    samples = calibration.require_samples(samples, model, path)
    model = layers.plain(graph.at_least(graph.folded(model, path), scheme.opset))
    reduce = options.reduce_range
    if reduce is None:
        reduce = kernels is not None and saturation.saturates(kernels, scheme)
    if reduce:
        scheme = replace(scheme, largest=saturation.LARGEST)
    writer = _Writer(model, path, scheme, options, samples, kernels)
    typed = writer.run()
    kept = writer.kept
    if scheme.wider == "fp16":
        bound = proof.int8_bound(options.max_layer_error)
        typed, wider = fp16.to_fp16(
            graph.inferred(typed), path, writer.reference, keep_io_types=options.io_dtype == "fp32", bound=bound
        )
        kept = [*kept, *wider]
    return graph.inferred(typed), kept, _described(options, count(samples), reduce)


class _Writer:
    """Chooses what is rounded in one network, and proves the result.

    Attributes:
        kept: what stays wider, as build.json lists it.
        reference: what the network gives in FP32.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        scheme: Scheme,
        options: Build,
        samples: Arrays,
        kernels: Kernels | None,
    ) -> None:
        self.model, self.path, self.scheme, self.options, self.kernels = model, path, scheme, options, kernels
        self.nodes = {node.name: node for node in model.graph.node}
        self.layers, self.kept = self._layers()
        sums = {} if scheme.outputs else _residual_sums(model, self.layers)
        self.chosen = [*self.layers, *_passing(model, scheme.between), *(self.nodes[name] for name in sums)]
        self.between = {name: tensor for name, (tensor, _) in sums.items()}
        self.main = {name: layer for name, (_, layer) in sums.items()}
        tensors = qdq.activations(model, self.chosen, scheme)
        required = {*qdq.activations(model, self.layers, scheme)}
        self.ranges = calibration.ranges(model, tensors, samples, options.calibration, path, required)
        self.reference = Reference.of(model, proof.spread(samples), path)

    def run(self) -> onnx.ModelProto:
        """The graph with Q/DQ pairs."""
        wide = self._hurt()
        typed = self._quantised(wide)
        # Kernels that round a few numbers to another step change a network no more than all its rounding does.
        allowed = max(proof.FUSED, self.reference.error(typed))
        if self.kernels is not None and self._disagreement(typed, self.kernels) > allowed:
            found = self._misread(wide, allowed, self.kernels)
            wide, typed = [*wide, *found], self._quantised([*wide, *found])
        if all(layer.name in wide for layer in self.layers):
            raise self._nothing_left()
        return typed

    def _quantised(self, wide: Collection[str]) -> onnx.ModelProto:
        plain = {*wide, *(name for name, layer in self.main.items() if layer in wide)}
        chosen = [node for node in self.chosen if node.name not in plain]
        typed = qdq.quantised(self.model, chosen, self.ranges, self.scheme, self.between, plain)
        if self.scheme.rounds_weights:
            shield(typed)
        return typed

    def _hurt(self) -> list[str]:
        """The nodes that INT8 hurts: each one that does so alone, and the worst of the others if all do together.

        Where all together lose less than one may, there is no need to look at each.
        """
        typed, most = self._quantised(()), self.options.max_layer_error
        whole = self.reference.error(typed)
        if whole <= most:
            return []
        errors = sensitivity.errors(self.model, typed, self.reference)
        order = sorted(errors, key=lambda name: -errors[name])
        first, last = sum(errors[name] > most for name in order), len(order)
        if all(layer.name in order[:first] for layer in self.layers):
            raise self._nothing_left(errors)
        bound = proof.int8_bound(most)
        while first < last:  # the fewest of the worst
            middle = (first + last) // 2
            within = self.reference.error(self._quantised(order[:middle])) <= bound
            first, last = (first, middle) if within else (middle + 1, last)
        why = "in INT8 it alone moves an output by more than build.max_layer_error allows"
        together = f"in INT8 all nodes together move an output by {whole:.2g} of its size"
        for name in order[:first]:
            reason = why if errors[name] > most else together
            self.kept.append(proof.entry(self.nodes[name], self.scheme.wider, reason, errors[name]))
        return order[:first]

    def _disagreement(self, typed: onnx.ModelProto, kernels: Kernels) -> float:
        """How far the runtime's integer kernels are off from the graph as it is written."""
        return Reference.of(typed, self.reference.samples, self.path).error(typed, kernels)

    def _misread(self, wide: Sequence[str], allowed: float, kernels: Kernels) -> list[str]:
        """The nodes that the runtime's integer kernels compute otherwise than the graph says."""

        def holds(names: Sequence[str]) -> bool:
            return self._disagreement(self._quantised([*wide, *names]), kernels) <= allowed

        candidates = [node.name for node in self.chosen if node.name not in wide]
        try:
            found = proof.culprits(candidates, holds)
        except LookupError:
            raise ContentError(
                f"{self.path}: {kernels.library}'s integer kernels move the outputs by more than {allowed:.2g} of "
                "their size from what the graph says, whichever nodes stay FP32",
                "choose a float target for this network, and report it",
            ) from None
        why = f"{kernels.library}'s integer kernel computes something else"
        self.kept += [proof.entry(self.nodes[name], self.scheme.wider, why) for name in found]
        return found

    def _layers(self) -> tuple[list[onnx.NodeProto], list[WiderLayer]]:
        """The layers with constants of their own: what INT8 makes faster. And those that have no integer kernel."""
        constants, computed = graph.weights(self.model), set(graph.makers(self.model))
        computed |= {value.name for value in self.model.graph.input}
        found, kept = [], []
        for node in self.model.graph.node:
            bias = node.input[2] if len(node.input) > 2 else ""
            weight = constants.get(node.input[1]) if node.op_type in graph.LAYERS else None
            if weight is None or node.input[0] not in computed or (node.op_type == "MatMul" and weight.ndim != 2):
                continue
            if self.scheme.has_kernel(node) and (not bias or bias in constants):
                found.append(node)
            else:
                has_kernel = self.scheme.has_kernel(node)
                why = "its bias is computed" if has_kernel else "there is no integer kernel for it"
                kept.append(proof.entry(node, self.scheme.wider, why))
        if not found:
            raise ContentError(
                f"{self.path} has no layer that INT8 would make faster: no {', '.join(sorted(self.scheme.layers))} "
                "with constant FP32 weights",
                "choose a float target, or export the network in FP32",
            )
        return found, kept

    def _nothing_left(self, errors: Mapping[str, float] | None = None) -> ContentError:
        most = self.options.max_layer_error
        best = min(self.layers, key=lambda layer: (errors or {}).get(layer.name, np.inf))
        alone = f", by {errors[best.name]:.2g} in the best one, {onnx_files.described(best)}" if errors else ""
        return ContentError(
            f"{self.path}: INT8 moves the outputs by more than {most:g} of their size in every layer{alone}",
            "choose a float target, or calibrate on more images or with build.calibration.method: minmax",
        )


def _passing(model: onnx.ModelProto, operators: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of these operators that integers may flow through. What is added or joined has to be an activation."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in operators and not (node.op_type in ("Add", "Concat") and constants.intersection(node.input))
    ]


def _residual_sums(model: onnx.ModelProto, layers: list[onnx.NodeProto]) -> dict[str, tuple[str, str]]:
    """By the name of each sum that a layer feeds alone: the tensor in between, and the layer. Of two, the last one."""
    order = {layer.output[0]: index for index, layer in enumerate(layers)}
    readers = Counter(name for node in model.graph.node for name in node.input)
    constants = {tensor.name for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    found = {}
    for node in model.graph.node:
        alone = [name for name in node.input if name in order and readers[name] == 1 and name not in outputs]
        if node.op_type == "Add" and alone and not constants.intersection(node.input):
            between = max(alone, key=order.__getitem__)
            found[node.name] = (between, layers[order[between]].name)
    return found


def _described(options: Build, images: int, reduce: bool) -> dict[str, Any]:
    settings = options.calibration
    share = {"percentile": settings.percentile} if settings.method == "percentile" else {}
    most = {"max_layer_error": options.max_layer_error, "reduce_range": reduce}
    return {"images": images, "method": settings.method, **share, **most}
