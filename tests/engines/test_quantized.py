"""Graphs that quantize: int8 and fp8 engines are built of them as they are, and those in int8 give the float graph's
numbers within what eight bits take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from tandemrt.engines.build import ensure_engine
from tandemrt.runtime import Pipeline
from tandemrt.runtime.backends import open_engine
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.engine_files import Layer, read_layers
from tandemrt.runtime.engine_search import fitting_engines
from tandemrt.runtime.errors import TargetError
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.targets import Target

from ..interop.picture import psnr_db
from ..runtime.tiny_bundle import call_quantized, quantization_in, resign
from .conftest import Requests
from .test_build import FEEDS, VERSIONS, reference, silent

# Of the largest number of the float graph: two convolutions in eight bits, beside a path that is not quantized.
MAX_RELATIVE_ERROR = 0.02


# How the layers of each backend tell that they convolve whole numbers.
CONVOLVES_INTEGERS: dict[str, Callable[[Layer], bool]] = {
    "onnxruntime": lambda layer: layer.kind.endswith("QLinearConv"),
    "openvino": lambda layer: layer.kind == "Convolution" and layer.precision in ("u8", "i8"),
    "tensorrt-rtx": lambda layer: "Conv" in layer.name and any("DequantizeLinear" in node for node in layer.nodes),
}


class _Calibration(CalibrationDataReader):
    """The very inputs that the tests give, so that none is beyond the ranges."""

    def __init__(self) -> None:
        self._feeds = [FEEDS]

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return self._feeds.pop() if self._feeds else None


def with_pairs(tiny_path: Path, folder: Path, kind: QuantType, *operators: str, **options: Any) -> Bundle:
    """The tiny bundle with Q/DQ pairs around operators of its UNet, biases left alone."""
    shutil.copytree(tiny_path, folder)
    model = folder / "unet" / "model.onnx"
    quantize_static(
        onnx.load(model),
        model,
        _Calibration(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(operators),
        activation_type=kind,
        weight_type=kind,
        use_external_data_format=False,
        **{"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}, **options},
    )
    (folder / "unet" / "model.onnx.data").unlink()
    call_quantized(folder, "int8" if kind == QuantType.QInt8 else "fp8", "unet")
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def quantized(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Convolutions in int8, symmetric."""
    return with_pairs(tiny_path, tmp_path_factory.mktemp("quantized") / "bundle", QuantType.QInt8, "Conv")


@pytest.fixture(scope="module")
def in_fp8(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Matrix products in E4M3."""
    options = {"calibrate_method": CalibrationMethod.Distribution, "extra_options": {"QuantizeBias": False}}
    folder = tmp_path_factory.mktemp("in_fp8") / "bundle"
    return with_pairs(tiny_path, folder, QuantType.QFLOAT8E4M3FN, "MatMul", **options)


def test_a_graph_in_fp8_is_built_as_it_is(in_fp8: Bundle, tmp_path: Path, requests: Requests) -> None:
    """TensorRT-RTX multiplies eight bits, and joins what dequantizes to the product."""
    (request,) = requests("tensorrt-rtx:sm89:fp8", components=("unet",), profiles=("64:guided",), bundle=in_fp8)
    assert request.ingredients.precision == "fp8"
    layers = read_layers(ensure_engine(request, tmp_path, silent, VERSIONS).folder)
    (product,) = [layer for layer in layers if any("MatMul" in node for node in layer.nodes)]
    assert product.precision == "fp8"
    assert any("DequantizeLinear" in node for node in product.nodes)


def test_what_is_not_quantized_is_refused_where_it_is_named(quantized: Bundle, requests: Requests) -> None:
    refused = r"vae_decoder: is not quantized to int8, .*Ask for openvino:cpu:fp32, which runs beside what is"
    with pytest.raises(TargetError, match=refused):
        requests("openvino:cpu:int8", components=("unet", "vae_decoder"), bundle=quantized)
    for target in ("openvino:cpu:int8", "openvino:cpu"):
        found = {one.component: one.ingredients.precision for one in requests(target, bundle=quantized)}
        assert (found["unet"], found["unet_small"], found["vae_decoder"]) == ("int8", "fp32", "fp32")
    (kept,) = requests("openvino:cpu:fp32", components=("unet",), bundle=quantized)
    assert kept.ingredients.precision == "fp32"


def test_a_table_in_eight_bits_is_nothing_tensorrt_takes(tiny_path: Path, tmp_path: Path, requests: Requests) -> None:
    shutil.copytree(tiny_path, tmp_path / "bundle")

    def edit(manifest: Manifest) -> Manifest:
        told = msgspec.structs.replace(quantization_in("int8-weights"), settings={"tables": ["tokens/Gather"]})
        encoder = msgspec.structs.replace(manifest.components["text_encoder"], quantization=told)
        return msgspec.structs.replace(manifest, components={**manifest.components, "text_encoder": encoder})

    resign(tmp_path / "bundle", edit)
    bundle = Bundle.open(tmp_path / "bundle")
    with pytest.raises(TargetError, match=r"text_encoder: a table in eight bits, .*--keep 'tokens/Gather'`, or run"):
        requests("tensorrt-rtx:sm89", bundle=bundle)
    assert requests("openvino:cpu", bundle=bundle)


def test_what_is_not_quantized_is_told_where_all_are_built(
    quantized: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build-engine", str(quantized.path), "--target", "openvino:cpu:int8", "--cache", str(tmp_path)]
    assert main([*command, "--print-plan"]) == 0
    out = capsys.readouterr().out
    assert "unet for openvino:cpu:int8, 64x64: to be built" in out
    told = "vae_decoder for openvino:cpu:int8 in fp32, as it is, 64x64: to be built"
    assert told in out


@pytest.mark.parametrize("target", ["onnxruntime:cpu:int8", "openvino:cpu:int8", "tensorrt-rtx:sm89:int8"])
def test_a_graph_that_quantizes_is_built_as_it_is(
    target: str, quantized: Bundle, tiny: Bundle, requests: Requests, tmp_path: Path
) -> None:
    (request,) = requests(target, components=("unet",), profiles=("64:guided",), bundle=quantized)
    assert request.ingredients.precision == "int8"
    layers = read_layers(ensure_engine(request, tmp_path, silent, VERSIONS).folder)
    assert any(map(CONVOLVES_INTEGERS[request.target.backend], layers)), layers
    if request.target.backend == "tensorrt-rtx":
        return  # which runs on a GPU alone
    assert 0 < relative_error(quantized, request.target, tmp_path, tiny) <= MAX_RELATIVE_ERROR


def relative_error(bundle: Bundle, target: Target, cache: Path, floats: Bundle) -> float:
    """How far the UNet's engine in a cache is from the float graph, of the largest number of that."""
    shapes = {name: array.shape for name, array in FEEDS.items()}
    exact = target.of_component(bundle.component("unet"))
    found = fitting_engines(bundle, "unet", exact, shapes, cache=cache)[0]
    session = open_engine(found, exact, threads=1)
    binding = session.bind(shapes)
    for name, array in FEEDS.items():
        binding.inputs[name][...] = array
    binding.run()
    expected = reference(floats)
    error = np.abs(binding.outputs["out_sample"] - expected).max() / np.abs(expected).max()
    session.close()
    return float(error)


def test_openvino_builds_and_runs_fp8(in_fp8: Bundle, tiny: Bundle, requests: Requests, tmp_path: Path) -> None:
    (request,) = requests("openvino:cpu", components=("unet",), profiles=("64:guided",), bundle=in_fp8)
    assert request.ingredients.precision == "fp8"
    ensure_engine(request, tmp_path, silent, VERSIONS)
    assert 0 < relative_error(in_fp8, request.target, tmp_path, tiny) <= MAX_RELATIVE_ERROR
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1, "seed": 7, "output_type": "np"}
    with Pipeline.open(in_fp8.path, "openvino:cpu") as ours, Pipeline.open(in_fp8.path, "onnxruntime:cpu") as theirs:
        found, expected = (np.asarray(pipe("red", **arguments).images[0]) for pipe in (ours, theirs))
    assert psnr_db(found, expected) >= 35
