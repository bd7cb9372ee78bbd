"""Measured figures as Markdown, from `benchmarks/results` and `polar_deploy/devices`; see `generate`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
_FIGURE = re.compile(r"[-+]?[\d.,]+( ?(%|s|ms|×))?")


def result(name: str) -> Any:
    """What a long check wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; columns of figures are on the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    numeric = [all(_FIGURE.fullmatch(row[column]) for row in cells) for column in range(len(head))]
    lines = [head, ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo() -> str:
    """The demo's runs, one column each."""
    found = result("demo")
    seconds = ("whole run", *(f"{run['seconds']:.0f} s" for run in found["runs"]))
    return _runs("demo", found, found["runs"], seconds)


def paper() -> str:
    """Half of MACs and parameters, as the paper claims it, one column a seed."""
    parts = []
    for path in sorted(RESULTS.glob("paper-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(_runs(path.stem, found, list(found["runs"].values())))
    return "\n\n".join(parts)


def _runs(name: str, found: dict[str, Any], runs: Sequence[dict[str, Any]], *more: tuple[str, ...]) -> str:
    """Runs of the command, one column each, as their reports have them; and more rows."""
    reports = [run["report"] for run in runs]

    def row(label: str, show: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (label, *map(show, reports))

    def pair(key: str, scale: float, unit: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: " → ".join(_short(r[key][name] / scale) for name in ("full", "compressed")) + f" {unit}"

    def speed(batch: int) -> Callable[[dict[str, Any]], str]:
        def show(r: dict[str, Any]) -> str:
            found = next(each for each in r["latency"] if each["batch"] == batch)
            full, small = (found[name]["median_ms"] for name in ("full", "compressed"))
            return f"{full:.3g} → {small:.3g} ms: {found['speedup']['median']:.2f}× as fast"

        return show

    rows = [
        row("accuracy", lambda r: f"{r['accuracy']['full']:.2f} → {r['accuracy']['compressed']:.2f} %"),
        row("drop, 95 % interval", lambda r: _interval(r["accuracy"])),
        *(row(f"latency, batch {batch}", speed(batch)) for batch in (each["batch"] for each in reports[0]["latency"])),
        row("MACs", pair("macs", 1e6, "M")),
        row("parameters", pair("params", 1e3, "k")),
        row("ONNX file", pair("bytes", 1e3, "kB")),
        row("blocks removed", lambda r: f"{r['blocks']['removed']} of {r['blocks']['total']}"),
        row("verdict", lambda r: r["verdict"]["overall"]["result"]),
        *more,
    ]
    first, cpu = reports[0], found["machine"]
    head = (f"{first['model']} on {first['data']}, {first['target']}", *(f"seed {r['seed']}" for r in reports))
    return f"{table(head, rows)}\n\n{_from(name)}: {cpu['cpu']}, {cpu['cores']} cores, no GPU."


def _short(value: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _interval(accuracy: dict[str, Any]) -> str:
    low, high = accuracy["interval"]
    return f"{accuracy['drop']:+.2f} points ({low:+.2f} to {high:+.2f})"


def _from(name: str) -> str:
    return f"From `benchmarks/results/{name}.json`"


def ablation() -> str:
    """Learned gates against networks that nobody has to learn."""
    return "\n\n".join(_ablation(path.stem) for path in sorted(RESULTS.glob("ablation-*.json")))


def floors() -> str:
    """The same at one budget of latency."""
    return _ablation("ablation-floors-latency67")


def _ablation(name: str) -> str:
    found = result(name)
    references = {name for each in found["variants"] for name in each["against"]}
    best = next(each["variant"] for each in found["variants"] if each["variant"] in references)  # they are in order
    rows = [("full network", f"{found['full']:.2f} %", "", "1", "1", "1")]
    for each in found["variants"]:
        cost, speed = each["cost"], [value for value in each["speedup"] if value]
        shown = f"{sum(speed) / len(speed):.2f}×" if speed else "–"
        accuracy, above = f"{each['accuracy']:.2f} %", _above(each["against"].get(best))
        rows.append((each["variant"], accuracy, above, f"{cost['macs']:.2f}", f"{cost['params']:.2f}", shown))
    seeds = sorted({len(each["by_seed"]) for each in found["variants"]})  # a variant may be behind the others
    title = f"{found['recipe'].removesuffix('.yaml')}, {found['budget']}"
    head = (title, "top-1", f"above {best}", "MACs", "parameters", "speed")
    count = "one seed" if seeds == [1] else f"{' or '.join(map(str, seeds))} seeds a row"
    return f"{table(head, rows)}\n\n{_from(name)}, {count}."


def _above(paired: dict[str, float] | None) -> str:
    return f"{paired['points']:+.2f} ({paired['low']:+.2f} to {paired['high']:+.2f})" if paired else ""


def surgery_speed() -> str:
    """Surgery beside an earlier build of it and other tools, as far as they were there."""
    networks = result("surgery-speed")["networks"]
    known = {"ours": "polar_deploy", "before": "earlier build", "onnxsim": "onnxsim", "torch-pruning": "Torch-Pruning"}
    known |= {"openvino": "OpenVINO", "qonnx": "qonnx"}
    tools = [tool for tool in known if any("seconds" in row.get(tool, {}) for row in networks.values())]
    rows = [(name, *(_cut(row.get(tool, {})) for tool in tools)) for name, row in networks.items()]
    return f"{table(('network', *(known[tool] for tool in tools)), rows)}\n\n{_from('surgery-speed')}."


def _cut(found: dict[str, Any]) -> str:
    """Seconds, share of what is dead that is gone, and whether that is exact; a dash where a tool gave nothing."""
    if "share_removed" not in found:
        return "–"
    right = "exact" if found["exact"] else f"**off by {100 * found['difference']:.0f} %**"
    return f"{found['seconds']:.2f} s, {100 * found['share_removed']:.0f} %, {right}"


def surgery_proofs() -> str:
    """How exact and how complete surgery is."""
    exact, complete, fuzz = result("surgery-exact"), result("surgery-complete"), result("surgery-fuzz")
    largest = max(each["difference"]["largest"] for each in exact["networks"])
    shares = [each["independent"]["share_of_optimum"] for each in complete["networks"]]
    closed = [each["sets"]["rows_and_columns"] for each in complete["networks"]]
    nodes, large = result("surgery-nodes"), result("surgery-large")
    found = [
        f"{len(exact['networks'])} torchvision networks, half of the channels closed behind every activation: the cut "
        f"graph differs by at most {largest:.1e} of the output's scale (`surgery-exact.json`).",
        f"{len(closed)} networks, coupled sets closed that PyTorch's gradients tell: of "
        f"{sum(expected for expected, _ in closed):,} rows and columns of weights that touch a closed set, "
        f"{sum(gone for _, gone in closed):,} are gone; of independent masks, at least {100 * min(shares):.1f} % of "
        "the optimum (`surgery-complete.json`).",
        f"{fuzz['graphs']:,} random graphs, {fuzz['failures']} differences; {sum(fuzz['damaged_files'].values()):,} "
        "damaged files, each refused or cut right (`surgery-fuzz.json`).",
        f"{nodes['plain']['models'] + nodes['between layers']['models']:,} of ONNX's own node tests: "
        f"{nodes['between layers'].get('refused', 0)} refused that a runtime runs (`surgery-nodes.json`).",
        f"A model of {large['bytes'] / 1e9:.1f} GB is cut and proven with "
        f"{large['peak_with_verification'] / 1e9:.2f} GB of memory (`surgery-large.json`).",
    ]
    return "\n".join(f"- {each}" for each in found)


def int8() -> str:
    """INT8 on a CPU."""
    found = result("int8")
    rows = []
    for name in ("resnet56", "compressed_resnet20"):
        for speed in found[name]["speed"]:
            fast = speed["speedup"]
            rows.append(
                (
                    name.replace("_", " "),
                    f"{found[name]['top1']['fp32']:.2f} %",
                    f"{found[name]['top1']['int8']:.2f} %",
                    f"{speed['batch']}",
                    f"{fast['median']:.2f}× as fast ({fast['low']:.2f} to {fast['high']:.2f})",
                )
            )
    return f"{table(('CIFAR-10, ort-int8', 'FP32', 'INT8', 'batch', 'speed'), rows)}\n\n{_from('int8')}, one thread."


def latency_table() -> str:
    """What latency tables predict, against what was measured."""
    found = result("latency-table")
    rows = [
        (
            name,
            f"{100 * each['mean_error']:.1f} %",
            f"{100 * each['worst_error']:.0f} %",
            f"{each['rank_correlation']:.2f}",
            f"{each['seconds']:.0f} s",
        )
        for name, each in found["networks"].items()
    ]
    head = (
        f"{found['target']}, batch {found['batch']}",
        "mean error",
        "worst",
        "rank correlation",
        "time for the table",
    )
    return f"{table(head, rows)}\n\n{_from('latency-table')}: ten random sub-networks each."


def gates_cost() -> str:
    """What gates cost in one's own loop."""
    found = result("gates")
    chosen = {network: f"{runs[0]['seconds']:.1f} s" for network, runs in found["choice"].items()}
    rows = [
        (each["network"], f"{each['gates']:,}", f"{each['seconds']:.1f} s", chosen[each["network"]])
        for each in found["attach"]
    ]
    head = ("network, 224 pixels", "gates", "attaching, export included", "the choice, without alignment")
    steps = " and ".join(f"{each['ratio']:.2f} ({each['network']})" for each in found["steps"])
    watched = f"A training step in which gates are watched takes {steps} of the time of a plain one."
    return f"{table(head, rows)}\n\n{watched} {_from('gates')}."


def devices() -> str:
    """What each device's file says, from `polar_deploy/devices`."""
    from polar_deploy import devices as known

    rows = []
    for device in map(known.load, known.names()):
        for precision in device.precisions:
            costs = device.staircase(precision)
            ratios = [f"{costs[width] / costs[32]:.2f}" for width in (24, 31, 33)]
            widths = ", ".join(map(str, device.offered(precision)))
            weight = known.Chosen(device, precision).costs.weight_in_macs
            ratios.append("" if weight is None else f"{weight:.0f}")
            rows.append((f"`{device.name}`", f"{precision.upper()}, {device.source.kind}", widths, *ratios))
    return table(("device", "precision", "widths that pay, to 128", "24/32", "31/32", "33/32", "a weight"), rows)


def device_files() -> str:
    """Whether a choice by a device's file is faster than others, at the same MACs."""
    found = result("device-choice")
    measured, rows = found["rows"], []
    for network, on in dict.fromkeys((each["network"], each["on"]) for each in measured):
        runs = [each["speed_up"] for each in measured if (each["network"], each["on"]) == (network, on)]
        rows.append(
            (network, on, *(", ".join(f"{run[way]:.2f}" for run in runs) for way in ("macs", "eights", "device")))
        )
    head = ("network", "speed-up on", "any width", "multiples of 8", "the device's file")
    cpu = found["machine"]["cpu"]
    return f"{table(head, rows)}\n\n{_from('device-choice')}: processor time on one {cpu}, or the compiler's cycles."


def kills() -> str:
    """Runs that were killed."""
    found = result("kills")
    writes = sum(each["kind"] == "write" for each in found["kills"])
    return (
        f"{len(found['kills'])} runs were killed at a random moment, {writes} of them in the middle of a write; "
        f"{found['clean']} went on and ended with the same figures (`benchmarks/results/kills.json`)."
    )


def bundle() -> str:
    """How long a bundle takes to verify."""
    found = result("bundle")
    seconds = sorted(each["seconds"] for each in found["verify_no_timing"])
    untimed, timed, size = seconds[len(seconds) // 2], found["verify"]["seconds"], found["bytes"]["all"] / 1e6
    return (
        f"The demo's bundle ({size:.1f} MB) is verified in {untimed:.1f} s without timing and in "
        f"{timed:.1f} s with it, in an environment of {len(found['packages'])} packages without PyTorch "
        "(`benchmarks/results/bundle.json`)."
    )


def bars() -> str:
    """Every result: what was asked, whether it was met, where and on which commit."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "bars" not in found:
            continue
        script = next((file for file in _scripts(path.stem) if file.is_file()), None)
        what = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n")[0] if script else ""
        commit, _, changed = found["commit"].partition(" ")
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        machine = f"{found['machine']['cpu']}, {found['machine']['cores']} cores"
        made = f"`python -m benchmarks.{script.stem}`; " if script else ""
        asked = "\n".join(f"- {'met' if met else '**missed**'}: {bar}" for bar, met in found["bars"].items())
        parts.append(
            f"### {path.name}\n\n{what}\n\n{asked}\n\n{made}{machine}; {versions}; commit `{commit[:7]}`"
            f"{', with changes that were not committed' if changed else ''}."
        )
    return "\n\n".join(parts)


def _scripts(stem: str) -> Iterator[Path]:
    """Where the script of a result may be."""
    whole = stem.replace("-", "_")
    for name in (whole, whole.split("_")[0]):
        yield from (RESULTS.parent / f"bar_{name}.py", RESULTS.parent / f"{name}.py")


FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "paper": paper,
    "ablation": ablation,
    "floors": floors,
    "surgery-speed": surgery_speed,
    "surgery-proofs": surgery_proofs,
    "int8": int8,
    "latency-table": latency_table,
    "gates-cost": gates_cost,
    "devices": devices,
    "device-files": device_files,
    "kills": kills,
    "bundle": bundle,
    "bars": bars,
}
