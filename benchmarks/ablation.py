"""Variants of the gated run against each other and against both floors: one table.

    python -m benchmarks.ablation NAME --recipe R.yaml --data-dir D --full-weights W --budget latency=0.67 \
        --variant gates --variant "early: gates.freeze_at=0.2" --seeds 0,1,2 --work FOLDER

All start from the same full weights and see the same batches, with the same teacher and as many steps. The floors
(`floors.py`) are cut before the first one. A variant is a name, and settings that it changes. Each run can be killed
and goes on; a row that is there, in FOLDER or in the result, is not made again, so that seeds can come from several
machines. Losers stay in the table: `benchmarks/results/ablation-NAME.json`.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import floors
from benchmarks.common import COMMIT, RESULTS, write_result
from polar_deploy import engines, export, models, recipes
from polar_deploy.engines import timing
from polar_deploy.gating.gates import Gates
from polar_deploy.progress import Progress
from polar_deploy.resolved import ResolvedSettings
from polar_deploy.stages import gates as gates_stage
from polar_deploy.stages.artefacts import LATENCY_TABLE
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.resolve import resolve
from polar_deploy.stages.training import training_job
from polar_deploy.surgery import compress_file
from polar_deploy.tasks.classification import PictureData
from polar_deploy.training.batches import ImageBatches
from polar_deploy.training.gated import OnePass
from polar_deploy.training.loop import TrainingJob, fit, prepare

CPU = torch.device("cpu")
FLOORS = ("uniform width", "uniform depth")


class Floor(OnePass):
    """Training of a network that is cut before the first step."""

    def __init__(self, run: TrainingJob, gates: Gates, teacher: torch.nn.Module | None, opened: np.ndarray) -> None:
        super().__init__(run, gates, teacher)
        gates.freeze(opened)
        self.cut()
        self._estimate_norms()


def settings_of(arguments: argparse.Namespace, changes: dict[str, object], seed: int) -> ResolvedSettings:
    """The resolved settings of one row."""
    overrides: dict[str, object] = {
        "data_dir": arguments.data_dir,
        "full_weights": arguments.full_weights,
        "budget": recipes.parse_budget(arguments.budget),
        "seed": seed,
        "latency_table": arguments.work / LATENCY_TABLE,
        **dict(map(recipes.parse_set, arguments.set)),
        **changes,
    }
    return resolve(recipes.load(arguments.recipe, overrides), arguments.work)


def row(
    arguments: argparse.Namespace, name: str, changes: dict[str, object], seed: int, analysed: RunContext
) -> dict[str, Any]:
    """Train one network, and see how accurate and how fast it is."""
    run = RunContext(settings_of(arguments, changes, seed), arguments.work / f"{name}-{seed}", Progress())
    run.__dict__["analysis"] = analysed.analysis  # of the same network
    settings = run.settings
    network, teacher = run.network(), run.network()
    for each in (network, teacher):
        models.load_weights(each, settings.full_weights)
    fingerprint = gates_stage.STAGE.fingerprint(run)
    job = training_job(run, "gates", "gated", network, settings.training.epochs, fingerprint)
    gates = gates_stage.gates_on(run, job.network, job.epochs * job.train.steps)
    teaches = prepare(teacher, settings, CPU) if settings.training.distill else None
    if name == "uniform width":
        method: OnePass = Floor(job, gates, teaches, floors.uniform_width(gates, network, settings.align))
    elif name == "uniform depth":
        method = Floor(job, gates, teaches, floors.uniform_depth(gates))
    else:
        method = OnePass(job, gates, teaches)
    state = fit(job, method, run.progress)
    method.finish()
    joules = [each.joules for each in state.records]
    return {
        "variant": name,
        "settings": {key: str(value) for key, value in changes.items()},
        "seed": seed,
        "commit": COMMIT,
        "bf16": job.mixed.bf16,
        "correct": _packed(_correct(run, network)),
        "cost": {key: round(value, 5) for key, value in gates.cost().items()},
        "speedup": _speedup(run, gates, teacher),
        "freeze": {key: value for key, value in state.freeze.as_json().items() if key != "share"}
        if state.freeze
        else {},
        "sites": {
            name: int(gates.opened[own.start : own.stop].sum()) for own, name, _ in gates.analysis.choices.owners()
        },
        "seconds": round(sum(each.seconds or 0 for each in state.records), 1),
        "joules": None if None in joules else round(sum(each or 0 for each in joules), 1),
        "steps": job.epochs * job.train.steps,
        "threads": torch.get_num_threads(),
    }


def _packed(correct: list[int]) -> str:
    """A bit an image, as text that a result can hold; their number is a multiple of 8."""
    return base64.b64encode(np.packbits(correct)).decode()


def correct_of(row: dict[str, Any]) -> np.ndarray:
    """Which images a row gets right, as 0 and 1."""
    return np.unpackbits(np.frombuffer(base64.b64decode(row["correct"]), np.uint8)).astype(int)


def _correct(run: RunContext, network: torch.nn.Module) -> list[int]:
    """Which images of the test set a network gets right, as 0 and 1."""
    assert isinstance(run.data, PictureData)
    test = run.data.dataset.test
    batches = ImageBatches(test.images, test.labels, np.arange(len(test.labels)), run.settings, CPU)
    network.eval()
    with torch.no_grad():
        return [
            int(right)
            for inputs, targets in batches.plain()
            for right in (network(inputs["input"]).argmax(1) == targets["label"]).tolist()
        ]


def _speedup(run: RunContext, gates: Gates, full: torch.nn.Module) -> dict[str, float]:
    """Batch 1 on the run's target, against the full network, in pairs."""
    folder = run.path("engines")
    folder.mkdir(parents=True, exist_ok=True)
    names = {"inputs": ("input",), "outputs": ("logits",)}
    gates.export(folder / "gated.onnx", **names)
    export.save(export.structure(full, run.example()), folder / "whole.onnx", **names)
    compress_file(folder / "gated.onnx", folder / "small.onnx")
    built = engines.build_all(folder / "whole.onnx", folder / "small.onnx", folder, run.target, run.settings.build)
    built.write(folder / "build.json")
    a, b = (engines.load(folder, name, run.target) for name in ("full", "compressed"))
    draw, taken = np.random.default_rng(0), a.inputs.items()
    inputs = {name: draw.standard_normal((1, *spec.sizes), np.float32) for name, spec in taken}
    done = timing.compare(a, b, inputs).best
    return {"median": round(done.speedup.median, 3), "low": round(done.speedup.low, 3), "noise": round(done.noise, 4)}


def make_table(arguments: argparse.Namespace) -> RunContext:
    """The latency table that all variants share, and the run that has analysed their network."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = settings_of(arguments, {}, 0).model_copy(update={"latency_table": None})
    run = RunContext(settings, arguments.work, Progress())
    if arguments.table_only:
        return run
    gates_stage.require_reachable(run, measure="latency" in run.budget)
    return run


def paired(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """Mean difference of accuracies in points over the seeds that both have, with a 95 % interval.

    The interval is that of the mean over test images, each with its mean over seeds (normal: there are thousands): what
    another test set would change. What other seeds would change, `by_seed` tells.
    """
    theirs = {each["seed"]: correct_of(each) for each in other}
    differences = [correct_of(each) - theirs[each["seed"]] for each in one if each["seed"] in theirs]
    if not differences:
        return {}
    by_image = np.mean(differences, axis=0)
    half = 1.96 * by_image.std() / math.sqrt(len(by_image))
    mean = by_image.mean()
    return {
        "points": round(100 * mean, 3),
        "low": round(100 * (mean - half), 3),
        "high": round(100 * (mean + half), 3),
        "by_seed": [round(100 * each.mean(), 2) for each in differences],  # type: ignore[dict-item]
    }


def summary(rows: list[dict[str, Any]], full: float) -> list[dict[str, Any]]:
    """A line for each variant, the most accurate first."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for each in rows:
        by_name.setdefault(each["variant"], []).append(each)
    lines = []
    for name, own in by_name.items():
        accuracies = [100 * float(np.mean(correct_of(each))) for each in own]
        lines.append(
            {
                "variant": name,
                "settings": own[0]["settings"],
                "accuracy": round(float(np.mean(accuracies)), 3),
                "by_seed": {each["seed"]: round(value, 2) for each, value in zip(own, accuracies, strict=True)},
                "drop": round(full - float(np.mean(accuracies)), 3),
                "against": {
                    floor: paired(own, by_name[floor]) for floor in FLOORS if floor in by_name and floor != name
                },
                "cost": own[0]["cost"],
                "speedup": [each["speedup"]["median"] for each in own],
                "seconds": [each["seconds"] for each in own],
                "joules": [each.get("joules") for each in own],
            }
        )
    return sorted(lines, key=lambda line: -line["accuracy"])


def known_rows(under_way: Path, result: Path, asked: dict[str, str]) -> list[dict[str, Any]]:
    """What is there already, in the folder or in a result of what is asked, in the order of seeds."""
    before = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    found = before.get("rows", []) if before.items() >= asked.items() else []
    found += [json.loads(line) for line in under_way.read_text().splitlines()] if under_way.is_file() else []
    return sorted({(each["variant"], each["seed"]): each for each in found}.values(), key=lambda each: each["seed"])


def _variant(text: str) -> tuple[str, dict[str, object]]:
    name, _, changes = text.partition(":")
    return name.strip(), dict(map(recipes.parse_set, filter(None, (part.strip() for part in changes.split(";")))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help="of the result: benchmarks/results/ablation-NAME.json")
    add("--recipe", type=Path, required=True)
    add("--data-dir", required=True)
    add("--full-weights", required=True)
    add("--budget", default="latency=0.67")
    add("--variant", action="append", default=[], help='"NAME" or "NAME: key=value; key=value"; floors by their names')
    add("--seeds", default="0,1,2")
    add("--set", action="append", default=[], help="settings of all variants")
    add("--work", type=Path, required=True, help="a folder for what is under way")
    add("--table-only", action="store_true", help="sum up the rows that are there")
    arguments = parser.parse_args()
    rows_file = arguments.work / f"rows-{arguments.name}.jsonl"
    variants = [_variant(text) for text in arguments.variant or ["gates", *FLOORS]]
    analysed = make_table(arguments)
    asked = {"recipe": arguments.recipe.name, "budget": arguments.budget}
    rows = known_rows(rows_file, RESULTS / f"ablation-{arguments.name}.json", asked)
    known = {(each["variant"], each["seed"]) for each in rows}
    for seed in map(int, arguments.seeds.split(",")):
        for name, changes in variants:
            if (name, seed) in known or arguments.table_only:
                continue
            print(f"{time.strftime('%H:%M:%S')} {name}, seed {seed}", flush=True)
            rows.append(row(arguments, name, changes, seed, analysed))
            with rows_file.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    whole = analysed.network()
    models.load_weights(whole, analysed.settings.full_weights)
    full = 100 * float(np.mean(_correct(analysed, whole)))
    lines = summary(rows, full)
    for line in lines:
        print(json.dumps(line))
    figures = {**asked, "full": round(full, 3), "variants": lines, "rows": rows}
    best = max((line for line in lines if line["variant"] in FLOORS), key=lambda x: x["accuracy"], default=None)
    gates = [line for line in lines if line["variant"] not in FLOORS]
    bars = {
        f"{line['variant']}: above {best['variant']}": line["accuracy"] >= best["accuracy"] for line in gates if best
    }
    return write_result(f"ablation-{arguments.name}", bars, figures)


if __name__ == "__main__":
    sys.exit(main())
