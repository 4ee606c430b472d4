"""Graphs whose intermediate values can be read: which there are, and copies that give some of them as outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx
from onnx import TensorProto, helper

from ..runtime.engine_files import Shape
from ..runtime.shapes import evaluated
from .graph_files import prune, replace_all

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_ITEM_BYTES = 4  # as they are compared
_UNKNOWN_BYTES = 8 << 20  # where the shape follows from values, as in text encoders, whose layers are small


@dataclass(frozen=True, slots=True)
class Value:
    """A floating-point value that a node of a graph makes, in the order in which nodes run.

    kind: the node's operator. elem_type: ONNX's number of its type. size_bytes: about what it takes as float32.
    """

    name: str
    node: str
    kind: str
    elem_type: int
    size_bytes: int


def values_of(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> tuple[Value, ...]:
    """The floating-point values of a graph, with their sizes where its inputs have these shapes."""
    sized = onnx.ModelProto.FromString(model.SerializeToString())
    sizes = {
        dim.dim_param: size
        for value in sized.graph.input
        for dim, size in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ()), strict=False)
        if dim.dim_param
    }
    for value in (*sized.graph.input, *sized.graph.value_info, *sized.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            known = evaluated([dim.dim_param], sizes) if dim.dim_param else None
            if known is not None:
                dim.dim_value = known[0]
    graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    typed = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    known_bytes = {name: _bytes(tensor) for name, tensor in typed.items()}
    return tuple(
        Value(
            name,
            node.name or f"the one of {name}",
            node.op_type,
            typed[name].elem_type,
            known_bytes[name] or _UNKNOWN_BYTES,
        )
        for node in graph.node
        for name in node.output
        if name in typed and typed[name].elem_type in _FLOATS
    )


def batches(values: Iterable[Value], most_bytes: int) -> Iterator[tuple[Value, ...]]:
    """Neighbouring values that together take at most so much memory; one that takes more is alone."""
    batch: list[Value] = []
    for value in values:
        if batch and sum(one.size_bytes for one in batch) + value.size_bytes > most_bytes:
            yield tuple(batch)
            batch = []
        batch.append(value)
    if batch:
        yield tuple(batch)


def giving(model: onnx.ModelProto, values: Sequence[Value], shapes: Mapping[str, Shape]) -> onnx.ModelProto:
    """A copy of a graph whose outputs are these values alone, bfloat16 ones as float32; nodes of no use to them go.

    shapes: of those that are known, by name.
    """
    copied: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    graph = copied.graph
    inside = {}
    for value in values:
        if value.elem_type == TensorProto.BFLOAT16:  # which numpy has not
            inside[value.name] = f"{value.name}_inside"
            graph.node.append(
                helper.make_node("Cast", [inside[value.name]], [value.name], name=value.name, to=TensorProto.FLOAT)
            )
    for node in graph.node[: len(graph.node) - len(inside)]:
        for listed in (node.input, node.output):
            listed[:] = [inside.get(name, name) for name in listed]
    del graph.output[:]
    for value in values:
        elem_type = TensorProto.FLOAT if value.name in inside else value.elem_type
        graph.output.append(helper.make_tensor_value_info(value.name, elem_type, shapes.get(value.name)))
    prune(graph)
    read = {name for node in graph.node for name in node.input}
    outputs = {value.name for value in graph.output}
    replace_all(graph.input, [value for value in graph.input if value.name in read])
    replace_all(graph.value_info, [value for value in graph.value_info if value.name not in outputs])
    return copied


def _bytes(tensor: onnx.TypeProto.Tensor) -> int | None:
    known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
    return prod(dim.dim_value for dim in tensor.shape.dim) * _ITEM_BYTES if known else None
