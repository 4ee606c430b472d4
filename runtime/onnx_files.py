"""The files an ONNX model refers to, found without a protobuf library or a model parser.

Field numbers are those of onnx.proto3 (onnx 1.23). Only the messages on the way to a tensor are entered; everything
else, raw weights above all, is stepped over by its length.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from .errors import BundleError

MAX_DEPTH = 64
MAX_FIELDS = 2_000_000

# message -> field number -> the message in that field
_ENTERED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_GRAPH_OF_MODEL = 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer = mmap.mmap | bytes
Span = tuple[int, int]


class _MalformedError(ValueError):
    """The bytes are no protobuf message, or one past the bounds."""


def external_files(model: Path) -> frozenset[str]:
    """The external data files that tensors of an ONNX model name, as the model spells them.

    Raises:
        BundleError: the file is not a well-formed protobuf message with a graph, or cannot be read.
    """
    try:
        with model.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return frozenset(_Walk(data).locations())
    except (_MalformedError, OSError, ValueError) as error:
        raise BundleError(
            str(model), f"not an ONNX model ({error})", remedy="Copy the bundle again, or export it again."
        ) from error


class _Walk:
    """One pass over a model's bytes, bounded in depth and in the number of fields it looks at."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._left = MAX_FIELDS

    def locations(self) -> Iterator[str]:
        whole = (0, len(self._data))
        if not any(number == _GRAPH_OF_MODEL for number, _ in self._fields(whole)):
            raise _MalformedError("it holds no graph")
        yield from self._inside("Model", whole, MAX_DEPTH)

    def _inside(self, message: str, span: Span, depth: int) -> Iterator[str]:
        if depth == 0:
            raise _MalformedError(f"nested deeper than {MAX_DEPTH}")
        entered = _ENTERED[message]
        for number, inner in self._fields(span):
            kind = entered.get(number)
            if kind == "Entry":
                yield from self._location(inner)
            elif kind is not None:
                yield from self._inside(kind, inner, depth - 1)

    def _location(self, entry: Span) -> Iterator[str]:
        key, value = b"", b""
        for number, (start, end) in self._fields(entry):
            if number == 1:
                key = self._data[start:end]
            elif number == 2:
                value = self._data[start:end]
        if key == b"location":
            yield value.decode("utf-8", "backslashreplace")

    def _fields(self, span: Span) -> Iterator[tuple[int, Span]]:
        """The length-delimited fields of a message: number, and where the content lies."""
        at, end = span
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise _MalformedError(f"more than {MAX_FIELDS} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise _MalformedError(f"field number 0 at byte {at}")
            if wire == _VARINT:
                _, at = self._varint(at, end)
            elif wire == _BYTES:
                length, at = self._varint(at, end)
                if length > end - at:
                    raise _MalformedError(f"a field of {length} bytes at byte {at} passes the end of its message")
                yield number, (at, at + length)
                at += length
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
                if at > end:
                    raise _MalformedError("a number passes the end of its message")
            else:
                raise _MalformedError(f"wire type {wire} at byte {at}")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise _MalformedError("it ends inside a number")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise _MalformedError(f"a number longer than 10 bytes at byte {at}")
