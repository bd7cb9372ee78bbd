"""Standard nodes that stand in for others while shapes are inferred: onnx infers none for them, or fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

STANDARD = ("", "ai.onnx")  # the domain of ONNX's own operators
MICROSOFT = "com.microsoft"
# Operators that ONNX Runtime has in the standard domain, and since which opset ONNX has them there; None: in none.
OF_RUNTIME = {"LayerNormalization": 17, "SimplifiedLayerNormalization": None}
AS_INPUT = {  # results, by their numbers, that have the shape and type of the first input
    **dict.fromkeys([("", "GroupNormalization"), ("", "MeanVarianceNormalization")], (0,)),
    **dict.fromkeys([(MICROSOFT, name) for name in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasSoftmax")], (0,)),
    **dict.fromkeys([(MICROSOFT, f"Skip{kind}LayerNormalization") for kind in ("", "Simplified")], (0, 3)),
}
KIN = {  # the standard operator, and how many inputs it has
    (MICROSOFT, "FusedConv"): ("Conv", 3),
    (MICROSOFT, "FusedGemm"): ("Gemm", 3),
    (MICROSOFT, "FusedMatMul"): ("MatMul", 2),
    (MICROSOFT, "QuantizeLinear"): ("QuantizeLinear", 3),
    (MICROSOFT, "DequantizeLinear"): ("DequantizeLinear", 3),
}
NOT_OF_KIN = ("activation", "trans", "alpha")  # what attributes begin with that the standard operator has not
TURNS = ("transA", "transB", "transBatchA", "transBatchB")


def stand_ins(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """The nodes that stand in for `node`; None: it stands for itself."""
    domain = "" if node.domain in STANDARD else node.domain
    if domain not in ("", MICROSOFT):
        return None
    key = domain, node.op_type
    if key in AS_INPUT:
        return list(_copies(node, AS_INPUT[key]))
    if key in KIN and not any(
        entry.name in TURNS and entry.i for entry in node.attribute if node.op_type == "FusedMatMul"
    ):
        return [_kin(node, *KIN[key])]
    return None


def is_of_runtime(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a node is of ONNX Runtime's own operators in the standard domain, which onnx does not know in `opset`."""
    since = OF_RUNTIME.get(node.op_type, 0)
    return node.domain in STANDARD and (since is None or opset < since)


def known(node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto]:
    """The node, or what onnx knows in its place."""
    return list(_copies(node, (0,))) if is_of_runtime(node, opset) else [node]


def _copies(node: onnx.NodeProto, results: tuple[int, ...]) -> Iterator[onnx.NodeProto]:
    import onnx

    for index in results:
        if index < len(node.output) and node.output[index]:
            yield onnx.helper.make_node("Identity", node.input[:1], [node.output[index]])


def _kin(node: onnx.NodeProto, operator: str, inputs: int) -> onnx.NodeProto:
    import onnx

    kin = onnx.helper.make_node(operator, node.input[:inputs], node.output[:1])
    drop = NOT_OF_KIN if operator == "MatMul" else NOT_OF_KIN[:1]
    kin.attribute.extend(entry for entry in node.attribute if not entry.name.startswith(drop))
    return kin
