"""The judge of surgery's completeness, judged itself: sets and optima of small networks, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the sets come from PyTorch's gradients")
oracle = pytest.importorskip("benchmarks.surgery_oracle", reason="connected components are SciPy's")
nn = torch.nn


class Net(nn.Module):
    """Layers by name, and what a test does with them; nothing is accidentally zero."""

    def __init__(self, forward: Callable[[Net, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.path = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
            for value in (*layer.parameters(), *layer.buffers()):
                if value.is_floating_point():
                    value.data.uniform_(0.1, 0.9)

    def forward(self, x: Any) -> Any:
        return self.path(self, x)


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> Any:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


def found(sets: Any) -> set[frozenset[str]]:
    """Every removable set as its channels: `a>1` is output channel 1 of layer a, `>a1` input channel 1."""
    members: dict[int, set[str]] = {}
    for name, labels in sets.outputs.items():
        for channel, label in enumerate(labels.tolist()):
            members.setdefault(label, set()).add(f"{name}>{channel}")
    for name, labels in sets.inputs.items():
        for channel, label in enumerate(labels.tolist()):
            members.setdefault(label, set()).add(f">{name}{channel}")
    return {frozenset(channels) for label, channels in members.items() if sets.removable[label]}


def words(*texts: str) -> set[frozenset[str]]:
    return {frozenset(text.split()) for text in texts}


def head(x: Any) -> Any:
    return x.mean((2, 3))


def shuffle(x: Any) -> Any:
    batch, width, rows, columns = x.shape
    return x.view(batch, 2, width // 2, rows, columns).transpose(1, 2).reshape(batch, width, rows, columns)


CASES = {
    "a chain, through BatchNorm and activations": (
        Net(
            lambda n, x: head(n.b(torch.nn.functional.relu6(n.norm(n.a(x))))),
            a=conv(3, 2, 3),
            norm=nn.BatchNorm2d(2),
            b=conv(2, 2),
        ),
        words("a>0 >b0", "a>1 >b1"),
    ),
    "a residual stream": (
        Net(lambda n, x: head(n.c((y := n.a(x).relu()) + n.b(y))), a=conv(3, 2), b=conv(2, 2), c=conv(2, 2)),
        words("a>0 >b0 b>0 >c0", "a>1 >b1 b>1 >c1"),
    ),
    "depthwise convolutions are no mixers": (
        Net(lambda n, x: head(n.b(n.deep(n.a(x)))), a=conv(3, 2), deep=conv(2, 2, 3, groups=2), b=conv(2, 2)),
        words("a>0 >deep0 >b0", "a>1 >deep1 >b1"),
    ),
    "Concat and squeeze-excite": (
        Net(
            lambda n, x: head(n.c((y := torch.cat([n.a(x), n.b(x)], 1)) * n.scale(y.mean((2, 3), True)).sigmoid())),
            a=conv(3, 1),
            b=conv(3, 1),
            scale=conv(2, 2),
            c=conv(2, 2),
        ),
        words("a>0 >scale0 scale>0 >c0", "b>0 >scale1 scale>1 >c1"),
    ),
    "position j of all groups": (
        Net(lambda n, x: head(n.b(n.grouped(n.a(x)))), a=conv(3, 4), grouped=conv(4, 4, 3, groups=2), b=conv(4, 2)),
        words(
            "a>0 a>2 >grouped0 >grouped2",
            "a>1 a>3 >grouped1 >grouped3",
            "grouped>0 grouped>2 >b0 >b2",
            "grouped>1 grouped>3 >b1 >b3",
        ),
    ),
    "shuffle and Split": (
        Net(
            lambda n, x: head(torch.cat([n.c((y := shuffle(n.a(x)).chunk(2, 1))[0]), n.d(y[1])], 1)),
            a=conv(3, 4),
            c=conv(2, 1),
            d=conv(2, 1),
        ),
        words("a>0 a>2 >c0 >c1", "a>1 a>3 >d0 >d1"),  # 0 1 2 3 come out as 0 2 1 3
    ),
    "Flatten gives each channel several columns": (
        Net(
            lambda n, x: n.b(torch.nn.functional.adaptive_avg_pool2d(n.a(x), 2).flatten(1)),
            a=conv(3, 2),
            b=nn.Linear(8, 2),
        ),
        words("a>0 >b0 >b1 >b2 >b3", "a>1 >b4 >b5 >b6 >b7"),
    ),
    "LayerNorm is a wall": (
        Net(
            lambda n, x: n.c(torch.nn.functional.gelu(n.b(n.norm(head(n.a(x)))))),
            a=conv(3, 2),
            norm=nn.LayerNorm(2),
            b=nn.Linear(2, 2),
            c=nn.Linear(2, 2),
        ),
        words("b>0 >c0", "b>1 >c1"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_sets(case: str) -> None:
    network, expected = CASES[case]
    assert found(oracle.couplings(network, 8).sets()) == expected


def test_groups_are_free_where_each_may_lose_its_own() -> None:
    network, _ = CASES["position j of all groups"]
    sets = oracle.couplings(network, 8).sets(groups=False)
    assert found(sets) == words(*(f"a>{i} >grouped{i}" for i in range(4)), *(f"grouped>{i} >b{i}" for i in range(4)))


def test_widths_without_closed_sets() -> None:
    network, _ = CASES["a residual stream"]
    sets = oracle.couplings(network, 8).sets()
    closed = np.zeros_like(sets.removable)
    closed[sets.outputs["a"][1]] = True
    assert oracle.widths(sets, closed) == {
        "a": oracle.Widths(1, 3, 1),
        "b": oracle.Widths(1, 1, 1),
        "c": oracle.Widths(1, 1, 2),
    }


def best(case: str, **masks: list[int]) -> dict[str, tuple[int, int, int]]:
    network, _ = CASES[case]
    arrays = {name: np.array(mask, bool) for name, mask in masks.items()}
    return {
        name: tuple(width) for name, width in oracle.optimum(network, oracle.couplings(network, 8), arrays, 8).items()
    }


def test_optimum_of_a_stream_needs_all_writers_closed() -> None:
    case = "a residual stream"
    assert best(case, a=[0, 1], b=[1, 0]) == {"a": (1, 3, 2), "b": (1, 2, 2), "c": (1, 2, 2)}
    assert best(case, a=[0, 1], b=[0, 1]) == {"a": (1, 3, 1), "b": (1, 1, 1), "c": (1, 1, 2)}


def test_optimum_moves_constants_into_biases_but_not_into_padding() -> None:
    case = "depthwise convolutions are no mixers"
    assert best(case, a=[0, 1]) == {"a": (1, 3, 1), "deep": (1, 1, 1), "b": (1, 1, 2)}  # deep's bias moves on
    padded = Net(CASES[case][0].path, a=conv(3, 2), deep=conv(2, 2, 3, groups=2), b=conv(2, 2, 3))
    found = oracle.optimum(padded, oracle.couplings(padded, 8), {"a": np.array([False, True])}, 8)
    assert found["b"] == oracle.Widths(1, 2, 2)


def test_optimum_drops_dead_groups_and_evens_out_the_others() -> None:
    case = "position j of all groups"
    none = {"a": (1, 3, 4), "grouped": (2, 4, 4), "b": (1, 4, 2)}
    assert best(case, a=[1, 0, 1, 1], grouped=[1, 1, 1, 1]) == none  # the fuller group rules
    assert best(case, a=[1, 0, 0, 1], grouped=[1, 1, 1, 1]) == {"a": (1, 3, 2), "grouped": (2, 2, 4), "b": (1, 4, 2)}
    assert best(case, a=[1, 1, 1, 1], grouped=[1, 1, 0, 0]) == {"a": (1, 3, 2), "grouped": (1, 2, 2), "b": (1, 2, 2)}
    assert best(case, a=[1, 1, 0, 0], grouped=[1, 1, 1, 1]) == {"a": (1, 3, 2), "grouped": (1, 2, 2), "b": (1, 2, 2)}


def test_gates_stand_behind_norm_and_activation_and_before_the_add() -> None:
    network = Net(
        lambda n, x: head((y := n.a(x)) + n.norm(n.b(y)).relu() + n.c(y).relu_()),
        a=conv(3, 2),
        b=conv(2, 2),
        norm=nn.BatchNorm2d(2),
        c=conv(2, 2),
    ).eval()
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    x = torch.from_numpy(images).double()
    network.double()
    open_a, open_b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    with torch.no_grad():
        y = network.a(x) * open_a[:, None, None]
        branches = network.norm(network.b(y)).relu() * open_b[:, None, None] + network.c(y).relu()
        expected = head(y + branches).numpy()
    masks = {"a": np.array([True, False]), "b": np.array([False, True])}
    np.testing.assert_allclose(oracle.logits(network, images, masks), expected, rtol=1e-12)
