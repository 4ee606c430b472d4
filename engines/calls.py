"""What a call of a graph takes at given shapes, counted without running it: memory of its values, and its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import onnx
from onnx import TensorProto, helper

from .attention import fused_attention
from .graph_files import reads_of
from .inferred import DENSE, Inferred, Shape, inferred_at, multiply_adds

# Nodes that make other shapes of what they read, in the same memory.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True, slots=True)
class Call:
    """The bytes of the values that are there at once in a call, at most, and its multiply-adds."""

    memory_bytes: int
    multiply_adds: int


def call_of(
    model: onnx.ModelProto,
    shapes: Mapping[str, Shape],
    where: str,
    *,
    float_bytes: int | None = None,
    keeps_scores: bool = False,
) -> Call | None:
    """The call of a graph whose inputs have these shapes; None where the shapes of its values cannot be told.

    Nodes run in the graph's order, and each value lies in memory of its own until its last reader has run: backends
    share more, and take scratch memory besides. Weights do not count.

    model: is given these shapes. float_bytes: of a number, where it is not computed in the type that the graph states.
    keeps_scores: whether attention has its scores, of all places with all places, in memory.

    Raises:
        BundleError: an input's shape is not given.
    """
    known = inferred_at(model, shapes, where)
    graph = (model if keeps_scores else fused_attention(model)[0]).graph
    views = _views(graph)
    made = [name for node in graph.node for name in node.output if name and name not in views]
    if any(name not in known.shapes for name in made):
        return None
    sizes = {name: prod(known.shapes[name]) * _item_bytes(known, name, float_bytes) for name in made}
    work = sum(multiply_adds(node, known.shapes) for node in model.graph.node if node.op_type in DENSE)
    return Call(_most_at_once(graph, views, sizes), work)


def _views(graph: onnx.GraphProto) -> dict[str, str]:
    """The values that are others in another shape, with the first of these."""
    stored = {tensor.name for tensor in graph.initializer}
    views: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _VIEWS and node.input[0] not in stored:
            views[node.output[0]] = views.get(node.input[0], node.input[0])
    return views


def _item_bytes(known: Inferred, name: str, float_bytes: int | None) -> int:
    kind = known.types[name]
    if float_bytes is not None and kind in _FLOATS:
        return float_bytes
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _most_at_once(graph: onnx.GraphProto, views: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    end = len(graph.node)
    last_read = {views.get(name, name): place for place, node in enumerate(graph.node) for name in reads_of(node)}
    last_read |= {views.get(value.name, value.name): end for value in graph.output}
    changes = [0] * (end + 2)
    for place, node in enumerate(graph.node):
        for name in node.output:
            if name in sizes:
                changes[place] += sizes[name]
                changes[last_read.get(name, place) + 1] -= sizes[name]
    return max(accumulate(changes))
