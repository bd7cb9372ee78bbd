"""SIGKILL at random moments of a run, in every stage, half of them in the middle of a write: is anything ever lost?

After each kill the same command goes on, and has to end with the figures of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from polar_deploy.stages import NAMES
from tests.conftest import MINIATURE
from tests.support.kills import DECIDED, Ended, Moment, Runner, differences, leftovers, not_yet, verdict

KILLS = 100
KINDS = ("time", "write")
TRIES = 20  # moments that may miss their stage, before something is wrong


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=KILLS, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place, Runner() as runner:
        unbroken, measured = _unbroken(runner, Path(place))
        kills = []
        for number in range(arguments.kills):
            rng = random.Random(f"{arguments.seed} {number}")
            kills.append(_kill(runner, unbroken, measured, number, rng))
            print(f"{number + 1}: {kills[-1]}", flush=True)
    clean, stages = sum(kill["clean"] for kill in kills), _by_stage(kills)
    bars = {
        f"{len(kills)} kills, {len(kills)} clean resumes with the same final figures": clean == len(kills),
        "in every stage, at a time and in a write": all(all(stages[name][k] for k in KINDS) for name in NAMES),
    }
    figures = {
        "command": "python -m polar_deploy.pipeline " + " ".join(MINIATURE),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started),
        "clean": clean,
        "stages": stages,
        "kills": kills,
    }
    return write_result("kills", bars, figures)


def _unbroken(runner: Runner, place: Path) -> tuple[Path, Ended]:
    """A run that nobody kills, with a clear verdict: how long its stages take, and what they write."""
    for number in range(TRIES):
        folder = place / f"unbroken{number}"
        measured = runner.run(folder)
        if measured.outcome.code == DECIDED["pass"]:
            return folder, measured
    raise RuntimeError(f"no run passed: {measured.outcome}")


def _kill(runner: Runner, unbroken: Path, measured: Ended, number: int, rng: random.Random) -> dict[str, Any]:
    """Kill one run, let it go on, and tell all about it."""
    turn, index = divmod(number, len(NAMES))
    stage, kind = NAMES[index], KINDS[(turn + index) % len(KINDS)]
    places = (unbroken.with_name(f"run{number}.{attempt}") for attempt in range(TRIES))
    moments = [_moment(measured, stage, kind, rng) for _ in range(TRIES)]
    folder, moment, died = runner.killed(lambda: not_yet(unbroken, next(places), stage), moments)
    half = died.writes[stage][-1] if kind == "write" else None
    told = {
        "stage": stage,
        "kind": kind,
        "seconds": None if moment.seconds is None else round(moment.seconds, 4),
        "write": moment.write,
        "file": half and asdict(half),
        "left": leftovers(folder),
        "tries": moments.index(moment) + 1,
    }
    wrong = _resume(runner, unbroken, folder, stage)
    return told | {"verdict": verdict(folder), "clean": not wrong, "wrong": wrong}


def _moment(measured: Ended, stage: str, kind: str, rng: random.Random) -> Moment:
    """A moment in the stage, each as likely as any other."""
    if kind == "time":
        return Moment(stage, seconds=rng.random() * measured.seconds[stage])
    return Moment(stage, write=rng.randint(1, len(measured.writes[stage])))


def _resume(runner: Runner, unbroken: Path, folder: Path, stage: str) -> list[str]:
    """Give the same command again; what is not as it should be."""
    outcome = runner.run(folder).outcome
    if outcome.code not in DECIDED.values():
        return [f"exit code {outcome.code}: {outcome.err}"]
    before = NAMES[: NAMES.index(stage)]
    wrong = [f"{name} ran again" for name in before if name not in outcome.up_to_date]
    wrong += [f"exit code {outcome.code}"] if outcome.code != DECIDED[verdict(folder)] else []
    wrong += [f"{name} is half-written" for name in leftovers(folder)]
    return wrong + [f"{name} differs" for name in differences(unbroken, folder)]


def _by_stage(kills: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Kills of each kind, and clean resumes, in each stage."""
    counted = {name: dict.fromkeys((*KINDS, "clean"), 0) for name in NAMES}
    for kill in kills:
        counted[kill["stage"]][kill["kind"]] += 1
        counted[kill["stage"]]["clean"] += kill["clean"]
    return counted


if __name__ == "__main__":
    sys.exit(main())
