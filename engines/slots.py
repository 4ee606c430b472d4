"""LoRA slots: a graph whose projections carry low-rank inputs, so that a LoRA is an input and not a rebuild."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from ..runtime.errors import ArgumentError, BundleError
from ..runtime.lora_slots import LORA_DOWN, LORA_SCALE, LORA_UP, module_of
from .graph_files import replace_all, require_opset

_POINTWISE = {"strides": [1, 1], "pads": [0, 0, 0, 0], "auto_pad": b"NOTSET"}


def lora_slots(model: onnx.ModelProto, *, slots: int, rank: int, where: str = "denoiser") -> onnx.ModelProto:
    """A copy of a graph with room for `slots` LoRAs of up to `rank` at once; `runtime.lora_slots` lists its inputs.

    Every projection takes part whose weight is stored: MatMul, Gemm and two-dimensional convolutions of one group. A
    module is called what its node is, see `module_of`. What is added is added behind the bias. Nodes, weights and
    tensors keep their names. To fold time steps or compose a step engine, do that afterwards.

    model: the graph; its weights may lie in files and are not read.

    Raises:
        ArgumentError: slots or rank below 1, or a graph that has no such projection.
        BundleError: an opset below 13, or two projections of one name.
    """
    if slots < 1 or rank < 1:
        raise ArgumentError(where, "LoRA slots and rank", got=(slots, rank), expected="1 or more of each")
    require_opset(model, where)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = _projections(copy.graph)
    twice = [module for module, count in Counter(one.module for one in found).items() if count > 1]
    if twice or not found:
        what = "two projections of one name" if twice else "no projection whose weight is stored"
        kind = BundleError if twice else ArgumentError
        raise kind(where, what, got=twice or len(copy.graph.node), expected="named MatMul, Gemm or Conv nodes")
    _put(copy.graph, found, slots * rank)
    return copy


@dataclass(frozen=True, slots=True)
class _Projection:
    """A module: what it reads, what it makes with its bias, how wide both are, and its precision.

    convolution: the node, where it is one. kernel: its height and width, where it looks at more than one place.
    """

    module: str
    given: str
    made: str
    widths: tuple[int, int]
    dtype: int
    convolution: onnx.NodeProto | None
    kernel: tuple[int, ...]


def _projections(graph: onnx.GraphProto) -> list[_Projection]:
    weights = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        widths = None if weight is None else _widths(node, weight)
        if weight is None or widths is None or node.input[0] in weights:
            continue
        made = _behind_bias(node.output[0], readers, weights)
        convolution = node if node.op_type == "Conv" else None
        kernel = () if convolution is None else _kernel(convolution, weight)
        module = module_of(node.name)
        found.append(_Projection(module, node.input[0], made, widths, weight.data_type, convolution, kernel))
    return found


def _kernel(node: onnx.NodeProto, weight: TensorProto) -> tuple[int, ...]:
    """A convolution's height and width; nothing for one that is a matrix product at each place."""
    attributes = _attributes(node)
    plain = all(attributes.get(name, usual) == usual for name, usual in _POINTWISE.items())
    sides = tuple(weight.dims[2:])
    return () if plain and sides == (1, 1) else sides


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _widths(node: onnx.NodeProto, weight: TensorProto) -> tuple[int, int] | None:
    """The channels a projection reads and makes; None for a node that is none."""
    attributes, dims = _attributes(node), tuple(weight.dims)
    if node.op_type == "MatMul" and len(dims) == 2:
        return dims
    if node.op_type == "Gemm" and len(dims) == 2 and not attributes.get("transA"):
        return (dims[1], dims[0]) if attributes.get("transB") else dims
    if node.op_type == "Conv" and len(dims) == 4 and attributes.get("group", 1) == 1:
        return dims[1], dims[0]
    return None


def _behind_bias(made: str, readers: dict[str, list[onnx.NodeProto]], weights: dict[str, TensorProto]) -> str:
    """What a projection makes, after the addition of its bias where that is a node of its own."""
    reading = readers.get(made, [])
    if len(reading) == 1 and reading[0].op_type == "Add":
        other = [name for name in reading[0].input if name != made]
        if other and other[0] in weights and len(weights[other[0]].dims) == 1:
            return str(reading[0].output[0])
    return made


def _put(graph: onnx.GraphProto, found: Sequence[_Projection], columns: int) -> None:
    scales: dict[int, str] = {TensorProto.FLOAT: LORA_SCALE}
    nodes = []
    for dtype in dict.fromkeys(one.dtype for one in found if one.dtype != TensorProto.FLOAT):
        scales[dtype] = f"{LORA_SCALE}/{TensorProto.DataType.Name(dtype).lower()}"
        nodes.append(helper.make_node("Cast", [LORA_SCALE], [scales[dtype]], name=f"{scales[dtype]}/Cast", to=dtype))
    by_made = {one.made: one for one in found}
    for node in graph.node:
        nodes.append(node)
        for index, made in enumerate(node.output):
            if made in by_made:
                one = by_made[made]
                node.output[index] = f"lora/{one.module}/base"
                nodes += _change(one, node.output[index], scales[one.dtype])
    inputs: list[Any] = [*graph.input, helper.make_tensor_value_info(LORA_SCALE, TensorProto.FLOAT, (columns,))]
    for one in found:
        read, made_width = one.widths
        down = (columns, read, *one.kernel) if one.kernel else (read, columns)
        inputs.append(helper.make_tensor_value_info(LORA_DOWN + one.module, one.dtype, down))
        inputs.append(helper.make_tensor_value_info(LORA_UP + one.module, one.dtype, (columns, made_width)))
    replace_all(graph.node, nodes)
    replace_all(graph.input, inputs)


def _change(one: _Projection, base: str, scale: str) -> list[onnx.NodeProto]:
    """base + (x · down) · scale · up, under the name that the base had."""
    nodes: list[onnx.NodeProto] = []

    def add(op_type: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        name = f"lora/{one.module}/{op_type}_{len(nodes)}"
        nodes.append(helper.make_node(op_type, inputs, [output or name], name=name, **attributes))
        return output or name

    value, down = one.given, LORA_DOWN + one.module
    if one.kernel and one.convolution is not None:
        value = add("Conv", [value, down], **_attributes(one.convolution))
    # The channels last, as a matrix product wants them.
    value = add("Transpose", [value], perm=[0, 2, 3, 1]) if one.convolution is not None else value
    value = value if one.kernel else add("MatMul", [value, down])
    value = add("MatMul", [add("Mul", [value, scale]), LORA_UP + one.module])
    value = add("Transpose", [value], perm=[0, 3, 1, 2]) if one.convolution is not None else value
    add("Add", [base, value], one.made)
    return nodes
