"""The layers of a graph that can be quantized: convolutions and matrix products whose weight is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from ..engines.graph_files import reads_of, require_opset
from ..runtime.errors import ArgumentError, BundleError

KINDS = ("Conv", "MatMul", "Gemm")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_HALF_SCALES_OPSET = 19  # from here on scales may be of the graph's own type
_QUANTIZED = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "MatMulNBits",
    }
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that multiplies what it reads by a stored weight.

    name, kind: the node's name and operator. reads: what it multiplies. weight: the initializer.
    axis: the weight's axis of output channels. reads_axis: that of input channels.
    elem_type: ONNX's number of the type that it computes in, float32 or float16.
    """

    name: str
    kind: str
    reads: str
    weight: str
    axis: int
    reads_axis: int
    elem_type: int


def require_float(model: onnx.ModelProto, where: str) -> None:
    """Raise ArgumentError where a graph is quantized already."""
    found = Counter(node.op_type for node in model.graph.node if node.op_type in _QUANTIZED)
    if found:
        raise ArgumentError(
            where,
            "its graph is quantized already",
            got=", ".join(f"{count} {kind}" for kind, count in found.items()),
            expected="a graph in floating point",
            remedy="Quantize the bundle that this one was made of.",
        )


def layers_of(model: onnx.ModelProto, where: str) -> tuple[Layer, ...]:
    """The layers of a graph in its order; one whose weight something else reads too is none.

    Matrix products of two activations, as in attention, are none either: backends have one kernel for all of it.

    Raises:
        ArgumentError: the graph is quantized already, or has no such layer.
        BundleError: layers without names of their own, or an opset that cannot tell how they are quantized.
    """
    require_float(model, where)
    opset = require_opset(model, where)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    candidates = [one for node in model.graph.node if (one := _layer(node, weights)) is not None]
    multiplied = Counter(one.weight for one in candidates)
    read = Counter(name for node in model.graph.node for name in reads_of(node))
    found = tuple(one for one in candidates if read[one.weight] == multiplied[one.weight])
    if not found:
        raise ArgumentError(where, "no layer to quantize", expected=f"{', '.join(KINDS)} with a stored weight")
    unnamed = [name for name, count in Counter(one.name for one in found).items() if count > 1 or not name]
    if unnamed:
        raise BundleError(where, "layers without names of their own", got=unnamed[:5], remedy="Export it again.")
    if opset < _HALF_SCALES_OPSET and any(one.elem_type == TensorProto.FLOAT16 for one in found):
        expected = f"{_HALF_SCALES_OPSET} or newer for layers in float16"
        raise BundleError(where, "opset", got=opset, expected=expected, remedy="Export it again.")
    return found


def by_weight(layers: Iterable[Layer]) -> tuple[tuple[str, ...], ...]:
    """The names of layers, those of one weight together, in the order of the first of each."""
    found: dict[str, list[str]] = {}
    for one in layers:
        found.setdefault(one.weight, []).append(one.name)
    return tuple(map(tuple, found.values()))


def require_layers(names: Iterable[str], layers: Iterable[Layer], where: str) -> None:
    """Raise ArgumentError where one of the names is no layer's."""
    unknown = sorted(set(names) - {one.name for one in layers})
    if unknown:
        raise ArgumentError(where, "no such layers", got=unknown[:5], expected="names of the graph's nodes")


def of_time_alone(graph: onnx.GraphProto, timestep: str = "timestep") -> frozenset[str]:
    """The values that depend on the time step and on nothing else that is given."""
    constant, derived = {"", *(tensor.name for tensor in graph.initializer)}, {timestep}
    for node in graph.node:
        reads = set(node.input)
        if reads <= constant:
            constant.update(node.output)
        elif reads <= constant | derived:
            derived.update(node.output)
    return frozenset(derived)


def _layer(node: onnx.NodeProto, weights: dict[str, TensorProto]) -> Layer | None:
    weight = weights.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or node.input[0] in weights or weight.data_type not in _FLOATS:
        return None
    axes = _axes(node, len(weight.dims))
    if axes is None:
        return None
    reads, stored = node.input[:2]
    return Layer(node.name, node.op_type, reads, stored, *axes, weight.data_type)


def _axes(node: onnx.NodeProto, rank: int) -> tuple[int, int] | None:
    """A weight's axes of output and input channels; None for a node that is no layer."""
    attributes: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type == "Conv" and rank >= 3:
        return 0, 1
    if node.op_type == "MatMul" and rank == 2:
        return 1, 0
    if node.op_type == "Gemm" and rank == 2 and not attributes.get("transA"):
        return (0, 1) if attributes.get("transB") else (1, 0)
    return None
