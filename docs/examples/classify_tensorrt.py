"""Classify pictures with the compressed network of a bundle, in TensorRT. Copy it and make it yours.

    pip install numpy pillow tensorrt==VERSION cuda-python      (the VERSION of the manifest's plan)
    python classify_tensorrt.py BUNDLE picture.jpg …

A plan is code, and this checks nothing: run `polar-deploy bundle verify BUNDLE --manifest-sha256 …` first.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda
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


def check(result: tuple[Any, ...]) -> Any:
    """The value that a call of CUDA gave; ends the program if it failed."""
    error, *values = result
    if error != cuda.cudaError_t.cudaSuccess:
        sys.exit(f"CUDA: {cuda.cudaGetErrorString(error)[1].decode()}")
    return values[0] if values else None


def memory(owned: ExitStack, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """A float32 array that the GPU can copy from and to by itself, and the address of as much memory on the GPU."""
    size = math.prod(shape)
    host = int(check(cuda.cudaMallocHost(4 * size)))
    owned.callback(cuda.cudaFreeHost, host)
    device = int(check(cuda.cudaMalloc(4 * size)))
    owned.callback(cuda.cudaFree, device)
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(host)).reshape(shape), device


def context_of(bundle: Path, plan: dict[str, Any]) -> Any:
    """What runs the plan. TensorRT itself prints why it does not."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    runtime.engine_host_code_allowed = plan["version_compatible"]
    engine = runtime.deserialize_cuda_engine((bundle / plan["file"]).read_bytes())
    if engine is None:
        sys.exit(f"TensorRT {trt.__version__} does not take the plan, which is for {plan['version']} on {plan['gpu']}")
    return engine.create_execution_context() or sys.exit("TensorRT makes no context: not enough memory?")


def main(bundle: Path, pictures: list[str]) -> None:
    """Classify pictures in batches of the size that the plan is tuned for, always whole ones."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    labels = (bundle / manifest["labels"]).read_text(encoding="utf-8").split("\n")
    plan = manifest["networks"]["compressed"]["plan"]
    (source,), (result,) = manifest["inputs"], manifest["outputs"]
    if plan is None or plan["library"] != "TensorRT":
        sys.exit(f"this bundle is for {manifest['target']}: it has no plan of TensorRT")
    if (source["dtype"], result["dtype"]) != ("fp32", "fp32"):
        sys.exit(
            f"the plan's input and output are {source['dtype']} and {result['dtype']}; this example copies fp32 only"
        )
    batch = plan["profile"]["opt"]
    with ExitStack() as owned:  # frees in reverse order
        stream = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))  # where there is no GPU, ends here
        owned.callback(cuda.cudaStreamDestroy, stream)
        images, images_gpu = memory(owned, (batch, *source["shape"]))
        logits, logits_gpu = memory(owned, (batch, *result["shape"]))
        context = context_of(bundle, plan)
        if not (
            context.set_input_shape(source["name"], images.shape)
            and context.set_tensor_address(source["name"], images_gpu)
            and context.set_tensor_address(result["name"], logits_gpu)
        ):
            sys.exit("the plan is not what the manifest says")
        images[:] = 0
        up, down = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for start in range(0, len(pictures), batch):
            paths = pictures[start : start + batch]
            for row, path in enumerate(paths):
                images[row] = prepare(path, manifest["preprocessing"])
            check(cuda.cudaMemcpyAsync(images_gpu, images.ctypes.data, images.nbytes, up, stream))
            if not context.execute_async_v3(int(stream)):
                sys.exit("TensorRT does not run the plan")
            check(cuda.cudaMemcpyAsync(logits.ctypes.data, logits_gpu, logits.nbytes, down, stream))
            check(cuda.cudaStreamSynchronize(stream))
            for row, path in enumerate(paths):
                show(path, logits[row], labels)
        del context  # before what it uses


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
