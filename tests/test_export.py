"""The export: one file that computes what PyTorch does, in which every gate can be told."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import polar_deploy
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.export import KIND, OPSET, SITE, TOLERANCE, check, export, outputs, write_reference
from polar_deploy.gating.network import GatedNetwork
from tests.tiny import Tiny

SIZE = 16


class _Headed(Tiny):
    """The tiny network with a hidden linear layer: a site on [batch, channels]."""

    def __init__(self) -> None:
        super().__init__(20)
        self.act, self.head = nn.ReLU(), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(super().forward(x)))


@dataclass(frozen=True)
class _Exported:
    gated: GatedNetwork
    static: fx.GraphModule
    path: Path
    returned: onnx.ModelProto

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path)


def _inputs(batch: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 3, SIZE, SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> _Exported:
    torch.manual_seed(0)
    network = _Headed()
    with torch.no_grad():
        network.train()(torch.randn(32, 3, SIZE, SIZE))  # running statistics that are not those of a new network
    gated = GatedNetwork(network, SIZE)
    gated.freeze((torch.arange(gated.masks) % 3 > 0).float())
    static, path = gated.static(), tmp_path_factory.mktemp("export") / "new" / "model.onnx"
    returned = export(static, SIZE, path, gated.sites)
    return _Exported(gated, static, path, returned)


def _metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _gates(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {_metadata(node)[SITE]: node for node in model.graph.node if SITE in _metadata(node)}


def test_every_gate_is_a_mul_that_names_its_site_and_kind(exported: _Exported) -> None:
    gates = _gates(exported.model)
    assert {name: _metadata(node)[KIND] for name, node in gates.items()} == {
        "block1.relu1": "channel",
        "block1.add": "block",
        "block2.relu1": "channel",
        "block2.add": "block",
        "block3.relu1": "channel",
        "block3.add": "block",
        "act": "channel",
    }
    assert {node.op_type for node in gates.values()} == {"Mul"}
    assert sum(SITE in _metadata(node) for node in exported.model.graph.node) == len(exported.gated.sites)


def test_the_other_factor_of_a_gate_is_its_constant(exported: _Exported) -> None:
    model = exported.model
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for site, start in zip(exported.gated.sites, exported.gated.starts, strict=True):
        (name,) = [name for name in _gates(model)[site.name].input if name in constants]
        opened = exported.gated.open()[start : start + site.gates].expand(site.width).numpy()
        shape = (1, 20) if site.name == "act" else (1, site.width, 1, 1)
        assert np.array_equal(constants[name], opened.reshape(shape))


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
    inputs = _inputs(batch, seed=batch)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    (given,) = session.run(["logits"], {"input": inputs})
    exported.gated.eval()
    with torch.no_grad():
        expected = exported.gated(torch.from_numpy(inputs)).numpy()
    assert given.shape == (batch, 10)
    assert np.abs(given - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_array_equal(outputs(exported.static, inputs), expected)


def test_all_layers_keep_their_full_size(exported: _Exported) -> None:
    shapes = {tuple(tensor.dims) for tensor in exported.model.graph.initializer}
    assert {(16, 12, 3, 3), (12, 16, 3, 3), (24, 16, 3, 3), (20, 24), (10, 20)} <= shapes


def test_nothing_of_this_machine_is_in_the_file(exported: _Exported) -> None:
    content = exported.path.read_bytes()
    places = (Path(polar_deploy.__file__).parents[1], sys.prefix, os.getcwd(), tempfile.gettempdir(), Path.home())
    for place in places:
        if str(place) != "/":
            assert str(place).encode() not in content, place
    for trace in (b".py", b"Traceback", b"site-packages", b"File "):
        assert trace not in content
    assert list(exported.path.parent.iterdir()) == [exported.path]


def test_what_is_returned_is_what_was_written(exported: _Exported) -> None:
    assert exported.returned.SerializeToString(deterministic=True) == exported.model.SerializeToString(
        deterministic=True
    )


def test_the_check_measures_the_difference_in_the_outputs_scale(exported: _Exported) -> None:
    inputs = _inputs(4)
    right = outputs(exported.static, inputs)
    assert 0 <= check(exported.path, inputs, right) <= TOLERANCE
    wrong, scale = right.copy(), np.abs(right).max()
    wrong[2, 3] += 0.01 * scale * (-1 if abs(right[2, 3]) == scale else 1)
    with pytest.raises(ContentError, match=rf"differs from PyTorch by 0\.0\d+ of .*allowed: {TOLERANCE}"):
        check(exported.path, inputs, wrong)


def test_nan_is_no_agreement(exported: _Exported) -> None:
    wrong = outputs(exported.static, _inputs(2))
    wrong[0, 0] = np.nan
    with pytest.raises(ContentError, match="differs from PyTorch by nan"):
        check(exported.path, _inputs(2), wrong)


def test_without_onnxruntime_the_error_says_which_extra(exported: _Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MachineError, match="onnxruntime is not installed") as caught:
        check(exported.path, _inputs(1), np.zeros((1, 10), np.float32))
    assert "'ort'" in caught.value.todo


def test_gates_that_did_not_come_through_are_named(exported: _Exported, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ContentError, match=r"lost or doubled the gates of act, block1\.add, block1\.relu1"):
        export(plain, SIZE, tmp_path / "model.onnx", exported.gated.sites)
    assert not list(tmp_path.iterdir())


class _Stubborn(nn.Module):
    """Its control flow depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) if x.sum().item() > 0 else x


def test_a_network_that_cannot_be_exported_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ContentError, match="PyTorch cannot export _Stubborn: ") as caught:
        export(_Stubborn(), SIZE, tmp_path / "model.onnx")
    assert "\n" not in caught.value.what
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_reference_holds_its_arrays(tmp_path: Path) -> None:
    arrays = {"inputs": _inputs(2), "full": np.arange(6.0).reshape(2, 3)}
    write_reference(tmp_path / "reference.npz", arrays)
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as stored:
        assert set(stored) == set(arrays)
        assert all(np.array_equal(stored[name], array) for name, array in arrays.items())


def test_no_notes_of_the_exporter_are_left(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = export(plain, 16, tmp_path / "model.onnx")
    assert not list(model.graph.metadata_props)
    assert b"pkg.torch" not in (tmp_path / "model.onnx").read_bytes()
