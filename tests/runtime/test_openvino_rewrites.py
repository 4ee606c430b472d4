"""What OpenVINO's CPU is given in place of parts of a graph computes what ONNX Runtime computes of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper, save_model

from tandemrt.runtime.backends.openvino_graph import read_graph

RNG = np.random.default_rng(0)
DOUBLED = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CONSTANTS: Mapping[str, np.ndarray[Any, Any]] = {
    "none": np.zeros(0, np.float32),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "thrice": np.array([1, 1, 3, 3], np.float32),
    "kernel": RNG.standard_normal((6, 4, 3, 3)).astype(np.float32),
    "small kernel": RNG.standard_normal((6, 4, 1, 1)).astype(np.float32),
    "shift": RNG.standard_normal(6).astype(np.float32),
    "weight": RNG.standard_normal((4, 6)).astype(np.float32),
    "weight/int8": RNG.integers(-127, 128, (4, 6)).astype(np.int8),
    "zeros": np.zeros(6, np.int8),
    "scales": RNG.uniform(0.01, 0.02, 6).astype(np.float32),
}


def written(folder: Path, nodes: Sequence[NodeProto], shape: Sequence[int | str], half: bool) -> Path:
    """A graph from `x` to `y`. half: computed in float16."""
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    constants = {
        name: values if "ce" in name or values.dtype == np.int8 else values.astype(dtype)
        for name, values in CONSTANTS.items()
    }
    graph = helper.make_graph(
        nodes,
        "rewritten",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    path = folder / "model.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), str(path))
    return path


def upsampling(
    resize: Mapping[str, Any], scales: str = "twice", kernel: str = "kernel", pad: int = 1
) -> list[NodeProto]:
    return [
        helper.make_node("Resize", ["x", "", scales], ["large"], **resize),
        helper.make_node("Conv", ["large", kernel, "shift"], ["y"], pads=[pad] * 4),
    ]


def gated(axis: int) -> list[NodeProto]:
    return [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "shift"], ["projected"]),
        helper.make_node("Split", ["projected"], ["left", "right"], axis=axis, num_outputs=2),
        helper.make_node("Sigmoid", ["right"], ["gate"]),
        helper.make_node("Mul", ["left", "gate"], ["y"]),
    ]


def kinds(graph: openvino.Model) -> set[str]:
    return {node.get_type_name() for node in graph.get_ops()}


def require_equal(path: Path, shape: Sequence[int], half: bool) -> None:
    """OpenVINO, in fp32, computes what ONNX Runtime does, but for the rounding of float16."""
    given = {"x": RNG.standard_normal(shape).astype(np.float16 if half else np.float32)}
    core = openvino.Core()
    compiled = core.compile_model(read_graph(core, path, "f32"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (found,) = compiled(given).values()
    options = onnxruntime.SessionOptions()
    # Optimized, it rounds what is multiplied by weights of eight bits.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = onnxruntime.InferenceSession(path, options).run(None, given)
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-2 if half else 1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 5, 7), (1, 4, 1, 1)])
def test_doubled_pixels_are_convolved_before_they_are_doubled(
    shape: tuple[int, ...], half: bool, tmp_path: Path
) -> None:
    path = written(tmp_path, upsampling(DOUBLED), ["n", 4, "h", "w"], half)
    rewritten = kinds(read_graph(openvino.Core(), path, "f32"))
    assert "ConvolutionBackpropData" in rewritten
    assert not rewritten & {"Interpolate", "Convolution"}
    require_equal(path, shape, half)


@pytest.mark.parametrize(
    "nodes",
    [
        upsampling(DOUBLED, scales="thrice"),
        upsampling(DOUBLED, kernel="small kernel", pad=0),
        upsampling(DOUBLED, pad=0),
        upsampling({**DOUBLED, "mode": "linear"}),
        upsampling({**DOUBLED, "nearest_mode": "ceil"}),
        upsampling({**DOUBLED, "coordinate_transformation_mode": "align_corners"}),
    ],
)
def test_other_resizing_stays(nodes: list[NodeProto], tmp_path: Path) -> None:
    path = written(tmp_path, nodes, ["n", 4, "h", "w"], half=False)
    assert {"Interpolate", "Convolution"} <= kinds(read_graph(openvino.Core(), path, "f32"))
    require_equal(path, (1, 4, 4, 6), half=False)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("axis", [-1, 2])
def test_a_split_projection_is_two(axis: int, half: bool, tmp_path: Path) -> None:
    path = written(tmp_path, gated(axis), ["n", "length", 4], half)
    assert "Split" not in kinds(read_graph(openvino.Core(), path, "f32"))
    require_equal(path, (2, 6, 4), half)


@pytest.mark.parametrize("half", [False, True])
def test_a_split_projection_in_eight_bits_is_two(half: bool, tmp_path: Path) -> None:
    whole = helper.make_node("DequantizeLinear", ["weight/int8", "scales", "zeros"], ["dequantized"], axis=1)
    product, *others = gated(-1)
    product.input[1] = "dequantized"
    path = written(tmp_path, [whole, product, *others], ["n", "length", 4], half)
    graph = read_graph(openvino.Core(), path, "f32")
    assert "Split" not in kinds(graph)
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    stored = [node.get_element_type().get_type_name() for node in constants if list(node.shape) == [4, 3]]
    assert stored.count("i8") == 2
    require_equal(path, (2, 6, 4), half)


def test_what_is_split_otherwise_stays(tmp_path: Path) -> None:
    path = written(tmp_path, gated(1), ["n", 6, 4], half=False)
    assert "Split" in kinds(read_graph(openvino.Core(), path, "f32"))
    require_equal(path, (2, 6, 4), half=False)


def test_other_devices_are_given_the_graph_itself(tmp_path: Path) -> None:
    path = written(tmp_path, upsampling(DOUBLED), ["n", 4, "h", "w"], half=False)
    assert "Interpolate" in kinds(read_graph(openvino.Core(), path, "f32", "gpu"))
