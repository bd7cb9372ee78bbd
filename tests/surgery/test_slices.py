"""Which part of each parameter a cut leaves, held against what surgery makes of the parameters themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from polar_deploy.errors import ContentError
from polar_deploy.surgery import cut, detached, sets
from polar_deploy.surgery.detached import DetachedModel
from polar_deploy.surgery.graph import Graph
from polar_deploy.surgery.slices import slices
from tests.surgery import test_choices as graphs
from tests.surgery.graphs import Net, run


def closed(case: str, seed: int) -> DetachedModel:
    """A graph of `test_choices` with a random state of its gates."""
    wanted = graphs.CASES[case]
    found = graphs.find(wanted.build(), wanted.ends)
    return found.with_masks(found.detached, graphs.states(found)[2 + seed])


def own(graph: DetachedModel) -> set[str]:
    """The parameters: constants of numbers that are no masks."""
    tensors = graph.model.graph.initializer
    return {t.name for t in tensors if t.data_type == 1 and not t.name.startswith(("polar_deploy.mask", "gate"))}


def values(graph: DetachedModel) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in detached.to_model(graph).graph.initializer}


def trimmed(graph: DetachedModel) -> dict[str, np.ndarray]:
    """What surgery itself leaves of each constant that is read as it stands, by its name in the graph before."""
    after = Graph(graph)
    facts, _ = sets.plan(after)
    cut.trim(facts)
    left: dict[str, np.ndarray] = {}
    for node in after.nodes:
        for index, tensor in enumerate(node.inputs):
            held = after.constant(node, index)
            if held is not None:
                left[after.origin(tensor.name)] = held
    return left


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", graphs.CASES)
def test_slicing_gives_what_surgery_leaves(case: str, seed: int) -> None:
    graph = closed(case, seed)
    parameters = own(graph)
    kept, before, after = slices(graph, parameters), values(graph), trimmed(graph)
    assert kept.keys() == after.keys() & parameters
    for name, axes in kept.items():
        assert len(axes) == before[name].ndim
        assert np.array_equal(before[name][np.ix_(*axes)], after[name]), name


def test_indices_are_ascending_and_within_their_axis() -> None:
    graph = closed("residual stream", 1)
    shapes = {name: array.shape for name, array in values(graph).items()}
    for name, axes in slices(graph, own(graph)).items():
        for size, indices in zip(shapes[name], axes, strict=True):
            assert indices.dtype == np.int64
            assert indices.tolist() == sorted(set(indices.tolist()))
            assert 0 <= indices[0] <= indices[-1] < size


def test_an_uncut_graph_keeps_all() -> None:
    graph = detached.detach_weights(graphs.chain())
    for name, axes in slices(graph, own(graph)).items():
        assert [len(indices) for indices in axes] == list(values(graph)[name].shape)


def test_what_goes_with_its_branch_is_not_there() -> None:
    wanted = graphs.CASES["residual stream"]
    found = graphs.find(wanted.build(), wanted.ends)
    opened = np.ones(found.gates, bool)
    opened[found.blocks[0].gate] = False
    graph = found.with_masks(found.detached, opened)
    gone = {f"{layer}.{part}" for layer in ("a1", "a2") for part in ("weight", "bias")}
    assert own(graph) - slices(graph, own(graph)).keys() == gone


def test_only_what_is_asked_for_is_told() -> None:
    graph = closed("chain", 0)
    assert slices(graph, {"one.weight"}).keys() == {"one.weight"}
    assert slices(graph, {"nobody"}) == {}


def test_values_make_no_difference() -> None:
    """Zeros, NaN and numbers that are too large to count on are parameters like any others."""
    graph = closed("chain", 0)
    model = onnx.ModelProto()
    model.CopyFrom(detached.to_model(graph))
    for tensor in model.graph.initializer:
        if tensor.name in own(graph):
            odd = np.full(
                tuple(tensor.dims), {"one.weight": 0.0, "one.bias": np.nan}.get(tensor.name, 3e38), np.float32
            )
            tensor.CopyFrom(numpy_helper.from_array(odd, tensor.name))
    one, other = slices(graph, own(graph)), slices(detached.detach_weights(model), own(graph))
    assert one.keys() == other.keys()
    assert all(np.array_equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


# --------------------------------------------------------------------------- parameters that are rearranged first

CLOSED = (1, 4)


def rearranged(between: Callable[[Net], str]) -> DetachedModel:
    """Six channels, two of them closed, in front of a convolution whose weight [4, 6, 1, 1] `between` makes."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Conv", [x, between(net)], "two", kernel_shape=[1, 1])
    net.width["two"] = 4
    return detached.detach_weights(net.model(net.head(x)))


def transposed(net: Net) -> str:
    net.constant("weight", net.random.standard_normal((1, 6, 1, 4)).astype(np.float32))
    return net.node("Transpose", ["weight"], "turned", perm=[3, 1, 2, 0])


def reshaped(net: Net) -> str:
    net.constant("weight", net.random.standard_normal((4, 6)).astype(np.float32))
    return net.node("Reshape", ["weight", net.constant("shape", np.array([4, 6, 1, 1]))], "shaped")


def turned_and_reshaped(net: Net) -> str:
    net.constant("weight", net.random.standard_normal((6, 4)).astype(np.float32))
    x = net.node("Transpose", ["weight"], "turned", perm=[1, 0])
    return net.node("Reshape", [x, net.constant("shape", np.array([4, 6, 1, 1]))], "shaped")


@pytest.mark.parametrize(("between", "axis"), [(transposed, 1), (reshaped, 1), (turned_and_reshaped, 0)])
def test_a_weight_that_is_rearranged_is_cut_where_it_lies(between: Callable[[Net], str], axis: int) -> None:
    graph = rearranged(between)
    kept = slices(graph, {"weight", "one.weight"})
    open_ = [index for index in range(6) if index not in CLOSED]
    for at, (size, indices) in enumerate(zip(values(graph)["weight"].shape, kept["weight"], strict=True)):
        assert indices.tolist() == (open_ if at == axis else list(range(size)))
    assert kept["one.weight"][0].tolist() == open_


def test_a_network_with_sliced_parameters_computes_the_same() -> None:
    """The graph as it was, with no channel closed, over the parameters that are left."""
    graph = rearranged(reshaped)
    kept, before = slices(graph, own(graph)), values(graph)
    model = onnx.ModelProto()
    model.CopyFrom(detached.to_model(graph))
    for tensor in model.graph.initializer:
        if tensor.name == "gate.factor":
            tensor.CopyFrom(numpy_helper.from_array(np.ones((1, 4, 1, 1), np.float32), tensor.name))
        elif tensor.name == "shape":
            tensor.CopyFrom(numpy_helper.from_array(np.array([4, 4, 1, 1]), tensor.name))
        else:
            tensor.CopyFrom(numpy_helper.from_array(before[tensor.name][np.ix_(*kept[tensor.name])], tensor.name))
    (expected,), (given,) = run(detached.to_model(graph), 3), run(model, 3)
    np.testing.assert_allclose(given, expected, atol=1e-5 * np.abs(expected).max())


# --------------------------------------------------------------------------- what cannot be told


def computed(net: Net) -> str:
    """A weight of mean zero, as standardised weights are."""
    net.constant("weight", net.random.standard_normal((4, 6, 1, 1)).astype(np.float32))
    mean = net.node("ReduceMean", ["weight"], "mean", axes=[1, 2, 3], keepdims=1)
    return net.node("Sub", ["weight", mean], "centred")


def test_a_weight_that_is_computed_cannot_be_cut() -> None:
    with pytest.raises(ContentError, match="weight is computed with before it is used") as caught:
        slices(rearranged(computed), {"weight"})
    assert "ONNX" in caught.value.todo


def test_a_weight_that_is_computed_and_not_cut_stays_whole() -> None:
    graph = rearranged(computed)
    model = onnx.ModelProto()
    model.CopyFrom(detached.to_model(graph))
    for tensor in model.graph.initializer:
        if tensor.name == "gate.factor":
            tensor.CopyFrom(numpy_helper.from_array(np.ones((1, 6, 1, 1), np.float32), tensor.name))
    kept = slices(detached.detach_weights(model), {"weight"})["weight"]
    assert [indices.tolist() for indices in kept] == [list(range(4)), list(range(6)), [0], [0]]


def used_twice(closing: tuple[Collection[int], Collection[int]]) -> DetachedModel:
    """One weight that reads six channels in two places, in which other ones are closed."""
    net, parts = Net(), []
    for number, which in enumerate(closing):
        x = net.gate(net.conv("input", 6, f"in{number}"), which, f"gate{number}")
        if not number:
            net.constant("shared", net.random.standard_normal((4, 6, 1, 1)).astype(np.float32))
        parts.append(net.node("Conv", [x, "shared"], f"out{number}", kernel_shape=[1, 1]))
        net.width[parts[-1]] = 4
    return detached.detach_weights(net.model(net.head(net.add(*parts, "sum"))))


def test_a_weight_in_two_places_is_cut_if_both_agree() -> None:
    kept = slices(used_twice((CLOSED, CLOSED)), {"shared"})["shared"]
    assert [indices.tolist() for indices in kept] == [[0, 1, 2, 3], [0, 2, 3, 5], [0], [0]]


@pytest.mark.parametrize("other", [(0,), (1, 3), ()])
def test_a_weight_in_two_places_that_do_not_agree_cannot_be_cut(other: Collection[int]) -> None:
    with pytest.raises(ContentError, match="shared is used in several places that are cut differently"):
        slices(used_twice((CLOSED, other)), {"shared"})


def test_weights_beside_the_graph_are_read_too() -> None:
    """Large ones, which a `DetachedModel` holds as arrays."""
    graph = closed("chain", 0)
    name = "two.weight"
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    array = values(graph)[name]
    for tensor in model.graph.initializer:
        if tensor.name == name:
            for field in ("raw_data", "float_data"):
                tensor.ClearField(field)
    one = slices(graph, own(graph))
    other = slices(replace(graph, model=model, arrays={**graph.arrays, name: array}), own(graph))
    assert all(np.array_equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))
