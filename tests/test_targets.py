"""Targets: their names, and what probing says about a machine without ever importing what it looks for."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polar_deploy import cpu, gpu
from polar_deploy.errors import MachineError, UsageError
from polar_deploy.gpu import Gpu
from polar_deploy.targets import TARGETS, Target, check, choose, lacks_to_build, lacks_to_run, parse


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def install(site: Path, distribution: str, version: str, module: str) -> None:
    """Put a package on the path that ends the process when it is imported, as TensorRT may without a GPU."""
    (site / f"{module}.py").write_text("import os\nos.abort()\n")
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "backend", "precision", "align"),
    [
        ("ort-fp32", "ort", "fp32", 8),
        ("ort-int8", "ort", "int8", 16),
        ("ort-cuda-fp32", "ort-cuda", "fp32", 1),
        ("ort-cuda-fp16", "ort-cuda", "fp16", 8),
        ("trt-fp32", "trt", "fp32", 1),
        ("trt-fp16", "trt", "fp16", 8),
        ("trt-bf16", "trt", "bf16", 8),
        ("trt-int8", "trt", "int8", 32),
        ("rtx-fp32", "rtx", "fp32", 1),
        ("rtx-fp16", "rtx", "fp16", 8),
        ("rtx-int8", "rtx", "int8", 32),
        ("ov-fp32", "ov", "fp32", 16),
        ("ov-bf16", "ov", "bf16", 16),
        ("ov-int8", "ov", "int8", 16),
        ("ort-trt-fp16", "ort-trt", "fp16", 8),
        ("ort-rtx-fp16", "ort-rtx", "fp16", 8),
    ],
)
def test_names(name: str, backend: str, precision: str, align: int) -> None:
    target = parse(name)
    assert (target.name, target.backend.name, target.precision, target.align) == (name, backend, precision, align)


def test_that_is_all_of_them() -> None:
    assert len(TARGETS) == 16


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="unknown target 'trt-f16'; known are ort-fp32, ") as error:
        parse("trt-f16")
    assert error.value.todo == "did you mean trt-fp16?"
    with pytest.raises(UsageError):
        parse("")
    with pytest.raises(UsageError, match="trt-fp8 is not built yet"):
        parse("trt-fp8")


def test_ort_works_where_onnxruntime_is() -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    check(parse("ort-fp32"))


NEED_A_GPU = (
    *("trt-fp32", "trt-fp16", "trt-bf16", "trt-int8", "ort-cuda-fp32", "ort-cuda-fp16"),
    *("ort-trt-fp16", "ort-rtx-fp16"),
)


@pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver here")
@pytest.mark.parametrize("name", NEED_A_GPU)
def test_without_a_gpu_they_are_refused_with_a_way_out(name: str) -> None:
    began = time.process_time()
    with pytest.raises(MachineError, match=f"target {name} cannot be built here: no NVIDIA driver") as error:
        check(parse(name))
    assert time.process_time() - began < 0.05
    near = "ort-int8" if name == "trt-int8" else "ort-fp32"
    assert error.value.todo == f"use --target {near}, which works here, or add --until surgery, which works anywhere"


def rtx(site: Path) -> None:
    """Put TensorRT for RTX, polygraphy and ONNX Runtime on a path."""
    install(site, "tensorrt-rtx-cu13", "1.7.1.116", "tensorrt_rtx")
    install(site, "polygraphy", "0.53.6", "polygraphy")
    install(site, "onnxruntime", "1.32.0", "onnxruntime")


def test_rtx_builds_without_a_gpu_and_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(gpu, "first", lacking)
    check(parse("rtx-fp16"))
    assert lacks_to_build(parse("rtx-fp16")) == []
    assert lacks_to_run(parse("rtx-fp16")) == ["no driver", "cuda-bindings >= 12.6 is not installed"]


def test_where_there_is_a_gpu_what_runs_engines_has_to_be_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(gpu, "first", lambda: Gpu("RTX 4090", (8, 9)))
    with pytest.raises(MachineError, match=r"cuda-bindings >= 12\.6 is not installed") as error:
        check(parse("rtx-fp16"))
    assert "pip install '.[rtx]'" in error.value.todo


def lacking() -> Gpu:
    raise gpu.NoGpuError("no driver")


@pytest.mark.parametrize(
    ("there", "best"),
    [((), "ort-fp32"), (("onnxruntime-gpu",), "ort-cuda-fp16"), (("tensorrt", "onnxruntime-gpu"), "trt-fp16")],
)
def test_auto_is_the_fastest_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], best: str
) -> None:
    versions = {"tensorrt": ("11.4.0", "tensorrt"), "onnxruntime-gpu": ("1.32.0", "onnxruntime")}
    for name in there:
        install(tmp_path, name, *versions[name])
    install(tmp_path, "polygraphy", "0.53.6", "polygraphy")
    install(tmp_path, "cuda-bindings", "13.0.0", "cuda")
    (tmp_path / "cuda.py").unlink()
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "cuda" / "bindings" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "cuda", raising=False)
    monkeypatch.setattr(gpu, "first", lambda: Gpu("H200", (9, 0)))
    monkeypatch.setattr(gpu, "cuda_version", lambda: "13.0")
    assert choose().name == best
    if best == "trt-fp16":
        monkeypatch.setattr(gpu, "cuda_version", lambda: "12.8")
        old = "cuda-bindings is 13.0.0, the driver knows CUDA 12.8 (pip install 'cuda-bindings<13')"
        assert lacks_to_run(parse("trt-fp16")) == [old]


def test_everything_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MachineError) as error:
        check(parse("trt-fp16"))
    for part in ("tensorrt >= 10.0", "polygraphy >= 0.49", "onnxruntime >= 1.19"):
        assert f"{part} is not installed" in error.value.what
    with pytest.raises(MachineError, match=r"onnxruntime >= 1\.19 is not installed") as error:
        check(parse("ort-fp32"))
    assert "'.[ort]'" in error.value.todo


@pytest.mark.parametrize(
    ("version", "old"), [("8.6.1", True), ("9.99", True), ("10.0.0b6", False), ("10.3.0", False), ("11.4.0.12", False)]
)
def test_packages_are_judged_by_version_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, old: bool
) -> None:
    install(tmp_path, "tensorrt-cu13", version, "tensorrt")
    install(tmp_path, "polygraphy", "0.53.6", "polygraphy")
    install(tmp_path, "onnxruntime-gpu", "1.32.0", "onnxruntime")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(gpu, "first", lambda: Gpu("Tesla T4", (7, 5)))
    assert lacks_to_build(parse("trt-fp16")) == ([f"tensorrt is {version}, older than 10.0"] if old else [])


@pytest.mark.parametrize(
    ("library", "polygraphy", "lacking"),
    [
        ("10.8.0.43", "0.49.26", []),
        ("11.4.0.12", "0.53.4", []),
        ("11.4.0.12", "0.49.26", ["polygraphy is 0.49.26, older than 0.53.4, which TensorRT 11.4.0.12 takes"]),
        ("10.8.0.43", "0.48.1", ["polygraphy is 0.48.1, older than 0.49"]),
    ],
)
def test_the_polygraphy_of_a_container_will_do_unless_its_tensorrt_is_too_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, polygraphy: str, lacking: list[str]
) -> None:
    install(tmp_path, "tensorrt", library, "tensorrt")
    install(tmp_path, "polygraphy", polygraphy, "polygraphy")
    install(tmp_path, "onnxruntime-gpu", "1.32.0", "onnxruntime")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(gpu, "first", lambda: Gpu("L4", (8, 9)))
    assert lacks_to_build(parse("trt-fp16")) == lacking


def too_old(device: Gpu, target: Target) -> str | None:
    return target.backend.why_not_on(device, target.precision)


def test_bf16_needs_a_gpu_that_has_it() -> None:
    bf16, fp16 = parse("trt-bf16"), parse("trt-fp16")
    t4, orin = Gpu("Tesla T4", (7, 5)), Gpu("Orin", (8, 7))
    assert too_old(t4, bf16) == "Tesla T4 has no BF16 (compute capability 7.5, 8.0 is needed)"
    assert too_old(t4, fp16) is None
    assert too_old(orin, bf16) is None


def test_some_gpus_are_no_good_for_tensorrt() -> None:
    v100 = Gpu("Tesla V100", (7, 0))
    assert (
        too_old(v100, parse("trt-fp32")) == "Tesla V100 has no support for trt (compute capability 7.0, 7.5 is needed)"
    )
    assert too_old(v100, parse("ort-cuda-fp16")) is None
    h200 = Gpu("H200", (9, 0))
    assert too_old(h200, parse("rtx-fp16")) == "H200 has no support for rtx (compute capability 9.0)"
    assert too_old(h200, parse("trt-fp16")) is None


@pytest.mark.parametrize(
    ("name", "wider"),
    [
        *(("ort-int8", "ort-fp32"), ("ov-int8", "ov-bf16"), ("trt-int8", "trt-fp16"), ("rtx-int8", "rtx-fp16")),
        *(("trt-fp16", "trt-fp32"), ("trt-bf16", "trt-fp32"), ("ort-cuda-fp16", "ort-cuda-fp32")),
        ("ov-fp32", "ov-fp32"),
    ],
)
def test_the_next_wider_target(name: str, wider: str) -> None:
    assert parse(name).wider.name == wider


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_bf16_needs_a_cpu_that_has_it(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "openvino", "2026.4.1", "openvino")
    install(tmp_path, "onnxruntime", "1.32.0", "onnxruntime")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(cpu, "instructions", lambda: {"avx512f", flag})
    check(parse("ov-bf16"))
    monkeypatch.setattr(cpu, "instructions", lambda: {"avx512f"})
    with pytest.raises(
        MachineError, match=r"ov-bf16 cannot be built here: the CPU has no BF16 \(amx_bf16 or "
    ) as error:
        check(parse("ov-bf16"))
    assert error.value.todo.startswith("use --target ort-fp32, which works here")
    check(parse("ov-fp32"))
    assert lacks_to_run(parse("ov-int8")) == []


def test_openvino_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "onnxruntime", "1.32.0", "onnxruntime")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MachineError, match=r"openvino >= [\d.]+ is not installed") as error:
        check(parse("ov-int8"))
    assert "pip install '.[openvino]'" in error.value.todo


def test_importing_targets_is_light() -> None:
    code = (
        "import polar_deploy.targets, sys; print(*({'torch', 'numpy', 'onnx', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
