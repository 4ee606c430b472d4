"""Static int8 graphs: what they hold, that every backend takes them, and that they give the float graph's numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from tandemrt.calibrate.int8 import Int8Settings, quantize_int8
from tandemrt.calibrate.ranges import Limits
from tandemrt.engines.job import Job
from tandemrt.engines.tensorrt import build
from tandemrt.runtime.engine_files import InputRange, Layer
from tandemrt.runtime.errors import ArgumentError, BundleError
from tandemrt.runtime.onnx_files import graph_tensors

from .small_graphs import samples_of, write_block

FEW = Limits(least_samples=1, threads=1)
PLAIN = Int8Settings(observer="minmax", smoothing=None, limits=FEW)
LAYERS = ("conv_in/Conv", "to_q/MatMul", "to_k/MatMul", "to_v/MatMul", "proj/MatMul", "conv_out/Conv")
FEEDS = next(iter(samples_of(1)()))
# Of the RMS of the float graph's output: six layers in eight bits, one after the other.
MAX_RELATIVE_RMS = 0.05


def ran(model: Path, feeds: Any = FEEDS) -> np.ndarray[Any, Any]:
    return onnxruntime.InferenceSession(model).run(None, feeds)[0]


def relative_rms(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def require_built_in_eight_bits(model: Path, precision: str, folder: Path) -> tuple[Layer, ...]:
    """The layers that TensorRT-RTX makes of a quantized block; its kernels dequantize both that they multiply."""
    shapes = {name: InputRange(min=array.shape, opt=array.shape, max=array.shape) for name, array in FEEDS.items()}
    job = Job(
        component="unet",
        model=str(model),
        folder=str(folder),
        backend="tensorrt-rtx",
        device="sm89",
        precision=precision,
        profiles=(shapes,),
        flags={},
    )
    layers = build(job, lambda label, done, total: None).layers
    dense = [layer for layer in layers if layer.kind in ("gemm", "correlation")]
    for name in LAYERS:
        (layer,) = (one for one in dense if name in one.nodes)
        assert sum("DequantizeLinear" in node for node in layer.nodes) >= 2, layer
    return tuple(layers)


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "fp16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A block and the same in int8."""
    folder = tmp_path_factory.mktemp("int8")
    model = write_block(folder / "float", half=request.param)
    out = folder / "int8" / "model.onnx"
    report = quantize_int8(model, samples_of(4), out, PLAIN)
    assert (report.layers, report.kept) == (LAYERS, ("time/Gemm",))
    return model, out


def test_weights_are_stored_in_eight_bits(pair: tuple[Path, Path]) -> None:
    model, out = pair
    floats, found = (onnx.load(path).graph for path in pair)
    stored = {tensor.name: tensor for tensor in found.initializer}
    for name in LAYERS:
        weight = next(node.input[1] for node in floats.node if node.name == name)
        assert stored[f"{weight}/int8"].data_type == TensorProto.INT8
        assert weight not in stored
    scales = {tensor.data_type for name, tensor in stored.items() if name.endswith(("/scale", "/scales"))}
    assert scales == {floats.initializer[0].data_type}
    assert graph_tensors(out) == graph_tensors(model)


def test_onnxruntime_gives_the_float_graphs_numbers(pair: tuple[Path, Path]) -> None:
    model, out = pair
    assert 0 < relative_rms(ran(out), ran(model)) < MAX_RELATIVE_RMS


def test_openvino_gives_the_float_graphs_numbers_and_multiplies_integers(pair: tuple[Path, Path]) -> None:
    model, out = pair
    compiled = openvino.Core().compile_model(out, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert 0 < relative_rms(compiled(FEEDS)[0], ran(model)) < MAX_RELATIVE_RMS
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        kind, precision = (node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision"))
        kinds[kind] += precision in ("i8", "u8")
    assert (kinds["Convolution"], kinds["FullyConnected"]) == (2, 4)


@pytest.mark.parametrize("pair", [True], ids=["fp16"], indirect=True)
def test_tensorrt_rtx_builds_layers_of_eight_bits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    layers = require_built_in_eight_bits(pair[1], "int8", tmp_path)
    # The attention between them stays one kernel.
    assert any("mha" in layer.name and "scores/MatMul" in layer.nodes for layer in layers)


def test_the_pairs_are_onnxruntimes_own(tmp_path: Path) -> None:
    """ONNX Runtime's quantizer, told to do the same, makes a graph of the same numbers."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._samples = samples_of(4)()

        def get_next(self) -> dict[str, Any] | None:
            return next(self._samples, None)

    model = write_block(tmp_path / "float")
    quantize_int8(model, samples_of(4), tmp_path / "ours" / "model.onnx", PLAIN)
    theirs = tmp_path / "theirs.onnx"
    quantize_static(
        onnx.load(model),
        theirs,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=list(LAYERS),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul"],
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1, "Conv": 0},
        },
    )
    np.testing.assert_allclose(ran(tmp_path / "ours" / "model.onnx"), ran(theirs), atol=1e-5)


def test_a_quantized_graph_is_refused(tmp_path: Path) -> None:
    model = write_block(tmp_path / "float")
    quantize_int8(model, samples_of(2), tmp_path / "once" / "model.onnx", PLAIN)
    with pytest.raises(ArgumentError, match=r"once: its graph is quantized already, got '.*QuantizeLinear"):
        quantize_int8(tmp_path / "once" / "model.onnx", samples_of(2), tmp_path / "twice" / "model.onnx", PLAIN)


def test_layers_are_kept_by_name(tmp_path: Path) -> None:
    model, out = write_block(tmp_path / "float"), tmp_path / "int8" / "model.onnx"
    report = quantize_int8(model, samples_of(2), out, Int8Settings(keep=("conv_out/Conv",), limits=FEW))
    assert report.kept == ("time/Gemm", "conv_out/Conv")
    assert "conv_out.weight" in {tensor.name for tensor in onnx.load(out).graph.initializer}
    with pytest.raises(ArgumentError, match=r"no such layers, got \['conv_3'\]"):
        quantize_int8(model, samples_of(2), out, Int8Settings(keep=("conv_3",), limits=FEW))
    with pytest.raises(ArgumentError, match="no layer is left to quantize"):
        quantize_int8(model, samples_of(2), out, Int8Settings(keep=LAYERS, limits=FEW))


def test_a_weight_that_a_kept_layer_reads_too_is_kept(tmp_path: Path) -> None:
    path = write_block(tmp_path / "float")
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node}
    nodes["to_k/MatMul"].input[1] = nodes["to_q/MatMul"].input[1]
    onnx.save_model(model, path)
    shared, kept = tmp_path / "shared" / "model.onnx", tmp_path / "kept" / "model.onnx"
    assert quantize_int8(path, samples_of(2), shared, PLAIN).kept == ("time/Gemm",)
    report = quantize_int8(path, samples_of(2), kept, Int8Settings(keep=("to_k/MatMul",), limits=FEW))
    assert report.kept == ("time/Gemm", "to_q/MatMul", "to_k/MatMul")
    for made in (shared, kept):
        assert relative_rms(ran(made), ran(path)) < MAX_RELATIVE_RMS


def test_half_precision_needs_scales_of_its_own_type(tmp_path: Path) -> None:
    model = write_block(tmp_path / "float", half=True, opset=18)
    with pytest.raises(BundleError, match="opset, got 18, expected 19 or newer for layers in float16"):
        quantize_int8(model, samples_of(2), tmp_path / "int8" / "model.onnx", PLAIN)
