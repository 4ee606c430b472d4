"""Outlier channels of what matrix products read, divided there and multiplied into the weights: SmoothQuant.

G. Xiao et al., "SmoothQuant", ICML 2023, equation 4. Divisors are rounded to powers of two, of at most 1.41 times what
the equation says: before anything is rounded to eight bits the graph then computes the same bits as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..engines.graph_files import reads_of, replace_all
from ..runtime.errors import ArgumentError
from .graph_writing import Edit
from .layers import Layer

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How a value is smoothed: its divisors along the last axis, and the initializers that take them.

    affine: scale and bias of the normalization that makes the value; none where it has other readers, so that the value
    is multiplied by the divisors' inverse in a node of its own.
    """

    divisors: Floats
    affine: tuple[str, ...]


def outlier_ratio(channels: Floats) -> float:
    """How much larger the largest channel is than the median one; infinite where half of them are 0."""
    median = float(np.median(channels))
    return float(channels.max()) / median if median else float("inf")


def require_alpha(alpha: float | None) -> None:
    """Raise ArgumentError where a smoothing is neither in [0, 1] nor None, for none."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ArgumentError("smoothing", "out of range", got=alpha, expected="0 to 1")


def divisors_of(channels: Floats, weights: Floats, alpha: float) -> Floats:
    """max|X|^alpha / max|W|^(1 - alpha) for each channel, as the nearest power of two; 1 where either is 0.

    channels, weights: (C,) the largest magnitudes of activations and weights by input channel. alpha: in [0, 1]. The
    exponents are held to [-14, 14]: a divisor and its inverse are then normal numbers in half precision too.
    """
    known = (channels > 0) & (weights > 0)
    x, w = (np.where(known, one, 1).astype(np.float64) for one in (channels, weights))
    exponents = np.where(known, alpha * np.log2(x) - (1 - alpha) * np.log2(w), 0)
    divisors: Floats = np.exp2(np.rint(exponents.clip(-14, 14))).astype(np.float32)
    return divisors


def affine_before(graph: onnx.GraphProto, value: str, users: Sequence[Layer]) -> tuple[str, ...]:
    """The initializers of the normalization that makes `value`, where only `users` see what they do; none otherwise."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {one.name: ["an output"] for one in graph.output}
    for node in graph.node:
        for name in reads_of(node):
            readers.setdefault(name, []).append(node.name)
    if sorted(readers[value]) != sorted(one.name for one in users):
        return ()
    node = makers.get(value)
    if node is not None and node.op_type == "Cast" and len(readers[node.input[0]]) == 1:
        node = makers.get(node.input[0])
    if node is None or node.op_type != "LayerNormalization" or any(node.output[1:]):
        return ()
    stored = {tensor.name: tensor for tensor in graph.initializer}
    affine = tuple(name for name in node.input[1:] if name)
    own = all(name in stored and len(stored[name].dims) == 1 and len(readers[name]) == 1 for name in affine)
    return affine if own else ()


def smoothed(
    model: onnx.ModelProto, smoothings: Mapping[str, Smoothing], layers: Sequence[Layer]
) -> tuple[onnx.ModelProto, dict[str, Edit]]:
    """A copy of a graph whose `layers` read smoothed values, and how its weights are to be changed for it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edits: dict[str, Edit] = {}
    readers: dict[str, Layer] = {}
    for layer in layers:
        found = smoothings.get(layer.reads)
        if found is None:
            continue
        edits[layer.weight] = _scaled(layer.weight, along(found.divisors, layer))
        edits.update({name: _scaled(name, np.reciprocal(found.divisors)) for name in found.affine})
        if not found.affine:
            readers[layer.name] = layer
    nodes, made = [], set[str]()
    for node in copy.graph.node:
        layer_ = readers.get(node.name)
        if layer_ is not None:
            name = f"{layer_.reads}/smoothed"
            if name not in made:
                made.add(name)
                factors = _inverse(smoothings[layer_.reads].divisors, layer_)
                copy.graph.initializer.append(numpy_helper.from_array(factors, f"{name}/factors"))
                nodes.append(helper.make_node("Mul", [layer_.reads, f"{name}/factors"], [name], name=f"{name}/Mul"))
            node.input[0] = name
        nodes.append(node)
    replace_all(copy.graph.node, nodes)
    return copy, edits


def along(divisors: Floats, layer: Layer) -> Floats:
    """Divisors in a shape that broadcasts along a two-dimensional weight's axis of input channels."""
    return divisors.reshape((-1, 1) if layer.reads_axis == 0 else (1, -1))


def _inverse(divisors: Floats, layer: Layer) -> npt.NDArray[Any]:
    return (1 / divisors).astype(helper.tensor_dtype_to_np_dtype(layer.elem_type))


def _scaled(name: str, factors: Floats) -> Callable[[npt.NDArray[Any]], Mapping[str, npt.NDArray[Any]]]:
    return lambda values: {name: (values * factors).astype(values.dtype)}
