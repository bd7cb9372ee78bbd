"""What else could lose a run's work: damaged outputs, clocks that jump, a disk that is full at the last stage."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polar_deploy.stages import NAMES, STAGES
from tests.conftest import MINIATURE, Miniature, child_environment, contents, polar
from tests.support.kills import DECIDED, differences, leftovers, not_yet, verdict

FUTURE = 4_000_000_000  # seconds since 1970: the year 2096

# --------------------------------------------------------------------------- damaged outputs


def test_every_file_of_a_run_is_watched(miniature: Miniature) -> None:
    """Each one, the stamps and run.yaml aside, is an output of one stage by its content, so that damage is found."""
    watched: dict[str, str] = {}
    for name in NAMES:
        outputs = json.loads((miniature.folder / f"stamps/{name}.json").read_text())["outputs"]
        assert not watched.keys() & outputs.keys()
        watched |= outputs
    files = {name: sha for name, sha in contents(miniature.folder).items() if not name.startswith("stamps/")}
    assert watched == {name: sha for name, sha in files.items() if name != "run.yaml"}


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit: what was JSON stays text."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Keep the beginning."""
    os.truncate(path, rng.randrange(path.stat().st_size))


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_output_is_made_again_and_what_follows_from_it(
    name: str, miniature: Miniature, tmp_path: Path
) -> None:
    folder, rng = miniature.copy(tmp_path / "run"), random.Random(name)
    outputs = json.loads((folder / f"stamps/{name}.json").read_text())["outputs"]
    damage = (flip, cut)[NAMES.index(name) % 2]
    before = contents(folder)
    damage(folder / rng.choice(sorted(outputs)), rng)
    assert contents(folder) != before

    outcome = polar(*MINIATURE, "--out", folder)
    after = contents(folder)
    follow = [
        stage.name
        for stage in STAGES[NAMES.index(name) + 1 :]
        if any(before.get(read.name) != after.get(read.name) for read in (*stage.reads, *stage.looks_at))
    ]
    assert outcome.ran == [name, *follow]
    assert outcome.up_to_date == [stage for stage in NAMES if stage not in outcome.ran]
    assert outcome.code == DECIDED[verdict(folder)]
    assert differences(miniature.folder, folder) == []


def test_scratch_files_of_a_stage_that_is_up_to_date_are_removed(miniature: Miniature, tmp_path: Path) -> None:
    folder = miniature.copy(tmp_path / "run")
    for stage in STAGES:
        for name in stage.scratch:
            (folder / name).write_bytes(b"")
    assert polar(*MINIATURE, "--out", folder).up_to_date == list(NAMES)
    assert contents(folder) == contents(miniature.folder)


# --------------------------------------------------------------------------- clocks


def test_a_clock_that_jumps(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are from 1970 or from the future; during the run the clock shows any time in between, each time asked."""
    undone = ("full", "gates", "export", "surgery", "bundle", "report")  # the others would be measured again
    folder, rng = miniature.copy(tmp_path / "run", *undone), random.Random(0)
    for path in sorted(folder.rglob("*")):
        os.utime(path, (rng.choice((0, FUTURE)),) * 2)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, FUTURE))
    monkeypatch.setattr(time, "time_ns", lambda: rng.randrange(FUTURE * 10**9))
    outcome = polar(*MINIATURE, "--out", folder)
    assert (outcome.code, outcome.ran) == (miniature.outcome.code, list(undone))
    assert differences(miniature.folder, folder) == []

    made = contents(folder)
    for path in folder.rglob("*"):
        os.utime(path, (rng.choice((0, FUTURE)),) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    outcome = polar(*MINIATURE, "--out", folder)
    assert outcome.up_to_date == list(NAMES)
    assert contents(folder) == made


# --------------------------------------------------------------------------- a full disk

# A small disk with a run whose bundle has to be made again: first with too little room for it, then with enough.
FULL_AT_LAST = """
disk=$1 run=$2; shift 2
mount -t tmpfs -o size=2m tmpfs "$disk" && cp -r "$run" "$disk/run" && cd "$disk" || exit 1
head -c 4000000 /dev/zero > filling 2> /dev/null
truncate -s -$ROOM filling
"$@" --out run --from bundle; echo "code $?"
cp -r run "$BACK/full"
rm filling
"$@" --out run --from bundle; echo "code $?"
cp -r run "$BACK/freed"
"""


def test_a_disk_that_is_full_at_the_bundle(miniature: Miniature, tmp_path: Path) -> None:
    disk, before = tmp_path / "disk", not_yet(miniature.folder, tmp_path / "before", "bundle")
    disk.mkdir()
    unshare = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    if shutil.which("unshare") is None or subprocess.run([*unshare, f"mount -t tmpfs tmpfs {disk}"]).returncode:
        pytest.skip("a small disk cannot be mounted here: user namespaces are not allowed")
    environment = child_environment() | {"ROOM": "120000", "BACK": str(tmp_path)}
    command = [*unshare, FULL_AT_LAST, "sh", str(disk), str(before), sys.executable, "-m", "polar_deploy.pipeline"]
    done = subprocess.run([*command, *MINIATURE], env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert re.findall(r"^code \d", done.stdout, re.MULTILINE) == ["code 3", "code 0"], done.stderr
    assert re.findall(r"^error: no space left to write (\S+):", done.stderr, re.MULTILINE) == ["run/bundle"]
    assert leftovers(tmp_path / "full") == {}
    assert contents(tmp_path / "full") == contents(before)
    assert differences(miniature.folder, tmp_path / "freed") == []
