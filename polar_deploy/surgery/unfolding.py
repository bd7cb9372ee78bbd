"""Constants that were folded are computed again where that takes less room: tied weights, weights stored as integers.

A cut of what was folded is led back to a cut of what it was computed from: through Transpose, Cast and arithmetic with
one number. Each step is proven, by computing it, to the last bit.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import same_bits
from polar_deploy.surgery.shape_folding import evaluate

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Folded, Node, Tensor

# What undoes an operator whose other input is one number; of Sub and Div, for the first input.
UNDOING: dict[str, Callable[[Array, Array], Array]] = {
    "Mul": np.divide,
    "Div": np.multiply,
    "Add": np.subtract,
    "Sub": np.add,
}
ORDERED = {"Sub", "Div"}


def unfold(graph: Graph) -> None:
    """Makes folded nodes compute again wherever the file is smaller so. To be called when all cuts are made."""
    if any(folded.node.op != "Constant" for folded in graph.folded):
        storage = _Storage(graph)
        for folded in reversed(graph.folded):
            storage.settle(folded)


class _Storage:
    """What the file has to hold: the nodes that read each constant, and the index of the input that does."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.makers = {tensor.name: folded for folded in graph.folded for tensor in folded.outputs if tensor.name}
        self.readers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
        for node in graph.nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        for index, tensor in enumerate(node.inputs):
            if tensor.values is not None:
                self.readers[tensor.name].append((node, index))

    def settle(self, folded: Folded) -> None:
        """Decides about one node, after all that read from it."""
        used = {tensor.name: self._versions(tensor) for tensor in folded.outputs if self.readers.get(tensor.name)}
        if not used or any(len(versions) > 1 for versions in used.values()):
            return
        results = {name: versions[0] for name, versions in used.items()}
        size, sources = self._computed(folded, results)
        if sources is not None and size < sum(values.nbytes for values in results.values()):
            self.graph.unfold(folded, [reader for name in results for reader in self.readers.pop(name)])
            for index, (tensor, values) in enumerate(zip(folded.inputs, sources, strict=True)):
                if values is not None and values is not tensor.values:
                    self.graph.set_constant(folded.node, index, values)
            self._add(folded.node)

    def _versions(self, tensor: Tensor) -> list[Array]:
        """The different values that are read under the name of a constant: as it was, and as it was cut."""
        found: list[Array] = []
        for node, index in self.readers.get(tensor.name, ()):
            values = np.asarray(node.inputs[index].values)
            if not any(same_bits(values, other) for other in found):
                found.append(values)
        return found

    def _size(self, tensor: Tensor, values: Array) -> int:
        """The bytes that it takes to hold `values` for a constant, too."""
        held = self._versions(tensor)
        if not self.graph.is_private(tensor.name):
            held.append(np.asarray(tensor.values))
        if any(same_bits(values, other) for other in held):
            return 0
        maker = self.makers.get(tensor.name)
        computed, sources = (0, None) if maker is None else self._computed(maker, {tensor.name: values})
        return values.nbytes if sources is None else min(values.nbytes, computed)

    def _computed(self, folded: Folded, results: dict[str, Array]) -> tuple[int, list[Array | None] | None]:
        """The bytes that it takes to compute results, and what the node's inputs hold then; None: not known."""
        sources = None if folded.node.op == "Constant" else _sources(folded, results, self.graph.opset)
        if sources is None:
            return 0, None
        pairs = {tensor.name: (tensor, values) for tensor, values in zip(folded.inputs, sources, strict=True)}
        sizes = [self._size(tensor, values) for tensor, values in pairs.values() if values is not None]
        return folded.node.proto.ByteSize() + sum(sizes), sources


def _sources(folded: Folded, results: dict[str, Array], opset: int) -> list[Array | None] | None:
    """What the inputs have to hold for the results to hold `results`; None: not known."""
    given = [tensor.values for tensor in folded.inputs]
    before = {tensor.name: np.asarray(tensor.values) for tensor in folded.outputs if tensor.name}
    if all(same_bits(values, before[name]) for name, values in results.items()):
        return given
    large = [index for index, values in enumerate(given) if values is not None and values.size > 1]
    if len(before) > 1 or len(large) != 1:
        return None
    index, values = large[0], results[folded.outputs[0].name]
    old = np.asarray(given[index])
    undone = _undone(folded.node, index, values, given)
    if undone is None or undone.ndim != old.ndim or old.dtype.kind in "OSU":
        return None
    with np.errstate(all="ignore"):
        whole = undone.dtype.kind == "f" and bool((old == np.rint(old.astype(np.float64))).all())
        source = (np.rint(undone) if whole else undone).astype(old.dtype)
    sources = [source if at == index else each for at, each in enumerate(given)]
    named = {t.name: np.asarray(each) for t, each in zip(folded.inputs, sources, strict=True) if each is not None}
    found = evaluate(folded.node.proto, named, opset)
    return sources if found is not None and same_bits(found[0], values) else None


def _undone(node: Node, index: int, values: Array, given: list[Array | None]) -> Array | None:
    """What input `index` of a node was, nearly, where its result is `values`; None: not known."""
    if node.op == "Transpose":
        return values.transpose(np.argsort(node.attrs.get("perm", range(values.ndim)[::-1])))
    if node.op in ("Cast", "Identity"):
        return values
    if node.op not in UNDOING or len(given) != 2 or (node.op in ORDERED and index):
        return None
    with np.errstate(all="ignore"):
        return np.asarray(UNDOING[node.op](values.astype(np.float64), np.asarray(given[1 - index], np.float64)))
