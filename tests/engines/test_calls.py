"""What a call takes, counted by hand and by the graph."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from tandemrt.engines.blocks import work_by_block
from tandemrt.engines.calls import Call, call_of
from tandemrt.runtime.errors import BundleError

CHAIN = """
<ir_version: 10, opset_import: ["": 20]>
chain (float16[batch, 4, h, w] x) => (float[batch, h, w] y)
<float16[8, 4, 3, 3] kernel>
{
  a = Conv<pads = [1, 1, 1, 1]>(x, kernel)
  b = Relu(a)
  c = Reshape(b, flat)
  d = Cast<to: int = 1>(c)
  e = ReduceSum<keepdims: int = 0>(d, axis)
  y = Reshape(e, shape)
}
"""


def chain() -> onnx.ModelProto:
    model = parser.parse_model(CHAIN)
    numbers = {"flat": [2, 8, -1], "axis": [1], "shape": [2, 6, 5]}
    values = [numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    model.graph.initializer.extend(values)
    del model.graph.value_info[:]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float16), "kernel"))
    return model


def test_values_count_from_their_node_to_their_last_reader() -> None:
    places = 2 * 6 * 5
    # The most is there in Cast: Relu's 8 channels in half precision, and the same in single.
    assert call_of(chain(), {"x": (2, 4, 6, 5)}, "chain") == Call(places * 8 * (2 + 4), places * 8 * 4 * 9)
    whole = call_of(chain(), {"x": (2, 4, 6, 5)}, "chain", float_bytes=4)
    assert whole == Call(places * 8 * (4 + 4), places * 8 * 4 * 9)


def test_what_cannot_be_told_is_not_guessed(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    nodes = [
        helper.make_node("Foreign", ["x"], ["odd"], domain="nobody"),
        helper.make_node("MatMul", ["odd", "factor"], ["y"], name="block/MatMul"),
    ]
    factor = numpy_helper.from_array(np.ones((4, 4), np.float32), "factor")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    model = helper.make_model(helper.make_graph(nodes, "odd", [x], [y], [factor]), opset_imports=opsets, ir_version=10)
    assert call_of(model, {"x": (3, 4)}, "odd") is None
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"odd: the shape of 'odd', of MatMul 'block/MatMul', cannot be told"):
        work_by_block(tmp_path / "model.onnx", {"x": (3, 4)}, "odd")


def test_numbers_that_an_operator_does_not_take_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    nodes = [
        helper.make_node("Shape", ["x"], ["sides"]),
        helper.make_node("Gather", ["sides", "both"], ["same"]),
        helper.make_node("ConstantOfShape", ["same"], ["y"]),
    ]
    both = numpy_helper.from_array(np.array([0, 1]), "both")
    graph = helper.make_graph(nodes, "odd", [x], [y], [both])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert call_of(model, {"x": (3, 4)}, "odd") is not None
    monkeypatch.setattr(ReferenceEvaluator, "run", mock.Mock(side_effect=IndexError))
    assert call_of(model, {"x": (3, 4)}, "odd") is None
