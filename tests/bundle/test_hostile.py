"""Damaged and hostile bundles: each refused with exit code 4 and one clear sentence, and nothing written anywhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import contents
from tests.support.bundle_commands import bundle, change, edit, manifest, put

Case = tuple[Callable[[Path], object], str]  # what is done to the bundle, and words of the answer
MODEL, GOLDEN = "compressed/model.onnx", "golden/compressed/logits.npy"
SHA = "0" * 64


def text(replace: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the manifest's text."""

    def function(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(replace(path.read_text()))

    return function


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def value(*keys: str | int, to: object) -> Callable[[Path], object]:
    return lambda folder: change(folder, *keys, to=to)


def renamed(old: str, new: str) -> Callable[[Path], object]:
    """The manifest names another path, everywhere."""
    return text(lambda content: content.replace(json.dumps(old), json.dumps(new)))


def model(function: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    """Change the compressed network."""

    def changed(folder: Path) -> None:
        network = onnx.load(folder / MODEL)
        function(network)
        put(folder, MODEL, network.SerializeToString())

    return changed


def array(content: Any, **options: Any) -> Callable[[Path], None]:
    """Another array in place of the golden outputs."""

    def changed(folder: Path) -> None:
        file = io.BytesIO()
        np.save(file, content(np.load(folder / GOLDEN)), **options)
        put(folder, GOLDEN, file.getvalue())

    return changed


def header(shape: str) -> Callable[[Path], None]:
    """Golden outputs whose header says another shape."""

    def changed(folder: Path) -> None:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
        put(folder, GOLDEN, b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(1280))

    return changed


def linked(name: str, target: str) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return changed


def link_to_a_folder(folder: Path) -> None:
    os.rename(folder / "golden", folder.parent / "elsewhere")
    (folder / "golden").symlink_to("../elsewhere")


def pipe(folder: Path) -> None:
    (folder / "labels.txt").unlink()
    os.mkfifo(folder / "labels.txt")


def flipped(folder: Path) -> None:
    content = bytearray((folder / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / MODEL).write_bytes(content)


def many_files(folder: Path) -> None:
    for index in range(200):
        (folder / f"file{index}").touch()


def external(network: onnx.ModelProto) -> None:
    tensor = network.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")


def external_in_a_constant(network: onnx.ModelProto) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    network.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def foreign(network: onnx.ModelProto) -> None:
    network.opset_import.add(domain="evil.ops", version=1)
    network.graph.node[0].domain = "evil.ops"


def undeclared(network: onnx.ModelProto) -> None:
    network.graph.node[0].domain = "evil.ops"


def branching(network: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    network.graph.node.append(helper.make_node("If", ["input"], ["x"], then_branch=inner, else_branch=inner))


def function(network: onnx.ModelProto) -> None:
    opset = helper.make_opsetid("", 18)
    network.functions.append(helper.make_function("", "F", ["x"], ["y"], [helper.make_node("Relu", "x", "y")], [opset]))


def strange_size(folder: Path) -> None:
    before, name, after = (folder / MODEL).read_bytes().rpartition(b"batch")
    put(folder, MODEL, before + b"\xfc" * len(name) + after)


def loud(network: onnx.ModelProto) -> None:
    network.graph.node[0].op_type = "\x1b[2J\x1b]0;owned\x07\u202e"


def doubled(folder: Path) -> None:
    """Weights in another type than the precision of the target."""
    network = onnx.load(folder / MODEL)
    for tensor in (each for each in network.graph.initializer if each.data_type == TensorProto.FLOAT):
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f2"), tensor.name))
    kinds = [each.type.tensor_type for each in (*network.graph.input, *network.graph.output)]
    cast = [
        helper.make_node("Cast", ["input"], ["half"], "down", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["wide"], ["logits"], "up", to=TensorProto.FLOAT),
    ]
    assert all(kind.elem_type == TensorProto.FLOAT for kind in kinds)
    for node in network.graph.node:
        node.input[:] = ["half" if name == "input" else name for name in node.input]
        node.output[:] = ["wide" if name == "logits" else name for name in node.output]
    nodes = [cast[0], *network.graph.node, cast[1]]
    del network.graph.node[:], network.graph.value_info[:]
    network.graph.node.extend(nodes)
    put(folder, MODEL, network.SerializeToString())


def chance(network: onnx.ModelProto) -> None:
    network.graph.node.append(helper.make_node("RandomNormal", [], ["noise"], shape=[1]))


def exchanged(folder: Path) -> None:
    """The full network as the compressed one, with its golden outputs: the speed-up would be the other way round."""

    def swap(document: Any) -> None:
        for group in (document["networks"], document["golden"]):
            group["full"], group["compressed"] = group["compressed"], group["full"]

    edit(folder, swap)


def reshaped(network: onnx.ModelProto) -> None:
    network.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


def two_inputs(network: onnx.ModelProto) -> None:
    network.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch"]))


def unconnected(network: onnx.ModelProto) -> None:
    network.graph.node[0].input[0] = "nowhere"


class Shell:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/polar_deploy_was_here",)


def unpickled(folder: Path) -> None:
    put(folder, GOLDEN, pickle.dumps(Shell()))


def twice(content: str) -> str:
    return content.replace('"schema": 2,', '"schema": 2, "schema": 2,', 1)


STRUCTURE: dict[str, Case] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "a file is missing": (lambda folder: (folder / MODEL).unlink(), "compressed/model.onnx is missing"),
    "a file too many": (lambda folder: (folder / "run.sh").touch(), "run.sh is not listed"),
    "a hidden file": (lambda folder: (folder / "golden/.x").touch(), ".x is not listed"),
    "too many files": (many_files, "more than 100 files"),
    "cut short": (lambda folder: os.truncate(folder / MODEL, 1000), "has 1,000 bytes, the manifest says"),
    "grown": (lambda folder: os.truncate(folder / MODEL, 10**6), "has 1,000,000 bytes"),
    "one bit flipped": (flipped, "has the sha256"),
    "another size": (value("files", MODEL, "bytes", to=7), "the manifest says 7"),
    "another hash": (value("files", MODEL, "sha256", to=SHA), "the manifest says 000000000000"),
    "a link out of the bundle": (linked(MODEL, "/etc/passwd"), "is a link"),
    "a link inside": (linked("labels.txt", "manifest.json"), "is a link"),
    "a dangling link": (linked("extra", "nowhere"), "is a link"),
    "the manifest is a link": (linked("manifest.json", "/etc/passwd"), "is a link"),
    "a folder is a link": (link_to_a_folder, "is a link"),
    "a pipe": (pipe, "a pipe"),
    "a folder in place of a file": (
        lambda folder: ((folder / MODEL).unlink(), (folder / MODEL).mkdir()),
        "model.onnx is missing",
    ),
}
JSON: dict[str, Case] = {
    "empty manifest": (raw(b""), "is not strict JSON"),
    "half a manifest": (text(lambda content: content[:500]), "is not strict JSON"),
    "not UTF-8": (raw(b'{"schema": "\xff"}'), "is not strict JSON"),
    "a list": (raw(b"[1, 2]"), "has no schema version"),
    "a number": (raw(b"7"), "has no schema version"),
    "nested without end": (raw(b"[" * 200_000), "is not strict JSON"),
    "oversize": (raw(b" " * (5 << 20)), "5,242,880 bytes, at most"),
    "a key twice": (text(twice), "'schema' is there twice"),
    "NaN": (text(lambda c: c.replace('"drop": ', '"drop": NaN, "x": ', 1)), "NaN is no number"),
    "Infinity": (text(lambda c: c.replace('"drop": ', '"drop": -Infinity, "x": ', 1)), "-Infinity is no number"),
    "beyond a float": (text(lambda c: c.replace('"drop": ', '"drop": 1e999, "x": ', 1)), "1e999 is too large"),
    "an endless number": (text(lambda c: c.replace('"macs": ', '"macs": ' + "9" * 5000, 1)), "not strict JSON"),
    "a later version": (value("schema", to=3), "schema version 3, written by a later polar_deploy"),
    "no version": (lambda folder: edit(folder, lambda d: d.pop("schema")), "has no schema version"),
    "version 0": (value("schema", to=0), "has no schema version"),
    "version true": (value("schema", to=True), "has no schema version"),
    "version as text": (value("schema", to="1"), "has no schema version"),
    "version 1.0": (value("schema", to=1.0), "has no schema version"),
}
FIELDS: dict[str, Case] = {
    "an unknown field": (value("run", to="rm -rf /"), "run: Extra inputs are not permitted"),
    "an unknown field inside": (value("networks", "compressed", "hook", to="x"), "networks.compressed.hook"),
    "an unknown field of a file": (value("files", MODEL, "url", to="x"), f"files.{MODEL}.url"),
    "an unknown build option": (value("build", "plugin", to="x.so"), "build.plugin"),
    "a missing field": (lambda folder: edit(folder, lambda d: d.pop("golden")), "golden: Field required"),
    "another kind": (value("kind", to="zip"), "kind"),
    "an absolute path": (renamed("labels.txt", "/etc/passwd"), "labels"),
    "a path out of the bundle": (renamed("labels.txt", "../labels.txt"), "labels"),
    "a path back in": (renamed("labels.txt", "golden/../labels.txt"), "labels"),
    "a hidden path": (renamed("labels.txt", ".ssh/id"), "labels"),
    "a backslash": (renamed("labels.txt", "golden\\labels.txt"), "labels"),
    "a path that is an option": (renamed("labels.txt", "--help"), "labels"),
    "a deep path": (renamed("labels.txt", "a/b/c/d/e"), "labels"),
    "names that differ in capitals": (
        value("files", "LABELS.txt", to={"bytes": 0, "sha256": SHA}),
        "files lists LABELS.txt, which nothing else names",
    ),
    "named, not listed": (lambda folder: edit(folder, lambda d: d["files"].pop(MODEL)), f"{MODEL} is named but not"),
    "a negative size": (value("files", MODEL, "bytes", to=-1), "greater than or equal to 0"),
    "a size as text": (value("files", MODEL, "bytes", to="12"), "valid integer"),
    "a short hash": (value("files", MODEL, "sha256", to="abc"), "should match pattern"),
    "control signs": (value("licence", to="\x1b[2J\x1b]0;owned\x07"), "licence"),
    "writing turned round": (value("provenance", "model", to="\u202egpj.exe"), "provenance.model"),
    "accuracy above 100 %": (value("metrics", "accuracy", "full", to=101), "contradicts its interval"),
    "accuracies above 100 % that agree": (
        lambda folder: edit(
            folder,
            lambda d: d["metrics"]["accuracy"].update(full=101.0, compressed=101.0, drop=0.0, interval=[-1.0, 1.0]),
        ),
        "accuracies are 101.0 % and 101.0 %",
    ),
    "accuracy as text": (value("metrics", "accuracy", "full", to="NaN"), "valid number"),
    "std 0": (value("preprocessing", "std", to=[0, 1, 1]), "greater than 0"),
    "a crop outside of the picture": (value("preprocessing", "crop", to=999), "does not lie in a picture"),
    "another input": (value("inputs", 0, "shape", to=[3, 8, 8]), "pre-processing gives"),
    "few golden samples": (value("golden", "samples", to=31), "greater than or equal to 32"),
    "endless golden samples": (value("golden", "samples", to=10**9), "less than or equal to 1024"),
    "an unknown target": (value("target", to="tpu-fp4"), "unknown target 'tpu-fp4'"),
    "another precision": (value("target", to="ort-int8"), "is in fp32, the target is ort-int8"),
    "a target without its plan": (value("target", to="trt-fp32"), "has a plan of None, the target is trt-fp32"),
    "an endless batch": (
        lambda folder: edit(
            folder,
            lambda d: (d["verdict"]["asked"].update(batch=10**9), d["build"].update(batches=[1, 8, 10**9])),
        ),
        "latency is asked at batch 1000000000",
    ),
    "a batch that no engine takes": (value("verdict", "asked", "batch", to=65), "asked at batch 65"),
    "a verdict of fail": (value("verdict", "overall", "result", to="fail"), "verdict.overall.result"),
    "another scale": (value("preprocessing", "scale", to=0.5), "the scale is 0.5, not 1 / 255"),
    "an endless picture": (value("preprocessing", "shorter_side", to=10**6), "less than or equal to 4096"),
    "a drop that contradicts its interval": (value("metrics", "accuracy", "interval", to=[90, -90]), "contradicts"),
    "a drop that contradicts the accuracies": (value("metrics", "accuracy", "full", to=100), "contradicts"),
    "TF32 for a wide tolerance": (value("build", "tf32", to=True), "disagree about TF32"),
    "networks exchanged": (exchanged, "the compressed network is larger than the full one"),
    "batches that descend": (value("build", "batches", to=[8, 4, 1]), "do not ascend"),
    "a full network without golden outputs": (value("golden", "full", to=None), "which nothing else names"),
}
CONTENT: dict[str, Case] = {
    "no ONNX": (lambda folder: put(folder, MODEL, b"MZ" * 5000), "model.onnx is not valid ONNX"),
    "the full network in the compressed one's place": (
        lambda folder: put(folder, MODEL, (folder / "full/model.onnx").read_bytes()),
        "440,304 MACs and 16,534 parameters, the manifest says",
    ),
    "a name that is not UTF-8": (
        lambda folder: put(folder, MODEL, (folder / MODEL).read_bytes().replace(b"logits", b"log\xfcts")),
        "is not valid ONNX",
    ),
    "a size that is not UTF-8": (strange_size, "is not valid ONNX"),
    "control signs in a node": (model(loud), "is not valid ONNX"),
    "a training graph": (model(lambda network: network.training_info.add()), "has a training graph"),
    "FP16 weights in the place of FP32": (doubled, "has no weights or Q/DQ in fp32"),
    "layers that are no JSON": (
        lambda folder: put(folder, "engines/full.layers.json", b"\x7fELF" * 100),
        "full.layers.json is not strict JSON",
    ),
    "a report of surgery with NaN": (lambda f: put(f, "compressed/surgery.json", b'{"a": NaN}'), "NaN is no number"),
    "endless labels": (lambda folder: put(folder, "labels.txt", b"a\n" * 3_000_000), "at most 4,194,304 are allowed"),
    "chance": (model(chance), "which is random"),
    "an empty graph": (lambda folder: put(folder, MODEL, b""), "model.onnx"),
    "external data": (model(external), "in another file"),
    "external data in a node": (model(external_in_a_constant), "in another file"),
    "operators of somebody else": (model(foreign), "asks for operators of 'evil.ops'"),
    "an undeclared operator": (model(undeclared), "an operator of 'evil.ops'"),
    "a branch": (model(branching), "(If) with a graph of its own"),
    "a function": (model(function), "defines a function, 'F'"),
    "sparse weights": (
        model(lambda network: network.graph.sparse_initializer.add(dims=[1])),
        "has sparse weights",
    ),
    "another shape": (model(reshaped), "has the inputs and outputs"),
    "two inputs": (model(two_inputs), "has the inputs and outputs"),
    "a graph that is not connected": (model(unconnected), "is not valid ONNX"),
    "a pickle": (unpickled, "is no .npy file of numbers"),
    "objects in an array": (array(lambda a: np.array([Shell()], object), allow_pickle=True), "is no .npy file"),
    "float64": (array(lambda a: a.astype(np.float64)), "holds float64"),
    "another number of samples": (array(lambda a: a[:-1]), "holds float32 [31, 10]"),
    "NaN in golden outputs": (array(lambda a: np.full_like(a, np.nan)), "holds NaN or Inf"),
    "Fortran's order": (array(np.asfortranarray), "another order"),
    "an array cut short": (lambda f: put(f, GOLDEN, (f / GOLDEN).read_bytes()[:-4]), "is no .npy file of numbers"),
    "a .zip as array": (lambda folder: put(folder, GOLDEN, b"PK\x03\x04" + b"\0" * 99), "is no .npy file"),
    "an endless array": (header("(100000000000000000000000, 10)"), "is no .npy file"),
    "a negative array": (header("(-32, 10)"), "golden/compressed/logits.npy"),
    "an open bracket": (header("((((32, 10)"), "is no .npy file"),
    "an endless sum": (header("(" + "1+" * 4000 + "1,)"), "golden/compressed/logits.npy"),
    "an endless sign": (header("(" + "-" * 9000 + "1,)"), "golden/compressed/logits.npy"),
    "something behind an array": (lambda f: put(f, GOLDEN, (f / GOLDEN).read_bytes() + b"MZ"), "something behind"),
    "a label too few": (lambda folder: put(folder, "labels.txt", b"a\nb\n"), "has 2 labels, the networks have 10"),
    "control signs in a label": (lambda f: put(f, "labels.txt", b"\x1b[2J\n" + b"a\n" * 9), "control signs"),
    "an endless label": (lambda folder: put(folder, "labels.txt", b"a" * 9999 + b"\nb" * 9), "endless"),
    "labels not UTF-8": (lambda folder: put(folder, "labels.txt", b"\xff\n" * 10), "is not UTF-8"),
}
CASES = STRUCTURE | JSON | FIELDS | CONTENT


def test_there_are_enough_of_them() -> None:
    assert len(CASES) + len(ARCHIVES) >= 60 + 10


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go: it shall be empty again."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def refused(path: Path, words: str, scratch: Path) -> None:
    """Exit code 4, one error with these words, and all files are as before."""
    before = everything(path.parent)
    outcome = bundle("verify", path, "--no-timing")
    assert outcome.code == 4, outcome.out + outcome.err
    assert words in outcome.err
    assert outcome.out == ""
    first, todo = outcome.err.splitlines()
    assert first.startswith("error: ")
    assert todo.startswith("  what to do: ")
    assert len(first) < 5000
    assert "\x1b" not in first
    assert everything(path.parent) == before
    assert list(scratch.iterdir()) == []


def everything(place: Path) -> dict[str, str]:
    """Every file by its hash, and everything that is no file by its kind."""
    odd = [path for path in place.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    kinds = {str(path): str(stat.S_IFMT(path.lstat().st_mode)) for path in odd}
    return contents(place) | kinds


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused(case: str, folder: Path, scratch: Path) -> None:
    spoil, words = CASES[case]
    spoil(folder)
    refused(folder, words, scratch)


# --------------------------------------------------------------------------- archives


def zipped(
    folder: Path, extra: dict[str, bytes] | None = None, kind: int = zipfile.ZIP_STORED, mode: int = stat.S_IFREG
) -> Path:
    """The bundle as a .zip, and what somebody puts into it."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ["manifest.json", *manifest(folder)["files"]]:
            archive.write(folder / name, name)
        for name, content in (extra or {}).items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (mode | 0o777) << 16
            member.compress_type = kind
            archive.writestr(member, content)
    return path


def archive_twice(folder: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zipped(folder, {"labels.txt": b"x"})


def patched(old: bytes, new: bytes) -> Callable[[Path], Path]:
    """Bytes of the .zip changed."""

    def function(folder: Path) -> Path:
        path = zipped(folder)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        return path

    return function


def cut(folder: Path) -> Path:
    path = zipped(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def no_zip(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    path.write_bytes(b"PK\x03\x04 but no more")
    return path


def lying(folder: Path) -> Path:
    """The directory says that a member is larger than the whole archive."""
    path = zipped(folder, {"x": b"0123456789" * 10})
    content = bytearray(path.read_bytes())
    entry = content.rfind(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (10**9).to_bytes(4, "little") * 2
    path.write_bytes(content)
    return path


def before_itself(folder: Path) -> Path:
    """The directory of the archive begins before the file does."""
    path = zipped(folder)
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    content[end + 16 : end + 20] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    return path


ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no .zip": (no_zip, "is no .zip archive"),
    "cut short": (cut, "is no .zip archive"),
    "a path out of it": (lambda f: zipped(f, {"../../escaped": b"x"}), "a member with the name '../../escaped'"),
    "an absolute path": (lambda f: zipped(f, {"/tmp/escaped": b"x"}), "a member with the name '/tmp/escaped'"),
    "a link": (lambda f: zipped(f, {"link": b"/etc/passwd"}, mode=stat.S_IFLNK), "which is no plain file"),
    "a name twice": (archive_twice, "'labels.txt' twice"),
    "a bomb": (lambda f: zipped(f, {"x": bytes(10**8)}, kind=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "a member before the beginning": (before_itself, "is no .zip archive, or damaged"),
    "a member larger than all": (lying, "would unpack to"),
    "a file that is a folder, too": (lambda f: zipped(f, {"labels.txt/x": b"x"}), "both as a file and a folder"),
    "too many members": (lambda f: zipped(f, {f"x{i}": b"" for i in range(200)}), "a bundle has at most"),
    "a folder": (lambda f: zipped(f, {"empty/": b""}), "a member with the name 'empty/'"),
    "changed after it was zipped": (patched(b"polar_deploy.bundle", b"polar_deploy.bungle"), "Bad CRC-32"),
    "a file too many": (lambda f: zipped(f, {"run.sh": b"x"}), ".zip/run.sh is not listed"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_refused(case: str, folder: Path, scratch: Path) -> None:
    spoil, words = ARCHIVES[case]
    refused(spoil(folder), words, scratch)
    assert not (folder.parents[1] / "escaped").exists()
    assert not Path("/tmp/escaped").exists()


def test_the_bundle_itself_is_not_refused(folder: Path, scratch: Path) -> None:
    for path in (folder, zipped(folder)):
        outcome = bundle("verify", path, "--no-timing")
        assert outcome.code == 0, outcome.err
    assert list(scratch.iterdir()) == []


def test_nothing_was_unpickled() -> None:
    assert not Path("/tmp/polar_deploy_was_here").exists()
