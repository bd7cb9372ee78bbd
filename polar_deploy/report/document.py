"""report.json: the figures of a run in one place, each taken from the file of the stage that measured it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import latency
from polar_deploy.data.names import without_places
from polar_deploy.documents.build import Built, BuiltEngine
from polar_deploy.documents.gates import GateSite, GateStates
from polar_deploy.documents.parity import BatchLatency, ClassScore, LostSample, Parity
from polar_deploy.documents.part import Pair
from polar_deploy.documents.report import (
    Blocks,
    Budget,
    BundleMade,
    EngineLayers,
    EnginePrecision,
    NamedClass,
    NamedSample,
    Predicted,
    Reduced,
    Report,
    Savings,
    Timed,
    Trained,
    Trainings,
)
from polar_deploy.documents.surgery import SurgeryReport
from polar_deploy.documents.training_log import Epoch, Freeze
from polar_deploy.report.network import network, saved_ms, saving, sites
from polar_deploy.workspace import digest, sha256

if TYPE_CHECKING:
    from polar_deploy.config import Settings


def build(folder: Path, settings: Settings) -> Report:
    """report.json for the run in `folder`.

    Reads `gated/gates.json` and `model.onnx`, `compressed/surgery.json`, `engines/build.json` and `parity.json`; where
    latency has a budget, `latency-table.json` too, where there is a bundle, its manifest, and where networks were
    trained here, the logs of that.

    Raises:
        UsageError: one of the files is missing.
        ContentError: one is not what its type says.
    """
    gates, build_json = GateStates.read(folder / "gated/gates.json"), folder / "engines/build.json"
    built = Built.read(build_json)
    surgery, parity = SurgeryReport.read(folder / "compressed/surgery.json"), Parity.read(folder / "parity.json")
    full, compressed = (built.entry(name, build_json) for name in ("full", "compressed"))
    log = Trainings(full=_log(folder, "full"), gated=_log(folder, "gated"))
    macs, params = _reduced(full.macs, compressed.macs), _reduced(full.params, compressed.params)
    measured = "latency" in gates.budget and settings.latency_is_measured
    cut = network(surgery, folder / "gated/model.onnx", gates.ungated)
    loss = parity.precision.named() if parity.precision else {}
    recipe = without_places(settings)
    return Report(
        schema=2,
        settings=digest(recipe),
        recipe=recipe,
        model=settings.model,
        task=settings.task,
        metric=parity.metric,
        outputs=parity.outputs,
        data=recipe["data"],
        target=built.target,
        seed=settings.seed,
        full="given" if settings.full_weights else "trained",
        export=parity.export,
        surgery=parity.surgery,
        budget=Budget(asked=gates.budget, achieved=gates.achieved),
        verified=surgery.verified,
        not_run=parity.not_run,
        accuracy=parity.accuracy,
        classes=_classes(parity),
        worst_classes=_worst_classes(parity),
        worst_samples=_worst_samples(parity),
        graphs=parity.graphs,
        precision=Pair(
            full=EnginePrecision(**full.precision.entries(), loss=loss.get("full")),
            compressed=EnginePrecision(**compressed.precision.entries(), loss=loss.get("compressed")),
        ),
        macs=macs,
        params=params,
        bytes=_reduced(_bytes(full, "full.onnx"), _bytes(compressed, "compressed.onnx")),
        layers=Pair(full=_layers(full), compressed=_layers(compressed)),
        latency=[_timed(each) for each in parity.latency],
        predicted=_predicted(folder / "latency-table.json", gates) if measured else None,
        blocks=_blocks(gates.sites),
        network=cut,
        savings=Savings(macs=saving(cut.layers, macs, "macs"), params=saving(cut.layers, params, "params")),
        sites=sites(gates.sites, log.gated),
        training=Trainings(full=_trained(log.full, macs.full), gated=_trained(log.gated, macs.full)),
        history=Trainings(full=[each.curves for each in log.full], gated=[each.curves for each in log.gated]),
        freeze=_freeze(log.gated),
        verdict=parity.verdict,
        bundle=_bundle(folder / "bundle/manifest.json"),
        versions=compressed.versions,
        machine=parity.machine,
    )


def _log(folder: Path, name: str) -> list[Epoch]:
    return Epoch.read_all(folder / name / "training.jsonl")


def _reduced(full: int, compressed: int) -> Reduced:
    return Reduced(full=full, compressed=compressed, ratio=compressed / full)


def _timed(measured: BatchLatency) -> Timed:
    """The round that counts, of one batch size."""
    best = measured.best
    return Timed(
        batch=measured.batch,
        decided=measured.decided,
        images_per_second=measured.images_per_second,
        energy_mj=measured.energy_mj,
        **best.entries(),
        speedup_with_noise=best.speedup_with_noise,
    )


def _layers(engine: BuiltEngine) -> EngineLayers:
    found = engine.precision.found
    return EngineLayers(layers=sum(found.values()), reformats=engine.reformats, padded_channels=engine.padded_channels)


def _predicted(path: Path, gates: GateStates) -> Predicted:
    """What the latency table says of the gates that stayed open, to be held against what was measured."""
    table = latency.read(path)
    opened = {site.name: len(site.open) for site in gates.sites}
    return Predicted(
        batch=table.batch,
        full_ms=table.full_ms,
        compressed_ms=table.predicted_ms(opened),
        saved=saved_ms(table, opened),
    )


def _bytes(engine: BuiltEngine, graph: str) -> int:
    """Of an ONNX file, with its weights where these lie beside it."""
    return sum(file.bytes for name, file in engine.files.items() if name in (graph, f"{graph}.data"))


def _trained(log: Sequence[Epoch], macs: int) -> Trained | None:
    """What training took, teacher and search included; None for a network that was not trained here.

    macs: of one forward pass of the full network.
    """
    epochs = [each for each in log if each.work is not None]
    if not epochs:
        return None
    joules = [each.joules for each in epochs if each.joules is not None]
    return Trained(
        epochs=len(epochs),
        seconds=round(sum(each.seconds or 0.0 for each in epochs), 1),
        macs=round(sum((each.samples or 0) * (each.work or 0.0) for each in epochs) * macs),
        joules=sum(joules) if len(joules) == len(epochs) else None,
    )


def _freeze(log: Sequence[Epoch]) -> Freeze | None:
    """The epoch in which gates were fixed, and what that changed."""
    frozen = [each.freeze for each in log if each.freeze is not None]
    return Freeze(**{name: getattr(frozen[-1], name) for name in Freeze.model_fields}) if frozen else None


def _classes(parity: Parity) -> list[NamedClass] | None:
    """Every class by its name, in the order of the labels."""
    if parity.classes is None:
        return None
    return [NamedClass(**each.entries(), name=_name(parity.class_names, each.label)) for each in parity.classes]


def _worst_samples(parity: Parity) -> list[NamedSample]:
    """The samples that lose most; of a classifier with the names of their labels and answers."""
    return [
        NamedSample(**each.entries(), **_label_names(parity.class_names, each)) for each in parity.worst_samples or ()
    ]


def _label_names(names: Sequence[str], sample: LostSample) -> dict[str, Any]:
    labels = {"label_name": sample.label, "answer_name": sample.answer}
    return {key: _name(names, label) for key, label in labels.items() if label is not None}


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _worst_classes(parity: Parity) -> list[ClassScore] | None:
    """The classes that lose most, worst first."""
    if parity.worst_classes is None:
        return None
    classes = {each.label: each for each in parity.classes or ()}
    return [classes[label] for label in parity.worst_classes]


def _bundle(manifest: Path) -> BundleMade | None:
    """How large the bundle is, and what tells it from another one; None: there is none."""
    if not manifest.is_file():
        return None
    size = sum(path.stat().st_size for path in manifest.parent.rglob("*") if path.is_file())
    return BundleMade(manifest_sha256=sha256(manifest), bytes=size)


def _blocks(gates: Sequence[GateSite]) -> Blocks:
    """How many of the blocks that have a gate are closed, and so removed."""
    blocks = [site for site in gates if site.kind == "block"]
    return Blocks(removed=sum(not site.open for site in blocks), total=len(blocks))
