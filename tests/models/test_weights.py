from __future__ import annotations

import argparse
import collections
import datetime
import enum
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from polar_deploy import data, models
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.models import unpickling
from polar_deploy.tasks.classification import classifier
from tests.support.shared import SHARED, cifar_split, needs_shared

torch.set_num_threads(1)
State = dict[str, Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.fixture
def state() -> State:
    torch.manual_seed(5)
    return {
        name: torch.rand_like(value) if value.dim() else value + 9 for name, value in network().state_dict().items()
    }


def save(state: object, path: Path) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    elif path.suffix == ".safetensors":
        models.save_weights(state, path)
    else:
        torch.save(state, path)
    return path


def same(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth", ".pt"])
def test_every_format_fills_the_network(tmp_path: Path, state: State, suffix: str) -> None:
    model = network()
    models.load_weights(model, save(state, tmp_path / f"w{suffix}"))
    assert same(model, state)


def test_a_network_is_saved_with_its_buffers(tmp_path: Path, state: State) -> None:
    model, other = network(), network()
    model.load_state_dict(state)
    models.save_weights(model, tmp_path / "w.safetensors")
    models.load_weights(other, tmp_path / "w.safetensors")
    assert same(other, state)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = torch.arange(6.0).reshape(2, 3)
    models.save_weights({"a": base, "b": base, "c": base.T}, tmp_path / "w.safetensors")
    stored = load_file(tmp_path / "w.safetensors")
    assert torch.equal(stored["b"], base)
    assert torch.equal(stored["c"], base.T)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "best_prec1": 91.7},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
        lambda state: {name: value.double() if value.dim() else value for name, value in state.items()},
    ],
)
def test_checkpoints_are_unwrapped(tmp_path: Path, state: State, wrap: Callable[[State], object]) -> None:
    model = network()
    model.get_submodule("1").num_batches_tracked.fill_(9)
    models.load_weights(model, save(wrap(state), tmp_path / "w.pth"))
    assert same(model, state)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def filled(state: State) -> nn.Sequential:
    model = network()
    model.load_state_dict(state)
    assert isinstance(model, nn.Sequential)
    return model


def compiled_within(state: State) -> object:
    model = filled(state)
    model[1] = torch.compile(model[1])
    return model.state_dict()


class Config(dict):
    """A configuration as many libraries have it: a dictionary with attributes, and a class within."""

    class Mode(enum.Enum):
        FAST = 1

    def __init__(self) -> None:
        super().__init__(lr=0.1, seen={3}, mode=Config.Mode.FAST)
        self.path = Path("x")


def config_with(state: State) -> Config:
    config = Config()
    config["model"] = state
    return config


def objects() -> dict[str, object]:
    return {
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "config": Config(),
        "best": np.float64(91.2),
        "history": np.arange(3),
        "when": datetime.datetime(2024, 1, 2),
        "per_class": collections.defaultdict(list, {"cat": [1]}),
        "last": collections.deque([1, 2]),
        "rng": np.random.default_rng(0).bit_generator.state,
        "dtype": torch.float16,
    }


TAKEN: dict[str, Callable[[State], object]] = {
    "compile": lambda s: torch.compile(filled(s)).state_dict(),
    "compile of one module": compiled_within,
    "DataParallel of one module": lambda s: {n.replace("1.", "1.module."): v for n, v in s.items()},
    "DDP of compile": lambda s: nn.DataParallel(torch.compile(filled(s))).state_dict(),
    "compile of DDP": lambda s: torch.compile(nn.DataParallel(filled(s))).state_dict(),
    "FSDP": lambda s: {f"_fsdp_wrapped_module.{n.replace('3.', '3._fsdp_wrapped_module.')}": v for n, v in s.items()},
    "AveragedModel": lambda s: AveragedModel(filled(s)).state_dict(),
    "AveragedModel of compile": lambda s: AveragedModel(torch.compile(filled(s))).state_dict(),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3, "loops": {}, "optimizer_states": [{}]},
    "Lightning, compiled": lambda s: {"state_dict": prefixed(s, "net._orig_mod.")},
    "Lightning, two prefixes": lambda s: {"state_dict": prefixed(s, "module.network.backbone.")},
    "Lightning with more": lambda s: {
        "state_dict": prefixed(s, "net.") | {"criterion.weight": torch.ones(2), "acc.total": torch.tensor(3), "x": 1},
    },
    "net": lambda s: {"net": s, "acc": 95.0},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"exp_avg": s}}}},
    "a name of their own": lambda s: {"checkpoint": {"student": s}},
    "objects": lambda s: {"model": s, **objects()},
    "objects that hold the weights": lambda s: config_with(s),
    "half": lambda s: {n: v.half() if v.dim() else v for n, v in s.items()},
    "all half": lambda s: {name: value.half() for name, value in s.items()},
    "parameters": lambda s: {
        "net": {name: nn.Parameter(value) if value.is_floating_point() else value for name, value in s.items()},
        "args": Config(),
    },
    "only averaged": lambda s: {"ema": s, "decay": 0.99},
    "plain and averaged": lambda s: {"model_ema": other(s), "state_dict_ema": other(s), "state_dict": s},
    "plain and averaged names": lambda s: prefixed(other(s), "ema_model.") | prefixed(s, "online_model."),
    "twice the same": lambda s: {"model": s, "best": {n: v.clone() for n, v in s.items()}},
}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
@pytest.mark.parametrize("case", TAKEN)
def test_what_training_tools_write_is_taken(
    tmp_path: Path, state: State, case: str, options: dict[str, object]
) -> None:
    state = {name: value.half().float() if value.dim() else value for name, value in state.items()}
    torch.save(TAKEN[case](state), tmp_path / "w.pth", **options)
    model = network()
    models.load_weights(model, tmp_path / "w.pth")
    assert same(model, state)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".th", ".pth.tar", ".tar", ".PTH", ".CKPT"])
def test_other_suffixes_of_pytorch_files(tmp_path: Path, state: State, suffix: str) -> None:
    model = network()
    torch.save({"state_dict": state}, tmp_path / f"w{suffix}")
    models.load_weights(model, tmp_path / f"w{suffix}")
    assert same(model, state)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_wrapped_names_in_other_formats(tmp_path: Path, state: State, suffix: str) -> None:
    model = network()
    models.load_weights(model, save(prefixed(state, "model._orig_mod."), tmp_path / f"w{suffix}"))
    assert same(model, state)


def test_a_network_that_has_such_names_itself(tmp_path: Path, state: State) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = network(), nn.Linear(2, 2)

    torch.manual_seed(1)
    trained, model = Own(), Own()
    expected = {name: value.clone() for name, value in trained.state_dict().items()}
    for wrapped in (trained, nn.DataParallel(trained), torch.compile(trained), AveragedModel(trained)):
        model.load_state_dict(Own().state_dict())
        models.load_weights(model, save(wrapped.state_dict(), tmp_path / "w.pth"))
        assert same(model, expected)


def circle() -> dict[str, object]:
    stored: dict[str, object] = {}
    stored["model"] = stored
    return stored


MISFITS: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (
        lambda s: {n: v for n, v in s.items() if n != "0.weight"},
        r"w.pth does not fit the network \(Sequential\): 1 missing: 0.weight \[4, 3, 3, 3\]",
    ),
    "many missing": (lambda s: {"0.bias": s["0.bias"]}, r"7 missing: 0.weight \[4, 3, 3, 3\], .*, …"),
    "unexpected": (lambda s: s | {"4.bias": torch.zeros(5)}, r"1 unexpected: 4.bias \[5\]"),
    "shape": (
        lambda s: s | {"3.weight": torch.zeros(100, 4)},
        r"1 of another shape: 3.weight \[100, 4\] in the file, \[2, 4\] in the network",
    ),
    "type": (lambda s: s | {"3.bias": torch.zeros(2, dtype=torch.int8)}, "1 of another type: 3.bias torch.int8"),
    "complex": (lambda s: s | {"3.bias": torch.zeros(2, dtype=torch.cfloat)}, "3.bias torch.complex64"),
    "nan": (lambda s: s | {"3.bias": torch.tensor([0, float("nan")])}, "1 with NaN or Inf: 3.bias"),
    "inf": (lambda s: s | {"1.running_var": torch.full((4,), float("inf"))}, "1 with NaN or Inf: 1.running_var"),
    "too large": (lambda s: s | {"3.bias": torch.full((2,), 1e300, dtype=torch.double)}, "1 with NaN or Inf: 3.bias"),
    "no tensor": (lambda s: s | {"lr": 0.1}, "'lr' is a float, not a plain tensor"),
    "sparse": (lambda s: s | {"3.weight": s["3.weight"].to_sparse()}, "'3.weight' is a Tensor, not a plain tensor"),
    "meta": (lambda s: s | {"3.weight": torch.zeros(2, 4, device="meta")}, "not a plain tensor"),
    "some names of DataParallel": (
        lambda s: {n.replace("0.", "module.0."): v for n, v in s.items()},
        r"w.pth does not fit the network \(Sequential\): 2 missing: 0.weight .*; 2 unexpected: module.0.weight",
    ),
    "both names": (lambda s: s | prefixed(s, "module."), "9 unexpected: module.0.weight"),
    "more under the prefix": (
        lambda s: {"state_dict": prefixed(s, "net.") | {"net.4.bias": torch.zeros(5), "loss.weight": torch.zeros(2)}},
        r"w.pth \(entry 'state_dict' with names that start with 'net.'\) does not fit .*: 1 unexpected: 4.bias \[5\]\n",
    ),
    "less under the prefix": (
        lambda s: prefixed(s, "net.") | {"net.3.bias": torch.zeros(7)},
        r"\(names that start with 'net.'\) does not fit .*: 1 of another shape: 3.bias",
    ),
    "an object among the weights": (lambda s: s | {"args": argparse.Namespace()}, "'args' is a Namespace, not a plain"),
    "two that fit": (
        lambda s: {"state_dict": s, "best_state_dict": other(s), "ema": s},
        r"2 different sets of weights that fit .*\(Sequential\): entry 'state_dict'; entry 'best_state_dict'\n",
    ),
    "two prefixes that fit": (
        lambda s: prefixed(s, "student.") | prefixed(other(s), "teacher."),
        r"2 different sets .*: names that start with 'student.'; names that start with 'teacher.'\n",
    ),
    "none that fits": (
        lambda s: {"encoder": {"a.weight": torch.ones(2)}, "more": {"decoder": {"b": torch.ones(2)}}},
        r"tensors in 2 entries, of which none fits .*: entry 'encoder' \(1\), entry 'more.decoder' \(1\)\n",
    ),
    "one entry that does not fit": (
        lambda s: {"net": {"a": torch.ones(2)}},
        r"\(entry 'net'\) does not fit .* missing",
    ),
    "plain with NaN, averaged without": (
        lambda s: {"model": s | {"3.bias": torch.tensor([0, float("nan")])}, "ema": s},
        r"\(entry 'model'\) does not fit .* 1 with NaN or Inf: 3.bias",
    ),
    "a whole network": (
        lambda s: filled(s),
        r"could run code: a whole pickled network \(torch.nn.modules.container.Sequential\)\n",
    ),
    "a whole network in an entry": (
        lambda s: {"epoch": 3, "model": filled(s)},
        r"w.pth, entry 'model' holds .* a whole pickled network \(torch.nn.modules.container.Sequential\)\n",
    ),
    "a whole object": (lambda s: argparse.Namespace(model=s), r"a whole pickled object \(argparse.Namespace\)\n"),
    "circle": (lambda s: circle(), "'model' is a dict, not a plain tensor"),
    "no dictionary": (lambda s: list(s.values()), "holds no weights by name"),
    "nothing": (lambda s: {"state_dict": {}}, "holds no weights by name"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, state: State, case: str) -> None:
    make, message = MISFITS[case]
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ContentError, match=message):
        models.load_weights(model, save(make(state), tmp_path / "w.pth"))
    assert same(model, before)


@pytest.mark.parametrize("array", [np.array(["text"]), np.zeros(2, ">f4"), np.zeros(2, np.longdouble)])
def test_arrays_of_foreign_types_are_named(tmp_path: Path, array: np.ndarray) -> None:
    np.savez(tmp_path / "w.npz", **{"0.weight": array})
    with pytest.raises(ContentError, match=r"'0\.weight' is .*, which PyTorch does not know"):
        models.load_weights(network(), tmp_path / "w.npz")


class Hostile:
    def __init__(self, function: Callable[..., object] = os.system, *arguments: object) -> None:
        self.call = function, arguments or ("touch hacked",)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call  # type: ignore[return-value]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ContentError, match="holds Python objects beside tensors"):
        models.load_weights(network(), "w.pth")
    torch.save(network(), "whole.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ContentError, match="holds Python objects beside tensors"):
        models.load_weights(network(), "whole.pt")
    assert not Path("hacked").exists()


HOSTILE: dict[str, object] = {
    "shell": Hostile(),
    "process": Hostile(subprocess.Popen, ["touch", "hacked"]),
    "eval": Hostile(eval, "open('hacked', 'w')"),
    "exec": Hostile(exec, "open('hacked', 'w')"),
    "open": Hostile(open, "hacked", "w"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_beside_good_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, case: str, legacy: bool
) -> None:
    """The weights fit, and objects that are harmless lie beside them too."""
    monkeypatch.chdir(tmp_path)
    stored = {"model": state, "args": argparse.Namespace(), "extra": HOSTILE[case]}
    torch.save(stored, "w.pth", _use_new_zipfile_serialization=not legacy)
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ContentError, match=r"beside tensors, and .* could run code; nothing of it was run") as error:
        models.load_weights(model, "w.pth")
    assert "\n" not in error.value.what
    assert same(model, before)
    assert not Path("hacked").exists()


def unknown_call(*_: object) -> None:
    Path("hacked").touch()


def test_functions_nobody_knows_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, "extra": Hostile(unknown_call, 1)}, "w.pth")
    model = network()
    models.load_weights(model, "w.pth")
    assert same(model, state)
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}(X\x01\x00\x00\x00aK\x01ub.",  # sets an attribute of a function
        b"ccollections\nOrderedDict\nN}(X\x01\x00\x00\x00aK\x01u\x86b.",  # of a class
        b"cunknown\nThing\nN}(X\x0c\x00\x00\x00__setstate__K\x01u\x86b0I1\n.",  # of a class that is not known
    ],
)
def test_a_pickle_changes_nothing_of_ours(tmp_path: Path, opcodes: bytes) -> None:
    with pytest.raises(ContentError, match=r"w\.pth"):
        models.load_weights(network(), rewritten(tmp_path / "w.pth", opcodes))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "a")
    assert not hasattr(collections.OrderedDict, "a")
    assert callable(unpickling.Inert.__setstate__)


def rewritten(path: Path, opcodes: bytes) -> Path:
    """A PyTorch file whose pickle is `opcodes`."""
    import zipfile

    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, b"\x80\x02" + opcodes if name.endswith("data.pkl") else value)
    return path


def test_the_source_code_in_an_old_file_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch compares it with the code here, and writes a patch where the class asks for one."""
    monkeypatch.chdir(tmp_path)

    class Pickler(pickle.Pickler):
        def persistent_id(self, saved: object) -> object:
            return ("module", Hostile, "code.py", "other code") if saved == "here" else None

    monkeypatch.setattr(Hostile, "dump_patches", True, raising=False)
    with open("w.pth", "wb") as file:
        for value in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump({"args": argparse.Namespace(), "code": "here"})
        pickle.dump([], file, protocol=2)
    with pytest.raises(ContentError, match="holds no weights by name"):
        models.load_weights(network(), "w.pth")
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_archive_of_code_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(network().eval(), torch.zeros(1, 3, 3, 3)), tmp_path / "w.pt")
    with pytest.raises(ContentError, match="is a TorchScript archive, which holds code"):
        models.load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, state: State, suffix: str, share: float) -> None:
    path = save(state, tmp_path / f"w{suffix}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ContentError, match=str(path)) as error:
        models.load_weights(network(), path)
    assert "\n" not in error.value.what


def test_paths_that_are_no_weights(tmp_path: Path, state: State) -> None:
    (tmp_path / "folder.pth").mkdir()
    for name, message in (
        ("absent.npz", "does not exist|do not exist"),
        ("folder.pth", "not a file"),
        ("w.onnx", "no kind of weights file"),
        ("w", "no kind of weights file"),
    ):
        with pytest.raises(UsageError, match=message):
            models.load_weights(network(), tmp_path / name)


@needs_shared
def test_the_public_resnet20_scores_what_it_should() -> None:
    """91.73 % on the whole test set; these are the first 50 images of each class."""
    images, labels = cifar_split("cifar10", "test", limit=500)
    model = models.build("resnet20", classifier(10, 32))
    models.load_weights(model, SHARED / "models" / "resnet20.npz")
    pixels = data.normalise(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        guesses = model.eval()(torch.from_numpy(pixels)).argmax(1).numpy()
    assert (guesses == labels).mean() > 0.88


@needs_shared
def test_the_public_weights_of_another_depth_are_refused() -> None:
    message = r"resnet32.npz does not fit the network \(CifarResNet\): 60 unexpected: layer1.3.conv1.weight"
    with pytest.raises(ContentError, match=message):
        models.load_weights(models.build("resnet20", classifier(10, 32)), SHARED / "models" / "resnet32.npz")
