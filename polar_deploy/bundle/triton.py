"""Write a model repository from which NVIDIA Triton serves one network of a bundle.

    REPOSITORY/NAME/config.pbtxt
    REPOSITORY/NAME/labels.txt
    REPOSITORY/NAME/1/model.plan or model.onnx, and model.onnx.data where its weights lie beside it
    REPOSITORY/NAME/2/…            further versions, all of which are served

Triton serves TensorRT's plans (trt-*; on the GPU and with the version that they were built for) and ONNX graphs: the
typed one by the runtime that it was made for, and the FP32 one of any bundle by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.backends import BACKENDS, PLAN
from polar_deploy.backends.base import triton_instances
from polar_deploy.backends.onnx_runtime import ORT, ORT_CUDA
from polar_deploy.bundle import device
from polar_deploy.bundle.read import Bundle, opened
from polar_deploy.bundle.refusal import require_outside
from polar_deploy.documents.build import Plan
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.surgery import detached
from polar_deploy.workspace import atomic_folder, sha256

if TYPE_CHECKING:
    from polar_deploy.bundle.manifest import Network, Tensor
    from polar_deploy.targets import Target

_SIGNATURE = "# Written by polar_deploy"  # how a later call knows that it may replace the folder
_BACKENDS = {each.triton: each for each in reversed(BACKENDS) if each.triton is not None}  # of several, the first
_FILENAMES = {name: f"model{backend.artefact.suffix}" for name, backend in _BACKENDS.items()}
_VERSION = re.compile(r"^#   ([1-9][0-9]{0,8}): ([0-9a-f]{64})$", re.MULTILINE)  # and the bundle's sha256
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}"  # a folder's name, and no path
_VERSIONS = 10**9  # above the last one
_QUEUE_DELAY = 100  # microseconds that a request waits for others: little beside what an inference takes
_FP32 = ORT.triton  # serves the FP32 graph of any bundle
_ONNX = f"--backend {_FP32} serves the FP32 graph"


@dataclass(frozen=True)
class _Model:
    """A file that Triton loads.

    Attributes:
        backend: Triton's name of the backend that loads it.
        file: where it lies now.
        typed: whether its inputs and outputs have the types of the manifest; else floats are FP32.
        settings: lines of config.pbtxt that this backend alone needs.
        notes: what whoever serves it has to know, a line each.
    """

    backend: str
    file: Path
    typed: bool
    settings: list[str]
    notes: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bundle triton`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder, or the .zip")
    parser.add_argument("repository", type=Path, metavar="REPOSITORY", help="Triton's model repository, old or new")
    parser.add_argument("--network", choices=("compressed", "full"), default="compressed", help="default: compressed")
    parser.add_argument("--name", help="of the model in the repository (default: the bundle's)")
    parser.add_argument("--version", type=int, default=1, metavar="N", help="of the model (default: 1); others stay")
    parser.add_argument("--backend", choices=tuple(_FILENAMES), help="default: as the bundle's target")
    parser.add_argument("--engines", metavar="DIR", type=Path, help="plans that `verify --rebuild --engines DIR` built")
    device.add_trust_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the model; say what it takes to serve it."""
    with opened(arguments.bundle) as bundle:
        place, version = _place(bundle, arguments), str(arguments.version)
        model = _model(bundle, arguments)
        _require_ours(place)
        versions = _versions(place) | {version: bundle.sha256}
        config = _config(place.name, model, bundle, versions)
        others = [each for each in versions if each != version]
        if others:
            _require_alike(place, config, bundle)
        with atomic_folder(place) as draft:
            for each in others:
                shutil.copytree(place / each, draft / each)
            (draft / version).mkdir()
            served = draft / version / _FILENAMES[model.backend]
            if _BACKENDS[model.backend].artefact is PLAN:
                shutil.copyfile(model.file, served)
            else:
                detached.copy(model.file, served)
            if bundle.manifest.labels is not None:
                shutil.copyfile(bundle.path(bundle.manifest.labels), draft / "labels.txt")
            (draft / "config.pbtxt").write_text(config, encoding="utf-8")
    print("\n".join([f"{place}: the {arguments.network} network, for Triton's {model.backend} backend", *model.notes]))
    return 0


# --------------------------------------------------------------------------- where to


def _place(bundle: Bundle, arguments: argparse.Namespace) -> Path:
    """The model's folder."""
    suffix = "_full" if arguments.network == "full" else ""
    name = bundle.manifest.name + suffix if arguments.name is None else arguments.name
    if not re.fullmatch(_NAME, name):
        raise UsageError(f"{name!r} is no name for a model", "use letters, digits, '_', '-' and '.', at most 200")
    if not 1 <= arguments.version < _VERSIONS:
        raise UsageError(f"--version {arguments.version} is none", f"give a number from 1 to {_VERSIONS - 1}")
    repository: Path = arguments.repository
    require_outside(repository, arguments.bundle)
    return repository / name


def _require_ours(place: Path) -> None:
    """Raise UsageError if something lies there that another one wrote: it is neither replaced nor mixed with."""
    if not place.is_dir():
        return  # nothing, or no folder, which `atomic_folder` refuses
    found = {path.relative_to(place).as_posix(): path for path in place.rglob("*")}
    ours = {"config.pbtxt", "labels.txt"} if (versions := _versions(place)) else set()
    for version in versions:
        ours |= {version, *(f"{version}/{name}{end}" for name in _FILENAMES.values() for end in ("", ".data"))}
    strange = sorted(name for name, path in found.items() if name not in ours or path.is_symlink())
    if strange:
        what = f"{place} has {strange[0]!r}, which `bundle triton` did not write"
        raise UsageError(what, "move it away, or give another --name")


def _versions(place: Path) -> dict[str, str]:
    """The versions of a model that were written here, with the sha256 of their bundles' manifests; {}: none was."""
    config = place / "config.pbtxt"
    if not config.is_file() or not config.read_bytes().startswith(_SIGNATURE.encode()):
        return {}
    return dict(_VERSION.findall(config.read_text(encoding="utf-8", errors="replace")))


def _require_alike(place: Path, config: str, bundle: Bundle) -> None:
    """Raise UsageError unless a further version has the configuration and the labels of those that are there."""
    path, labels = place / "config.pbtxt", place / "labels.txt"
    same = _without_comments(config) == _without_comments(path.read_text(encoding="utf-8"))
    if bundle.manifest.labels is not None and same:
        same = labels.is_file() and labels.read_bytes() == bundle.path(bundle.manifest.labels).read_bytes()
    if not same:
        what = f"{place} is a model with another configuration, or other labels"
        raise UsageError(what, "give this one a --name of its own: versions of a model have all of that in common")


def _without_comments(config: str) -> list[str]:
    return [line for line in config.splitlines() if not line.startswith("#")]


# --------------------------------------------------------------------------- what


def _model(bundle: Bundle, arguments: argparse.Namespace) -> _Model:
    """Choose what is served, as the options and the bundle's target say."""
    from polar_deploy import targets

    target = targets.parse(bundle.manifest.target)
    network = bundle.manifest.each().get(arguments.network)
    if network is None:
        raise UsageError("the bundle has no full network", "serve the compressed one, or ask for a bundle with both")
    asked: str | None = arguments.backend or target.backend.triton
    trusted = device.trusted(arguments, bundle)  # a sha256 that does not match is an error whatever is served
    if asked is None or asked not in (target.backend.triton, _FP32):
        raise _not_served(target, asked)
    if _BACKENDS[asked].artefact is PLAN:
        return _plan(bundle, network, arguments, trusted=trusted)
    if arguments.engines is not None:
        what = f"--engines has plans, which {_BACKENDS[asked].library} does not serve"
        raise UsageError(what, "leave one of the two options out")
    return _graph(bundle, network, target, asked)


def _not_served(target: Target, asked: str | None) -> UsageError:
    if asked is None or target.backend.triton is None:
        return UsageError(f"Triton has no backend for {target.backend.library}, which {target.name} is for", _ONNX)
    other = _BACKENDS[asked]
    kind = "plan" if other.artefact is PLAN else "graph"
    what = f"a bundle for {target.name} has no {kind} for {other.library}"
    return UsageError(what, f"leave --backend {asked} out")


def _graph(bundle: Bundle, network: Network, target: Target, backend: str) -> _Model:
    """The typed graph for the runtime that it was made for; else the FP32 one, since types suit one runtime only."""
    if backend == target.backend.triton:
        file, typed = network.typed, True
        notes = [f"it is {file}, as it was measured", *target.backend.triton_notes(target.precision)]
        by = target.backend
    else:
        file, typed = network.fp32, False
        notes = [f"it is {file}: in FP32, not in the {target.name} of the bundle's figures"]
        by = ORT if target.backend.gpu is None else ORT_CUDA
    settings = by.triton_settings(threads=network.threads or 1, tf32=network.tf32)
    return _Model(backend, bundle.path(file), typed, settings, notes)


def _plan(bundle: Bundle, network: Network, arguments: argparse.Namespace, *, trusted: bool) -> _Model:
    """A plan: of the bundle, if it is trusted, or one that was built here."""
    assert network.plan is not None  # as its manifest's target asks
    if (smallest := bundle.manifest.build.batches[0]) > 1:
        what = f"the plan takes {smallest} images or more at a time, Triton sends single ones"
        raise UsageError(what, f"ask for one with --batch 1,…; {_ONNX}")
    if arguments.engines is not None:
        file, plan = _rebuilt(arguments.engines, arguments.network, bundle)
    elif trusted:
        file, plan = bundle.path(network.plan.file), device.as_built(network.plan)
    else:
        raise UsageError(
            "the plan is not trusted: it is code, which Triton runs",
            "give --manifest-sha256 as its maker tells it, --trust-plan, or --engines DIR with what "
            "`verify --rebuild --engines DIR` built here",
        )
    return _Model("tensorrt", file, True, [triton_instances("GPU")], _needs(plan))


def _rebuilt(folder: Path, name: str, bundle: Bundle) -> tuple[Path, Plan]:
    """A plan that was built here from this bundle, and its description."""
    entry, path = device.cached_engine(folder, name, bundle), folder / f"{name}.plan"
    if sha256(path) != entry.files[path.name].sha256:
        raise ContentError(f"{path} is not the file that was built", "build again, with a new folder")
    assert entry.plan_file is not None  # as `cached_engine` says
    return path, entry.plan_file


def _needs(plan: Plan) -> list[str]:
    """What Triton has to have for a plan."""
    gpu = plan.gpu or "a GPU"
    capabilities = " or ".join(plan.capabilities)
    gpus = f"{gpu} (compute capability {capabilities}{' or later' if plan.hardware_compatible else ''})"
    if not plan.version_compatible:
        return [f"serve it with a Triton whose TensorRT is {plan.version}, on {gpus}"]
    major = plan.version.partition(".")[0]
    return [
        f"serve it with a Triton whose TensorRT is {plan.version} or a later {major}, on {gpus}",
        "and start that with --backend-config=tensorrt,version-compatible=true",
    ]


# --------------------------------------------------------------------------- config.pbtxt


def _config(name: str, model: _Model, bundle: Bundle, versions: Mapping[str, str]) -> str:
    """The model's configuration, ModelConfig of Triton's model_config.proto in protobuf's text format.

    Args:
        name: of the model.
        model: what is served.
        bundle: where it comes from.
        versions: of the model, with the sha256 of their bundles' manifests.
    """
    manifest = bundle.manifest
    _, usual, largest = manifest.build.batches
    vector = [len(each.shape) for each in manifest.outputs] == [1]  # Triton's labels are those of one vector
    labelled = ' label_filename: "labels.txt"' if manifest.labels and vector else ""
    inputs = [f"  {{ name: {_quoted(each.name)} {_tensor(each, model)} }}" for each in manifest.inputs]
    outputs = [f"  {{ name: {_quoted(each.name)} {_tensor(each, model)}{labelled} }}" for each in manifest.outputs]
    drawn = " ".join(
        f"inputs {{ key: {_quoted(each.name)} value {{ {_tensor(each, model, reshape=False)} {_warm_data(each)} }} }}"
        for each in manifest.inputs
    )
    warm = [f'  {{ name: "batch {batch}" batch_size: {batch} {drawn} }}' for batch in sorted({1, usual})]
    lines = [
        f"{_SIGNATURE}: versions, and the sha256 of manifest.json in their bundles",
        *(f"#   {version}: {sha}" for version, sha in sorted(versions.items(), key=lambda each: int(each[0]))),
        f"name: {_quoted(name)}",
        f"backend: {_quoted(model.backend)}",
        f"default_model_filename: {_quoted(_FILENAMES[model.backend])}",
        "version_policy { all { } }",
        f"max_batch_size: {largest}",
        "input [",
        ",\n".join(inputs),
        "]",
        "output [",
        ",\n".join(outputs),
        "]",
        *model.settings,
    ]
    if preferred := sorted({usual, largest} - {1}):
        delay = f"max_queue_delay_microseconds: {_QUEUE_DELAY}"
        lines.append(f"dynamic_batching {{ preferred_batch_size: {_list(preferred)} {delay} }}")
    return "\n".join([*lines, "model_warmup [", ",\n".join(warm), "]", ""])


def _tensor(tensor: Tensor, model: _Model, *, reshape: bool = True) -> str:
    """Type and sizes of a tensor. Triton has no scalars a sample: one is sent as a vector of one."""
    kind = tensor.dtype if model.typed or not tensor.is_float else "fp32"
    sizes = [size or -1 for size in tensor.shape]
    scalar = " reshape { shape: [ ] }" if reshape and not sizes else ""
    return f"data_type: TYPE_{kind.upper()} dims: {_list(sizes or [1])}{scalar}"


def _warm_data(tensor: Tensor) -> str:
    """Random numbers, or zeros where these are no floats, since they may be indices."""
    return "random_data: true" if tensor.is_float else "zero_data: true"


def _quoted(text: str) -> str:
    """A string literal: JSON escapes quotes and backslashes as protobuf does, and a manifest has no control signs."""
    return json.dumps(text, ensure_ascii=False)


def _list(values: Iterable[int]) -> str:
    return f"[ {', '.join(map(str, values))} ]"
