"""A pass over the bytes of an ONNX model, without a protobuf library or a model parser.

Field numbers are those of onnx.proto3 (onnx 1.23). Only the messages on the way to what is sought are entered;
everything else, raw weights above all, is stepped over by its length.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from .lora_slots import module_of
from .manifest import Dtype, TensorSpec

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
# Of TensorProto.DataType, what a tensor of a model may be.
_DTYPES: dict[int, Dtype] = {1: "float32", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16"}
_ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer = mmap.mmap | bytes
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Projection:
    """A node that multiplies by a stored weight.

    shape: the weight's, as PyTorch has it. turned: whether it is stored with its axes the other way round.
    """

    module: str
    weight: str
    shape: tuple[int, ...]
    turned: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a weight's bytes lie: in a file of the model's folder, or in the model's own where `file` is empty."""

    shape: tuple[int, ...]
    dtype: Dtype
    file: str
    offset: int


class MalformedError(ValueError):
    """The bytes are no protobuf message, or one past the bounds."""


class Walk:
    """One pass over a model's bytes, bounded in depth and in the number of fields it looks at.

    All raise MalformedError where the bytes are no model's, or beyond the bounds, what yields while it goes.
    """

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._left = MAX_FIELDS

    def locations(self) -> Iterator[str]:
        """The files that tensors lie in, as the model says them; as often as it does."""
        self._graphs()
        yield from self._inside("Model", (0, len(self._data)), MAX_DEPTH)

    def tensors(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs that are no weights, and the outputs."""
        weights: set[str] = set()
        listed: dict[int, list[TensorSpec]] = {11: [], 12: []}
        for graph in self._graphs():
            for number, span in self._fields(graph):
                if number == 5:
                    weights.update(self._text(name) for field, name in self._fields(span) if field == 8)
                elif number in listed:
                    listed[number].append(self._spec(span))
        return tuple(spec for spec in listed[11] if spec.name not in weights), tuple(listed[12])

    def nodes(self) -> int:
        """How many nodes the graph has, those in the bodies of branches and loops not counted."""
        return sum(number == 1 for graph in self._graphs() for number, _ in self._fields(graph))

    def projections(self) -> Iterator[Projection]:
        """The graph's nodes that multiply by a stored weight, in its order."""
        for graph in self._graphs():
            fields = list(self._fields(graph))
            weights = dict(self._weight(span) for number, span in fields if number == 5)
            for number, span in fields:
                if number == 1:
                    yield from self._projection(span, weights)

    def reads(self) -> Iterator[str]:
        """What nodes read, also in the bodies of branches and loops; as often as they do."""
        for graph in self._graphs():
            yield from self._reads("Graph", graph, MAX_DEPTH)

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """The graph's weights of types that are known here, by name, with where their bytes lie."""
        for graph in self._graphs():
            for number, tensor in self._fields(graph):
                if number == 5:
                    name, shape = self._weight(tensor)
                    found = self._stored(tensor, shape)
                    if found is not None:
                        yield name, found

    def _reads(self, message: str, span: Span, depth: int) -> Iterator[str]:
        if depth == 0:
            raise MalformedError(f"nested deeper than {MAX_DEPTH}")
        for number, inner in self._fields(span):
            kind = _ENTERED[message].get(number)
            if message == "Node" and number == 1:
                yield self._text(inner)
            elif kind in ("Node", "Attribute", "Graph"):
                yield from self._reads(kind, inner, depth - 1)

    def _stored(self, tensor: Span, shape: tuple[int, ...]) -> Stored | None:
        numbers, spans = self._numbers(tensor), dict(self._fields(tensor))
        dtype = _DTYPES.get(numbers.get(2, 0))
        if dtype is None:
            return None
        if numbers.get(14, 0):  # in another file
            entries = dict(self._entry(span) for number, span in self._fields(tensor) if number == 13)
            return Stored(shape, dtype, entries.get("location", ""), int(entries.get("offset", "0")))
        # Raw, or float_data, which is packed as it is in memory.
        span = spans.get(9) or (spans.get(4) if dtype == "float32" else None)
        if span is None:
            return None
        if span[1] - span[0] != prod(shape) * _ITEM_BYTES[dtype]:
            raise MalformedError(f"weight {self._text(spans.get(8, (0, 0)))!r} of shape {shape} in other bytes")
        return Stored(shape, dtype, "", span[0])

    def _weight(self, tensor: Span) -> tuple[str, tuple[int, ...]]:
        """A stored tensor's name and shape."""
        name, dims = "", list[int]()
        for number, value in self._every_field(tensor):
            if number == 8 and isinstance(value, tuple):
                name = self._text(value)
            elif number == 1:
                dims += [value] if isinstance(value, int) else self._packed(value)
        return name, tuple(dims)

    def _packed(self, span: Span) -> Iterator[int]:
        at, end = span
        while at < end:
            value, at = self._varint(at, end)
            yield value

    def _projection(self, node: Span, weights: Mapping[str, tuple[int, ...]]) -> Iterator[Projection]:
        inputs, texts, attributes = list[str](), dict[int, str](), dict[str, int]()
        for number, span in self._fields(node):
            if number == 1:
                inputs.append(self._text(span))
            elif number in (3, 4):
                texts[number] = self._text(span)
            elif number == 5:
                named = self._text(dict(self._fields(span)).get(1, (0, 0)))
                attributes[named] = self._numbers(span).get(3, 0)
        dims, kind = weights.get(inputs[1], ()) if len(inputs) > 1 else (), texts.get(4)
        transposed = kind == "MatMul" or (kind == "Gemm" and not attributes.get("transB"))
        linear = len(dims) == 2 and (kind == "MatMul" or (kind == "Gemm" and not attributes.get("transA")))
        convolution = len(dims) == 4 and kind == "Conv" and attributes.get("group", 1) == 1
        if (linear or convolution) and inputs[0] not in weights:
            shape = dims[::-1] if transposed else dims
            yield Projection(module_of(texts.get(3, "")), inputs[1], shape, transposed)

    def _graphs(self) -> list[Span]:
        graphs = [span for number, span in self._fields((0, len(self._data))) if number == _GRAPH_OF_MODEL]
        if not graphs:
            raise MalformedError("it holds no graph")
        return graphs

    def _spec(self, value_info: Span) -> TensorSpec:
        fields = dict(self._fields(value_info))
        name = self._text(fields.get(1, (0, 0)))
        tensor = dict(self._fields(fields.get(2, (0, 0)))).get(1, (0, 0))
        kind = self._numbers(tensor).get(1, 0)
        if kind not in _DTYPES:
            raise MalformedError(f"tensor {name!r} is of element type {kind}")
        stated = dict(self._fields(tensor)).get(2, (0, 0))
        dims = [span for number, span in self._fields(stated) if number == 1]
        shape = tuple(self._size(dim) or f"{name}_{axis}" for axis, dim in enumerate(dims))
        return TensorSpec(name=name, dtype=_DTYPES[kind], shape=shape)

    def _size(self, dim: Span) -> int | str | None:
        """A dimension's number or symbol; None for neither, or a number that is no size."""
        symbol, number = dict(self._fields(dim)).get(2), self._numbers(dim).get(1, 0)
        return self._text(symbol) if symbol else number if 0 < number < 1 << 63 else None

    def _text(self, span: Span) -> str:
        return self._data[slice(*span)].decode("utf-8", "backslashreplace")

    def _inside(self, message: str, span: Span, depth: int) -> Iterator[str]:
        if depth == 0:
            raise MalformedError(f"nested deeper than {MAX_DEPTH}")
        entered = _ENTERED[message]
        for number, inner in self._fields(span):
            kind = entered.get(number)
            if kind == "Entry":
                yield from self._location(inner)
            elif kind is not None:
                yield from self._inside(kind, inner, depth - 1)

    def _location(self, entry: Span) -> Iterator[str]:
        key, value = self._entry(entry)
        if key == "location":
            yield value

    def _entry(self, entry: Span) -> tuple[str, str]:
        """A key and its value."""
        fields = dict(self._fields(entry))
        return self._text(fields.get(1, (0, 0))), self._text(fields.get(2, (0, 0)))

    def _fields(self, span: Span) -> Iterator[tuple[int, Span]]:
        """The length-delimited fields of a message: number, and where the content lies."""
        return ((number, value) for number, value in self._every_field(span) if isinstance(value, tuple))

    def _numbers(self, span: Span) -> dict[int, int]:
        """The whole numbers among a message's fields."""
        return {number: value for number, value in self._every_field(span) if isinstance(value, int)}

    def _every_field(self, span: Span) -> Iterator[tuple[int, Span | int]]:
        at, end = span
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise MalformedError(f"more than {MAX_FIELDS} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise MalformedError(f"field number 0 at byte {at}")
            if wire == _VARINT:
                value, at = self._varint(at, end)
                yield number, value
            elif wire == _BYTES:
                length, at = self._varint(at, end)
                if length > end - at:
                    raise MalformedError(f"a field of {length} bytes at byte {at} passes the end of its message")
                yield number, (at, at + length)
                at += length
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
                if at > end:
                    raise MalformedError("a number passes the end of its message")
            else:
                raise MalformedError(f"wire type {wire} at byte {at}")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise MalformedError("it ends inside a number")
            byte = self._data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise MalformedError(f"a number longer than 10 bytes at byte {at}")
