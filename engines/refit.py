"""What a refittable engine is given: the base's weights by name, and what LoRAs add to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ..runtime.backends.base import Array
from ..runtime.errors import RequestError
from ..runtime.lora_slots import Adapter, LowRank, module_of
from .graph_files import read_graph, weight


class BaseWeights(Mapping[str, Array]):
    """The weights of a graph by name, each read when it is asked for."""

    def __init__(self, model: Path) -> None:
        """Raises BundleError where `model` is no ONNX model."""
        self.graph = read_graph(model).graph
        self._folder = model.parent
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def __getitem__(self, name: str) -> Array:
        return weight(self._tensors[name], self._folder)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, which is not read for it."""
        return tuple(self._tensors[name].dims)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def weight_changes(base: BaseWeights, adapters: tuple[Adapter, ...]) -> dict[str, Array]:
    """What adapters, mixed, add to the weights of a graph, by the weights' names: float32, of their shapes.

    Raises:
        RequestError: a module that the graph has not, or a weight of another shape.
    """
    places = {module_of(node.name): node for node in base.graph.node if _is_projection(node, base)}
    added: dict[str, Array] = {}
    for adapter in adapters:
        for module, change in adapter.changes.items():
            if module not in places:
                raise RequestError("loras", f"{adapter.name}: no such projection", got=module)
            node = places[module]
            name, shape = node.input[1], base.shape(node.input[1])
            values = _full(node, change, shape)
            if values is None:
                got = (len(change.up), change.down.shape[1])
                raise RequestError("loras", f"{adapter.name}: shape of {module}", got=got, expected=f"that of {shape}")
            added[name] = added.get(name, np.float32(0)) + np.float32(adapter.scale) * values
    return added


def _is_projection(node: onnx.NodeProto, base: BaseWeights) -> bool:
    return node.op_type in ("MatMul", "Gemm", "Conv") and len(node.input) > 1 and node.input[1] in base


def _full(node: onnx.NodeProto, change: LowRank, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    """up · down as the node keeps its weight, None where that is of another size."""
    values = change.up @ change.down
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB")):
        values = values.T
    if node.op_type == "Conv":
        fits = len(shape) == 4 and values.shape == (shape[0], shape[1] * shape[2] * shape[3])
        return values.reshape(shape) if fits else None
    return values if values.shape == shape else None
