"""More than 2 GB of weights in external data: cut and proven, and never held twice.

A chain of 1 x 1 convolutions of 12,288 channels, 2.4 GB, the first of which is half closed. Memory is that of a child
process, anonymous pages only: those mapped from the file are the system's to drop.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from benchmarks.common import write_result

WIDTH = 12_288
LAYERS = 4

CHILD = """
import sys, threading, time
from pathlib import Path
from polar_deploy.surgery import compress_file
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            peak = max(peak, next(int(line.split()[1]) for line in status if line.startswith("RssAnon")))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
report = compress_file(Path("in.onnx"), Path("out.onnx"), verify=sys.argv[1] == "verify")
print("peak", peak * 1024, "verified", report["verified"], "params", *report["params"])
"""


def _make(folder: Path) -> int:
    """Writes the model; returns the bytes of its weights."""
    random = np.random.default_rng(0)
    nodes, tensors, at = [], [], 0
    x, width = "input", 8
    with open(folder / "weights.bin", "wb") as file:
        for layer in range(LAYERS + 1):
            shape = (WIDTH, width, 1, 1)
            for _ in range(0, WIDTH, 1024):
                rows = random.standard_normal((1024, width), np.float32) / np.float32(np.sqrt(width))
                file.write(rows.tobytes())
            tensor = onnx.TensorProto(name=f"w{layer}", data_type=1, dims=shape, data_location=1)
            for key, value in (("location", "weights.bin"), ("offset", at), ("length", file.tell() - at)):
                tensor.external_data.add(key=key, value=str(value))
            at = file.tell()
            tensors.append(tensor)
            nodes += [
                helper.make_node("Conv", [x, f"w{layer}"], [f"c{layer}"]),
                helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]),
            ]
            x, width = f"r{layer}", WIDTH
            if layer == 0:
                gate = (np.arange(WIDTH) % 2).astype(np.float32).reshape(1, -1, 1, 1)
                tensors.append(onnx.numpy_helper.from_array(gate, "gate"))
                nodes.append(helper.make_node("Mul", [x, "gate"], ["closed"]))
                x = "closed"
    inputs = [helper.make_tensor_value_info("input", 1, ["batch", 8, 2, 2])]
    outputs = [helper.make_tensor_value_info(x, 1, ["batch", WIDTH, 2, 2])]
    graph = helper.make_graph(nodes, "large", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    return at


def _run(folder: Path, mode: str) -> dict[str, int | bool]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, mode], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    found = re.search(r"peak (\d+) verified (\w+) params (\d+) (\d+)", done.stdout)
    assert found is not None, done.stdout
    return {"peak": int(found[1]), "verified": found[2] == "True", "before": int(found[3]), "after": int(found[4])}


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _make(folder)
        plain, proven = _run(folder, "plain"), _run(folder, "verify")
        written = sum(path.stat().st_size for path in folder.glob("out.onnx*"))
    bars = {
        "more than 2 GB": size > 2**31,
        "half of the first layer and half of the columns behind it are gone": plain["after"]
        == WIDTH // 2 * 8 + WIDTH * WIDTH // 2 + (LAYERS - 1) * WIDTH**2,
        "verified in ONNX Runtime": bool(proven["verified"]),
        "memory stays below half of the model": plain["peak"] <= size / 2,
    }
    result = {
        "bytes": size,
        "bytes_written": written,
        "peak_without_verification": plain["peak"],
        "peak_with_verification": proven["peak"],
    }
    return write_result("surgery-large", bars, result)


if __name__ == "__main__":
    sys.exit(main())
