"""Which nodes of a graph must stay float32 in half precision, found by running it on realistic inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from onnxscript import ir

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
# Operators whose results are some of their operands' values, and those whose results are never over 1.
_MOVING = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip
_BOUNDED = frozenset({"Cos", "Erf", "Sigmoid", "Sin", "Softmax", "Tanh"})
# Weights over so many bytes are read from the file in float16 and made float32 where they are used.
_STREAMED_ABOVE = 1 << 16
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def find_islands(model: ir.Model, cases: Iterable[Inputs], scratch: Path) -> frozenset[ir.Node]:
    """The nodes that must stay float32: by kind, and those that touch a value near float16's range on real inputs.

    A copy of the graph that is run to find these lies in the folder `scratch` meanwhile: float32 arithmetic on weights
    in float16.

    Raises:
        ExportError: ONNX Runtime cannot load or run that copy.
    """
    large = {
        value
        for value in model.graph.initializers.values()
        if value.dtype == _FLOAT and _largest(value.const_value) > OVERFLOW_RISK
    }
    watched = [value for node in model.graph if node.op_type not in _MOVING | _BOUNDED for value in _results(node)]
    maxima = _maxima(model, watched, cases, scratch)
    large.update(value for value, maximum in zip(watched, maxima, strict=True) if not maximum <= OVERFLOW_RISK)
    islands = {node for node in model.graph if node.op_type in ISLAND_OPS}
    for node in model.graph:
        if node.op_type in _MOVING and any(value in large for value in node.inputs):
            large.update(_results(node))
        if node.op_type in _PRECISE_ARGUMENTS:
            islands |= _ancestors(node)
        if any(value in large for value in (*node.inputs, *node.outputs)):
            islands.add(node)
    return frozenset(islands)


def _results(node: ir.Node) -> Iterator[ir.Value]:
    return (value for value in node.outputs if value.dtype == _FLOAT)


def _largest(tensor: ir.TensorProtocol) -> float:
    return tensor.largest if isinstance(tensor, Weight) else float(np.abs(tensor.numpy()).max(initial=0))


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


def _maxima(model: ir.Model, values: list[ir.Value], cases: Iterable[Inputs], scratch: Path) -> npt.NDArray[np.float32]:
    """Every value's largest magnitude over all cases, (len(values),); NaN where one was met."""
    copy = model.clone()
    _stream_weights(copy.graph)
    _return_extremes(copy.graph, [str(value.name) for value in values])
    with TemporaryDirectory(dir=scratch) as folder:
        run = OnnxRun(f"{model.graph.name}: search for fp32 islands", save(copy, Path(folder)), in_order=True)
        extremes = np.stack([np.concatenate(run(inputs)[-2:]) for inputs in cases])
    highest, lowest = np.split(extremes.reshape(len(extremes), 2, -1), 2, axis=1)
    return np.maximum(highest, -lowest).max(axis=(0, 1))


def _stream_weights(graph: ir.Graph) -> None:
    """Store large weights in float16, with a Cast right before the first node that uses them."""
    position = {node: index for index, node in enumerate(graph)}
    for value in list(graph.initializers.values()):
        weight = value.const_value
        if not isinstance(weight, Weight) or weight.nbytes <= _STREAMED_ABOVE or weight.largest > OVERFLOW_RISK:
            continue
        name = f"{value.name}_half"
        half = ir.Value(name=name, type=ir.TensorType(_HALF), shape=value.shape, const_value=weight.half(name))
        graph.register_initializer(half)
        cast = ir.node("Cast", [half], {"to": _FLOAT}, name=f"{value.name}_float/Cast")
        cast.outputs[0].name, cast.outputs[0].type = f"{value.name}_float", value.type
        first = min((node for node, _ in value.uses()), key=lambda node: position[node])
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(first, cast)
        del graph.initializers[value.name]


def _return_extremes(graph: ir.Graph, names: list[str]) -> None:
    """Let a graph's last two outputs hold every named value's maximum and minimum, (len(names),) float32 each."""
    by_name = {value.name: value for node in graph for value in node.outputs}
    one = ir.tensor(np.array([1]), name="one")
    shape = ir.Value(name=one.name, shape=one.shape, type=ir.TensorType(one.dtype), const_value=one)
    graph.register_initializer(shape)
    for reduction in ("ReduceMax", "ReduceMin"):
        listed = []
        for name in names:
            value = by_name[name]
            extreme = ir.node(reduction, [value], {"keepdims": 0}, name=f"{name}/{reduction}")
            row = ir.node("Reshape", [extreme.outputs[0], shape], name=f"{name}/{reduction}/listed")
            for node in (extreme, row):
                node.outputs[0].name = node.name
            # Right behind the value, which is not to be kept until the end.
            graph.insert_after(value.producer(), [extreme, row])
            listed.append(row.outputs[0])
        joined = ir.node("Concat", listed, {"axis": 0}, name=reduction)
        result = joined.outputs[0]
        result.name, result.type, result.shape = reduction, ir.TensorType(_FLOAT), ir.Shape([len(names)])
        graph.append(joined)
        graph.outputs.append(result)
