"""The verdict in words, and what to do next: the first thing on the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from polar_deploy import targets

Kind = Literal["pass", "accuracy", "speed", "both", "undecided", "not_run"]
_AGAIN = "python -m polar_deploy.pipeline --recipe RUN/run.yaml --out"


@dataclass(frozen=True)
class Step:
    """Something to do: why, and the command for it where there is one."""

    text: str
    command: str | None = None


# For whoever has the bundle alone
_DELIVERED = (
    Step(
        "Verify it on your device, before anything else. Its maker sends you the hash by another way.",
        "python -m polar_deploy.bundle verify BUNDLE --manifest-sha256 HASH",
    ),
    Step("Try it on pictures of your own.", "python -m polar_deploy.bundle run BUNDLE cat.jpg dog.jpg"),
    Step("Serve it with NVIDIA Triton.", "python -m polar_deploy.bundle triton BUNDLE repository"),
)


@dataclass(frozen=True)
class Advice:
    """How a run ended, in one line, and the steps that help most, the first one first."""

    kind: Kind
    headline: str
    steps: tuple[Step, ...]


def advise(report: dict[str, Any], *, delivered: bool = False) -> Advice:
    """What the verdict of report.json asks of its reader: of who made the run, or of who was handed the bundle."""
    kind = kind_of(report)
    if delivered:
        return Advice(kind, _headline(kind, report), _DELIVERED)
    steps = {
        "pass": _pass,
        "accuracy": _accuracy,
        "speed": _speed,
        "both": lambda report: _accuracy(report)[:1] + _speed(report)[:2],
        "undecided": _undecided,
        "not_run": _not_run,
    }[kind]
    return Advice(kind, _headline(kind, report), steps(report))


def kind_of(report: dict[str, Any]) -> Kind:
    """Which of six ways a run ended in."""
    verdict = report["verdict"]
    failed = [part for part in ("accuracy", "latency") if verdict[part]["result"] == "fail"]
    if len(failed) == 2:
        return "both"
    if failed:
        return "accuracy" if failed == ["accuracy"] else "speed"
    if report["not_run"]:
        return "not_run"
    return "pass" if verdict["overall"]["result"] == "pass" else "undecided"


def measured(report: dict[str, Any]) -> dict[str, Any] | None:
    """The latency at the batch size that the verdict is about."""
    at_batch = [each for each in report["latency"] if each["batch"] == report["verdict"]["batch"]]
    return at_batch[0] if at_batch else None


def _headline(kind: Kind, report: dict[str, Any]) -> str:
    drop = (report["accuracy"] or report["graphs"] or {"drop": 0.0})["drop"]
    change = f"{abs(drop):.2f} points {'less' if drop > 0 else 'more'} accurate" if round(drop, 2) else "as accurate"
    timed = measured(report)
    speed = f"{timed['speedup']['median']:.2f} times as fast" if timed else "not timed"
    return {
        "pass": f"Pass: {change} and {speed}",
        "accuracy": f"Fail: it loses too much accuracy ({change}, {speed})",
        "speed": f"Fail: it is not fast enough ({speed}, {change})",
        "both": f"Fail: it loses accuracy and is not fast enough ({change}, {speed})",
        "undecided": f"Undecided: {change}, but the speed-up could not be told for sure",
        "not_run": f"Built, not run here: {change} as ONNX graphs, speed unknown",
    }[kind]


def _pass(report: dict[str, Any]) -> tuple[Step, ...]:
    steps = []
    if report["bundle"]:
        steps.append(Step("Hand over the folder RUN/bundle; it holds all that the device needs."))
        digest = report["bundle"]["manifest_sha256"]
        steps.append(
            Step(
                "Have it verified on the device. Send the hash by another way than the bundle.",
                f"python -m polar_deploy.bundle verify bundle --manifest-sha256 {digest}",
            )
        )
    else:
        steps.append(Step("Make the bundle for the edge team.", f"{_AGAIN} RUN --from bundle"))
    most, allowed = report["accuracy"]["interval"][1], report["verdict"]["max_drop"]
    if most > allowed:
        steps.append(
            Step(
                f"Mind the size of the test set: with {report['accuracy']['samples']:,} images, a drop of up to "
                f"{most:.2f} points is within the 95 % interval, more than the {allowed:g} allowed. "
                "The verdict holds for these images; more of them would make it firmer."
            )
        )
    return tuple(steps)


def _accuracy(report: dict[str, Any]) -> tuple[Step, ...]:
    allowed = report["verdict"]["max_drop"]
    graphs = report["graphs"]
    broken = report["accuracy"] and any(report["accuracy"]["nonfinite"].values())
    if broken or (graphs and graphs["drop"] <= allowed and report["precision"]["full"]["asked"] != "fp32"):
        return _precision(report)
    epochs = report["recipe"]["training"]["epochs"]
    asked = {name: min(0.95, round(share + 0.15, 2)) for name, share in report["budget"]["asked"].items()}
    looser = ",".join(f"{name}={share:g}" for name, share in asked.items())
    return (
        Step(
            f"Removing channels and blocks cost it, not the precision. Train longer: {epochs} epochs were run.",
            f"{_AGAIN} RUN-longer --epochs {3 * epochs} --full-epochs {3 * epochs}",
        ),
        Step("Or let it keep more of the network.", f"{_AGAIN} RUN-wider --budget {looser}"),
        Step("Or forbid narrow layers.", f"{_AGAIN} RUN-floor --set gates.min_width=0.5"),
    )


def _precision(report: dict[str, Any]) -> tuple[Step, ...]:
    asked, wider = report["precision"]["full"]["asked"], targets.parse(report["target"]).wider.name
    if asked == "int8":
        images = 4 * report["recipe"]["build"]["calibration"]["images"]
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


def _speed(report: dict[str, Any]) -> tuple[Step, ...]:
    tighter = {name: max(0.1, round(share - 0.15, 2)) for name, share in report["budget"]["asked"].items()}
    steps = []
    if "latency" not in tighter:
        steps.append(
            Step(
                "Fewer MACs alone do not make an engine faster. Ask for latency: it is measured before training.",
                f"{_AGAIN} RUN-latency --budget latency=0.6",
            )
        )
    else:
        asked = ",".join(f"{name}={share:g}" for name, share in tighter.items())
        steps.append(Step("Let it keep less of the network.", f"{_AGAIN} RUN-faster --budget {asked}"))
    largest = max((each["batch"] for each in report["latency"]), default=1)
    if largest != report["verdict"]["batch"]:
        steps.append(
            Step(
                f"Judge at the batch size that you serve: the table below has others, up to {largest}.",
                f"{_AGAIN} RUN --from parity --verdict-batch {largest}",
            )
        )
    steps.append(Step("Look at “Is it faster?” below and at docs/what-now.md for launches, padding and formats."))
    return tuple(steps)


def _undecided(report: dict[str, Any]) -> tuple[Step, ...]:
    timed = measured(report)
    again = Step("Measure again; an undecided verdict is never kept.", f"{_AGAIN} RUN --from parity")
    if timed is None or not timed["decided"]:
        quiet = Step("Two copies of one engine differ here. Stop what else runs on the machine; on a GPU, lock clocks.")
        return (quiet, again)
    close = "What is asked lies within the interval of what was measured: ask for less speed, or let it keep less."
    return (again, Step(close, f"{_AGAIN} RUN-smaller --budget {_smaller(report)}"))


def _smaller(report: dict[str, Any]) -> str:
    asked = report["budget"]["asked"].items()
    return ",".join(f"{name}={max(0.1, round(share - 0.1, 2)):g}" for name, share in asked)


def _not_run(report: dict[str, Any]) -> tuple[Step, ...]:
    digest = report["bundle"]["manifest_sha256"] if report["bundle"] else None
    on_device = "Take the bundle to the device and let it build, compare and time the engines there."
    if digest is None:
        return (Step("Go on with this folder on a machine that can run them.", f"{_AGAIN} RUN --from build"),)
    return (
        Step(on_device, f"python -m polar_deploy.bundle verify bundle --rebuild --manifest-sha256 {digest}"),
        Step("Or go on with this folder on a machine like it.", f"{_AGAIN} RUN --from build"),
        Step("What this machine lacks:", "python -m polar_deploy.engines doctor"),
    )
