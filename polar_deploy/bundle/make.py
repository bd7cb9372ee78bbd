"""Making a bundle from the files of a run. The format is that of docs/bundle.md."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import onnx_files
from polar_deploy.bundle import golden, graphs
from polar_deploy.bundle.manifest import CLASSIFICATION, MIN_GOLDEN, SCHEMA, BuildOptions
from polar_deploy.bundle.read import LONGEST_LABEL, MANIFEST, Bundle, read
from polar_deploy.data.arrays import read_npz
from polar_deploy.data.names import without_place, without_places
from polar_deploy.documents.build import Built, BuiltEngine, Plan
from polar_deploy.documents.parity import Accuracy, BatchLatency, Judged, Parity
from polar_deploy.errors import ContentError, one_line
from polar_deploy.surgery import detached
from polar_deploy.tensors import count
from polar_deploy.workspace import atomic_folder, sha256, write_json

if TYPE_CHECKING:
    from polar_deploy.config import ResolvedSettings
    from polar_deploy.tasks import Data


def make(
    run: Path, folder: Path, settings: ResolvedSettings, task: str, data: Data, omit_settings: Collection[str] = ()
) -> None:
    """Write the bundle of a run whose parity stage did not fail, and check it.

    Args:
        run: the run's folder.
        folder: the bundle's; what was there before is replaced once the new one is whole.
        settings: the run's.
        task: name of what the networks are for.
        data: what they were trained on.
        omit_settings: settings that may not be those of the run, and are left out of its provenance.

    Raises:
        UsageError: a file of the run is missing.
        ContentError: a file of the run is not what the stage before it wrote, or an engine fails its golden samples.
    """
    names = ("compressed", "full") if settings.bundle.full else ("compressed",)
    parity, built = Parity.read(run / "parity.json"), Built.read(run / "engines/build.json")
    _require_judged(run, parity, settings)
    with atomic_folder(folder) as draft:
        networks = {name: _network(run, draft, name, built.entry(name, run / "engines/build.json")) for name in names}
        _copy(run, draft, "compressed/surgery.json")
        pictures = task == CLASSIFICATION
        document = {
            **_head(settings),
            "task": {
                "name": task,
                "metric": parity.metric and parity.metric.as_json(),
                "preprocessing": {} if pictures else dict(data.preprocessing),
            },
            **_tensors(draft / networks["compressed"]["typed"]),
            "preprocessing": dict(data.preprocessing) if pictures else None,
            "labels": _labels(draft, data.class_names),
            "golden": {
                "source": settings.bundle.golden,
                "full": None,
                **_write_golden(draft, _golden_inputs(run, settings, data, pictures=pictures), names),
            },
            "networks": {"full": None, **networks},
            "surgery": "compressed/surgery.json",
            "report": _page(run, draft, settings, omit_settings),
            "metrics": _metrics(parity),
            "verdict": _verdict(parity.verdict),
            "provenance": _provenance(settings, data, built.engines["compressed"], omit_settings),
        }
        write_json(draft / MANIFEST, document | {"files": _files(draft)})
        _prove(read(draft))


def _require_judged(run: Path, parity: Parity, settings: ResolvedSettings) -> None:
    """The verdict has to be about these very files, and on what is asked."""
    again = "measure it: run again with --from parity"
    for name, judged in parity.files.items():
        if sha256(run / name) != judged:
            raise ContentError(f"{run / name} is not the file that parity.json judges", again)
    asked = settings.accept.model_dump(mode="json")
    if parity.verdict.asked() != asked:
        raise ContentError(f"{run / 'parity.json'} judges by other bounds than {asked}", again)


def _head(settings: ResolvedSettings) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": "polar_deploy.bundle",
        "name": re.sub(r"[^A-Za-z0-9_.-]", ".", f"{settings.model}-{without_place(settings.data)}").lstrip(".-")[:100],
        "licence": settings.bundle.licence,
        "target": settings.target,
        # What a device builds engines by; what was decided in the typed graph, such as reduce_range, is no part of it.
        "build": settings.build.model_dump(mode="json", include=set(BuildOptions.model_fields)),
    }


def _files(draft: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file."""
    return {
        path.relative_to(draft).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(draft.rglob("*"))
        if path.is_file()
    }


def _copy(run: Path, draft: Path, name: str) -> str:
    target = draft / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / name, target)
    return name


def _page(run: Path, draft: Path, settings: ResolvedSettings, omit_settings: Collection[str]) -> str:
    """The page of the run for whoever gets the bundle: without pictures of its data, and without other settings."""
    from polar_deploy import report

    document = report.build(run, settings)
    recipe = {key: value for key, value in document.recipe.items() if key not in omit_settings}
    page = report.page(document.model_copy(update={"recipe": recipe, "bundle": None}), delivered=True)
    (draft / "report.html").write_text(page, encoding="utf-8")
    return "report.html"


def _network(run: Path, draft: Path, name: str, entry: BuiltEngine) -> dict[str, Any]:
    """Copy one network's files; return its part of the manifest. A graph without other types is there only once."""
    fp32, typed = f"{name}/model.onnx", f"engines/{name}.onnx"
    for file, listed in entry.files.items():
        if sha256(run / "engines" / file) != listed.sha256:
            raise ContentError(f"{run / 'engines' / file} is not what was built", "run again with --from build")
    same = _are_same(run / fp32, run / typed)
    graphs_of = {"fp32": _graph(run, draft, fp32)}
    graphs_of["typed"] = graphs_of["fp32"] if same else _graph(run, draft, typed)
    return {
        **{kind: file for kind, (file, _) in graphs_of.items()},
        **{f"{kind}_data": data for kind, (_, data) in graphs_of.items() if data is not None},
        "layers": _copy(run, draft, f"engines/{name}.layers.json"),
        "plan": _plan(run, draft, entry.plan_file) if entry.plan_file else None,
        **entry.model_dump(mode="json", exclude={"backend", "files", "plan", "seconds"}),
    }


def _are_same(one: Path, other: Path) -> bool:
    """Whether two ONNX files hold the same network; each refers to weights beside it by its own name."""
    if sha256(one) == sha256(other):
        return True
    models = [detached.read(path, check=False) for path in (one, other)]
    return any(each.external for each in models) and detached.are_same(*models)


def _graph(run: Path, draft: Path, name: str) -> tuple[str, str | None]:
    """Copy an ONNX file; its place in the bundle, and that of its weights if they lie beside it."""
    detached.copy(run / name, draft / name)
    data = onnx_files.data_path(draft / name)
    return name, data.relative_to(draft).as_posix() if data.is_file() else None


def _plan(run: Path, draft: Path, plan: Plan) -> dict[str, Any]:
    cache = f"engines/{plan.timing_cache}"
    has_cache = plan.timing_cache is not None and (run / cache).is_file()
    return {
        **plan.as_json(),
        "file": _copy(run, draft, f"engines/{plan.file}"),
        "timing_cache": _copy(run, draft, cache) if has_cache else None,
    }


def _tensors(typed: Path) -> dict[str, Any]:
    """Inputs and outputs of the typed graph."""
    model = onnx_files.read(typed, external=False, check=False)
    given = {value.name for value in model.graph.output}
    found: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}
    for name, kind, shape in graphs.io_tensors(model):
        tensor = {"name": name, "shape": [size or None for size in shape], "dtype": graphs.element_type(kind)}
        found["outputs" if name in given else "inputs"].append(tensor)
    return found


def _labels(draft: Path, names: Sequence[str]) -> str | None:
    """Write the names of the classes, if there are any."""
    if not names:
        return None
    lines = "".join(f"{one_line(name)[:LONGEST_LABEL]}\n" for name in names)
    (draft / "labels.txt").write_text(lines, encoding="utf-8")
    return "labels.txt"


def _golden_inputs(run: Path, settings: ResolvedSettings, data: Data, *, pictures: bool) -> dict[str, golden.Array]:
    """Samples that the networks were validated on, or noise: `MIN_GOLDEN` of them at least, by input."""
    stored = read_npz(run / "gated/reference.npz")
    inputs = {key.partition("/")[2]: values for key, values in stored.items() if key.startswith("inputs/")}
    if settings.bundle.golden == "random" and pictures:
        ((name, seen),) = inputs.items()
        assert settings.normalize is not None
        return {name: golden.random_pictures(MIN_GOLDEN, seen.shape[1:], settings.normalize)}
    if settings.bundle.golden == "random":
        return golden.random_inputs(MIN_GOLDEN, inputs)
    if count(inputs) >= MIN_GOLDEN:
        return inputs
    chosen = np.random.default_rng(settings.seed).permutation(len(data.train))[:MIN_GOLDEN]
    if len(chosen) < MIN_GOLDEN:
        what = f"{settings.data} has {len(chosen)} training samples, a bundle has {MIN_GOLDEN} golden ones at least"
        raise ContentError(what, "take random ones: --golden random")
    return dict(data.train.read(np.sort(chosen))[0])


def _write_golden(draft: Path, inputs: dict[str, golden.Array], names: Sequence[str]) -> dict[str, Any]:
    """Write inputs and outputs. On one thread: with more, sums could be in another order each time."""
    from polar_deploy.engines import infer_all
    from polar_deploy.engines.ort import OrtEngine

    graphs_of = {name: OrtEngine(draft / name / "model.onnx", threads=1) for name in names}
    inputs = {name: inputs[name] for name in graphs_of["compressed"].inputs}  # an exporter leaves out what is not read
    written: dict[str, Any] = {"samples": count(inputs)}
    for part in ("inputs", *names):
        arrays = inputs if part == "inputs" else infer_all(graphs_of[part], inputs)
        written[part] = {name: f"golden/{part}/{name}.npy" for name in arrays}
        (draft / "golden" / part).mkdir(parents=True)
        for name, values in arrays.items():
            kind = "<f4" if values.dtype.kind == "f" else values.dtype.newbyteorder("<")
            np.save(draft / written[part][name], np.ascontiguousarray(values, kind))
    return written


def _metrics(parity: Parity) -> dict[str, Any]:
    return {
        "machine": parity.machine.as_json(),
        "not_run": parity.not_run,
        "accuracy": _accuracy(parity.accuracy),
        "fp32_graphs": _accuracy(parity.graphs),
        "latency": [_latency(measured) for measured in parity.latency],
    }


def _accuracy(counted: Accuracy | None) -> dict[str, Any] | None:
    if counted is None:
        return None
    return counted.model_dump(mode="json", include={"samples", "full", "compressed", "drop", "interval"})


def _latency(measured: BatchLatency) -> dict[str, Any]:
    """The round that counts, of one batch size."""
    best = measured.best.model_dump(mode="json", exclude={"inferences", "singles", "quantiles_ms"})
    return {"batch": measured.batch, "decided": measured.decided, **best}


def _verdict(verdict: Judged) -> dict[str, Any]:
    answers = verdict.model_dump(mode="json", include={"accuracy", "latency", "overall"})
    return {"asked": verdict.asked(), **answers}


def _provenance(
    settings: ResolvedSettings, data: Data, entry: BuiltEngine, omit_settings: Collection[str]
) -> dict[str, Any]:
    """Where it comes from, without the places where somebody's files lie."""
    told = {key: value for key, value in without_places(settings).items() if key not in omit_settings}
    return {
        "polar_deploy": entry.versions["polar_deploy"],
        "versions": entry.versions,
        "model": settings.model,
        "full": "given" if settings.full_weights else "trained",
        "data": {"name": told["data"], "sha256": data.fingerprint()},
        "settings": told,
    }


def _prove(bundle: Bundle) -> None:
    """Hold what was written against its own golden samples, as the device will; ContentError where it fails."""
    from polar_deploy.bundle import device, verify

    with device.open_engines(bundle, device.Options(trusted=True)) as here:
        for name, found in verify.golden_samples(bundle, here.engines).items():
            if not found.passed:
                precision = bundle.manifest.networks.compressed.precision.asked
                raise ContentError(
                    f"the {precision} engine of the {name} network is off by {found.difference} on the golden "
                    f"samples, {found.tolerance} is allowed",
                    "keep more layers wide (a smaller build.max_layer_error), or choose a wider precision",
                )
