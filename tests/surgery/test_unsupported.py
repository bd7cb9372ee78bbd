"""What surgery does not know stays as it is, and the report says so; what it shares, it copies."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery import compress
from polar_deploy.surgery.ops import table
from tests.surgery.graphs import Net, constant, cut, names, operators, weight


def test_an_unknown_operator_is_a_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(table(), "Trilu", raising=False)  # whoever teaches surgery this one need not change the test
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [0, 1], "gate")
    x = net.node("Trilu", [x], "triangle")
    x = net.gate(net.relu(net.conv(x, 6, "two"), "act2"), [2], "gate2")
    surgery = cut(net.model(net.head(net.conv(x, 4, "three"))))
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[1] == 6
    assert weight(surgery.model, "two").shape[0] == weight(surgery.model, "three").shape[1] == 5, (
        "behind it the cut goes on"
    )
    assert surgery.report["unsupported"] == [
        {"node": "triangle", "operator": "Trilu", "reason": "this operator is not known to surgery"}
    ]
    assert surgery.report["cuts_not_made"] == [
        {
            "layer": "one",
            "channels": 2,
            "node": "triangle",
            "operator": "Trilu",
            "reason": surgery.report["unsupported"][0]["reason"],
        }
    ]
    assert not np.any(weight(surgery.model, "one")[[0, 1]]), "closed channels are folded all the same"


def test_an_operator_of_another_domain_is_a_wall_whatever_its_name() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [0, 1], "gate")
    x = net.node("Relu", [x], "custom", domain="com.example")
    model = net.model(net.conv(x, 4, "two"))
    model.graph.value_info.append(helper.make_tensor_value_info("custom", 1, ["batch", 6, 8, 8]))
    surgery = compress(model, verify=False)
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["unsupported"][0]["node"] == "custom"
    assert not surgery.report["verified"]


def test_tensors_that_a_body_reads_stay() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    net.node("ReduceMax", ["input"], "largest", keepdims=0)
    net.node("Greater", ["largest", net.constant("zero", np.array(0, np.float32))], "yes")
    result = helper.make_tensor_value_info("same", 1, None)
    body = helper.make_graph([helper.make_node("Neg", [x], ["same"], name="inner")], "body", [], [result])
    x = net.node("If", ["yes"], "if", then_branch=body, else_branch=body)
    net.width[x] = 4
    surgery = cut(net.model(net.conv("gate", 4, "two"), x))
    assert weight(surgery.model, "one").shape[0] == 4
    assert "if" in names(surgery.model)
    assert "gate" in {name for node in surgery.model.graph.node for name in node.output}


def test_shared_constants_are_copied_before_they_are_cut() -> None:
    """The exporter merges equal constants: here one gate, one bias and one BatchNorm serve two layers."""
    net = Net()
    a = net.gate(net.relu(net.conv("input", 4, "a"), "act.a"), [0], "gate.a")
    b = net.relu(net.conv("input", 4, "b"), "act.b")
    b = net.node("Mul", [b, "gate.a.factor"], "gate.b")
    c = net.relu(net.conv("input", 4, "c"), "act.c")
    model = net.model(net.head(net.conv(net.node("Concat", [a, b, c], "cat", axis=1), 4, "last")))
    for node in model.graph.node:
        if node.name in ("b", "c"):
            node.input[2] = "a.bias"
        if node.name == "last":
            w = np.random.default_rng(0).standard_normal((4, 12, 3, 3)).astype(np.float32)
            node.input[1] = "wide"
    model.graph.initializer.append(numpy_helper.from_array(w, "wide"))
    smaller = cut(model).model
    bias = {node.name: node.input[2] for node in smaller.graph.node if node.name in ("a", "b", "c")}
    assert bias["c"] == "a.bias", "whoever is not cut keeps the constant and its name"
    assert bias["a"] == bias["b"] != bias["c"], "equal cuts stay shared"
    assert constant(smaller, bias["a"]).shape == (3,)
    assert constant(smaller, bias["c"]).shape == (4,)


def test_one_weight_used_twice_with_differing_cuts() -> None:
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "act")
    a = net.gate(net.conv(x, 4, "a", bias=False), [0], "ga")
    b = net.gate(net.node("Conv", [x, "a.weight"], "b", pads=[1, 1, 1, 1]), [1, 2], "gb")
    net.width[b] = 4
    smaller = cut(net.model(net.head(net.conv(net.relu(a, "ra"), 3, "c")), net.conv(net.relu(b, "rb"), 3, "d"))).model
    assert weight(smaller, "a").shape[0] == 3
    assert weight(smaller, "b").shape[0] == 2


def test_metadata_survives() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    model = net.model(net.head(net.conv(x, 4, "two")))
    model.producer_name, model.doc_string, model.model_version = "somebody", "what it is", 7
    model.graph.doc_string = "the graph"
    helper.set_model_props(model, {"classes": "5"})
    for node in model.graph.node:
        entry = node.metadata_props.add()
        entry.key, entry.value = "polar_deploy.site", f"site.{node.name}"
        node.doc_string = f"doc of {node.name}"
    value = helper.make_tensor_value_info("act", 1, ["batch", 4, 8, 8])
    model.graph.value_info.append(value)
    surgery = cut(model)
    smaller = surgery.model
    assert (smaller.producer_name, smaller.doc_string, smaller.model_version) == ("somebody", "what it is", 7)
    assert smaller.ir_version == model.ir_version
    assert [(e.key, e.value) for e in smaller.metadata_props] == [("classes", "5")]
    assert smaller.graph.doc_string == "the graph"
    for node in smaller.graph.node:
        assert [(e.key, e.value) for e in node.metadata_props] == [("polar_deploy.site", f"site.{node.name}")]
        assert node.doc_string == f"doc of {node.name}"
    assert not smaller.graph.value_info, "it would be wrong"
    assert surgery.report["gates"][0]["site"] == "site.gate"


def test_initializers_listed_among_the_inputs() -> None:
    """IR version 3 demands it; what is left is listed again with its new shape."""
    net = Net(opset=8)
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    model = net.model(net.conv(x, 4, "two"))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    smaller = compress(model).model
    onnx.checker.check_model(smaller, full_check=True)
    assert weight(smaller, "one").shape[0] == 3
    assert {value.name for value in smaller.graph.input} == {
        "input",
        "one.weight",
        "one.bias",
        "two.weight",
        "two.bias",
    }


def test_weights_listed_among_the_inputs_where_they_need_not_be() -> None:
    """As older exporters write it; the result lists its weights again, so that it can be cut once more."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    model = net.model(net.conv(x, 4, "two"))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    smaller = compress(model).model
    assert weight(smaller, "one").shape[0] == 3
    assert {value.name for value in smaller.graph.input} == {"input", *(t.name for t in smaller.graph.initializer)}
    assert compress(smaller).model == smaller


def test_an_input_with_a_default_stays_one_whatever_the_default_is() -> None:
    net = Net()
    style = net.constant("style", np.zeros((4, 1, 1), np.float32))
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [1, 2], "gate")
    styled = net.node("Mul", [net.conv(x, 4, "two"), style], "styled")
    net.width["styled"] = 4
    model = net.model(net.head(styled))
    model.graph.input.append(helper.make_tensor_value_info(style, 1, [4, 1, 1]))
    surgery = cut(model)
    assert surgery.report["verified"]
    assert weight(surgery.model, "two").shape[:2] == (4, 4)
    assert not constant(surgery.model, style).any()
    feeds = {"input": net.random.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    for given in (feeds, feeds | {style: net.random.standard_normal((4, 1, 1)).astype(np.float32)}):
        expected, found = (
            ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, given)[0]
            for each in (model, surgery.model)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_nodes_without_names_and_with_the_same_name() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    model = net.model(net.head(net.conv(x, 4, "two")))
    for node in model.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""
    surgery = compress(model)
    assert [layer["name"] for layer in surgery.report["layers"]] == ["one", "two", "logits"]
    assert surgery.report["layers"][0]["out"] == [4, 3]
    assert operators(surgery.model)["Mul"] == 0


def test_the_name_of_an_output_moves_to_what_makes_it() -> None:
    """The last Add goes with its closed branch; its result keeps its name."""
    net = Net()
    x = net.conv("input", 4, "one")
    y = net.gate(net.conv(net.relu(net.conv("input", 6, "two"), "act"), 4, "three"), range(4), "gate")
    smaller = cut(net.model(net.add(x, y, "sum"))).model
    assert [(node.name, list(node.output)) for node in smaller.graph.node] == [("one", ["sum"])]


def test_an_add_to_the_input_itself_stays_when_its_result_is_the_output() -> None:
    net = Net(channels=4)
    y = net.gate(net.conv("input", 4, "one"), range(4), "gate")
    smaller = cut(net.model(net.add("input", y, "sum"))).model
    assert operators(smaller) == {"Add": 1}


def test_dynamic_height_and_width() -> None:
    net = Net()
    x = net.relu(net.conv("input", 4, "stem", strides=[2, 2]), "act")
    y = net.gate(net.conv(net.relu(net.conv(x, 4, "one"), "r1"), 4, "two"), range(4), "block")
    model = net.model(net.head(net.relu(net.add(x, y, "sum"), "out")))
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    surgery = compress(model)
    assert operators(surgery.model)["Conv"] == 1, "the branch has the shape of the shortcut at every size"
    assert surgery.report["inputs"] == {"input": [1, 3, 224, 224]}


def test_a_constant_that_only_a_body_reads_is_kept() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    net.constant("yes", np.array(True))
    net.constant("inner.constant", np.ones((1, 4, 1, 1), np.float32))
    result = helper.make_tensor_value_info("same", 1, None)
    body = helper.make_graph([helper.make_node("Add", [x, "inner.constant"], ["same"])], "body", [], [result])
    y = net.node("If", ["yes"], "if", then_branch=body, else_branch=body)
    net.width[y] = 4
    cut(net.model(net.conv(x, 4, "two"), y))


def test_operators_from_before_opset_7_are_walls() -> None:
    net = Net(opset=6)
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1], "gate")
    surgery = compress(net.model(net.conv(x, 4, "two")), verify=False)
    assert weight(surgery.model, "one").shape[0] == 4
    assert {entry["node"] for entry in surgery.report["unsupported"]} == {"one", "act", "gate", "two"}


def test_constants_that_stand_in_for_a_branch_have_its_type() -> None:
    """A closed inner layer leaves a BatchNorm's offset to add, in half precision as all around it."""
    net = Net()
    x = net.conv("input", 4, "stem")
    y = net.gate(net.relu(net.conv(x, 4, "a"), "act"), range(4), "gate")
    model = net.model(net.relu(net.add(net.conv(y, 4, "b"), x, "sum"), "out"))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    smaller = compress(model).model
    onnx.checker.check_model(smaller, full_check=True)
    assert weight(smaller, "sum", 0).dtype == np.float16
    assert operators(smaller)["Conv"] == 1


def test_unnamed_layers_are_told_apart_after_an_output_moved() -> None:
    net = Net()
    y = net.gate(net.conv("input", 4, "two"), range(4), "gate")
    model = net.model(net.add(net.conv("input", 4, "one"), y, "sum"))
    for node in model.graph.node:
        node.name = ""
    layers = {layer["name"]: layer["out"] for layer in compress(model).report["layers"]}
    assert layers == {"one": [4, 4], "two": [4, 0]}
