"""Files from strangers, each with the exit code that the command owes them, and the child process that tries them all.

`python -m tests.surgery.hostile FOLDER` runs the command on every folder below FOLDER and prints a line of JSON for
each, at once: a file that kills the interpreter is the one behind the last line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.surgery.graphs import Net, around

HUGE = 1 << 40
REFUSED, DONE, USAGE = 4, 0, 2
MEMORY = 8 << 30  # bytes of address space that the child may take

Change = Callable[[onnx.ModelProto], object]


@dataclass(frozen=True)
class Case:
    """A file, what lies beside it, and how the command has to end.

    says: words that the error names. options: of the command. links: symbolic links beside the file and their targets.
    """

    data: bytes
    code: int = REFUSED
    says: str = ""
    beside: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    source: str = "in.onnx"
    options: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Lays the files into a new folder."""
        folder.mkdir()
        (folder / self.source).write_bytes(self.data)
        for name, data in self.beside.items():
            (folder / name).write_bytes(data)
        for name, target in self.links.items():
            (folder / name).symlink_to(target)


def model() -> onnx.ModelProto:
    """A good file: two convolutions, a gate, a classifier."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 16, "one"), "act"), [1, 2], "gate")
    return net.model(net.head(net.conv(x, 16, "two")))


def changed(*changes: Change) -> bytes:
    """The good file with something changed."""
    graph = model()
    for change in changes:
        change(graph)
    return _bytes(graph)


def _bytes(graph: onnx.ModelProto) -> bytes:
    data: bytes = graph.SerializeToString()
    return data


def weight(graph: onnx.ModelProto, name: str = "two.weight") -> onnx.TensorProto:
    """An initializer of the good file."""
    found: onnx.TensorProto = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    return found


def _node(graph: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in graph.graph.node if node.name == name)
    return found


def _with(operator: str, *extra: Any, opset: int = 17, **attributes: Any) -> bytes:
    """The bytes of a graph around one operator; see `around`."""
    return _bytes(around(operator, *extra, opset=opset, **attributes))


def _ints(*values: int) -> Any:
    return np.array(values, np.int64)


# ---- changes


def _dims(*dims: int, name: str = "two.weight") -> Change:
    def change(graph: onnx.ModelProto) -> None:
        tensor = weight(graph, name)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def _raw(data: bytes | None, *, keep: int | None = None) -> Change:
    def change(graph: onnx.ModelProto) -> None:
        tensor = weight(graph)
        tensor.raw_data = tensor.raw_data[:keep] if data is None else data

    return change


def _external(**entries: str) -> Change:
    def change(graph: onnx.ModelProto) -> None:
        tensor = weight(graph)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def _attribute(node: str, name: str, value: Any) -> Change:
    """Sets or adds an attribute, whatever its type."""

    def change(graph: onnx.ModelProto) -> None:
        attributes = _node(graph, node).attribute
        for old in [a for a in attributes if a.name == name]:
            attributes.remove(old)
        attributes.append(helper.make_attribute(name, value))

    return change


def _input_dims(*dims: int | str) -> Change:
    def change(graph: onnx.ModelProto) -> None:
        graph.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", 1, dims))

    return change


def _values(name: str, values: Any) -> Change:
    return lambda graph: weight(graph, name).CopyFrom(numpy_helper.from_array(values, name))


def _renamed(old: str, new: str) -> Change:
    """Gives a tensor, and the node that makes it, another name."""

    def change(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            node.name = new if node.name == old else node.name
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return change


def _all_called(name: str) -> Change:
    def change(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            node.name = name

    return change


def _reads(node: str, tensor: str) -> Change:
    return lambda graph: _node(graph, node).input.__setitem__(0, tensor)


def _writes(node: str, tensor: str) -> Change:
    return lambda graph: _node(graph, node).output.__setitem__(0, tensor)


def _poisoned(graph: onnx.ModelProto) -> None:
    values = np.array(numpy_helper.to_array(weight(graph, "one.weight")))
    values[3], values[4] = np.nan, np.inf
    _values("one.weight", values)(graph)


def _sparse(graph: onnx.ModelProto) -> None:
    """The weight of `two` as a sparse tensor with three values."""
    dense = weight(graph)
    values = helper.make_tensor("two.weight", 1, [3], [1.0, 2.0, 3.0])
    indices = helper.make_tensor("two.weight.indices", 7, [3], [0, 700, 2000])
    graph.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dense.dims))
    graph.graph.initializer.remove(dense)


def _sparse_outside(graph: onnx.ModelProto) -> None:
    _sparse(graph)
    graph.graph.sparse_initializer[0].indices.CopyFrom(helper.make_tensor("i", 7, [3], [0, 700, HUGE]))


def _function(body: list[onnx.NodeProto], inputs: list[str]) -> Change:
    """Makes `act` a call of a model-local function."""

    def change(graph: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        graph.functions.append(helper.make_function("own", "Act", inputs, ["y"], body, opsets))
        graph.opset_import.append(helper.make_opsetid("own", 1))
        node = _node(graph, "act")
        node.op_type, node.domain = "Act", "own"

    return change


def _if(inner: str, depth: int = 1) -> Change:
    """Makes `act` an If whose bodies read the tensor `inner`, `depth` times one in the other."""

    def change(graph: onnx.ModelProto) -> None:
        node = helper.make_node("Relu", [inner], ["deep0"])
        for level in range(depth):
            body = helper.make_graph(
                [node], f"body{level}", [], [helper.make_tensor_value_info(node.output[0], 1, None)]
            )
            node = helper.make_node("If", ["yes"], [f"deep{level + 1}"], then_branch=body, else_branch=body)
            if level:
                node.attribute[1].g.node[0].CopyFrom(helper.make_node("Identity", ["one"], [f"deep{level}"]))
        node.output[0] = "act"
        graph.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        _node(graph, "act").CopyFrom(node)

    return change


def _nested(depth: int) -> bytes:
    """Bodies inside bodies, too many for protobuf: written by hand."""

    def message(number: int, data: bytes) -> bytes:
        length, size = len(data), b""
        while length > 127:
            size += bytes([length & 127 | 128])
            length >>= 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + data

    graph = b""
    for _ in range(depth):
        graph = message(1, message(4, b"If") + message(5, message(6, graph)))  # node, attribute, its graph
    return b"\x08\x08" + message(7, graph)


def _loop(graph: onnx.ModelProto) -> None:
    """A Loop whose body has too few outputs."""
    body = helper.make_graph(
        [helper.make_node("Relu", ["inner"], ["out"])],
        "body",
        [helper.make_tensor_value_info("i", 7, []), helper.make_tensor_value_info("inner", 1, None)],
        [helper.make_tensor_value_info("out", 1, None)],
    )
    graph.graph.initializer.append(numpy_helper.from_array(np.array(3), "trips"))
    _node(graph, "act").CopyFrom(helper.make_node("Loop", ["trips", "", "one"], ["act"], body=body))


def _appended(*nodes: onnx.NodeProto) -> Change:
    return lambda graph: graph.graph.node.extend(nodes)


def _giant(operator: str, *inputs: Any, **attributes: Any) -> bytes:
    """A valid graph: a branch of giant size from constants alone, reduced to one number that is added to the logits."""

    def change(graph: onnx.ModelProto) -> None:
        names = [f"giant{i}" for i in range(len(inputs))]
        graph.graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(inputs, names, strict=True))
        _node(graph, "logits").output[0] = "before"
        graph.graph.node.extend(
            [
                helper.make_node(operator, names, ["giant"], **attributes),
                helper.make_node("ReduceMax", ["giant"], ["largest"], keepdims=0),
                helper.make_node("Add", ["before", "largest"], ["logits"]),
            ]
        )

    return changed(change)


def chain(length: int) -> bytes:
    """The good file with a long row of Relu."""

    def change(graph: onnx.ModelProto) -> None:
        nodes = list(graph.graph.node)
        del graph.graph.node[:]
        graph.graph.node.extend(nodes[:2])
        for i in range(length):
            graph.graph.node.append(helper.make_node("Neg", [f"neg{i - 1}" if i else "act"], [f"neg{i}"]))
        nodes[2].input[0] = f"neg{length - 1}"
        graph.graph.node.extend(nodes[2:])

    return changed(change)


# ---- the files


def _files() -> dict[str, Case]:
    """Not ONNX at all, or not all of it."""
    good = _bytes(model())
    random = np.random.default_rng(0)
    cases = {
        "empty": Case(b"", says="empty graph"),
        "text": Case(b"this is not a model\n" * 50, says="not an ONNX file"),
        "json": Case(b'{"nodes": []}'),
        "zeros": Case(bytes(4096)),
        "png": Case(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8),
        "pickle": Case(pickle.dumps({"weights": list(range(50))})),
        "zip": Case(b"PK\x03\x04" + bytes(200)),
        "html": Case(b"<!DOCTYPE html><html><body>404</body></html>"),
        "Git LFS pointer": Case(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 102400\n"),
        "random bytes": Case(random.bytes(3000)),
        "deep nesting": Case(_nested(3000)),
        "text format": Case(b"ir_version: oops", source="in.textproto"),
        "JSON format": Case(b'{"irVersion": []}', source="in.json"),
        "ONNX text format": Case(b"< oops", source="in.onnxtxt"),
    }
    cases |= {f"cut at {place}": Case(good[:place]) for place in (1, 2, 10, 100, 500, 2000, len(good) - 700)}
    return cases | {f"cut {left} bytes short": Case(good[:-left]) for left in (1, 2, 5, 20)}


def _structure() -> dict[str, Case]:
    """Graphs that are none."""

    def opset(version: int) -> Case:
        return Case(changed(lambda g: setattr(g.opset_import[0], "version", version)), says=str(version))

    relu = helper.make_node("Relu", ["act"], ["more"])
    itself = helper.make_node("Act", ["x"], ["y"], domain="own")
    return {
        "no nodes": Case(changed(lambda g: g.graph.ClearField("node"))),
        "no outputs": Case(changed(lambda g: g.graph.ClearField("output"))),
        "no graph": Case(changed(lambda g: g.ClearField("graph"))),
        "no opset": Case(changed(lambda g: g.ClearField("opset_import")), says="opset"),
        "opset 0": Case(changed(lambda g: setattr(g.opset_import[0], "version", 0))),
        "opset -1": Case(changed(lambda g: setattr(g.opset_import[0], "version", -1))),
        "opset of the future": opset(4000),
        "opset of 2**62": opset(1 << 62),
        "no ir version": Case(changed(lambda g: g.ClearField("ir_version")), says="ir_version"),
        "ir version of the future": Case(changed(lambda g: setattr(g, "ir_version", 999)), says="999"),
        "ir version -1": Case(changed(lambda g: setattr(g, "ir_version", -1)), DONE),
        "cycle": Case(changed(_reads("one", "two"))),
        "self loop": Case(changed(_reads("act", "act")), says="act"),
        "wrong order": Case(changed(lambda g: g.graph.node.insert(0, g.graph.node.pop())), DONE),
        "duplicate output": Case(changed(_writes("act", "one")), says="one"),
        "output named like an input": Case(changed(_writes("act", "input"))),
        "output named like a weight": Case(changed(_appended(helper.make_node("Relu", ["act"], ["two.weight"])))),
        "duplicate initializer": Case(changed(lambda g: g.graph.initializer.append(weight(g))), DONE),
        "duplicate input": Case(changed(lambda g: g.graph.input.append(g.graph.input[0])), says="input"),
        "duplicate graph output": Case(changed(lambda g: g.graph.output.append(g.graph.output[0])), DONE),
        "missing weight": Case(changed(lambda g: g.graph.initializer.remove(weight(g))), says="two.weight"),
        "missing input": Case(changed(lambda g: g.graph.ClearField("input")), says="input"),
        "input without type": Case(changed(lambda g: g.graph.input[0].ClearField("type")), says="type"),
        "output that nobody makes": Case(changed(lambda g: setattr(g.graph.output[0], "name", "nil")), says="nil"),
        "output of another type": Case(
            changed(lambda g: setattr(g.graph.output[0].type.tensor_type, "elem_type", 7)), says="logits"
        ),
        "output of another rank": Case(
            changed(lambda g: g.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, [1, 2, 3]))),
            DONE,
        ),
        "weight without name": Case(changed(lambda g: setattr(weight(g), "name", ""))),
        "node without type": Case(changed(lambda g: g.graph.node[1].ClearField("op_type"))),
        "node without inputs": Case(changed(lambda g: g.graph.node[0].ClearField("input")), says="Conv"),
        "node without outputs": Case(changed(lambda g: g.graph.node[1].ClearField("output"))),
        "node with ten inputs": Case(changed(lambda g: g.graph.node[1].input.extend(["one"] * 9)), says="act"),
        "unknown operator": Case(changed(lambda g: setattr(g.graph.node[1], "op_type", "NoSuch")), says="NoSuch"),
        "operator of a domain not imported": Case(changed(lambda g: setattr(g.graph.node[1], "domain", "removed"))),
        "sparse weight": Case(changed(_sparse), DONE),
        "sparse weight outside": Case(changed(_sparse_outside)),
        "function": Case(changed(_function([helper.make_node("Relu", ["x"], ["y"])], ["x"])), DONE),
        "function that calls itself": Case(changed(_function([itself], ["x"]))),
        "function that reads nothing known": Case(changed(_function([helper.make_node("Relu", ["z"], ["y"])], ["x"]))),
        "body": Case(changed(_if("one")), DONE),
        "body that reads nothing known": Case(changed(_if("nowhere")), says="nowhere"),
        "bodies twelve deep": Case(changed(_if("one", 12)), DONE),
        "loop body with too few outputs": Case(changed(_loop)),
        "nodes without names": Case(changed(lambda g: [n.ClearField("name") for n in g.graph.node]), DONE),
        "nodes of one name": Case(changed(_all_called("x")), DONE),
        "unused branch": Case(changed(_appended(relu)), DONE),
    }  # fmt: skip


def _tensors() -> dict[str, Case]:
    """Weights and shapes that contradict themselves, and some that are only odd."""
    fits = int(np.prod(weight(model()).dims)) * 4
    nothing = numpy_helper.from_array(np.zeros((0, 3), np.float32), "nothing")
    outside = {"leads.bin": "/etc/passwd"}
    beside = {"w.bin": bytes(fits)}

    def external(code: int = REFUSED, says: str = "two.weight", **entries: str) -> Case:
        return Case(changed(_external(**entries)), code, says, beside=beside, links=outside)

    return {
        "data too short": Case(changed(_raw(None, keep=-40)), says="two.weight"),
        "data too long": Case(changed(_raw(bytes(fits + 4))), says="two.weight"),
        "no data": Case(changed(lambda g: weight(g).ClearField("raw_data")), says="two.weight"),
        "data twice": Case(changed(lambda g: weight(g).float_data.append(1.0)), says="two.weight"),
        "data of another field": Case(
            changed(lambda g: (weight(g).ClearField("raw_data"), weight(g).int64_data.extend([1] * 2304)))
        ),
        "huge dimensions": Case(changed(_dims(HUGE, 16, 3, 3)), says="two.weight"),
        "huge dimensions, little data": Case(changed(_dims(HUGE), _raw(bytes(10))), says="two.weight"),
        "dimensions whose product overflows": Case(changed(_dims(HUGE, HUGE, 3, 3)), says="two.weight"),
        "dimensions whose product overflows to what is there": Case(changed(_dims(1 << 32, 1 << 32, 0, 3))),
        "negative dimension": Case(changed(_dims(-16, 16, 3, 3)), says="two.weight"),
        "two negative dimensions": Case(changed(_dims(-16, -16, 3, 3)), says="two.weight"),
        "unknown data type": Case(changed(lambda g: setattr(weight(g), "data_type", 999)), says="two.weight"),
        "data type 0": Case(changed(lambda g: setattr(weight(g), "data_type", 0)), says="two.weight"),
        "text for numbers": Case(changed(_values("two.weight", np.full((16, 16, 3, 3), "x", object)))),
        "integers for numbers": Case(changed(_values("two.weight", np.ones((16, 16, 3, 3), np.int64)))),
        "doubles for numbers": Case(changed(_values("two.weight", np.ones((16, 16, 3, 3))))),
        "weight of another width": Case(changed(_values("two.weight", np.zeros((16, 9, 3, 3), np.float32)))),
        "weight of another rank": Case(changed(_values("two.weight", np.zeros((16, 16, 3), np.float32)))),
        "weight that is one number": Case(changed(_values("two.weight", np.float32(1)))),
        "bias of another length": Case(changed(_values("two.bias", np.zeros(7, np.float32)))),
        "gate of another length": Case(changed(_values("gate.factor", np.zeros((1, 7, 1, 1), np.float32)))),
        "empty weight": Case(changed(_values("two.weight", np.zeros((0, 16, 3, 3), np.float32)))),
        "unused empty tensor": Case(changed(lambda g: g.graph.initializer.append(nothing)), DONE),
        "input of size 0": Case(changed(_input_dims("batch", 3, 0, 0))),
        "input without channels": Case(changed(_input_dims("batch", 0, 8, 8))),
        "negative input": Case(changed(_input_dims("batch", 3, -8, 8)), DONE),
        "input of another width": Case(changed(_input_dims("batch", 4, 8, 8))),
        "input of another rank": Case(changed(_input_dims("batch", 3))),
        "huge input": Case(changed(_input_dims("batch", 3, HUGE, HUGE))),
        "huge batch": Case(changed(_input_dims(HUGE, 3, 8, 8))),
        "input of rank 40": Case(changed(_input_dims(*(f"d{i}" for i in range(40))))),
        "NaN and Inf": Case(changed(_poisoned), DONE),
        "NaN in a gate": Case(changed(_values("gate.factor", np.full((1, 16, 1, 1), np.nan, np.float32))), DONE),
        "contradicting value_info": Case(
            changed(lambda g: g.graph.value_info.append(helper.make_tensor_value_info("act", 1, [1, 99, 8, 8]))),
            DONE,
        ),
        "contradicting type in value_info": Case(
            changed(lambda g: g.graph.value_info.append(helper.make_tensor_value_info("act", 7, None)))
        ),
        "external data": external(DONE, "", location="w.bin"),
        "external data, part": external(DONE, "", location="w.bin", offset="0", length=str(fits)),
        "external data without place": external(),
        "external data missing": external(location="gone.bin"),
        "external data outside": external(location="../../../../etc/passwd"),
        "external data by a way around": external(location="x/../../w.bin"),
        "external data absolute": external(location="/etc/passwd"),
        "external data behind a link": external(location="leads.bin"),
        "external data in a folder": external(location="."),
        "external data with a NUL": external(location="w.bin\0.png"),
        "external data by URL": external(location="file:///etc/passwd"),
        "external data with a very long name": external(location="w" * 5000),
        "external data at a negative place": external(location="w.bin", offset="-4"),
        "external data behind the end": external(location="w.bin", offset="1000000"),
        "external data too long": external(location="w.bin", length=str(fits + 4)),
        "external data too short": external(location="w.bin", length="4"),
        "external data of negative length": external(location="w.bin", length="-1"),
        "external data at no number": external(location="w.bin", offset="0x10"),
        "external data of huge length": external(location="w.bin", length=str(1 << 62)),
        "external data of huge shape": Case(
            changed(_dims(HUGE, HUGE, 3, 3), _external(location="w.bin")), says="two.weight", beside=beside
        ),
    }


def _attributes() -> dict[str, Case]:
    """Attributes and shape arguments that make no sense."""
    conv = {
        "group 0": ("group", 0),
        "group -1": ("group", -1),
        "group 10**9": ("group", 10**9),
        "group 3": ("group", 3),
        "group as float": ("group", 1.5),
        "group as text": ("group", "x"),
        "pads as text": ("pads", "x"),
        "pads too few": ("pads", [1, 1]),
        "pads too many": ("pads", [1] * 9),
        "pads negative": ("pads", [-9, -9, -9, -9]),
        "pads huge": ("pads", [HUGE] * 4),
        "strides 0": ("strides", [0, 0]),
        "strides negative": ("strides", [-1, 0]),
        "strides too few": ("strides", [1]),
        "dilations 0": ("dilations", [0, 0]),
        "dilations huge": ("dilations", [HUGE, HUGE]),
        "kernel negative": ("kernel_shape", [-3, -3]),
        "kernel unlike the weight": ("kernel_shape", [5, 5]),
        "kernel too short": ("kernel_shape", [3]),
        "auto_pad unknown": ("auto_pad", "SOMETIMES"),
    }
    half, ones = np.array([3, 3]), np.ones(6, np.float32)
    two_values = helper.make_node("Constant", [], ["c"], value_int=1, value_float=1.0)
    cases = {
        f"Conv: {name}": Case(changed(_attribute("two", *value)), says="Pad" if "auto_pad" in name else "two")
        for name, value in conv.items()
    }
    alone = {
        "attribute twice": changed(lambda g: _node(g, "two").attribute.append(helper.make_attribute("group", 1))),
        "attribute unknown": changed(_attribute("two", "colour", "blue")),
        "attribute without type": changed(lambda g: _node(g, "two").attribute[0].ClearField("type")),
        "attribute of two types": changed(lambda g: setattr(_node(g, "two").attribute[0], "type", 4)),
        "attribute that refers to nothing": changed(
            lambda g: setattr(_node(g, "two").attribute[0], "ref_attr_name", "x")
        ),
        "perm with repeats": _with("Transpose", perm=[0, 1, 1, 3]),
        "perm too short": _with("Transpose", perm=[0, 1]),
        "perm negative": _with("Transpose", perm=[0, 1, 2, -1]),
        "axis as text": _with("Softmax", axis="x"),
        "axis out of range": _with("Softmax", axis=9),
        "axis -9": _with("Softmax", axis=-9),
        "Flatten: axis out of range": _with("Flatten", axis=9),
        "Concat: axis out of range": _with("Concat", axis=9),
        "Concat without axis": _with("Concat"),
        "Concat without inputs": _bytes_without_inputs("Concat", axis=1),
        "Concat of different shapes": _with("Concat", np.zeros((1, 2, 3, 3), np.float32), axis=1),
        "Split sizes that do not add up": _with("Split", half + 1, axis=1),
        "Split: negative size": _with("Split", _ints(-1, 7), axis=1),
        "Split into 0": _with("Split", opset=18, axis=1, num_outputs=0),
        "Reshape to another size": _with("Reshape", _ints(0, 7, 8, 8)),
        "Reshape: two -1": _with("Reshape", _ints(-1, -1, 8, 8)),
        "Reshape: -5": _with("Reshape", _ints(0, -5, 8, 8)),
        "Reshape to a huge shape": _with("Reshape", _ints(HUGE, HUGE, HUGE, HUGE)),
        "Reshape to text": _with("Reshape", np.array(["a", "b"], object)),
        "Reshape to a matrix": _with("Reshape", np.ones((2, 2), np.int64)),
        "Gather out of range": _with("Gather", _ints(0, 99), axis=1),
        "Gather far below": _with("Gather", _ints(0, -99), axis=1),
        "Gather: axis out of range": _with("Gather", _ints(0), axis=7),
        "Slice: step 0": _with("Slice", _ints(0), _ints(4), _ints(1), _ints(0)),
        "Slice: axes twice": _with("Slice", _ints(0, 1), _ints(4, 4), _ints(1, 1)),
        "Slice: more ends than starts": _with("Slice", _ints(0), _ints(4, 5), _ints(1)),
        "Slice: axis out of range": _with("Slice", _ints(0), _ints(4), _ints(9)),
        "Slice to nothing": _with("Slice", _ints(4), _ints(4), _ints(1)),
        "Squeeze of another size": _with("Squeeze", _ints(1)),
        "Unsqueeze: axes twice": _with("Unsqueeze", _ints(2, 2)),
        "Unsqueeze: axis out of range": _with("Unsqueeze", _ints(99)),
        "Pad: too few": _with("Pad", _ints(1, 1)),
        "Pad: below nothing": _with("Pad", _ints(0, -9, 0, 0, 0, 0, 0, 0)),
        "Pad: mode unknown": _with("Pad", _ints(0, 0, 1, 1, 0, 0, 1, 1), mode="sometimes"),
        "Pad: giant": _with("Pad", _ints(0, 0, HUGE, HUGE, 0, 0, HUGE, HUGE)),
        "Pad: giant in channels": _with("Pad", _ints(0, HUGE, 0, 0, 0, 0, 0, 0)),
        "Expand: giant": _with("Expand", _ints(HUGE, 6, 8, 8)),
        "Expand: other sizes": _with("Expand", _ints(1, 7, 8, 8)),
        "Tile: giant": _with("Tile", _ints(1, HUGE, 1, 1)),
        "Tile: negative": _with("Tile", _ints(1, -1, 1, 1)),
        "Resize: giant": _with("Resize", np.zeros(0, np.float32), np.array([1, 1, 1e9, 1e9], np.float32)),
        "Resize: scale 0": _with("Resize", np.zeros(0, np.float32), np.array([1, 1, 0, 0], np.float32)),
        "Resize: NaN": _with("Resize", np.zeros(0, np.float32), np.array([1, 1, np.nan, 1], np.float32)),
        "TopK: giant": _with("TopK", _ints(HUGE), axis=1),
        "DepthToSpace: block 0": _with("DepthToSpace", blocksize=0),
        "DepthToSpace: block too large": _with("DepthToSpace", blocksize=5),
        "SpaceToDepth: block 0": _with("SpaceToDepth", blocksize=0),
        "MaxPool: kernel 0": _with("MaxPool", kernel_shape=[0, 0]),
        "MaxPool: kernel giant": _with("MaxPool", kernel_shape=[HUGE, HUGE]),
        "MaxPool without kernel": _with("MaxPool"),
        "Cast to nothing": _with("Cast", to=999),
        "Gemm of images": _with("Gemm", np.ones((6, 6), np.float32)),
        "MatMul of other sizes": _with("MatMul", np.ones((7, 6), np.float32)),
        "BatchNormalization of another width": _with("BatchNormalization", *[np.ones(7, np.float32)] * 4),
        "InstanceNormalization of another width": _with("InstanceNormalization", *[np.ones(7, np.float32)] * 2),
        "GroupNormalization: group 0": _with("GroupNormalization", ones, ones, opset=21, num_groups=0),
        "PRelu of another width": _with("PRelu", np.ones((7, 1, 1), np.float32)),
        "Clip between vectors": _with("Clip", np.zeros(3, np.float32), np.ones(3, np.float32)),
        "Einsum of nonsense": _with("Einsum", equation="a,,b->->"),
        "ReduceMean: axis out of range": _with("ReduceMean", axes=[9]),
        "Constant without value": changed(_appended(helper.make_node("Constant", [], ["c"]))),
        "Constant with two values": changed(_appended(two_values)),
    }  # fmt: skip
    run_anyway = ("attribute that refers to nothing", "Constant with two values")  # by ONNX Runtime
    return cases | {name: Case(data, DONE if name in run_anyway else REFUSED) for name, data in alone.items()}


def _bytes_without_inputs(operator: str, **attributes: Any) -> bytes:
    return changed(_appended(helper.make_node(operator, [], ["c"], **attributes)))


def _valid_giants() -> dict[str, Case]:
    """Valid graphs that ask for more memory than there is: surgery itself must not take it, only the proof may fail."""
    number = np.ones(1, np.float32)
    giants = {
        "ConstantOfShape": _giant("ConstantOfShape", _ints(HUGE)),
        "Expand": _giant("Expand", number, _ints(HUGE)),
        "Tile": _giant("Tile", number, _ints(HUGE)),
        "Pad": _giant("Pad", number, _ints(0, HUGE)),
    }
    proofs = {f"giant {name}": Case(data) for name, data in giants.items()}
    return proofs | {
        f"giant {name}, no proof": Case(data, DONE, options=("--no-verify",)) for name, data in giants.items()
    }


def _names() -> dict[str, Case]:
    """Names that are no text, and names that are only odd."""
    odd = {
        "newline": "two\nlines\r\n",
        "path": "../../../../tmp/x",
        "markup": "[/red][bold]",
        "escape": "\x1b[2J\x1b]0;x\x07",
        "quote": "\"'\\{}%s",
        "emoji": "\N{PILE OF POO}\N{COMBINING ACUTE ACCENT}",
        "blank": " ",
    }
    texts: dict[str, Change] = {
        "metadata": lambda g: g.metadata_props.add(key="mark", value="mark"),
        "metadata of a node": lambda g: g.graph.node[0].metadata_props.add(key="mark", value="mark"),
        "description": lambda g: setattr(g.graph.node[0], "doc_string", "mark"),
        "domain": lambda g: g.opset_import.add(domain="mark", version=1),
        "name in value_info": lambda g: g.graph.value_info.append(helper.make_tensor_value_info("mark", 1, None)),
    }
    cases = {f"name with {kind}": Case(changed(_renamed("two", name)), DONE) for kind, name in odd.items()}
    return cases | {
        "name that is no text": Case(_bytes(model()).replace(b"act", b"\xe4ct")),
        "graph name that is no text": Case(_bytes(model()).replace(b"net", b"\xff\xfet")),
        "symbol that is no text": Case(_bytes(model()).replace(b"batch", b"b\xe4tch")),
        "function that is no text": Case(_no_text(_function_of_no_text)),
        **{f"{place} that is no text": Case(_no_text(change)) for place, change in texts.items()},
        "long name": Case(changed(_renamed("two", "x" * 100_000)), DONE),
        "long row of nodes": Case(chain(3000), DONE),
    }


def _function_of_no_text(graph: onnx.ModelProto) -> None:
    graph.opset_import.add(domain="own", version=1)
    relu = helper.make_node("Relu", ["x"], ["y"])
    graph.functions.append(helper.make_function("own", "mark", ["x"], ["y"], [relu], [helper.make_opsetid("", 17)]))


def _no_text(change: Change) -> bytes:
    """The good file with `mark` somewhere, in which one byte is changed then: protobuf cannot write such a file."""
    return changed(change).replace(b"mark", b"m\xe4rk")


@cache
def cases() -> dict[str, Case]:
    """All files by what is odd about them."""
    return {**_files(), **_structure(), **_tensors(), **_attributes(), **_valid_giants(), **_names()}


def damaged(count: int) -> dict[str, Case]:
    """A small file with a few bytes changed: refused, or a graph that still computes the same (code -1: either)."""
    random = np.random.default_rng(0)
    net = Net(size=4)
    x = net.gate(net.relu(net.conv("input", 4, "one", kernel=1), "act"), [1, 2], "gate")
    good = _bytes(net.model(net.head(net.conv(net.bn(x, "norm"), 3, "two"), classes=2)))
    found = {}
    for number in range(count):
        data = bytearray(good)
        for place in random.integers(0, len(data), random.integers(1, 5)):
            data[place] = random.integers(0, 256)
        found[f"damage {number}"] = Case(bytes(data), -1)
    return found


# ---- the child


def lay(folder: Path, files: dict[str, Case]) -> None:
    """Writes every case into a numbered folder of its own."""
    for number, case in enumerate(files.values()):
        case.write(folder / f"{number:04}")
        (folder / f"{number:04}.json").write_text(json.dumps([case.source, *case.options]))


def _run(folder: Path, options: list[str]) -> dict[str, Any]:
    from polar_deploy.surgery.__main__ import main

    source, *others = options
    before = {path.name for path in folder.iterdir()}
    start, memory = time.process_time(), _peak()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(folder / source), str(folder / "out.onnx"), "--report", str(folder / "r.json"), *others])
        except BaseException:  # noqa: BLE001 - this is what the tests are about
            code = 1
            traceback.print_exc()
    return {
        "number": int(folder.name),
        "code": code,
        "out": out.getvalue()[:2000],
        "err": err.getvalue()[-3000:],
        "left": sorted({path.name for path in folder.iterdir()} - before),
        "seconds": round(time.process_time() - start, 2),
        "megabytes": _peak() - memory,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(folder: Path) -> int:
    """Runs the command on everything in `folder`, one after the other in this process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print belongs to nobody's answer
    for options in sorted(folder.glob("*.json")):
        answer = _run(folder / options.stem, json.loads(options.read_text()))
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
