"""Classify pictures with the compressed network of a bundle, in ONNX Runtime. Copy it and make it yours.

    pip install numpy pillow onnxruntime
    python classify_onnxruntime.py BUNDLE picture.jpg …

It checks nothing of the bundle; `polar-deploy bundle verify BUNDLE` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def prepare(path: str, made: dict[str, Any]) -> np.ndarray:
    """A picture as the manifest's `preprocessing` says: float32 [3, crop, crop]."""
    with Image.open(path) as stored:
        image = stored.convert("RGB")
    shorter, crop = made["shorter_side"], made["crop"]
    if min(image.size) != shorter:
        scale = shorter / min(image.size)
        width, height = (max(int(side * scale), shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop))).transpose(2, 0, 1)
    mean, std = (np.array(made[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    factor, shift = (made["scale"] / std).astype(np.float32), (-mean / std).astype(np.float32)
    return np.ascontiguousarray(pixels * factor + shift)


def show(path: str, logits: np.ndarray, labels: list[str]) -> None:
    """Print the five likeliest labels of one picture."""
    powers = np.exp(logits - logits.max())
    print(path)
    for index in np.argsort(-powers)[:5]:
        print(f"  {100 * powers[index] / powers.sum():6.2f} %  {labels[index]}")


def main(bundle: Path, pictures: list[str]) -> None:
    """Classify pictures one by one."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    labels = (bundle / manifest["labels"]).read_text(encoding="utf-8").split("\n")
    network = manifest["networks"]["compressed"]
    providers: list[Any] = ["CPUExecutionProvider"]
    if manifest["target"].startswith("ort-cuda-"):
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": str(int(network["tf32"]))}))
    # The typed graph suits the runtime that it was made for; the FP32 graph suits all.
    graph = network["typed" if manifest["target"].startswith("ort-") else "fp32"]
    session = onnxruntime.InferenceSession(str(bundle / graph), providers=providers)
    source = session.get_inputs()[0]
    kind = np.float16 if source.type == "tensor(float16)" else np.float32
    for path in pictures:
        image = prepare(path, manifest["preprocessing"])
        logits = session.run(None, {source.name: image[None].astype(kind)})[0]
        show(path, logits[0].astype(np.float32), labels)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
