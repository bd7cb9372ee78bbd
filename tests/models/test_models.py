from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from polar_deploy import models
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.tasks.classification import classifier

torch.set_num_threads(1)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)])
def test_sizes_are_those_of_the_paper(depth: int, millions: float) -> None:
    model = models.build(f"resnet{depth}", classifier(10, 32))
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.005)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == depth - 1


@pytest.mark.parametrize(("size", "classes"), [(16, 10), (32, 100), (64, 3), (21, 2)])
def test_the_input_may_have_any_size(size: int, classes: int) -> None:
    model = models.build("resnet20", classifier(classes, size))
    assert model(torch.rand(2, 3, size, size)).shape == (2, classes)


def test_the_option_a_shortcut() -> None:
    block = models.build("resnet20", classifier(10, 32)).get_submodule("layer2.0")
    x = torch.rand(2, 16, 6, 6)
    padded = block.get_submodule("shortcut")(x)
    assert padded.shape == (2, 32, 3, 3)
    assert torch.equal(padded[:, 8:24], x[:, :, [0, 2, 4]][..., [0, 2, 4]])
    assert padded[:, :8].count_nonzero() == padded[:, 24:].count_nonzero() == 0


def test_every_relu_is_a_module_of_its_own() -> None:
    model = models.build("resnet20", classifier(10, 32))
    trace = torch.fx.symbolic_trace(model)
    called = [str(node.target) for node in trace.graph.nodes if node.op == "call_module" and "relu" in str(node.target)]
    assert called == ["relu", *(f"layer{s}.{b}.relu{i}" for s in (1, 2, 3) for b in range(3) for i in (1, 2))]
    x = torch.rand(3, 3, 24, 24)
    assert torch.equal(trace.eval()(x), model.eval()(x))


def test_no_shape_is_baked_into_the_graph() -> None:
    """What makes the batch dynamic in an export: nothing asks for a size, nothing is reshaped to one."""
    graph = torch.fx.symbolic_trace(models.build("resnet20", classifier(10, 16))).graph
    methods = {node.target for node in graph.nodes if node.op == "call_method"}
    functions = {node.target.__name__ for node in graph.nodes if node.op == "call_function"}
    assert methods == set()
    assert functions == {"add", "getitem", "pad", "flatten"}


def test_the_start_values_follow_the_seed_and_kaiming() -> None:
    torch.manual_seed(1)
    first = models.build("resnet20", classifier(10, 32)).state_dict()
    torch.manual_seed(1)
    second = models.build("resnet20", classifier(10, 32)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    weight = first["layer3.2.conv2.weight"]
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("mobilenet_v2", 32), ("googlenet", 64), ("vit_b_32", 64)]
)
def test_torchvisions_classifiers(name: str, size: int) -> None:
    model = models.build(name, classifier(7, size))
    assert model.training
    assert model(torch.rand(2, 3, size, size)).shape == (2, 7)  # in training mode: no auxiliary heads


def test_the_known_names() -> None:
    known = models.known()
    assert {"resnet56", "resnet50", "vgg16_bn", "inception_v3"} < set(known)
    assert not {"fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "r3d_18", "raft_large"} & set(known)


@pytest.mark.parametrize(("name", "nearest"), [("resnet57", "resnet56"), ("mobilenetv2", "mobilenet_v2")])
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no model called '{name}'") as error:
        models.build(name, classifier(10, 32))
    assert nearest in error.value.todo


def test_images_too_small_for_a_network() -> None:
    with pytest.raises(UsageError, match="squeezenet1_1 cannot be built for images of 8 pixels: ") as error:
        models.build("squeezenet1_1", classifier(10, 8))
    assert "\n" not in error.value.what
    assert "input_size" in error.value.todo


CODE = """
from torch import nn
from polar_deploy.errors import UsageError

def net(classes): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
def fixed(classes): return net(10)
def pair(classes):
    class Pair(nn.Module):
        def forward(self, x): return x, x
    return Pair()
def large(classes): return nn.Sequential(nn.Conv2d(3, classes, 99))
def nothing(classes): return None
def fails(classes): raise KeyError("depth")
def refuses(classes): raise UsageError("no", "do")
def no_arguments(): return net(2)
def theirs(*, weights=None, num_classes=1000): return net(num_classes)
def any_options(weights=None, **options): return net(**{"classes": options["num_classes"]})
def ours_first(classes, num_classes=1000, **options): return net(classes)
"""


@pytest.fixture
def _own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_nets.py").write_text(CODE)
    yield
    sys.modules.pop("own_nets", None)


@pytest.mark.usefixtures("_own_code")
@pytest.mark.parametrize("function", ["net", "theirs", "any_options", "ours_first"])
def test_the_users_own(function: str) -> None:
    model = models.build(f"own_nets:{function}", classifier(6, 12))
    assert model.training
    assert parameters(model) == (3 * 9 + 1) * 4 + (4 + 1) * 6


@pytest.mark.usefixtures("_own_code")
@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("fixed", ContentError, r"answers 2 samples with float32 \[B, 10\] for logits, not with float32 \[B, 6\]"),
        ("pair", ContentError, "the network returns 2 outputs, the task classification has 1: logits"),
        ("large", ContentError, r"fails on input float32 \[B, 3, 12, 12\]: RuntimeError"),
        ("nothing", ContentError, "returned a NoneType"),
        ("fails", ContentError, r"own_nets.py, line \d+: KeyError: 'depth'"),
        ("refuses", UsageError, "^no\n"),
        ("no_arguments", ContentError, r"cannot be called with classes: .*\n.*def no_arguments\(classes\):"),
        ("absent", UsageError, "own_nets has no function absent"),
    ],
)
def test_what_is_wrong_with_the_users_own_is_named(function: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        models.build(f"own_nets:{function}", classifier(6, 12))
