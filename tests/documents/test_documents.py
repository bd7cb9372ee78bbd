"""What all JSON files of a run share: they are read as they were written, and what does not fit is named."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from polar_deploy.documents.build import Built
from polar_deploy.documents.gates import GateStates
from polar_deploy.documents.parity import Parity
from polar_deploy.documents.part import Document
from polar_deploy.documents.report import Report
from polar_deploy.documents.surgery import SurgeryReport
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.workspace import read_json, write_json
from tests.report.runs import BUILD, GATES, PARITY, SURGERY, built, write_run
from tests.support.schemas import valid

with TemporaryDirectory() as folder:
    REPORT = built(write_run(Path(folder)))
FILES: dict[str, tuple[type[Document], dict[str, Any]]] = {
    "build": (Built, BUILD),
    "gates": (GateStates, GATES),
    "parity": (Parity, PARITY),
    "report": (Report, REPORT),
    "surgery": (SurgeryReport, SURGERY),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    kind, content = FILES[name]
    valid(name, content)
    write_json(tmp_path / "a.json", content)
    kind.read(tmp_path / "a.json").write(tmp_path / "b.json")
    assert read_json(tmp_path / "b.json") == content


@pytest.mark.parametrize("name", FILES)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    kind, content = FILES[name]
    with pytest.raises(UsageError, match=r"cannot read .*a\.json"):
        kind.read(tmp_path / "a.json")
    for change, place in (({"schema": 7}, "schema: "), ({"unheard_of": 1}, "unheard_of: ")):
        write_json(tmp_path / "a.json", content | change)
        with pytest.raises(ContentError, match=rf"a\.json: {place}"):
            kind.read(tmp_path / "a.json")
    write_json(tmp_path / "a.json", [])
    with pytest.raises(ContentError, match=r"a\.json: the document: "):
        kind.read(tmp_path / "a.json")


def test_a_place_inside_of_a_file_is_named(tmp_path: Path) -> None:
    content = copy.deepcopy(PARITY)
    content["verdict"]["overall"]["result"] = "good"
    write_json(tmp_path / "parity.json", content)
    with pytest.raises(ContentError, match=r"parity\.json: verdict\.overall\.result: "):
        Parity.read(tmp_path / "parity.json")
