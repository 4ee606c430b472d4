"""Graphs of a bundle read without their weights, changed, and written elsewhere beside the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.engine_files import GRAPH_NAME
from ..runtime.errors import BundleError
from ..runtime.manifest import Dtype, TensorSpec
from ..runtime.onnx_files import external_files

LOWEST_OPSET = 13  # Split, Squeeze and Unsqueeze take sizes and axes as inputs from here on

_DTYPES: dict[int, Dtype] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
}


def read_graph(path: Path) -> onnx.ModelProto:
    """An ONNX model without the weights that lie in files beside it.

    Raises:
        BundleError: the file cannot be read, or is no ONNX model.
    """
    external_files(path)
    try:
        return onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no class that onnx makes public
        raise BundleError(str(path), f"not an ONNX model ({error})", remedy="Export the bundle again.") from error


def write_graph(model: onnx.ModelProto, folder: Path, weights_from: Path) -> Path:
    """Write `folder/model.onnx` with the weights its tensors name in files of the folder `weights_from`.

    These are copied: ONNX Runtime and OpenVINO follow no symbolic link out of a model's folder, and a hard link would
    be a second name of the bundle's own files, which is refused as long as it is there.

    Raises:
        BundleError: the model names a file outside its folder, or one that is not there.
        OSError: the folder cannot be written or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / GRAPH_NAME
    path.write_bytes(model.SerializeToString())
    for name in sorted(external_files(path)):
        source, copy = _inside(weights_from, name), folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return path


def weight(tensor: TensorProto, folder: Path) -> npt.NDArray[np.generic]:
    """The values of an initializer; of those that lie in a file of `folder`, only this tensor's bytes are read.

    Raises:
        BundleError: the file is outside the folder, not there, or shorter than the tensor says.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        values: npt.NDArray[np.generic] = numpy_helper.to_array(tensor)
        return values
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    raw = b"".join(external_bytes(tensor, folder))
    read: npt.NDArray[np.generic] = np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))
    return read


def external_bytes(tensor: TensorProto, folder: Path, chunk_bytes: int = 1 << 62) -> Iterator[bytes]:
    """The bytes of an initializer that lie in a file of `folder`, so many at a time.

    Raises:
        BundleError: the file is outside the folder, not there, or shorter than the tensor says.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _inside(folder, entries["location"])
    item_bytes = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    left = wanted = int(np.prod(tensor.dims, dtype=np.int64)) * item_bytes
    with path.open("rb") as stream:
        stream.seek(int(entries.get("offset", 0)))
        while left:
            chunk = stream.read(min(left, chunk_bytes))
            if len(chunk) != min(left, chunk_bytes):
                got = f"{wanted - left + len(chunk)} bytes"
                raise BundleError(str(path), f"weight {tensor.name!r}", got=got, expected=f"{wanted} bytes")
            left -= len(chunk)
            yield chunk


def spec(value: onnx.ValueInfoProto, where: str) -> TensorSpec:
    """A graph's input or output as a manifest has it; sizes that are not known are called by name and axis.

    Raises:
        BundleError: a type that no tensor of a bundle has.
    """
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        expected = f"one of {', '.join(_DTYPES.values())}"
        raise BundleError(where, f"type of {value.name!r}", got=tensor.elem_type, expected=expected)
    shape = tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or f"{value.name}_{axis}"
        for axis, size in enumerate(tensor.shape.dim)
    )
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)


def require_opset(model: onnx.ModelProto, where: str) -> int:
    """The version of ONNX's operators a graph uses.

    Raises:
        BundleError: it is below 13.
    """
    opset = next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < LOWEST_OPSET:
        raise BundleError(where, "opset", got=opset, expected=f"{LOWEST_OPSET} or newer", remedy="Export it again.")
    return opset


def replace_all(entries: Any, by: Iterable[Any]) -> None:
    """Let a graph's list hold these entries instead, some of which may be its own."""
    kept = [type(entry).FromString(entry.SerializeToString()) for entry in by]
    del entries[:]
    entries.extend(kept)


def prune(graph: onnx.GraphProto) -> None:
    """Drop what leads to no output: nodes, weights, and what is known about values that are no more."""
    needed = {value.name for value in graph.output}
    made = set()
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if needed.isdisjoint(node.output):
            del graph.node[index]
        else:
            made.update(node.output)
            needed.update(reads_of(node))
    for entries, names in ((graph.initializer, needed), (graph.value_info, made)):
        for index in reversed(range(len(entries))):
            if entries[index].name not in names:
                del entries[index]


def reads_of(node: onnx.NodeProto) -> set[str]:
    """What a node reads, and what the bodies of its branches and loops do, of their own or from outside."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            names.update(value.name for value in body.output)
            for inner in body.node:
                names |= reads_of(inner)
    return names - {""}


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        expected = f"a file in {folder}"
        raise BundleError(str(folder), "file of weights that a graph names", got=name, expected=expected)
    return path
