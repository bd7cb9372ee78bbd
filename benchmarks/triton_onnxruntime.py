"""A backend of the name "onnxruntime" for a tritonserver that has none, as one of Triton's python-based backends.

`bar_triton` copies this file into the server's folder of backends; Triton's own stub process imports it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

sys.path.insert(0, os.environ["TRITON_SITE"])  # the stub has a PYTHONPATH of its own making

import numpy as np
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    """One model of the repository."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], config["default_model_filename"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer a request; requests that Triton batched run at once."""
        parts = [utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        (logits,) = self.session.run([self.output], {self.input: np.concatenate(parts)})
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [utils.InferenceResponse([utils.Tensor(self.output, rows)]) for rows in np.split(logits, ends)]
