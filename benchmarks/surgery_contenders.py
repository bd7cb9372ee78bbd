"""Who cuts how fast: one measurement, in a process of its own, printed as JSON. See `benchmarks.bar_surgery_speed`.

    python -m benchmarks.surgery_contenders (ours | onnxsim | torch-pruning) NETWORK FOLDER

FOLDER holds gated.onnx, folded.onnx (the same function, gates folded into zero filters), masks.npz (a mask for one
writer of each group of coupled sets, by the name of its module), images.npz and, for a chain, chain.onnx. The last
result is left in out.onnx or, where it is no ONNX graph, as its answer in logits.npz.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

RUNS = 5  # of the rivals


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

    model, seconds = onnx.load(folder / "folded.onnx"), []
    for _run in range(RUNS):
        start = time.perf_counter()
        pruned = apply_structured_pruning_cpp(model, 0.5)
        seconds.append(time.perf_counter() - start)
    onnx.save(pruned, folder / "out.onnx")
    return {"seconds": seconds}


def torch_pruning(name: str, folder: Path) -> dict[str, Any]:
    """Torch-Pruning: the dependency graph is built, then each group of sets is pruned by way of one of its writers."""
    import torch
    import torch_pruning as tp  # type: ignore[import-not-found]

    network = _network(name, folder)
    images = torch.from_numpy(np.load(folder / "images.npz")["images"])
    masks, seconds = dict(np.load(folder / "masks.npz")), []
    for _run in range(RUNS):
        pruned = copy.deepcopy(network)
        start = time.perf_counter()
        graph = tp.DependencyGraph().build_dependency(pruned, images[:1])
        for layer, mask in masks.items():
            closed = np.flatnonzero(~mask).tolist()
            graph.get_pruning_group(pruned.get_submodule(layer), tp.prune_conv_out_channels, closed).prune()
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        np.savez(folder / "logits.npz", logits=pruned.eval()(images).numpy())
    mixers = [module for module in pruned.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    return {"seconds": seconds, "weights": sum(mixer.weight.numel() for mixer in mixers)}


def _network(name: str, folder: Path) -> Any:
    """The torchvision network of that name; else the chain of convolutions in chain.onnx."""
    from torch import from_numpy, nn

    from benchmarks.surgery_models import SIZES, build

    if name in SIZES:
        return build(name).requires_grad_(True)  # Torch-Pruning follows gradients
    layers: list[nn.Module] = []
    for tensor in onnx.load(folder / "chain.onnx").graph.initializer:
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


CONTENDERS = {"ours": ours, "onnxsim": onnxsim, "torch-pruning": torch_pruning}

if __name__ == "__main__":
    who, network_name, place = sys.argv[1:]
    print(json.dumps(CONTENDERS[who](network_name, Path(place))))
