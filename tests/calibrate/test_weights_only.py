"""Weights in eight and four bits: how near the graph stays, on every backend, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tandemrt.calibrate.weights_only import WeightSettings, errors_of, quantize_weights
from tandemrt.engines.job import Job
from tandemrt.engines.tensorrt import build
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.engine_files import InputRange
from tandemrt.runtime.errors import ArgumentError, BundleError
from tandemrt.runtime.onnx_files import graph_tensors
from tandemrt.runtime.targets import Target

from .small_graphs import samples_of, write_block

FEEDS = next(iter(samples_of(1)()))
PRODUCTS = ("to_q/MatMul", "to_k/MatMul", "to_v/MatMul", "proj/MatMul")
CONVOLUTIONS = ("conv_in/Conv", "conv_out/Conv")
# Of the RMS of the float graph's output, by bits.
EXACT = 4e-3  # float16's, which backends round to at other places
MAX_RELATIVE_RMS = {8: 0.04, 4: 0.25}

Array = np.ndarray[Any, Any]


def ran(model: Path, feeds: Any = FEEDS) -> Array:
    with_arrays = open_session(model, Target("onnxruntime", "cpu"), threads=1)
    binding = with_arrays.bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()
    (output,) = binding.outputs.values()
    return output.copy()


def relative_rms(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=[(8, False), (8, True), (4, False), (4, True)], ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Path]:
    """The bits, a block, and the same with weights in so many."""
    bits, half = request.param
    folder = tmp_path_factory.mktemp("weights")
    model, out = write_block(folder / "float", half=half), folder / "small" / "model.onnx"
    report = quantize_weights(model, out, WeightSettings(bits))
    assert set(report.layers) == {*PRODUCTS, *CONVOLUTIONS, "time/Gemm"}
    assert report.kept == ()
    return bits, model, out


def test_the_graph_gives_nearly_the_same(made: tuple[int, Path, Path]) -> None:
    bits, model, out = made
    assert graph_tensors(out) == graph_tensors(model)
    expected, found = ran(model), ran(out)
    assert 0 < relative_rms(found, expected) < MAX_RELATIVE_RMS[bits]
    # Activations are not rounded as well: they differ by what arithmetic in the graph's type does.
    exact = ReferenceEvaluator(str(out)).run(None, FEEDS)[0]
    assert relative_rms(found, exact) < EXACT
    compiled = openvino.Core().compile_model(out, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_rms(next(iter(compiled(FEEDS).values())), exact) < EXACT


def test_weights_are_stored_in_so_many_bits(made: tuple[int, Path, Path]) -> None:
    bits, model, out = made
    graph = onnx.load(out).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name in ("to_q", "to_k", "to_v", "proj"):
        tensor = stored[f"{name}.weight/int{bits}"]
        assert tensor.data_type == (TensorProto.INT4 if bits == 4 else TensorProto.INT8)
        assert len(tensor.raw_data) == 16 * 16 * bits // 8
    for name in ("conv_in", "conv_out"):
        assert stored[f"{name}.weight/int8"].data_type == TensorProto.INT8
        assert f"{name}.weight" not in stored
    sizes = [sum(file.stat().st_size for file in path.parent.iterdir() if "data" in file.name) for path in (out, model)]
    assert sizes[0] < sizes[1]


def test_tensorrt_rtx_builds_it(made: tuple[int, Path, Path], tmp_path: Path) -> None:
    shapes = {name: InputRange(min=array.shape, opt=array.shape, max=array.shape) for name, array in FEEDS.items()}
    job = Job(
        component="unet",
        model=str(made[2]),
        folder=str(tmp_path),
        backend="tensorrt-rtx",
        device="sm89",
        precision="fp32",
        profiles=(shapes,),
        flags={},
    )
    assert build(job, lambda label, done, total: None).layers


def test_kept_layers_stay_as_they_were(tmp_path: Path) -> None:
    model, out = write_block(tmp_path / "float"), tmp_path / "small" / "model.onnx"
    report = quantize_weights(model, out, WeightSettings(8, keep=("conv_out/Conv", "proj/MatMul")))
    assert set(report.kept) == {"conv_out/Conv", "proj/MatMul"}
    before, after = ({t.name: t for t in onnx.load(path).graph.initializer} for path in (model, out))
    for name in ("conv_out.weight", "proj.weight"):
        assert np.array_equal(numpy_helper.to_array(after[name]), numpy_helper.to_array(before[name]))


def test_errors_are_of_each_layer_alone(tmp_path: Path) -> None:
    """One value a hundred times the others takes the scale of its channel, and the others lose their bits."""
    model = write_block(tmp_path / "float")
    graph = onnx.load(model)
    (tensor,) = (one for one in graph.graph.initializer if one.name == "to_k.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0] *= 100
    tensor.CopyFrom(numpy_helper.from_array(values, "to_k.weight"))
    onnx.save_model(graph, tmp_path / "model.onnx")
    settings = WeightSettings(8)
    planted, gentle = errors_of(tmp_path / "model.onnx", settings), errors_of(model, settings)
    assert set(planted) == {*PRODUCTS, *CONVOLUTIONS, "time/Gemm"}
    assert planted.pop("to_k/MatMul") > 2 * gentle.pop("to_k/MatMul") > 0
    assert planted == gentle


def write_table(folder: Path, rows: int = 4096) -> Path:
    """Rows of 16 taken from a table, times a weight."""
    random = np.random.default_rng(3)
    table = random.standard_normal((rows, 16)).astype(np.float32)
    weight = random.standard_normal((16, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], name="tokens/Gather"),
        helper.make_node("MatMul", ["rows", "weight"], ["out"], name="dense/MatMul"),
    ]
    tensors = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 7])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 7, 64])]
    graph = helper.make_graph(nodes, "table", inputs, outputs, tensors)
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_tables_are_dequantized_by_the_row(tmp_path: Path) -> None:
    model, out = write_table(tmp_path / "float"), tmp_path / "small" / "model.onnx"
    report = quantize_weights(model, out, WeightSettings(8))
    assert report.layers == ("dense/MatMul", "tokens/Gather")
    assert report.settings["tables"] == ["tokens/Gather"]
    ids = {"input_ids": np.arange(14, dtype=np.int64).reshape(2, 7) * 290}
    expected = ran(model, ids)
    assert 0 < relative_rms(ran(out, ids), expected) < MAX_RELATIVE_RMS[8]
    compiled = openvino.Core().compile_model(out, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_rms(next(iter(compiled(ids).values())), expected) < MAX_RELATIVE_RMS[8]
    assert quantize_weights(write_table(tmp_path / "short", rows=8), out, WeightSettings(8)).layers == ("dense/MatMul",)


@pytest.mark.parametrize(
    ("settings", "opset", "error", "words"),
    [
        (WeightSettings(8, keep=("nothing",)), 20, ArgumentError, r"float: no such layers, got \['nothing'\]"),
        (WeightSettings(8, keep=(*PRODUCTS, *CONVOLUTIONS, "time/Gemm")), 20, ArgumentError, "no layer is left"),
        (WeightSettings(4), 17, BundleError, "float: opset, got 17, expected 21 for weights in 4 bits. Ask for int8-w"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, settings: WeightSettings, opset: int, error: type[Exception], words: str
) -> None:
    model = write_block(tmp_path / "float", opset=opset)
    with pytest.raises(error, match=words):
        quantize_weights(model, tmp_path / "out" / "model.onnx", settings)
    assert not (tmp_path / "out").exists()


def test_a_quantized_graph_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "small" / "model.onnx"
    quantize_weights(write_block(tmp_path / "float"), out, WeightSettings(8))
    with pytest.raises(ArgumentError, match=r"small: its graph is quantized already, .*Quantize the bundle that this"):
        quantize_weights(out, tmp_path / "again" / "model.onnx", WeightSettings(8))
