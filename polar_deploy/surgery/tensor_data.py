"""The values of one tensor in an ONNX file: inside of the message, or in a file beside it. Both may be damaged."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.errors import ContentError, first_line
from polar_deploy.surgery.validation import EXPORT_AGAIN, Array, dtype_of

if TYPE_CHECKING:
    import onnx

PACKED = ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")  # several elements a byte
FIELDS = ("float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data")
DATA = ("raw_data", *FIELDS, "external_data", "data_location")  # what may hold the values of a tensor


def inline(tensor: onnx.TensorProto, values: Array) -> onnx.TensorProto:
    """The same tensor with its data inside."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=values.tobytes())


def inside(tensor: onnx.TensorProto, where: str, weights: Array | None) -> Array | None:
    """The values of a tensor with its data inside; None where they are best left there (packed, text).

    weights: its data, where that was left out.

    Raises:
        ContentError: its data is not as long as its shape says; onnx.checker does not look.
    """
    import onnx

    dims = tuple(tensor.dims)
    if dims and min(dims) < 0:
        raise ContentError(f"{where} has the shape {list(dims)}", EXPORT_AGAIN)
    is_raw = weights is not None or tensor.HasField("raw_data")
    filled = [name for name in FIELDS if len(getattr(tensor, name))] if is_raw else []
    if filled:
        raise ContentError(f"{where} has its values twice, as raw_data and as {filled[0]}", EXPORT_AGAIN)
    try:
        if not is_raw or is_packed(tensor):
            values: Array = onnx.numpy_helper.to_array(tensor)
            return None if is_packed(tensor) or values.dtype == object else values
        data = tensor.raw_data if weights is None else weights
        dtype = dtype_of(tensor.data_type)
        wanted = math.prod(dims) * dtype.itemsize
        if len(data) != wanted:
            raise ValueError(f"{len(data)} bytes of data, the shape {list(dims)} wants {wanted}")
        return np.frombuffer(data, dtype).reshape(dims)
    except (ValueError, TypeError, KeyError) as error:
        raise ContentError(f"{where} is damaged: {first_line(error)}", EXPORT_AGAIN) from error


def mapped(tensor: onnx.TensorProto, where: str, folder: Path | None, files: dict[str, Array]) -> Array:
    """The values of a tensor in a file of external data, as a view of that file.

    Raises:
        ContentError: the file is missing, lies outside the model's folder, or is too short.
    """

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ContentError(f"{where} lies in another file, {location!r}", "load the model with its external data")
    if is_packed(tensor):
        raise ContentError(f"{where}: external data of type {_kind(tensor)} is not supported", "store it inside")
    if location not in files:
        files[location] = _map(folder, location, where)
    try:
        dtype = dtype_of(tensor.data_type)
        wanted = math.prod(tensor.dims) * dtype.itemsize
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", wanted))
        if offset < 0 or length != wanted or any(dim < 0 for dim in tensor.dims):
            raise ValueError(f"offset {offset}, length {length}; the shape {list(tensor.dims)} wants {wanted} bytes")
        if offset + length > files[location].size:
            raise ValueError(f"{location} has {files[location].size} bytes, it wants those up to {offset + length}")
    except (ValueError, TypeError, KeyError) as error:
        raise ContentError(f"external data of {where} is damaged: {first_line(error)}", EXPORT_AGAIN) from error
    return files[location][offset : offset + length].view(dtype).reshape(tuple(tensor.dims))


def _map(folder: Path, location: str, where: str) -> Array:
    """A file of external data as bytes. What is not below the model's folder is not opened, links included."""
    keep = "keep the data files beside the model, inside its folder"
    pure = PurePosixPath(location)
    if not location or "\0" in location or pure.is_absolute() or ".." in pure.parts or "\\" in location:
        raise ContentError(f"external data of {where} points outside the model's folder: {location!r}", keep)
    path = folder / location
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ContentError(f"external data of {where} leads outside the model's folder: {location!r}", keep)
        if not path.is_file():
            raise ContentError(f"external data of {where} is missing: {path}", keep)
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise ContentError(f"external data of {where} cannot be read: {first_line(error)}", keep) from error


def _kind(tensor: onnx.TensorProto) -> str:
    """Name of the element type."""
    import onnx

    name: str = onnx.TensorProto.DataType.Name(tensor.data_type)
    return name


def is_packed(tensor: onnx.TensorProto) -> bool:
    """Whether several elements are in a byte."""
    return tensor.data_type in _packed_types()


@cache
def _packed_types() -> frozenset[int]:
    import onnx

    known = onnx.TensorProto.DataType
    return frozenset(known.Value(name) for name in PACKED if name in known.keys())  # noqa: SIM118
