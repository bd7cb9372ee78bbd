"""The user's own task: what is wrong with it is answered with what would be right, before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from polar_deploy import models, tasks
from polar_deploy.config import Settings
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.tasks import Data, InMemory, Samples, Task, TensorSpec, losses, own
from tests.support import own_tasks

CODE = """
from dataclasses import replace
from polar_deploy.tasks import TensorSpec
from tests.support.own_tasks import tones

def right(data_dir): return tones()
def nothing(data_dir=None): return None
def no_arguments(): return tones()
def fails(data_dir): raise KeyError("depth")
def loss_of_one(data_dir): return replace(tones(), loss=lambda outputs: 0)
def loss_of_three(data_dir): return replace(tones(), loss=lambda outputs, batch, extra: 0)
def distill_by_name(data_dir): return replace(tones(), distill=lambda outputs, *, teacher: 0)
def no_function(data_dir): return replace(tones(), loss=3)
def data_itself(data_dir): return replace(tones(), data=tones().data())
def data_of_one(data_dir): return replace(tones(), data=lambda data_dir: None)
def bare_shape(data_dir): return replace(tones(), inputs={"sound": (1, 256)})
def no_inputs(data_dir): return replace(tones(), inputs={})
def open_input(data_dir): return replace(tones(), inputs={"sound": TensorSpec((1, None))})
def odd_name(data_dir): return replace(tones(), inputs={"the sound": TensorSpec((1, 256))})
def odd_metric(data_dir): return replace(tones(), metric="accuracy")
"""
WRONG = {
    "nothing": "returned a NoneType, not a Task",
    "no_arguments": r"cannot be called with data_dir: .*\n.*def no_arguments\(data_dir\):",
    "fails": r"line \d+: KeyError: 'depth'",
    "loss_of_one": r"loss is defined with \(outputs\), .*\n.*define it as `def loss\(outputs, batch\):`",
    "loss_of_three": r"loss is defined with \(outputs, batch, extra\), .*\n.*`def loss\(outputs, batch\):`",
    "distill_by_name": r"\n.*`def distill\(outputs, teacher\):`",
    "no_function": "loss is a int, not a function",
    "data_itself": r"data is a Data, not a function\n.*`def data\(\):`",
    "data_of_one": r"data is defined with \(data_dir\).*\n.*`def data\(\):`",
    "bare_shape": "inputs: sound is a tuple, not a TensorSpec",
    "no_inputs": "inputs is a dict, and no dictionary of one or more",
    "open_input": r"inputs: sound has the shape \[1, None\]",
    "odd_name": "inputs has the name 'the sound'",
    "odd_metric": "metric is a str, not a Metric",
}


@pytest.fixture
def _code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_task.py").write_text(CODE)
    own.load.cache_clear()
    yield
    own.load.cache_clear()
    sys.modules.pop("own_task", None)


@pytest.mark.usefixtures("_code")
def test_a_task_of_the_users_own_brings_its_defaults(tmp_path: Path) -> None:
    settings = Settings(model="x", task="own_task:right")
    found = tasks.defaults(settings)
    assert (found.data, found.epochs, found.batch_size) == ("own_task:right", 4, 32)
    assert (found.input_size, found.normalize) == (None, None)
    assert tasks.data_name(settings) == "own_task:right"


@pytest.mark.usefixtures("_code")
@pytest.mark.parametrize("function", WRONG)
def test_what_is_wrong_is_answered_with_what_is_right(function: str) -> None:
    with pytest.raises(ContentError, match=WRONG[function]):
        tasks.defaults(Settings(model="x", task=f"own_task:{function}"))


@pytest.mark.usefixtures("_code")
def test_a_task_that_brings_its_data_takes_no_other() -> None:
    with pytest.raises(UsageError, match="brings its own data, but 'digits' is given"):
        tasks.defaults(Settings(model="x", task="own_task:right", data="digits"))


def test_an_unknown_task_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="no task called 'clasification'") as error:
        tasks.defaults(Settings(model="x", task="clasification"))
    assert "classification" in error.value.todo


# --------------------------------------------------------------------------- networks


class Gives(nn.Module):
    """Gives what it is told to."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, signal: torch.Tensor, sensor: torch.Tensor) -> object:
        return self.result


HEIGHT, GUESS = torch.zeros(2, 1), torch.zeros(2, 4)


@pytest.mark.parametrize("result", [(HEIGHT, GUESS), [HEIGHT, GUESS], {"guess": GUESS, "height": HEIGHT}])
def test_outputs_go_by_place_or_by_name(result: object) -> None:
    found = own_tasks.heights().forward(Gives(result), {"signal": HEIGHT, "sensor": HEIGHT})
    assert {name: tuple(value.shape) for name, value in found.items()} == {"height": (2, 1), "guess": (2, 4)}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (HEIGHT, "returns one output, the task heights has 2: height, guess"),
        ((HEIGHT, GUESS, GUESS), "returns 3 outputs"),
        ({"height": HEIGHT, "odd": GUESS}, "returns a dictionary of height, odd"),
        ((GUESS, HEIGHT), r"answers 2 samples with float32 \[B, 4\] for height, not with float32 \[B, 1\]"),
        ((HEIGHT, GUESS.int()), r"int32 \[B, 4\] for guess, not with float32 \[B, 4\]"),
        ((HEIGHT, GUESS[:1]), r"answers 2 samples with \[1, 4\] for guess"),
        ((HEIGHT, "x"), "answers 2 samples with str for guess"),
    ],
)
def test_a_network_that_gives_something_else_is_refused(
    result: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_tasks, "surveyor", lambda: Gives(result))
    with pytest.raises(ContentError, match=message):
        models.build("tests.support.own_tasks:surveyor", own_tasks.heights())


def test_a_network_by_name_is_for_its_own_task() -> None:
    with pytest.raises(UsageError, match="resnet56 is a classifier, and the task is heights"):
        models.build("resnet56", own_tasks.heights())


def test_a_network_is_told_its_classes_where_there_are_any() -> None:
    assert models.build("tests.support.own_tasks:listener", own_tasks.tones()).head.out_features == 3
    with pytest.raises(ContentError, match=r"def listener\(\):"):
        models.build("tests.support.own_tasks:listener", own_tasks.heights())


# --------------------------------------------------------------------------- data and losses


def test_samples_in_memory_are_samples() -> None:
    samples = InMemory({"a": np.arange(6.0)}, {"b": np.arange(6)})
    assert isinstance(samples, Samples)
    inputs, targets = samples.read(np.array([4, 1, 1]))
    assert (inputs["a"].tolist(), targets["b"].tolist()) == ([4, 1, 1], [4, 1, 1])
    assert samples.fingerprint() == InMemory({"a": np.arange(6.0)}, {"b": np.arange(6)}).fingerprint()
    assert samples.fingerprint() != InMemory({"a": np.arange(6.0) + 1}, {"b": np.arange(6)}).fingerprint()
    with pytest.raises(ContentError, match=r"different numbers of samples \(a: 6, b: 5\)"):
        InMemory({"a": np.arange(6.0)}, {"b": np.arange(5)})


def test_a_tenth_validates_unless_the_data_says_who_does() -> None:
    part = InMemory({"a": np.arange(50.0)}, {})
    learned, validated = Data(part, part).split(seed=3)
    assert (len(learned), len(validated)) == (45, 5)
    assert sorted([*learned, *validated]) == list(range(50))
    assert not np.array_equal(validated, Data(part, part).split(seed=4)[1])
    learned, validated = Data(part, part, validation=np.array([7, 8])).split(seed=3)
    assert validated.tolist() == [7, 8]
    assert not {7, 8} & set(learned.tolist())


def test_distillation_of_a_map_is_the_mean_over_its_positions() -> None:
    """[B, classes, H, W] as so many vectors."""
    draw = torch.Generator().manual_seed(0)
    given, wanted = (torch.randn(2, 5, 3, 4, generator=draw) for _ in range(2))
    flat = [each.permute(0, 2, 3, 1).reshape(-1, 5) for each in (given, wanted)]
    assert losses.divergence(given, wanted, 2.0).item() == pytest.approx(losses.divergence(*flat, 2.0).item(), rel=1e-5)


def test_scaled_differences_do_not_depend_on_units() -> None:
    wanted = {"a": torch.randn(64, 3, generator=torch.Generator().manual_seed(1)), "index": torch.arange(64)}
    loss = losses.scaled_mse({"a": wanted["a"] + 0.1, "index": wanted["index"] + 5}, wanted)
    assert loss.item() == pytest.approx(0.01 / wanted["a"].var().item(), rel=1e-4)
    scaled = losses.scaled_mse({"a": 1000 * (wanted["a"] + 0.1)}, {"a": 1000 * wanted["a"]})
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-3)


def test_a_spec_is_told_as_people_write_it() -> None:
    assert str(TensorSpec((3, None))) == "float32 [B, 3, ?]"
    with pytest.raises(TypeError):
        TensorSpec((3,), "float33")


def test_tasks_are_read_without_torch() -> None:
    import subprocess

    code = "import sys, polar_deploy.tasks as t; t.data_name; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_docstring_names_what_there_is() -> None:
    assert Task.__doc__ is not None
    for field in Task.__dataclass_fields__:
        assert f"{field}" in Task.__doc__
