"""Making a bundle from the files of a run. The format is that of docs/bundle.md."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy import onnx_files
from polar_deploy.bundle import golden, graphs, manifest, measured
from polar_deploy.bundle.manifest import CLASSIFICATION, MIN_GOLDEN, SCHEMA, BuildOptions, Manifest
from polar_deploy.bundle.read import LONGEST_LABEL, MANIFEST, Bundle, fitting, read
from polar_deploy.data.arrays import read_npz
from polar_deploy.data.names import without_place, without_places
from polar_deploy.documents.build import Built, BuiltEngine, Plan
from polar_deploy.documents.parity import Accuracy, BatchLatency, Judged, Parity
from polar_deploy.errors import ContentError, one_line
from polar_deploy.surgery import detached
from polar_deploy.tensors import count
from polar_deploy.workspace import atomic_folder, sha256, write_json

if TYPE_CHECKING:
    from polar_deploy.resolved import ResolvedSettings
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
    parity, built = Parity.read(run / "parity.json"), Built.read(run / "engines/build.json")
    _require_judged(run, parity, settings)
    names = ("compressed", "full") if settings.bundle.full else ("compressed",)
    with atomic_folder(folder) as draft, fitting(draft / MANIFEST):
        networks = {name: _network(run, draft, name, built.entry(name, run / "engines/build.json")) for name in names}
        _copy(run, draft, "compressed/surgery.json")
        pictures = task == CLASSIFICATION
        inputs, outputs = _tensors(draft / networks["compressed"].typed)
        metric = manifest.Metric(name=parity.metric.name, unit=parity.metric.unit) if parity.metric else None
        made = dict(data.preprocessing)
        document = Manifest(
            schema=SCHEMA,
            kind="polar_deploy.bundle",
            name=_name(settings),
            licence=settings.bundle.licence,
            target=settings.target,
            # What a device builds by; what was decided in the typed graph, such as reduce_range, is no part of it.
            build=BuildOptions.model_validate(settings.build.model_dump(include=set(BuildOptions.model_fields))),
            task=manifest.Task(name=task, metric=metric, preprocessing={} if pictures else made),
            inputs=inputs,
            outputs=outputs,
            preprocessing=manifest.Preprocessing.model_validate_json(json.dumps(made)) if pictures else None,
            labels=_labels(draft, data.class_names),
            golden=_write_golden(draft, settings, _golden_inputs(run, settings, data, pictures=pictures), names),
            networks=manifest.Networks(full=networks.get("full"), compressed=networks["compressed"]),
            surgery="compressed/surgery.json",
            report=_page(run, draft, settings, omit_settings),
            metrics=_metrics(parity),
            verdict=_verdict(parity.verdict),
            provenance=_provenance(settings, data, built.engines["compressed"], omit_settings),
            files=_files(draft),  # the last, when all of them are written
        )
        write_json(draft / MANIFEST, document.as_json())
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


def _name(settings: ResolvedSettings) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", ".", f"{settings.model}-{without_place(settings.data)}").lstrip(".-")[:100]


def _files(draft: Path) -> dict[str, manifest.File]:
    """Size and hash of every file."""
    return {
        path.relative_to(draft).as_posix(): manifest.File(bytes=path.stat().st_size, sha256=sha256(path))
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


def _network(run: Path, draft: Path, name: str, entry: BuiltEngine) -> manifest.Network:
    """Copy one network's files; return its part of the manifest. A graph without other types is there only once."""
    files = f"{name}/model.onnx", f"engines/{name}.onnx"
    for file, listed in entry.files.items():
        if sha256(run / "engines" / file) != listed.sha256:
            raise ContentError(f"{run / 'engines' / file} is not what was built", "run again with --from build")
    same = _are_same(*(run / file for file in files))
    fp32, fp32_data = _graph(run, draft, files[0])
    typed, typed_data = (fp32, fp32_data) if same else _graph(run, draft, files[1])
    beside = {"fp32_data": fp32_data, "typed_data": typed_data}
    facts = entry.model_dump(mode="json", exclude={"backend", "files", "plan", "seconds"})
    return manifest.Network(
        fp32=fp32,
        typed=typed,
        layers=_copy(run, draft, f"engines/{name}.layers.json"),
        plan=_plan(run, draft, entry.plan_file) if entry.plan_file else None,
        **facts | {key: file for key, file in beside.items() if file is not None},
    )


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


def _plan(run: Path, draft: Path, plan: Plan) -> manifest.Plan:
    cache = f"engines/{plan.timing_cache}"
    has_cache = plan.timing_cache is not None and (run / cache).is_file()
    here = {
        "file": _copy(run, draft, f"engines/{plan.file}"),
        "timing_cache": _copy(run, draft, cache) if has_cache else None,
    }
    return manifest.Plan.model_validate(plan.as_json() | here)


def _tensors(typed: Path) -> tuple[list[manifest.Input], list[manifest.Tensor]]:
    """Inputs and outputs of the typed graph."""
    model = onnx_files.read(typed, external=False, check=False)
    given = {value.name for value in model.graph.output}
    inputs: list[manifest.Input] = []
    outputs: list[manifest.Tensor] = []
    for name, kind, shape in graphs.io_tensors(model):
        dtype = graphs.element_type(kind)
        if name in given:
            outputs.append(manifest.Tensor(name=name, shape=[size or None for size in shape], dtype=dtype))
        else:
            inputs.append(manifest.Input(name=name, shape=list(shape), dtype=dtype))
    return inputs, outputs


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


def _write_golden(
    draft: Path, settings: ResolvedSettings, inputs: dict[str, golden.Array], names: Sequence[str]
) -> manifest.Golden:
    """Write inputs and outputs. On one thread: with more, sums could be in another order each time."""
    from polar_deploy.engines import infer_all
    from polar_deploy.engines.ort import OrtEngine

    graphs_of = {name: OrtEngine(draft / name / "model.onnx", threads=1) for name in names}
    inputs = {name: inputs[name] for name in graphs_of["compressed"].inputs}  # an exporter leaves out what is not read
    files: dict[str, dict[str, str]] = {}
    for part in ("inputs", *names):
        arrays = inputs if part == "inputs" else infer_all(graphs_of[part], inputs)
        files[part] = {name: f"golden/{part}/{name}.npy" for name in arrays}
        (draft / "golden" / part).mkdir(parents=True)
        for name, values in arrays.items():
            kind = "<f4" if values.dtype.kind == "f" else values.dtype.newbyteorder("<")
            np.save(draft / files[part][name], np.ascontiguousarray(values, kind))
    return manifest.Golden(
        source=settings.bundle.golden,
        full=files.get("full"),
        samples=count(inputs),
        inputs=files["inputs"],
        compressed=files["compressed"],
    )


def _metrics(parity: Parity) -> measured.Metrics:
    return measured.Metrics(
        machine=parity.machine.as_json(),
        not_run=parity.not_run,
        accuracy=_accuracy(parity.accuracy),
        fp32_graphs=_accuracy(parity.graphs),
        latency=[_latency(each) for each in parity.latency],
    )


def _accuracy(counted: Accuracy | None) -> measured.Accuracy | None:
    if counted is None:
        return None
    return measured.Accuracy.model_validate(counted.model_dump(include=set(measured.Accuracy.model_fields)))


def _latency(timed: BatchLatency) -> measured.Latency:
    """The round that counts, of one batch size."""
    best = timed.best.model_dump(mode="json", exclude={"inferences", "singles", "quantiles_ms"})
    return measured.Latency(batch=timed.batch, decided=timed.decided, **best)


def _verdict(verdict: Judged) -> manifest.Judged:
    answers = verdict.model_dump(mode="json", include={"accuracy", "latency", "overall"})
    return manifest.Judged(asked=manifest.Criteria.model_validate(verdict.asked()), **answers)


def _provenance(
    settings: ResolvedSettings, data: Data, entry: BuiltEngine, omit_settings: Collection[str]
) -> manifest.Provenance:
    """Where it comes from, without the places where somebody's files lie."""
    told = {key: value for key, value in without_places(settings).items() if key not in omit_settings}
    return manifest.Provenance(
        polar_deploy=entry.versions["polar_deploy"],
        versions=entry.versions,
        model=settings.model,
        full="given" if settings.full_weights else "trained",
        data=manifest.Data(name=told["data"], sha256=data.fingerprint()),
        settings=told,
    )


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
