"""Static int8: graphs whose layers read and multiply eight bits, as Q/DQ pairs around them say.

Weights are symmetric by output channel, activations symmetric as a whole, biases and all else stay as they are: what
TensorRT asks for, and what ONNX Runtime and OpenVINO run too. ONNX Runtime's own quantizer would place the same pairs,
but holds a model with all its weights, several times; here one weight is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..engines.graph_files import read_graph, replace_all, weight
from ..engines.job import Progress
from ..runtime.errors import ArgumentError
from .graph_writing import Edit, write_edited
from .layers import Layer, layers_of, of_time_alone, require_layers
from .observers import LEVELS, clipping_threshold, require_observer
from .quantized import Quantized
from .ranges import LIMITS, Limits, Ranges, Samples, collect_ranges, silent
from .smoothing import Smoothing, affine_before, divisors_of, outlier_ratio, require_alpha, smoothed

_OUTLIER_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class EightBits:
    """Numbers of eight bits.

    largest: the magnitude that a layer's largest number becomes. stored: rounds float32 to them, and clips it.
    """

    name: str
    largest: float
    stored: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]


INT8 = EightBits("int8", LEVELS, lambda values: np.clip(np.rint(values), -LEVELS, LEVELS).astype(np.int8))


@dataclass(frozen=True, slots=True)
class Int8Settings:
    """How a graph is quantized.

    observer: where activations are clipped, one of `observers.OBSERVERS`; percentile: for the one of that name.
    smoothing: SmoothQuant's alpha in [0, 1], None for none. What a matrix product reads is smoothed where its largest
        channel is ten times the median one; it is then not clipped.
    keep: layers that stay in floating point. Those that read nothing but the time step stay so anyway: they are no
        work, and every other layer depends on them.

    Raises ArgumentError for what is out of range.
    """

    observer: str = "mse"
    percentile: float = 99.99
    smoothing: float | None = 0.5
    keep: tuple[str, ...] = ()
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        require_observer(self.observer, self.percentile)
        require_alpha(self.smoothing)


@dataclass(frozen=True, slots=True)
class Int8Plan:
    """What is quantized of a graph: its layers, those kept, and by value that they read its scale and its smoothing."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    scales: Mapping[str, float]
    smoothings: Mapping[str, Smoothing]


def quantize_int8(
    model: Path,
    samples: Samples,
    out: Path,
    settings: Int8Settings,
    ranges: Ranges | None = None,
    progress: Progress = silent,
) -> Quantized:
    """Write the ONNX file `out`: the graph `model` in int8, its weights in a file beside it.

    Inputs and outputs keep their names, types and symbolic shapes, layers their names.

    samples: gives what the graph is given, by input name, anew whenever it is called.
    ranges: of `collect_ranges` for `watched(layers_of(...))`, where they are known; `samples` is not called then.

    Raises:
        ArgumentError: a graph that is quantized or has no layers, samples that cannot be used, unknown layers to keep.
        BundleError: the graph cannot be read, or its opset cannot tell how it is quantized.
        ExecutionError: the graph cannot be run on a sample.
        OSError: `out` cannot be written.
    """
    graph, where = read_graph(model), model.parent.name
    layers = layers_of(graph, where)
    require_layers(settings.keep, layers, where)
    if ranges is None:
        ranges = collect_ranges(model, watched(layers), samples, settings.limits, progress)
    plan = int8_plan(graph, layers, ranges, settings, model.parent)
    edited, edits = with_pairs(graph, plan)
    write_edited(edited, edits, out, model.parent)
    return Quantized(
        tuple(one.name for one in plan.layers),
        plan.kept,
        {
            "method": "static int8, weights by channel",
            "observer": settings.observer,
            **({"percentile": settings.percentile} if settings.observer == "percentile" else {}),
            "smoothing": settings.smoothing,
            "smoothed": len(plan.smoothings),
            "samples": ranges.samples,
        },
    )


def watched(layers: Sequence[Layer]) -> dict[str, bool]:
    """The values that layers read, each with whether its channels are of use: to smooth matrix products."""
    names: dict[str, bool] = {}
    for one in layers:
        names[one.reads] = names.get(one.reads, False) or one.kind != "Conv"
    return names


def int8_plan(
    model: onnx.ModelProto, layers: Sequence[Layer], ranges: Ranges, settings: Int8Settings, folder: Path
) -> Int8Plan:
    """Which layers are quantized, and how what they read is scaled and smoothed.

    Layers whose input was 0 on every sample stay in floating point: nothing tells their scale.

    folder: of the files that hold the graph's weights; those of smoothed layers are read.

    Raises:
        ArgumentError: no layer is left.
    """
    alone = of_time_alone(model.graph)
    chosen = tuple(
        one for one in layers if one.name not in settings.keep and one.reads not in alone and one.reads in ranges.values
    )
    # A weight that a layer in floating point reads too is needed as it is.
    others = {one.weight for one in layers if one not in chosen}
    chosen = tuple(one for one in chosen if one.weight not in others)
    if not chosen:
        raise ArgumentError(folder.name, "no layer is left to quantize", got=settings.keep, expected="fewer kept")
    smoothings = _smoothings(model, chosen, ranges, settings, folder)
    scales = {}
    for value in dict.fromkeys(one.reads for one in chosen):
        seen = ranges.values[value]
        if value in smoothings and seen.channels is not None:
            threshold = float((seen.channels / smoothings[value].divisors).max())
        else:
            threshold = clipping_threshold(seen.histogram, settings.observer, settings.percentile)
        scales[value] = threshold / LEVELS
    names = {one.name for one in chosen}
    return Int8Plan(chosen, tuple(one.name for one in layers if one.name not in names), scales, smoothings)


def with_pairs(
    model: onnx.ModelProto, plan: Int8Plan, kind: EightBits = INT8
) -> tuple[onnx.ModelProto, dict[str, Edit]]:
    """A copy of a graph with pairs around what the plan's layers read, and how its weights are to be changed for it."""
    copy, edits = smoothed(model, plan.smoothings, plan.layers)
    layers = {one.name: one for one in plan.layers}
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in copy.graph.node:
        layer = layers.get(node.name)
        if layer is not None:
            read, multiplied = node.input[:2]
            if read not in made:
                copy.graph.initializer.append(scale_of(f"{read}/scale", plan.scales[layer.reads], layer.elem_type))
                nodes += _pair(read, kind)
            if multiplied not in made:
                nodes.append(_dequantize(multiplied, layer.axis, kind))
                edits[multiplied] = _quantizing(layer, edits.get(multiplied), kind)
            made.update((read, multiplied))
            node.input[0], node.input[1] = f"{read}/dequantized", f"{multiplied}/dequantized"
        nodes.append(node)
    copy.graph.initializer.append(numpy_helper.from_array(kind.stored(np.zeros((), np.float32)), _zero(kind)))
    replace_all(copy.graph.node, nodes)
    return copy, edits


def quantized_weight(
    values: npt.NDArray[np.float32], axis: int, dtype: npt.DTypeLike, kind: EightBits = INT8
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A weight in eight bits and its scales along `axis` in the type that the graph has them in."""
    shape = tuple(-1 if place == axis else 1 for place in range(values.ndim))
    others = tuple(place for place in range(values.ndim) if place != axis)
    scales = _representable(np.abs(values).max(others) / kind.largest, dtype)
    return kind.stored(values / scales.astype(np.float32).reshape(shape)), scales


def scale_of(name: str, scale: float, elem_type: int) -> onnx.TensorProto:
    """A scale as an initializer of one of ONNX's types."""
    values = _representable(np.asarray(scale), helper.tensor_dtype_to_np_dtype(elem_type))
    return numpy_helper.from_array(values, name)


def _representable(scales: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Scales in a type of fewer bits, none of them 0."""
    representable: npt.NDArray[Any] = np.maximum(scales.astype(dtype), np.finfo(dtype).smallest_subnormal)
    return representable


def _smoothings(
    model: onnx.ModelProto, layers: Sequence[Layer], ranges: Ranges, settings: Int8Settings, folder: Path
) -> dict[str, Smoothing]:
    """The smoothing of values with outlier channels that matrix products read."""
    if settings.smoothing is None:
        return {}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for value in dict.fromkeys(one.reads for one in layers):
        channels = ranges.values[value].channels
        users = [one for one in layers if one.reads == value]
        weights = {one.weight for one in users}
        elsewhere = any(one.weight in weights and one.reads != value for one in layers)
        if channels is None or elsewhere or any(one.kind == "Conv" for one in users):
            continue
        if outlier_ratio(channels) < _OUTLIER_RATIO:
            continue
        largest = np.max(
            [np.abs(weight(tensors[one.weight], folder).astype(np.float32)).max(one.axis) for one in users], axis=0
        )
        divisors = divisors_of(channels, largest, settings.smoothing)
        found[value] = Smoothing(divisors, affine_before(model.graph, value, users))
    return found


def _zero(kind: EightBits) -> str:
    return f"{kind.name}/zero"


def _pair(name: str, kind: EightBits) -> list[onnx.NodeProto]:
    """What rounds a value to eight bits and back."""
    scales, eight = [f"{name}/scale", _zero(kind)], f"{name}/quantized"
    return [
        helper.make_node("QuantizeLinear", [name, *scales], [eight], name=f"{name}/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", [eight, *scales], [f"{name}/dequantized"], name=f"{name}/DequantizeLinear"
        ),
    ]


def _dequantize(name: str, axis: int, kind: EightBits) -> onnx.NodeProto:
    parts = [f"{name}/{part}" for part in (kind.name, "scales", "zeros")]
    return helper.make_node(
        "DequantizeLinear", parts, [f"{name}/dequantized"], name=f"{name}/DequantizeLinear", axis=axis
    )


def _quantizing(layer: Layer, before: Edit | None, kind: EightBits) -> Edit:
    def edit(values: npt.NDArray[Any]) -> Mapping[str, npt.NDArray[Any]]:
        wide = values.astype(np.float32)  # smoothing may leave what float16 can hold
        ready = wide if before is None else before(wide)[layer.weight]
        numbers, scales = quantized_weight(ready, layer.axis, values.dtype, kind)
        parts = {kind.name: numbers, "scales": scales, "zeros": np.zeros(scales.shape, numbers.dtype)}
        return {f"{layer.weight}/{part}": part_values for part, part_values in parts.items()}

    return edit
