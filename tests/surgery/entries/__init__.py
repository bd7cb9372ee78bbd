"""What random graphs are made of: how each operator is added to an image of [batch, channels, height, width].

A new operator is a new line in the table of its family: its ONNX type (and behind a blank, which of several ways), the
function that adds it, and from which opset on there is one.
"""

from __future__ import annotations

from tests.surgery.entries import activations, elementwise, integers, mixing, norms, shapes, unsupported

ENTRIES = {
    **activations.ENTRIES,
    **elementwise.ENTRIES,
    **norms.ENTRIES,
    **shapes.ENTRIES,
    **mixing.ENTRIES,
    **integers.ENTRIES,
    **unsupported.ENTRIES,
}

# Where rounding can flip a result: a difference counts when it shows at other batch sizes too.
STEPS = {"ArgMax", "ArgMin", "Bernoulli", "Cast", "Ceil", "DynamicQuantizeLinear", "Equal", "Floor", "Hardmax", "Mod",
         "Multinomial", "NonZero", "QGemm", "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearConv",
         "QLinearLeakyRelu", "QLinearMatMul", "QLinearMul", "QLinearSigmoid", "QuantizeLinear", "Round", "Shrink",
         "Sign", "ThresholdedRelu"}  # fmt: skip

# Operators that no random graph holds, and why.
ABSENT = {
    **dict.fromkeys(("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit"), "text has no channels"),
    "TfIdfVectorizer": "text has no channels",
    **dict.fromkeys(("CausalConvWithState", "LinearAttention", "TensorScatter"), "ONNX Runtime has none on CPUs"),
    **dict.fromkeys(("Swish", "SwiGLU"), "ONNX Runtime has none yet; tested with onnx.reference"),
    "SimplifiedLayerNormalization": "onnx's checker does not know it; tested with what else the optimiser writes",
    "SequenceMap": "ONNX Runtime has none of its own",
    "NonMaxSuppression": "boxes have no channels",
}  # fmt: skip
