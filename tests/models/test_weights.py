from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polar_deploy import data, models
from polar_deploy.errors import ContentError, UsageError
from tests.shared import SHARED, cifar_split, needs_shared

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
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ContentError, match="holds Python objects beside tensors"):
        models.load_weights(network(), "w.pth")
    torch.save(network(), "whole.pt")
    with pytest.raises(ContentError, match="holds Python objects beside tensors"):
        models.load_weights(network(), "whole.pt")
    assert not Path("hacked").exists()


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
    model = models.build("resnet20", 10, 32)
    models.load_weights(model, SHARED / "models" / "resnet20.npz")
    pixels = data.normalise(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        guesses = model.eval()(torch.from_numpy(pixels)).argmax(1).numpy()
    assert (guesses == labels).mean() > 0.88


@needs_shared
def test_the_public_weights_of_another_depth_are_refused() -> None:
    message = r"resnet32.npz does not fit the network \(CifarResNet\): 60 unexpected: layer1.3.conv1.weight"
    with pytest.raises(ContentError, match=message):
        models.load_weights(models.build("resnet20", 10, 32), SHARED / "models" / "resnet32.npz")
