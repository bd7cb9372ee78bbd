"""Surgery on what people export: 60 networks of timm, attention heads in the forms of the day, what ONNX Runtime saved.

Weights and gates are random. Four parts, each in processes of its own:

- networks of timm, half of the channels closed behind every activation: the same function, and a table of what stays
  and why;
- attention: in each layer half of the heads are not read by the projection behind, in shared keys and values whole
  groups of them. All weights of these heads have to go, and nothing else;
- a CRNN, which reads text: half of the channels closed behind its convolutions, half of the units of its LSTMs read by
  nobody. At least 98 % of the weights that this takes the use from have to go;
- ResNet-50 and MobileNetV2 as ONNX Runtime's optimiser saves them (basic, extended): as much goes as from the export.

A row that is there for this commit is not made again, so that a killed run goes on. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks import bar_coverage as coverage
from benchmarks.common import COMMIT, RESULTS, ROOT, write_result
from benchmarks.surgery_models import TOLERANCE, build, compare, export, exported, faults, gated, half, run, sites
from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery import compress

ROWS = RESULTS / "surgery-exports.rows.jsonl"  # while the bar runs
SECONDS = 1200  # for one network
TIMM = """
convnext_atto cspresnet50 darknet53 deit_tiny_patch16_224 densenet121 dla34 dpn68 ecaresnet26t edgenext_xx_small
efficientformer_l1 efficientnet_b0 efficientnet_lite0 efficientvit_m0 ese_vovnet19b_dw fastvit_t8 fbnetc_100
gernet_s ghostnet_100 hardcorenas_a hgnet_tiny hrnet_w18_small inception_next_tiny inception_v3 lcnet_050 levit_128s
mambaout_femto mixer_s16_224 mixnet_s mnasnet_050 mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100
mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 nf_regnet_b1 nf_resnet50 nfnet_l0 poolformer_s12
pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnet18
resnet26d resnetv2_50 rexnet_100 selecsls42 seresnet18 skresnet18 starnet_s1 swin_tiny_patch4_window7_224
tf_efficientnetv2_b0 tinynet_e vit_tiny_patch16_224
""".split()  # noqa: SIM905  (sixty names)
ATTENTION = ("vit_tiny", "deit_tiny", "swin_tiny", "bert", "gqa-eager-18", "gqa-sdpa-18", "gqa-sdpa-23")
OPTIMISED = tuple(f"{name}-{level}" for name in ("resnet50", "mobilenet_v2") for level in ("basic", "extended"))
RECURRENT = ("crnn",)
CNN_SIZE, TOKENS, WIDTH = 64, 12, 64
LETTERS, CLASSES = 100, 37  # pixels that a line of text is long; characters
REMOVED = 0.98  # of what is removable from a recurrent network


def network_row(name: str, folder: Path) -> dict[str, Any]:
    """Half of the channels closed behind every activation of a network of timm."""
    network, size = coverage.build(f"timm:{name}")
    model = export(name, coverage.shaken(network).eval().requires_grad_(False), folder, size)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    before = gated(model, {site: half(site.width, random) for site in sites(model)})
    surgery = compress(before, verify=False)
    difference = compare(before, surgery.model)
    stays: Counter[str] = Counter()
    for entry in surgery.report["cuts_not_made"]:
        stays[f"{entry['operator']}: {entry['reason']}"] += entry["channels"]
    return {
        "exact": difference.exact,
        "difference": difference._asdict(),
        "faults": faults(before, surgery.model),
        "params": surgery.report["params"],
        "gates": dict(Counter(gate["outcome"] for gate in surgery.report["gates"])),
        "stays": dict(stays.most_common()),
        "unsupported": dict(
            Counter(f"{entry['operator']}: {entry['reason']}" for entry in surgery.report["unsupported"])
        ),
    }


def attention_row(name: str, folder: Path) -> dict[str, Any]:
    """Half of the heads of each layer closed; weights: of matrix products, before, after, and as they should be."""
    torch.manual_seed(0)
    module, inputs, layers, opset = _attention(name)
    expected = sum(_close(projection, heads, dimensions, shared) for projection, heads, dimensions, shared in layers)
    before = exported(module.eval().requires_grad_(False), inputs, opset)
    surgery = compress(before)
    apart = _apart(before, surgery.model, torch.randn(3, *inputs.shape[1:]))
    return {
        "weights": [_weights(before), _weights(surgery.model), _weights(before) - expected],
        "layers": len(layers),
        "difference": apart,
        "exact": apart <= TOLERANCE,
    }


class _Tokens(nn.Module):
    """A network of transformers from embeddings to its last hidden state."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__()
        self.network, self.options = network, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(inputs_embeds=x, **self.options).last_hidden_state
        return found


Heads = tuple[nn.Linear, int, int, int]  # the projection, heads of queries, their dimensions, heads for one of keys


def _attention(name: str) -> tuple[nn.Module, torch.Tensor, list[Heads], int]:
    """The network, an input, its attention layers, and the opset that it is exported with."""
    if name == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        bert = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
        layers = [(layer.attention.output.dense, 4, WIDTH // 4, 1) for layer in bert.encoder.layer]
        return _Tokens(bert), torch.randn(2, TOKENS, WIDTH), layers, 18
    if name.startswith("gqa"):
        from transformers import LlamaConfig, LlamaModel

        _, how, opset = name.split("-")
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=50, intermediate_size=96, max_position_embeddings=64, **sizes)
        config._attn_implementation = how
        llama = LlamaModel(config)
        layers = [(layer.self_attn.o_proj, 8, WIDTH // 8, 4) for layer in llama.layers]
        return _Tokens(llama, use_cache=False), torch.randn(2, TOKENS, WIDTH), layers, int(opset)
    import timm

    known = {"vit_tiny": "vit_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224"}
    network = timm.create_model(known.get(name, "swin_tiny_patch4_window7_224"), pretrained=False)
    found = [module for module in network.modules() if hasattr(module, "num_heads") and hasattr(module, "proj")]
    layers = [(each.proj, each.num_heads, each.proj.in_features // each.num_heads, 1) for each in found]
    return network, torch.randn(2, 3, 224, 224), layers, 18


def _close(projection: nn.Linear, heads: int, dimensions: int, shared: int) -> int:
    """Every second head, or group of them, is not read any more. Returns how many weights that takes along."""
    columns = projection.weight.data.view(len(projection.weight), heads // shared, -1)
    columns[:, ::2] = 0
    closed = len(range(0, heads // shared, 2))
    width = projection.out_features
    return closed * dimensions * width * (shared + 2 + shared)  # queries, keys and values, and the projection's own


class _CRNN(nn.Module):
    """The reader of Shi, Bai and Yao (arXiv 1507.05717), from images [batch, 3, 32, width] to [steps, batch, classes].

    Its convolutions with batch normalisation, their poolings, and two bidirectional LSTMs.
    """

    WIDTHS = (64, 128, 256, 256, 512, 512, 512)
    POOLED: ClassVar = {0: (2, 2), 1: (2, 2), 3: (2, 1), 5: (2, 1)}  # behind which convolution, and by how much
    HIDDEN = 256

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise((3, *self.WIDTHS))):
            last = index == len(self.WIDTHS) - 1
            layers.append(nn.Conv2d(inputs, outputs, 2 if last else 3, padding=0 if last else 1))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            if index in self.POOLED:
                layers.append(nn.MaxPool2d(self.POOLED[index]))
        self.features = nn.Sequential(*layers)
        self.lower = nn.LSTM(self.WIDTHS[-1], self.HIDDEN, bidirectional=True)
        self.between = nn.Linear(2 * self.HIDDEN, self.HIDDEN)
        self.upper = nn.LSTM(self.HIDDEN, self.HIDDEN, bidirectional=True)
        self.head = nn.Linear(2 * self.HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x).squeeze(2).permute(2, 0, 1)
        x = self.between(self.lower(x)[0])
        answer: torch.Tensor = self.head(self.upper(x)[0])
        return answer

    def forget(self, units: torch.Tensor) -> None:
        """These units of both LSTMs, int [units], are not read any more, neither behind them nor at their next step."""
        for layer, reader in ((self.lower, self.between), (self.upper, self.head)):
            for recurrent in (layer.weight_hh_l0, layer.weight_hh_l0_reverse):
                recurrent.data[:, units] = 0
            reader.weight.data.view(-1, 2, self.HIDDEN)[:, :, units] = 0

    @classmethod
    def weights(cls, share: int) -> int:
        """Elements of its weights where one of `share` channels and units is left."""
        widths, hidden = [width // share for width in cls.WIDTHS], cls.HIDDEN // share
        taps = [9] * (len(widths) - 1) + [4]
        layers = sum(a * b * kernel for (a, b), kernel in zip(pairwise((3, *widths)), taps, strict=True))
        cells = sum(2 * 4 * hidden * (inputs + hidden) for inputs in (widths[-1], cls.HIDDEN))
        return layers + cells + 2 * hidden * (cls.HIDDEN + CLASSES)


def recurrent_row(_: str, folder: Path) -> dict[str, Any]:
    """weights: before, after, and those that are of use."""
    torch.manual_seed(0)
    module = coverage.shaken(_CRNN()).eval().requires_grad_(False)
    module.forget(torch.randperm(module.HIDDEN)[: module.HIDDEN // 2])
    model = exported(module, torch.randn(2, 3, 32, LETTERS))
    random = np.random.default_rng(0)
    before = gated(model, {site: half(site.width, random) for site in sites(model)})
    surgery = compress(before)
    apart = _apart(before, surgery.model, torch.randn(3, 3, 32, LETTERS))
    was, now, goal = module.weights(1), _weights(surgery.model), module.weights(2)  # it exports them in pieces
    return {
        "weights": [was, now, goal],
        "share_of_removable": (was - now) / (was - goal),
        "difference": apart,
        "exact": apart <= TOLERANCE,
    }


def _apart(before: onnx.ModelProto, after: onnx.ModelProto, images: torch.Tensor) -> float:
    """How far two models are apart, as a share of the largest output."""
    one, other = run(before, images.numpy()), run(after, images.numpy())
    return float(np.abs(one - other).max() / np.abs(one).max())


def _weights(model: onnx.ModelProto) -> int:
    """Elements of the weights of all matrix products, convolutions and LSTMs."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    kinds = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
    nodes = [node for node in model.graph.node if node.op_type in kinds]
    cells = [node for node in model.graph.node if node.op_type == "LSTM"]
    own = sum(sizes.get(node.input[1], 0) for node in nodes)  # none where both factors are computed
    return own + sum(sizes[name] for node in cells for name in node.input[1:3])


def optimised_row(name: str, folder: Path) -> dict[str, Any]:
    """weights: left of the export, and of what ONNX Runtime saved of it."""
    import onnxruntime

    network, level = name.rsplit("-", 1)
    model = export(network, build(network), folder, CNN_SIZE)
    random = np.random.default_rng(zlib.crc32(network.encode()))
    before = gated(model, {site: half(site.width, random) for site in sites(model)})
    source, target = folder / "gated.onnx", folder / "optimised.onnx"
    onnx.save(before, source)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    plain, cut = compress(before), compress(onnx.load(target))
    return {
        "weights": [_weights(before), _weights(plain.model), _weights(cut.model)],
        "exact": bool(plain.report["verified"] and cut.report["verified"]),
        "operators": dict(Counter(node.op_type for node in onnx.load(target).graph.node)),
    }


PARTS: dict[str, tuple[tuple[str, ...], Callable[[str, Path], dict[str, Any]]]] = {
    "attention": (ATTENTION, attention_row),
    "recurrent": (RECURRENT, recurrent_row),
    "optimised": (OPTIMISED, optimised_row),
    "networks": (tuple(TIMM), network_row),
}


def row(part: str, name: str) -> dict[str, Any]:
    """One row in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return PARTS[part][1](name, Path(folder))
        except PolarDeployError as error:
            return {"exact": False, "error": str(error)}


def asked(part: str, name: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bar_surgery_exports", "--row", part, name]
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"exact": False, "error": f"not done after {SECONDS} s"}
    if child.returncode:
        return {"exact": False, "error": (child.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _show(part: str, name: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{part:10} {name:32} ERROR {found['error']}", flush=True)
        return
    amounts = found.get("weights") or found["params"]
    print(f"{part:10} {name:32} {'exact' if found['exact'] else 'DIFFERS'} {amounts}", flush=True)
    for reason, count in list(found.get("stays", {}).items())[:4]:
        print(f"{'':12}{count} channels stay: {reason}", flush=True)


def main() -> int:
    """Run the bar; 0 if it is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs=2, metavar=("PART", "NAME"), help="print one row, for the bar itself")
    parser.add_argument("names", nargs="*", help="only these; no result is written")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(row(*args.row)))
        return 0
    kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []
    done = {(each["part"], each["name"]): each["row"] for each in kept if each["commit"] == COMMIT}
    rows: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for part, (names, _) in PARTS.items():
        for name in names:
            if args.names and name not in args.names:
                continue
            found = done.get((part, name)) or asked(part, name)
            rows[part][name] = found
            _show(part, name, found)
            if not args.names and (part, name) not in done:
                with ROWS.open("a") as file:
                    file.write(json.dumps({"commit": COMMIT, "part": part, "name": name, "row": found}) + "\n")
    if args.names:
        return 0
    ROWS.unlink(missing_ok=True)
    return write_result("surgery-exports", _bars(rows), rows)


def _bars(rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    def even(found: dict[str, Any]) -> bool:
        _, one, other = found.get("weights", (0, 0, 1))
        return bool(one == other)

    return {
        f"{len(TIMM)} exports of timm: the same function, valid graphs": all(
            found["exact"] and not found["faults"] for found in rows["networks"].values()
        ),
        "attention: all weights of closed heads are gone, and no other, exactly": all(
            found["exact"] and even(found) for found in rows["attention"].values()
        ),
        f"recurrent: at least {REMOVED:.0%} of what is removable is gone, exactly": all(
            found["exact"] and found["share_of_removable"] >= REMOVED for found in rows["recurrent"].values()
        ),
        "what ONNX Runtime optimised: as much goes as from the export": all(
            found["exact"] and found.get("weights", (0, 0, 1))[2] <= found.get("weights", (0, 0, 1))[1]
            for found in rows["optimised"].values()
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
