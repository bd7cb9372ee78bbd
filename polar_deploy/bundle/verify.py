"""Is the bundle whole, right, and fast on this device?

Checks every file against the manifest, loads the engines if they fit this device and are trusted (or builds them, with
--rebuild), holds them against the golden samples and times the full against the compressed network. Needs no PyTorch.
Exit codes: 0 verified; 1 golden samples or latency fail; 2 command line; 4 damaged or hostile; 5 not run here in the
bundle's precision, or the latency could not be told apart from noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.bundle import device

if TYPE_CHECKING:
    from polar_deploy.bundle.read import Bundle
    from polar_deploy.documents.parity import BatchLatency
    from polar_deploy.documents.verified import GoldenCheck, Judged, Verified
    from polar_deploy.engines import Engine
    from polar_deploy.parity import Judgement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bundle verify`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder, or the .zip")
    device.add_engine_arguments(parser)
    parser.add_argument("--no-timing", action="store_true", help="do not time the networks")
    parser.add_argument("--data", metavar="DIR", type=Path, help="measure accuracy on the test set in this folder")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write the result as a page, beside the maker's figures"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify a bundle and print what was found."""
    from polar_deploy.bundle.read import opened
    from polar_deploy.parity import EXIT_CODES

    with opened(arguments.bundle) as bundle:
        options = device.read_options(arguments, bundle)
        found = verify(bundle, options, timing=not arguments.no_timing, data=arguments.data)
        if arguments.html:
            from polar_deploy.bundle.page import page
            from polar_deploy.workspace import write_text

            write_text(arguments.html, page(bundle, found))
        print(
            json.dumps(found.as_json(), indent=1, allow_nan=False)
            if arguments.json
            else "\n".join(_lines(bundle, found))
        )
    return EXIT_CODES[found.verdict["overall"].result]


def verify(bundle: Bundle, options: device.Options, *, timing: bool = True, data: Path | None = None) -> Verified:
    """What this device finds about a bundle whose files are whole.

    Args:
        bundle: as `read` gives it.
        options: how to come by engines.
        timing: whether to time the networks.
        data: a folder with the test set, to measure accuracy; None: the maker's figure has to do.

    Raises:
        ContentError: a plan or a graph cannot be read.
        UsageError: no test set in `data`.
    """
    from polar_deploy import parity
    from polar_deploy.bundle import accuracy, kernels
    from polar_deploy.documents.verified import BundleName, GoldenChecks, Verified
    from polar_deploy.engines import machine

    test = accuracy.test_set(bundle, data) if data is not None else None
    graphs = _fp32_graphs(bundle)
    onnx = golden_samples(bundle, graphs, "fp32")
    with device.open_engines(bundle, options) as here:
        golden = golden_samples(bundle, here.engines)
        judged: dict[Judged, Judgement] = {"golden": _judge_golden(here, onnx, golden)}
        if judged["golden"].result != "fail" and (judgement := kernels.judge(bundle, here.engines)):
            judged["kernels"] = judgement
        is_right = all(each.result != "fail" for each in judged.values())
        latency = counted = None
        if is_right and timing:
            latency, judgement = _latency(bundle, here)
            judged |= {"latency": judgement} if judgement else {}
        if is_right and test is not None:
            counted, judgement = accuracy.measure(bundle, here, graphs, test)
            judged |= {"accuracy": judgement} if judgement else {}
    return Verified(
        schema=1,
        bundle=BundleName(name=bundle.manifest.name, manifest_sha256=bundle.sha256),
        target=bundle.manifest.target,
        machine=machine.describe(),
        engines=here.origin,
        golden=GoldenChecks(onnx=onnx, engines=golden),
        latency=latency,
        accuracy=counted,
        verdict={**judged, "overall": parity.combine(*judged.values())},
    )


def golden_samples(
    bundle: Bundle, engines: Mapping[str, Engine], precision: str | None = None
) -> dict[str, GoldenCheck]:
    """Run engines on the golden inputs: name of the network -> what `golden.check` says.

    Args:
        bundle: whose samples.
        engines: by name of the network.
        precision: of the engines; None: what the bundle's are built in.
    """
    from polar_deploy import targets
    from polar_deploy.bundle import golden
    from polar_deploy.engines import infer_all

    on_gpu = targets.parse(bundle.manifest.target).backend.gpu is not None
    tf32 = precision is None and bundle.manifest.build.tf32 and on_gpu  # no CPU computes in TF32
    precision = precision or bundle.manifest.networks.compressed.precision.asked
    return {
        name: golden.check(bundle.outputs[name], infer_all(engine, bundle.inputs), precision, tf32=tf32)
        for name, engine in engines.items()
    }


def _fp32_graphs(bundle: Bundle) -> dict[str, Engine]:
    """The FP32 graphs in ONNX Runtime; {} where that is not installed."""
    from polar_deploy import engines, targets

    if targets.lacks_to_run(targets.parse("ort-fp32")):
        return {}
    return {name: engines.reference_engine(bundle.path(each.fp32)) for name, each in bundle.manifest.each().items()}


def _judge_golden(
    here: device.AvailableEngines, onnx: dict[str, GoldenCheck], golden: dict[str, GoldenCheck]
) -> Judgement:
    from polar_deploy.parity import Judgement

    for kind, found in (("FP32 graph", onnx), ("engine", golden)):
        for name, each in found.items():
            if not each.passed:
                return Judgement("fail", f"the {kind} of the {name} network is {_off(each)}")
    verified = f"ONNX verified ({_off(onnx['compressed'])})" if onnx else "ONNX not checked (no onnxruntime here)"
    if not golden:
        return Judgement("undecided", f"{here.origin}; {verified}")
    return Judgement("pass", f"engines {here.origin}, {_off(golden['compressed'])}; {verified}")


def _off(found: GoldenCheck) -> str:
    if found.difference is None:
        return "not finite on the golden samples"
    return f"off by {found.difference:.1e} on the golden samples, {found.tolerance:g} is allowed"


def _latency(bundle: Bundle, here: device.AvailableEngines) -> tuple[BatchLatency | None, Judgement | None]:
    """Time the full network against the compressed one; what was measured, and the answer, as far as there are any."""
    import numpy as np

    from polar_deploy import parity
    from polar_deploy.engines import timing
    from polar_deploy.tensors import count, take

    if not here.engines:
        return None, parity.Judgement("undecided", "the engines are not run here")
    if "full" not in here.engines:
        return None, None
    asked = bundle.manifest.verdict.asked.settings()
    full, compressed = (here.engines[name] for name in ("full", "compressed"))
    inputs = take(bundle.inputs, np.arange(asked.batch) % count(bundle.inputs))
    measured = timing.compare(full, compressed, inputs, singles=parity.singles_for(asked))
    timed = parity.batch_latency(full, compressed, inputs, measured)
    return timed, parity.judge_latency(measured, asked)


def _lines(bundle: Bundle, found: Verified) -> list[str]:
    """What a person reads."""
    manifest, verdict = bundle.manifest, found.verdict
    files = manifest.files.values()
    size = sum(file.bytes for file in files) / 1e6
    lines = [
        f"bundle    {manifest.name}, {manifest.target}: {len(files)} files, {size:.2f} MB, all whole",
        f"sha256    {bundle.sha256} (manifest.json)",
        f"engines   {found.engines}",
        *(f"{name:<9} {each.result}: {each.reason}" for name, each in verdict.items() if name != "overall"),
    ]
    if "latency" not in verdict:
        lines.append(f"latency   {'not timed' if manifest.networks.full else 'the bundle has no full network'}")
    if here := found.accuracy:  # of a classifier
        lines.append(f"accuracy  {here.compressed:.2f} % of {here.samples:,} samples, measured here")
    else:
        lines.append(_makers_accuracy(bundle))
    covered = ", ".join(name for name in verdict if name != "overall")
    return [*lines, f"verdict: {verdict['overall'].result.upper()} ({covered})"]


def _makers_accuracy(bundle: Bundle) -> str:
    """What the maker measured."""
    from polar_deploy.report import formats
    from polar_deploy.tasks.metric import difference_unit, signed

    metrics, metric = bundle.manifest.metrics, bundle.manifest.task.metric
    counted = metrics.accuracy or metrics.fp32_graphs
    if counted is None or metric is None:
        return f"{metric.name if metric else 'accuracy':<9} never measured"
    low, high = counted.interval
    points = difference_unit(metric.unit)
    full, compressed = (formats.score(score, metric.unit) for score in (counted.full, counted.compressed))
    which = "" if metrics.accuracy else " of the FP32 graphs"
    return (
        f"{metric.name:<9} its maker's figure{which}, not measured here: {compressed}, the full network's "
        f"{full} (drop {signed(counted.drop)} {points}, 95 %: {signed(low)} to {signed(high)}, "
        f"{counted.samples:,} samples)"
    )
