"""Operators that channels cannot be followed through, by nature: each with its reason, for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.surgery.operator import UnsupportedOp

if TYPE_CHECKING:
    from polar_deploy.surgery.operator import Operator


REASONS = {
    "its heads are not followed": ("LinearAttention",),
    "its state is carried from call to call": ("CausalConvWithState", "TensorScatter"),
    "its body is not followed": ("If", "Loop", "Scan", "SequenceMap"),
    "it mixes all numbers along an axis": ("DFT", "Det", "STFT"),
    "what comes out has a shape that depends on numbers": ("Compress", "NonMaxSuppression", "NonZero", "Unique"),
    "its result is random": (
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    ),
    "it joins channels and positions": ("Col2Im",),
    "it is a loss": ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"),
    "sequences are not followed": (
        "ConcatFromSequence",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceErase",
        "SequenceInsert",
        "SplitToSequence",
    ),
    "optional values are not followed": ("Optional", "OptionalGetElement", "OptionalHasElement"),
    "it works on text": ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"),
}
HANDLERS: dict[str, Operator] = {
    operator: UnsupportedOp(reason) for reason, operators in REASONS.items() for operator in operators
}
