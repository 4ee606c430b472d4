"""Step engines: a denoiser's graph composed with guidance and a solver's linear update, so that a call is a step.

The arithmetic is that of `runtime.sampler` in the same order: where a backend computes it as written, the results are
equal bit for bit. A prediction's type needs none of it, since `runtime.table` has it in its coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.errors import ArgumentError, BundleError
from ..runtime.manifest import TensorSpec
from ..runtime.step_row import (
    APART,
    BRANCHES,
    CHANNELS,
    CONDITIONAL,
    DIFFERENCE,
    GUIDANCE_SCALE,
    LATENT_SAMPLE,
    LATENT_SPACE,
    MODEL_INPUT,
    NEXT_DIFFERENCE,
    NEXT_STATE,
    NOISE,
    PREDICTION,
    STATE,
    SUMS,
    UNCONDITIONAL,
    UPDATE,
)
from ..runtime.tensors import latent_names, spec_of
from .graph_files import LOWEST_OPSET, replace_all, require_opset, spec

HISTORY = 3  # of PNDM, LMS and UniPC of order 3, the most that any solver carries
_SPLIT_WANTS_COUNT = 18  # the opset from which Split is told into how many equal parts
_INT = "step/int64"


def step_graph(
    model: onnx.ModelProto, *, guided: bool, history: int = HISTORY, hands: bool = False, where: str = "denoiser"
) -> onnx.ModelProto:
    """A copy of a denoiser's graph of which one call is one row of a plan; `runtime.step_row` lists its tensors.

    The denoiser's nodes, weights and tensors keep their names. One with its time steps folded may be given as well.

    model: the graph; its weights may lie in files and are not read.
    guided: whether both branches of guidance run, in one batch, or the conditional one alone.
    history: H, how many earlier predictions the state holds; a schedule that carries fewer runs too.
    hands: whether it makes what is wanted of the next state too, for a backend that leaves that where it runs.
    where: what errors call the component.

    Raises:
        ArgumentError: the graph is no denoiser, or `history` is below 0.
        BundleError: an opset below 13, or tensors that leave open how the graph is to be composed.
    """
    if history < 0:
        raise ArgumentError(where, "history of a step engine", got=history, expected="0 or more")
    opset = require_opset(model, where)
    denoiser = _denoiser(model.graph, where)
    composed = onnx.ModelProto()
    composed.CopyFrom(model)
    graph = composed.graph
    before, behind = _Nodes(graph, "step/input"), _Nodes(graph, "step/update")
    entries = before.split(STATE, 1 + history, axis=0)
    _add_input(before, denoiser, entries, guided=guided)
    _add_prediction(behind, denoiser, guided=guided, counted=opset >= _SPLIT_WANTS_COUNT)
    _add_update(behind, entries)
    if hands:
        _add_what_is_wanted(behind)
    _declare(graph, denoiser, 1 + history, guided=guided, hands=hands, where=where)
    del graph.node[:]
    graph.node.extend([*before.nodes, *model.graph.node, *behind.nodes])
    return composed


def update_graph(model: onnx.ModelProto, *, history: int = HISTORY, where: str = "denoiser") -> onnx.ModelProto:
    """What a step engine has around a denoiser's graph, as a graph of its own; `runtime.step_row` lists its tensors.

    It takes the branches' predictions, as the denoiser that runs by itself left them where the backend runs, and is of
    an opset of its own.

    Raises:
        ArgumentError: the graph is no denoiser.
        BundleError: tensors that leave open how the graph is to be composed.
    """
    denoiser = _denoiser(model.graph, where)
    opset = helper.make_opsetid("", LOWEST_OPSET)
    made = onnx.ModelProto(ir_version=helper.find_min_ir_version_for([opset]), opset_import=[opset])
    made.graph.name = "update"
    nodes = _Nodes(made.graph, "step/update")
    entries = nodes.split(STATE, 1 + history, axis=0)
    _add_guidance(nodes)
    _add_update(nodes, entries)
    _add_what_is_wanted(nodes)
    _add_input(nodes, denoiser, nodes.split(NEXT_STATE, 1 + history, axis=0), guided=False)
    _declare_update(made.graph, denoiser, 1 + history)
    made.graph.node.extend(nodes.nodes)
    return made


@dataclass(frozen=True, slots=True)
class _Denoiser:
    """A denoiser's latent, its prediction, and how many channels it reads behind the latent's."""

    latent: TensorSpec
    prediction: TensorSpec
    further_channels: int


def _denoiser(graph: onnx.GraphProto, where: str) -> _Denoiser:
    inputs, outputs = ([spec(value, where) for value in values] for values in (graph.input, graph.output))
    names = latent_names(inputs)
    latent, prediction = spec_of(inputs, names.sample), spec_of(outputs, names.prediction)
    if latent is None or prediction is None or spec_of(inputs, "encoder_hidden_states") is None:
        raise ArgumentError(
            where,
            "no denoiser, and nothing else becomes a step engine",
            got=", ".join(one.name for one in (*inputs, *outputs)),
            expected=f"{names.sample}, encoder_hidden_states and {names.prediction} among its tensors",
        )
    for one in (latent, prediction):
        if one.dtype != "float32" or len(one.shape) != 4 or not isinstance(one.shape[1], int):
            got, expected = f"{one.dtype} {one.shape}", "float32 (batch, a number of channels, height, width)"
            raise BundleError(where, f"tensor {one.name!r}", got=got, expected=expected, remedy="Export it again.")
    read, made = int(latent.shape[1]), int(prediction.shape[1])
    if read < made:
        raise BundleError(where, "channels predicted", got=made, expected=f"at most {read}, as many as are read")
    return _Denoiser(latent, prediction, read - made)


class _Nodes:
    """Nodes of one part of a graph, in order; the names of nodes and of what they make begin with the part's."""

    def __init__(self, graph: onnx.GraphProto, part: str) -> None:
        self._graph, self._part = graph, part
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op_type: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        """A node of one output; returns its name."""
        return self._add(op_type, inputs, [output or self._name(op_type)], **attributes)[0]

    def ints(self, *values: int) -> str:
        """A constant of whole numbers, (n,) int64."""
        name = "_".join([_INT, *map(str, values)])
        if all(tensor.name != name for tensor in self._graph.initializer):
            self._graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def split(self, value: str, parts: int, axis: int) -> list[str]:
        """A tensor's slices of size 1 along an axis that has `parts` of them."""
        if parts == 1:
            return [value]
        outputs = [f"{self._name('Split')}_{part}" for part in range(parts)]
        return self._add("Split", [value, self.ints(*[1] * parts)], outputs, axis=axis)

    def halves(self, value: str, *, counted: bool) -> list[str]:
        """A tensor's two halves along its first axis."""
        outputs = [f"{self._name('Split')}_{part}" for part in range(2)]
        return self._add("Split", [value], outputs, axis=0, **({"num_outputs": 2} if counted else {}))

    def weighted_sum(self, values: Sequence[str], coefficients: Sequence[str], output: str = "") -> str:
        """Σ coefficient · value, from the left on as the runtime's loop adds; of one value, `output` has no effect."""
        first, *more = [self.add("Mul", pair) for pair in zip(values, coefficients, strict=True)]
        for index, product in enumerate(more, 1):
            first = self.add("Add", [first, product], output if index == len(more) else "")
        return first

    def _name(self, op_type: str) -> str:
        return f"{self._part}/{op_type}_{len(self.nodes)}"

    def _add(self, op_type: str, inputs: Sequence[str], outputs: list[str], **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=self._name(op_type), **attributes))
        return outputs


def _add_input(nodes: _Nodes, denoiser: _Denoiser, entries: Sequence[str], *, guided: bool) -> None:
    """m · S with the channels behind it, for one or both branches, under the name of the denoiser's latent."""
    coefficients = nodes.split(MODEL_INPUT, len(entries), axis=0)
    value = nodes.add("Squeeze", [nodes.weighted_sum(entries, coefficients), nodes.ints(0)])
    if denoiser.further_channels:
        value = nodes.add("Concat", [value, CHANNELS], axis=1)
    if guided:
        nodes.add("Concat", [value, value], axis=0)
    nodes.nodes[-1].output[0] = denoiser.latent.name


def _add_prediction(nodes: _Nodes, denoiser: _Denoiser, *, guided: bool, counted: bool) -> None:
    """ε: the one branch's, or (conditional − unconditional) · guidance_scale + unconditional."""
    if not guided:
        nodes.add("Identity", [denoiser.prediction.name], PREDICTION)
        return
    unconditional, conditional = nodes.halves(denoiser.prediction.name, counted=counted)
    difference = nodes.add("Sub", [conditional, unconditional])
    nodes.add("Add", [nodes.add("Mul", [difference, GUIDANCE_SCALE]), unconditional], PREDICTION)


def _add_guidance(nodes: _Nodes) -> None:
    """ε of an update engine, and how far the branches are apart, with what that has grown by."""
    given = CONDITIONAL, UNCONDITIONAL, DIFFERENCE
    rows = [nodes.split(row, len(given), axis=1) for row in nodes.split(BRANCHES, 2, axis=0)]
    difference, added_to = nodes.weighted_sum(given, rows[0], NEXT_DIFFERENCE), nodes.weighted_sum(given, rows[1])
    nodes.add("Add", [nodes.add("Mul", [difference, GUIDANCE_SCALE]), added_to], PREDICTION)
    sizes = [nodes.add("ReduceMean", [nodes.add("Abs", [one])], keepdims=0) for one in (difference, UNCONDITIONAL)]
    products = [nodes.add("Mul", [DIFFERENCE, one]) for one in (DIFFERENCE, difference)]
    sizes += [nodes.add("ReduceSum", [one], keepdims=0) for one in products]
    nodes.add("Concat", [nodes.add("Unsqueeze", [one, nodes.ints(0)]) for one in sizes], APART, axis=0)


def _add_update(nodes: _Nodes, entries: Sequence[str]) -> None:
    """A S + b ε + c z for all entries at once: columns (1+H, 1, 1, 1, 1) of coefficients times what they belong to."""
    values = [*entries, PREDICTION, NOISE]
    columns = nodes.split(nodes.add("Unsqueeze", [UPDATE, nodes.ints(2, 3, 4)]), len(values), axis=1)
    nodes.weighted_sum(values, columns, NEXT_STATE)


def _add_what_is_wanted(nodes: _Nodes) -> None:
    """What a decoder is given of the next state, and what the host looks at in its place."""
    latents = nodes.add("Squeeze", [nodes.add("Gather", [NEXT_STATE, nodes.ints(0)], axis=0), nodes.ints(0)])
    scaling, shift = nodes.split(LATENT_SPACE, 2, axis=0)
    nodes.add("Add", [nodes.add("Div", [latents, scaling]), shift], LATENT_SAMPLE)
    sums = [nodes.add("ReduceSum", [value], keepdims=0) for value in (PREDICTION, latents)]
    nodes.add("Concat", [nodes.add("Unsqueeze", [one, nodes.ints(0)]) for one in sums], SUMS, axis=0)


def _declare(
    graph: onnx.GraphProto, denoiser: _Denoiser, entries: int, *, guided: bool, hands: bool, where: str
) -> None:
    """State the step's inputs and outputs, and both branches' rows in the denoiser's own inputs."""
    batch, _, *sides = denoiser.latent.shape
    channels = denoiser.prediction.shape[1]
    conditioning = [value for value in graph.input if value.name != denoiser.latent.name]
    pictures = batch
    if guided and isinstance(batch, int):
        if batch % 2:
            raise BundleError(where, "batch of both branches", got=batch, expected="an even number")
        pictures = batch // 2
    elif guided:
        for size in (size for value in conditioning for size in value.type.tensor_type.shape.dim):
            if size.dim_param == batch:
                size.dim_param = f"2*{batch}"
    inputs = {
        STATE: (entries, pictures, channels, *sides),
        MODEL_INPUT: (entries,),
        UPDATE: (entries, entries + 2),
        NOISE: (pictures, channels, *sides),
        **({LATENT_SPACE: (2,)} if hands else {}),
        **({GUIDANCE_SCALE: (1,)} if guided else {}),
        **({CHANNELS: (pictures, denoiser.further_channels, *sides)} if denoiser.further_channels else {}),
    }
    outputs = {
        NEXT_STATE: inputs[STATE],
        PREDICTION: inputs[NOISE],
        **({LATENT_SAMPLE: inputs[NOISE], SUMS: (2,)} if hands else {}),
    }
    _require_free(graph, {*inputs, *outputs}, where)
    # Shapes inside the graph speak of the denoiser's batch.
    for value in graph.value_info:
        value.type.tensor_type.ClearField("shape")
    made = [[_float(name, shape) for name, shape in one.items()] for one in (inputs, outputs)]
    replace_all(graph.input, [*made[0], *conditioning])
    replace_all(graph.output, made[1])


def _declare_update(graph: onnx.GraphProto, denoiser: _Denoiser, entries: int) -> None:
    """State an update engine's inputs and outputs."""
    pictures, read, *sides = denoiser.latent.shape
    channels = denoiser.prediction.shape[1]
    latent, state = (pictures, channels, *sides), (entries, pictures, channels, *sides)
    inputs = {
        STATE: state,
        MODEL_INPUT: (entries,),
        UPDATE: (entries, entries + 2),
        NOISE: latent,
        LATENT_SPACE: (2,),
        GUIDANCE_SCALE: (1,),
        BRANCHES: (2, 3),
        **dict.fromkeys((CONDITIONAL, UNCONDITIONAL, DIFFERENCE), latent),
        **({CHANNELS: (pictures, denoiser.further_channels, *sides)} if denoiser.further_channels else {}),
    }
    outputs = {
        NEXT_STATE: state,
        **dict.fromkeys((PREDICTION, LATENT_SAMPLE, NEXT_DIFFERENCE), latent),
        SUMS: (2,),
        APART: (4,),
        denoiser.latent.name: (pictures, read, *sides),
    }
    replace_all(graph.input, [_float(name, shape) for name, shape in inputs.items()])
    replace_all(graph.output, [_float(name, shape) for name, shape in outputs.items()])


def _require_free(graph: onnx.GraphProto, names: set[str], where: str) -> None:
    taken = {value.name for value in (*graph.input, *graph.initializer)}.union(*(node.output for node in graph.node))
    if names & taken:
        got = ", ".join(sorted(names & taken))
        raise BundleError(where, "names a step engine's own tensors have", got=got, expected="other names in the graph")


def _float(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    made: onnx.ValueInfoProto = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    return made
