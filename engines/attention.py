"""Attention as one node: ONNX Runtime's MultiHeadAttention in place of the products and the Softmax that exports have.

It never holds the scores of all places with all places at once. ONNX Runtime's own fusions, and those of
`onnxruntime.transformers` 1.31, do not recognise attention as torch 2.13's exporter writes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .graph_files import prune

DOMAIN = "com.microsoft"
_Step = tuple[str, tuple[int, ...]]
# Places and heads exchanged; the last two axes of four or, with heads and batch as one, of three.
_HEADS: _Step = ("Transpose", (0, 2, 1, 3))
_LAST_OF_FOUR: _Step = ("Transpose", (0, 1, 3, 2))
_LAST_OF_THREE: _Step = ("Transpose", (0, 2, 1))
_RESHAPED: _Step = ("Reshape", ())
# What lies between a projection (B, S, heads * width) and the product, seen from the product.
_SPLIT = (_HEADS, _RESHAPED)
_TURNED = ((_RESHAPED, _LAST_OF_THREE, _RESHAPED, *_SPLIT), (_LAST_OF_FOUR, *_SPLIT))
_MERGED = (_HEADS, _RESHAPED)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Where an attention is: its projections, what it makes of them, its heads and the factor of its scores."""

    query: str
    key: str
    value: str
    made: str
    heads: int
    scale: float


def fused_attention(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy of a graph with one node for each attention without a mask that is recognised, and how many these are.

    Other graphs stay as they are. Weights may lie in files and are not read.
    """
    copied: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    graph = copied.graph
    index = _Index(graph)
    found = [one for node in graph.node if node.op_type == "Softmax" and (one := index.attention(node)) is not None]
    by_made = {one.made: one for one in found}
    for node in graph.node:
        if node.output and node.output[0] in by_made:
            one = by_made[node.output[0]]
            node.CopyFrom(
                helper.make_node(
                    "MultiHeadAttention",
                    [one.query, one.key, one.value],
                    [one.made],
                    name=node.name.rpartition("/")[0] + "/MultiHeadAttention",
                    domain=DOMAIN,
                    num_heads=one.heads,
                    scale=one.scale,
                )
            )
    if found:
        prune(graph)
        if all(entry.domain != DOMAIN for entry in copied.opset_import):
            copied.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return copied, len(found)


class _Index:
    """A graph's nodes by what they make, their readers, its small constants, and the shapes that it states."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._ends = {value.name for value in graph.output}
        self._constants = {
            tensor.name: tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL
        }

    def attention(self, softmax: onnx.NodeProto) -> _Attention | None:
        """The attention that a Softmax is part of, where everything is as it should be."""
        scores = self._maker(self._before_casts(softmax.input[0]), "MatMul")
        weighted = self._only_reader(self._behind_casts(softmax.output[0]), "MatMul")
        if scores is None or weighted is None or not _is_over_last_axis(softmax):
            return None
        query, query_scale = self._unscaled(scores.input[0])
        key, key_scale = self._unscaled(scores.input[1])
        keys = next(filter(None, (self._up(key, steps) for steps in _TURNED)), None)
        queries, values = self._up(query, _SPLIT), self._up(weighted.input[1], _SPLIT)
        made = self._down(weighted.output[0], _MERGED)
        if queries is None or keys is None or values is None or made is None:
            return None
        heads = self._size(self._makers[self._makers[query].input[0]].input[1], 2, of=4)
        if heads is None or self._size(self._makers[made].input[1], None, of=3) is None:
            return None
        return _Attention(queries, keys, values, made, heads, query_scale * key_scale)

    def _size(self, shape: str, axis: int | None, *, of: int) -> int | None:
        """The number on an axis of a shape that a Reshape is given, of so many axes; 0 for none in particular."""
        node = self._maker(shape, "Concat")
        if node is not None:
            if len(node.input) != of:
                return None
            shape, of, axis = ("" if axis is None else node.input[axis]), 1, None if axis is None else 0
        if axis is None and not shape:
            return 0
        constant = self._constants.get(shape)
        values = [] if constant is None else numpy_helper.to_array(constant).reshape(-1).tolist()
        if len(values) != of:
            return None
        return 0 if axis is None else values[axis] if values[axis] > 0 else None

    def _maker(self, name: str, kind: str) -> onnx.NodeProto | None:
        node = self._makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def _only_reader(self, name: str, kind: str) -> onnx.NodeProto | None:
        readers = self._readers.get(name, [])
        alone = len(readers) == 1 and name not in self._ends and readers[0].op_type == kind
        return readers[0] if alone else None

    def _before_casts(self, name: str) -> str:
        cast = self._maker(name, "Cast")
        return name if cast is None else cast.input[0]

    def _behind_casts(self, name: str) -> str:
        cast = self._only_reader(name, "Cast")
        return name if cast is None else cast.output[0]

    def _unscaled(self, name: str) -> tuple[str, float]:
        """What is multiplied by a number, and the number."""
        node = self._maker(name, "Mul")
        factor = None if node is None else self._constants.get(node.input[1])
        if node is None or factor is None or np.prod(factor.dims) != 1:
            return name, 1.0
        return node.input[0], float(numpy_helper.to_array(factor).astype(np.float32).reshape(()))

    def _up(self, name: str, steps: Iterable[_Step]) -> str | None:
        """What these nodes, one before the other, were made from."""
        for kind, order in steps:
            node = self._maker(name, kind)
            if node is None or not _turns(node, order):
                return None
            name = node.input[0]
        return name

    def _down(self, name: str, steps: Iterable[_Step]) -> str | None:
        for kind, order in steps:
            node = self._only_reader(name, kind)
            if node is None or not _turns(node, order):
                return None
            name = node.output[0]
        return name


def _turns(node: onnx.NodeProto, order: tuple[int, ...]) -> bool:
    """Whether a Transpose has its axes in this order; any other node has none."""
    return tuple(next((one.ints for one in node.attribute if one.name == "perm"), ())) == order


def _is_over_last_axis(softmax: onnx.NodeProto) -> bool:
    return next((int(one.i) for one in softmax.attribute if one.name == "axis"), -1) in (-1, 3)
