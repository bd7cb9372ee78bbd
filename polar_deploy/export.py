"""PyTorch to ONNX. A network is captured once: its structure, layer by layer as in the model, takes any weights later.

In it, parameters keep their names and every node tells its module; surgery's facts are read off it. In the graph that
is made of it for inference, BatchNormalizations are folded. Neither merges constants that happen to be equal.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from polar_deploy import extras
from polar_deploy.errors import ContentError, first_line, innermost
from polar_deploy.exportable import Exportable, constant_parameters, no_autocast
from polar_deploy.module_names import modules_of, name_nodes
from polar_deploy.ort_session import open_session, session_options, translated
from polar_deploy.surgery import detached
from polar_deploy.surgery.choices import with_values
from polar_deploy.surgery.detached import DetachedModel
from polar_deploy.surgery.folding import FOLDED_ANYWAY
from polar_deploy.tensors import Arrays

if TYPE_CHECKING:
    import onnx_ir

OPSET = 18  # the exporter's own; lower ones are converted, and not always
TOLERANCE = 1e-5  # of the output's scale
OWN = "polar_deploy."  # what keys of this package's notes in a graph begin with


@dataclass(frozen=True)
class Example:
    """Arguments of a network's forward. What the batch axis is, the first one, may be of any length later."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Example | None = None  # as people gave it, where a batch of one was doubled

    @classmethod
    def of(cls, inputs: Any) -> Example:
        """From what people pass: a tensor, a tuple or list of arguments, or a dictionary of named ones.

        A batch of one is doubled, since an exporter takes it for a constant.
        """
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))._doubled()
        return cls(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})._doubled()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order; those inside of lists and dictionaries too."""
        return [leaf for leaf in torch.utils._pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """Length of the first axis of the first tensor."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim() > 0), 1)

    def to(self, device: torch.device) -> Example:
        """The same on a device."""
        return self.mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)

    def ways(self) -> Iterator[tuple[Example, tuple[Any, Any] | None]]:
        """What to try an export with, and the batch axis of each argument as `torch.export` wants it told.

        What is as long as the batch belongs to it; or all of that but vectors, which may be a scale for all samples; or
        nothing does, and the batch is fixed.
        """
        given = self.given or self
        yield self, self._dynamic(1)
        if any(leaf.dim() == 1 and len(leaf) == given.batch for leaf in given.tensors):
            yield given._doubled(2), self._dynamic(2)
        yield given, None

    def _dynamic(self, least: int) -> tuple[Any, Any]:
        size, batch = self.batch, torch.export.Dim("batch")

        def shape(leaf: object) -> object:
            return {0: batch} if isinstance(leaf, Tensor) and leaf.dim() >= least and len(leaf) == size else None

        mapped = self.mapped(shape)
        return mapped.args, mapped.kwargs

    def _doubled(self, least: int = 1) -> Example:
        """With a batch of two where it is one: in all that has `least` axes and more."""
        if self.batch != 1:
            return self

        def doubled(leaf: Any) -> Any:
            is_one = isinstance(leaf, Tensor) and leaf.dim() >= least and len(leaf) == 1
            return torch.cat([leaf, leaf]) if is_one else leaf

        return replace(self.mapped(doubled), given=self)

    def mapped(self, function: Callable[[Any], Any]) -> Example:
        """With a function of every leaf in its place."""
        args, kwargs = torch.utils._pytree.tree_map(function, (self.args, dict(self.kwargs)))
        return Example(args, kwargs, self.given and self.given.mapped(function))


def device_of(network: nn.Module) -> torch.device:
    """Where the parameters of a network lie; the CPU for one without any."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and after it every module's own mode again: some people keep BatchNorms frozen."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a network by all of their names, buffers that no state_dict has among them."""
    parameters = network.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(network.named_buffers(remove_duplicate=False))}


def structure(network: nn.Module, example: Example) -> DetachedModel:
    """The graph of a network in evaluation mode by PyTorch's exporter, with its modules' own layers and weights.

    The network stays as it is. Only arithmetic on shapes is done ahead. The batch is open; a warning says where not.

    Args:
        example: arguments of its forward.

    Raises:
        ContentError: PyTorch cannot export this network.
    """
    return captured(network, example)[0]


def captured(network: nn.Module, example: Example) -> tuple[DetachedModel, Example]:
    """`structure`, and the example that it is of: a batch that has to be fixed is as long as it was given."""
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    program, example = _captured(network, example)
    model = program.model
    optimizer.inline(model)
    parameters = set(model.graph.initializers)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_unless_reading(parameters))
    rewriter.rewrite(
        model,
        [
            rules.no_op_cast_rule,
            rules.no_op_expand_rule,
            rules.no_op_transpose_rule,
            rules.reshape_reshape_rule,
            rules.materialize_reshape_shape_rule,
        ],
    )
    _name_constants(model)
    made = program.model_proto
    _drop_made_biases(made, parameters)
    return detached.detach_weights(made), example


def with_weights(structure: DetachedModel, network: nn.Module) -> DetachedModel:
    """The structure of a network with the weights that it, or another one of its kind, has now.

    Raises:
        ContentError: a weight has another shape than in the structure.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in structure.model.graph.initializer}
    values = {}
    for name, tensor in own_tensors(network).items():
        if name not in shapes:
            continue
        if tuple(tensor.shape) != shapes[name]:
            raise ContentError(
                f"{name} is {list(tensor.shape)} in {type(network).__name__}, {list(shapes[name])} in the structure",
                "change the network first, then put gates on it",
            )
        values[name] = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
    return with_values(structure, values)


def save(structure: DetachedModel, path: Path, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> None:
    """Write a structure as ONNX for inference, atomically; what one file cannot hold, with its weights in PATH.data.

    Constants are folded, and BatchNormalizations in the layers before them. Nodes are named after their modules.

    Args:
        inputs, outputs: names of the graph's tensors; (): the exporter's.

    Raises:
        ContentError: one of its nodes with a note of this package did not stay.
    """
    import onnx_ir
    from onnxscript import optimizer, rewriter

    model = onnx_ir.from_proto(structure.model)
    for name, array in structure.arrays.items():
        model.graph.initializers[name].const_value = onnx_ir.tensor(array, name=name)
    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=False):
            value.name = name
    for _ in range(2):  # what one pass folds the other can rewrite
        optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=_unless_growing)
        rewriter.rewrite(model)
    _name_constants(model)
    graph = onnx_ir.to_proto(model)
    name_nodes(graph.graph, modules_of(structure.model.graph))
    _drop_notes(graph)
    _require_noted(structure.model, graph)
    detached.save(graph, path)


def _name_constants(model: onnx_ir.Model) -> None:
    """Make each constant an initializer, and each name the only one."""
    from onnx_ir.passes import common as passes

    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.NameFixPass()(model)


def _captured(network: nn.Module, example: Example) -> tuple[torch.onnx.ONNXProgram, Example]:
    failures: list[Exception] = []
    for way, dynamic in example.to(device_of(network)).ways():
        try:
            program = _program(network, way, dynamic)
        except Exception as error:  # noqa: BLE001  (the exporter raises many types of its own)
            failures.append(error)
            continue
        if any(value.shape is not None and not value.shape.is_static() for value in program.model.graph.inputs):
            return program, way
        if dynamic is None:  # only then: with another example the exporter may fix the batch, and say nothing
            why = f": {_first_cause(failures[0])}" if failures else ""
            warnings.warn(
                f"the batch of {type(network).__name__} is fixed at {way.batch} in its graph{why}; where its forward "
                "asks for len(x), x.shape[0] leaves it open",
                stacklevel=5,  # whoever makes `Gates`
            )
            return program, way
    raise ContentError(
        f"PyTorch cannot export {type(network).__name__}: {_first_cause(failures[0])}",
        "replace the operator or the control flow it names, or attach to the part of the network that has none",
    ) from failures[0]


def _program(network: nn.Module, example: Example, dynamic: tuple[Any, Any] | None) -> torch.onnx.ONNXProgram:
    """One try of the exporter, which prints its progress to stdout, where results belong, and graphs to stderr."""
    shapes = _shapes(network, dynamic)
    args = example.args if example.kwargs else (*example.args, {})  # it takes a dictionary at the end for named ones
    with contextlib.ExitStack() as stack:
        for state in (
            constant_parameters(network),
            evaluating(network),
            Exportable(),
            no_autocast(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            stack.enter_context(state)
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            args,
            kwargs=dict(example.kwargs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program


def _drop_made_biases(model: onnx.ModelProto, parameters: set[str]) -> None:
    """Take off the zeros that the exporter gives layers without a bias; a parameter that is zero stays."""
    made = {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.name not in parameters and not onnx.numpy_helper.to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) == 3 and node.input[2] in made:
            del node.input[2]


def _drop_notes(model: onnx.ModelProto) -> None:
    """Take the exporter's notes off, which hold paths of this machine."""
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        own = [(entry.key, entry.value) for entry in noted.metadata_props if entry.key.startswith(OWN)]
        del noted.metadata_props[:]
        for key, value in own:
            noted.metadata_props.add(key=key, value=value)


def _require_noted(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Raise ContentError where a node with notes of this package went when constants were folded."""

    def noted(model: onnx.ModelProto) -> list[str]:
        return [node.name for node in model.graph.node if any(note.key.startswith(OWN) for note in node.metadata_props)]

    if len(lost := noted(before)) > len(noted(after)):
        raise ContentError(
            f"the export lost {lost[0]} or another one of {len(lost)} masks",
            "report this network: each mask must come through the exporter as one Mul",
        )


def _shapes(network: nn.Module, shapes: tuple[Any, Any] | None) -> Any:
    """Dynamic shapes of arguments and named arguments as the exporter wants them: by name, those of `*args` as one."""
    if shapes is None:
        return None
    args, kwargs = shapes
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)


def _unless_reading(names: set[str]) -> Any:
    """For the folding of constants: nothing that is computed from one of these, since it would lose its name."""

    def should_fold(node: onnx_ir.Node) -> bool | None:
        return False if any(value is not None and value.name in names for value in node.inputs) else None

    return should_fold


def _unless_growing(node: onnx_ir.Node) -> bool | None:
    """For the folding of constants: what would be larger than it was stays computed, as surgery leaves it too."""

    def elements(values: Sequence[onnx_ir.Value | None]) -> int:
        shapes = (value.shape for value in values if value is not None)
        return sum(math.prod(shape.numpy()) for shape in shapes if shape is not None and shape.is_static())

    return False if elements(node.outputs) > max(elements(node.inputs), FOLDED_ANYWAY) else None


def _first_cause(error: BaseException) -> str:
    """What went wrong at first, and where in the network: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    place = innermost(error, (*torch.__path__, str(Path(__file__).parent), contextlib.__file__))
    where = f" ({place.filename}, line {place.lineno}: {place.line})" if place else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"


def check(path: Path, inputs: Arrays, expected: Arrays) -> float:
    """Largest difference between ONNX Runtime on `path` and `expected`, as a share of each output's scale.

    Args:
        inputs: for the graph's inputs, by name.
        expected: its outputs, by name, from PyTorch.

    Raises:
        ContentError: an output of floats differs by more than `TOLERANCE`, another one at all.
        MachineError: ONNX Runtime is not installed.
    """
    options = session_options(todo=f"install it, {extras.install('ort')}")
    with translated(f"{path}: ONNX Runtime cannot run this export"):
        session = open_session(path, options)
        known = {value.name for value in session.get_inputs()}  # an exporter leaves out what is not read
        found = session.run(list(expected), {name: values for name, values in inputs.items() if name in known})
    worst = 0.0
    for (name, wanted), given in zip(expected.items(), found, strict=True):
        if wanted.dtype.kind != "f":
            difference = 0.0 if np.array_equal(given, wanted) else math.inf
        else:
            scale = float(np.abs(wanted).max()) or 1.0
            difference = float(np.abs(given - wanted).max()) / scale
        if not difference <= TOLERANCE:
            raise ContentError(
                f"{path}: {name} differs from PyTorch by {difference:.2g} of its scale (allowed: {TOLERANCE})",
                "report this network: its export to ONNX is not faithful",
            )
        worst = max(worst, difference)
    return worst
