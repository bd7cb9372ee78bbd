"""Making a bundle from the files of a run. The format is that of docs/bundle.md."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.bundle import golden, graphs
from polar_deploy.bundle.manifest import MIN_GOLDEN, SCHEMA
from polar_deploy.bundle.read import LONGEST_LABEL, MANIFEST, Bundle, read
from polar_deploy.data import LazyImages, normalise
from polar_deploy.data.arrays import read_npz
from polar_deploy.data.names import without_place, without_places
from polar_deploy.errors import ContentError, one_line
from polar_deploy.workspace import atomic_folder, read_json, sha256, write_json

if TYPE_CHECKING:
    from polar_deploy.config import ResolvedSettings
    from polar_deploy.data import Dataset


def make(
    run: Path, folder: Path, settings: ResolvedSettings, dataset: Dataset, omit_settings: Collection[str] = ()
) -> None:
    """Write the bundle of a run whose parity stage did not fail, and check it.

    Args:
        run: the run's folder.
        folder: the bundle's; what was there before is replaced once the new one is whole.
        settings: the run's.
        dataset: what the networks were trained on.
        omit_settings: settings that may not be those of the run, and are left out of its provenance.

    Raises:
        UsageError: a file of the run is missing.
        ContentError: a file of the run is not what the stage before it wrote, or an engine fails its golden samples.
    """
    names = ("compressed", "full") if settings.bundle.full else ("compressed",)
    parity, built = read_json(run / "parity.json"), read_json(run / "engines/build.json")
    _require_judged(run, parity, settings)
    with atomic_folder(folder) as draft:
        networks = {name: _network(run, draft, name, built["engines"][name]) for name in names}
        _copy(run, draft, "compressed/surgery.json")
        labels = "".join(f"{one_line(name)[:LONGEST_LABEL]}\n" for name in dataset.class_names)
        (draft / "labels.txt").write_text(labels, encoding="utf-8")
        samples = _write_golden(draft, _golden_inputs(run, settings, dataset), names)
        document = {
            **_head(settings),
            **_edges(draft / networks["compressed"]["typed"]),
            "preprocessing": _preprocessing(settings, dataset),
            "labels": "labels.txt",
            "golden": {
                "source": settings.bundle.golden,
                "samples": samples,
                "inputs": "golden/inputs.npy",
                **{name: f"golden/{name}.npy" if name in names else None for name in ("compressed", "full")},
            },
            "networks": {"full": None, **networks},
            "surgery": "compressed/surgery.json",
            "report": _page(run, draft, settings, omit_settings),
            "metrics": _metrics(parity),
            "verdict": _verdict(parity["verdict"]),
            "provenance": _provenance(settings, dataset, built["engines"]["compressed"], omit_settings),
        }
        write_json(draft / MANIFEST, document | {"files": _files(draft)})
        _prove(read(draft))


def _require_judged(run: Path, parity: dict[str, Any], settings: ResolvedSettings) -> None:
    """The verdict has to be about these very files, and on what is asked."""
    again = "measure it: run again with --from parity"
    if "files" not in parity:
        raise ContentError(f"{run / 'parity.json'} does not tell which files it judges", again)
    for name, judged in parity["files"].items():
        if sha256(run / name) != judged:
            raise ContentError(f"{run / name} is not the file that parity.json judges", again)
    asked = settings.accept.model_dump(mode="json")
    if any(parity["verdict"][key] != value for key, value in asked.items()):
        raise ContentError(f"{run / 'parity.json'} judges by other bounds than {asked}", again)


def _head(settings: ResolvedSettings) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": "polar_deploy.bundle",
        "name": re.sub(r"[^A-Za-z0-9_.-]", ".", f"{settings.model}-{without_place(settings.data)}").lstrip(".-")[:100],
        "licence": settings.bundle.licence,
        "target": settings.target,
        "build": settings.build.model_dump(mode="json"),
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
    recipe = {key: value for key, value in document["recipe"].items() if key not in omit_settings}
    page = report.page(document | {"recipe": recipe, "bundle": None}, delivered=True)
    (draft / "report.html").write_text(page, encoding="utf-8")
    return "report.html"


def _network(run: Path, draft: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Copy one network's files; return its part of the manifest. A graph without other types is there only once."""
    fp32, typed = f"{name}/model.onnx", f"engines/{name}.onnx"
    for file, listed in entry["files"].items():
        if sha256(run / "engines" / file) != listed["sha256"]:
            raise ContentError(f"{run / 'engines' / file} is not what was built", "run again with --from build")
    _copy(run, draft, fp32)
    same = sha256(run / fp32) == sha256(run / typed)
    plan = entry["plan"] if isinstance(entry["plan"], dict) else None
    return {
        "fp32": fp32,
        "typed": fp32 if same else _copy(run, draft, typed),
        "layers": _copy(run, draft, f"engines/{name}.layers.json"),
        "plan": plan and _plan(run, draft, plan),
        **{key: entry[key] for key in ("provider", "tf32", "versions", "precision", "macs", "params")},
        **{key: entry.get(key) for key in ("threads", "reformats", "padded_channels")},
    }


def _plan(run: Path, draft: Path, plan: dict[str, Any]) -> dict[str, Any]:
    cache = f"engines/{plan['timing_cache']}"
    has_cache = plan["timing_cache"] is not None and (run / cache).is_file()
    return {
        **plan,
        "file": _copy(run, draft, f"engines/{plan['file']}"),
        "timing_cache": _copy(run, draft, cache) if has_cache else None,
    }


def _edges(typed: Path) -> dict[str, Any]:
    """Input and output of the typed graph."""
    import onnx

    (source, kind, shape), (result, result_kind, classes) = graphs.io_tensors(
        onnx.load(typed, load_external_data=False)
    )
    return {
        "input": {"name": source, "shape": list(shape), "dtype": graphs.element_type(kind), "layout": "NCHW"},
        "output": {"name": result, "classes": classes[0], "dtype": graphs.element_type(result_kind)},
    }


def _preprocessing(settings: ResolvedSettings, dataset: Dataset) -> dict[str, Any]:
    """As the test set's pictures were made. Those that are read lazily may be resized to more than is cut out."""
    images = dataset.test.images
    return {
        "channels": "RGB",
        "filter": "bilinear",
        "shorter_side": images.shorter if isinstance(images, LazyImages) else settings.input_size,
        "crop": settings.input_size,
        "scale": 1 / 255,
        **settings.normalize.model_dump(mode="json"),
    }


def _golden_inputs(run: Path, settings: ResolvedSettings, dataset: Dataset) -> golden.Array:
    """Images that the networks were validated on, or noise: float32 [N,3,H,W], N at least `MIN_GOLDEN`."""
    normal = settings.normalize
    inputs = read_npz(run / "gated/reference.npz", "inputs")["inputs"].astype("<f4")
    if settings.bundle.golden == "random":
        return golden.random_inputs(MIN_GOLDEN, inputs.shape[1:], normal.mean, normal.std)
    if len(inputs) >= MIN_GOLDEN:
        return inputs
    chosen = np.random.default_rng(settings.seed).permutation(len(dataset.train.labels))[:MIN_GOLDEN]
    if len(chosen) < MIN_GOLDEN:
        what = f"{settings.data} has {len(chosen)} training images, a bundle has {MIN_GOLDEN} golden samples at least"
        raise ContentError(what, "take random ones: --golden random")
    return normalise(dataset.train.images[np.sort(chosen)], normal.mean, normal.std)


def _write_golden(draft: Path, inputs: golden.Array, names: tuple[str, ...]) -> int:
    """Inputs and outputs; returns how many. On one thread: with more, sums could be in another order each time."""
    from polar_deploy.engines import infer_all
    from polar_deploy.engines.ort import OrtEngine

    (draft / "golden").mkdir()
    np.save(draft / "golden/inputs.npy", inputs)
    for name in names:
        outputs = infer_all(OrtEngine(draft / name / "model.onnx", threads=1), inputs)
        np.save(draft / f"golden/{name}.npy", outputs.astype("<f4"))
    return len(inputs)


def _metrics(parity: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": parity["machine"],
        "not_run": parity["not_run"],
        "accuracy": _accuracy(parity["accuracy"]),
        "fp32_graphs": _accuracy(parity["graphs"]),
        "latency": [_latency(measured) for measured in parity["latency"]],
    }


def _accuracy(counted: dict[str, Any] | None) -> dict[str, Any] | None:
    return counted and {key: counted[key] for key in ("samples", "full", "compressed", "drop", "interval")}


def _latency(measured: dict[str, Any]) -> dict[str, Any]:
    """The round that counts, of one batch size."""
    best = measured["rounds"][measured["chosen"]]
    kept = ("pairs", "full", "compressed", "speedup", "control", "before", "after")
    return {"batch": measured["batch"], "decided": measured["decided"], **{key: best[key] for key in kept}}


def _verdict(verdict: dict[str, Any]) -> dict[str, Any]:
    answers = {key: verdict[key] for key in ("accuracy", "latency", "overall")}
    return {"asked": {key: value for key, value in verdict.items() if key not in answers}, **answers}


def _provenance(
    settings: ResolvedSettings, dataset: Dataset, entry: dict[str, Any], omit_settings: Collection[str]
) -> dict[str, Any]:
    """Where it comes from, without the places where somebody's files lie."""
    told = {key: value for key, value in without_places(settings).items() if key not in omit_settings}
    return {
        "polar_deploy": entry["versions"]["polar_deploy"],
        "versions": entry["versions"],
        "model": settings.model,
        "full": "given" if settings.full_weights else "trained",
        "data": {"name": told["data"], "sha256": dataset.fingerprint()},
        "settings": told,
    }


def _prove(bundle: Bundle) -> None:
    """Hold what was written against its own golden samples, as the device will; ContentError where it fails."""
    from polar_deploy.bundle import device, verify

    with device.open_engines(bundle, device.Options(trusted=True)) as here:
        for name, found in verify.golden_samples(bundle, here.engines).items():
            if not found["pass"]:
                precision = bundle.manifest.networks.compressed.precision.asked
                raise ContentError(
                    f"the {precision} engine of the {name} network is off by {found['difference']} on the golden "
                    f"samples, {found['tolerance']} is allowed",
                    "keep more layers wide (a smaller build.max_layer_error), or choose a wider precision",
                )
