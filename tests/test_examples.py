"""Every file in examples/ runs, keeps to its budget by surgery's own count, and cuts to the same function both ways."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polar_deploy import Gates
from polar_deploy.surgery import compress_file, cost
from tests.conftest import ROOT

NEEDS = {  # what each example imports beside torch
    "audio_1d": "torch",
    "detector_backbone": "torchvision",
    "huggingface_trainer": "transformers",
    "lightning_loop": "lightning",
    "timm_network": "timm",
    "two_inputs": "torch",
    "unet_one_channel": "torch",
}


@dataclass(frozen=True)
class Ran:
    """What an example made and printed, and what surgery made of its exported graph."""

    gates: Gates
    small: nn.Module
    printed: str
    gated: Path
    compressed: Path


@pytest.fixture(scope="module", params=sorted(NEEDS))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """An example's `main` was called, and its gated network exported and cut."""
    name: str = request.param
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder, capture = tmp_path_factory.mktemp(name), request.config.pluginmanager.getplugin("capturemanager")
    capture.read_global_capture()
    gates, small = module.main()
    printed, _ = capture.read_global_capture()
    gates.export(folder / "gated.onnx")
    compress_file(folder / "gated.onnx", folder / "small.onnx")
    yield Ran(gates, small, printed, folder / "gated.onnx", folder / "small.onnx")
    gates.detach()


def _counted(path: Path) -> dict[str, int]:
    """MACs and parameters of a graph, masks aside."""
    model = onnx.load(path)
    masks = sum(int(np.prod(each.dims)) for each in model.graph.initializer if "polar_deploy" in each.name)
    return {"macs": cost(model).macs, "params": cost(model).params - masks}


def _inputs(path: Path, batch: int = 3) -> list[np.ndarray]:
    """Noise [batch, ...] for every input of a graph."""
    rng = np.random.default_rng(0)
    sizes = [[d.dim_value for d in each.type.tensor_type.shape.dim[1:]] for each in onnx.load(path).graph.input]
    return [rng.standard_normal((batch, *size)).astype(np.float32) for size in sizes]


def _outputs(network: nn.Module, inputs: list[np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        made = network.eval()(*map(torch.from_numpy, inputs))
    return [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def _run(path: Path, inputs: list[np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: x for each, x in zip(session.get_inputs(), inputs, strict=True)})


def test_every_file_in_examples_is_run_here() -> None:
    assert sorted(NEEDS) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_the_budget_is_met_by_the_count_of_what_surgery_leaves(ran: Ran) -> None:
    before, after = _counted(ran.gated), _counted(ran.compressed)
    assert ran.gates.phase == "frozen"
    for name, share in ran.gates.budget.items():
        assert after[name] <= share * before[name]
    assert max(after[name] / before[name] / share for name, share in ran.gates.budget.items()) > 0.8  # and no far less
    assert before == ran.gates.full
    assert after == ran.gates.promise()


def test_cut_gated_and_compressed_networks_agree(ran: Ran) -> None:
    inputs = _inputs(ran.gated)
    gated = _outputs(ran.gates.model, inputs)
    for others in (_outputs(ran.small, inputs), _run(ran.gated, inputs), _run(ran.compressed, inputs)):
        assert len(others) == len(gated)
        for one, other in zip(gated, others, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * np.abs(one).max())


def test_the_cut_module_has_the_size_that_was_promised(ran: Ran) -> None:
    inputs = [torch.from_numpy(x) for x in _inputs(ran.gated, batch=1)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ran.small.eval()(*inputs)
    assert counter.get_total_flops() // 2 == ran.gates.promise()["macs"]
    assert sum(p.numel() for p in ran.small.parameters()) < sum(p.numel() for p in ran.gates.model.parameters())


def test_cost_budget_and_exactness_are_printed(ran: Ran) -> None:
    assert f"{ran.gates.full['macs']:,}" in ran.printed or str(ran.gates.full) in ran.printed
    assert all(str(share) in ran.printed for share in ran.gates.budget.values())
    assert f"{ran.gates.promise()['macs']:,}" in ran.printed or str(ran.gates.promise()) in ran.printed
    assert "differs from" in ran.printed
