"""Half-precision graphs: weights and arithmetic in float16, with islands kept in float32 where float16 would fail.

Inputs and outputs stay float32, cast at the border, so that whoever runs a graph feeds it the same arrays in either
precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from onnxscript import ir

from ..runtime.errors import ExportError
from .graph import save
from .onnx_weights import Weight
from .samples import Inputs
from .session import OnnxRun

# Sums over many values, and functions that magnify what float16 rounds away.
ISLAND_OPS = frozenset(
    {
        "InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization", "BatchNormalization",
        "Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Exp", "Log", "Sin", "Cos",
    }
)  # fmt: skip
# A time step up to 999 times a frequency has no room in float16's 11 bits: all that leads to these stays float32.
_PRECISE_ARGUMENTS = frozenset({"Sin", "Cos"})
# A quarter of float16's 65504, because the samples are few and prompts are many.
OVERFLOW_RISK = 16376.0
# Operands that are float32 whatever the type of the data: Resize's region of interest and scales.
_ALWAYS_FLOAT32 = {"Resize": frozenset({1, 2})}
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_MAX_MAGNITUDE = "max_magnitude"


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


def find_islands(model: ir.Model, cases: Iterable[Inputs], scratch: Path) -> frozenset[ir.Node]:
    """The nodes that must stay float32: by kind, and those that touch a value near float16's range on real inputs.

    A copy of the graph that is run to find these lies in the folder `scratch` meanwhile.

    Raises:
        ExportError: ONNX Runtime cannot load or run that copy.
    """
    values = [value for node in model.graph for value in node.outputs if value.dtype == _FLOAT]
    large = _large_values(model, values, cases, scratch)
    large |= {
        value
        for value in model.graph.initializers.values()
        if value.dtype == _FLOAT and _largest(value.const_value) > OVERFLOW_RISK
    }
    islands = {node for node in model.graph if node.op_type in ISLAND_OPS}
    for node in model.graph:
        if node.op_type in _PRECISE_ARGUMENTS:
            islands |= _ancestors(node)
        if any(value in large for value in (*node.inputs, *node.outputs)):
            islands.add(node)
    return frozenset(islands)


def save_with_roundings(model: Path, folder: Path) -> Path:
    """Write a copy of a float16 model to `folder` in which no runtime can skip the rounding of a float16 value.

    An Identity stands behind every float16 result: ONNX Runtime's CPU provider, which lacks most float16 kernels,
    computes in float32 and merges the casts it puts around neighbouring nodes, but not across another node.
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
    return save(copy, folder)


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
            half = tensor.as_dtype(name, _HALF)
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


def _largest(tensor: ir.TensorProtocol) -> float:
    if isinstance(tensor, Weight):
        return tensor.largest
    return float(np.abs(tensor.numpy()).max(initial=0))


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """The nodes whose float32 results lead to `node`."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None and value.dtype == _FLOAT else None
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _large_values(model: ir.Model, values: list[ir.Value], cases: Iterable[Inputs], scratch: Path) -> set[ir.Value]:
    """The values whose magnitude comes near float16's range, measured by a copy of the graph that returns maxima."""
    large: set[ir.Value] = set()
    with TemporaryDirectory(dir=scratch) as folder:
        path = save(_with_maxima(model, [str(value.name) for value in values]), Path(folder))
        run = OnnxRun(f"{model.graph.name}: search for fp32 islands", path, optimized=True)
        for inputs in cases:
            maxima = run(inputs)[-1]
            large.update(value for value, maximum in zip(values, maxima, strict=True) if not maximum <= OVERFLOW_RISK)
    return large


def _with_maxima(model: ir.Model, names: list[str]) -> ir.Model:
    """A copy of a model whose last output holds every named value's largest magnitude, (len(names),) float32."""
    copy = model.clone()
    by_name = {value.name: value for node in copy.graph for value in node.outputs}
    one = ir.tensor(np.array([1]), name="one")
    shape = ir.Value(name=one.name, shape=one.shape, type=ir.TensorType(one.dtype), const_value=one)
    copy.graph.register_initializer(shape)
    maxima = []
    for index, name in enumerate(names):
        magnitude = ir.node("Abs", [by_name[name]], name=f"abs_{index}")
        largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0}, name=f"max_{index}")
        listed = ir.node("Reshape", [largest.outputs[0], shape], name=f"listed_{index}")
        for node, suffix in ((magnitude, "abs"), (largest, "max"), (listed, "listed")):
            node.outputs[0].name = f"{name}_{suffix}"
            copy.graph.append(node)
        maxima.append(listed.outputs[0])
    joined = ir.node("Concat", maxima, {"axis": 0}, name=_MAX_MAGNITUDE)
    joined.outputs[0].name = _MAX_MAGNITUDE
    joined.outputs[0].type, joined.outputs[0].shape = ir.TensorType(_FLOAT), ir.Shape([len(names)])
    copy.graph.append(joined)
    copy.graph.outputs.append(joined.outputs[0])
    return copy
