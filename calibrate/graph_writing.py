"""Graphs written with some of their weights changed, one weight in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from ..engines.graph_files import external_bytes, weight

# Takes a weight's values, gives those of what stands in its place by name.
Edit = Callable[[npt.NDArray[Any]], Mapping[str, npt.NDArray[Any]]]

_CHUNK_BYTES = 16 << 20
_OUTSIDE_FROM_BYTES = 1024
_ALIGNMENT = 64


def write_edited(model: onnx.ModelProto, edits: Mapping[str, Edit], out: Path, weights_from: Path) -> None:
    """Write the ONNX file `out`, all larger weights in one file beside it, whose name ends in `_data`.

    model: the graph as it is to be, with the initializers that it had.
    edits: for initializers by name; the others stay as they are.
    weights_from: the folder of the files that hold the graph's weights.

    Raises:
        BundleError: a file of weights is not there, outside its folder, or too short.
        OSError: the folder cannot be written or is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}_data")
    tensors: list[TensorProto] = []
    with beside.open("wb") as stream:
        for tensor in model.graph.initializer:
            for header, chunks in _written(tensor, edits.get(tensor.name), weights_from):
                if chunks is None:
                    tensors.append(header)
                    continue
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                offset = stream.tell()
                stream.writelines(chunks)
                tensors.append(_outside(header, beside.name, offset, stream.tell() - offset))
    copy = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            _copy_graph(copy.graph, value, tensors)
        elif isinstance(value, (str, int)):
            setattr(copy, field.name, value)
        else:
            getattr(copy, field.name).MergeFrom(value)
    out.write_bytes(copy.SerializeToString())


def _written(
    tensor: TensorProto, edit: Edit | None, folder: Path
) -> Iterator[tuple[TensorProto, Iterable[bytes] | None]]:
    """What becomes of an initializer: tensors, and the bytes of those that go into the file of weights."""
    if edit is not None:
        for name, values in edit(weight(tensor, folder)).items():
            yield _placed(numpy_helper.from_array(values, name))
    elif tensor.data_location == TensorProto.EXTERNAL:
        yield tensor, external_bytes(tensor, folder, _CHUNK_BYTES)
    else:
        yield _placed(tensor)


def _placed(tensor: TensorProto) -> tuple[TensorProto, Iterable[bytes] | None]:
    if tensor.ByteSize() < _OUTSIDE_FROM_BYTES:
        return tensor, None
    return tensor, [tensor.raw_data or numpy_helper.to_array(tensor).tobytes()]


def _outside(tensor: TensorProto, location: str, offset: int, length: int) -> TensorProto:
    """A tensor of that name, type and shape whose bytes lie in a file."""
    made = TensorProto(
        name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        made.external_data.add(key=key, value=value)
    return made


def _copy_graph(copy: onnx.GraphProto, graph: onnx.GraphProto, tensors: Iterable[TensorProto]) -> None:
    """All of a graph but its initializers, which may be large and are these instead."""
    for field, value in graph.ListFields():
        if field.name == "initializer":
            continue
        if isinstance(value, str):
            setattr(copy, field.name, value)
        else:
            getattr(copy, field.name).MergeFrom(value)
    copy.initializer.extend(tensors)
