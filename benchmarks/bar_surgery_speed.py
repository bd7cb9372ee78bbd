"""Surgery is fast and lean, reading and writing the file included; beside it an earlier build, and its rivals.

The earlier build is a checkout of its own; without one, the bars that compare with it are not met:

    git worktree add --detach /tmp/before cffa484
    python -m benchmarks.bar_surgery_speed --before /tmp/before

The rivals are Torch-Pruning 1.6, onnxsim 0.8, OpenVINO's pruning behind its common transformations, and PruneChannels
of qonnx 1.0. All get the same masks: of the coupled sets that the same layers write, half are closed. The rivals work
in memory, without any file; onnxsim and OpenVINO get the gates folded by hand into zero filters, because they stop at
gates, Torch-Pruning and qonnx the numbers of the closed channels. They are no requirement of this project; install them
anywhere and name the place,

    pip install --target /tmp/rivals --no-deps torch-pruning==1.6.* onnxsim==0.8.* qonnx==1.0.* \\
        bitstring tibs toposort sigtools clize onnx-graphsurgeon
    PYTHONPATH=/tmp/rivals python -m benchmarks.bar_surgery_speed

else their figures are null; the last of these is what the earlier build needs. There are none of a vision transformer,
whose hidden layers are closed by half, and of the longest chain. Figures are medians of five rounds, or of as many as
begin within half a minute. Builds are compared round by round, by the processor time that they take: this one before
and after the earlier one, because a machine may change its speed within seconds, and the earlier one runs for longer.
Memory is the peak of what the system holds for the process (VmHWM, with pages mapped from files) above what it held
after the imports. Twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch.nn.functional import conv2d, relu

from benchmarks import bar_surgery_complete as complete
from benchmarks.common import ROOT, write_result
from benchmarks.surgery_models import (
    INPUT,
    OUTPUT,
    TOLERANCE,
    Array,
    Site,
    build,
    export,
    gated,
    half,
    random_images,
    readers_of,
    run,
    sites,
)
from benchmarks.surgery_oracle import Sets, widths

LIMITS = {"resnet50": 1.0, "mobilenet_v2": 0.5, "densenet121": 2.0, "chain-2000": 10.0}  # seconds
IMPORT = 0.3  # seconds
MEMORY = ("resnet50", 3.0)  # times the size of the file
SHARES = {"chain-2000": 0.3, "resnet50": 0.55, "densenet121": 0.55, "mobilenet_v2": 0.55, "vit_b_16": 0.7}  # of before
CHAINS = (500, 1000, 2000, 4000)  # convolutions
LINEAR = 1.05  # the exponent with which time may grow
TRANSFORMERS = ("vit_b_16",)
NOT_ASKED = (*TRANSFORMERS, f"chain-{CHAINS[-1]}")  # of rivals
RUNS = 5
RIVALS = {"onnxsim": "onnxsim", "torch-pruning": "torch_pruning", "openvino": "openvino", "qonnx": "qonnx"}  # imports
NOISE = 1.02  # times the memory of another run that counts as the same
PATIENCE = 300  # seconds for a rival's runs
PIXELS = 224  # a side of the networks' input
WIDTH, SIDE = 16, 16  # channels and pixels of a chain


def prepare_network(name: str, cache: Path, folder: Path) -> int:
    """A torchvision network; returns how many elements of weights a complete cut leaves."""
    subject = complete.Subject(name, cache, PIXELS)
    sets = subject.sets
    closed, roots = _half_of_each_group(sets, subject.random)
    masks = {writer: ~closed[sets.outputs[writer]] for writer in subject.writers if closed[sets.outputs[writer]].any()}
    onnx.save(subject.gate(masks), folder / "gated.onnx")
    zeros = {subject.nodes[writer].output[0]: mask for writer, mask in masks.items()}
    onnx.save(_folded(subject.model, zeros), folder / "folded.onnx")
    onnx.save(subject.model, folder / "plain.onnx")
    _save(folder / "masks.npz", {root: masks[root] for root in roots})
    _name_weights(folder, {root: subject.nodes[root].input[1] for root in roots})
    _save(folder / "images.npz", {"images": random_images(subject.model, 4)})
    was = subject.weights(subject.model)
    return sum(
        aim.outputs * (aim.inputs // max(aim.groups, 1)) * math.prod(was[mixer][2:])
        for mixer, aim in widths(sets, closed).items()
    )


def prepare_transformer(name: str, cache: Path, folder: Path) -> int:
    """The same for a network whose hidden layers, between two matrix products, are closed by half."""
    model = export(name, build(name), cache, PIXELS)
    random = np.random.default_rng(0)
    masks = {site: half(site.width, random) for site in sites(model)}
    onnx.save(gated(model, masks), folder / "gated.onnx")
    _save(folder / "images.npz", {"images": random_images(model, 2)})
    makers, readers = {name: node for node in model.graph.node for name in node.output}, readers_of(model)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    left = _weights(model)
    for site, mask in masks.items():
        writer = makers[site.tensor]
        while writer.op_type != "MatMul":
            writer = makers[next(name for name in writer.input if name in makers)]
        (reader,) = readers[site.tensor]
        left -= int((~mask).sum()) * (sizes[writer.input[1]] + sizes[reader.input[1]]) // site.width
    return left


def _half_of_each_group(sets: Sets, random: np.random.Generator) -> tuple[Array, list[str]]:
    """[sets] closed: half of those that the same writers write; and for each such group, its first writer."""
    written: dict[int, list[str]] = {}
    for name, labels in sets.outputs.items():
        for label in np.unique(labels[sets.removable[labels]]).tolist():
            written.setdefault(label, []).append(name)
    groups: dict[tuple[str, ...], list[int]] = {}
    for label, writers in written.items():
        groups.setdefault(tuple(writers), []).append(label)
    closed = np.zeros_like(sets.removable)
    for members in groups.values():
        closed[random.permutation(members)[: len(members) // 2]] = True
    return closed, [writers[0] for writers in groups]


def _name_weights(folder: Path, names: Mapping[str, str]) -> None:
    (folder / "weights.json").write_text(json.dumps(names))


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _folded(model: onnx.ModelProto, masks: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy in which closed filters are zero: gates, folded by hand through activations that are zero at zero."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    for node in model.graph.node:
        if node.output[0] in masks:
            for name in node.input[1:]:
                values = numpy_helper.to_array(tensors[name]).copy()
                values[~masks[node.output[0]]] = 0
                tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    return result


def prepare_chain(length: int, folder: Path) -> int:
    """The same for a chain of convolutions of 3 x 3 with Relu in between, each half closed."""
    random = np.random.default_rng(length)
    nodes, tensors, masks, x = [], [], {}, INPUT
    signal = torch.from_numpy(random.random((8, 3, SIDE, SIDE), np.float32))
    for layer in range(length):
        masks[layer] = random.permutation(WIDTH) >= WIDTH // 2
        weight = torch.from_numpy(random.random((WIDTH, signal.shape[1], 3, 3), np.float32))
        signal = relu(conv2d(signal, weight, padding=1)) * torch.from_numpy(masks[layer])[:, None, None]
        scale = signal.mean()  # all is positive, or rounding would grow over the layers; and signals neither grow
        signal, weight = signal / scale, weight / scale
        tensors.append(numpy_helper.from_array(weight.numpy(), f"weight{layer}"))
        last = layer == length - 1
        nodes.append(
            helper.make_node("Conv", [x, f"weight{layer}"], [OUTPUT if last else f"conv{layer}"], pads=[1] * 4)
        )
        if not last:
            x = f"relu{layer}"
            nodes.append(helper.make_node("Relu", [f"conv{layer}"], [x], name=x))
    del masks[length - 1]
    ends = [
        helper.make_tensor_value_info(name, 1, ["batch", width, SIDE, SIDE])
        for name, width in ((INPUT, 3), (OUTPUT, WIDTH))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    sites = {Site(f"relu{layer}", WIDTH, (1, WIDTH, 1, 1)): mask for layer, mask in masks.items()}
    onnx.save(model, folder / "plain.onnx")
    onnx.save(gated(model, sites), folder / "gated.onnx")
    onnx.save(_folded(model, {f"conv{layer}": mask for layer, mask in masks.items()}), folder / "folded.onnx")
    _save(folder / "masks.npz", {str(2 * layer): mask for layer, mask in masks.items()})  # as in Sequential
    _name_weights(folder, {str(2 * layer): f"weight{layer}" for layer in masks})
    _save(folder / "images.npz", {"images": random_images(model, 4)})
    half = WIDTH // 2
    return 9 * (half * 3 + (length - 2) * half * half + half * WIDTH)


class Subject(NamedTuple):
    """A prepared folder, and how many elements of weights a complete cut leaves."""

    name: str
    folder: Path
    optimum: int


def prepare(name: str, cache: Path, folder: Path) -> Subject:
    """Writes what `surgery_contenders` reads into a folder of its own."""
    folder.mkdir()
    if name.startswith("chain-"):
        return Subject(name, folder, prepare_chain(int(name.removeprefix("chain-")), folder))
    if name in TRANSFORMERS:
        return Subject(name, folder, prepare_transformer(name, cache, folder))
    return Subject(name, folder, prepare_network(name, cache, folder))


def judge(subject: Subject, answers: list[dict[str, Any]], result: str = "out.onnx") -> dict[str, Any]:
    """Times, share of what had to go, and how far the last result is from the gated graph; or why there is none."""
    failed = next((answer for answer in answers if "reason" in answer), None)
    if failed is not None:
        return {"seconds": None, **failed}
    folder = subject.folder
    before, images = onnx.load(folder / "gated.onnx"), np.load(folder / "images.npz")["images"]
    if "weights" in answers[0]:
        found, weights = np.load(folder / "logits.npz")["logits"], answers[0]["weights"]
    else:
        after = onnx.load(folder / result)
        try:
            found, weights = run(after, images), _weights(after)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime has no class for graphs that are none
            return {"seconds": None, "reason": f"its graph does not run: {str(error).splitlines()[0][:200]}"}
    full, expected = _weights(before), run(before, images)
    if found.shape != expected.shape:
        return {"seconds": None, "reason": f"its network gives {found.shape} for {expected.shape}"}
    runs = [seconds for answer in answers for seconds in answer["seconds"]]
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    row: dict[str, Any] = {
        "seconds": round(statistics.median(runs), 3),
        "runs": [round(seconds, 3) for seconds in runs],
        "share_removed": (full - weights) / (full - subject.optimum),
        "difference": difference,
        "exact": difference <= TOLERANCE,
    }
    if "memory" in answers[0]:
        row["processor_seconds"] = round(statistics.median(answer["processor"] for answer in answers), 3)
        row["processor_runs"] = [round(answer["processor"], 3) for answer in answers]
        peak, size = statistics.median(answer["memory"] for answer in answers), (folder / "gated.onnx").stat().st_size
        row["memory"] = {"bytes": peak, "file": size, "times_the_file": round(peak / size, 2)}
    return row


def ask(who: str, subject: Subject, checkout: Path = ROOT) -> dict[str, Any]:
    """What `surgery_contenders` of a checkout answers in a process of its own, or the reason why it does not."""
    module = RIVALS.get(who)
    if module is not None and subject.name in NOT_ASKED:
        return {"reason": "it was not asked"}
    if module is not None and importlib.util.find_spec(module) is None:
        return {"reason": f"{module} cannot be imported"}
    command = [sys.executable, "-m", "benchmarks.surgery_contenders", who, subject.name, str(subject.folder)]
    paths = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    how: dict[str, Any] = {"cwd": checkout, "env": os.environ | {"PYTHONPATH": paths}, "timeout": PATIENCE}
    try:
        child = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {PATIENCE} s"}
    if child.returncode:
        return {"reason": (child.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _weights(model: onnx.ModelProto) -> int:
    """Elements of the weights of all convolutions and matrix products; those of two computed tensors have none."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return sum(sizes.get(n.input[1], 0) for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul"))


def show(name: str, row: Mapping[str, Any]) -> None:
    """A line for each contender."""
    for who, figures in row.items():
        if figures["seconds"] is None:
            print(f"{name:14} {who:14} -- {figures['reason']}", flush=True)
            continue
        share = f"  {_share(row):.2f} of before" if who == "ours" and "before" in row else ""
        memory = f"  {figures['memory']['times_the_file']} x the file" if "memory" in figures else ""
        print(
            f"{name:14} {who:14} {figures['seconds']:7.3f} s  {figures['share_removed']:.1%} removed"
            f"  {'exact' if figures['exact'] else 'DIFFERS'} {figures['difference']:.1e}{memory}{share}",
            flush=True,
        )


def main() -> int:
    """Run the bar; 0 if it is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the earlier build")
    parser.add_argument("--cache", type=Path, help="folder for exported networks, kept (default: a temporary one)")
    names = [*(name for name in SHARES if not name.startswith("chain")), *(f"chain-{length}" for length in CHAINS)]
    parser.add_argument("names", nargs="*", default=names, help="only these; no result is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        builds = {"ours": ROOT, "before": args.before}
        turns = ["ours", "before", "ours"] if args.before else ["ours"]
        rows = {}
        for name in args.names:
            subject = prepare(name, args.cache or Path(place), Path(place, name))
            answers: dict[str, list[dict[str, Any]]] = {who: [] for who in dict.fromkeys(turns)}
            for _ in range(RUNS):
                for who in turns:
                    answers[who].append(ask("ours", subject, builds[who]))
                    if "reason" not in answers[who][-1]:
                        (subject.folder / "out.onnx").replace(subject.folder / f"{who}.onnx")
            rows[subject.name] = {who: judge(subject, each, f"{who}.onnx") for who, each in answers.items()}
            rows[subject.name].update({who: judge(subject, [ask(who, subject)]) for who in RIVALS})
            show(subject.name, rows[subject.name])
    if set(args.names) != set(names):
        return 0
    growth = _growth(rows)
    bars, start = _bars(rows, growth), _import()
    bars[f"import: at most {IMPORT} s"] = start <= IMPORT
    return write_result("surgery-speed", bars, {"growth_of_chains": growth, "import": start, "networks": rows})


def _share(row: Mapping[str, Any]) -> float:
    """Processor time of this build as a share of the earlier one's: the median over rounds of two runs to one."""
    ours, before = (row.get(who, {}).get("processor_runs", []) for who in ("ours", "before"))
    if not ours or not before:
        return math.nan
    rounds = zip(ours[::2], ours[1::2], before, strict=True)
    return statistics.median((first + last) / 2 / between for first, last, between in rounds)


def _import() -> float:
    """Seconds that the import of surgery takes, for which whoever calls a command waits."""
    code = "import time; start = time.perf_counter(); import polar_deploy.surgery; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    asked = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(RUNS))
    return round(statistics.median(float(done.stdout) for done in asked), 3)


def _is_leaner(row: Mapping[str, Any]) -> bool:
    ours, before = (row.get(who, {}).get("memory", {"bytes": math.nan})["bytes"] for who in ("ours", "before"))
    return bool(ours <= NOISE * before)


def _growth(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """The power of a chain's length that processor time grows with: a line through all lengths, by their fastest runs.

    Machines have more than one speed, and the medians of two lengths may each have seen another one.
    """
    fastest = [min(rows[f"chain-{length}"]["ours"].get("processor_runs", [math.nan])) for length in CHAINS]
    return round(float(np.polyfit(np.log(CHAINS), np.log(fastest), 1)[0]), 2)


def _bars(rows: Mapping[str, Mapping[str, Any]], growth: float) -> dict[str, bool]:
    ours = {name: row["ours"] for name, row in rows.items()}
    name, times = MEMORY
    return {
        **{
            f"{name}: at most {share} of the earlier build's time": _share(rows[name]) <= share
            for name, share in SHARES.items()
        },
        "nowhere more memory than the earlier build": all(_is_leaner(row) for row in rows.values()),
        **{
            f"{name}: at most {limit} s": (ours[name]["seconds"] or math.inf) <= limit for name, limit in LIMITS.items()
        },
        f"{name}: at most {times} times the file in memory": "memory" in ours[name]
        and ours[name]["memory"]["times_the_file"] <= times,
        f"time grows with at most the length of a chain to the power of {LINEAR}": growth <= LINEAR,
        "all that is closed is removed, exactly": all(
            row.get("exact", False) and abs(row["share_removed"] - 1) < 1e-12 for row in ours.values()
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
