"""Sizes put into a graph: the shape of every value at them, and the multiply-adds of every node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, checker, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from ..runtime.errors import BundleError
from ..runtime.shapes import evaluated

# What shapes are computed of; larger tensors are weights.
_MOST_VALUES = 64
_OF_SHAPES = frozenset({TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL})
# What ONNX's reference of an operator, in Python, raises where it does not take the values.
_NOT_EVALUATED = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
# What has multiply-adds.
DENSE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Inferred:
    """What is known of a graph's values: ONNX's type of their elements, and their shapes."""

    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)


def inferred(model: onnx.ModelProto, sizes: Mapping[str, int], where: str) -> Inferred:
    """Types and shapes of a graph's values where its symbolic dimensions have these sizes; weights are not read.

    Node by node, with the whole numbers that shapes are computed of as values: ONNX's own inference over a graph does
    not compute all of them. Values behind an operator that ONNX cannot infer are left out.

    Raises:
        BundleError: an input's shape holds another symbol.
    """
    opsets = {entry.domain: int(entry.version) for entry in model.opset_import}
    known: dict[str, onnx.TypeProto] = {}
    values: dict[str, TensorProto] = {}
    for tensor in model.graph.initializer:
        known[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tuple(tensor.dims))
        if tensor.data_location != TensorProto.EXTERNAL and prod(tensor.dims) <= _MOST_VALUES:
            values[tensor.name] = tensor
    for value in model.graph.input:
        shape = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        given = evaluated(shape, sizes)
        if given is None:
            expected = f"numbers and formulas of {', '.join(sizes)}"
            raise BundleError(where, f"shape of input {value.name!r}", got=tuple(shape), expected=expected)
        known[value.name] = helper.make_tensor_type_proto(value.type.tensor_type.elem_type, given)
    for node in model.graph.node:
        _infer(node, known, values, opsets)
    found = Inferred()
    for name, kind in known.items():
        dims = kind.tensor_type.shape.dim
        if kind.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in dims):
            found.types[name] = int(kind.tensor_type.elem_type)
            found.shapes[name] = tuple(int(size.dim_value) for size in dims)
    return found


def inferred_at(model: onnx.ModelProto, shapes: Mapping[str, Shape], where: str) -> Inferred:
    """Types and shapes of a graph's values where its inputs have these shapes, which it is given.

    Raises:
        BundleError: an input's shape is not given.
    """
    for value in model.graph.input:
        for side, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            side.dim_value = size
    return inferred(model, {}, where)


def _infer(
    node: onnx.NodeProto,
    known: dict[str, onnx.TypeProto],
    values: dict[str, TensorProto],
    opsets: Mapping[str, int],
) -> None:
    """Add a node's outputs to what is known, and to the values where they are computed of such."""
    reads = [name for name in node.input if name]
    if any(name not in known for name in reads):
        return
    if node.op_type == "Shape":
        dims = [size.dim_value for size in known[reads[0]].tensor_type.shape.dim]
        sides = numpy_helper.from_array(np.array(dims[shape_range(node, len(dims))], np.int64))
        values[node.output[0]] = sides
        known[node.output[0]] = helper.make_tensor_type_proto(TensorProto.INT64, tuple(sides.dims))
        return
    given = {name: values[name] for name in reads if name in values}
    try:
        schema = defs.get_schema(node.op_type, opsets[node.domain], node.domain)
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        # Convolutions and normalizations take bfloat16 from opset 22 on; graphs in it are float16's of an older one.
        made_in = {name: _retyped(known[name], TensorProto.BFLOAT16, TensorProto.FLOAT16) for name in reads}
        made = shape_inference.infer_node_outputs(schema, node, made_in, given, opset_imports=imports)
    except (defs.SchemaError, shape_inference.InferenceError, checker.ValidationError, KeyError):
        return
    if node.op_type != "Cast" and any(made_in[name] != known[name] for name in reads):
        made = {name: _retyped(kind, TensorProto.FLOAT16, TensorProto.BFLOAT16) for name, kind in made.items()}
    known.update(made)
    made_of_values = len(given) == len(set(reads))
    if made_of_values and all(known[name].tensor_type.elem_type in _OF_SHAPES for name in node.output if name):
        feeds = {name: numpy_helper.to_array(one) for name, one in given.items()}
        try:
            results = ReferenceEvaluator(node).run(None, feeds)
        except _NOT_EVALUATED:
            return
        for name, result in zip(node.output, results, strict=False):
            if np.size(result) <= _MOST_VALUES:
                values[name] = numpy_helper.from_array(np.asarray(result))


def _retyped(kind: onnx.TypeProto, of: int, to: int) -> onnx.TypeProto:
    """A tensor's type with elements of type `to` where they are of type `of`."""
    if kind.tensor_type.elem_type != of:
        return kind
    changed = onnx.TypeProto()
    changed.CopyFrom(kind)
    changed.tensor_type.elem_type = to
    return changed


def shape_range(node: onnx.NodeProto, rank: int) -> slice:
    """The axes of which a Shape node gives the sizes."""
    attributes = {one.name: one.i for one in node.attribute}
    return slice(*slice(attributes.get("start", 0), attributes.get("end", rank)).indices(rank))


def multiply_adds(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """The multiply-adds of a convolution or matrix product; 0 of everything else, and where a shape is not known.

    Without biases and normalization, as published counts are made.
    """
    if node.op_type not in DENSE or any(name not in shapes for name in (*node.input[:2], node.output[0])):
        return 0
    read, weight, made = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return prod(made) * prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return prod(read) * prod(weight[1:])
    transposed = any(one.name == "transA" and one.i for one in node.attribute)
    return prod(made) * read[0 if transposed else -1]
