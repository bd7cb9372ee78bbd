"""Torchvision networks for the long checks of surgery: built, randomised, exported once, and gated in the ONNX graph.

Weights are random, and nothing is accidentally zero: statistics and affine parameters of norms, biases, layer scales,
class tokens and heads. BatchNorm statistics are those of random images, then disturbed, so that signals neither grow
nor vanish over the depth.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
import torchvision
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from polar_deploy.surgery.runtime import in_float64
from polar_deploy.workspace import atomic_path

Array = npt.NDArray[Any]
SIZES = {  # pixels a side of the exported input: small where the network allows it
    "resnet18": 64,
    "resnet50": 64,
    "wide_resnet50_2": 64,
    "resnext50_32x4d": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "densenet121": 64,
    "googlenet": 64,
    "shufflenet_v2_x1_0": 64,
    "regnet_y_400mf": 64,
    "mnasnet1_0": 64,
    "squeezenet1_1": 64,
    "vgg11_bn": 224,  # below, its adaptive pooling becomes a Gather of pixels
    "inception_v3": 96,
    "convnext_tiny": 64,
    "vit_b_16": 224,
    "swin_t": 224,
}
TIMM = {"tf_efficientnetv2_b0": 64, "nf_regnet_b1": 64, "resnetv2_50": 64}  # the same of timm's
OPSET = 18
INPUT, OUTPUT = "input", "logits"
SCOPES = "pkg.torch.onnx.name_scopes"  # a node's metadata: the modules that it comes from
BATCHES = (2, 5)
TOLERANCE = 1e-5  # of the output's scale
ACTIVATIONS = {"Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Gelu", "Erf"}


class Site(NamedTuple):
    """A tensor that a gate can follow, its number of channels, and the shape of the gate's constant."""

    tensor: str
    width: int
    shape: tuple[int, ...]


class Difference(NamedTuple):
    """How far two graphs are apart, as shares of the output's scale; errors are those against float64, if asked."""

    largest: float
    error_before: float | None = None
    error_after: float | None = None

    @property
    def exact(self) -> bool:
        """Whether that is within surgery's tolerance, or the cut's error at most twice that of the graph as given."""
        if self.error_before is None or self.error_after is None:
            return self.largest <= TOLERANCE
        return self.error_after <= 2 * self.error_before


def build(name: str) -> nn.Module:
    """The network in evaluation mode with random numbers, the same ones every time."""
    torch.manual_seed(0)
    return randomised(_untrained(name), min(pixels(name), 96))


def randomised(network: nn.Module, side: int) -> nn.Module:
    """The network in evaluation mode with random numbers; its statistics are of pictures with `side` pixels a side."""
    _randomise(network)
    _calibrate(network, torch.randn(16, 3, side, side))
    return network.eval().requires_grad_(False)  # else the exporter takes longer


def pixels(name: str) -> int:
    """A side of the exported input."""
    return (SIZES | TIMM)[name]


def _untrained(name: str) -> nn.Module:
    if name in TIMM:
        import timm

        own: nn.Module = timm.create_model(name, pretrained=False)
        return own
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return network


@torch.no_grad()
def _randomise(network: nn.Module) -> None:
    for name, value in network.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "bias" or leaf.endswith("_bias"):
            value.normal_(0, 0.2)
        elif leaf == "layer_scale":
            value.uniform_(0.3, 0.8)
        elif leaf == "class_token":
            value.normal_()
        elif value.ndim < 2:  # the scale of a norm, or of a branch
            value.uniform_(0.5, 1.5)
        elif not value.any():  # heads that start at zero
            value.normal_(0, value[0].numel() ** -0.5)


@torch.no_grad()
def _calibrate(network: nn.Module, images: torch.Tensor) -> None:
    """Sets the statistics of BatchNorm to those of `images`, and disturbs them."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the statistics of this batch
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        mean += 0.3 * variance.sqrt() * torch.randn_like(mean)
        variance *= torch.empty_like(variance).uniform_(0.7, 1.4)
        variance += 1e-2


def exported(network: nn.Module, example: Tensor, opset: int = OPSET) -> onnx.ModelProto:
    """`network` as PyTorch's exporter writes it for `example` [B, …] with B > 1, which stays dynamic; 1 would not."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def export(name: str, network: nn.Module, cache: Path, size: int = 0) -> onnx.ModelProto:
    """`network` as PyTorch's exporter writes it, with a dynamic batch; kept in `cache` as NAME-SIZE.onnx.

    Args:
        size: pixels a side of the input; 0: as in `SIZES`.
    """
    size = size or pixels(name)
    path = cache / f"{name}-{size}.onnx"
    if not path.is_file():
        model = exported(network, torch.zeros(2, 3, size, size))
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            onnx.save(model, temporary)
    return onnx.load(path)


def activations(model: onnx.ModelProto) -> dict[str, str]:
    """All activations of an exported graph, by their input, with their output.

    SiLU is Sigmoid and Mul, GELU is Div, Erf, Add, Mul and Mul: the product counts, not its parts.
    """
    makers, readers = _makers(model), readers_of(model)
    return dict(_ends(node, makers, readers) for node in model.graph.node if node.op_type in ACTIVATIONS)


def sites(model: onnx.ModelProto) -> list[Site]:
    """The outputs of all activations that are not graph outputs."""
    outputs = {value.name for value in model.graph.output}
    return [site(model, tensor) for tensor in activations(model).values() if tensor not in outputs]


def site(model: onnx.ModelProto, tensor: str) -> Site:
    """`tensor` as a place for a gate: channels on the last axis behind a matrix product, else on axis 1."""
    makers = _makers(model)
    maker = makers[tensor]
    while maker.op_type not in ("Conv", "BatchNormalization", "MatMul", "Gemm"):
        maker = makers[next(name for name in maker.input if name in makers)]
    dims = shape_of(model, tensor)
    if maker.op_type in ("MatMul", "Gemm"):
        return Site(tensor, dims[-1], (dims[-1],))
    return Site(tensor, dims[1], (1, dims[1], *[1] * (len(dims) - 2)))


def shape_of(model: onnx.ModelProto, tensor: str) -> list[int]:
    """The shape of a computed tensor as the exporter declared it, 0 where it is dynamic."""
    value = next(value for value in (*model.graph.value_info, *model.graph.output) if value.name == tensor)
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def readers_of(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """By tensor, the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _ends(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], readers: Mapping[str, list[onnx.NodeProto]]
) -> tuple[str, str]:
    """Input and output of the activation that `node` is, or is the core of."""
    start, tensor = node.input[0], node.output[0]
    if node.op_type not in ("Sigmoid", "Erf"):
        return start, tensor
    if node.op_type == "Erf":
        start = makers[start].input[0]
    following = readers.get(tensor, [])
    while len(following) == 1 and following[0].op_type in ("Add", "Mul"):
        product = following[0].output[0]
        if following[0].op_type == "Mul" and start in following[0].input:
            return start, product
        following = readers.get(product, [])
    return start, tensor


def gated(model: onnx.ModelProto, masks: Mapping[Site, Array]) -> onnx.ModelProto:
    """A copy in which sites are multiplied by their masks (1: open, 0: closed); gates are called `gate.TENSOR`."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, found = result.graph, {site.tensor: (site, mask) for site, mask in masks.items()}
    del graph.node[:]
    for node in model.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [f"{name}.gated" if name in found else name for name in node.input]
        for name in found.keys() & set(node.output):
            place, mask = found[name]
            values = mask.astype(np.float32).reshape(place.shape)
            graph.initializer.append(numpy_helper.from_array(values, f"{name}.factor"))
            pair = [name, f"{name}.factor"]
            if len(graph.node) % 2:  # a gate may stand on either side
                pair.reverse()
            graph.node.append(helper.make_node("Mul", pair, [f"{name}.gated"], name=f"gate.{name}"))
    return result


def half(width: int, random: np.random.Generator) -> Array:
    """A mask that closes a random half of the channels."""
    return random.permutation(width) >= width // 2


def compare(before: onnx.ModelProto, after: onnx.ModelProto) -> Difference:
    """Runs both graphs as they stand in ONNX Runtime at both batch sizes.

    Above the tolerance, both are compared with float64.
    """
    worst = Difference(0.0)
    for batch in BATCHES:
        images = random_images(before, batch)
        expected, found = run(before, images), run(after, images)
        difference = Difference(_apart(expected, found))
        if not difference.exact:
            evaluator = ReferenceEvaluator(in_float64(before))
            (truth,) = map(np.asarray, evaluator.run([OUTPUT], {INPUT: images.astype(np.float64)}))
            difference = Difference(difference.largest, _apart(truth, expected), _apart(truth, found))
        worst = max(worst, difference, key=lambda d: (not d.exact, d.largest))
    return worst


def random_images(model: onnx.ModelProto, batch: int) -> Array:
    """float32 [batch, 3, S, S] for the size that the model was exported at."""
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    return np.random.default_rng(7000 + batch).standard_normal((batch, 3, size, size)).astype(np.float32)


def run(model: onnx.ModelProto, images: Array) -> Array:
    """The logits, by ONNX Runtime without any optimisation of its own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    logits: Array = session.run([OUTPUT], {INPUT: images})[0]
    return logits


def _apart(expected: Array, found: Array) -> float:
    if expected.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(expected - found).max() / np.abs(expected).max())


def faults(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """What is wrong with a compressed graph apart from what it computes; empty: nothing."""
    found = []
    try:
        onnx.checker.check_model(after, full_check=True)
    except onnx.checker.ValidationError as error:
        found.append(f"onnx.checker: {str(error).splitlines()[0]}")
    was, now = (Counter(node.op_type for node in model.graph.node) for model in (before, after))
    found += [f"{now[name] - was[name]} more {name}" for name in sorted(now) if now[name] > was[name]]
    for field in ("input", "output"):
        one, other = ([v.SerializeToString() for v in getattr(model.graph, field)] for model in (before, after))
        if one != other:
            found.append(f"another graph {field}")
    return found
