"""From a typed ONNX graph to a plan: strongly typed, one optimisation profile, proven layer by layer.

Runs in a child process (`polar_deploy.engines.child`). Polygraphy makes profile, configuration and plan and keeps the
timing cache; parsing is done here, because only the parser's own errors name node and operator.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polar_deploy import gpu, targets
from polar_deploy.config import Build
from polar_deploy.documents.build import BuiltPlan, Plan, Profile
from polar_deploy.documents.layers import Layer, Layers
from polar_deploy.engines import nvml
from polar_deploy.engines.trt import library, proof
from polar_deploy.errors import ContentError, MachineError, PolarDeployError, UsageError, one_line
from polar_deploy.precision.graph import count_wider
from polar_deploy.workspace import atomic_path

_TIMING_CACHE = "timing.cache"
_TURING = (7, 5)  # TensorRT for RTX cannot build FP32 Gemm and BF16 for it (measured with 1.7)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Build `folder/NAME.plan` and `.layers.json` from `folder/NAME.onnx`; return a `BuiltPlan` as JSON.

    Args:
        request: "folder", "name", "target" and "options" (a `Build` as a dictionary).

    Raises:
        ContentError: TensorRT refuses the network, or does not build it in the target's precision.
        UsageError: an option that this TensorRT does not have.
    """
    folder, name = Path(request["folder"]), request["name"]
    target, options = targets.parse(request["target"]), Build.model_validate(request["options"])
    if library.of(target).jit:
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported, which is now
    return _Builder(folder, name, target, options).build().as_json()


class _Builder:
    """One build; the library's objects are held as long as others of them need them."""

    def __init__(self, folder: Path, name: str, target: targets.Target, options: Build) -> None:
        self.folder, self.name, self.target, self.options = folder, name, target, options
        self.onnx = folder / f"{name}.onnx"
        self.backend = library.of(target)
        self.trt, self.logger = library.load(self.backend), library.logger(self.backend)
        self.logger.echo = True
        self.builder = self.trt.Builder(self.logger)
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # gone where nothing else is
        self.network = self.builder.create_network(0 if flag is None else 1 << int(flag))

    def build(self) -> BuiltPlan:
        """See `run`."""
        self._parse()
        layers, source = proof.of_network(self.network), "network before the build"
        found = self._proven(layers)
        plan = self._plan()
        if not self.backend.jit:  # else an engine cannot be looked into without a GPU
            layers, source = proof.of_inspector(self._inspected(plan)), "engine inspector"
            found = self._proven(layers)
        counted = proof.counts(layers)._asdict()
        plan_path, layers_path = self.folder / f"{self.name}.plan", self.folder / f"{self.name}.layers.json"
        with atomic_path(plan_path) as path:
            path.write_bytes(plan)
        Layers(schema=1, name=self.name, read_from=source, **counted, layers=layers).write(layers_path)
        return BuiltPlan(found=found, **counted, plan=self._described())

    def _proven(self, layers: list[Layer]) -> dict[str, int]:
        wider = count_wider(self.onnx, self.target.precision)
        return proof.require(layers, self.target.precision, self.onnx, tf32=self.options.tf32, wider=wider)

    def _parse(self) -> None:
        """Fill the network. The parser takes an empty or a text file for a network without layers."""
        parser = self.trt.OnnxParser(self.network, self.logger)
        if not parser.parse_from_file(str(self.onnx)):
            errors = [_sentence(parser.get_error(index)) for index in range(parser.num_errors)]
            what = "; ".join(dict.fromkeys(errors)) or library.recent_errors(self.backend)
            raise ContentError(
                f"{self.onnx}: {self._says} {what}",
                "export the network in FP32, with operators that it has; lower precision is the target's job",
            )
        self._require_batches()

    def _require_batches(self) -> None:
        """Raise ContentError unless the batch, the first axis, is all that varies."""
        outputs = [self.network.get_output(index) for index in range(self.network.num_outputs)]
        shapes = [(tensor.name, tuple(tensor.shape)) for tensor in (*self._inputs, *outputs)]
        if self._inputs and outputs and all(_varies_in_batch(shape) for _, shape in shapes):
            return
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes) or "neither"
        raise ContentError(
            f"{self.onnx}: the network must have inputs and outputs of which the first axis, the batch, alone varies, "
            f"but it has: {listed}",
            "export the network with a dynamic batch, and with nothing else dynamic",
        )

    @property
    def _inputs(self) -> list[Any]:
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]

    def _plan(self) -> bytes:
        from polygraphy.backend.trt import EngineBytesFromNetwork, Profile
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        ranges = Profile()
        for tensor in self._inputs:
            shapes = [(batch, *tuple(tensor.shape)[1:]) for batch in self.options.batches]
            ranges.add(tensor.name, min=shapes[0], opt=shapes[1], max=shapes[2])
        cache = None if self.backend.jit else str(self.folder / _TIMING_CACHE)
        try:
            with G_LOGGER.verbosity():  # it raises what is critical; last words are the library's
                config = self._config(ranges, cache)
                plan = EngineBytesFromNetwork((self.builder, self.network), config=config, save_timing_cache=cache)()
        except PolygraphyException as error:
            said = f"{one_line(error)}; {library.recent_errors(self.backend)}"
            raise _refused(f"{self.onnx}: {self._says} {said}") from error
        finally:
            (self.folder / f"{_TIMING_CACHE}.lock").unlink(missing_ok=True)  # polygraphy's; the run has its own lock
        return bytes(plan)

    def _config(self, profile: Any, cache: str | None) -> Any:
        """The builder's configuration. TF32 is on by default there, and off here unless asked."""
        trt, options = self.trt, self.options
        common: dict[str, Any] = {
            "profiles": [profile],
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "builder_optimization_level": options.optimization_level,
            "version_compatible": options.version_compatible,
        }
        if options.workspace is not None:
            common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace << 20}
        if options.hardware_compatible:
            common["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.backend.jit:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            create = CreateConfigRTX(use_gpu=False, compute_capabilities=self._capabilities(), **common)
        else:
            from polygraphy.backend.trt import CreateConfig

            create = CreateConfig(load_timing_cache=cache, **common)
        config = create(self.builder, self.network)
        tf32 = getattr(trt.BuilderFlag, "TF32", None)
        if tf32 is not None:
            (config.set_flag if options.tf32 else config.clear_flag)(tf32)
        return config

    def _capabilities(self) -> list[tuple[int, int]]:
        """What TensorRT for RTX builds for: as asked, else the GPU's here, else all that can do the precision."""
        known = {
            (int(name[2:-1]), int(name[-1])) for name in self.trt.ComputeCapability.__members__ if name.startswith("SM")
        }
        asked = [(int(major), int(minor)) for major, minor in (each.split(".") for each in self.options.capabilities)]
        if unknown := [each for each in asked if each not in known]:
            have = ", ".join(f"{major}.{minor}" for major, minor in sorted(known))
            wrong = ", ".join(f"{major}.{minor}" for major, minor in unknown)
            raise UsageError(f"build.capabilities: this TensorRT for RTX builds for {have}, not for {wrong}", "drop it")
        here = _gpu_here()
        if asked or here is None or here.capability not in known:
            return asked or sorted(each for each in known if each > _TURING or self.target.precision == "fp16")
        return [here.capability]

    def _inspected(self, plan: bytes) -> Mapping[str, Any]:
        """The inspector's words about a plan, at the usual batch: without shapes it tells no formats."""
        runtime = self.trt.Runtime(self.logger)
        runtime.engine_host_code_allowed = self.options.version_compatible  # such a plan brings its own runtime along
        engine = runtime.deserialize_cuda_engine(plan)
        context = engine and engine.create_execution_context()
        if context is None:
            said = library.recent_errors(self.backend)
            raise _refused(f"{self.onnx}: {self._says} its own plan cannot be loaded: {said}")
        for tensor in self._inputs:
            context.set_input_shape(tensor.name, (self.options.batches[1], *tuple(tensor.shape)[1:]))
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        text = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        information: Mapping[str, Any] = json.loads(text, strict=False)  # control characters may part nodes' names
        return information

    def _described(self) -> Plan:
        """What the plan was built with and for; a device must match it."""
        jit, here, (least, usual, most) = self.backend.jit, _gpu_here(), self.options.batches
        capabilities = self._capabilities() if jit else [here.capability] if here else []
        inputs = {tensor.name: tuple(tensor.shape)[1:] for tensor in self._inputs}
        return Plan(
            file=f"{self.name}.plan",
            library=self.backend.library,
            version=library.version(self.backend),
            gpu=None if jit or here is None else here.name,
            capabilities=[".".join(map(str, each)) for each in capabilities],
            version_compatible=self.options.version_compatible,
            hardware_compatible=self.options.hardware_compatible,
            cuda=gpu.cuda_version() if here else None,
            driver=nvml.conditions().driver if here else None,
            timing_cache=None if jit else _TIMING_CACHE,  # TensorRT for RTX times nothing while it builds
            profile=Profile(min=least, opt=usual, max=most),
            trtexec=None if jit else trtexec(self.name, inputs, self.options),
        )

    @property
    def _says(self) -> str:
        return f"{self.backend.library} says:"


def _varies_in_batch(shape: tuple[int, ...]) -> bool:
    return bool(shape) and shape[0] == -1 and min(shape[1:], default=1) > 0


def trtexec(name: str, inputs: Mapping[str, tuple[int, ...]], options: Build) -> str:
    """The line that builds the same plan with NVIDIA's own tool, from the run's folder.

    Args:
        name: "full" or "compressed".
        inputs: the graph's: name -> shape of one sample.
        options: how it was built.
    """
    sizes = zip(("min", "opt", "max"), options.batches, strict=True)
    shapes = [
        f"--{size}Shapes=" + ",".join(f"{each}:{'x'.join(map(str, (batch, *shape)))}" for each, shape in inputs.items())
        for size, batch in sizes
    ]
    optional = {
        "--noTF32": not options.tf32,
        "--versionCompatible": options.version_compatible,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
        f"--memPoolSize=workspace:{options.workspace}M": options.workspace is not None,
        f"--builderOptimizationLevel={options.optimization_level}": options.optimization_level is not None,
    }
    parts = [
        *("trtexec", f"--onnx=engines/{name}.onnx", "--stronglyTyped", "--profilingVerbosity=detailed"),
        *(flag for flag, wanted in optional.items() if wanted),
        *(*shapes, "--timingCacheFile=engines/timing.cache", f"--saveEngine=engines/{name}.plan"),
    ]
    return " ".join(parts)


def _sentence(error: Any) -> str:
    """One of the parser's errors: node, operator, code, and what it says unless that is no more than "false"."""
    node = repr(error.node_name()) if error.node_name() else f"number {error.node()}"
    code = str(error.code()).rpartition(".")[2]
    said = one_line(error.desc()).partition(" [checkMacros")[0]  # then comes that there is no GPU
    words = f": {said}" if said != "false" else ""
    return f"node {node} (operator {error.node_operator() or 'unknown'}): {code}{words}"


def _refused(what: str) -> PolarDeployError:
    """The library gave up: for lack of memory, of a library that an option needs, or it cannot do this network."""
    if re.search("out ?of ?memory|memory ?allocation", what, re.IGNORECASE):
        return MachineError(what, "free some memory, or lower build.workspace or the largest batch")
    if "nvinfer_lean" in what:
        return UsageError(what, "drop build.version_compatible, or install TensorRT's lean runtime")
    return ContentError(what, "see docs/what-now.md, or choose another precision")


def _gpu_here() -> gpu.Gpu | None:
    try:
        return gpu.first()
    except gpu.NoGpuError:
        return None
