"""The files of a run: each has one writer, and is written before it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from polar_deploy import recipes
from polar_deploy.errors import UsageError
from polar_deploy.progress import Progress
from polar_deploy.stages import NAMES, STAGES, artefacts, between
from polar_deploy.stages.artefacts import Artefact
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.resolve import resolve


def context(folder: Path, **settings: object) -> RunContext:
    given = recipes.load(None, {"model": "resnet20", "data": "digits", "budget.macs": 0.5} | settings)
    return RunContext(resolve(given, folder), folder, Progress(quiet=True))


def test_each_file_is_written_by_one_stage_and_before_it_is_read() -> None:
    written: set[Artefact] = set()
    for stage in STAGES:
        inside = {each for each in stage.reads if any(each.name.startswith(f.name) for f in written if f.is_folder)}
        assert written.issuperset(set(stage.reads) - inside), stage.name
        assert not written & set(stage.writes), stage.name
        written |= set(stage.writes)


def test_every_artefact_belongs_to_a_stage() -> None:
    listed = [each for each in vars(artefacts).values() if isinstance(each, Artefact)]
    listed += artefacts.ENGINES
    assert len({each.name for each in listed}) == len(listed)
    known = {each for stage in STAGES for each in (*stage.reads, *stage.looks_at, *stage.writes, *stage.scratch)}
    assert {each.name for each in set(listed) - known} == {"engines/", "run.yaml"}


def test_plans_and_the_table_are_only_there_where_they_are_wanted(tmp_path: Path) -> None:
    def names(**settings: object) -> set[str]:
        run = context(tmp_path, **settings)
        paths = {path for stage in STAGES for path in stage.outputs(run)}
        return {path.relative_to(tmp_path).as_posix() for path in paths}

    plain = names()
    assert not {name for name in plain if name.endswith(".plan")} | ({"latency-table.json"} & plain)
    assert names(target="rtx-fp16") - plain == {"engines/full.plan", "engines/compressed.plan"}
    assert names(**{"budget.latency": 0.8}) - plain == {"latency-table.json"}


def test_the_users_own_files_are_read_where_they_lie(tmp_path: Path) -> None:
    weights, table = tmp_path / "mine.npz", tmp_path / "table.json"
    run = context(tmp_path / "run", full_weights=weights, latency_table=table)
    full, gates = STAGES[:2]
    assert full.inputs(run) == [weights]
    run.path(artefacts.FULL_WEIGHTS).parent.mkdir(parents=True)
    run.path(artefacts.FULL_WEIGHTS).touch()
    assert gates.inputs(run) == [run.path(artefacts.FULL_WEIGHTS)]  # no latency is asked, so no table is read
    limited = context(tmp_path / "run", latency_table=table, **{"budget.latency": 0.8})
    assert gates.inputs(limited) == [run.path(artefacts.FULL_WEIGHTS), table]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stage surgery needs .*full/model\.onnx, which is not there"):
        STAGES[NAMES.index("surgery")].inputs(context(tmp_path))


def test_stages_between_two_names() -> None:
    assert [stage.name for stage in between("export", "build")] == ["export", "surgery", "build"]
    assert [stage.name for stage in between("full", "full")] == ["full"]
    assert list(between("report", "full")) == []
