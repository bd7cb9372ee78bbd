"""Gates on other people's networks: every torchvision classifier, and many of timm, with random weights.

For each network, in a process of its own: attach (export, analysis, rehearsal), close random states, export the gated
network, cut it with surgery, and hold what is left against the promise; and cut the module itself. A row that is there
for this commit is not made again, so that a killed run goes on: about an hour and a half on two cores, `--workers 2`.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import ROOT, write_result
from polar_deploy.errors import PolarDeployError

ROWS = ROOT / "benchmarks" / "results" / "coverage.rows.jsonl"  # while the bar runs
SECONDS = 900  # of the processor, for one network: a busy machine changes no row
SMALL = 96  # pixels
LAST = ("vit_h_14", "regnet_y_128gf", "convnext_large", "vit_l_16", "vit_l_32", "timm:nasnetalarge")  # the largest
FIRST_ROWS = ("resnext50_32x4d", "regnet_y_400mf", "timm:repvgg_a0", "convnext_tiny", "vit_b_16", "swin_t")
TIMM = """
repvgg_a0 bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_0_rw_224
convformer_s18 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_s cspdarknet53
cspresnet50 cspresnext50 darknet53 davit_tiny deit_tiny_patch16_224 deit3_small_patch16_224 densenet121 dla34 dla46_c
dm_nfnet_f0 dpn68 eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
efficientnet_es efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw fastvit_t8
fbnetc_100 fbnetv3_b flexivit_small focalnet_tiny_srf gcresnext26ts gcvit_xxtiny gernet_s ghostnet_100 ghostnetv2_100
gmixer_24_224 gmlp_s16_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
inception_next_tiny inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050 legacy_seresnet18
legacy_xception levit_128s maxvit_nano_rw_256 mambaout_femto mixer_s16_224 mixnet_s mnasnet_050 mobilenetv1_100
mobilenetv2_100 mobilenetv3_small_100 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
nasnetalarge nest_tiny nextvit_small nf_regnet_b1 nf_resnet50 nfnet_l0 pit_ti_224 poolformer_s12 poolformerv2_s12
pvt_v2_b0 rdnet_tiny regnetx_002 regnety_002 regnetz_b16 regnetv_040 repghostnet_050 repvit_m0_9 res2net50_26w_4s
resmlp_12_224 resnest14d resnet18 resnet26d resnet51q resnetaa50 resnetblur18 resnetrs50 resnetv2_50 resnext26ts
rexnet_100 selecsls42 semnasnet_050 sequencer2d_s seresnet18 seresnext26d_32x4d shvit_s1 skresnet18 spnasnet_100
starnet_s1
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tf_efficientnet_b0 tf_efficientnetv2_b0
tf_mixnet_s tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn visformer_tiny
vit_tiny_patch16_224 vit_relpos_small_patch16_224 vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41
xcit_nano_12_p16_224 test_byobnet test_convnext test_efficientnet test_vit test_resnet test_nfnet
""".split()  # noqa: SIM905  (a hundred names)


def names() -> list[str]:
    """All networks: torchvision's by their name, timm's as timm:NAME."""
    import torchvision

    own = torchvision.models.list_models(module=torchvision.models)
    every = [*own, *(f"timm:{name}" for name in TIMM)]
    between = sorted({*every} - {*FIRST_ROWS, *LAST}, key=lambda name: name.partition(":")[2] or name)
    return [*FIRST_ROWS, *between, *(name for name in LAST if name in every)]


def build(name: str) -> tuple[Any, int]:
    """The network and its input size in pixels."""
    import torch

    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        model: Any = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        return model, _pixels(model, int(model.default_cfg["input_size"][-1]))
    import torchvision

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    model = torchvision.models.get_model(name, weights=None, **options)
    return model, _pixels(model, 224)


def _pixels(model: Any, own: int) -> int:
    """A small input where the network takes one: what can go from it is the same."""
    import torch

    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, SMALL, SMALL))
    except Exception:  # noqa: BLE001  (networks refuse in their own ways)
        return own
    return SMALL


def shaken(network: Any) -> Any:
    """Random statistics and affine parameters, as trained networks have them; nothing starts at zero."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if value.is_floating_point() and (value == value.flatten()[0]).all():
                value.copy_(0.5 + torch.rand(value.shape, generator=draw))
            elif name.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=draw))
    return network


def row(name: str) -> dict[str, Any]:
    """Everything about one network."""
    import onnx
    import torch

    from polar_deploy import Gates
    from polar_deploy.gating.rehearsal import random_state
    from polar_deploy.surgery import compress_file, cost

    torch.set_num_threads(1)
    network, size = build(name)
    start = time.monotonic()
    gates = Gates(shaken(network), torch.zeros(1, 3, size, size), budget=0.9, align=1, min_width=0.0)
    attached = time.monotonic() - start
    least = gates.smallest()
    states = []
    for seed in (3,):  # the rehearsal has closed two others in the graph, and counted
        gates.freeze(random_state(gates.analysis.choices, seed))
        promised = gates.promise()
        with TemporaryDirectory() as folder:
            gated, small = Path(folder, "gated.onnx"), Path(folder, "small.onnx")
            gates.export(gated)
            report = compress_file(gated, small)
            counted = cost(onnx.load(small))
        states.append(
            {
                "promised": promised,
                "counted": {"macs": counted.macs, "params": counted.params},
                "verified": report["verified"],
                "gates_left": sum(gate["outcome"] == "kept" for gate in report["gates"]),
            }
        )
    try:
        gates.cut()
        cut = "equal"
    except PolarDeployError as error:
        cut = str(error).splitlines()[0]
    return {
        "input": size,
        "attach_seconds": round(attached, 1),
        "sites": len(gates.sites),
        "blocks": len(gates.blocks),
        "gates": len(gates.opened),
        "full": gates.full,
        "smallest": {cost: round(share, 5) for cost, share in least.items()},
        "ungated": len(gates.ungated),
        "states": states,
        "cut": cut,
    }


def attempt(name: str) -> dict[str, Any]:
    """`row`, or why there is none."""
    try:
        return {"network": name, "accepted": True, **row(name)}
    except PolarDeployError as error:
        return {"network": name, "accepted": False, "reason": str(error).splitlines()[0]}
    except Exception as error:  # noqa: BLE001  (it is a finding, and gets a row)
        traceback.print_exc()
        return {"network": name, "accepted": False, "reason": f"{type(error).__name__}: {error}", "bare": True}


def in_process(name: str) -> dict[str, Any]:
    """`attempt` in a process of its own, with a limit."""
    command = [sys.executable, "-m", "benchmarks.bar_coverage", "--one", name]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = done.stdout.strip().splitlines()[-1:] or ["{}"]
    found = json.loads(line[0]) if line[0].startswith("{") else {}
    why = f"not done in {SECONDS} s" if done.returncode == -signal.SIGXCPU else done.stderr.strip()[-300:]
    found = found or {"network": name, "accepted": False, "reason": why, "bare": True}
    return found | {"seconds": round(time.monotonic() - start, 1)}


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows come to."""
    accepted = [each for each in rows if each["accepted"]]
    kept = {
        cost: sum(all(s["promised"][cost] == s["counted"][cost] for s in each["states"]) for each in accepted)
        for cost in ("macs", "params")
    }
    return {
        "networks": len(rows),
        "torchvision": sum(not each["network"].startswith("timm:") for each in rows),
        "timm": sum(each["network"].startswith("timm:") for each in rows),
        "accepted": len(accepted),
        "promise_kept": kept,
        "module_cut": sum(each["cut"] == "equal" for each in accepted),
        "bare_errors": [each["network"] for each in rows if each.get("bare")],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="a single network: its row on stdout")
    parser.add_argument("--only", nargs="*", help="these networks alone")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.one:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
        print(json.dumps(attempt(arguments.one)))
        return 0
    wanted = arguments.only or names()
    rows = {each["network"]: each for each in map(json.loads, ROWS.read_text().splitlines())} if ROWS.is_file() else {}
    missing = [name for name in wanted if name not in rows]
    with ThreadPoolExecutor(arguments.workers) as pool, ROWS.open("a") as file:
        for done in pool.map(in_process, missing):
            rows[done["network"]] = done
            file.write(json.dumps(done) + "\n")
            file.flush()
            print(done["network"], done["accepted"], done.get("reason", done.get("cut")), done["seconds"], flush=True)
    found = [rows[name] for name in wanted if name in rows]
    counted = figures(found)
    bars = {
        "accepted: at least 95 %": counted["accepted"] >= 0.95 * counted["networks"],
        "MACs promised are those left, in every accepted network": counted["promise_kept"]["macs"]
        == counted["accepted"],
        "parameters promised are those left": counted["promise_kept"]["params"] == counted["accepted"],
        "no bare exception": not counted["bare_errors"],
    }
    return write_result("coverage", bars, {**counted, "rows": found})


if __name__ == "__main__":
    sys.exit(main())
