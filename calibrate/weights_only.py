"""Weights kept in eight or four bits, which the graph dequantizes before what reads them, which computes as before."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ..engines.graph_files import read_graph, reads_of, replace_all, require_opset, weight
from ..runtime.errors import ArgumentError, BundleError
from .graph_writing import Edit, write_edited
from .int8 import quantized_weight
from .layers import layers_of
from .quantized import Quantized

Floats = npt.NDArray[np.float32]
INT4_OPSET = 21  # DequantizeLinear takes blocks, and INT4, from here on
LEAST_RAISED_OPSET = 18  # below it, operators have attributes for what they take as inputs later
_CHANGED_UP_TO_INT4 = frozenset({"GroupNormalization", "GridSample", "DFT"})
_INT4_IR_VERSION = 10
BLOCKS = (32, 16)  # of which the first is taken that divides the length of a product
_MOST, _LEAST = 7, -8
# Of the largest magnitude in a block: to clip it may round the others better.
_SHRINKS = tuple(float(share) for share in np.linspace(1.0, 0.7, 7))
_LEAST_TABLE = 1 << 16  # values of a table that rows are taken from; smaller ones are no weight


@dataclass(frozen=True, slots=True)
class WeightSettings:
    """How weights are kept.

    bits: 8, with a scale for each output channel; or 4, with one for each block of 32 or 16 factors of matrix products.
        Convolutions, and products that have no such blocks, are kept in 8 then too: no backend keeps them in 4.
    keep: layers whose weights stay in floating point.

    Raises ArgumentError for other bits.
    """

    bits: int = 8
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ArgumentError("bits", "of a weight", got=self.bits, expected="4 or 8")


@dataclass(frozen=True, slots=True)
class _Weight:
    """A stored weight. names: of the layers that read it. axis: of its output channels, or a table's columns.

    block: how many values along the other axis share a scale, 0 where all do. table: the node that takes rows of it.
    """

    tensor: TensorProto
    names: tuple[str, ...]
    axis: int
    block: int = 0
    table: onnx.NodeProto | None = None


def quantize_weights(model: Path, out: Path, settings: WeightSettings) -> Quantized:
    """Write the ONNX file `out`: the graph `model` with its weights in so many bits, in a file beside it.

    These are of Conv, MatMul and Gemm, and tables that Gather takes rows of, as of tokens; symmetric, rounded to
    nearest. One weight is in memory at a time.

    Raises:
        ArgumentError: a graph that is quantized or has no layers, unknown layers to keep, or all of them.
        BundleError: the graph cannot be read, or its opset cannot tell how it is quantized.
        OSError: `out` cannot be written.
    """
    graph, where = read_graph(model), model.parent.name
    found = tuple(_weights(graph, where, settings.bits))
    unknown = sorted(set(settings.keep) - {name for one in found for name in one.names})
    if unknown:
        raise ArgumentError(where, "no such layers", got=unknown[:5], expected="names of the graph's nodes")
    chosen = tuple(one for one in found if not set(one.names) & set(settings.keep))
    if not chosen:
        raise ArgumentError(where, "no layer is left to quantize", got=settings.keep, expected="fewer kept")
    if any(one.block for one in chosen):
        _raise_opset(graph, where)
    write_edited(graph, _dequantizing(graph, chosen), out, model.parent)
    layers = [name for one in chosen for name in one.names]
    return Quantized(
        layers=tuple(layers),
        kept=tuple(name for one in found for name in one.names if name not in set(layers)),
        settings={
            "method": f"weights in {settings.bits} bits",
            "in_4_bits": sum(len(one.names) for one in chosen if one.block),
            "tables": [name for one in chosen if one.table is not None for name in one.names],
            "blocks": sorted({one.block for one in chosen if one.block}),
        },
    )


def weight_readers(model: Path) -> tuple[tuple[str, ...], ...]:
    """The layers whose weights `quantize_weights` can quantize, those of one weight together; raises as it does."""
    return tuple(one.names for one in _weights(read_graph(model), model.parent.name, 8))


def errors_of(model: Path, settings: WeightSettings) -> dict[str, float]:
    """What rounding to so many bits does to the weights of each layer: relative mean square error.

    Raises:
        ArgumentError, BundleError: as `quantize_weights`.
    """
    errors: dict[str, float] = {}
    for one in _weights(read_graph(model), model.parent.name, settings.bits):
        values = weight(one.tensor, model.parent).astype(np.float32)
        lost, held = np.square(_dequantized(values, one) - values).mean(), np.square(values).mean()
        errors.update(dict.fromkeys(one.names, float(lost / held) if held else 0.0))
    return errors


def require_bits(model: onnx.ModelProto, where: str, bits: int) -> None:
    """Raise BundleError where a graph would have weights in so many bits, and is of an opset that has none."""
    if any(one.block for one in _weights(model, where, bits)):
        _require_int4(model, where)


def _weights(model: onnx.ModelProto, where: str, bits: int) -> Iterator[_Weight]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    by_weight = defaultdict(list)
    for one in layers_of(model, where):
        by_weight[one.weight].append(one)
    for name, layers in by_weight.items():
        tensor, axes = stored[name], {one.axis for one in layers}
        if len(axes) > 1:
            continue
        (axis,) = axes
        blocks = (size for size in BLOCKS if bits == 4 and len(tensor.dims) == 2 and tensor.dims[1 - axis] % size == 0)
        yield _Weight(tensor, tuple(one.name for one in layers), axis, next(blocks, 0))
    read = Counter(name for node in model.graph.node for name in reads_of(node))
    for node in model.graph.node:
        table = stored.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16) or not node.name:
            continue
        rows = not any(one.name == "axis" and one.i for one in node.attribute)
        if rows and len(table.dims) == 2 and read[table.name] == 1 and np.prod(table.dims) >= _LEAST_TABLE:
            yield _Weight(table, (node.name,), 1, table=node)


def _require_int4(model: onnx.ModelProto, where: str) -> None:
    """Raise BundleError where a graph is of no opset that has blocks of four bits, or can be raised to one."""
    opset = require_opset(model, where)
    changed = sorted(_CHANGED_UP_TO_INT4 & {node.op_type for node in model.graph.node})
    if opset < INT4_OPSET and (opset < LEAST_RAISED_OPSET or changed):
        got = f"{opset}, with {changed[0]}" if changed else opset
        remedy = "Ask for int8-weights, or export the bundle again."
        raise BundleError(where, "opset", got=got, expected=f"{INT4_OPSET} for weights in 4 bits", remedy=remedy)


def _raise_opset(model: onnx.ModelProto, where: str) -> None:
    """Let a graph be of the first opset that has blocks of four bits, if it means the same there."""
    _require_int4(model, where)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, INT4_OPSET)
    model.ir_version = max(model.ir_version, _INT4_IR_VERSION)


def _dequantizing(model: onnx.ModelProto, chosen: tuple[_Weight, ...]) -> dict[str, Edit]:
    """Let a graph dequantize these weights, each under its own name; what is to be stored in their place."""
    before: list[onnx.NodeProto] = []
    behind: dict[str, onnx.NodeProto] = {}
    edits: dict[str, Edit] = {}
    for one in chosen:
        name = one.tensor.name
        edits[name] = _edit(one)
        numbers, scales = f"{name}/int{4 if one.block else 8}", f"{name}/scales"
        label = f"{name}/DequantizeLinear"
        if one.table is not None:
            # Of the rows that are taken, and not of the whole table: a scale is one column's.
            (given,) = one.table.output
            one.table.input[0], one.table.output[0] = numbers, f"{given}/int8"
            inputs = [f"{given}/int8", scales]
            behind[one.table.name] = helper.make_node("DequantizeLinear", inputs, [given], label, axis=-1)
            continue
        options: dict[str, Any] = {"axis": 1 - one.axis, "block_size": one.block} if one.block else {"axis": one.axis}
        before.append(helper.make_node("DequantizeLinear", [numbers, scales], [name], label, **options))
    nodes = [part for node in model.graph.node for part in (node, behind.get(node.name)) if part is not None]
    replace_all(model.graph.node, [*before, *nodes])
    return edits


def _edit(one: _Weight) -> Edit:
    def edit(values: npt.NDArray[Any]) -> Mapping[str, npt.NDArray[Any]]:
        numbers, scales = _quantized(values.astype(np.float32), one)
        kind = TensorProto.INT4 if one.block else TensorProto.INT8
        return {
            f"{one.tensor.name}/int{4 if one.block else 8}": numbers.astype(helper.tensor_dtype_to_np_dtype(kind)),
            f"{one.tensor.name}/scales": scales,
        }

    return edit


def _quantized(values: Floats, one: _Weight) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """The numbers, in the weight's shape, and the scales in its type: (channels,), or one in each block's place."""
    dtype = helper.tensor_dtype_to_np_dtype(one.tensor.data_type)
    if not one.block:
        return quantized_weight(values, one.axis, dtype)
    channels = values.shape[one.axis]
    blocks = np.moveaxis(values, 1 - one.axis, -1).reshape(channels, -1, one.block)
    numbers, scales = _quantized_blocks(blocks, dtype)
    return np.moveaxis(numbers.reshape(channels, -1), -1, 1 - one.axis), np.moveaxis(scales, -1, 1 - one.axis)


def _quantized_blocks(blocks: Floats, dtype: npt.DTypeLike) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """Of blocks (channels, count, size) the numbers in -8..7 and the scales (channels, count) with the least error."""
    largest = np.abs(blocks).max(-1, keepdims=True) / np.float32(_MOST)
    numbers, scales = np.zeros(blocks.shape, np.int8), np.zeros((*largest.shape,), dtype)
    least = np.full(largest.shape, np.inf, np.float32)
    for share in _SHRINKS:
        tried = np.maximum((largest * np.float32(share)).astype(dtype), np.finfo(dtype).smallest_subnormal)
        wide = tried.astype(np.float32)
        rounded = np.clip(np.rint(blocks / wide), _LEAST, _MOST)
        errors = np.square(rounded * wide - blocks).sum(-1, keepdims=True)
        better = errors < least
        numbers, scales = np.where(better, rounded.astype(np.int8), numbers), np.where(better, tried, scales)
        least = np.where(better, errors, least)
    return numbers, scales[..., 0]


def _dequantized(values: Floats, one: _Weight) -> Floats:
    numbers, scales = _quantized(values, one)
    wide: Floats = scales.astype(np.float32)
    if one.block:
        factors = np.repeat(wide, one.block, 1 - one.axis)
    else:
        factors = wide.reshape([-1 if axis == one.axis else 1 for axis in range(values.ndim)])
    made: Floats = numbers * factors
    return made
