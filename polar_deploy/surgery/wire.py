"""Models in protobuf's wire format, read and written without a copy of their weights.

Protobuf copies all data that it reads, hands out or writes. Here a file is split into the graph, which protobuf reads,
and the places of the weights; and joined again. See https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

LENGTH = 2  # the wire type of what is told with its length
SIZES = {1: 8, 5: 4}  # bytes of numbers, by wire type
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto
LARGE = 4096  # bytes of a weight that stays where it is

Buffer = memoryview | bytes
# A field of a message: its number; where it, its value, and what follows start, in bytes from the start of the file.
Field = tuple[int, int, int, int]


class Split(NamedTuple):
    """graph: the model without its large weights. weights: first byte and length of these, by initializer."""

    model: bytes
    weights: dict[int, tuple[int, int]]


def split(data: Buffer) -> Split | None:
    """Splits a serialised model; None where it is none, or written in an unusual way: protobuf will say."""
    weights: dict[int, tuple[int, int]] = {}

    def without_data(index: int, tensor: list[Field]) -> list[Buffer] | None:
        raw = [(value, stop - value) for number, _, value, stop in tensor if number == RAW_DATA]
        if len(raw) != 1 or raw[0][1] <= LARGE:
            return None
        (weights[index],) = raw
        return [data[start:stop] for number, start, _, stop in tensor if number != RAW_DATA]

    parts = _with_tensors(data, without_data, LARGE)
    return None if parts is None else Split(b"".join(parts), weights)


def join(model: bytes, weights: Mapping[int, Buffer]) -> list[Buffer]:
    """A serialised model, in parts, with the data of initializers in place, as protobuf would write it."""

    def with_data(index: int, tensor: list[Field]) -> list[Buffer] | None:
        if index not in weights:
            return None
        before, after = (
            b"".join([model[start:stop] for number, start, _, stop in tensor if (number > RAW_DATA) is behind])
            for behind in (False, True)
        )
        return [before, _head(RAW_DATA, len(weights[index])), weights[index], after]

    parts = _with_tensors(model, with_data, 0)
    assert parts is not None  # protobuf wrote it
    return parts


def _with_tensors(
    data: Buffer, change: Callable[[int, list[Field]], list[Buffer] | None], least: int
) -> list[Buffer] | None:
    """The model with changed initializers, in parts: those of `least` bytes or more that `change` says so of."""
    try:
        ((graph, inside, end),) = (
            (start, value, stop) for number, start, value, stop in _fields(data, 0, len(data)) if number == GRAPH
        )
        parts: list[Buffer] = []
        kept, index = inside, 0  # what comes before `kept` is among the parts
        for number, start, value, stop in _fields(data, inside, end):
            if number != INITIALIZER:
                continue
            if stop - value >= least:
                changed = change(index, list(_fields(data, value, stop)))
                if changed is not None:
                    parts += [data[kept:start], _head(INITIALIZER, sum(map(len, changed))), *changed]
                    kept = stop
            index += 1
        parts.append(data[kept:end])
    except (IndexError, ValueError):
        return None
    return [data[:graph], _head(GRAPH, sum(map(len, parts))), *parts, data[end:]]


def _fields(data: Buffer, at: int, stop: int) -> Iterator[Field]:
    """The fields of a message. Raises ValueError or IndexError where it is none."""
    while at < stop:
        start, tag = at, data[at]
        at += 1
        if tag >= 128:
            tag, at = _varint(data, start)
        kind = tag & 7
        if kind == LENGTH:
            length = data[at]
            at += 1
            if length >= 128:
                length, at = _varint(data, at - 1)
        elif kind == 0:
            length = _varint(data, at)[1] - at
        else:
            length = SIZES.get(kind, stop)
        if at + length > stop:
            raise ValueError("a field ends behind its message")
        yield tag >> 3, start, at, at + length
        at += length


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    """A number and where it ends: seven bits a byte, the lowest first."""
    byte = data[at]
    at += 1
    if byte < 128:
        return byte, at
    number, shift = byte & 127, 7
    while byte >= 128:
        if shift > 63:
            raise ValueError("a number without an end")
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
    return number, at


def _head(number: int, length: int) -> bytes:
    """The tag and the length of a field."""
    head = bytearray([number << 3 | LENGTH])
    while length >= 128:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head)
