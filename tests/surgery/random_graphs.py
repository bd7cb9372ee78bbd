"""Random graphs of every operator that surgery handles, with random gates: a hypothesis strategy.

What can be added to a graph stands in `tests.surgery.entries`, an entry an operator. Numbers stay tame: each
entry gives roughly what it takes, so that rounding stays far below the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from tests.surgery.graphs import Array, Net, newest_opset

T = TypeVar("T")
OPSETS = (28, 24, 24, 24, 23, 21, 21, 20, 18, 17, 16, 14, 13, 12, 11, 10, 9)  # the more operators, the more often
SHOWN = 12  # elements of a constant that a counter-example shows


class RandomGraph(Net):
    """A graph that grows by one operator after the other; images are [batch, width, *space] everywhere in between."""

    def __init__(self, draw: Callable[..., Any], opset: int, *, fixed: bool = True) -> None:
        """fixed: height and width are numbers; else they are symbols."""
        self.draw = draw
        side = self.pick((4, 6, 8)) if fixed else 8
        super().__init__(self.pick((2, 3, 4)), side, opset)
        self.space: dict[str, tuple[int, int]] = {"input": (side, side)}
        self.inline = self.chance(2)  # constants are Constant nodes
        self.gates: list[str] = []  # constants that gates share
        self.scales: dict[str, list[Array]] = {}  # of quantized tensors: scale and zero point
        self.weights: dict[tuple[int, ...], list[str]] = {}  # of convolutions, by shape
        if not fixed:
            del self.inputs[0].type.tensor_type.shape.dim[2:]
            for name in ("height", "width"):
                self.inputs[0].type.tensor_type.shape.dim.add().dim_param = name
        self.images = [self.conv_of("input", self.pick((4, 6, 8)))]

    # ---- choices

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; counter-examples shrink to the first."""
        chosen: T = self.draw(st.sampled_from(options))
        return chosen

    def chance(self, tenths: int) -> bool:
        """True in so many of ten cases; counter-examples shrink to False."""
        return bool(self.draw(st.integers(0, 9)) >= 10 - tenths)

    def closed(self, width: int) -> list[int]:
        """Channels to close: mostly some, sometimes all."""
        if self.chance(1):
            return list(range(width))
        mask: int = self.draw(st.integers(1, 2**width - 1))
        return [i for i in range(width) if mask >> i & 1]

    def image(self) -> str:
        """A tensor to go on from: mostly the newest, so that graphs are deep."""
        return self.images[-1] if not self.chance(3) else self.pick(self.images[::-1])

    # ---- tensors

    def op(
        self,
        operator: str,
        *inputs: str | Array,
        width: int | None = None,
        space: tuple[int, int] | None = None,
        **attributes: Any,
    ) -> str:
        """Adds a node; arrays become constants. `width` and `space` say what differs from the first input."""
        return self.ops(operator, *inputs, widths=[width], space=space, **attributes)[0]

    def ops(
        self,
        operator: str,
        *inputs: str | Array,
        widths: Sequence[int | None],
        space: tuple[int, int] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """`op` with several outputs, one a width."""
        tensors = [tensor if isinstance(tensor, str) else self.value(tensor) for tensor in inputs]
        name = f"{operator.lower()}{len(self.nodes)}"
        names = [name, *(f"{name}.{i}" for i in range(1, len(widths)))]
        self.nodes.append(helper.make_node(operator, tensors, names, name=name, **attributes))
        source = next((tensor for tensor in tensors if tensor in self.width), "input")
        for result, own in zip(names, widths, strict=True):
            self.width[result] = own if own is not None else self.width[source]
            self.space[result] = space if space is not None else self.space.get(source, (1, 1))
        return names

    def value(self, values: Array, *, inline: bool | None = None) -> str:
        """A constant: an initializer or a Constant node, as the graph prefers."""
        name = f"constant{len(self.constants) + len(self.nodes)}"
        if not (self.inline if inline is None else inline):
            return self.constant(name, values)
        tensor = numpy_helper.from_array(np.asarray(values), name)
        self.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
        return name

    def normal(self, *shape: int) -> Array:
        """Random numbers, none of them zero."""
        return self.random.normal(size=shape).astype(np.float32)

    def around_one(self, *shape: int) -> Array:
        """Random numbers between 0.5 and 1.5."""
        return self.random.uniform(0.5, 1.5, shape).astype(np.float32)

    def per_channel(self, width: int) -> tuple[int, ...]:
        """A shape that broadcasts along the channels of an image."""
        return self.pick(((1, width, 1, 1), (width, 1, 1)))

    def axes(self, operator: str, x: str, axes: Sequence[int], since: int, **attributes: Any) -> str:
        """An operator whose list of axes is an input from opset `since` on, and an attribute before."""
        if self.opset >= since:
            return self.op(operator, x, np.array(axes, np.int64), **attributes)
        return self.op(operator, x, axes=list(axes), **attributes)

    # ---- parts of networks

    def conv_of(self, x: str, width: int, kernel: int = 1, group: int = 1, **attributes: Any) -> str:
        """A convolution, sometimes without bias, with zero filters, or with the weights of another."""
        key = (self.width[x] // group, kernel, group, width)
        known = self.weights.setdefault(key, [])
        if known and self.chance(2):
            weight = self.pick(known)
        else:
            values = self.normal(width, key[0], kernel, kernel) / np.sqrt(key[0] * kernel**2, dtype=np.float32)
            if self.chance(1):
                values[self.closed(width)] = 0
            weight = self.value(values)
            known.append(weight)
        bias = [] if self.chance(3) else [self.value(self.normal(width))]
        attributes.setdefault("pads", [kernel // 2] * 4)
        return self.op("Conv", x, weight, *bias, width=width, group=group, **attributes)

    def matrix(self, inputs: int, outputs: int) -> Array:
        """Weights of a linear layer, some units closed now and then."""
        values = self.normal(inputs, outputs) / np.sqrt(inputs, dtype=np.float32)
        if self.chance(1):
            values[:, self.closed(outputs)] = 0
        return np.asarray(values)

    def gemm_of(self, x: str, inputs: int, width: int) -> str:
        """A linear layer in one of the ways that Gemm writes it."""
        weight, bias = self.matrix(inputs, width), self.normal(*self.pick(((width,), (1, width), (1,))))
        transposed = self.chance(5)
        scales: dict[str, Any] = self.pick(({}, {"alpha": 0.5}, {"alpha": 2.0, "beta": 0.5}))
        return self.op(
            "Gemm", x, weight.T.copy() if transposed else weight, bias, width=width, transB=int(transposed), **scales
        )

    def act(self, x: str) -> str:
        """An activation that every opset has."""
        return self.op(self.pick(("Relu", "Sigmoid", "Tanh", "LeakyRelu")), x)

    def partner(self, x: str, *, width: int | None = None) -> str:
        """Another tensor of the size of `x`, and its width unless that is given."""
        width = self.width[x] if width is None else width
        found = [y for y in self.images if y != x and (self.width[y], self.space[y]) == (width, self.space[x])]
        return self.pick(found) if found and self.chance(6) else self.conv_of(x, width)

    def gated(self, x: str) -> str:
        """A gate on an image: zeros, ones, and sometimes other values, in one of its many forms."""
        width = self.width[x]
        values = np.ones(width, np.float32)
        values[self.closed(width)] = 0
        if self.chance(2):
            values *= self.around_one(width)
        return GATES[self.pick(tuple(GATES))](self, x, values.reshape(self.per_channel(width)))

    def tokens(self, x: str) -> str:
        """An image to [batch, positions, channels]."""
        height, width = self.space[x]
        if self.chance(5):
            flat = self.op("Reshape", x, np.array([0, self.width[x], height * width]))
            return self.op("Transpose", flat, perm=[0, 2, 1])
        last = self.op("Transpose", x, perm=[0, 2, 3, 1])
        return self.op("Reshape", last, np.array([0, height * width, self.width[x]]))

    def untokens(self, tokens: str, width: int, space: tuple[int, int]) -> str:
        """The way back of `tokens`."""
        if self.chance(5):
            channels = self.op("Transpose", tokens, perm=[0, 2, 1])
            return self.op("Reshape", channels, np.array([0, width, *space]), width=width, space=space)
        last = self.op("Reshape", tokens, np.array([0, *space, width]))
        return self.op("Transpose", last, perm=[0, 3, 1, 2], width=width, space=space)

    def vector(self, x: str) -> str:
        """Global pooling: [batch, width]."""
        return self.op("Flatten", self.op("GlobalAveragePool", x, space=(1, 1)), axis=1)

    def as_image(self, vector: str, width: int) -> str:
        """[batch, width] to [batch, width, 1, 1]."""
        image = self.axes("Unsqueeze", vector, [2, 3], 13)
        self.width[image], self.space[image] = width, (1, 1)
        return image

    def merge(self, x: str, small: str) -> str:
        """Joins an image with one of height and width 1, of the same width or of width 1."""
        if self.chance(3):
            return self.op("Add", x, small)
        factor = self.op("Sigmoid", small)
        return self.op(
            "Mul", *((factor, x) if self.chance(3) else (x, factor)), width=self.width[x], space=self.space[x]
        )


def _cast_gate(graph: RandomGraph, x: str, values: Array) -> str:
    mask = graph.op("Cast", values != 0, to=onnx.TensorProto.FLOAT)
    return graph.op("Mul", x, mask, width=graph.width[x], space=graph.space[x])


def _where_gate(graph: RandomGraph, x: str, values: Array) -> str:
    zero = np.zeros(graph.pick(((), (1,), (1, 1, 1, 1))), np.float32)
    sides = (values != 0, x, zero) if graph.chance(5) else (values == 0, zero, x)
    return graph.op("Where", *sides, width=graph.width[x], space=graph.space[x])


def _unsqueezed_gate(graph: RandomGraph, x: str, values: Array) -> str:
    factor = graph.axes("Unsqueeze", graph.value(values.reshape(-1)), [1, 2], 13)
    return graph.op("Mul", x, factor)


def _chained_gate(graph: RandomGraph, x: str, values: Array) -> str:
    factor = graph.op("Identity", graph.value(values, inline=True))
    return graph.op("Mul", factor, x, width=graph.width[x], space=graph.space[x])


def _shared_gate(graph: RandomGraph, x: str, values: Array) -> str:
    """With the constant of another gate, where one fits: exporters merge equal ones."""
    shape = (1, graph.width[x], 1, 1)
    known = {tensor.name: tuple(tensor.dims) for tensor in graph.constants}
    found = [name for name in graph.gates if known[name] == shape]
    if not found:
        found = [graph.constant(f"shared{len(graph.gates)}", values.reshape(shape))]
        graph.gates += found
    return graph.op("Mul", x, graph.pick(found))


GATES: dict[str, Callable[[RandomGraph, str, Array], str]] = {
    "right": lambda graph, x, values: graph.op("Mul", x, values),
    "left": lambda graph, x, values: graph.op("Mul", values, x, width=graph.width[x], space=graph.space[x]),
    "cast": _cast_gate,
    "where": _where_gate,
    "unsqueezed": _unsqueezed_gate,
    "chained": _chained_gate,
    "shared": _shared_gate,
}


@cache
def opsets() -> list[int]:
    """OPSETS as far as this ONNX Runtime goes."""
    newest = newest_opset()
    assert newest >= 20
    return [opset for opset in OPSETS if opset <= newest]


@st.composite
def random_graphs(draw: Callable[..., Any], order: Sequence[str]) -> onnx.ModelProto:
    """A model: some entries of the table in a row, gates in between, a classifier or a convolution at the end.

    order: the names of the entries; hypothesis draws the first ones more often, and shrinks to them.
    """
    from tests.surgery.entries import ENTRIES

    fixed = draw(st.integers(0, 19)) < 19
    graph = RandomGraph(draw, draw(st.sampled_from(opsets())), fixed=fixed)
    usable = []
    for name in order:
        entry = ENTRIES[name]
        there = [entry.since <= opset <= entry.until for opset in opsets()]
        if entry.since <= graph.opset <= entry.until and (fixed or not entry.fixed):
            usable += [name] * round(len(there) / sum(there))  # those of few opsets the more often where there are any
    draw(st.lists(_grown(graph, ["", *usable]), min_size=3, max_size=12 if fixed else 4))
    return _finished(graph)


@st.composite
def _grown(draw: Callable[..., Any], graph: RandomGraph, names: Sequence[str]) -> str:
    """One more entry, mostly behind a gate. A list of these shrinks by whole entries."""
    from tests.surgery.entries import ENTRIES

    name: str = draw(st.sampled_from(names))
    if name:
        x = graph.image()
        x = graph.gated(graph.act(x) if graph.chance(4) else x) if graph.chance(7) else x
        graph.images.append(ENTRIES[name].add(graph, x))
    return name


def _finished(graph: RandomGraph) -> onnx.ModelProto:
    """The model. What nobody has read goes into the end too, so that every operator counts."""
    read = {tensor for node in graph.nodes for tensor in node.input}
    x = graph.images[-1]
    if graph.chance(5):
        x = graph.act(graph.conv_of(x, 6))
    last = graph.conv_of(graph.gated(x) if graph.chance(8) else x, 4)
    for loose in graph.images[:-1]:
        if loose not in read:
            last = graph.op("Add", last, graph.conv_of(graph.op("GlobalAveragePool", loose, space=(1, 1)), 4))
    outputs = [last if graph.chance(3) else graph.head(last)]
    if graph.chance(1):
        outputs.append(graph.pick(graph.images))
    return graph.model(*dict.fromkeys(outputs))


def text(model: onnx.ModelProto) -> str:
    """The graph as a person reads it; of larger constants only the shape."""
    short = onnx.ModelProto()
    short.CopyFrom(model)
    large = [tensor for tensor in short.graph.initializer if np.prod(tensor.dims) > SHOWN]
    shapes = [f"{tensor.name}: {list(tensor.dims)}" for tensor in large]
    for tensor in large:
        short.graph.initializer.remove(tensor)
    for node in short.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and np.prod(attribute.t.dims) > SHOWN:
                shapes.append(f"{node.output[0]}: {list(attribute.t.dims)}")
                del node.attribute[:]
                break
    return f"{onnx.printer.to_text(short)}\n" + "\n".join(shapes)
