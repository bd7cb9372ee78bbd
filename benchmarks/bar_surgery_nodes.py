"""onnx's own node tests, as they are and between two layers with a gate: cut, left alone, or refused for a reason.

The models and their inputs are those of the installed onnx. Between layers, the first input of floats comes from a
layer of which a gate closes every second channel, and a layer reads the first output; other inputs are inputs still,
or constants. Each result is compared with its model on the test's own inputs. About six minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import write_result
from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery import compress
from polar_deploy.surgery.runtime import Run, onnx_runtime, reference
from polar_deploy.surgery.verify import largest_difference

TOLERANCE = 1e-4  # of the largest value
MOST_REFUSED = 0.005
SOME = 12  # names of models that a result lists for each outcome


@dataclass(frozen=True)
class Case:
    """A model, and inputs that it takes."""

    name: str
    model: onnx.ModelProto
    values: dict[str, Any]


@dataclass
class Tally:
    """What became of models. by: their names, by outcome; reasons: of those that were refused, and of errors."""

    by: dict[str, list[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: str, name: str, reason: str | None = None) -> None:
        """Counts one."""
        self.by.setdefault(outcome, []).append(name)
        if reason is not None:
            self.reasons[f"{outcome}: {reason}"] += 1

    def count(self, *outcomes: str) -> int:
        """How many came to one of these."""
        return sum(len(self.by.get(outcome, ())) for outcome in outcomes)

    def figures(self) -> dict[str, Any]:
        """What goes into the result."""
        rare = ("refused", "refused, and no runtime runs it", "wrong", "traceback", "as it is")
        return {
            "models": sum(map(len, self.by.values())),
            **{outcome: len(names) for outcome, names in sorted(self.by.items())},
            "named": {outcome: self.by[outcome][:SOME] for outcome in rare if outcome in self.by},
            "reasons": dict(self.reasons.most_common()),
        }


def plain() -> Iterator[Case]:
    """The node tests of the installed onnx."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases("")
    for case in cases:
        if case.model is None or not case.data_sets:
            continue
        names = [value.name for value in case.model.graph.input]
        given = case.data_sets[0][0]
        yield Case(case.name, case.model, dict(zip(names, map(_value, given), strict=False)))


def _value(given: Any) -> Any:
    if isinstance(given, onnx.TensorProto):
        return numpy_helper.to_array(given)
    if isinstance(given, onnx.SequenceProto):
        return numpy_helper.to_list(given)
    if isinstance(given, onnx.OptionalProto):
        return numpy_helper.to_optional(given)
    return given if isinstance(given, (list, dict)) or given is None else np.asarray(given)


def between(case: Case) -> Iterator[Case]:
    """The model behind a gated layer and in front of another one, where it has a place for them."""
    for held in (False, True):
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        values = dict(case.values)
        del model.graph.value_info[:]
        front = _in_front(model, values)
        if front is None:
            return
        _behind(model)
        others = [value for value in model.graph.input if value.name not in (front, "gated.input")]
        if held and not (others and all(isinstance(values.get(value.name), np.ndarray) for value in others)):
            return
        for value in others if held else ():
            model.graph.initializer.append(numpy_helper.from_array(values.pop(value.name), value.name))
            model.graph.input.remove(value)
        if all(entry.domain not in ("", "ai.onnx") for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid("", 17))
        yield Case(f"{case.name}, {'the rest constant' if held else 'between layers'}", model, values)


def _in_front(model: onnx.ModelProto, values: dict[str, Any]) -> str | None:
    """Puts a layer and a gate in front of the first input of floats with channels. Returns its name."""
    found = next(
        (
            value
            for value in model.graph.input
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
            and isinstance(values.get(value.name), np.ndarray)
            and values[value.name].ndim in (2, 3, 4, 5)
            and values[value.name].shape[1] > 1
            and values[value.name].size
        ),
        None,
    )
    if found is None:
        return None
    name, data = found.name, values.pop(found.name)
    width = data.shape[1]
    graph = model.graph
    nodes = _layer(graph, "gated.input", "gated.layer", "first", width, width, data.ndim)
    mask = np.ones(width, np.float32)
    mask[::2] = 0
    graph.initializer.append(numpy_helper.from_array(mask.reshape(1, -1, *[1] * (data.ndim - 2)), "gated.mask"))
    nodes.append(helper.make_node("Mul", ["gated.layer", "gated.mask"], [name], name="gated.gate"))
    rest = list(graph.node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*nodes, *rest)]
    del graph.node[:]
    graph.node.extend(copies)
    found.name = "gated.input"
    values["gated.input"] = data
    return name


def _behind(model: onnx.ModelProto) -> None:
    """Puts a layer behind the first output of floats with channels."""
    graph = model.graph
    for position, value in enumerate(graph.output):
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        if kind.elem_type == TensorProto.FLOAT and len(dims) in (2, 3, 4, 5) and dims[1] > 0:
            graph.node.extend(_layer(graph, value.name, "read.output", "second", dims[1], 3, len(dims)))
            shape = [None] * len(dims)
            graph.value_info.add().CopyFrom(value)  # as exporters leave it
            graph.output[position].CopyFrom(helper.make_tensor_value_info("read.output", TensorProto.FLOAT, shape))
            return


def _layer(
    graph: onnx.GraphProto, x: str, y: str, name: str, inputs: int, outputs: int, rank: int
) -> list[onnx.NodeProto]:
    """A convolution of one position, or a Gemm. Weights keep the size of numbers, so that Log and the like go on."""
    random = np.random.default_rng(0)
    weight = random.uniform(0, 2 / inputs, (outputs, inputs, *[1] * (rank - 2))).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weight, f"{name}.weight"))
    graph.initializer.append(
        numpy_helper.from_array(random.uniform(0, 0.1, outputs).astype(np.float32), f"{name}.bias")
    )
    given = [x, f"{name}.weight", f"{name}.bias"]
    return [
        helper.make_node("Gemm", given, [y], name=name, transB=1)
        if rank == 2
        else helper.make_node("Conv", given, [y], name=name)
    ]


def judge(case: Case, tally: Tally) -> None:
    """Cuts one model, and counts what came of it."""
    runs = _runner(case.model)
    try:
        expected = None if runs is None else runs(case.values)
    except PolarDeployError:
        expected = None
    try:
        surgery = compress(case.model)
    except PolarDeployError as error:
        outcome = "refused" if expected is not None else "refused, and no runtime runs it"
        tally.add(outcome, case.name, error.what[:120])
        return
    except Exception:  # noqa: BLE001 - a traceback in the engine is what this looks for
        tally.add("traceback", case.name, traceback.format_exc().strip().splitlines()[-1][:160])
        return
    after = _runner(surgery.model)
    if expected is not None:
        try:
            apart = float("inf") if after is None else largest_difference(expected, after(case.values))
        except PolarDeployError as error:
            tally.add("wrong", case.name, error.what[:120])
            return
        if apart > TOLERANCE and not _is_random(case.model):
            tally.add("wrong", case.name, f"outputs differ by {apart:.2g}")
            return
    if surgery.report["as_it_is"]:
        tally.add("as it is", case.name, surgery.report["as_it_is"][:120])
    else:
        tally.add("shrunk" if _size(surgery.model) < _size(case.model) else "unchanged", case.name)


def _runner(model: onnx.ModelProto) -> Run | None:
    """The model in ONNX Runtime, else in onnx's reference."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        try:
            return onnx_runtime(path)
        except PolarDeployError as error:
            try:
                return reference(model, error.what)
            except PolarDeployError:
                return None


def _is_random(model: onnx.ModelProto) -> bool:
    random = {"Bernoulli", "RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform", "Multinomial"}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return any(node.op_type in random for node in nodes)


def _size(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose names hold this; no result is written")
    parser.add_argument("--every", type=int, default=1, help="one in so many models; no result is written")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.monotonic()
    tallies = {"plain": Tally(), "between layers": Tally()}
    for number, case in enumerate(plain()):
        if args.only in case.name and number % args.every == 0:
            judge(case, tallies["plain"])
            for wrapped in between(case):
                judge(wrapped, tallies["between layers"])
    figures = {name: tally.figures() for name, tally in tallies.items()}
    for name, each in figures.items():
        print(name, {key: value for key, value in each.items() if isinstance(value, int)})
        for reason, count in each["reasons"].items():
            print(f"  {count:4} {reason}")
        print(f"  {each['named']}")
    if args.only or args.every > 1:
        return 0
    total = sum(figure["models"] for figure in figures.values())
    bars = {
        "0 wrong": not sum(tally.count("wrong") for tally in tallies.values()),
        "0 tracebacks": not sum(tally.count("traceback") for tally in tallies.values()),
        f"at most {MOST_REFUSED:.1%} of the models that a runtime runs are refused": (
            sum(tally.count("refused") for tally in tallies.values()) <= MOST_REFUSED * total
        ),
    }
    return write_result("surgery-nodes", bars, {"seconds": round(time.monotonic() - start), **figures})


if __name__ == "__main__":
    sys.exit(main())
