"""Do the integer kernels of this device compute what the INT8 graphs of a bundle say?

Golden outputs are those of FP32, and their tolerance leaves room for all that INT8 may cost: an error of the kernels
may hide there. A graph that was made on another CPU may have weights with which the kernels here overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polar_deploy.bundle.read import Bundle
    from polar_deploy.engines import Engine
    from polar_deploy.parity import Judgement


def judge(bundle: Bundle, engines: Mapping[str, Engine]) -> Judgement | None:
    """Hold engines against their typed graphs, computed node by node in FP32, on the golden inputs.

    Kernels that are further off than rounding itself is, and than single steps of a rounding make it, fail. None where
    there is nothing to judge: no INT8, no kernels that can be asked on a CPU, no engine or no ONNX Runtime here.
    """
    from polar_deploy import onnx_files, targets
    from polar_deploy.engines import infer_all, kernels
    from polar_deploy.parity import Judgement
    from polar_deploy.precision import proof, saturation
    from polar_deploy.precision.int8 import SCHEMES

    target = targets.parse(bundle.manifest.target)
    if target.precision != "int8" or not engines or targets.lacks_to_run(targets.parse("ort-fp32")):
        return None
    here = kernels(target)
    if here is None:
        return None
    worst = 0.0
    for name, engine in engines.items():
        path = bundle.path(bundle.manifest.each()[name].typed)
        written = proof.Reference.of(onnx_files.read(path, check=False), bundle.inputs, path)
        off = written.apart(infer_all(engine, bundle.inputs))
        allowed = max(proof.FUSED, written.apart(bundle.outputs[name]))
        if off > allowed:
            why = f"{here.library}'s integer kernels move the {name} network's outputs by {off:.2g} of their size from "
            why += f"what its graph says, {allowed:.2g} is allowed"
            if saturation.saturates(here, SCHEMES[target.backend.int8]):
                why += "; on this CPU, which has no VNNI, they overflow: ask for a bundle made with "
                why += "--set build.reduce_range=true"
            return Judgement("fail", why)
        worst = max(worst, off)
    return Judgement("pass", f"they compute what the INT8 graphs say, to {worst:.1e} of the outputs' size")
