"""Optional inputs: those for which the graph holds a default, which callers may replace, so that it is no constant."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from polar_deploy.surgery.detached import DetachedModel

SEPARATE = 4  # the first IR version in which an initializer need not be an input


def optional_inputs(model: onnx.ModelProto) -> set[str]:
    """Names of the inputs that have a default.

    None where every initializer is an input: so older exporters list weights, and IR versions before 4 have no choice.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    optional = constants & {value.name for value in model.graph.input}
    return set() if optional == constants or model.ir_version < SEPARATE else optional


def without_defaults(detached: DetachedModel) -> DetachedModel:
    """The model in which optional inputs are inputs like all others."""
    import onnx

    optional = optional_inputs(detached.model)
    if not optional:
        return detached
    model = onnx.ModelProto()
    model.CopyFrom(detached.model)
    del model.graph.initializer[:]
    model.graph.initializer.extend(x for x in detached.model.graph.initializer if x.name not in optional)
    arrays = {name: values for name, values in detached.arrays.items() if name not in optional}
    return replace(detached, model=model, arrays=arrays)


def with_defaults(cut: DetachedModel, given: DetachedModel) -> DetachedModel:
    """The cut model with the defaults that the inputs of the model `given` had."""
    import onnx

    optional = optional_inputs(given.model)
    if not optional:
        return cut
    model = onnx.ModelProto()
    model.CopyFrom(cut.model)
    model.graph.initializer.extend(x for x in given.model.graph.initializer if x.name in optional)
    return replace(cut, model=model, arrays=cut.arrays | {k: v for k, v in given.arrays.items() if k in optional})
