"""Rewrites of a graph that OpenVINO's CPU computes faster; what comes out differs by rounding alone.

Measured on SDXS-512 in bf16, on two cores: its UNet and its decoder take about a tenth less time. See `docs/tandem.md`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .modules import imported

# By which rows of a 3x3 kernel each row of the 4x4 one is summed: a pixel stands in two rows, each seen by three.
_SUMS = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
_NEAREST = {
    "mode": "nearest",
    "shape_calculation_mode": "scales",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
    "pads_begin": [0] * 4,
    "pads_end": [0] * 4,
}
_SAME_SIZE = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1], "auto_pad": "explicit"}
_HALVES = 2


def rewrite(graph: Any) -> None:
    """Rewrite what is found of both patterns, in place."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Convolution":
            _transpose_convolution(node)
        elif node.get_type_name() == "Split":
            _halve_projection(node)
    graph.validate_nodes_and_infer_types()


def _transpose_convolution(node: Any) -> None:
    """A 3x3 convolution of pixels that were doubled becomes a transposed one, 4x4 with a stride of 2, of the pixels.

    Of a doubled picture every weight meets each pixel twice in a row, so that sums of weights meet it once: 4
    multiplications for each pixel of the result, not 9.
    """
    doubled, weight = _source(node, 0), _constant(node, 1)
    if doubled.get_type_name() != "Interpolate" or weight is None or weight.shape[2:] != (3, 3):
        return
    scales = _constant(doubled, 1)
    if scales is None or not np.array_equal(scales, [1, 1, 2, 2]) or len(doubled.inputs()) != 2:
        return
    if not (_has(doubled, _NEAREST) and _has(node, _SAME_SIZE)):
        return
    opset = imported("openvino").opset13
    kernel = np.einsum("yk,oikl,xl->ioyx", _SUMS, weight.astype(np.float32), _SUMS, optimize=True)
    ours = opset.convolution_backprop_data(
        doubled.input(0).get_source_output(),
        opset.constant(np.ascontiguousarray(kernel, weight.dtype)),
        strides=[2, 2],
        pads_begin=[1, 1],
        pads_end=[1, 1],
        dilations=[1, 1],
    )
    _replace(node.output(0), ours, node.get_friendly_name())


def _halve_projection(node: Any) -> None:
    """A projection that is split in halves becomes one for each: nothing is copied apart, and what follows is fused."""
    added = _source(node, 0)
    if added.get_type_name() != "Add" or len(node.outputs()) != _HALVES:
        return
    product, bias = _source(added, 0), _constant(added, 1)
    if product.get_type_name() != "MatMul" or bias is None or bias.ndim != 1:
        return
    weight, axis = product.input(1).get_source_output(), _constant(node, 1)
    rank, settings = product.output(0).get_partial_shape().rank, product.get_attributes()
    if len(weight.get_partial_shape()) != 2 or axis is None or rank.is_dynamic:
        return
    weights = _halves(weight.get_node(), 0 if settings["transpose_b"] else 1)
    if weights is None or (axis + 1) % rank.get_length() != 0:
        return
    opset = imported("openvino").opset13
    for output, half, biases in zip(node.outputs(), weights, np.split(bias, _HALVES), strict=True):
        projected = opset.matmul(product.input(0).get_source_output(), half, **settings)
        made = opset.add(projected, opset.constant(biases))
        _replace(output, made, f"{added.get_friendly_name()}/{output.get_index()}")


def _halves(node: Any, axis: int) -> list[Any] | None:
    """A weight's halves along one of its two axes; None where it is not made of constants alone.

    One in eight bits is a constant, converted, less its zero points, times its scales.
    """
    opset, kind, values = imported("openvino").opset13, node.get_type_name(), _folded(node)
    if values is not None:
        cut = values.ndim == 2 and values.shape[axis] > 1
        parts = np.split(values, _HALVES, axis) if cut else [values] * _HALVES
        return [opset.constant(np.ascontiguousarray(part)) for part in parts]
    if kind not in ("Convert", "Subtract", "Multiply"):
        return None
    inner = [_halves(_source(node, index), axis) for index in range(len(node.inputs()))]
    known = [one for one in inner if one is not None]
    if len(known) != len(inner):
        return None
    if kind == "Convert":
        return [opset.convert(part, node.get_element_type()) for part in known[0]]
    made = opset.subtract if kind == "Subtract" else opset.multiply
    return [made(*parts) for parts in zip(*known, strict=True)]


def _folded(node: Any) -> np.ndarray[Any, Any] | None:
    """The values of a constant, also of one that is converted and reshaped, as scales and zero points are."""
    if node.get_type_name() == "Constant":
        return _values(node)
    if node.get_type_name() != "Reshape":
        return None
    source, shape = _source(node, 0), _constant(node, 1)
    converted = source.get_type_name() == "Convert"
    values = _folded(_source(source, 0) if converted else source)
    if values is None or shape is None:
        return None
    return values.reshape(shape).astype(source.get_element_type().to_dtype() if converted else values.dtype)


def _source(node: Any, index: int) -> Any:
    return node.input(index).get_source_output().get_node()


def _constant(node: Any, index: int) -> np.ndarray[Any, Any] | None:
    """What a node reads there, where that is a constant of a type that numpy has."""
    source = _source(node, index)
    return _values(source) if source.get_type_name() == "Constant" else None


def _values(constant: Any) -> np.ndarray[Any, Any] | None:
    if constant.get_element_type().get_type_name() == "bf16":
        return None
    values: np.ndarray[Any, Any] = constant.get_data()
    return values


def _has(node: Any, settings: dict[str, Any]) -> bool:
    stated = node.get_attributes()
    return all(stated[name] == value for name, value in settings.items())


def _replace(output: Any, ours: Any, name: str) -> None:
    # An engine's layers are listed with the names of what they come from.
    ours.set_friendly_name(name)
    output.replace(ours.output(0))
