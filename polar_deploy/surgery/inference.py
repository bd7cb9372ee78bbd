"""Shapes and types of a graph's tensors, and whether the graph is valid: onnx is asked, once for each question."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from polar_deploy.errors import first_line
from polar_deploy.surgery.shape_folding import complete
from polar_deploy.surgery.sizes import (
    BATCHES,
    USUAL,
    Dim,
    Shape,
    Sizes,
    assign,
    candidates,
    fill,
    first_that,
    input_shapes,
    symbols,
    two_probes,
)
from polar_deploy.surgery.standins import OF_RUNTIME, STANDARD, known, stand_ins
from polar_deploy.surgery.validation import EXPORT_AGAIN, SMALL, NotUnderstoodError, not_inferred, opset_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx

Described = tuple[int, Shape | None]  # the element type of a tensor, as ONNX numbers them, and its shape
UNKNOWN: Described = (0, None)
TYPES = 1 << 14  # different types of tensors that are kept in mind; a network has few


class Tensors:
    """What is known of the tensors of a graph, at one choice of input sizes or at two."""

    def __init__(self, first: dict[str, Described], second: dict[str, Described] | None = None) -> None:
        self.first, self.second = first, second
        self._merged: dict[str, Shape | None] = {}

    def shape(self, name: str) -> Shape | None:
        """The shape of a tensor; None: unknown, or not even its rank is the same at both choices of sizes."""
        if self.second is None:
            return self.first.get(name, UNKNOWN)[1]
        if name not in self._merged:
            one, other = self.first.get(name, UNKNOWN)[1], self.second.get(name, UNKNOWN)[1]
            self._merged[name] = one if one == other or one is None else _merge(one, other or ())
        return self._merged[name]

    def kind(self, name: str) -> int:
        """The element type of a tensor; 0: unknown."""
        return self.first.get(name, UNKNOWN)[0]


class Skeleton:
    """A model whose large constants are inputs without data. What was found out about it is kept."""

    def __init__(self, model: onnx.ModelProto, *, strict: bool = True) -> None:
        """Takes a model, be it one whose weights were taken out, see `detached`.

        strict: whether shapes that contradict each other are an error; else they are not known.
        """
        self.model = model
        self.strict = strict
        self.inputs = input_shapes(model)
        self._constants: dict[str, tuple[int, tuple[int, ...]]] = {
            tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer
        }
        self._found: dict[tuple[tuple[str, int], ...], Tensors] = {}

    def check(self, name: str) -> None:
        """Raises NotUnderstoodError where the model is no valid graph (cyclic, duplicate names, wrong attributes).

        What it declares of shapes, be it missing, negative or wrong, is not looked at.
        """
        import onnx

        newest = onnx.defs.onnx_opset_version()
        for opset in self.model.opset_import:
            if opset.domain in STANDARD and opset.version > newest:
                raise NotUnderstoodError(
                    f"{name} wants opset {opset.version}, the installed onnx knows {newest}", "install a newer onnx"
                )
        proto = self._proto
        values = [
            value.type for value in (*proto.graph.input, *proto.graph.output) if value.type.HasField("tensor_type")
        ]
        bare = [kind.tensor_type for kind in values if not kind.tensor_type.HasField("shape")]
        for kind in bare:
            kind.shape.SetInParent()  # the checker insists on one
        try:
            for tensor in self.model.graph.sparse_initializer:
                onnx.checker.check_sparse_tensor(tensor)
            onnx.checker.check_model(proto)
        except (onnx.checker.ValidationError, ValueError) as error:
            raise NotUnderstoodError(f"{name} is not valid ONNX: {first_line(error)}", EXPORT_AGAIN) from error
        finally:
            for kind in bare:
                kind.ClearField("shape")

    @cached_property
    def tensors(self) -> Tensors:
        """The shape and type of every tensor that has one.

        Dynamic dimensions are found out by inference at two input sizes: two tensors share a dimension where both
        sizes agree, which symbols alone do not tell behind a strided convolution.

        Raises:
            NotUnderstoodError: the graph's shapes contradict each other.
        """
        if not any(isinstance(dim, str) for shape in self.inputs.values() for dim in shape):
            return self.at({})
        self._probe_at_once()
        found = two_probes(self.model, self.at)
        return self._infer(self._standing) if found is None else Tensors(found[0].first, found[1].first)

    def at_batch_1(self) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Shape | None]]:
        """The input shapes at batch 1, and that of any tensor; other sizes are 224 where the graph takes that.

        Raises:
            ContentError: no size was found that the graph takes.
        """
        usual = assign(self.inputs, 1, USUAL)
        if (probed := self._probed()) is not None:
            return fill(self.inputs, usual), probed
        found = first_that(self.at, iter([usual])) or first_that(self.at, candidates(self.model, (1,)))
        if found is None:
            found = usual, self.at(usual)  # raises
        return fill(self.inputs, found[0]), found[1].shape

    def at(self, sizes: Sizes) -> Tensors:
        """What is known where the symbols of the inputs have these sizes."""
        key = tuple(sizes.items())
        if key not in self._found:
            self._found[key] = self._infer(self._with_sizes(sizes))
        return self._found[key]

    def _probed(self) -> Callable[[str], Shape | None] | None:
        """Shapes at batch 1 from those at the two batch sizes that were probed; None: more than the batch varies.

        A dimension is a number, or that times the batch; where one is neither, inference at batch 1 says what it is.
        """
        usual = assign(self.inputs, 1)
        first, second = (self._found.get(tuple(assign(self.inputs, batch).items())) for batch in BATCHES)
        if symbols(self.inputs)[1] or first is None or second is None:
            return None

        low, high = first.first, second.first

        def shape(name: str) -> Shape | None:
            one, other = low.get(name, UNKNOWN)[1], high.get(name, UNKNOWN)[1]
            if one == other:
                return one
            if one is None or other is None or len(one) != len(other):
                return self.at(usual).shape(name)
            dims = _per_image(one, other)
            return self.at(usual).shape(name) if None in dims else dims

        return shape

    @cached_property
    def _proto(self) -> onnx.ModelProto:
        import onnx

        model = self.model
        custom = set(not_inferred(model))
        graph = onnx.GraphProto(name=model.graph.name or "graph")
        if OF_RUNTIME.keys().isdisjoint([node.op_type for node in model.graph.node]):  # as in nearly every graph
            graph.node.extend(model.graph.node)
        else:
            opset = opset_of(model)
            graph.node.extend(each for node in model.graph.node for each in known(node, opset))
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
        graph.output.extend(model.graph.output)
        for value in graph.output:  # what is declared may be wrong
            if value.type.HasField("tensor_type") and value.name not in custom:
                value.type.tensor_type.ClearField("shape")
        listed = {value.name for value in model.graph.input}
        graph.input.extend(model.graph.input)
        for value in graph.input:
            for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
                if dim.dim_value < 0:
                    dim.ClearField("dim_value")
        for sparse in model.graph.sparse_initializer:
            name, kind = sparse.values.name, sparse.values.data_type
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, sparse.dims))
        for tensor in model.graph.initializer:
            kind, dims = self._constants[tensor.name]
            if math.prod(dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
                graph.initializer.append(tensor)
            elif tensor.name not in listed:
                graph.input.add(name=tensor.name).type.CopyFrom(_tensor_type(kind, dims))
        graph.value_info.extend(value for value in model.graph.value_info if value.name in custom)
        version = model.ir_version  # from 4 on, initializers need not be inputs
        version = max(version, 4) if version > 0 else version
        skeleton = onnx.ModelProto(ir_version=version, graph=graph)
        skeleton.opset_import.extend(model.opset_import)
        skeleton.functions.extend(model.functions)
        return skeleton

    @cached_property
    def _standing(self) -> onnx.ModelProto:
        """The skeleton with stand-ins where there are any."""
        found = [stand_ins(node) for node in self._proto.graph.node]
        if all(nodes is None for nodes in found):
            return self._proto
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._proto)
        del model.graph.node[:]
        for node, nodes in zip(self._proto.graph.node, found, strict=True):
            model.graph.node.extend(nodes or [node])
        return model

    def _with_sizes(self, sizes: Mapping[str, int | str]) -> onnx.ModelProto:
        """The skeleton with numbers, or one symbol for several, in place of the symbols of the inputs."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._standing)
        for value in model.graph.input[: len(self.model.graph.input)]:
            for dim, symbol in zip(value.type.tensor_type.shape.dim, self.inputs.get(value.name, ()), strict=False):
                if isinstance(symbol, str):
                    _set_size(dim, sizes[symbol])
        for value in (*model.graph.value_info, *model.graph.output):
            for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
                if dim.dim_param in sizes:
                    _set_size(dim, sizes[dim.dim_param])
        return model

    def _probe_at_once(self) -> None:
        """Both probes from one inference, where a batch is all that varies and all that is computed is [batch, sizes].

        Such a shape says the same at every batch, and inference takes onnx as long as all the rest of reading takes.
        """
        import onnx

        leading, others = symbols(self.inputs)
        if others or any(dim in leading for shape in self.inputs.values() for dim in shape[1:]):
            return
        batch = leading[0]
        try:
            types = self._types(self._with_sizes(dict.fromkeys(leading, batch)))[1]
            if not all(_is_batched(data, batch) for data in self._computed(types)):
                return
            for size in BATCHES:
                found = {name: _described(data, batch, size) for name, data in types.items()} | self._constants
                self._check_reshapes(found)
                self._found[tuple(assign(self.inputs, size).items())] = Tensors(found)
        except (onnx.shape_inference.InferenceError, ValueError):
            return  # the probes by themselves tell

    def _infer(self, model: onnx.ModelProto) -> Tensors:
        import onnx

        try:
            graph, types = self._types(model)
            if any(map(_is_open, self._computed(types))):
                found = _completed(model, graph)
            else:
                found = {name: _described(data) for name, data in types.items()} | self._constants
            self._check_reshapes(found)
        except (onnx.shape_inference.InferenceError, ValueError) as error:
            raise NotUnderstoodError(
                f"the model's shapes contradict each other: {first_line(error)}", EXPORT_AGAIN
            ) from error
        return Tensors(found)

    def _types(self, model: onnx.ModelProto) -> tuple[onnx.GraphProto, dict[str, bytes]]:
        """What onnx infers: the graph, and the serialised type of every tensor that is no constant.

        Raises:
            InferenceError, ValueError: shapes contradict each other.
        """
        import onnx

        strict = self.strict
        graph = onnx.shape_inference.infer_shapes(model, check_type=strict, strict_mode=strict, data_prop=True).graph
        # An input may be an output as well, and an output that no node computes has no shape.
        values = (*graph.output, *graph.value_info, *graph.input[: len(self.model.graph.input)])
        return graph, {value.name: value.type.SerializeToString() for value in values}

    def _computed(self, types: dict[str, bytes]) -> set[bytes | None]:
        """The different types of what standard operators compute; None: one is not known."""
        nodes = (node for node in self._standing.graph.node if node.domain in STANDARD)
        return {types.get(name) for node in nodes for name in node.output if name}

    def _check_reshapes(self, found: dict[str, Described]) -> None:
        """Raises ValueError where a Reshape gets another number of elements than it makes: inference lets that pass."""
        for node in self._standing.graph.node:
            if node.op_type == "Reshape" and node.domain in STANDARD:
                known = [found.get(name, UNKNOWN)[1] for name in (node.input[0], node.output[0])]
                sizes: list[Shape] = [(None,) if shape is None else shape for shape in known]
                counts = [math.prod(dim for dim in shape if isinstance(dim, int)) for shape in sizes]
                if all(isinstance(dim, int) for shape in sizes for dim in shape) and counts[0] != counts[1]:
                    raise ValueError(f"Reshape {node.name} makes {list(sizes[1])} of {list(sizes[0])}")


def _completed(model: onnx.ModelProto, inferred: onnx.GraphProto) -> dict[str, Described]:
    """What is known once shape arithmetic is followed that onnx does not follow."""
    import onnx

    types = {value.name: value.type for value in (*inferred.output, *inferred.value_info, *inferred.input)}
    types.update((x.name, onnx.helper.make_tensor_type_proto(x.data_type, x.dims)) for x in inferred.initializer)
    complete(model, types)
    return {name: _described(kind.SerializeToString()) for name, kind in types.items()}


@lru_cache(TYPES)
def _tensor_type(kind: int, dims: tuple[int, ...]) -> onnx.TypeProto:
    """The type of a constant, which nobody may change."""
    import onnx

    return onnx.helper.make_tensor_type_proto(kind, dims)


def _set_size(dim: onnx.TensorShapeProto.Dimension, size: int | str) -> None:
    if isinstance(size, str):
        dim.dim_param = size
    else:
        dim.dim_value = size


@lru_cache(TYPES)
def _described(data: bytes, symbol: str | None = None, size: int = 0) -> Described:
    """A serialised type as element type and shape, with `size` in place of `symbol`."""
    import onnx

    kind = onnx.TypeProto.FromString(data)
    if not kind.HasField("tensor_type"):
        return kind.tensor_type.elem_type, None
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return tensor.elem_type, tuple(size if dim is not None and dim == symbol else dim for dim in dims)


def _is_batched(data: bytes | None, batch: str) -> bool:
    """Whether a serialised type is that of a tensor [batch, sizes]."""
    shape = (None if data is None else _described(data)[1]) or (None,)
    return shape[0] == batch and all(isinstance(dim, int) for dim in shape[1:])


@lru_cache(TYPES)
def _is_open(data: bytes | None) -> bool:
    """Whether something about the shape of a tensor with that serialised type is not known."""
    import onnx

    if data is None:
        return True
    shape = _described(data)[1]
    if shape is None:
        return bool(onnx.TypeProto.FromString(data).HasField("tensor_type"))
    return not all(isinstance(dim, int) for dim in shape)


@lru_cache(TYPES)
def _merge(first: Shape, second: Shape) -> Shape | None:
    """What is known of a shape that was found at two input sizes; None: not even its rank."""

    def dim(a: Dim, b: Dim) -> Dim:
        if isinstance(a, int) and isinstance(b, int):
            return a if a == b else (a, b)
        return a if a == b else None

    if len(first) != len(second):
        return None
    return tuple(dim(a, b) for a, b in zip(first, second, strict=True))


@lru_cache(TYPES)
def _per_image(first: Shape, second: Shape) -> Shape:
    """The shape at batch 1 of what has these at the batch sizes that were probed; None where that is not clear."""
    low, high = BATCHES

    def dim(one: Dim, other: Dim) -> Dim:
        if one == other:
            return one
        known = isinstance(one, int) and isinstance(other, int) and one * high == other * low and one % low == 0
        return one // low if known and isinstance(one, int) else None

    return tuple(dim(a, b) for a, b in zip(first, second, strict=True))
