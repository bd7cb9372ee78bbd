"""What could go from a graph: gates found in graphs made here, their costs counted by hand, and promises that hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from polar_deploy.costs import State
from polar_deploy.surgery import choices, detached
from polar_deploy.surgery.choices import MASK, NEVER, Choices, Mask
from tests.surgery.graphs import Net, cut

PIXELS = 64  # 8 x 8
READERS = ("Conv", "Gemm", "MatMul")
Counts = tuple[int, int]  # MACs, parameters


def masks_of(model: onnx.ModelProto, blocks: Collection[str] = (), ignore: Collection[str] = ()) -> list[Mask]:
    """A mask in front of every layer that mixes channels, and one behind each of the tensors `blocks`."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = []
    for position, node in enumerate(model.graph.node):
        if node.op_type not in READERS or node.name in ignore:
            continue
        weight, attributes = sizes[node.input[1]], {a.name: a.i for a in node.attribute}
        group = attributes.get("group", 1)
        if group > 1 and weight[1] == 1:
            continue  # depthwise
        across = weight[0] if node.op_type == "MatMul" or not attributes.get("transB", 1) else weight[1]
        rank = {"Conv": 4, "Gemm": 2, "MatMul": 3}[node.op_type]
        axis = rank - 1 if node.op_type == "MatMul" else 1
        found.append(Mask(node.name, node.input[0], (position,), rank, axis, across * group))
    for tensor in blocks:
        (reader,) = [at for at, node in enumerate(model.graph.node) if tensor in node.input]
        layer = next(node for node in model.graph.node if tensor in node.output)
        last = next(n for n in model.graph.node if n.op_type in READERS and n.name == layer.name)
        width = sizes[last.input[1]][-1 if last.op_type == "MatMul" else 0]
        rank, axis = (3, 2) if last.op_type == "MatMul" else (4, 1)
        found.append(Mask(f"{tensor}:out", tensor, (reader,), rank, axis, width, block=True))
    return found


def find(model: onnx.ModelProto, blocks: Collection[str] = (), ignore: Collection[str] = (), **how: bool) -> Choices:
    """The choices of a graph with masks everywhere."""
    names = [node.name for node in model.graph.node]
    return choices.find(detached.detach_weights(model), masks_of(model, blocks, ignore), names.__getitem__, **how)


def states(found: Choices, count: int = 6) -> list[np.ndarray]:
    """All open, all but one gate closed in each site, and random ones: nobody is left without a gate or a side."""
    draw, opened = np.random.default_rng(0), [np.ones(found.gates, bool)]
    for chance in (0.0, *np.linspace(0.2, 0.9, count)):
        state = draw.random(found.gates) < chance
        for site in found.sites:
            state[draw.choice(site.gates)] = True
        for block in found.blocks:
            state[block.gate] = draw.random() < max(chance, 0.3)
        for either in found.alive:
            if not any(state[found.blocks[index].gate] for index in either):
                state[found.blocks[int(draw.choice(sorted(either)))].gate] = True
        opened.append(state)
    return opened


@dataclass(frozen=True)
class Case:
    """A graph, what can go from it, and what it costs.

    sites: name, kind, gates, channels a gate, blocks around.
    counted: MACs and parameters by the open gates of the sites and by the open blocks, by hand.
    """

    build: Callable[[], onnx.ModelProto]
    sites: Sequence[tuple[str, str, int, int, set[int]]]
    counted: Callable[..., Counts]
    ends: Sequence[str] = ()
    alive: Sequence[set[int]] = ()


def head(width: int) -> Counts:
    """The classifier that every net here ends in: five classes."""
    return 5 * width, 5 * width + 5


def layer(inputs: int, outputs: int, kernel: int = 9, pixels: int = PIXELS, bias: bool = True) -> Counts:
    """A convolution."""
    return pixels * kernel * inputs * outputs, kernel * inputs * outputs + bias * outputs


def total(*parts: Counts) -> Counts:
    return sum(macs for macs, _ in parts), sum(params for _, params in parts)


def when(condition: bool, *parts: Counts) -> Counts:
    return total(*parts) if condition else (0, 0)


# --------------------------------------------------------------------------- graphs


def chain() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    return net.model(net.head(net.conv(x, 4, "two")))


def residual() -> onnx.ModelProto:
    """A stem and two branches that are added to it."""
    net = Net()
    x = net.relu(net.conv("input", 6, "stem"), "stem.act")
    for name, inner in (("a", 4), ("b", 3)):
        y = net.conv(net.relu(net.conv(x, inner, f"{name}1"), f"{name}1.act"), 6, f"{name}2")
        x = net.relu(net.add(x, y, f"{name}.sum"), f"{name}.act")
    return net.model(net.head(x))


def concatenated() -> onnx.ModelProto:
    net = Net()
    one, two = net.conv("input", 4, "one"), net.conv("input", 6, "two", kernel=1)
    net.node("Concat", [one, two], "both", axis=1)
    net.width["both"] = 10
    return net.model(net.head(net.conv("both", 3, "three")))


def grouped() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv("input", 8, "one"), "act")
    x = net.relu(net.conv(x, 12, "groups", group=4), "act2")
    return net.model(net.head(net.conv(x, 3, "three", kernel=1)))


def depthwise() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.bn(net.conv("input", 6, "one", bias=False), "norm"), "act")
    x = net.conv(x, 6, "each", group=6)
    return net.model(net.head(net.conv(net.relu(x, "act2"), 4, "two", kernel=1)))


def flattened() -> onnx.ModelProto:
    """Each channel is four columns of the classifier."""
    net = Net()
    x = net.conv("input", 6, "one", strides=[4, 4])
    flat = net.node("Flatten", [x], "flat", axis=1)
    return net.model(net.gemm(flat, 24, 5, "logits"))


def shuffled() -> onnx.ModelProto:
    """Two groups of three are shuffled. The Reshape needs both to have as many channels: they go in pairs."""
    net = Net()
    x = net.conv("input", 6, "one")
    apart = net.constant("apart", np.array([0, 2, 3, 8, 8]))
    together = net.constant("together", np.array([0, 6, 8, 8]))
    x = net.node("Reshape", [x, apart], "apart5")
    x = net.node("Transpose", [x], "swapped", perm=[0, 2, 1, 3, 4])
    x = net.node("Reshape", [x, together], "joined")
    net.width["joined"] = 6
    return net.model(net.head(net.conv("joined", 4, "two")))


def excited() -> onnx.ModelProto:
    """Squeeze and excite: each channel is multiplied by a number that a small network computes."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    s = net.conv(net.node("GlobalAveragePool", [x], "mean"), 2, "squeeze", kernel=1)
    s = net.conv(net.relu(s, "s.act"), 6, "excite", kernel=1)
    x = net.node("Mul", [x, net.node("Sigmoid", [s], "weights")], "weighted")
    return net.model(net.head(net.conv(x, 4, "two", kernel=1)))


def shared() -> onnx.ModelProto:
    """One weight in two layers: all that reads and writes it is cut alike."""
    net = Net()
    x = net.relu(net.conv("input", 6, "stem"), "act")
    x = net.relu(net.conv(x, 6, "first", bias=False), "act1")
    x = net.relu(net.node("Conv", [x, "first.weight"], "second", pads=[1] * 4, kernel_shape=[3, 3]), "act2")
    net.width["act2"] = 6
    return net.model(net.head(x))


def normed() -> onnx.ModelProto:
    """Conv, ReLU, BatchNorm, Conv: the norm folds into neither layer, and what it adds is not zero."""
    net = Net()
    x = net.bn(net.relu(net.conv("input", 6, "one"), "act"), "norm")
    return net.model(net.head(net.conv(x, 4, "two")))


def two_sides() -> onnx.ModelProto:
    net = Net()
    x = net.relu(net.conv("input", 4, "stem"), "act")
    x = net.add(net.conv(x, 6, "left"), net.conv(x, 6, "right", kernel=1), "sum")
    return net.model(net.head(net.relu(x, "out")))


def nested() -> onnx.ModelProto:
    """A branch with a sum of its own inside."""
    net = Net()
    x = net.relu(net.conv("input", 6, "stem"), "act")
    y = net.relu(net.conv(x, 4, "o1"), "o1.act")
    z = net.conv(net.relu(net.conv(y, 3, "i1"), "i1.act"), 4, "i2")
    y = net.relu(net.add(y, z, "inner"), "inner.act")
    return net.model(net.head(net.relu(net.add(x, net.conv(y, 6, "o2"), "outer"), "out")))


def tokens() -> onnx.ModelProto:
    """An MLP with a residual stream of six under LayerNormalization, which looks at all of its channels at once."""
    net = Net()
    random = np.random.default_rng(1)

    def product(x: str, inputs: int, width: int, name: str) -> str:
        net.constant(f"{name}.weight", random.standard_normal((inputs, width)).astype(np.float32))
        return net.node("MatMul", [x, f"{name}.weight"], name)

    def norm(x: str, name: str) -> str:
        for part in ("scale", "offset"):
            net.constant(f"{name}.{part}", random.uniform(0.5, 1.5, 6).astype(np.float32))
        return net.node("LayerNormalization", [x, f"{name}.scale", f"{name}.offset"], name, axis=-1)

    x = net.node("Reshape", ["input", net.constant("rows", np.array([0, 3, 64]))], "rows3")
    x = net.node("Transpose", [x], "tokens", perm=[0, 2, 1])
    x = product(x, 3, 6, "embed")
    y = product(net.relu(product(norm(x, "norm1"), 6, 8, "up"), "act"), 8, 6, "down")
    x = norm(net.add(x, y, "stream"), "norm2")
    x = product(x, 6, 5, "logits")
    net.width["logits"] = 0
    return net.model("logits", ranks=(3,))


CASES = {
    "chain": Case(
        chain,
        [("one", "channel", 6, 1, set()), ("two", "channel", 4, 1, set())],
        lambda a, b: total(layer(3, a), layer(a, b), head(b)),
    ),
    "residual stream": Case(
        residual,
        [("stem", "stream", 6, 1, set()), ("a1", "channel", 4, 1, {0}), ("b1", "channel", 3, 1, {1})],
        lambda s, a, b, one, two: total(
            layer(3, s), when(one, layer(s, a), layer(a, s)), when(two, layer(s, b), layer(b, s)), head(s)
        ),
        ends=("a2", "b2"),
    ),
    "concatenation": Case(
        concatenated,
        [("one", "channel", 4, 1, set()), ("two", "channel", 6, 1, set()), ("three", "channel", 3, 1, set())],
        lambda a, b, c: total(layer(3, a), layer(3, b, kernel=1), layer(a + b, c), head(c)),
    ),
    "whole groups": Case(
        grouped,
        [("one", "channel", 4, 2, set()), ("three", "channel", 3, 1, set())],
        lambda g, c: total(
            layer(3, 2 * g), (PIXELS * 9 * 2 * 3 * g, 9 * 2 * 3 * g + 3 * g), layer(3 * g, c, kernel=1), head(c)
        ),
    ),
    "depthwise": Case(
        depthwise,
        [("one", "channel", 6, 1, set()), ("two", "channel", 4, 1, set())],
        lambda a, b: total(
            layer(3, a),  # the norm behind it counts as its bias
            (PIXELS * 9 * a, 9 * a + a),
            layer(a, b, kernel=1),
            head(b),
        ),
    ),
    "columns behind Flatten": Case(
        flattened,
        [("one", "channel", 6, 1, set())],
        lambda a: total(layer(3, a, pixels=4), head(4 * a)),
    ),
    "shuffle": Case(
        shuffled,
        [("one", "channel", 3, 2, set()), ("two", "channel", 4, 1, set())],
        lambda a, b: total(layer(3, 2 * a), layer(2 * a, b), head(b)),
    ),
    "squeeze and excite": Case(
        excited,
        [("one", "channel", 6, 1, set()), ("squeeze", "channel", 2, 1, set()), ("two", "channel", 4, 1, set())],
        lambda a, s, b: total(
            layer(3, a),
            layer(a, s, kernel=1, pixels=1),
            layer(s, a, kernel=1, pixels=1),
            layer(a, b, kernel=1),
            head(b),
        ),
    ),
    "one weight twice": Case(
        shared,
        [("stem", "channel", 6, 1, set())],
        lambda a: total(layer(3, a), layer(a, a, bias=False), (PIXELS * 9 * a * a, 0), head(a)),
    ),
    "norm behind the activation": Case(
        normed,
        [("one", "channel", 6, 1, set()), ("two", "channel", 4, 1, set())],
        lambda a, b: total(layer(3, a), (0, 4 * a), layer(a, b), head(b)),
    ),
    "two sides of a sum": Case(
        two_sides,
        [("stem", "channel", 4, 1, set()), ("left", "stream", 6, 1, set())],
        lambda s, a, left, right: total(
            layer(3, s), when(left, layer(s, a)), when(right, layer(s, a, kernel=1)), head(a)
        ),
        ends=("left", "right"),
        alive=({0, 1},),
    ),
    "a branch in a branch": Case(
        nested,
        [("stem", "stream", 6, 1, set()), ("o1", "stream", 4, 1, {1}), ("i1", "channel", 3, 1, {0, 1})],
        lambda s, o, i, inner, outer: total(
            layer(3, s),
            when(outer, layer(s, o), when(inner, layer(o, i), layer(i, o)), layer(o, s)),
            head(s),
        ),
        ends=("i2", "o2"),
    ),
    "a stream that a LayerNormalization looks at": Case(
        tokens,
        [("up", "channel", 8, 1, {0})],
        lambda u, open_: (
            64 * (3 * 6 + open_ * (6 * u + u * 6) + 6 * 5),
            3 * 6 + open_ * (12 + 6 * u + u * 6) + 12 + 6 * 5,
        ),
        ends=("down",),
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name)
def case(request: pytest.FixtureRequest) -> tuple[Case, onnx.ModelProto, Choices]:
    wanted = CASES[request.param]
    model = wanted.build()
    return wanted, model, find(model, wanted.ends)


# --------------------------------------------------------------------------- what holds for each of them


def test_sites_and_blocks(case: tuple[Case, onnx.ModelProto, Choices]) -> None:
    wanted, _, found = case
    assert [(s.name, s.kind, s.width, s.size, set(s.blocks)) for s in found.sites] == list(wanted.sites)
    assert [block.name for block in found.blocks] == [f"{end}:out" for end in wanted.ends]
    assert [set(either) for either in found.alive] == list(wanted.alive)


def test_gates_are_numbered_through_sites_then_blocks(case: tuple[Case, onnx.ModelProto, Choices]) -> None:
    _, _, found = case
    numbered = [gate for gates, _, _ in found.owners() for gate in gates]
    assert numbered == list(range(found.gates))
    told = {gate for gates in found.gate_of for gate in gates.tolist()} - {NEVER}
    assert told == set(numbered)  # a gate that no mask closes would be none
    for mask, gates in zip(found.masks, found.gate_of, strict=True):
        assert len(gates) == mask.width


def test_costs_are_those_counted_by_hand(case: tuple[Case, onnx.ModelProto, Choices]) -> None:
    wanted, _, found = case
    for opened in states(found, 20):
        state = found.state(opened)
        expected = wanted.counted(*state.widths, *state.blocks)
        assert {name: round(cost.absolute(state), 6) for name, cost in found.costs.items()} == dict(
            zip(("macs", "params"), expected, strict=True)
        )
    whole = State(tuple(site.width for site in found.sites), (True,) * len(found.blocks))
    assert {name: cost.share(whole) for name, cost in found.costs.items()} == {"macs": 1.0, "params": 1.0}


def test_surgery_leaves_what_is_promised_and_it_computes_the_same(
    case: tuple[Case, onnx.ModelProto, Choices],
) -> None:
    _, _, found = case
    for opened in states(found, 4):
        state = found.state(opened)
        assert found.measure(opened) == {name: round(cost.absolute(state)) for name, cost in found.costs.items()}
    cut(detached.to_model(found.with_masks(found.detached, opened)))  # runs both


def test_closing_any_gate_alone_saves_something(case: tuple[Case, onnx.ModelProto, Choices]) -> None:
    _, _, found = case
    whole = found.measure(np.ones(found.gates, bool))
    for gates, name, kind in found.owners():
        opened = np.ones(found.gates, bool)
        opened[gates[-1]] = False
        if len(gates) > 1 or kind == "block":
            assert all(found.measure(opened)[cost] < whole[cost] for cost in whole), name


# --------------------------------------------------------------------------- which gate closes what


def gate_of(found: Choices, mask: str) -> list[int]:
    return found.gate_of[[each.name for each in found.masks].index(mask)].tolist()


def test_an_input_of_the_network_has_no_gates() -> None:
    assert gate_of(find(chain()), "one") == [NEVER] * 3


def test_a_stream_is_closed_at_all_of_its_readers_alike() -> None:
    found = find(residual(), ("a2", "b2"))
    (stream,) = [site for site in found.sites if site.kind == "stream"]
    for reader in ("a1", "b1", "logits"):
        assert gate_of(found, reader) == list(stream.gates)
    assert gate_of(found, "a2:out") == [found.blocks[0].gate] * 6


def test_a_concatenation_is_closed_part_by_part() -> None:
    found = find(concatenated())
    one, two, _ = (site.gates for site in found.sites)
    assert gate_of(found, "three") == [*one, *two]


def test_a_group_is_closed_whole() -> None:
    found = find(grouped())
    (groups, _) = found.sites
    assert gate_of(found, "groups") == [gate for gate in groups.gates for _ in range(2)]
    assert gate_of(found, "three") == [gate for gate in groups.gates for _ in range(3)]


def test_a_channel_closes_its_columns() -> None:
    found = find(flattened())
    assert gate_of(found, "logits") == [gate for gate in found.sites[0].gates for _ in range(4)]


def test_a_shuffle_is_followed() -> None:
    found = find(shuffled())
    gates = list(found.sites[0].gates)
    assert gate_of(found, "two") == [gates[index % 3] for index in (0, 3, 1, 4, 2, 5)]


# --------------------------------------------------------------------------- what has to stay


def walled() -> onnx.ModelProto:
    """A Softmax over the channels: each one needs all of them."""
    net = Net()
    x = net.node("Softmax", [net.conv("input", 6, "one")], "soft", axis=1)
    return net.model(net.head(net.conv(x, 4, "two")))


def handed_out() -> onnx.ModelProto:
    net = Net()
    x = net.conv("input", 6, "one")
    return net.model(net.head(net.conv(net.relu(x, "act"), 4, "two")), x)


def read_elsewhere() -> onnx.ModelProto:
    """A sum over the channels that no layer reads, and no mask stands in front of."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    net.node("ReduceMax", [x], "largest", axes=[1], keepdims=1)
    net.width["largest"] = 1
    return net.model(net.head(net.node("Mul", [net.conv(x, 4, "two"), "largest"], "scaled")))


@pytest.mark.parametrize("build", [walled, handed_out, read_elsewhere])
def test_channels_that_somebody_else_needs_have_no_gate(build: Callable[[], onnx.ModelProto]) -> None:
    found = find(build())
    assert [site.name for site in found.sites] == ["two"]
    assert gate_of(found, "two") == [NEVER] * 6


def test_what_is_needed_costs_and_counts() -> None:
    found = find(walled())
    for width in (1, 4):
        expected = total(layer(3, 6), layer(6, width), head(width))
        state = State((width,), ())
        assert (found.costs["macs"].absolute(state), found.costs["params"].absolute(state)) == expected


@pytest.mark.parametrize(
    ("build", "layer", "reason"),
    [
        (tokens, "embed", "LayerNormalization norm1: its statistics run over all channels"),
        (walled, "one", "Softmax soft: its sum runs over all channels"),
    ],
)
def test_why_channels_stay_is_told(build: Callable[[], onnx.ModelProto], layer: str, reason: str) -> None:
    assert find(build()).reasons[layer] == reason


def test_a_stream_under_a_layer_norm_has_no_gate() -> None:
    found = find(tokens(), ("down",))
    assert gate_of(found, "up") == gate_of(found, "logits") == [NEVER] * 6


def test_a_layer_that_is_not_masked_keeps_what_it_reads() -> None:
    found = find(residual(), ("a2", "b2"), ignore={"b1"})
    assert [(site.name, site.width) for site in found.sites] == [("a1", 4), ("b1", 3)]
    for opened in states(found):
        state = found.state(opened)
        a, b, one, two = *state.widths, *state.blocks
        expected = total(layer(3, 6), when(one, layer(6, a), layer(a, 6)), when(two, layer(6, b), layer(b, 6)), head(6))
        assert found.measure(opened) == dict(zip(("macs", "params"), expected, strict=True))


def test_a_branch_that_somebody_else_reads_is_no_block() -> None:
    """Its mask closes the branch in the sum alone."""
    net = Net()
    x = net.relu(net.conv("input", 6, "stem"), "act")
    y = net.conv(net.relu(net.conv(x, 4, "a1"), "a1.act"), 6, "a2")
    z = net.node("Identity", [y], "twin")
    net.width["twin"] = 6
    x = net.relu(net.add(x, z, "sum"), "out")
    model = net.model(net.head(net.add(x, net.node("Sigmoid", [y], "aside"), "more")))
    masks = [*masks_of(model), Mask("twin:out", "twin", (names(model).index("sum"),), 4, 1, 6, block=True)]
    found = choices.find(detached.detach_weights(model), masks, names(model).__getitem__)
    assert found.blocks == ()


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


# --------------------------------------------------------------------------- masks in a graph


def test_a_mask_stands_in_front_of_its_readers_alone() -> None:
    model = residual()
    position = names(model).index("a1")
    mask = Mask("here", "stem.act", (position,), 4, 1, 6)
    masked = detached.to_model(choices.insert(detached.detach_weights(model), [mask]))
    onnx.checker.check_model(masked, full_check=True)
    nodes = {node.name: node for node in masked.graph.node}
    (product,) = [node for node in masked.graph.node if node.op_type == "Mul"]
    assert product.input[0] == "stem.act"
    assert nodes["a1"].input[0] == product.output[0]
    assert "stem.act" in nodes["a.sum"].input
    assert {entry.key: entry.value for entry in product.metadata_props} == {MASK: "here"}
    (ones,) = [t for t in masked.graph.initializer if t.name == choices.constant_name(mask)]
    assert np.array_equal(numpy_helper.to_array(ones), np.ones((6, 1, 1), np.float32))
    assert names(model) == [name for name in names(masked) if name != product.name]


def test_a_state_sets_the_masks_of_any_graph_with_them() -> None:
    model = chain()
    found = find(model)
    other = choices.insert(detached.detach_weights(model), found.masks)
    opened = np.arange(found.gates) % 2 == 0
    held = {
        tensor.name: numpy_helper.to_array(tensor).ravel()
        for tensor in detached.to_model(found.with_masks(other, opened)).graph.initializer
    }
    for mask, gates in zip(found.masks, found.gate_of, strict=True):
        expected = [1.0 if gate == NEVER else float(opened[gate]) for gate in gates]
        assert held[choices.constant_name(mask)].tolist() == expected


def test_weights_that_are_zero_are_no_reason() -> None:
    """A last layer that starts at zero, as many do, closes nothing."""
    model = residual()
    for tensor in model.graph.initializer:
        if tensor.name in ("a2.weight", "a2.bias", "stem.bias"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    taken = detached.detach_weights(model)
    blank = choices.without_values(taken, {"a2.weight", "a2.bias"})
    held = {t.name: numpy_helper.to_array(t) for t in detached.to_model(blank).graph.initializer}
    assert all(held[name].all() for name in ("a2.weight", "a2.bias"))
    assert not held["stem.bias"].any()  # was not named
    found = choices.find(blank, masks_of(model, ("a2", "b2")), names(model).__getitem__)
    assert [(s.name, s.kind, s.width, s.size, set(s.blocks)) for s in found.sites] == CASES["residual stream"].sites
