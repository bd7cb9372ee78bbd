"""Who cuts how fast: one measurement, in a process of its own, printed as JSON. See `benchmarks.bar_surgery_speed`.

    python -m benchmarks.surgery_contenders (ours | onnxsim | torch-pruning | openvino | qonnx) NETWORK FOLDER

FOLDER holds plain.onnx (no gates), gated.onnx, folded.onnx (the same function, gates folded into zero filters),
masks.npz (a mask for one writer of each group of coupled sets, by the name of its module), weights.json (the name of
that writer's weight in plain.onnx) and images.npz. The last result is left in out.onnx or, where it is no ONNX graph,
as its answer in logits.npz.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

RUNS = 5  # of the rivals
ENOUGH = 30  # seconds of runs, after which a rival gets no further one


def ours(_: str, folder: Path) -> dict[str, Any]:
    """One run from file to file, after a warm-up that pays for the imports; memory: bytes above what was held then."""
    from polar_deploy.surgery import compress_file

    onnx.save(_one_layer(), folder / "warm-up.onnx")
    compress_file(folder / "warm-up.onnx", folder / "warm-up.out.onnx", verify=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    held, start, computed = _status("VmRSS"), time.perf_counter(), time.process_time()
    compress_file(folder / "gated.onnx", folder / "out.onnx", verify=False)
    seconds, memory = time.perf_counter() - start, _status("VmHWM") - held
    return {"seconds": [seconds], "processor": time.process_time() - computed, "memory": memory}


def onnxsim(_: str, folder: Path) -> dict[str, Any]:
    """Channel pruning of onnxsim: it takes the half of the filters with the smallest norm, which are those of zeros."""
    from onnxsim.onnx_simplifier import apply_structured_pruning_cpp  # type: ignore[import-not-found]

    model = onnx.load(folder / "folded.onnx")
    seconds, pruned = _repeated(lambda: model, lambda given: apply_structured_pruning_cpp(given, 0.5))
    onnx.save(pruned, folder / "out.onnx")
    return {"seconds": seconds}


def torch_pruning(name: str, folder: Path) -> dict[str, Any]:
    """Torch-Pruning: the dependency graph is built, then each group of sets is pruned by way of one of its writers."""
    import torch
    import torch_pruning as tp  # type: ignore[import-not-found]

    network = _network(name, folder)
    images = torch.from_numpy(np.load(folder / "images.npz")["images"])
    closed = {layer: np.flatnonzero(~mask).tolist() for layer, mask in np.load(folder / "masks.npz").items()}

    def prune(network: torch.nn.Module) -> torch.nn.Module:
        graph = tp.DependencyGraph().build_dependency(network, images[:1])
        for layer, channels in closed.items():
            graph.get_pruning_group(network.get_submodule(layer), tp.prune_conv_out_channels, channels).prune()
        return network

    seconds, pruned = _repeated(lambda: copy.deepcopy(network), prune)
    with torch.no_grad():
        np.savez(folder / "logits.npz", logits=pruned.eval()(images).numpy())
    mixers = [module for module in pruned.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    return {"seconds": seconds, "weights": sum(mixer.weight.numel() for mixer in mixers)}


def openvino(_: str, folder: Path) -> dict[str, Any]:
    """Pruning of OpenVINO, which looks for zero filters, behind the common transformations."""
    import openvino as ov
    from openvino._offline_transformations import apply_moc_transformations, apply_pruning_transformation

    core = ov.Core()

    def prune(model: Any) -> Any:
        apply_moc_transformations(model, cf=False)
        apply_pruning_transformation(model)
        return model

    seconds, pruned = _repeated(lambda: core.read_model(folder / "folded.onnx"), prune)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(pruned, "CPU", hint)
    np.savez(folder / "logits.npz", logits=compiled(np.load(folder / "images.npz")["images"])[0])
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    shapes = [node.input(1).get_partial_shape() for node in pruned.get_ops() if node.get_type_name() in kinds]
    return {"seconds": seconds, "weights": sum(math.prod(shape.to_shape()) for shape in shapes if shape.is_static)}


def qonnx(_: str, folder: Path) -> dict[str, Any]:
    """PruneChannels of qonnx, told which channels of which weights go; its lossless mode does not keep shapes."""
    from qonnx.core.modelwrapper import ModelWrapper  # type: ignore[import-not-found]
    from qonnx.transformation.extract_conv_bias import ExtractBiasFromConv  # type: ignore[import-not-found]
    from qonnx.transformation.fold_constants import FoldConstants  # type: ignore[import-not-found]
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul  # type: ignore[import-not-found]
    from qonnx.transformation.infer_shapes import InferShapes  # type: ignore[import-not-found]
    from qonnx.transformation.pruning import PruneChannels  # type: ignore[import-not-found]

    names = json.loads((folder / "weights.json").read_text())
    masks = np.load(folder / "masks.npz")
    spec = {names[layer]: {0: set(np.flatnonzero(~mask).tolist())} for layer, mask in masks.items()}
    given = ModelWrapper(onnx.load(folder / "plain.onnx"))
    for needed in (GemmToMatMul(), FoldConstants(), ExtractBiasFromConv(), InferShapes()):
        given = given.transform(needed)
    seconds, pruned = _repeated(
        lambda: copy.deepcopy(given), lambda model: model.transform(PruneChannels(copy.deepcopy(spec)))
    )
    graph = pruned.model.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):  # it took 1 for what was open
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(pruned.model, folder / "out.onnx")
    return {"seconds": seconds}


def _repeated(prepare: Callable[[], Any], prune: Callable[[Any], Any]) -> tuple[list[float], Any]:
    """Seconds of each run of `prune` on something new from `prepare`, and the last result."""
    seconds: list[float] = []
    while len(seconds) < RUNS and sum(seconds) < ENOUGH:
        given = prepare()
        start = time.perf_counter()
        pruned = prune(given)
        seconds.append(time.perf_counter() - start)
    return seconds, pruned


def _network(name: str, folder: Path) -> Any:
    """The torchvision network of that name; else the chain of convolutions in plain.onnx."""
    from torch import from_numpy, nn

    from benchmarks.surgery_models import SIZES, build

    if name in SIZES:
        return build(name).requires_grad_(True)  # Torch-Pruning follows gradients
    layers: list[nn.Module] = []
    for tensor in onnx.load(folder / "plain.onnx").graph.initializer:
        weight = from_numpy(numpy_helper.to_array(tensor).copy())
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False)
        layer.weight = nn.Parameter(weight)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def _one_layer() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "weight")
    ends = [helper.make_tensor_value_info(name, 1, ["batch", width, 8, 8]) for name, width in (("x", 3), ("y", 4))]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "weight"], ["y"])], "one", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def _status(name: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


CONTENDERS = {"ours": ours, "onnxsim": onnxsim, "torch-pruning": torch_pruning, "openvino": openvino, "qonnx": qonnx}

if __name__ == "__main__":
    who, network_name, place = sys.argv[1:]
    print(json.dumps(CONTENDERS[who](network_name, Path(place))))
