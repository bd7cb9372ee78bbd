"""Our code takes of TensorRT's bindings only what they have; and the check would find what they have not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import trt_surface
from benchmarks.trt_surface import Surface

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
OFFERED: Surface = {
    "module": {"Builder": "", "Runtime": "", "Flag": ""},
    "Builder": {"create_network": "INetworkDefinition"},
    "INetworkDefinition": {"num_layers": "", "get_layer": "ILayer"},
    "ILayer": {"name": "", "type": "LayerType"},
    "LayerType": {"name": ""},
    "Flag": {"NEW": ""},
    "Runtime": {},
}


@pytest.fixture(scope="module")
def rtx() -> Surface:
    return trt_surface.surface(tensorrt_rtx)


def test_all_that_we_take_is_in_tensorrt_for_rtx(rtx: Surface) -> None:
    from benchmarks.bar_trt_surface import SOURCES, lacking

    assert lacking(trt_surface.uses(SOURCES, rtx), rtx, rtx=True) == []


@pytest.mark.parametrize(
    ("file", "owner", "name", "guard"),
    [
        ("run.py", "IExecutionContext", "execute_async_v3", ""),  # through a list that holds the context
        ("run.py", "ICudaEngine", "get_tensor_profile_shape", ""),
        ("run.py", "IExecutionContext", "is_stream_capturable", "is_stream_capturable"),
        ("run.py", "ICudaEngine", "create_runtime_config", "DynamicShapesKernelSpecializationStrategy"),
        ("proof.py", "LayerType", "name", ""),
        ("library.py", "ILogger.Severity", "INTERNAL_ERROR", ""),
    ],
)
def test_uses_of_our_own_code_are_found(rtx: Surface, file: str, owner: str, name: str, guard: str) -> None:
    from benchmarks.bar_trt_surface import SOURCES

    found = trt_surface.uses([path for path in SOURCES if path.name == file], rtx)
    assert (owner, name, guard) in {(use.owner, use.name, use.guard) for use in found}


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("def f(trt):\n    return trt.Refitter", "module.Refitter"),
        ("def f(network: Any):\n    return network.num_inputs", "INetworkDefinition.num_inputs"),
        ("def f(trt):\n    a = trt.Builder(1)\n    return a.build()", "Builder.build"),
        ("def f():\n    a = library.load('trt')\n    a.Builder().create_network().mark()", "INetworkDefinition.mark"),
        ("def f(trt):\n    return [x.kind for x in [trt.Builder().create_network().get_layer(0)]]", "ILayer.kind"),
        ("def f(network):\n    return network.get_layer(0).type.value", "LayerType.value"),
        ("def f(trt):\n    return int(trt.Flag.OLD)", "Flag.OLD"),
        ("def f(network):\n    for x in (*[network.get_layer(0)],):\n        x.kind = 1", "ILayer.kind"),
        ("def g(o, t):\n    cell = [t]\n    return cell\ndef f(trt):\n    g(1, trt.Runtime())[0].run()", "Runtime.run"),
        (
            "class A:\n    def __init__(self, trt):\n        self.t = trt\n    def f(self):\n        self.t.Gone",
            "module.Gone",
        ),
        ("def f(trt):\n    class L(trt.ILogger):\n        pass", "module.ILogger"),
    ],
)
def test_what_is_lacking_is_found(tmp_path: Path, source: str, lacks: str) -> None:
    assert [str(use) for use in _missing(tmp_path, source)] == [lacks]


@pytest.mark.parametrize(
    "source",
    [
        "def f(trt):\n    return getattr(trt, 'Gone', None)",
        "def f(trt):\n    return trt.Builder().gone() if hasattr(trt.Builder(), 'gone') else 0",
        "def f(trt):\n    a = getattr(trt.Flag, 'OLD', None)\n    if a is None:\n        return 1\n    return trt.Gone",
        "def f(trt):\n    gone = getattr(trt, 'Gone', None)\n    if gone is not None:\n        trt.Gone",
        "def f(trt):\n    gone = getattr(trt, 'Gone', None)\n    return 0 if gone is None else trt.Gone",
    ],
)
def test_what_is_asked_for_first_is_guarded(tmp_path: Path, source: str) -> None:
    found = _missing(tmp_path, source)
    assert found
    assert all(use.guard for use in found)


def test_a_guard_ends_where_its_branch_ends(tmp_path: Path) -> None:
    source = "def f(trt):\n    a = getattr(trt, 'A', None)\n    if a is not None:\n        trt.B\n    trt.C"
    assert [(use.name, use.guard) for use in _missing(tmp_path, source)] == [("A", "A"), ("B", "A"), ("C", "")]


def test_other_things_of_the_same_name_are_left_alone(tmp_path: Path) -> None:
    source = (
        "def f(network: str, layers):\n    for layer in layers:\n        layer.get('x')\n    return network.upper()"
    )
    assert _missing(tmp_path, source) == []


def test_the_surface_of_bindings_tells_what_methods_give(rtx: Surface) -> None:
    assert rtx["ICudaEngine"]["create_execution_context"] == "IExecutionContext"
    assert rtx["ILayer"]["type"] == "LayerType"
    assert "INTERNAL_ERROR" in rtx["ILogger.Severity"]
    assert "tensorrt" not in rtx["module"]


def _missing(folder: Path, source: str) -> list[Any]:
    path = folder / "code.py"
    path.write_text(source)
    return trt_surface.missing(trt_surface.uses([path], OFFERED), OFFERED)


def test_rows_say_who_has_what(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def f(trt):\n    trt.Builder\n    trt.Gone\n    trt.Builder")
    found = trt_surface.uses([tmp_path / "code.py"], OFFERED)
    empty = trt_surface.surface(SimpleNamespace(Gone=1))  # type: ignore[arg-type]
    assert trt_surface.as_rows(found, {"a": OFFERED, "b": empty}) == [
        {"use": "module.Builder", "at": ["code.py:2", "code.py:4"], "guarded": False, "a": True, "b": False},
        {"use": "module.Gone", "at": ["code.py:3"], "guarded": False, "a": False, "b": True},
    ]
