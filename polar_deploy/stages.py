"""The stages of a run: what each reads, writes and depends on, and the few lines that connect it to its module.

A stage reads files of the run's folder and writes files there; it can be run alone on its predecessors' files.
Heavy imports happen inside the stage that needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from polar_deploy import devices, targets
from polar_deploy.config import PLACES, Settings
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.progress import Progress
from polar_deploy.workspace import Workspace, atomic_path, digest, read_json, remove_folder, sha256, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from polar_deploy.data import Dataset
    from polar_deploy.devices import Chosen
    from polar_deploy.export import Example
    from polar_deploy.gating.analysis import Analysis
    from polar_deploy.gating.choice import Limits
    from polar_deploy.gating.gates import Gates
    from polar_deploy.latency import LatencyTable
    from polar_deploy.training.batches import Batches
    from polar_deploy.training.loop import Fit

REFERENCE_SAMPLES = 32
LATENCY_TABLE = "latency-table.json"
CHECKS = 4  # whole sub-networks that a latency table is held against
WORST_SAMPLES = "worst-samples.npz"


@dataclass
class Run:
    """One run: resolved settings, its folder (made when first needed), and what the stages share."""

    settings: Settings
    folder: Path
    progress: Progress

    @cached_property
    def workspace(self) -> Workspace:
        """The run's folder."""
        return Workspace(self.folder)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, read once."""
        from polar_deploy import data

        s = self.settings
        return data.load(s.data, s.data_dir, input_size=s.input_size)

    @cached_property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (training, validation) into the training set; validation is empty for a final run."""
        import numpy as np

        from polar_deploy import data

        if self.settings.training.final:
            return np.arange(len(self.dataset.train.labels)), np.arange(0)
        return data.split_validation(self.dataset, self.settings.seed)

    def path(self, name: str) -> Path:
        """Where a file of the run's folder lies."""
        return self.folder / name

    def network(self) -> nn.Module:
        """The untrained network, its start values drawn from the run's seed."""
        import torch

        from polar_deploy import data, models

        torch.manual_seed(self.settings.seed)
        spec = data.spec(self.settings.data, self.settings.data_dir)
        return models.build(self.settings.model, spec.classes, self.input_size)

    def full_network(self) -> nn.Module:
        """The full network with the weights of the full stage."""
        from polar_deploy import models

        network = self.network()
        models.load_weights(network, self.path("full/weights.safetensors"))
        return network

    def example(self) -> Example:
        """Arguments of the network's forward, two black images."""
        import torch

        from polar_deploy.export import Example

        return Example.of(torch.zeros(2, 3, self.input_size, self.input_size))

    @cached_property
    def analysis(self) -> Analysis:
        """What can go from the network, whatever its weights; rehearsed, so that promises hold.

        Raises:
            UsageError: there is no place for a gate.
            ContentError: the network cannot be exported, or promise and result differ.
        """
        from polar_deploy.gating.analysis import analyse
        from polar_deploy.gating.deploy import masked
        from polar_deploy.gating.rehearsal import rehearse

        network = self.network()
        found = analyse(network, self.example(), blocks=self.settings.gates.blocks)
        with masked(network, found):
            rehearse(network, found)
        return found

    def require_reachable(self, *, measured: bool = False) -> Limits:
        """The widths that layers may take.

        Args:
            measured: whether latency counts too where its table is to be made here; the run's folder has to be locked.

        Raises:
            UsageError: no sub-network is within the budgets that are known.
        """
        from polar_deploy.gating.choice import require_reachable
        from polar_deploy.gating.latency import latency_cost

        settings, choices = self.settings, self.analysis.choices
        costs = dict(choices.costs)
        if measured or settings.latency_table is not None:
            table = _latency_table(self) if measured else self._given_table()
            costs["latency"] = latency_cost(table, choices.sites, choices.blocks)
        asked = {name: share for name, share in self.budget.items() if name in costs}
        if asked:
            require_reachable(choices, self.limits, costs, asked)
        return self.limits

    def likely(self, table: LatencyTable) -> list[dict[str, int]]:
        """Sub-networks as they will be chosen by a latency table, by site; what gates are worth is drawn at random."""
        import numpy as np

        from polar_deploy.gating.choice import choose, require_reachable
        from polar_deploy.gating.latency import latency_cost

        choices = self.analysis.choices
        costs = {**choices.costs, "latency": latency_cost(table, choices.sites, choices.blocks)}
        require_reachable(choices, self.limits, costs, self.budget)
        draws = np.random.default_rng(0).gamma(0.5, size=(CHECKS, choices.gates))
        states = [choose(choices, self.limits, costs, self.budget, worth) for worth in draws]
        return [{name: int(state[own.start : own.stop].sum()) for own, name, _ in choices.owners()} for state in states]

    @property
    def limits(self) -> Limits:
        """The widths that layers may take."""
        from polar_deploy.gating.choice import Limits

        offers = self.device.offers if self.device else None
        settings = self.settings
        return Limits.of(self.analysis.choices.sites, settings.align or 1, settings.gates.min_width, offers)

    def _given_table(self) -> LatencyTable:
        from polar_deploy import latency

        assert self.settings.latency_table is not None
        return latency.read(self.settings.latency_table, self.settings.target, self.settings.verdict.batch)

    def is_current(self, name: str) -> bool:
        """Whether what a stage wrote is up to date; False too where a file that it reads is missing."""
        stage = stage_named(name)
        if not self.folder.is_dir():
            return False
        try:
            return self.workspace.is_current(stage.name, stage.key(self), stage.inputs(self), stage.outputs(self))
        except UsageError:
            return False

    def gates(self, network: nn.Module, steps: int) -> Gates:
        """Gates on `network`, for a run of so many steps."""
        from polar_deploy.gating.gates import Gates

        settings, gates = self.settings, self.settings.gates
        assert gates.start is not None
        assert gates.freeze is not None
        return Gates(
            network,
            self.example(),
            self.budget,
            steps,
            align=settings.align or 1,
            device=self.device,
            min_width=gates.min_width,
            mode=gates.mode,
            start=gates.start,
            freeze=gates.freeze,
            latency_table=_latency_table(self) if "latency" in self.budget else None,
            rehearse=0,
            analysis=self.analysis,
        )

    @cached_property
    def device(self) -> Chosen | None:
        """The device whose widths are taken."""
        name = self.settings.device
        return None if name is None else devices.choose(name, self.target.precision)

    @property
    def budget(self) -> dict[str, float]:
        """The costs that are limited, each as a share of the full network's."""
        assert self.settings.budget is not None
        return self.settings.budget.asked()

    @property
    def target(self) -> targets.Target:
        """What the engines are built for."""
        return targets.parse(self.settings.target)

    @property
    def input_size(self) -> int:
        """Pixels a side."""
        assert self.settings.input_size is not None
        return self.settings.input_size

    def fit(self, stage: str, folder: str, network: nn.Module, epochs: int) -> Fit:
        """What the training run of a stage needs."""
        from polar_deploy.training.loop import Fit, choose_device, prepare

        device = choose_device()
        training, validation = self.split
        return Fit(
            stage=stage,
            network=prepare(network, self.settings, device),
            train=self._batches(training),
            validation=self._batches(validation) if len(validation) else None,
            settings=self.settings,
            epochs=epochs,
            folder=self.path(folder),
            key=repr(stage_named(stage).key(self)),
            device=device,
        )

    def _batches(self, indices: np.ndarray) -> Batches:
        from polar_deploy.training.batches import Batches
        from polar_deploy.training.loop import choose_device

        train = self.dataset.train
        return Batches(train.images, train.labels, indices, self.settings, choose_device())


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        key: the settings that concern it; when they change, it runs again.
        reads, writes: files of the run's folder.
        looks_at: more files that it reads, where they are.
        scratch: files that are removed when it is finished.
        settled: whether what it wrote may be kept the next time; else it runs again.
    """

    name: str
    run: Callable[[Run], None]
    key: Callable[[Run], object]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch: tuple[str, ...] = ()
    looks_at: tuple[str, ...] = ()
    settled: Callable[[Run], bool] = lambda run: True

    def inputs(self, run: Run) -> list[Path]:
        """The files it reads, the user's own weights among them.

        Raises:
            UsageError: one is missing.
        """
        paths = _paths(run, self.reads)
        paths += [path for path in map(run.path, self.looks_at) if path.is_file()]
        for path in paths:
            if not path.is_file():
                raise UsageError(f"stage {self.name} needs {path}, which is not there", "run the stage that writes it")
        if self.name == "full" and run.settings.full_weights is not None:
            paths.append(run.settings.full_weights)
        if self.name == "gates" and "latency" in run.budget and run.settings.latency_table is not None:
            paths.append(run.settings.latency_table)
        return paths

    def outputs(self, run: Run) -> list[Path]:
        """The files it writes; of a folder, such as "bundle/", those that are there."""
        files = _paths(run, tuple(name for name in self.writes if not name.endswith("/")))
        folders = [run.path(name) for name in self.writes if name.endswith("/")]
        return files + sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def _paths(run: Run, names: tuple[str, ...]) -> list[Path]:
    """The files of these names. Not every target has plans, not every budget a table."""
    absent = {".plan"} - {run.target.backend.artefact.suffix}
    absent |= {LATENCY_TABLE} if "latency" not in run.budget else set()
    return [run.path(name) for name in names if not name.endswith(tuple(absent))]


def _full(run: Run) -> None:
    from polar_deploy import models
    from polar_deploy.training.full import train_full
    from polar_deploy.training.loop import evaluate, write_log

    weights, epochs = run.settings.full_weights, run.settings.training.full_epochs
    network = run.network()
    assert epochs is not None
    if weights is None:
        train_full(run.fit("full", "full", network, epochs), run.progress)
    else:
        models.load_weights(network, weights)
        fit = run.fit("full", "full", network, epochs)
        accuracy = evaluate(fit.network, fit.validation) if fit.validation else None
        write_log(run.path("full/training.jsonl"), [{"epoch": 0, "given": True, "val_accuracy": accuracy}])
    models.save_weights(network, run.path("full/weights.safetensors"))


def _gates(run: Run) -> None:
    from polar_deploy import models
    from polar_deploy.gating.document import sites
    from polar_deploy.training.gated import train_gated
    from polar_deploy.training.loop import choose_device, prepare

    settings = run.settings
    epochs = settings.training.epochs
    assert epochs is not None
    network = run.full_network() if settings.training.start == "full" else run.network()
    fit = run.fit("gates", "gated", network, epochs)
    gates = run.gates(fit.network, epochs * fit.train.steps)
    teacher = prepare(run.full_network(), settings, choose_device()) if settings.training.distill else None
    state = train_gated(fit, gates, teacher, run.progress)
    models.save_weights(network, run.path("gated/weights.safetensors"))
    document = {
        "schema": 1,
        "model": settings.model,
        "input": [3, run.input_size, run.input_size],
        "align": settings.align,
        "device": run.device and {"name": run.device.device.name, "precision": run.device.precision},
        "budget": dict(gates.budget),
        "achieved": {name: gates.cost()[name] for name in gates.budget},
        "sites": sites(run.analysis.choices, gates.opened, state.notes["freeze"]["share"]),
        "ungated": gates.ungated,
    }
    write_json(run.path("gated/gates.json"), document)


def _latency_table(run: Run) -> LatencyTable:
    """The table of a latency budget, which then lies in the run's folder: the one given, or else made here.

    One that was made here before, of the same network and settings and on the same machine, is used again: a killed
    run shall go on under the budget that it began with.
    """
    from polar_deploy import latency
    from polar_deploy.engines import table
    from polar_deploy.gating.deploy import write_open

    settings, path, key = run.settings, run.path(LATENCY_TABLE), _table_key(run)
    if settings.latency_table is not None:
        write_json(path, read_json(settings.latency_table))
    elif not path.is_file() or latency.key(path) != key:
        run.progress.note(f"measuring the latency table on {run.target.name}")
        with TemporaryDirectory(prefix="polar_deploy-") as folder:
            gated = Path(folder, "gated.onnx")
            write_open(run.network(), run.analysis, gated)  # untrained: latency does not depend on weights
            for _ in range(2):
                measured = table.measure(
                    gated,
                    run.target,
                    batch=settings.verdict.batch,
                    options=settings.build,
                    likely=run.likely,
                    tell=run.progress.note,
                )
                off = latency.correction(measured)
                if off <= latency.MOST_CORRECTION:
                    break
                run.progress.note(f"whole networks are {100 * off:.0f} % off what single layers say: a busy machine?")
        write_json(path, {**measured, "key": key})
    return latency.read(path, run.target.name, settings.verdict.batch)


def _table_key(run: Run) -> str:
    """All that a table which is measured here depends on, hashed."""
    from polar_deploy import __version__
    from polar_deploy.engines import machine

    settings = run.settings.model_dump(mode="json", include={"model", "input_size", "target", "build", "gates"})
    here = {"machine": machine.describe(), "target": targets.identity(run.target), "polar_deploy": __version__}
    key = [settings, run.settings.verdict.batch, here]
    return digest(key)


def _export(run: Run) -> None:
    from polar_deploy import export, models
    from polar_deploy.gating import deploy
    from polar_deploy.gating.document import read_open

    full, network = run.full_network(), run.network()
    models.load_weights(network, run.path("gated/weights.safetensors"))
    opened = read_open(run.analysis.choices, run.path("gated/gates.json"))
    names = {"inputs": ("input",), "outputs": ("logits",)}
    export.write(full, run.example(), run.path("full/model.onnx"), **names)
    inputs = _reference_inputs(run)
    outputs = {"full": export.outputs(full, inputs)}
    with deploy.masked(network, run.analysis, opened):
        deploy.export(network, run.analysis, run.path("gated/model.onnx"), **names)
        outputs["gated"] = export.outputs(network, inputs)
    for name, expected in outputs.items():
        export.check(run.path(f"{name}/model.onnx"), inputs, expected)
    export.write_reference(run.path("gated/reference.npz"), {"inputs": inputs, **outputs})


def _reference_inputs(run: Run) -> np.ndarray:
    """Normalised images that no network was trained on, where there are any."""
    import numpy as np

    from polar_deploy import data

    assert run.settings.normalize is not None
    held = run.split[1] if len(run.split[1]) else run.split[0]
    chosen = np.sort(np.random.default_rng(run.settings.seed).permutation(held)[:REFERENCE_SAMPLES])
    normal = run.settings.normalize
    return data.normalise(run.dataset.train.images[chosen], normal.mean, normal.std)


def _surgery(run: Run) -> None:
    from polar_deploy.surgery import compress_file

    target = run.path("compressed/model.onnx")
    report = compress_file(run.path("gated/model.onnx"), target, report=run.path("compressed/surgery.json"))
    _require_budget(run, report)


def _require_budget(run: Run, surgery: dict[str, Any]) -> None:
    """The budget is a promise about the compressed ONNX graph: hold it against what was counted there."""
    import onnx

    from polar_deploy.surgery import cost

    full = cost(onnx.load(run.path("full/model.onnx")))
    for name, asked in run.budget.items():
        if name == "latency":  # is predicted, and measured in the parity stage
            continue
        achieved = surgery[name][1] / getattr(full, name)
        if achieved > asked:
            raise ContentError(
                f"the compressed network has {achieved:.4f} of the full one's {name}, above the budget of {asked}: "
                "surgery could not remove all that the gates closed",
                f"see the cuts not made in {run.path('compressed/surgery.json')}, and report this network",
            )


def _build(run: Run) -> None:
    from polar_deploy import engines

    calibration = _calibration(run) if run.target.precision == "int8" else None
    sources = (run.path("full/model.onnx"), run.path("compressed/model.onnx"))
    built = engines.build_all(*sources, run.path("engines"), run.target, run.settings.build, calibration)
    write_json(run.path("engines/build.json"), built)


def _calibration(run: Run) -> np.ndarray:
    """Normalised images of the training set, un-augmented, none of those that choices were validated on."""
    import numpy as np

    from polar_deploy import data

    normal, count = run.settings.normalize, run.settings.build.calibration.images
    assert normal is not None
    chosen = np.sort(np.random.default_rng(run.settings.seed).permutation(run.split[0])[:count])
    return data.normalise(run.dataset.train.images[chosen], normal.mean, normal.std)


def _parity(run: Run) -> None:
    from polar_deploy import engines, parity

    settings = run.settings
    assert settings.normalize is not None
    test = parity.TestSet(run.dataset.test, settings.normalize.mean, settings.normalize.std)
    full, compressed, gated = (engines.graph(run.path(f"{name}/model.onnx")) for name in _GRAPHS)
    graphs = parity.Graphs(full, compressed, gated, run.path("gated/reference.npz"))
    if lacks := targets.lacks_to_run(run.target):
        result = parity.not_run("; ".join(lacks), test, settings.verdict, graphs)
    else:
        result = parity.compare(
            engines.load(run.path("engines"), "full", run.target),
            engines.load(run.path("engines"), "compressed", run.target),
            test,
            settings.verdict,
            graphs=graphs,
            batches=settings.build.batches,
        )
    files = {name: sha256(run.path(name)) for name in _judged(run)}  # whoever hands them on can tell them again
    _write_worst_samples(run, result["worst_samples"] or [])
    write_json(run.path("parity.json"), result | {"files": files, "class_names": list(run.dataset.class_names)})
    if parity.exit_code(result) == parity.EXIT_CODES["fail"]:
        remove_folder(run.path("bundle"))  # of an earlier verdict


def _write_worst_samples(run: Run, worst: list[dict[str, Any]]) -> None:
    """The pictures behind them, in their order: uint8 [N, H, W, 3]."""
    import numpy as np

    indices = np.array([each["index"] for each in worst], np.int64)
    with atomic_path(run.path(WORST_SAMPLES)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=np.asarray(run.dataset.test.images[indices]))


def _judged(run: Run) -> list[str]:
    """Names of the graphs and engines that the verdict is about."""
    paths = _paths(run, (*(f"{name}/model.onnx" for name in _GRAPHS), *_ENGINES))
    return [path.relative_to(run.folder).as_posix() for path in paths if path.suffix != ".json"]


def _bundle(run: Run) -> None:
    from polar_deploy import parity
    from polar_deploy.bundle.make import make

    if parity.exit_code(read_json(run.path("parity.json"))) == parity.EXIT_CODES["fail"]:
        run.progress.note("no bundle: parity failed")
        return
    others = [stage.name for stage in STAGES if run.workspace.was_other(stage.name, stage.key(run))]
    for name in {"export", "build"} & {*others}:
        raise UsageError(
            f"stage {name} ran with other settings, or on another machine: the bundle would tell otherwise",
            f"run again with --from {name}, or with the settings of then",
        )
    unsaid = {"budget", "align", "gates", "training"} if {"full", "gates"} & {*others} else set()
    make(run.folder, run.path("bundle"), run.settings, run.dataset, unsaid)


def _report(run: Run) -> None:
    from polar_deploy import report

    document = report.build(run.folder, run.settings)
    write_json(run.path("report.json"), document)
    page = report.page(document, report.read_samples(run.path(WORST_SAMPLES)))
    with atomic_path(run.path("report.html")) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _basis(run: Run) -> dict[str, Any]:
    """What every trained network depends on."""
    s = run.settings.model_dump(mode="json", include={"model", "input_size", "normalize", "seed"})
    return s | {"data": run.dataset.fingerprint()}


def _full_key(run: Run) -> object:
    if run.settings.full_weights is not None:
        return _basis(run) | {"given": True, "final": run.settings.training.final}
    gated_only = {"epochs", "gated_lr", "start", "distill", "distill_temperature"}
    return _basis(run) | run.settings.training.model_dump(mode="json", exclude=gated_only)


def _gates_key(run: Run) -> object:
    settings = run.settings.model_dump(mode="json", include={"budget", "align", "gates", "training"})
    del settings["training"]["full_epochs"]
    if run.device:
        settings["widths"] = run.device.device.model_dump(mode="json")
    if "latency" in run.budget:
        build = run.settings.build.model_dump(mode="json")
        settings |= {"target": run.target.name, "batch": run.settings.verdict.batch, "build": build}
    return _basis(run) | settings


def _build_key(run: Run) -> object:
    key = run.settings.model_dump(mode="json", include={"target", "build"}) | {"here": targets.identity(run.target)}
    if run.target.precision != "int8":
        return key
    return key | _basis(run) | {"final": run.settings.training.final}


def _parity_key(run: Run) -> object:
    from polar_deploy.engines import machine

    settings = run.settings.model_dump(mode="json", include={"target", "build", "verdict", "normalize"})
    # What was measured on one machine, or could not run on it, says nothing about another.
    here = {"machine": machine.describe(), **targets.identity(run.target), "lacks": targets.lacks_to_run(run.target)}
    return settings | {"data": run.dataset.fingerprint(), "here": here}


def _decided(run: Run) -> bool:
    """Whether the same would come out again: a noisy machine may be quieter the next time, a test set stays."""
    parity = read_json(run.path("parity.json"))
    overall, latency = (parity["verdict"][part]["result"] for part in ("overall", "latency"))
    return parity["not_run"] is not None or overall != "undecided" or latency != "undecided"


_GRAPHS = ("full", "compressed", "gated")
_ENDS = (".onnx", ".plan", ".layers.json")
# build.json tells how long the build took, too: nothing that follows from the engines alone reads it as an input.
_ENGINES = tuple(f"engines/{name}{end}" for name in ("full", "compressed") for end in _ENDS)
_LOGS = ("full/training.jsonl", "gated/training.jsonl")

STAGES = (
    Stage(
        "full",
        _full,
        _full_key,
        reads=(),
        writes=("full/weights.safetensors", "full/training.jsonl"),
        scratch=("full/checkpoint.safetensors",),
    ),
    Stage(
        "gates",
        _gates,
        _gates_key,
        reads=("full/weights.safetensors",),
        writes=("gated/weights.safetensors", "gated/gates.json", "gated/training.jsonl", LATENCY_TABLE),
        scratch=("gated/checkpoint.safetensors",),
    ),
    Stage(
        "export",
        _export,
        _basis,
        reads=("full/weights.safetensors", "gated/weights.safetensors", "gated/gates.json"),
        writes=("full/model.onnx", "gated/model.onnx", "gated/reference.npz"),
    ),
    Stage(
        "surgery",
        _surgery,
        lambda run: run.budget,
        reads=("full/model.onnx", "gated/model.onnx"),
        writes=("compressed/model.onnx", "compressed/surgery.json"),
    ),
    Stage(
        "build",
        _build,
        _build_key,
        reads=("full/model.onnx", "compressed/model.onnx"),
        writes=(*_ENGINES, "engines/build.json"),
    ),
    Stage(
        "parity",
        _parity,
        _parity_key,
        reads=(*_ENGINES, *(f"{name}/model.onnx" for name in _GRAPHS), "gated/reference.npz"),
        writes=("parity.json", WORST_SAMPLES),
        settled=_decided,
    ),
    Stage(
        "bundle",
        _bundle,
        lambda run: _basis(run) | run.settings.model_dump(mode="json", exclude=PLACES),
        reads=(
            *(f"{name}/model.onnx" for name in ("full", "compressed")),
            *(*_ENGINES, "engines/build.json", "parity.json", "compressed/surgery.json", "gated/reference.npz"),
            *("gated/gates.json", "gated/model.onnx", LATENCY_TABLE),
        ),
        looks_at=_LOGS,
        writes=("bundle/",),
    ),
    Stage(
        "report",
        _report,
        lambda run: run.settings.model_dump(mode="json", exclude=PLACES),
        reads=(
            *("gated/gates.json", "gated/model.onnx", "compressed/surgery.json", "engines/build.json"),
            *("parity.json", WORST_SAMPLES, LATENCY_TABLE),
        ),
        looks_at=("bundle/manifest.json", *_LOGS),
        writes=("report.json", "report.html"),
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """The stage of that name."""
    return STAGES[NAMES.index(name)]
