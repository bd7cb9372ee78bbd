"""The export: one file that computes what PyTorch does, in which every gate can be told."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

import polar_deploy
from polar_deploy import Gates, reference
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.export import (
    OPSET,
    TOLERANCE,
    Example,
    check,
    evaluating,
    save,
    structure,
    with_weights,
)
from polar_deploy.gating import deploy
from polar_deploy.gating.analysis import Analysis, analyse
from polar_deploy.gating.deploy import GATES, KIND, SITE
from polar_deploy.module_names import module_of
from polar_deploy.surgery.detached import to_model
from polar_deploy.surgery.facts import Bools
from polar_deploy.tasks.classification import classifier
from tests.support.tiny import BLOCKS, SITES, Tiny

SIZE = 16
NAMES = {"inputs": ("input",), "outputs": ("logits",)}


class _Headed(Tiny):
    """The tiny network with a hidden linear layer: a site on [batch, channels]."""

    def __init__(self) -> None:
        super().__init__(20)
        self.act, self.head = nn.ReLU(), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(super().forward(x)))


@dataclass(frozen=True)
class _Exported:
    network: nn.Module
    analysis: Analysis
    opened: Bools
    path: Path
    right: npt.NDArray[np.float32]  # what PyTorch says to `_inputs(5)`

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path)


def _inputs(batch: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 3, SIZE, SIZE)).astype(np.float32)


def _named(batch: int) -> dict[str, npt.NDArray[np.float32]]:
    return {"input": _inputs(batch)}


def _logits(network: nn.Module, batch: int) -> npt.NDArray[np.float32]:
    return reference.outputs(classifier(10, SIZE), network, _named(batch))["logits"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> _Exported:
    """A gated network with a third of its gates closed, written; the hand-made reference masks nothing but tensors."""
    torch.manual_seed(0)
    network = _Headed()
    with torch.no_grad():
        network.train()(torch.randn(32, 3, SIZE, SIZE))  # running statistics that are not those of a new network
    analysis = analyse(network, Example.of(torch.zeros(2, 3, SIZE, SIZE)))
    opened = np.arange(analysis.choices.gates) % 3 > 0
    path = tmp_path_factory.mktemp("export") / "new" / "model.onnx"
    with deploy.masked(network, analysis, opened):
        deploy.export(network, analysis, path, **NAMES)
        right = _logits(network, 5)
    return _Exported(network, analysis, opened, path, right)


def _metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _marked(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if SITE in _metadata(node)]


def _open_of(exported: _Exported, name: str) -> Bools:
    """Which gates of a site, or of a block, are open."""
    gates = next(gates for gates, owner, _ in exported.analysis.choices.owners() if owner == name)
    return exported.opened[gates.start : gates.stop]


# --------------------------------------------------------------------------- gates in a file


def test_every_mask_is_a_mul_that_names_its_sites_and_their_kind(exported: _Exported) -> None:
    marked = _marked(exported.model)
    told = [(_metadata(node)[SITE], _metadata(node)[KIND]) for node in marked]
    readers = {  # of each site, counted in the definition
        "stem.0": 3,  # the first layer of both branches, and the shortcut
        "block1.conv1": 1,
        "block2.conv1": 1,
        "block2.conv2": 2,  # block3's first layer and the classifier
        "block3.conv1": 1,
        "linear": 1,
    }
    kinds = {name: "stream" if name in ("stem.0", "block2.conv2") else "channel" for name in readers}
    expected = [(name, kinds[name]) for name, count in readers.items() for _ in range(count)]
    expected += [(name, "block") for name in BLOCKS]
    assert sorted(told) == sorted(expected)  # the image has no mask: of it no channel can go
    assert {node.op_type for node in marked} == {"Mul"}
    assert sum(node.op_type == "Mul" for node in exported.model.graph.node) == len(marked)


def test_a_masks_note_says_which_channel_belongs_to_which_gate(exported: _Exported) -> None:
    for node in _marked(exported.model):
        ((name, entry),) = json.loads(_metadata(node)[GATES]).items()
        width = {**SITES, "linear": 20}.get(name, 1)
        assert (name, entry["kind"], entry["width"]) == (_metadata(node)[SITE], _metadata(node)[KIND], width)
        channels = {"block1.bn2:out": 12}.get(name, 24) if name in BLOCKS else width
        # first channel, first gate, channels, from gate to gate
        assert entry["runs"] == [[0, 0, channels, 0 if name in BLOCKS else 1]]


class _Joined(nn.Module):
    """Two layers, concatenated, before a convolution in four groups of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.groups, self.last = nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.groups(torch.cat([self.one(x), self.two(x)], 1)).relu()).mean((2, 3))


def test_a_mask_on_several_sites_tells_the_channels_of_each(tmp_path: Path) -> None:
    network = _Joined()
    analysis = analyse(network, Example.of(torch.zeros(2, 3, 4, 4)))
    deploy.write_open(network, analysis, tmp_path / "model.onnx")
    told = {}
    for node in _marked(onnx.load(tmp_path / "model.onnx")):
        channels: dict[int, tuple[str, int]] = {}
        for name, entry in json.loads(_metadata(node)[GATES]).items():
            assert (entry["kind"], entry["width"]) == ("channel", 2)
            for channel, gate, count, step in entry["runs"]:
                channels |= {channel + k: (name, gate + k * step) for k in range(count)}
        told[_metadata(node)[SITE], len(channels)] = [channels[index] for index in range(len(channels))]
    gates = [("one", 0), ("one", 1), ("two", 0), ("two", 1)]  # groups go whole
    assert told == {
        ("one,two", 8): [gate for gate in gates for _ in range(2)],
        ("one,two", 12): [gate for gate in gates for _ in range(3)],
    }


def test_the_other_factor_of_a_mask_is_its_constant(exported: _Exported) -> None:
    model = exported.model
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in _marked(model):
        name = _metadata(node)[SITE]
        (constant,) = [name for name in node.input if name in constants]
        (run,) = json.loads(_metadata(node)[GATES])[name]["runs"]
        expected = np.broadcast_to(_open_of(exported, name), run[2])
        assert np.array_equal(constants[constant].ravel(), expected)
        assert constants[constant].shape in {(run[2],), (run[2], 1, 1)}


def test_it_computes_what_closing_activations_by_hand_does(exported: _Exported) -> None:
    """Masks in the exported graph against hooks that are written here and multiply what the definition says."""

    def closed(name: str) -> Tensor:
        return torch.from_numpy(_open_of(exported, name).astype(np.float32)).reshape(1, -1, 1, 1)

    reads = {
        **dict.fromkeys(("block1.conv1", "block2.conv1", "block2.shortcut"), "stem.0"),
        **dict.fromkeys(("block3.conv1", "linear"), "block2.conv2"),
        **{f"block{number}.conv2": f"block{number}.conv1" for number in (1, 2, 3)},
        "head": "linear",
    }
    handles = []
    for path, site in reads.items():
        mask = closed(site)

        def before(module: nn.Module, args: tuple[Tensor], mask: Tensor = mask) -> Tensor:
            return args[0] * mask.reshape(1, -1, *[1] * (args[0].dim() - 2))

        handles.append(exported.network.get_submodule(path).register_forward_pre_hook(before))
    for block in BLOCKS:
        mask = closed(block)
        module = exported.network.get_submodule(block.removesuffix(":out"))
        handles.append(module.register_forward_hook(lambda module, args, output, mask=mask: output * mask))
    expected = _logits(exported.network, 5)
    for handle in handles:
        handle.remove()
    given = _run(exported.path, {"input": _inputs(5)})
    assert np.abs(given - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(exported.right, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def _run(path: Path, inputs: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.run(None, inputs)
    return given  # type: ignore[no-any-return]


def test_the_model_is_left_without_masks(exported: _Exported) -> None:
    assert exported.network.state_dict().keys() == _Headed().state_dict().keys()
    assert not any("polar_deploy" in name for name, _ in exported.network.named_buffers())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in exported.network.modules())


def test_masks_that_are_all_open_are_written_too(exported: _Exported, tmp_path: Path) -> None:
    """What a latency table is measured on."""
    deploy.write_open(exported.network, exported.analysis, tmp_path / "open.onnx")
    model = onnx.load(tmp_path / "open.onnx")
    assert sorted(_metadata(node)[SITE] for node in _marked(model)) == sorted(
        _metadata(node)[SITE] for node in _marked(exported.model)
    )
    (name,) = [value.name for value in model.graph.input]
    plain = _logits(exported.network, 3)
    assert np.abs(_run(tmp_path / "open.onnx", {name: _inputs(3)}) - plain).max() <= TOLERANCE * np.abs(plain).max()


def test_masks_that_did_not_come_through_are_named(
    exported: _Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an optimiser that takes a Mul by ones for nothing."""
    from onnxscript import rewriter

    def rewrite(model: onnx_ir.Model) -> onnx_ir.Model:
        for node in [node for node in model.graph if node.op_type == "Mul"]:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)
        return model

    monkeypatch.setattr(rewriter, "rewrite", rewrite)
    with pytest.raises(ContentError, match=r"the export lost .* or another one of 13 masks"):
        deploy.write_open(exported.network, exported.analysis, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- what a file is like


def test_the_graph_has_one_input_and_one_output_of_any_batch(exported: _Exported) -> None:
    model = exported.model
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    for value, name, shape in ((model.graph.input, "input", [3, SIZE, SIZE]), (model.graph.output, "logits", [10])):
        (only,) = value
        batch, *rest = only.type.tensor_type.shape.dim
        assert only.name == name
        assert only.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert batch.dim_param
        assert [dim.dim_value for dim in rest] == shape


@pytest.mark.parametrize("batch", [1, 5])
def test_it_computes_what_pytorch_does_at_any_batch(exported: _Exported, batch: int) -> None:
    given = _run(exported.path, {"input": _inputs(5)[:batch]})
    assert given.shape == (batch, 10)
    assert np.abs(given - exported.right[:batch]).max() <= TOLERANCE * np.abs(exported.right).max()


def test_all_layers_keep_their_full_size_and_norms_are_folded(exported: _Exported) -> None:
    shapes = {tuple(tensor.dims) for tensor in exported.model.graph.initializer}
    assert {(16, 12, 3, 3), (12, 16, 3, 3), (24, 16, 3, 3), (20, 24), (10, 20)} <= shapes
    assert not any(node.op_type == "BatchNormalization" for node in exported.model.graph.node)


def test_nothing_of_this_machine_is_in_the_file(exported: _Exported) -> None:
    content = exported.path.read_bytes()
    places = (Path(polar_deploy.__file__).parents[1], sys.prefix, os.getcwd(), tempfile.gettempdir(), Path.home())
    for place in places:
        if str(place) != "/":
            assert str(place).encode() not in content, place
    for trace in (b".py", b"Traceback", b"site-packages", b"File "):
        assert trace not in content
    assert list(exported.path.parent.iterdir()) == [exported.path]


def test_no_notes_of_the_exporter_are_left(exported: _Exported, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    save(structure(plain, Example.of(torch.zeros(2, 3, SIZE, SIZE))), tmp_path / "model.onnx", **NAMES)
    for path in (exported.path, tmp_path / "model.onnx"):
        assert not list(onnx.load(path).graph.metadata_props)
        assert b"pkg.torch" not in path.read_bytes()


# --------------------------------------------------------------------------- one capture, two graphs


def test_the_structure_keeps_layers_parameters_and_modules(exported: _Exported) -> None:
    model = to_model(structure(exported.network, Example.of(torch.zeros(2, 3, SIZE, SIZE))))
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, parameter in exported.network.named_parameters():
        assert np.array_equal(held[name], parameter.detach().numpy()), name
    layers = [(node.op_type, module_of(node)) for node in model.graph.node]
    for path, module in exported.network.named_modules():
        kind = {nn.Conv2d: "Conv", nn.BatchNorm2d: "BatchNormalization", nn.Linear: "Gemm"}.get(type(module))
        assert kind is None or (kind, path) in layers


def test_a_structure_takes_the_weights_of_another_network(tmp_path: Path) -> None:
    """One capture serves all networks of a kind; with names, and folded."""
    torch.manual_seed(0)
    first, other = Tiny(10), Tiny(10)
    with torch.no_grad():
        other.train()(torch.randn(32, 3, SIZE, SIZE))  # running statistics that are not those of a new network
    made = structure(first, Example.of(torch.zeros(1, 3, SIZE, SIZE)))
    onnx.save(to_model(made), tmp_path / "structure.onnx")
    (name,) = (value.name for value in made.model.graph.input)
    _require_close(_run(tmp_path / "structure.onnx", {name: _inputs(3)}), _logits(first, 3))
    for network in (other, first):
        save(with_weights(made, network), tmp_path / "model.onnx", **NAMES)
        _require_close(_run(tmp_path / "model.onnx", {"input": _inputs(3)}), _logits(network, 3))
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "model.onnx").graph.node)


def _require_close(given: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    assert np.abs(given - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_a_network_that_was_changed_since_is_refused(exported: _Exported) -> None:
    changed = copy.deepcopy(exported.network)
    changed.head = nn.Linear(20, 7)
    with pytest.raises(ContentError, match=r"head.weight is \[7, 20\] in _Headed, \[10, 20\]"):
        deploy.write_open(changed, exported.analysis, Path("never.onnx"))


def test_a_network_that_computes_something_else_since_is_found_out(tmp_path: Path) -> None:
    """Its weights have the shapes that they had: only running both tells."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    gates = Gates(network, torch.zeros(2, 3, SIZE, SIZE), budget="macs=0.9", align=1)
    network[1] = nn.Sigmoid()
    with pytest.raises(ContentError, match="scale apart from Sequential"):
        gates.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class _Equal(nn.Module):
    """Two layers whose weights are equal, and shall not become one for that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.load_state_dict(self.one.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu())


def test_equal_constants_stay_apart(tmp_path: Path) -> None:
    save(structure(_Equal(), Example.of(torch.zeros(2, 6))), tmp_path / "model.onnx", **NAMES)
    dims = [tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert dims.count((6, 6)) == 2


def test_modes_are_put_back_module_by_module() -> None:
    network = Tiny(10).train()
    network.block1.bn1.eval()  # as some keep theirs frozen
    before = [module.training for module in network.modules()]
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before
    _logits(network, 1)
    assert [module.training for module in network.modules()] == before


# --------------------------------------------------------------------------- what people pass


@pytest.mark.parametrize(
    ("given", "args", "named", "batch"),
    [
        (torch.zeros(4, 3), [(4, 3)], {}, 4),
        (torch.zeros(1, 3), [(2, 3)], {}, 2),  # an exporter takes a batch of one for a constant
        ((torch.zeros(3, 2), torch.zeros(3)), [(3, 2), (3,)], {}, 3),
        ([torch.zeros(1, 2), torch.zeros(5, 2)], [(2, 2), (5, 2)], {}, 2),
        ({"x": torch.zeros(1, 2), "mask": torch.ones(1)}, [], {"x": (2, 2), "mask": (2,)}, 2),
        ((torch.zeros(1, 2), {"inner": [torch.zeros(1, 4)]}), [(2, 2), {"inner": [(2, 4)]}], {}, 2),
    ],
    ids=["tensor", "batch of one", "tuple", "list", "dictionary", "nested"],
)
def test_an_example_is_read_from_what_people_pass(given: Any, args: Any, named: Any, batch: int) -> None:
    example = Example.of(given)
    shapes = example.mapped(lambda leaf: tuple(leaf.shape))
    assert (list(shapes.args), dict(shapes.kwargs)) == (args, named)
    assert example.batch == batch
    assert all(isinstance(tensor, Tensor) for tensor in example.tensors)


class _Named(nn.Module):
    """Takes two named arguments in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, shift: Tensor) -> Tensor:
        return self.linear(x) + shift


def test_named_arguments_are_exported(tmp_path: Path) -> None:
    network = _Named()
    save(
        structure(network, Example.of({"x": torch.zeros(2, 4), "shift": torch.zeros(2, 2)})),
        tmp_path / "m.onnx",
        inputs=(),
        outputs=(),
    )
    x, shift = _inputs(1)[0, :, 0, :4], _inputs(1)[0, :, 1, :2]  # a batch of 3
    names = [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input]
    given = _run(tmp_path / "m.onnx", dict(zip(names, (x, shift), strict=True)))
    with torch.no_grad():
        expected = network(torch.from_numpy(x), shift=torch.from_numpy(shift)).numpy()
    np.testing.assert_allclose(given, expected, atol=1e-6)


class _Fixed(nn.Module):
    """Works at a batch of two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = x
        return self.linear(torch.stack([one, other]))


def test_a_network_of_one_batch_size_is_exported_at_that(tmp_path: Path) -> None:
    network, x = _Fixed(), _inputs(1)[0, 0, :2, :4]
    save(structure(network, Example.of(torch.zeros(2, 4))), tmp_path / "model.onnx", **NAMES)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(_run(tmp_path / "model.onnx", {"input": x}), expected, atol=1e-6)


class _Stubborn(nn.Module):
    """Its control flow depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) if x.sum().item() > 0 else x


def test_a_network_that_cannot_be_exported_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ContentError, match="PyTorch cannot export _Stubborn: ") as caught:
        save(structure(_Stubborn(), Example.of(torch.zeros(2, 3, SIZE, SIZE))), tmp_path / "model.onnx", **NAMES)
    assert "\n" not in caught.value.what
    assert "test_export.py, line" in caught.value.what
    assert "x.sum().item() > 0 else x" in caught.value.what
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")  # nor the graph as far as it was captured


# --------------------------------------------------------------------------- the check


def test_the_check_measures_the_difference_in_the_outputs_scale(exported: _Exported) -> None:
    right = exported.right
    assert 0 <= check(exported.path, _named(5), {"logits": right}) <= TOLERANCE
    wrong, scale = right.copy(), np.abs(right).max()
    wrong[2, 3] += 0.01 * scale * (-1 if abs(right[2, 3]) == scale else 1)
    with pytest.raises(ContentError, match=rf"differs from PyTorch by 0\.0\d+ of .*allowed: {TOLERANCE}"):
        check(exported.path, _named(5), {"logits": wrong})


def test_nan_is_no_agreement(exported: _Exported) -> None:
    wrong = exported.right.copy()
    wrong[0, 0] = np.nan
    with pytest.raises(ContentError, match="differs from PyTorch by nan"):
        check(exported.path, _named(5), {"logits": wrong})


def test_without_onnxruntime_the_error_says_which_extra(exported: _Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MachineError, match="onnxruntime is not installed") as caught:
        check(exported.path, _named(1), {"logits": np.zeros((1, 10), np.float32)})
    assert "'.[ort]'" in caught.value.todo


def test_a_reference_holds_its_arrays(tmp_path: Path) -> None:
    arrays = {"inputs/input": _inputs(2), "full/logits": np.arange(6.0).reshape(2, 3)}
    reference.write(tmp_path / "reference.npz", _named(2), {"full": {"logits": arrays["full/logits"]}})
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as stored:
        assert set(stored) == set(arrays)
        assert all(np.array_equal(stored[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("axes", [(), (3,), (4, 3)], ids=["3", "4", "5"])
@pytest.mark.parametrize("masked", ["not", "by tokens", "by batch", "causal"])
def test_attention_with_any_number_of_axes_is_exported(axes: tuple[int, ...], masked: str, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 24)
            self.register_buffer("mask", torch.randn(*(1 for _ in axes), 5, 5))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            query, key, value = self.inner(tokens).chunk(3, -1)
            mask = {"by tokens": self.mask.reshape(5, 5), "by batch": self.mask.expand(1, *self.mask.shape)}.get(masked)
            return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=masked == "causal")

    torch.manual_seed(0)
    network, tokens = Attention().eval(), torch.randn(2, *axes, 5, 8)
    save(structure(network, Example.of(tokens)), tmp_path / "a.onnx", inputs=["x"], outputs=["y"])
    (result,) = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": tokens.numpy()})
    np.testing.assert_allclose(result, network(tokens).detach(), atol=1e-5)


class _Pooled(nn.Module):
    """Its residual sum is pooled to one pixel, and lies in memory as `lay` has it."""

    def __init__(self, lay: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Linear(16, 4)
        self.pool, self.lay = nn.AdaptiveAvgPool2d((1, 1)), lay

    def forward(self, x: Tensor) -> Tensor:
        x = self.lay(self.stem(x)).relu()
        return self.head(self.pool(x + self.branch(x).relu()).flatten(1))


@pytest.mark.parametrize(
    "network",
    [
        _Pooled().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        _Pooled(lambda x: x.to(memory_format=torch.channels_last)),
        _Pooled(lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    ],
    ids=["weights", "activations", "permuted"],
)
def test_channels_that_lie_last_in_memory_have_their_gates(network: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(2, 3, 8, 8)
    gates = Gates(network, example, budget=0.6, steps=10)
    assert [(site.name, site.kind) for site in gates.sites] == [("stem", "stream")]
    gates.export(tmp_path / "gated.onnx", inputs=("x",))
    session = onnxruntime.InferenceSession(tmp_path / "gated.onnx")
    (found,) = session.run(None, {"x": example.numpy()})
    np.testing.assert_allclose(found, network.eval()(example).detach().numpy(), rtol=1e-4, atol=1e-5)


class _Branches(nn.Module):
    """A layer that is called twice, a folded BatchNormalization, an attention, and what the network does itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.twice = nn.Conv2d(8, 8, 1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.twice(torch.relu(self.twice(x))) + x)
        return self.encoder(x.flatten(2).transpose(1, 2))


def test_nodes_are_named_after_their_modules(tmp_path: Path) -> None:
    network = _Branches().eval()
    save(structure(network, Example.of(torch.randn(2, 3, 4, 4))), tmp_path / "a.onnx")
    nodes = onnx.load(tmp_path / "a.onnx").graph.node
    assert [node.name for node in nodes][:6] == [
        "stem.0/Conv",  # with the BatchNormalization of stem.1
        "twice/Conv",
        "Relu",
        "twice/Conv_1",
        "Add",
        "Relu_1",
    ]
    names = {node.name for node in nodes}
    assert len(names) == len(nodes)
    assert {
        "encoder.linear1/MatMul",
        "encoder.norm1/LayerNormalization",
        "encoder.self_attn/MatMul",
        "encoder/Add",
    } <= names
