"""Random graphs of all operators with random gates: whatever surgery does, the function stays.

A few seeds here; `benchmarks.bar_surgery_fuzz` runs 250 times as many graphs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from polar_deploy.errors import ContentError
from polar_deploy.surgery import Surgery, compress
from polar_deploy.surgery.ops import table
from polar_deploy.surgery.verify import largest_difference
from tests.surgery.entries import ABSENT, ENTRIES, STEPS
from tests.surgery.graphs import TOLERANCE, Array, How, cut, run
from tests.surgery.random_graphs import random_graphs, text

GRAPHS = 40
BATCH = 10  # graphs drawn with the operators in one order


@dataclass
class Tally:
    """What became of random graphs.

    lost: graphs in which a layer lost channels. cut: the operator types in those, once a graph.
    touched: operator types of nodes that went, or whose tensors have other shapes than before, once a graph.
    changed_again: graphs that a second surgery changes. as_they_were: why graphs came back whole, how often.
    """

    seen: set[bytes] = field(default_factory=set)
    lost: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)
    changed_again: list[onnx.ModelProto] = field(default_factory=list)
    as_they_were: Counter[str] = field(default_factory=Counter)

    @property
    def graphs(self) -> int:
        return len(self.seen)

    def has(self, model: onnx.ModelProto) -> bool:
        """Whether this graph was counted; hypothesis repeats itself."""
        return model.SerializeToString(deterministic=True) in self.seen

    def add(self, model: onnx.ModelProto, surgery: Surgery) -> None:
        """Counts what surgery made of a graph."""
        self.seen.add(model.SerializeToString(deterministic=True))
        if any(before > after for layer in surgery.report["layers"] for before, after in (layer["in"], layer["out"])):
            self.lost += 1
            self.cut.update({node.op_type for node in model.graph.node})
        self.touched.update(_touched(model, surgery.model))
        whole: str | None = surgery.report["as_it_is"]  # why: the proof does not come out, the second time neither
        if whole is not None:
            self.as_they_were[re.sub(r"\d[\d.e-]*", "N", whole)] += 1
        again = compress(surgery.model, verify=whole is not None).model
        if again.SerializeToString(deterministic=True) != surgery.model.SerializeToString(deterministic=True):
            self.changed_again.append(model)


def _touched(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    was, now = _shapes(before), _shapes(after)
    left = {node.name: node for node in after.graph.node}
    return {
        node.op_type
        for node in before.graph.node
        if node.name not in left
        or [was.get(x) for x in (*node.input, *node.output)]
        != [now.get(x) for x in (*left[node.name].input, *left[node.name].output)]
    }


def _shapes(model: onnx.ModelProto) -> dict[str, bytes]:
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True).graph
    known = {value.name: value.type.SerializeToString() for value in (*graph.input, *graph.output, *graph.value_info)}
    return known | {tensor.name: str(list(tensor.dims)).encode() for tensor in graph.initializer}


def judged(model: onnx.ModelProto) -> Surgery:
    """Cuts and compares.

    Where rounding can flip a result (Round, ArgMax), or means are taken over the large pictures that surgery tries
    where height and width are open, a difference must show at other sizes too; and in onnx's reference where ONNX
    Runtime multiplies bytes, since QLinearMatMul has kernels alone that overflow on x86 CPUs without VNNI (1.32).
    """
    kinds = {node.op_type for node in model.graph.node}
    try:
        return cut(model)
    except (AssertionError, ContentError):
        large = any(dim.dim_param == "height" for dim in model.graph.input[0].type.tensor_type.shape.dim)
        if not large and not STEPS & kinds:
            raise
    surgery, batches = compress(model, verify=False), (3, 4, 6)
    how: How = "reference" if "QLinearMatMul" in kinds else "plain"
    differences = [
        largest_difference(*(_outputs(each, batch, how) for each in (model, surgery.model))) for batch in batches
    ]
    assert sorted(differences)[1] <= TOLERANCE, f"outputs differ by {differences} at batch sizes {batches}"
    return surgery


def _outputs(model: onnx.ModelProto, batch: int, how: How) -> dict[str, Array]:
    names = [value.name for value in model.graph.output]
    return dict(zip(names, run(model, batch, how=how), strict=True))


def fuzz(
    number: int,
    use: Callable[[onnx.ModelProto], None],
    *,
    rare: Sequence[str] = (),
    shrink: bool = True,
) -> None:
    """Draws a batch of random graphs, the same ones for the same `number`, and gives them to `use`.

    rare: operator types to draw more often than others.
    """
    names = [name for name in sorted(ENTRIES) for _ in range(6 if name.split()[0] in rare else 1)]
    order = [str(name) for name in np.random.default_rng(number).permutation(names)]

    @seed(number)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(random_graphs(order))
    def draw(model: onnx.ModelProto) -> None:
        note(text(model))
        use(model)

    draw()


def test_every_operator_of_the_table_is_in_random_graphs() -> None:
    named = {name.split()[0] for name in ENTRIES}
    assert not table().keys() - named - ABSENT.keys(), "a new operator wants an entry in tests/surgery/entries"
    assert not named & ABSENT.keys()


def test_random_graphs_stay_the_same_function() -> None:
    tally = Tally()

    def use(model: onnx.ModelProto) -> None:
        if not tally.has(model):
            tally.add(model, judged(model))

    number = 0
    while tally.graphs < GRAPHS:
        fuzz(number, use)
        number += 1
    print(f"{tally.lost} of {tally.graphs} graphs lost channels; a second surgery changes {len(tally.changed_again)}")
    assert tally.lost >= 0.6 * tally.graphs
    assert len(tally.changed_again) <= tally.graphs / 1000, "a second surgery finds more to do"
