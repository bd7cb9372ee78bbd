"""When a plan is loaded, when engines are built here, and when neither. TensorRT and the GPU are stand-ins."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polar_deploy import engines, gpu, targets
from polar_deploy.documents.build import EngineFacts, Plan, Profile
from polar_deploy.engines import trt
from polar_deploy.engines.base import Made
from polar_deploy.engines.ort import OrtEngine
from polar_deploy.engines.trt import library
from polar_deploy.workspace import sha256
from tests.conftest import Outcome, contents
from tests.support.bundle_commands import bundle, change
from tests.support.bundles import PLAN, VERSION, write_bundle


@dataclass
class Machine:
    """A machine with an L4 and TensorRT: what was loaded and built on it."""

    loaded: list[str] = field(default_factory=list)  # content of the plans
    built: list[str] = field(default_factory=list)
    caches: list[bytes] = field(default_factory=list)
    capabilities: list[tuple[str, ...]] = field(default_factory=list)
    version: str = VERSION

    def load(self, path: Path, target: Any, plan: Plan | None, *, tf32: bool) -> OrtEngine:
        self.loaded.append(path.read_bytes().decode())
        name = path.stem
        graph = path.parent / f"{name}.onnx"
        return OrtEngine(graph)

    def build(self, onnx_path: Path, folder: Path, name: str, target: Any, options: Any) -> Made:
        self.built.append(sha256(onnx_path))
        self.capabilities.append(options.capabilities)
        self.caches.append((folder / "timing.cache").read_bytes())
        (folder / f"{name}.plan").write_text(f"built here: {name}")
        plan = Plan(
            file=f"{name}.plan",
            library="TensorRT",
            version=self.version,
            gpu="NVIDIA L4",
            capabilities=["8.9"],
            version_compatible=False,
            hardware_compatible=False,
            cuda=None,
            driver=None,
            timing_cache=None,
            profile=Profile(min=1, opt=8, max=64),
            trtexec=None,
        )
        facts = EngineFacts(provider="TensorRT", tf32=False, versions={"TensorRT": self.version}, plan=plan)
        return Made(facts, {"fp16": 2}, (f"{name}.onnx", f"{name}.plan"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    here = Machine()
    for lacks in ("lacks_to_build", "lacks_to_run"):
        monkeypatch.setattr(targets, lacks, lambda target: [])
    monkeypatch.setattr(library, "version", lambda backend: VERSION)
    monkeypatch.setattr(gpu, "first", lambda: gpu.Gpu("NVIDIA L4", (8, 9)))
    monkeypatch.setattr(engines, "open_artefact", here.load)
    monkeypatch.setattr(trt, "build", here.build)
    return here


@pytest.fixture
def delivered(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", "trt-fp16")


def verify(folder: Path, *options: object) -> Outcome:
    return bundle("verify", folder, "--no-timing", *options)


def test_a_stranger_s_plan_is_not_loaded(machine: Machine, delivered: Path) -> None:
    outcome = verify(delivered)
    assert outcome.code == 5
    assert "the plan is not trusted (a plan is code)" in outcome.out
    assert "--rebuild builds engines here" in outcome.out
    assert "ONNX verified" in outcome.out
    assert (machine.loaded, machine.built) == ([], [])


@pytest.mark.parametrize("word", ["--trust-plan", "--manifest-sha256"])
def test_a_trusted_plan_is_loaded(word: str, machine: Machine, delivered: Path) -> None:
    told = [sha256(delivered / "manifest.json")] if word == "--manifest-sha256" else []
    outcome = verify(delivered, word, *told)
    assert outcome.code == 0, outcome.out + outcome.err
    assert machine.loaded == [f"{PLAN.decode()}{name}" for name in ("compressed", "full")]
    assert machine.built == []
    assert "engines   as delivered" in outcome.out


def test_a_wrong_hash_loads_nothing(machine: Machine, delivered: Path) -> None:
    outcome = verify(delivered, "--manifest-sha256", "0" * 64)
    assert (outcome.code, machine.loaded) == (4, [])


FALSIFIED = {
    "version": (("version", "10.13.3.10"), "was built with TensorRT 10.13.3.10, here is 10.13.3.9"),
    "architecture": (("capabilities", ["9.0"]), "compute capability 9.0), here is NVIDIA L4 (8.9)"),
    "GPU": (("gpu", "NVIDIA H200"), "was built for NVIDIA H200"),
}


@pytest.mark.parametrize("what", FALSIFIED)
def test_a_plan_for_something_else_is_never_loaded(what: str, machine: Machine, delivered: Path) -> None:
    (key, value), words = FALSIFIED[what]
    change(delivered, "networks", "compressed", "plan", key, to=value)
    change(delivered, "build", "capabilities", to=["9.0"])  # of the maker's GPU
    outcome = verify(delivered, "--trust-plan")
    assert outcome.code == 5
    assert words in outcome.out
    assert (machine.loaded, machine.built) == ([], [])

    outcome = verify(delivered, "--trust-plan", "--rebuild")
    assert outcome.code == 0, outcome.out + outcome.err
    assert machine.built == [sha256(delivered / f"engines/{name}.onnx") for name in ("compressed", "full")]
    assert machine.caches == [b"timings"] * 2
    assert machine.capabilities == [()] * 2  # this machine's own
    assert machine.loaded == ["built here: compressed", "built here: full"]
    assert "rebuilt here (the plan does not fit: " in outcome.out


def test_rebuilt_engines_are_kept_and_found_again(machine: Machine, delivered: Path, tmp_path: Path) -> None:
    kept, before = tmp_path / "kept", contents(delivered)
    assert verify(delivered, "--rebuild", "--engines", kept).code == 0
    assert json.loads((kept / "build.json").read_text())["bundle"] == sha256(delivered / "manifest.json")
    again = verify(delivered, "--engines", kept)
    assert again.code == 0
    assert "built here before" in again.out
    assert len(machine.built) == 2
    assert contents(delivered) == before

    change(delivered, "licence", to="another")
    other = verify(delivered, "--engines", kept, "--rebuild")
    assert other.code == 2
    assert "has engines of another bundle" in other.err


def test_kept_engines_that_no_longer_fit_are_built_again(
    machine: Machine, delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    assert verify(delivered, "--rebuild", "--engines", kept).code == 0
    monkeypatch.setattr(library, "version", lambda backend: "10.14.0.1")  # an upgrade
    outcome = verify(delivered, "--engines", kept)
    assert outcome.code == 5
    assert "no longer fit" in outcome.out
    machine.version = "10.14.0.1"
    assert verify(delivered, "--rebuild", "--engines", kept).code == 0
    assert len(machine.built) == 4


def test_a_folder_with_other_files_is_left_alone(machine: Machine, delivered: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    outcome = verify(delivered, "--rebuild", "--engines", tmp_path / "mine")
    assert outcome.code == 2
    assert "has 'thesis.tex', which is no engine" in outcome.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_rebuild_that_was_killed_is_done_again(machine: Machine, delivered: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert verify(delivered, "--rebuild", "--engines", kept).code == 0
    (kept / "build.json").unlink()  # it is written last
    assert verify(delivered, "--rebuild", "--engines", kept).code == 0
    assert len(machine.built) == 4


def test_a_trusted_plan_needs_nothing_to_build_with(
    machine: Machine, delivered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "lacks_to_build", lambda target: ["polygraphy is not installed"])
    assert verify(delivered, "--trust-plan").code == 0
    outcome = verify(delivered, "--rebuild")
    assert outcome.code == 5
    assert "not rebuilt: polygraphy is not installed" in outcome.out


def test_engines_that_were_changed_after_they_were_kept_are_not_loaded(
    machine: Machine, delivered: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    assert verify(delivered, "--rebuild", "--engines", kept).code == 0
    machine.loaded.clear()
    (kept / "compressed.plan").write_text("something else")
    outcome = verify(delivered, "--engines", kept)
    assert (outcome.code, machine.loaded) == (4, [])
    assert "is not the file that was built" in outcome.err


@pytest.mark.parametrize("content", ['{"bundle": 1}', "[]", '{"engines": {"compressed": 7}}'])
def test_a_list_of_kept_engines_that_is_none_is_an_error(
    content: str, machine: Machine, delivered: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/build.json").write_text(content)
    outcome = verify(delivered, "--engines", tmp_path / "kept")
    assert (outcome.code, machine.loaded) == (4, [])
    assert "does not list engines of a bundle" in outcome.err
