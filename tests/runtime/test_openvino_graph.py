"""The angles of sinusoidal embeddings, which OpenVINO is to compute in fp32 whatever the rest of a graph is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper, save_model

from tandemrt.runtime.backends.openvino_graph import read_graph

KEPT = "DisablePrecisionConversion_0"
FREQUENCIES = np.exp(-np.log(10_000) * np.arange(16) / 16).astype(np.float32)
# What rounding 32 numbers up to 1 and their products to eight bits may come to.
MAX_ERROR = 0.02
# On a processor without bf16 the numbers are right in any case, and the attribute is what the tests see.
HINT = "bf16" if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
Node = tuple[str, Sequence[str], str]
# From the input `t` to `column`, of which the frequencies make the angles.
COLUMNS: dict[str, tuple[int, Sequence[str | int], Sequence[Node]]] = {
    "time steps": (TensorProto.FLOAT, ["n"], [("Unsqueeze", ["t", "one"], "column")]),
    "whole time steps": (
        TensorProto.INT64,
        ["n"],
        [("Cast", ["t"], "numbers"), ("Unsqueeze", ["numbers", "one"], "column")],
    ),
    "sizes and crops": (
        TensorProto.FLOAT,
        ["n", 6],
        [("Reshape", ["t", "all"], "flat"), ("Unsqueeze", ["flat", "one"], "column")],
    ),
}


def written(folder: Path, columns: str, before: Sequence[Node] = ()) -> Path:
    """A graph that embeds `t` as denoisers do, and multiplies the sines and cosines with a matrix."""
    kind, shape, nodes = COLUMNS[columns]
    matrix = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32) / 8
    constants = {"one": [1], "all": [-1], "frequencies": FREQUENCIES, "matrix": matrix, "square": matrix[:16, :16]}
    after: list[Node] = [
        ("Mul", ["column", "frequencies"], "angles"),
        *before,
        ("Sin", [before[-1][2] if before else "angles"], "sines"),
        ("Cos", [before[-1][2] if before else "angles"], "cosines"),
        ("Concat", ["sines", "cosines"], "embedding"),
        ("MatMul", ["embedding", "matrix"], "hidden"),
        ("Relu", ["hidden"], "active"),
        ("MatMul", ["active", "matrix"], "y"),
    ]
    attributes = {"Cast": {"to": TensorProto.FLOAT}, "Concat": {"axis": 1}}
    made: list[NodeProto] = [
        helper.make_node(kind_, list(inputs), [output], name=output, **attributes.get(kind_, {}))
        for kind_, inputs, output in (*nodes, *after)
    ]
    graph = helper.make_graph(
        made,
        "embedding",
        [helper.make_tensor_value_info("t", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    path = folder / "model.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize("columns", COLUMNS)
def test_angles_are_as_exact_as_in_fp32(columns: str, tmp_path: Path) -> None:
    core, path = openvino.Core(), written(tmp_path, columns)
    kind, shape, _ = COLUMNS[columns]
    fed = np.array([999, 501, 21, 1, 1023, 767] if len(shape) == 1 else [[999, 501, 21, 1, 1023, 767]])
    feeds = {"t": fed.astype(np.int64 if kind == TensorProto.INT64 else np.float32)}
    settings = {"INFERENCE_PRECISION_HINT": HINT}
    (found,) = core.compile_model(read_graph(core, path, "bf16"), "CPU", settings)(feeds).values()
    (expected,) = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds).values()
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= MAX_ERROR * np.abs(expected).max()
    if HINT == "bf16":
        (as_it_is,) = core.compile_model(path, "CPU", settings)(feeds).values()
        assert np.abs(as_it_is - expected).max() > 5 * MAX_ERROR * np.abs(expected).max()


def kept(graph: openvino.Model) -> set[str]:
    return {node.get_type_name() for node in graph.get_ops() if KEPT in node.get_rt_info()}


def test_nothing_but_the_angles_is_kept(tmp_path: Path) -> None:
    core, path = openvino.Core(), written(tmp_path, "time steps")
    assert kept(read_graph(core, path, "bf16")) == {"Multiply", "Reshape"}
    assert kept(read_graph(core, path, "f32")) == set()


def test_sines_of_what_a_model_computed_are_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "time steps", [("MatMul", ["angles", "square"], "mixed")])
    assert kept(read_graph(openvino.Core(), path, "bf16")) == set()
