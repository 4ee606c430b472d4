"""Static FP8 graphs: what they hold, that they give the float graph's numbers, and that TensorRT-RTX builds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tandemrt.calibrate.fp8 import Fp8Settings, quantize_fp8
from tandemrt.engines.job import Job
from tandemrt.engines.onnxruntime import build
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.errors import ArgumentError, BundleError
from tandemrt.runtime.onnx_files import graph_tensors
from tandemrt.runtime.targets import Target

from .small_graphs import samples_of, write_block
from .test_int8 import FEEDS, FEW, LAYERS, relative_rms, require_built_in_eight_bits

SETTINGS = Fp8Settings(limits=FEW)
# Of the RMS of the float graph's output. E4M3 has three bits behind the first: rounding changes a number by 3.6% RMS at
# most, and a value goes through twelve roundings, of six layers' weights and inputs.
MAX_RELATIVE_RMS = 0.036 * 12**0.5 * 1.2
HERE = Target("onnxruntime", "cpu")


def ran(model: Path, feeds: Mapping[str, Any] = FEEDS, target: Target = HERE) -> np.ndarray[Any, Any]:
    """What the runtime makes of it, where ONNX Runtime by itself refuses products of E4M3."""
    session = open_session(model, target, threads=1)
    binding = session.bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()
    found = binding.outputs["out_sample"].copy()
    session.close()
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "fp16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A block and the same in E4M3."""
    folder = tmp_path_factory.mktemp("fp8")
    model = write_block(folder / "float", half=request.param)
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    report = quantize_fp8(model, samples_of(4), folder / "fp8" / "model.onnx", SETTINGS)
    assert (report.layers, report.kept) == (LAYERS, ("time/Gemm",))
    assert report.settings == {"method": "static E4M3, weights by channel", "samples": 4}
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before
    return model, folder / "fp8" / "model.onnx"


def test_weights_and_activations_are_e4m3(pair: tuple[Path, Path]) -> None:
    """The largest weight of every output channel becomes 448; scales are of the type that the layer computes in."""
    floats, found = (onnx.load(path).graph for path in pair)
    stored = {tensor.name: tensor for tensor in found.initializer}
    before = {tensor.name: tensor for tensor in floats.initializer}
    for name in LAYERS:
        weight = next(node.input[1] for node in floats.node if node.name == name)
        eight = stored[f"{weight}/fp8"]
        assert eight.data_type == TensorProto.FLOAT8E4M3FN
        assert stored[f"{weight}/scales"].data_type == before[weight].data_type
        numbers = np.abs(numpy_helper.to_array(eight).astype(np.float32))
        channels = 0 if name.endswith("Conv") else 1
        others = tuple(axis for axis in range(numbers.ndim) if axis != channels)
        np.testing.assert_array_equal(numbers.max(others), 448)
    pairs = [node for node in found.node if node.op_type == "QuantizeLinear"]
    assert {stored[node.input[2]].data_type for node in pairs} == {TensorProto.FLOAT8E4M3FN}
    assert len(pairs) == 4  # q, k and v read one value


def test_the_numbers_are_the_float_graphs(pair: tuple[Path, Path]) -> None:
    expected, found = (ran(path) for path in pair)
    assert 0 < relative_rms(found, expected) < MAX_RELATIVE_RMS


def test_an_outlier_channel_costs_e4m3_nothing(tmp_path: Path) -> None:
    """What int8 needs smoothing for keeps its precision in floating point of eight bits."""
    model = write_block(tmp_path / "float", outlier=100)
    quantize_fp8(model, samples_of(4), tmp_path / "fp8" / "model.onnx", SETTINGS)
    assert relative_rms(ran(tmp_path / "fp8" / "model.onnx"), ran(model)) < MAX_RELATIVE_RMS


def test_kept_layers_stay_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    model = write_block(tmp_path / "float")
    kept = Fp8Settings(keep=("conv_in/Conv",), limits=FEW)
    report = quantize_fp8(model, samples_of(2), tmp_path / "fp8" / "model.onnx", kept)
    assert report.kept == ("conv_in/Conv", "time/Gemm")
    with pytest.raises(ArgumentError, match="no such layers"):
        quantize_fp8(model, samples_of(2), tmp_path / "other.onnx", Fp8Settings(keep=("conv",), limits=FEW))
    with pytest.raises(ArgumentError, match="quantized already"):
        quantize_fp8(tmp_path / "fp8" / "model.onnx", samples_of(2), tmp_path / "other.onnx", SETTINGS)


def test_an_opset_without_e4m3_is_refused(tmp_path: Path) -> None:
    model = write_block(tmp_path / "float", opset=18)
    with pytest.raises(BundleError, match="opset, got 18, expected 19 or newer, which has E4M3"):
        quantize_fp8(model, samples_of(2), tmp_path / "fp8.onnx", SETTINGS)


def test_numbers_beyond_the_range_are_clipped(pair: tuple[Path, Path]) -> None:
    feeds = {"sample": np.full((1, 4, 8, 8), 1e4, np.float32), "timestep": np.zeros(1, np.float32)}
    assert np.isfinite(ran(pair[1], feeds)).all()


@pytest.mark.parametrize("pair", [True], ids=["fp16"], indirect=True)
def test_tensorrt_rtx_builds_layers_of_eight_bits(pair: tuple[Path, Path], tmp_path: Path) -> None:
    require_built_in_eight_bits(pair[1], "fp8", tmp_path)


def test_onnxruntime_builds_what_it_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An engine for its CPU gives the very numbers of the graph that it was built of."""
    job = Job(
        component="unet",
        model=str(pair[1]),
        folder=str(tmp_path),
        backend="onnxruntime",
        device="cpu",
        precision="fp8",
        profiles=(),
        flags={},
    )
    layers = build(job, lambda label, done, total: None).layers
    assert sum(layer.kind == "QuantizeLinear" for layer in layers) == 4
    np.testing.assert_array_equal(ran(tmp_path / "model.onnx"), ran(pair[1]))


def test_openvino_rounds_alike(pair: tuple[Path, Path]) -> None:
    """But for what lies halfway between two numbers of E4M3, which it takes for one of them a little too early."""
    expected, rounded = ran(pair[0]), ran(pair[1], target=Target("openvino", "cpu", "fp8"))
    assert 0 < relative_rms(rounded, expected) < MAX_RELATIVE_RMS


def test_interfaces_stay(pair: tuple[Path, Path]) -> None:
    assert graph_tensors(pair[1]) == graph_tensors(pair[0])
