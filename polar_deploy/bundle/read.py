"""Reading a bundle as what it is: a stranger's files. Nothing is used before it was found to be what it says.

In this order: names and kinds of files, the manifest, sizes, hashes, and then what is in graphs, golden samples and
labels. Every failure is one ContentError (exit code 4) that names the file and what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from polar_deploy.bundle import format1, graphs
from polar_deploy.bundle.manifest import CLASSIFICATION, SCHEMA, Manifest, Tensor
from polar_deploy.bundle.refusal import refused
from polar_deploy.errors import ContentError, PolarDeployError, UsageError, first_problem, one_line, printable
from polar_deploy.tensors import TensorSpec
from polar_deploy.workspace import sha256

MANIFEST = "manifest.json"
LARGEST_TEXT = 4 << 20  # bytes: of the manifest, and of the labels
LARGEST_JSON = 64 << 20  # bytes
MOST_FILES = 100
LONGEST_LABEL = 500  # characters

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and found whole.

    Attributes:
        folder: where it lies.
        manifest: its manifest.
        sha256: of manifest.json, which the hashes of all other files stand in.
        labels: names of the classes; [] for a task without.
        inputs: golden inputs by name, [N, …], mapped from their files; floats are float32.
        outputs: golden outputs by network and name, likewise.
    """

    folder: Path
    manifest: Manifest
    sha256: str
    labels: list[str]
    inputs: dict[str, Array]
    outputs: dict[str, dict[str, Array]]

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies."""
        return self.folder / name


@contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """Read a bundle, a folder or an archive, which is unpacked into a temporary folder for as long as that takes."""
    from polar_deploy.bundle import archive

    if path.is_file():
        with archive.unpacked(path) as folder:
            try:
                yield read(folder)
            except PolarDeployError as error:  # whoever reads it knows the archive, and not where that was unpacked
                error.what = error.what.replace(str(folder), str(path))
                raise
    else:
        yield read(path)


def read(folder: Path) -> Bundle:
    """Read the bundle in `folder` and check all of it.

    Raises:
        UsageError: there is no such folder, or it cannot be read.
        ContentError: it is damaged, hostile, of a later version, or no bundle.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no bundle at {folder}", "give the folder, or the .zip, that you were sent")
    sizes = _sizes(folder)
    if MANIFEST not in sizes:
        raise refused(folder, f"has no {MANIFEST}, so it is no bundle")
    content = _limited(folder / MANIFEST, LARGEST_TEXT)  # read once: what is parsed is what is hashed
    manifest = parse(content, folder / MANIFEST)
    _require_whole(folder, manifest, sizes)
    for network in manifest.each().values():
        graphs.require_as_described(folder, manifest, network)
    for name in {manifest.surgery, *(network.layers for network in manifest.each().values())}:
        strict_json(_limited(folder / name, LARGEST_JSON), folder / name)
    golden = manifest.golden
    inputs = {each.name: _array(folder / golden.inputs[each.name], golden.samples, each) for each in manifest.inputs}
    outputs = {
        name: {each.name: _array(folder / files[each.name], golden.samples, each) for each in manifest.outputs}
        for name, files in (("compressed", golden.compressed), ("full", golden.full))
        if files is not None
    }
    labels = [] if manifest.labels is None else _labels(folder / manifest.labels)
    if manifest.task.name == CLASSIFICATION and [len(labels)] != manifest.outputs[0].shape:
        found = f"has {len(labels)} labels, the networks have {manifest.outputs[0].shape[0]} classes"
        raise refused(folder / str(manifest.labels), found)
    return Bundle(folder, manifest, hashlib.sha256(content).hexdigest(), labels, inputs, outputs)


# --------------------------------------------------------------------------- names, sizes, hashes


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file by its path in the bundle. Links, devices and pipes are refused unopened."""
    found: dict[str, int] = {}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        for entry in _entries(current):
            name = Path(entry.path).relative_to(folder).as_posix()
            state = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(state.st_mode):
                waiting.append(Path(entry.path))
            elif stat.S_ISREG(state.st_mode):
                found[name] = state.st_size
            else:
                raise refused(folder, f"has {name!r}, which is a link, a device or a pipe, and no file")
            if len(found) + len(waiting) > MOST_FILES:
                raise refused(folder, f"has more than {MOST_FILES} files and folders")
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}", "mend its permissions") from error


def _require_whole(folder: Path, manifest: Manifest, sizes: dict[str, int]) -> None:
    """All files that are listed are there, with size and hash, and no other ones."""
    if missing := sorted(set(manifest.files) - set(sizes)):
        raise refused(folder / missing[0], "is missing")
    if unlisted := sorted(set(sizes) - set(manifest.files) - {MANIFEST}):
        raise refused(folder / unlisted[0], "is not listed in the manifest")
    for name, listed in manifest.files.items():
        if sizes[name] != listed.bytes:
            raise refused(folder / name, f"has {sizes[name]:,} bytes, the manifest says {listed.bytes:,}")
    for name, listed in manifest.files.items():
        if (found := sha256(folder / name)) != listed.sha256:
            raise refused(folder / name, f"has the sha256 {found[:12]}…, the manifest says {listed.sha256[:12]}…")


# --------------------------------------------------------------------------- the manifest


def parse(content: bytes, place: Path | str) -> Manifest:
    """Read a manifest: strict JSON (no key twice, no number beyond a float's), a known version, no unknown field."""
    document = strict_json(content, place)
    version = document.get("schema") if isinstance(document, dict) else None
    if type(version) is not int or version < 1:
        raise refused(place, f"has no schema version, but {str(version)[:100]!r} in its place")
    if version > SCHEMA:
        raise ContentError(
            f"{place} has schema version {version}, written by a later polar_deploy; this one knows {SCHEMA}",
            "update polar_deploy",
        )
    with fitting(place):
        return Manifest.model_validate_json(content if version == SCHEMA else json.dumps(format1.renamed(document)))


@contextmanager
def fitting(place: Path | str) -> Iterator[None]:
    """Inside, what does not fit the manifest's types is a ContentError that names the manifest's place."""
    try:
        yield
    except ValidationError as error:
        more = f" ({count - 1} more)" if (count := error.error_count()) > 1 else ""
        raise refused(place, f"is no manifest: {first_problem(error, 'the manifest')}{more}") from error


def strict_json(content: bytes, place: Path | str) -> Any:
    """Read JSON in UTF-8: no key twice, no NaN, no number beyond a float's; ContentError otherwise."""
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_constant=_no_number,
            parse_float=_finite,
            object_pairs_hook=_no_key_twice,
        )
    except (ValueError, RecursionError) as error:
        raise refused(place, f"is not strict JSON: {one_line(error)}") from error


def _limited(path: Path, most: int) -> bytes:
    """Read a file that is not too large."""
    if (size := path.stat().st_size) > most:
        raise refused(path, f"has {size:,} bytes, at most {most:,} are allowed")
    return path.read_bytes()


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{text[:50]} is too large")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return result


# --------------------------------------------------------------------------- golden samples and labels


def _array(path: Path, samples: int, tensor: Tensor) -> Array:
    """Samples of a tensor, finite, mapped from a .npy file that holds them and nothing else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its parser of headers is Python's own, with all of its errors
        raise refused(path, f"is no .npy file of numbers: {one_line(error)}") from error
    spec = TensorSpec(tuple(tensor.shape), "float32" if tensor.is_float else tensor.dtype)
    kind = np.dtype(spec.dtype).newbyteorder("<")
    shape = getattr(array, "shape", ())
    if not isinstance(array, np.memmap) or array.dtype != kind or shape[:1] != (samples,) or not spec.takes(shape[1:]):
        found = f"{getattr(array, 'dtype', type(array).__name__)} {list(shape)}"
        raise refused(path, f"holds {found}, not {spec} of {samples} samples")
    if path.stat().st_size != array.offset + array.nbytes or not array.flags.c_contiguous:
        raise refused(path, "has something behind its array, or another order than C's")
    if not np.isfinite(array).all():
        raise refused(path, "holds NaN or Inf")
    return array


def _labels(path: Path) -> list[str]:
    """The names of the classes, a line each."""
    try:
        lines = _limited(path, LARGEST_TEXT).decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise refused(path, f"is not UTF-8: {error}") from error
    if bad := next((line for line in lines if line != printable(line)[:LONGEST_LABEL]), None):
        raise refused(path, f"has a label with control signs, or an endless one: {bad[:50]!r}")
    return lines
