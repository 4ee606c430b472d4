"""Float16 graphs in another floating type: float32, in which they are what was meant, or bfloat16, which has its range.

Everything that is float16 changes, weights included; what is computed in float32 stays, as do the types of a graph's
inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.engine_files import GRAPH_NAME
from .graph_files import external_bytes

WEIGHTS_NAME = "model.onnx_data"
# Attributes that name an element type; others, such as LayerNormalization's `stash_type`, name the one it computes in.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
_CHUNK_BYTES = 16 << 20
_OUTSIDE_FROM_BYTES = 1024
_ALIGNMENT = 64


def retyped(model: onnx.ModelProto, to: int) -> onnx.ModelProto:
    """A copy of a graph with every float16 type changed to `to`, its weights still as they are; see `write_retyped`."""
    changed: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    _retype_graph(changed.graph, to)
    _keep_interface(changed.graph, model.graph, to)
    return changed


def write_retyped(model: onnx.ModelProto, to: int | None, folder: Path, weights_from: Path) -> Path:
    """Write `folder/model.onnx` in the type `to`, all its larger weights in one file beside it.

    to: None to leave all types as they are.
    weights_from: the folder that the model's own files of weights lie in. They are converted a few megabytes at a time.

    Raises:
        BundleError: a file of weights is not there, outside its folder, or too short.
        OSError: the folder cannot be written or is full.
    """
    changed = model if to is None else retyped(model, to)
    tensors = []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS_NAME).open("wb") as weights:
        for tensor in changed.graph.initializer:
            become = to if to is not None and tensor.data_type == TensorProto.FLOAT16 else tensor.data_type
            if tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() < _OUTSIDE_FROM_BYTES:
                tensors.append(_small(tensor, become))
                continue
            weights.write(bytes(-weights.tell() % _ALIGNMENT))
            offset = weights.tell()
            for chunk in _chunks(tensor, weights_from):
                weights.write(
                    chunk if become == tensor.data_type else _converted(np.frombuffer(chunk, np.float16), become)
                )
            tensors.append(_outside(tensor, become, offset, weights.tell() - offset))
    path = folder / GRAPH_NAME
    path.write_bytes(_with_initializers(changed, tensors).SerializeToString())
    return path


def _chunks(tensor: TensorProto, folder: Path) -> Iterator[bytes]:
    if tensor.data_location == TensorProto.EXTERNAL:
        return external_bytes(tensor, folder, _CHUNK_BYTES)
    return iter([numpy_helper.to_array(tensor).tobytes()])


def _with_initializers(model: onnx.ModelProto, tensors: Iterable[TensorProto]) -> onnx.ModelProto:
    """A copy with these initializers in place of its own, which may be large."""
    copy, graph = onnx.ModelProto(), onnx.GraphProto()
    for message, source, left_out in ((copy, model, "graph"), (graph, model.graph, "initializer")):
        for field, value in source.ListFields():
            if field.name == left_out:
                continue
            if isinstance(value, (str, int, bytes)):
                setattr(message, field.name, value)
            elif field.name != "doc_string":
                getattr(message, field.name).MergeFrom(value)
    graph.initializer.extend(tensors)
    copy.graph.CopyFrom(graph)
    return copy


def _retype_graph(graph: onnx.GraphProto, to: int) -> None:
    """Nodes, what they hold, and what is said about values; initializers of the main graph are written with files."""
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type == TensorProto.FLOAT16:
            tensor.elem_type = to
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT16:
                attribute.i = to
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT16:
                _convert_inside(attribute.t, to)
        for body in _bodies(node):
            for tensor in body.initializer:
                if tensor.data_type == TensorProto.FLOAT16:
                    _convert_inside(tensor, to)
            _retype_graph(body, to)


def _keep_interface(graph: onnx.GraphProto, original: onnx.GraphProto, to: int) -> None:
    """Cast between the types of the original's inputs and outputs and those inside, under their own names."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {value.name for value in _halves(original.input) if value.name not in weights}
    outputs = {value.name for value in _halves(original.output)}
    for value in (*graph.input, *graph.output):
        if value.name in inputs | outputs:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    inside = {name: f"{name}_inside" for name in inputs | outputs}
    _rename(graph, inside)
    before = [_cast(name, inside[name], to) for name in sorted(inputs)]
    after = [_cast(inside[name], name, TensorProto.FLOAT16) for name in sorted(outputs)]
    nodes = [*before, *graph.node, *after]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for listed in (node.input, node.output):
            listed[:] = [names.get(name, name) for name in listed]
        for body in _bodies(node):
            _rename(body, names)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs of a node's branches and loops."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _halves(values: Iterable[onnx.ValueInfoProto]) -> Iterator[onnx.ValueInfoProto]:
    return (value for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16)


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}/Cast", to=to)


def _convert_inside(tensor: TensorProto, to: int) -> None:
    """Convert a small float16 tensor that lies in the graph itself."""
    halves = numpy_helper.to_array(tensor)
    tensor.CopyFrom(helper.make_tensor(tensor.name, to, halves.shape, _converted(halves, to), raw=True))


def _converted(halves: npt.NDArray[np.float16], to: int) -> bytes:
    return halves.astype(helper.tensor_dtype_to_np_dtype(to)).tobytes()


def _small(tensor: TensorProto, become: int) -> TensorProto:
    copy: TensorProto = TensorProto.FromString(tensor.SerializeToString())
    if become != tensor.data_type:
        _convert_inside(copy, become)
    return copy


def _outside(tensor: TensorProto, become: int, offset: int, length: int) -> TensorProto:
    """A tensor of that name and shape whose bytes lie in the file of weights."""
    made = TensorProto(name=tensor.name, dims=tensor.dims, data_type=become, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS_NAME), ("offset", str(offset)), ("length", str(length))):
        made.external_data.add(key=key, value=value)
    return made
