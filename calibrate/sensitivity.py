"""Which layers hurt most in eight bits: quantized alone, by what that does to the graph's outputs.

One graph with a switch for every layer serves the whole sweep, so that nothing is compiled or written for a layer. What
a layer does to its own output alone would be cheaper to know, and does not tell: on the shapes family's UNet the two
orders have nothing in common (a rank correlation of 0.01), since most errors inside a block drown in its skip.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..engines.graph_files import read_graph, replace_all, weight
from ..engines.job import Progress
from .graph_runs import Array, GraphRun
from .int8 import Int8Plan, quantized_weight, scale_of
from .layers import Layer, by_weight
from .ledger import Ledger
from .ranges import checked, silent
from .smoothing import along

_SWITCHES, _ZERO = "int8/switches", "int8/zero"
# Weights would be rounded when the graph is loaded, and be there twice.
_LEFT_OUT = ("ConstantFolding",)
_ALL_LOST = 1e6


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The layers that multiply by one weight, and the error that they make where they alone are in eight bits.

    error: RMS of the difference over RMS of the value, the mean over samples; of the graph's outputs the worst one's.
    share: its square by that of all layers together.
    """

    layers: tuple[str, ...]
    error: float
    share: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is swept: a graph and its plan, some samples of what it is given, threads of ONNX Runtime."""

    model: Path
    plan: Int8Plan
    samples: Sequence[Mapping[str, Array]]
    threads: int | None = None

    @property
    def where(self) -> str:
        """What errors name."""
        return self.model.parent.name


def worst_layers(sweep: Sweep, ledger: Ledger, progress: Progress = silent) -> Iterator[Sensitivity]:
    """The layers weight by weight, the worst first; whoever iterates takes as many as are wanted.

    Neighbouring layers are quantized together, and those whose error is largest in halves, until one is left: errors
    add up as their squares do, so that no layer of a group has a larger one than the group. The k worst of n layers
    take some k log2(n / k) measurements of a run a sample.

    Layers that share a weight are one: it is stored once, in eight bits or in floating point.

    ledger: has what was measured by then, which is not measured again, by the graph's name and the places of the first
        weight and of the one behind the last, such as "unet, layers 8:16".

    Raises:
        ArgumentError: a sample that cannot be used.
        ExecutionError: the graph cannot be run.
    """
    groups = by_weight(sweep.plan.layers)
    measured = _Measured(sweep, ledger, progress)
    together = measured.error(0, len(groups))
    waiting = [(-together, 0, len(groups))]
    while waiting:
        error, start, end = heapq.heappop(waiting)
        if end - start == 1:
            yield Sensitivity(groups[start], -error, (error / together) ** 2 if together else 0.0)
            continue
        middle = (start + end) // 2
        for half in ((start, middle), (middle, end)):
            heapq.heappush(waiting, (-measured.error(*half), *half))


class _Measured:
    """The errors of groups of layers, from before or of a graph that is loaded when the first one is needed."""

    def __init__(self, sweep: Sweep, ledger: Ledger, progress: Progress) -> None:
        self._sweep, self._ledger, self._progress = sweep, ledger, progress
        self._done = 0
        self._loaded: tuple[GraphRun, list[dict[str, Array]], list[dict[str, Array]]] | None = None

    def error(self, start: int, end: int) -> float:
        """What the layers of the weights from `start` to before `end` do together."""
        key, count = f"{self._sweep.where}, layers {start}:{end}", len(by_weight(self._sweep.plan.layers))
        error: float | None = self._ledger.get(key)
        if error is None:
            self._progress(f"{self._sweep.where}: layers", self._done, 2 * count - 1)
            run, feeds, meant = self._run()
            switches = np.zeros(count, np.bool_)
            switches[start:end] = True
            found = [
                _difference(run({**one, _SWITCHES: switches}), all_) for one, all_ in zip(feeds, meant, strict=True)
            ]
            error = float(np.mean(found))
            self._ledger.put(key, error)
        self._done += 1
        return error

    def _run(self) -> tuple[GraphRun, list[dict[str, Array]], list[dict[str, Array]]]:
        """The graph, the samples as it takes them, and what it makes of them with no layer in eight bits."""
        if self._loaded is None:
            sweep, folder = self._sweep, self._sweep.model.parent
            graph = read_graph(sweep.model)
            feeds = [checked(one, index, graph, sweep.where) for index, one in enumerate(sweep.samples)]
            run = GraphRun(_switched(graph, sweep.plan, folder), folder, sweep.where, sweep.threads, _LEFT_OUT)
            off = np.zeros(len(by_weight(sweep.plan.layers)), np.bool_)
            self._loaded = run, feeds, [run({**one, _SWITCHES: off}) for one in feeds]
        return self._loaded


def _difference(found: Mapping[str, Array], meant: Mapping[str, Array]) -> float:
    return max(
        _ratio(
            float(np.sum(np.square(found[name].astype(np.float64) - expected))),
            float(np.sum(np.square(expected.astype(np.float64)))),
        )
        for name, expected in meant.items()
    )


def _ratio(off: float, meant: float) -> float:
    """A relative RMS of two sums of squares, at most what stands for no number at all."""
    error = np.sqrt(off / meant) if meant else (_ALL_LOST if off else 0.0)
    return float(error) if error < _ALL_LOST else _ALL_LOST


def _switched(model: onnx.ModelProto, plan: Int8Plan, folder: Path) -> onnx.ModelProto:
    """A copy of a graph in which a boolean for each weight says whether its layers are in eight bits."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    layers = {one.name: one for one in plan.layers}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _either(node, layers[node.name], plan) if node.name in layers else [node]
    replace_all(copy.graph.node, nodes)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    groups = by_weight(plan.layers)
    places = {name: place for place, names in enumerate(groups) for name in names}
    for layer in plan.layers:
        copy.graph.initializer.extend(_numbers(layer, plan, weight(tensors[layer.weight], folder)))
        copy.graph.initializer.append(
            numpy_helper.from_array(np.array(places[layer.name], np.int64), f"{layer.name}/place")
        )
    copy.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), _ZERO))
    copy.graph.input.append(helper.make_tensor_value_info(_SWITCHES, TensorProto.BOOL, [len(groups)]))
    return copy


def _either(node: onnx.NodeProto, layer: Layer, plan: Int8Plan) -> list[onnx.NodeProto]:
    """A layer as it is, or in eight bits where its switch says so."""
    switch, branches = f"{layer.name}/switch", {}
    for branch, nodes in (("then_branch", _eight_bits(node, layer, plan)), ("else_branch", [_copied(node)])):
        nodes[-1].output[0] = f"{layer.name}/{branch}"
        made = helper.make_tensor_value_info(nodes[-1].output[0], layer.elem_type, None)
        branches[branch] = helper.make_graph(nodes, branch, [], [made])
    return [
        helper.make_node("Gather", [_SWITCHES, f"{layer.name}/place"], [switch], name=switch),
        helper.make_node("If", [switch], list(node.output), name=layer.name, **branches),
    ]


def _numbers(layer: Layer, plan: Int8Plan, values: npt.NDArray[Any]) -> list[TensorProto]:
    """What `_eight_bits` reads: scales of the value and of the weight, and divisors where the value is smoothed."""
    found = plan.smoothings.get(layer.reads)
    ready = values.astype(np.float32)
    parts = {}
    if found is not None:
        factors = along(found.divisors, layer)
        ready = ready * factors
        parts = {"divisors": found.divisors.astype(values.dtype), "factors": factors.astype(values.dtype)}
    _, parts["scales"] = quantized_weight(ready, layer.axis, values.dtype)
    parts["zeros"] = np.zeros(parts["scales"].shape, np.int8)
    tensors = [numpy_helper.from_array(one, f"{layer.name}/{part}") for part, one in parts.items()]
    return [scale_of(f"{layer.name}/scale", plan.scales[layer.reads], layer.elem_type), *tensors]


def _eight_bits(node: onnx.NodeProto, layer: Layer, plan: Int8Plan) -> list[onnx.NodeProto]:
    """A layer that reads and multiplies eight bits, as nodes of which the last is a copy of its own."""
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, reads: Sequence[str], **attributes: Any) -> str:
        name = f"{layer.name}/{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, reads, [name], name=name, **attributes))
        return name

    def rounded(read: str, scale: str, zero: str, **attributes: Any) -> str:
        eight = add("QuantizeLinear", [read, scale, zero], **attributes)
        return add("DequantizeLinear", [eight, scale, zero], **attributes)

    read, multiplied = node.input[:2]
    if layer.reads in plan.smoothings:
        read = add("Div", [read, f"{layer.name}/divisors"])
        multiplied = add("Mul", [multiplied, f"{layer.name}/factors"])
    read = rounded(read, f"{layer.name}/scale", _ZERO)
    multiplied = rounded(multiplied, f"{layer.name}/scales", f"{layer.name}/zeros", axis=layer.axis)
    same = _copied(node)
    same.input[0], same.input[1] = read, multiplied
    same.name = f"{layer.name}/eight"
    return [*nodes, same]


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
