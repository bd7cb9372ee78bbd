"""The verdict in words, and what to do next: the first thing on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from polar_deploy import targets
from polar_deploy.documents.parity import Accuracy, Interval, Loss, known_drop
from polar_deploy.documents.report import Report
from polar_deploy.report import formats
from polar_deploy.tasks import classification
from polar_deploy.tasks.metric import difference_unit

Kind = Literal["pass", "accuracy", "speed", "both", "undecided", "not_run"]
_QUIET = 1.2  # how far apart the ends of an interval may lie on a machine that is good for measurements
_FEWEST_EPOCHS = 20  # worth another run
_AGAIN = "polar-deploy run --recipe RUN/run.yaml --out"


@dataclass(frozen=True)
class Step:
    """Something to do: why, and the command for it where there is one."""

    text: str
    command: str | None = None


@dataclass(frozen=True)
class Advice:
    """How a run ended, in few words and in figures, and the steps that help most, the first one first."""

    kind: Kind
    headline: str
    figures: str
    steps: tuple[Step, ...]


def advise(report: Report, *, delivered: bool = False) -> Advice:
    """What the verdict of report.json asks of its reader: of who made the run, or of who was handed the bundle."""
    kind = kind_of(report)
    if delivered:
        return Advice(kind, _headline(kind, report), _figures(report), _delivered(report))
    steps = {
        "pass": _pass,
        "accuracy": _accuracy,
        "speed": _speed,
        "both": lambda report: _accuracy(report)[:2] + _speed(report)[:1],
        "undecided": _undecided,
        "not_run": _not_run,
    }[kind]
    return Advice(kind, _headline(kind, report), _figures(report), steps(report))


def kind_of(report: Report) -> Kind:
    """Which of six ways a run ended in."""
    failed = report.verdict.parts_that("fail")
    if len(failed) == 2:
        return "both"
    if failed:
        return "accuracy" if failed == ["accuracy"] else "speed"
    if report.not_run:
        return "not_run"
    return "pass" if report.verdict.overall.result == "pass" else "undecided"


def _delivered(report: Report) -> tuple[Step, ...]:
    """For whoever has the bundle alone."""
    run = Step("Compute outputs of your own inputs, arrays by name.", "polar-deploy bundle run BUNDLE inputs.npz")
    if report.task == classification.NAME:
        run = Step("Try it on pictures of your own.", "polar-deploy bundle run BUNDLE cat.jpg dog.jpg")
    steps = (
        Step(
            "Verify it on your device, before anything else. Its maker sends you the hash by another way.",
            "polar-deploy bundle verify BUNDLE --manifest-sha256 HASH",
        ),
        run,
    )
    if targets.parse(report.target).backend.triton is None:
        return steps
    return (*steps, Step("Serve it with NVIDIA Triton.", "polar-deploy bundle triton BUNDLE repository"))


def _headline(kind: Kind, report: Report) -> str:
    return {
        "pass": "Pass: accurate and fast enough",
        "accuracy": f"Fail: too much {_metric_name(report)} is lost",
        "speed": "Fail: not fast enough",
        "both": f"Fail: too much {_metric_name(report)} is lost, and it is not fast enough",
        "undecided": f"Undecided: {_open_question(report)}",
        "not_run": "Built, not run here: "
        + ("the device decides" if not _lost_as_graphs(report) else "its graph loses too much already"),
    }[kind]


def _metric_name(report: Report) -> str:
    return report.metric.name if report.metric else "accuracy"


def _amount(report: Report, value: float, form: str) -> str:
    """A drop in its unit; f"{value:{form}}" of points."""
    unit = report.metric.unit if report.metric else ""
    return f"{value:{form}} {difference_unit(unit)}".rstrip()


def _figures(report: Report) -> str:
    """What a reader asks first, in one line."""
    counted, timed, metric = report.counted, report.timed, report.metric
    speed = f"{timed.speedup.median:.2f} times as fast" if timed else "speed unknown"
    if counted is None or metric is None:
        return f"{speed}; outputs were compared, and no metric says what they are worth"
    where = "" if report.accuracy else " as ONNX graphs"
    full, compressed = (formats.score(each, metric.unit) for each in (counted.full, counted.compressed))
    return f"{speed}, {metric.name} {full.removesuffix(' %')} → {compressed}{where}"


def _open_question(report: Report) -> str:
    """What an undecided verdict leaves open."""
    parts = report.verdict.parts_that("undecided")
    if len(parts) == 2:
        return f"neither {_metric_name(report)} nor speed is sure"
    if parts == ["accuracy"]:
        return "the test set is too small to tell" if report.metric else "no metric says what outputs are worth"
    return "the speed is too close to what is asked" if _is_quiet(report) else "this machine is too noisy to time it"


def _largest_drop(counted: Accuracy | Loss | None) -> float | None:
    """The upper end of a drop's interval; None where nobody can tell."""
    known = known_drop(counted)
    return known and known[2]


def _is_quiet(report: Report) -> bool:
    """Whether the machine lets a speed-up be told to a tenth."""
    timed = report.timed
    return timed is not None and timed.decided and _width(timed.speedup_with_noise) <= _QUIET


def _width(interval: Interval) -> float:
    return interval.high / interval.low


def _pass(report: Report) -> tuple[Step, ...]:
    steps = []
    if report.bundle:
        steps.append(Step("Hand over the folder RUN/bundle; it holds all that the device needs."))
        digest = report.bundle.manifest_sha256
        steps.append(
            Step(
                "Have it verified on the device. Send this command by another way than the bundle: its hash tells "
                "whether somebody changed the bundle.",
                f"polar-deploy bundle verify bundle --manifest-sha256 {digest}",
            )
        )
    else:
        steps.append(Step("Make the bundle for the edge team.", f"{_AGAIN} RUN --from bundle"))
    if report.timed and report.timed.speedup_with_noise.high < 1:
        steps.append(
            Step(
                f"Mind: it is slower than the full network; {report.verdict.min_speedup:g} times as fast is asked. "
                "To have it faster, ask for latency.",
                f"{_AGAIN} RUN-latency --budget latency=0.6",
            )
        )
    most, allowed = _largest_drop(report.accuracy), report.verdict.max_drop
    if report.accuracy and most is not None and most > allowed:
        steps.append(
            Step(
                f"Mind the size of the test set: with {report.accuracy.samples:,} samples, a drop of up to "
                f"{_amount(report, most, '.2f')} is within the 95 % interval, more than the {allowed:g} allowed. "
                "The verdict holds for these samples; more of them would make it firmer."
            )
        )
    return tuple(steps)


def _accuracy(report: Report) -> tuple[Step, ...]:
    allowed = report.verdict.max_drop
    graphs = report.graphs
    broken = report.accuracy and any(report.accuracy.nonfinite.named().values())
    if broken or (
        graphs and graphs.drop is not None and graphs.drop <= allowed and report.precision.full.asked != "fp32"
    ):
        return _precision(report)
    epochs = report.recipe["training"]["epochs"]
    more = max(3 * epochs, _FEWEST_EPOCHS)
    longer = f"--epochs {more}" + (f" --full-epochs {more}" if report.full == "trained" else "")
    ran = f"{epochs} epochs were" if epochs > 1 else "one epoch was"
    asked = {name: min(0.95, round(share + 0.15, 2)) for name, share in report.budget.asked.items()}
    looser = ",".join(f"{name}={share:g}" for name, share in asked.items())
    return (
        Step(
            f"Train longer: {ran} run. What was removed cost it, not the precision.",
            f"{_AGAIN} RUN-longer {longer}",
        ),
        Step("Or let it keep more of the network.", f"{_AGAIN} RUN-wider --budget {looser}"),
        Step("Or forbid narrow layers.", f"{_AGAIN} RUN-floor --set gates.min_width=0.5"),
    )


def _precision(report: Report) -> tuple[Step, ...]:
    asked, wider = report.precision.full.asked, targets.parse(report.target).wider.name
    if asked == "int8":
        images = 4 * report.recipe["build"]["calibration"]["images"]
        return (
            Step(
                "INT8 cost it, not what was removed. Calibrate on more images, or leave more layers wide.",
                f"{_AGAIN} RUN --from build --set build.calibration.images={images} --set build.max_layer_error=0.02",
            ),
            Step("Or take a wider precision.", f"{_AGAIN} RUN-fp16 --target {wider}"),
        )
    return (
        Step(
            f"The precision ({asked}) cost it, not what was removed: values leave its range or lose too many digits.",
            f"{_AGAIN} RUN-fp32 --target {wider}",
        ),
    )


def _speed(report: Report) -> tuple[Step, ...]:
    asked = report.budget.asked
    steps = []
    if "latency" not in asked:
        share = max(0.1, min(0.6, 0.95 / report.verdict.min_speedup))
        steps.append(
            Step(
                "Ask for latency, which is measured before training: fewer MACs alone do not make an engine faster.",
                f"{_AGAIN} RUN-latency --budget latency={share:.2g}",
            )
        )
    else:
        steps.append(Step("Let it keep less of the network.", f"{_AGAIN} RUN-faster --budget {_tighter(report)}"))
    least = report.verdict.min_speedup
    if enough := [each.batch for each in report.latency if each.speedup_with_noise.low >= least]:
        steps.append(
            Step(
                f"Or judge at batch {enough[-1]}, if you serve such: there it is fast enough.",
                f"{_AGAIN} RUN --from parity --verdict-batch {enough[-1]}",
            )
        )
    steps.append(Step("Layers that only move data cost time, too: docs/what-now.md tells how to find them."))
    return tuple(steps)


def _tighter(report: Report) -> str:
    """A budget by which the engine should be as fast as was asked: the old one times what is missing, and a bit."""
    timed, asked = report.timed, report.verdict
    missing = 1.0
    if timed:
        missing = min(missing, timed.speedup.median / asked.min_speedup)
        if asked.max_latency_ms is not None:
            missing = min(missing, asked.max_latency_ms / timed.compressed.median_ms)
    shares = {name: max(0.1, min(share - 0.05, 0.95 * share * missing)) for name, share in report.budget.asked.items()}
    return ",".join(f"{name}={share:.2g}" for name, share in shares.items())


def _undecided(report: Report) -> tuple[Step, ...]:
    parts = report.verdict.parts_that("undecided")
    steps = _too_few(report) if "accuracy" in parts else ()
    return steps + _untimed(report) if "latency" in parts else steps


def _too_few(report: Report) -> tuple[Step, ...]:
    """A drop that may be too large or not, or a network that is hardly better than chance."""
    bound = report.verdict.max_drop
    if report.metric is None:
        return (Step("Give the task a metric: without one, nobody can say which outputs are good enough."),)
    losses = [report.accuracy, *(each.loss for each in report.precision.named().values())]
    most = max((ends for each in losses if (ends := _largest_drop(each)) is not None), default=0.0)
    if most <= bound:
        return (Step("Test on more samples, of all classes. The verdict above says what these could not tell."),)
    larger = math.ceil(most * 10) / 10
    lost = report.accuracy.drop if report.accuracy else None
    train = _accuracy(report)[:1] if lost is not None and lost > bound else ()
    return (
        Step(
            "Test on more samples, as many as the verdict above names: then the interval gets narrow enough. "
            "With the larger test set in its place, measure again.",
            f"{_AGAIN} RUN --from parity",
        ),
        Step(
            "Or allow a larger drop, if your use can bear it: the whole interval lies within "
            f"{_amount(report, larger, 'g')}.",
            f"{_AGAIN} RUN --from parity --max-drop {larger:g}",
        ),
        *(Step(f"As it stands, it loses more than is allowed. {step.text}", step.command) for step in train),
    )


def _untimed(report: Report) -> tuple[Step, ...]:
    if not _is_quiet(report):
        return (
            Step(
                "Stop what else runs on this machine, on a GPU lock its clocks, and measure again: here, one and the "
                "same engine takes now more and now less time.",
                f"{_AGAIN} RUN --from parity",
            ),
        )
    return (
        Step("Measure again; an undecided latency is never kept.", f"{_AGAIN} RUN --from parity"),
        Step(
            "Or let it keep less of the network: what is asked lies within the interval of what was measured.",
            f"{_AGAIN} RUN-smaller --budget {_tighter(report)}",
        ),
    )


def _lost_as_graphs(report: Report) -> bool:
    """Whether more is lost than is allowed before an engine has run."""
    known = known_drop(report.graphs)
    return known is not None and known[1] > report.verdict.max_drop


def _not_run(report: Report) -> tuple[Step, ...]:
    digest = report.bundle.manifest_sha256 if report.bundle else None
    device = Step("Go on with this folder on a machine that can run them.", f"{_AGAIN} RUN --from build")
    if digest:
        verify = f"polar-deploy bundle verify bundle --rebuild --manifest-sha256 {digest}"
        told = "Take RUN/bundle to the device; this builds, compares and times the engines there, and decides."
        device = Step(told, verify)
    if _lost_as_graphs(report):
        better = _accuracy(report)[:2]
        return (
            *better,
            Step(f"What it loses on the device will hardly be less. To see it there: {device.text}", device.command),
        )
    others = Step("Or go on with this folder on a machine like the device.", f"{_AGAIN} RUN --from build")
    return (device, others) if digest else (device,)
