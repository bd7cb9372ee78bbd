"""The latency table: on networks whose "latency" is their MACs, worked out by hand, and once for real."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy import gpu, latency, targets
from polar_deploy.documents.parity import Round
from polar_deploy.engines import __main__ as command
from polar_deploy.engines import table, timing
from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.surgery import cost
from polar_deploy.workspace import read_json, write_json
from tests.support.classifiers import classifier, model, saved
from tests.support.rounds import round_of
from tests.support.schemas import valid

TARGET = targets.parse("ort-fp32")
PIXELS, CLASSES = 64, 4  # all layers see 8 x 8
Opened = dict[str, int]
Run = tuple[int, int, int, int]  # first channel, first gate, channels, step from gate to gate


class _Builder:
    """Writes gated networks; like the exporter's, gates of equal shape share one constant."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(0)

    def conv(self, x: str, before: int, after: int, kernel: int, groups: int = 1) -> str:
        name = f"conv{len(self.nodes)}"
        self.weights[name] = self.random.normal(size=(after, before // groups, kernel, kernel)) / before
        made = helper.make_node("Conv", [x, name], [f"{name}.y"], name=name, pads=[kernel // 2] * 4, group=groups)
        self.nodes.append(made)
        return f"{name}.y"

    def relu(self, x: str) -> str:
        name = f"relu{len(self.nodes)}"
        self.nodes.append(helper.make_node("Relu", [x], [name]))
        return name

    def gate(self, x: str, width: int, site: str, kind: str = "channel") -> str:
        """A mask of one site, a gate a channel; a block's only gate is in all of them."""
        block = kind == "block"
        return self.mask(x, width, {site: (kind, 1 if block else width, [(0, 0, width, 0 if block else 1)])})

    def mask(self, x: str, width: int, sites: dict[str, tuple[str, int, list[Run]]], axes: int = 2) -> str:
        """A mask of `width` channels; sites: kind, gates and runs."""
        self.weights[f"ones{width}.{axes}"] = np.ones((1, width, *(1,) * axes))
        name = f"mask{len(self.nodes)}"
        node = helper.make_node("Mul", [x, f"ones{width}.{axes}"], [f"{name}.y"], name=name)
        told = {site: {"kind": kind, "width": gates, "runs": runs} for site, (kind, gates, runs) in sites.items()}
        node.metadata_props.add(key="polar_deploy.gates", value=json.dumps(told))
        self.nodes.append(node)
        return f"{name}.y"

    def add(self, a: str, b: str) -> str:
        self.nodes.append(helper.make_node("Add", [a, b], [f"add{len(self.nodes)}"]))
        return self.relu(self.nodes[-1].output[0])

    def head(self, x: str, width: int) -> onnx.ModelProto:
        self.weights["fc"] = self.random.normal(size=(CLASSES, width))
        self.nodes += [
            helper.make_node("GlobalAveragePool", [x], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "fc"], ["logits"], transB=1),
        ]
        return model(self.nodes, {name: w.astype(np.float32) for name, w in self.weights.items()}, CLASSES, 8)


BOTTLENECKS = {"a": 16, "b": 16, "c": 24}  # name -> inner width


def bottlenecks() -> onnx.ModelProto:
    """Three blocks of three layers, of which the middle one depends on two widths; two of the blocks are alike."""
    net = _Builder()
    x = net.relu(net.conv("input", 3, 8, 3))
    for name, width in BOTTLENECKS.items():
        y = net.gate(net.relu(net.conv(x, 8, width, 1)), width, f"{name}.1")
        y = net.gate(net.relu(net.conv(y, width, width, 3)), width, f"{name}.2")
        x = net.add(net.gate(net.conv(y, width, 8, 1), 8, name, "block"), x)
    return net.head(x, 8)


def bottlenecks_macs(opened: Opened) -> int:
    total = PIXELS * 27 * 8 + 8 * CLASSES
    for name in BOTTLENECKS:
        first, second = opened[f"{name}.1"], opened[f"{name}.2"]
        total += opened[name] * PIXELS * (8 * first + 9 * first * second + second * 8)
    return total


def chain() -> onnx.ModelProto:
    """Five layers in a row: sites of one kind meet in the layers between them."""
    net = _Builder()
    x = "input"
    for index in range(4):
        x = net.gate(net.relu(net.conv(x, 16 if index else 3, 16, 3)), 16, f"site{index}")
    return net.head(net.relu(net.conv(x, 16, 8, 3)), 8)


def chain_macs(opened: Opened) -> int:
    widths = [3, *(opened[f"site{index}"] for index in range(4)), 8]
    return 9 * PIXELS * sum(a * b for a, b in pairwise(widths)) + 8 * CLASSES


def projection() -> onnx.ModelProto:
    """A gated stem that a block and its shortcut both read: the two meet in a layer, and neither holds the other."""
    net = _Builder()
    x = net.gate(net.relu(net.conv("input", 3, 16, 3)), 16, "stem")
    y = net.gate(net.relu(net.conv(x, 16, 16, 3)), 16, "inner")
    y = net.gate(net.conv(y, 16, 8, 3), 8, "block", "block")
    return net.head(net.add(y, net.conv(x, 16, 8, 1)), 8)


def projection_macs(opened: Opened) -> int:
    stem, inner = opened["stem"], opened["inner"]
    layers = 27 * stem + opened["block"] * 9 * (stem * inner + inner * 8) + stem * 8
    return PIXELS * layers + 8 * CLASSES


STREAM = {"one": (16, 8), "two": (16, 8), "three": (8, 8)}  # name of the block -> its inner widths


def stream() -> onnx.ModelProto:
    """A residual stream of 16 channels, read by three blocks, written by all of them and the stem: a hub."""
    net = _Builder()
    x = net.relu(net.conv("input", 3, 16, 3))
    for name, (first, second) in STREAM.items():
        y = net.conv(net.gate(x, 16, "stream", "stream"), 16, first, 3)
        y = net.conv(net.gate(net.relu(y), first, f"{name}.1"), first, second, 1)
        y = net.conv(net.gate(net.relu(y), second, f"{name}.2"), second, 16, 3)
        x = net.add(net.gate(y, 16, name, "block"), x)
    return net.head(net.gate(x, 16, "stream", "stream"), 16)


def stream_macs(opened: Opened) -> int:
    width = opened["stream"]
    total = PIXELS * 27 * width + width * CLASSES
    for name in STREAM:
        first, second = opened[f"{name}.1"], opened[f"{name}.2"]
        total += opened[name] * PIXELS * (9 * width * first + first * second + 9 * second * width)
    return total


def concatenation() -> onnx.ModelProto:
    """Two layers of other widths, whose concatenation a third one reads through one mask."""
    net = _Builder()
    a, b = net.relu(net.conv("input", 3, 16, 3)), net.relu(net.conv("input", 3, 8, 1))
    net.nodes.append(helper.make_node("Concat", [b, a], ["both"], axis=1))
    sites = {"a": ("channel", 16, [(8, 0, 16, 1)]), "b": ("channel", 8, [(0, 0, 8, 1)])}
    return net.head(net.relu(net.conv(net.mask("both", 24, sites), 24, 8, 3)), 8)


def concatenation_macs(opened: Opened) -> int:
    a, b = opened["a"], opened["b"]
    return PIXELS * (27 * a + 3 * b + 9 * (a + b) * 8) + 8 * CLASSES


def side_by_side() -> onnx.ModelProto:
    """Five readers of a concatenation of two layers: both are hubs, side by side."""
    net = _Builder()
    a, b = net.relu(net.conv("input", 3, 16, 3)), net.relu(net.conv("input", 3, 16, 1))
    net.nodes.append(helper.make_node("Concat", [a, b], ["both"], axis=1))
    sites = {"a": ("channel", 16, [(0, 0, 16, 1)]), "b": ("channel", 16, [(16, 0, 16, 1)])}
    total = ""
    for index in range(5):
        y = net.relu(net.conv(net.mask("both", 32, sites), 32, 8, 1))
        y = net.conv(net.gate(y, 8, f"inner{index}"), 8, 8, 3)
        total = net.add(total, y) if total else y
    return net.head(total, 8)


def side_by_side_macs(opened: Opened) -> int:
    a, b = opened["a"], opened["b"]
    layers = 27 * a + 3 * b + sum(((a + b) * inner + inner * 72) for inner in (opened[f"inner{i}"] for i in range(5)))
    return PIXELS * layers + 8 * CLASSES


def columns() -> onnx.ModelProto:
    """A Flatten of 8 x 8 pixels: each gate closes 64 columns of the mask of the layer behind."""
    net = _Builder()
    y = net.relu(net.conv("input", 3, 8, 3))
    net.nodes.append(helper.make_node("Flatten", [y], ["flat"]))
    runs = [(PIXELS * channel, channel, PIXELS, 0) for channel in range(8)]
    x = net.mask("flat", 8 * PIXELS, {"site": ("channel", 8, runs)}, axes=0)
    net.weights["fc"] = net.random.normal(size=(CLASSES, 8 * PIXELS))
    net.nodes.append(helper.make_node("Gemm", [x, "fc"], ["logits"], transB=1))
    return model(net.nodes, {name: w.astype(np.float32) for name, w in net.weights.items()}, CLASSES, 8)


def columns_macs(opened: Opened) -> int:
    return PIXELS * opened["site"] * (27 + CLASSES)


def grouped() -> onnx.ModelProto:
    """A convolution of 8 groups of 2 channels: one gate a group, in the mask before it and in the one behind it."""
    net = _Builder()
    sites = {"groups": ("channel", 8, [(2 * group, group, 2, 0) for group in range(8)])}
    x = net.mask(net.relu(net.conv("input", 3, 16, 1)), 16, sites)
    x = net.mask(net.relu(net.conv(x, 16, 16, 3, groups=8)), 16, sites)
    return net.head(net.relu(net.conv(x, 16, 8, 1)), 8)


def grouped_macs(opened: Opened) -> int:
    width = 2 * opened["groups"]
    return PIXELS * (3 * width + 9 * width * 2 + width * 8) + 8 * CLASSES


@pytest.fixture
def macs_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that shows an engine's MACs, so that what a table should say can be worked out. Surgery is real."""
    use_clock(monkeypatch, float)


def use_clock(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[int], float]) -> None:
    """A clock that shows a function of an engine's MACs."""

    def build(source: Path, folder: Path, name: str, *how: object) -> Any:
        return SimpleNamespace(versions={"onnx": onnx.__version__})

    def open_built(entry: object, folder: Path, name: str, target: targets.Target) -> Any:
        return SimpleNamespace(macs=cost(onnx.load(folder / "source.onnx")).macs, conditions=lambda: None)

    def afresh(a: Any, b: Any, images: np.ndarray, **how: object) -> list[Round]:
        first, second = milliseconds(a.macs), milliseconds(b.macs)
        even = timing.Interval(1.0, 1.0, 1.0)
        took = [timing.Latency(ms, ms, ms, 0.0) for ms in (first, second)]
        speedup = timing.Interval(first / second, first / second, first / second)
        return [round_of(*took, speedup, even)]

    monkeypatch.setattr(table, "build", build)
    monkeypatch.setattr(table, "open_built", open_built)
    monkeypatch.setattr(table.timing, "afresh", afresh)


@pytest.mark.usefixtures("macs_are_milliseconds")
@pytest.mark.parametrize(
    ("network", "macs", "expected"),
    [
        # The whole network; a width of either layer, the block and the pair, once for a and b; two widths each for c.
        (bottlenecks, bottlenecks_macs, 1 + (1 + 1 + 1 + 1) + (2 + 2 + 1 + 1)),
        # A width of the first, the inner and the last layer; pairs: first and inner, two inner, inner and last.
        (chain, chain_macs, 1 + 3 + 3),
        # The stem meets the inner layer, and the block.
        (projection, projection_macs, 1 + 1 + 1 + 1 + 2),
        # The stream; each layer's inner widths, for blocks one and two at once, and their pairs; blocks; all with the
        # stream at once.
        (stream, stream_macs, 1 + 1 + (2 + 2) + 2 + 2 + 1),
        # A width of each, and both, which share no MACs but meet.
        (concatenation, concatenation_macs, 1 + 1 + 1 + 1),
        # Both hubs at once; all the inner layers at once; and all of them.
        (side_by_side, side_by_side_macs, 1 + 1 + 1 + 1),
        (columns, columns_macs, 1 + 1),
        (grouped, grouped_macs, 1 + 1),
    ],
)
def test_prediction_is_exact_where_cost_is_a_product_of_widths(
    tmp_path: Path, network: Callable[[], onnx.ModelProto], macs: Callable[[Opened], int], expected: int
) -> None:
    document = table.measure(saved(network(), tmp_path / "gated.onnx"), TARGET).as_json()
    valid("latency-table", document)
    assert document["engines"] == expected
    write_json(tmp_path / "table.json", document)
    read, random = latency.read(tmp_path / "table.json", "ort-fp32"), np.random.default_rng(0)
    for _ in range(20):
        opened = {
            site.name: int(random.integers(site.widths[0], (1 if site.kind == "block" else site.width) + 1))
            for site in read.sites
        }
        assert read.predicted_ms(opened) == pytest.approx(macs(opened), rel=1e-4)


def test_what_a_hub_saves_twice_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where latency does not follow MACs, the cut of all widths at once is predicted as it was measured."""
    use_clock(monkeypatch, lambda macs: macs**0.9)
    table.measure(saved(stream(), tmp_path / "gated.onnx"), TARGET).write(tmp_path / "table.json")
    read = latency.read(tmp_path / "table.json")
    opened = {"stream": 8} | dict.fromkeys(STREAM, 1)
    opened |= {f"{name}.{i + 1}": widths[i] // 2 for name, widths in STREAM.items() for i in (0, 1)}
    assert read.full_ms == pytest.approx(stream_macs({site.name: site.width for site in read.sites}) ** 0.9)
    assert read.predicted_ms(opened) == pytest.approx(stream_macs(opened) ** 0.9, rel=1e-4)


def test_whole_networks_are_measured_as_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where latency does not follow MACs, savings do not add up to what a network with several cuts saves."""
    use_clock(monkeypatch, lambda macs: macs**0.5)
    half: dict[str, int] = {}

    def likely(measured: latency.LatencyTable) -> list[dict[str, int]]:
        half.update({site.name: 1 if site.kind == "block" else site.width // 2 for site in measured.sites})
        return [half]

    document = table.measure(saved(bottlenecks(), tmp_path / "gated.onnx"), TARGET, likely=likely).as_json()
    valid("latency-table", document)
    (check,) = document["checks"]
    assert check["ms"] == pytest.approx(bottlenecks_macs(half) ** 0.5, rel=1e-4)
    assert check["predicted_ms"] == pytest.approx(latency.parsed(document).predicted_ms(half), rel=1e-4)
    assert check["predicted_ms"] != pytest.approx(check["ms"], rel=0.01)


@pytest.mark.usefixtures("macs_are_milliseconds")
def test_what_gates_were_open_does_not_matter(tmp_path: Path) -> None:
    """All are opened first; and a constant that two gates share is not cut for both."""
    network = bottlenecks()
    for tensor in network.graph.initializer:
        if tensor.name.startswith("ones"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    document = table.measure(saved(network, tmp_path / "gated.onnx"), TARGET, batch=3).as_json()
    full = {site["name"]: 1 if site["kind"] == "block" else site["width"] for site in document["sites"]}
    assert document["full_ms"] == bottlenecks_macs(full)
    assert document["batch"] == 3
    first = document["sites"][0]
    assert (first["name"], first["widths"], first["within"]) == ("a.1", [8, 16], ["a"])
    assert first["ms"] == pytest.approx([bottlenecks_macs(full | {"a.1": width}) for width in (8, 16)])
    assert document["sites"][2]["ms"] == pytest.approx([bottlenecks_macs(full | {"a": 0}), bottlenecks_macs(full)])


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (64, [8, 16, 24, 32, 40, 48, 56, 64]),
        (16, [8, 16]),
        (20, [8, 16, 20]),
        (12, [4, 8, 12]),
        (3, [3]),
        (1, [1]),
        (128, list(range(8, 129, 8))),
        (256, list(range(16, 257, 16))),
        (136, [*range(16, 136, 16), 136]),
    ],
)
def test_widths(width: int, expected: list[int]) -> None:
    assert table.widths(width) == expected


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(table, "PAIRS", 6)
    monkeypatch.setattr(table, "_SECONDS", (0.0, 0.01))
    gated, out = saved(projection(), tmp_path / "gated.onnx"), tmp_path / "new" / "table.json"
    assert command.main(["table", str(gated), "--target", "ort-fp32", "--out", str(out)]) == 0
    document = read_json(out)
    valid("latency-table", document)
    assert document["versions"].keys() >= {"onnxruntime", "polar_deploy"}
    said = capsys.readouterr()
    assert "3 sites, 6 engines" in said.out
    assert "block block and 0 more: 3 engines timed" in said.err
    text = out.read_text(encoding="utf-8")
    assert platform.node() not in text
    assert str(tmp_path) not in text


def _changed(change: Callable[[onnx.NodeProto], None]) -> onnx.ModelProto:
    """`projection` with another first mask."""
    network = projection()
    change(next(node for node in network.graph.node if node.op_type == "Mul"))
    return network


def _without_constant(mask: onnx.NodeProto) -> None:
    mask.input[1] = mask.input[0]


def _telling(**changes: object) -> Callable[[], onnx.ModelProto]:
    told = {"stem": {"kind": "channel", "width": 16, "runs": [[0, 0, 16, 1]]} | changes}
    return _telling_text(json.dumps({"stem": {k: v for k, v in told["stem"].items() if v is not None}}))


def _telling_text(text: str) -> Callable[[], onnx.ModelProto]:
    def change(mask: onnx.NodeProto) -> None:
        mask.metadata_props[0].value = text

    return lambda: _changed(change)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (classifier, "gated.onnx has no gate"),
        (lambda: _changed(_without_constant), r'gates {"stem".*\(node \'mask2\', operator Mul\) is no Mul by'),
        (_telling_text("{"), "node 'mask2': metadata polar_deploy.gates cannot be read: JSONDecodeError"),
        (_telling_text("[1]"), "cannot be read: AttributeError"),
        (_telling(runs=None), "cannot be read: KeyError: 'runs'"),
        (_telling(runs=[[0, 0, 17, 1]]), r"runs \[\[0, 0, 17, 1\]\] for 16 channels and 16 gates"),
        (_telling(runs=[[-1, 0, 2, 1]]), r"runs \[\[-1, 0, 2, 1\]\] for 16 channels"),
        (_telling(width=8), "for 16 channels and 8 gates"),
        (_telling(kind="block"), "'stem' is a block of width 16"),
        (_telling(kind="row"), "'stem' is a row of width 16"),
        (_telling(runs=[[0, 0, 16]]), "cannot be read: ValueError"),
        (
            _telling_text('{"inner": {"kind": "stream", "width": 16, "runs": [[0, 0, 16, 1]]}}'),
            "'inner' has another width or kind here",
        ),
    ],
)
def test_a_network_without_proper_gates_is_refused(
    tmp_path: Path, network: Callable[[], onnx.ModelProto], message: str
) -> None:
    with pytest.raises(ContentError, match=message):
        table.measure(saved(network(), tmp_path / "gated.onnx"), TARGET)


def test_other_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        table.measure(tmp_path / "gated.onnx", TARGET)
    gated = str(saved(projection(), tmp_path / "gated.onnx"))
    assert command.main(["table", gated, "--target", "ort-fp32", "--batch", "0"]) == UsageError.exit_code
    assert command.main(["table", gated, "--target", "ort-fp31"]) == UsageError.exit_code
    assert "--batch is 0" in capsys.readouterr().err


def test_a_target_that_is_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise gpu.NoGpuError("no NVIDIA driver (libcuda.so.1 is not found)")

    monkeypatch.setattr(gpu, "first", missing)
    gated = saved(projection(), tmp_path / "gated.onnx")
    for name in ("trt-fp16", "rtx-fp16", "ort-cuda-fp16"):
        with pytest.raises(MachineError):
            table.measure(gated, targets.parse(name))
