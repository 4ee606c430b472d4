"""Weights of an ONNX graph that stay in the checkpoint's files until they are written or looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from onnxscript import ir

from ..runtime.errors import ExportError
from .lazy import StoredTensor

_TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


class Weight(ir.LazyTensor):
    """A stored tensor as an initializer's value, in another precision or transposed; loaded anew each time."""

    def __init__(
        self, name: str, stored: StoredTensor, dtype: ir.DataType, permutation: tuple[int, ...] | None = None
    ) -> None:
        self.stored = stored
        self.permutation = tuple(range(len(stored.shape))) if permutation is None else permutation
        shape = ir.Shape([stored.shape[axis] for axis in self.permutation])
        super().__init__(self._values, dtype, shape, name=name)

    @property
    def largest(self) -> float:
        """The largest magnitude among the values."""
        return self.stored.largest

    def half(self, name: str) -> Weight:
        """The same values as float16."""
        return Weight(name, self.stored, ir.DataType.FLOAT16, self.permutation)

    def transposed(self, name: str, permutation: Sequence[int]) -> Weight:
        """The same values with their axes in another order, as ONNX's Transpose has it."""
        return Weight(name, self.stored, self.dtype, tuple(self.permutation[axis] for axis in permutation))

    def _values(self) -> ir.Tensor:
        values = self.stored.load()
        if self.dtype in _TORCH_DTYPES:
            values = values.to(_TORCH_DTYPES[self.dtype])
        return ir.Tensor(values.permute(self.permutation).contiguous().numpy(), dtype=self.dtype, name=self.name)


def bind_weights(model: ir.Model, weights: Mapping[str, StoredTensor]) -> None:
    """Let the initializers that are weights be `Weight`s in place, those that are only used transposed transposed.

    Raises:
        ExportError: a parameter of the traced module is none of the weights.
    """
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = Weight(name, weights[name], value.dtype)
        elif isinstance(getattr(value.const_value, "raw", None), torch.nn.Parameter):
            raise ExportError(name, "a parameter that is not among the stored weights")
    for node in list(model.graph):
        if node.op_type == "Transpose" and isinstance(node.inputs[0].const_value, Weight):
            _transpose(model.graph, node)


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    """Take a Transpose's result for the weight, if no other node uses the weight as it is."""
    value, result = node.inputs[0], node.outputs[0]
    if len(value.uses()) > 1:
        return
    weight = value.const_value.transposed(result.name, node.attributes["perm"].as_ints())
    made = ir.Value(name=result.name, shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight)
    result.replace_all_uses_with(made)
    graph.remove(node, safe=True)
    del graph.initializers[value.name]
    graph.register_initializer(made)
