"""Half-precision graphs: weights and arithmetic in float16, with islands kept in float32.

Inputs and outputs stay float32, cast at the border, so that whoever runs a graph feeds it the same arrays in either
precision.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnxscript import ir

from ..runtime.errors import ExportError
from .onnx_weights import Weight

# Operands that are float32 whatever the type of the data: Resize's region of interest and scales.
_ALWAYS_FLOAT32 = {"Resize": frozenset({1, 2})}
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def half_from_float(model: ir.Model, islands: frozenset[ir.Node]) -> None:
    """Turn a float32 graph into a strongly typed float16 one in place; `islands` keep computing in float32.

    Casts stand only where a value crosses between the two; neighbouring islands pass float32 on directly.
    """
    if any(True for _ in model.graph.subgraphs()):
        raise ExportError(model.graph.name or "graph", "control flow cannot be turned into half precision")
    casts = _Casts(model.graph)
    floats = {value for node in model.graph for value in node.outputs if value.dtype == _FLOAT}
    floats.update(value for value in model.graph.inputs if value.dtype == _FLOAT)
    floats.update(value for value in model.graph.initializers.values() if value.dtype == _FLOAT)
    results = list(model.graph.outputs)
    for node in list(model.graph):
        wanted = _FLOAT if node in islands else _HALF
        fixed = _ALWAYS_FLOAT32.get(node.op_type, frozenset())
        for index, value in enumerate(node.inputs):
            if value in floats:
                node.replace_input_with(index, casts.version(value, _FLOAT if index in fixed else wanted))
        if wanted is _HALF:
            _make_attributes_half(node)
            for value in node.outputs:
                if value in floats:
                    value.type = ir.TensorType(_HALF)
    for index, value in enumerate(results):
        if value.dtype == _HALF:
            name, value.name = value.name, f"{value.name}_half"
            result = casts.version(value, _FLOAT)
            result.name, result.shape, value.shape = name, value.shape, None
            model.graph.outputs[index] = result
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def with_roundings(model: Path) -> ir.Model:
    """A float16 model from a file, changed so that no runtime can skip the rounding of a float16 value.

    An Identity stands behind every float16 result: ONNX Runtime's CPU provider, which lacks most float16 kernels,
    computes in float32 and merges the casts it puts around neighbouring nodes, but not across another node. Weights
    beside the model's file stay there.
    """
    copy = ir.load(model)
    for node in list(copy.graph):
        for value in node.outputs:
            if value.dtype == _HALF and not value.is_graph_output():
                barrier = ir.node("Identity", [value], name=f"{value.name}_rounded")
                rounded = barrier.outputs[0]
                rounded.name, rounded.type = f"{value.name}_rounded", value.type
                value.replace_all_uses_with(rounded)
                barrier.replace_input_with(0, value)
                copy.graph.insert_after(node, barrier)
    return copy


class _Casts:
    """Versions of values in the other precision, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[ir.Value, ir.Value] = {}

    def version(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in the precision asked for: itself, a converted weight, or a Cast right behind its producer."""
        if value.dtype == dtype:
            return value
        if value not in self._made:
            made = self._weight(value) if value.is_initializer() else self._cast(value, dtype)
            self._made[value] = made
        return self._made[value]

    def _weight(self, value: ir.Value) -> ir.Value:
        name, tensor = f"{value.name}_half", value.const_value
        if isinstance(tensor, Weight):
            half = tensor.half(name)
        else:
            half = ir.tensor(tensor.numpy().astype(np.float16), name=name)
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(_HALF), const_value=half)
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}_{'float' if dtype == _FLOAT else 'half'}"
        node = ir.node("Cast", [value], {"to": dtype}, name=f"{name}/Cast")
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]


def _make_attributes_half(node: ir.Node) -> None:
    """Let a node whose output type an attribute states give float16 where it gave float32."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", _HALF)
    value = node.attributes.get("value")
    if node.op_type in ("Constant", "ConstantOfShape") and value is not None and value.as_tensor().dtype == _FLOAT:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.as_tensor().numpy().astype(np.float16)))
