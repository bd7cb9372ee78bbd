"""SIGKILL in three stages one after the other: the same command goes on each time, and ends where it should.

The killed process is a real one, and a write is really hit: the file is half on the disk when the process dies.
`benchmarks.bar_kills` kills in every stage, at any time and in any write.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from safetensors import safe_open

from tests.conftest import Miniature
from tests.support.kills import DECIDED, Ended, Moment, Runner, becomes, differences, leftovers, verdict

SEED = 5


def test_killed_in_three_stages_and_still_the_same(miniature: Miniature, tmp_path: Path) -> None:
    rng, folder = random.Random(SEED), tmp_path / "run"
    with Runner() as runner:
        lines = (miniature.folder / "full/training.jsonl").read_text().splitlines()
        trained = sum(json.loads(line)["seconds"] for line in lines)
        moments = (Moment("full", seconds=rng.random() * trained) for _ in range(9))
        _, _, ended = runner.killed(lambda: folder, moments)  # from nothing, again if the machine was faster
        assert ended.outcome.ran == ["full"]

        ended = in_write(runner, folder, Moment("gates", file="gated/checkpoint.safetensors", write=2))
        with safe_open(folder / "gated/checkpoint.safetensors", framework="np") as checkpoint:
            assert (
                json.loads(checkpoint.metadata()["state"])["epoch"] == 1
            )  # gates were fixed in it: what goes on is the cut network

        ended = in_write(runner, folder, Moment("bundle", file="bundle/golden/full/logits.npy", write=1))
        assert ended.outcome.up_to_date == ["full"]
        assert "gates: goes on after epoch 1 of 3" in ended.outcome.err
        assert not (folder / "bundle").exists()

        outcome = runner.run(folder).outcome
    assert outcome.ran == ["bundle", "report"] if verdict(folder) == "pass" else ["parity", "bundle", "report"]
    assert outcome.code == DECIDED[verdict(folder)]
    assert leftovers(folder) == {}
    assert differences(miniature.folder, folder) == []


def in_write(runner: Runner, folder: Path, moment: Moment) -> Ended:
    """Kill the command in a write: exactly this file is half there, under a name that nobody reads."""
    ended = runner.run(folder, moment)
    assert ended.hit(moment), ended.outcome
    last = ended.writes[moment.stage][-1]
    assert moment.file in (None, last.file)
    assert not (folder / last.file).exists() or moment.write != 1
    left = leftovers(folder)
    assert left[last.file] == last.size // 2
    assert all(becomes(Path(name)).parts[0] == Path(last.file).parts[0] for name in left)  # of earlier kills: nothing
    return ended
