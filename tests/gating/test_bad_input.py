"""What is wrong with arguments, networks and calls is said in one sentence, before anything is trained."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polar_deploy import Gates
from polar_deploy.errors import ContentError, UsageError

EXAMPLE = torch.zeros(1, 3, 8, 8)
STEPS = 6


def network() -> nn.Module:
    """Two convolutions, the second one inside of something, and a head."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), inner, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    )


@pytest.fixture(scope="module")
def analysis() -> Any:
    """What is known of `network`: looked at once, since that takes a second."""
    return Gates(network(), EXAMPLE, rehearse=0).analysis


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"close_from": 0.9, "freeze_at": 0.5}, "close_from=0.9, freeze_at=0.5"),
        ({"close_from": 1.0}, "close_from=1.0, freeze_at=1.0"),
        ({"close_from": math.nan}, "close_from=nan"),
        ({"mode": "samples"}, "mode='samples'"),
        ({"steps": None}, "steps=None"),
        ({"steps": "10"}, "steps='10'"),
        ({"close_from": "0.3"}, "close_from='0.3'"),
        ({"mode": ["batch"]}, r"mode=\['batch'\]"),
        ({"align": None}, "align=None"),
        ({"align": 8.5}, r"align=8\.5"),
        ({"min_width": "0.5"}, "min_width='0.5'"),
        ({"device": 3}, "device=3"),
        ({"device": Path("none.json")}, r"none\.json"),
        ({"align": 0}, "align=0"),
        ({"min_width": 1.5}, "min_width=1.5"),
        ({"budget": None}, "budget macs=None"),
        ({"budget": {"macs": "half"}}, "budget macs=half"),
    ],
)
def test_an_argument_out_of_its_range_is_named(analysis: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Gates(network(), EXAMPLE, analysis=analysis, rehearse=0, **wrong)


def test_a_share_of_numpy_is_a_budget(analysis: Any) -> None:
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0, budget=np.float32(0.75))
    assert gates.budget == {"macs": 0.75}


def test_a_network_that_has_gates_gets_no_more_of_them(analysis: Any) -> None:
    """As in a notebook whose cell is run again: all masks would count twice."""
    model = network()
    gates = Gates(model, EXAMPLE, analysis=analysis, rehearse=0)
    for again in (model, model[2]):
        with pytest.raises(UsageError, match=r"has gates already, on (2\.)?0"):
            Gates(again, EXAMPLE, analysis=analysis, rehearse=0)
    gates.detach()
    Gates(model, EXAMPLE, analysis=analysis, rehearse=0).detach()


def test_an_analysis_of_another_network_is_refused(analysis: Any) -> None:
    with pytest.raises(UsageError, match=r"has a layer 2\.0, which Sequential has not"):
        Gates(network()[:2], EXAMPLE, analysis=analysis, rehearse=0)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_gates_are_for_networks_in_float32(kind: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"the parameters of Sequential are {kind}"):
        Gates(network().to(kind), EXAMPLE.to(kind))


def test_what_is_to_be_ignored_has_to_be_there() -> None:
    with pytest.raises(UsageError, match=r"ignore='clasifier\*' fits no module of Sequential"):
        Gates(network(), EXAMPLE, ignore=["2", "clasifier*"])


def test_what_is_inside_of_something_ignored_is_ignored_too() -> None:
    """And one pattern is a pattern, not the letters of it."""
    gates = Gates(network(), EXAMPLE, ignore="2", budget=0.9, rehearse=0)
    assert gates.ungated["2.0"] == "it is to be ignored"
    assert [site.name for site in gates.sites] == ["2.0"]  # the head reads it


def test_steps_in_which_the_model_is_not_called_are_no_training(analysis: Any) -> None:
    """Its layers are, one by one: nobody learns what a gate is worth, and what is closed would be arbitrary."""
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0, steps=STEPS, close_from=0.3)

    def train() -> None:
        for _ in range(STEPS):
            x = torch.randn(2, 3, 8, 8)
            for layer in gates.model:
                x = layer(x)
            x.square().mean().backward()
            gates.step()

    with pytest.raises(UsageError, match="no gate has seen a gradient in 2 steps"):
        train()


def test_gates_that_were_taken_off_do_nothing_more(analysis: Any, tmp_path: Path) -> None:
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
    gates.detach()
    for call in (gates.freeze, gates.cut, lambda: gates.export(tmp_path / "gated.onnx")):
        with pytest.raises(UsageError, match=r"Sequential has no mask on (2\.)?\d"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_layer_that_was_replaced_since_is_named(analysis: Any) -> None:
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
    gates.model[5] = nn.Linear(16, 7)
    with pytest.raises(UsageError, match="Sequential has no mask on 5"):
        gates.freeze()


def test_only_what_was_cut_itself_is_merged(analysis: Any) -> None:
    """The names of a wrapper's weights are others: nothing of it would arrive, and nobody would notice."""
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
    gates.freeze()
    small = gates.cut()
    with pytest.raises(UsageError, match=r"has module\.0\.bias, which Sequential has not"):
        gates.merge(torch.optim.swa_utils.AveragedModel(small))
    gates.merge(small)


@pytest.mark.parametrize("names", [{"inputs": "x"}, {"inputs": ["x", "y"]}, {"inputs": ["x"], "outputs": ["x"]}])
def test_each_tensor_has_a_name_of_its_own(analysis: Any, names: dict[str, Any], tmp_path: Path) -> None:
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
    with pytest.raises(UsageError, match="give a list of 1 names"):
        gates.export(tmp_path / "gated.onnx", **names)


class Fixed(nn.Module):
    """Channels are scaled by a tensor that is no buffer, so that nobody can cut it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5 + torch.rand(16, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_what_cannot_be_cut_is_named() -> None:
    model = network()
    model[1] = Fixed()
    gates = Gates(model, EXAMPLE, rehearse=0)
    gates.freeze(np.arange(len(gates.opened)) % 2 == 0)
    with pytest.raises(ContentError, match=r"cannot be cut as a module: RuntimeError: .* in 1\n"):
        gates.cut()


def test_a_network_without_values_or_shapes_is_refused(analysis: Any) -> None:
    with pytest.raises(UsageError, match=r"0\.weight of Sequential is on the meta device"):
        Gates(network().to("meta"), EXAMPLE)
    with pytest.raises(UsageError, match=r"0\.weight of Sequential is on the meta device"):
        Gates(network().to("meta"), EXAMPLE, analysis=analysis)
    lazy = network()
    lazy[5] = nn.LazyLinear(4)
    with pytest.raises(UsageError, match=r"5\.weight of Sequential has no shape yet.*\n.*run the network once"):
        Gates(lazy, EXAMPLE)


def test_an_lstm_whose_projection_the_exporter_loses_is_refused() -> None:
    """Its graph would compute something else, and cost something else."""
    with pytest.raises(ContentError, match=r"cannot export 0 with proj_size=8: it drops the projection"):
        Gates(nn.Sequential(nn.LSTM(6, 16, proj_size=8)), torch.zeros(2, 5, 6), rehearse=0)


def test_no_layer_is_left_without_channels(analysis: Any) -> None:
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
    opened = np.ones(len(gates.opened), bool)
    opened[gates.sites[1].gates] = False
    with pytest.raises(UsageError, match=r"all 16 gates of 2\.0 are closed"):
        gates.freeze(opened)
    with pytest.raises(UsageError, match=r"\(3,\) gates were given, the network has 32"):
        gates.freeze(opened[:3])
    assert gates.phase == "open"
    assert gates.opened.all()


class Detached(nn.Module):
    """No gradient goes back into the first part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).detach()
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def test_gates_that_no_gradient_reaches_are_named() -> None:
    """They count as worth nothing, and would be closed in silence."""
    torch.manual_seed(0)
    gates = Gates(Detached(), EXAMPLE, budget=0.9, steps=STEPS, close_from=0.3, freeze_at=1.0, rehearse=0)
    assert [site.name for site in gates.sites] == ["first", "second", "hidden"]

    def train() -> None:
        for _ in range(3):
            gates.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            gates.step()

    with pytest.warns(UserWarning, match="no gradient reached the gates of first: they count as worth nothing"):
        train()
    assert gates.phase == "learning"


@pytest.mark.parametrize("given", [lambda x: x, None, "resnet18"])
def test_what_is_no_network_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"was given as the network\n.*give a torch\.nn\.Module"):
        Gates(given, EXAMPLE)


def test_ignore_takes_paths() -> None:
    """And not the modules themselves, which other libraries take."""
    for wrong in ([network()[0]], None, network()[0]):
        with pytest.raises(UsageError, match=r"ignore holds a (Conv2d|NoneType), and takes the paths of modules"):
            Gates(network(), EXAMPLE, ignore=wrong)


def test_a_network_that_is_in_another_type_by_now_is_refused(analysis: Any, tmp_path: Path) -> None:
    for kind in (torch.bfloat16, torch.float64):  # of which the wider one can be cut, and goes into no graph
        gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
        gates.freeze()
        gates.model.to(kind)
        match = rf"the parameters of Sequential are {kind}\n.*float\(\)"
        if kind is torch.float64:
            assert next(gates.cut().parameters()).dtype is kind
        else:
            with pytest.raises(UsageError, match=match):
                gates.cut()
        with pytest.raises(UsageError, match=match):
            gates.export(tmp_path / "gated.onnx")
        gates.model.float()
        gates.cut()
        assert not list(tmp_path.iterdir())


def test_a_state_with_a_budget_that_nothing_tells_is_refused(analysis: Any) -> None:
    """It would end the training when gates are chosen."""
    gates = Gates(network(), EXAMPLE, analysis=analysis, rehearse=0)
    state = gates.state_dict() | {"budget": {"latency": 0.6}, "step": 7}
    with pytest.raises(ContentError, match=r"the state has the budget latency=0\.6, and these gates know macs, params"):
        gates.load_state_dict(state)
    assert gates.budget == {"macs": 0.5}
    assert gates.state_dict()["step"] == 0


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), r"\(ndarray\): TypeError: "),
        (torch.zeros(1, 4, 8, 8), r"\(float32 \[1, 4, 8, 8\]\): RuntimeError: "),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), r"\(int64 \[1, 3, 8, 8\]\): RuntimeError: "),
        (torch.zeros(3, 8, 8), r"\(float32 \[3, 8, 8\]\): RuntimeError: "),
    ],
)
def test_an_example_that_the_model_does_not_take_is_told(example: object, told: str) -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ContentError, match=rf"Sequential cannot be called with the example {told}"):
        Gates(model, example, 0.5, STEPS)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (lambda x: "done", "gives back a str$"),
        (lambda x: None, "gives back no tensor$"),
        (lambda x: {"logits": x, "name": "mine"}, "gives back a str among its outputs$"),
    ],
)
def test_what_is_no_tensor_is_no_output(output: Any, told: str) -> None:
    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: torch.Tensor) -> Any:
            return output(self.layers(x))

    with pytest.raises(ContentError) as caught:
        Gates(Answering(), EXAMPLE, 0.5, STEPS)
    assert re.search(f"Answering {told}", caught.value.what)
