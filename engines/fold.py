"""Time steps that are known beforehand, folded: what a denoiser computes of them alone becomes constants.

In a UNet that is the time embedding and, where nothing else joins it (SDXL's sizes, a guidance embedding, SD3's pooled
text), every block's projection of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.errors import ArgumentError, BundleError, ExecutionError
from ..runtime.step_row import STEP_INDEX
from .graph_files import prune, replace_all, require_opset, weight

TIMESTEP = "timestep"
# What gives every row of a batch the same where an operand has one row for all.
_BROADCASTS = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "PRelu"})

Array = npt.NDArray[np.generic]


def folded(
    model: onnx.ModelProto, timesteps: Sequence[float], weights: Path, *, where: str = "denoiser"
) -> onnx.ModelProto:
    """A copy of a denoiser's graph that needs no `timestep`, for one time step or for those of a fixed schedule.

    With one time step, constants take the place of what is computed of it. With several, an input `step_index`, ()
    int64 in 0..n−1, picks them out of tables. They are in the precision that the graph has there. All other nodes,
    weights and tensors keep their names.

    ONNX Runtime computes the same bits of an fp32 graph as with `timestep`, whatever its rows. Where it optimizes one
    step's graph it adds constants to convolutions' biases beforehand and rounds once less: 1e-6 of the largest value.
    In fp16 a folded value is rounded to fp16 as the graph says, which ONNX Runtime's CPU provider otherwise leaves out.

    timesteps: what the denoiser would be given, such as `plan.table.timesteps`.
    weights: the folder of the files that hold the graph's weights; only those of the time embedding are read.

    Raises:
        ArgumentError: no time step, one that is not finite, or a graph that takes none.
        BundleError: a graph that uses them other than by broadcasting, or whose weights are not where it says.
        ExecutionError: ONNX Runtime cannot compute its time embedding.
    """
    require_opset(model, where)
    if not timesteps or not np.isfinite(timesteps).all():
        raise ArgumentError(where, "time steps to fold", got=list(timesteps), expected="one finite number or more")
    if all(value.name != TIMESTEP for value in model.graph.input):
        got = ", ".join(value.name for value in model.graph.input)
        raise ArgumentError(where, "no time step to fold", got=got, expected=f"{TIMESTEP!r} among the graph's inputs")
    derived = _derived(model.graph)
    results = _results(model.graph, derived, where)
    values = _evaluated(_part(model, results, weights), results, timesteps, where)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _put(copy.graph, derived, values)
    return copy


def _derived(graph: onnx.GraphProto) -> set[str]:
    """The values, the time step among them, that depend on it and on nothing else that is given."""
    constant, derived = {"", *(tensor.name for tensor in graph.initializer)}, {TIMESTEP}
    for node in graph.node:
        reads = set(node.input)
        if reads <= constant:
            constant.update(node.output)
        elif reads <= constant | derived:
            derived.update(node.output)
    return derived - {""}


def _results(graph: onnx.GraphProto, derived: set[str], where: str) -> list[str]:
    """What the rest of the graph reads of them, in the order it does."""
    results: dict[str, None] = {}
    one_for_all = _takes_one_row(graph)
    for node in graph.node:
        reads = [name for name in node.input if name in derived]
        if not reads or derived.issuperset(node.output):
            continue
        if not one_for_all and node.op_type not in _BROADCASTS:
            raise BundleError(
                where,
                f"{node.op_type} {node.name!r} reads the time step, which cannot be folded there",
                got=", ".join(reads),
                expected=f"to be read by one of {', '.join(sorted(_BROADCASTS))}",
                remedy="Export the bundle from its checkpoint, or leave the time steps unfolded.",
            )
        results.update(dict.fromkeys(reads))
    return list(results)


def _takes_one_row(graph: onnx.GraphProto) -> bool:
    """Whether a time step may have one row for a batch of any size, so that the graph itself sees to the rest."""
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    rows = sizes.pop(TIMESTEP)
    return rows == [1] or all(size not in other for other in sizes.values() for size in rows)


def _part(model: onnx.ModelProto, results: Sequence[str], weights: Path) -> onnx.ModelProto:
    """A model of what leads from the time step to the results, with the weights that it reads."""
    whole, part = model.graph, onnx.ModelProto()
    part.ir_version = model.ir_version
    part.opset_import.extend(model.opset_import)
    part.graph.name = "time embedding"
    needed = set(results)
    nodes = []
    for node in reversed(whole.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed.update(node.input)
    part.graph.node.extend(reversed(nodes))
    part.graph.input.extend(value for value in whole.input if value.name == TIMESTEP)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    for tensor in whole.initializer:
        if tensor.name in needed:
            part.graph.initializer.append(numpy_helper.from_array(weight(tensor, weights), tensor.name))
    return part


def _evaluated(
    part: onnx.ModelProto, results: Sequence[str], timesteps: Sequence[float], where: str
) -> dict[str, list[Array]]:
    """The results' values at each time step."""
    import onnxruntime  # noqa: PLC0415 (heavy, and of an extra)

    try:
        session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        found = [session.run(None, {TIMESTEP: np.array([timestep], np.float32)}) for timestep in timesteps]
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        what = f"ONNX Runtime cannot compute the time embedding ({' '.join(str(error).split())[:500]})"
        raise ExecutionError(where, what) from error
    return {name: [row[index] for row in found] for index, name in enumerate(results)}


def _put(graph: onnx.GraphProto, derived: set[str], values: Mapping[str, Sequence[Array]]) -> None:
    """Let constants, or rows of tables, take the place of the derived values."""
    nodes = [node for node in graph.node if not derived.issuperset(node.output)]
    inputs = [value for value in graph.input if value.name != TIMESTEP]
    steps = max(map(len, values.values()), default=1)
    tables = []
    for index, (name, found) in enumerate(values.items()):
        if steps == 1:
            graph.initializer.append(numpy_helper.from_array(found[0], name))
        else:
            table = f"{name}/steps"
            graph.initializer.append(numpy_helper.from_array(np.stack(found), table))
            tables.append(helper.make_node("Gather", [table, STEP_INDEX], [name], name=f"fold/Gather_{index}", axis=0))
    if tables:
        inputs.append(helper.make_tensor_value_info(STEP_INDEX, TensorProto.INT64, ()))
    replace_all(graph.node, [*tables, *nodes])
    replace_all(graph.input, inputs)
    prune(graph)
