"""OpenVINO's own: precision asked for and granted, int8, doctor's list, and pictures that equal ONNX Runtime's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openvino
import pytest
from onnx import TensorProto, helper, load_model, numpy_helper, save_model

from tandemrt.runtime import BundleError, ExecutionError, Pipeline, TargetError
from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends import openvino as backend
from tandemrt.runtime.cli import main
from tandemrt.runtime.targets import Target, parse_target, probe_backends

from ..interop.picture import psnr_db
from .tiny_bundle import resign, write_tiny_bundle

PROMPT = "a red circle left of a blue square on a white background"
MINIMUM_PSNR_DB = {"fp32": 60.0, "bf16": 35.0}
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
WAYS: dict[str, dict[str, Any]] = {
    "large": {"num_inference_steps": 8},
    "tandem": {"steps": {"unet": 4, "unet_small": 4}},
    "ancestral": {"num_inference_steps": 8, "solver": "euler_a", "seed": 8},
    "pictures": {"num_inference_steps": 4, "num_images_per_prompt": 2, "height": 96, "width": 80},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino") / "bundle"
    write_tiny_bundle(folder)
    return folder


class Paint(Protocol):
    def __call__(self, target: str, **arguments: Any) -> np.ndarray: ...


def painter(bundle: Path) -> Iterator[Paint]:
    """What paints on a target, with one pipeline kept for each."""
    with ExitStack() as stack:

        @cache
        def pipeline(target: str) -> Pipeline:
            return stack.enter_context(Pipeline.open(bundle, target=target, threads=1))

        yield lambda target, **arguments: np.stack(
            pipeline(target)(**{"seed": 7, "output_type": "np", **arguments}).images
        )


@pytest.fixture(scope="module")
def paint_shapes(shapes_bundle: Path) -> Iterator[Paint]:
    yield from painter(shapes_bundle)


@pytest.fixture(scope="module")
def paint_tiny(tiny: Path) -> Iterator[Paint]:
    yield from painter(tiny)


def quantized(folder: Path) -> Path:
    """x convolved, activations and weights in int8 behind QuantizeLinear and DequantizeLinear."""
    weights = np.random.default_rng(0).integers(-127, 128, (8, 4, 3, 3)).astype(np.int8)
    constants = {"scale": np.float32(0.05), "zero": np.int8(0), "w_scale": np.float32(0.01), "w": weights}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "zero"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, "h", "w_"])
        for name, channels in (("x", 4), ("y", 8))
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "quantized", tensors[:1], tensors[1:], initializers)
    (folder / "unet").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    save_model(model, str(folder / "unet" / "model.onnx"))
    return folder / "unet" / "model.onnx"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", MINIMUM_PSNR_DB)
def test_pictures_equal_those_of_onnxruntime(paint_shapes: Paint, precision: str, way: str) -> None:
    arguments = {"prompt": PROMPT, "guidance_scale": 2.0, **WAYS[way]}
    expected = paint_shapes("onnxruntime:cpu:fp32", **arguments)
    if precision == "bf16" and not HAS_BF16:
        with pytest.raises(TargetError, match=r"granted for target openvino:cpu:bf16, got 'f32', expected bf16"):
            paint_shapes("openvino:cpu:bf16", **arguments)
        return
    ours = paint_shapes(f"openvino:cpu:{precision}", **arguments)
    assert psnr_db(ours, expected) >= MINIMUM_PSNR_DB[precision]
    if precision == "bf16":
        assert (ours != expected).any()


def test_without_a_precision_the_bundle_s_own_is_kept(paint_tiny: Paint) -> None:
    """Left to itself OpenVINO would compute an fp32 graph in bf16 on processors that can."""
    settings = {"prompt": "red", "num_inference_steps": 2}
    np.testing.assert_array_equal(paint_tiny("openvino:cpu", **settings), paint_tiny("openvino:cpu:fp32", **settings))


def test_a_precision_that_was_not_granted_is_no_silent_fallback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "f16"  # no processor's own up to AVX512-FP16
    if "FP16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        asked = "dynamic"
    monkeypatch.setitem(backend._INFERENCE_PRECISIONS, "bf16", asked)
    with pytest.raises(TargetError, match=rf"unet: precision of the arithmetic .*, expected {asked}\. Ask for"):
        open_session(tiny / "unet" / "model.onnx", Target("openvino", "cpu", "bf16"))


def test_what_a_precision_asks_of_the_bundle() -> None:
    for text in ("openvino:cpu", "openvino:cpu:bf16", "openvino:cpu:int8"):
        parse_target(text).check_precision("unet", "fp32")
    for text in ("openvino:cpu", "openvino:cpu:fp16", "openvino:cpu:bf16", "openvino:cpu:int8"):
        parse_target(text).check_precision("unet", "fp16")
    with pytest.raises(TargetError, match=r"got 'fp16', expected fp32 for target openvino:cpu:fp32\. Ask for"):
        parse_target("openvino:cpu:fp32").check_precision("unet", "fp16")


def test_int8_runs_what_the_graph_quantizes(tmp_path: Path) -> None:
    session = open_session(quantized(tmp_path), Target("openvino", "cpu", "int8"))
    reference = open_session(tmp_path / "unet" / "model.onnx", Target("onnxruntime", "cpu"))
    results = []
    for one in (session, reference):
        binding = one.bind({"x": (1, 4, 8, 8)})
        binding.inputs["x"][...] = np.random.default_rng(1).standard_normal((1, 4, 8, 8))
        binding.run()
        results.append(binding.outputs["y"].copy())
    # What is not quantized is in bf16 where the processor has it.
    np.testing.assert_allclose(results[0], results[1], rtol=2**-7, atol=1e-4)
    assert np.abs(results[1]).max() > 0.1


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(("capabilities", "hint"), [(("FP32", "INT8", "BF16"), "bf16"), (("FP32", "INT8"), "f32")])
def test_eight_bits_compute_the_rest_in_what_is_fastest(
    capabilities: tuple[str, ...], hint: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_cpu_capabilities", lambda: frozenset(capabilities))
    assert backend.precision_hint("cpu", precision) == hint
    assert (backend.precision_hint("cpu", "fp32"), backend.precision_hint("gpu", precision)) == ("f32", "f32")


@pytest.mark.parametrize("backend_of", ["openvino", "onnxruntime"])
def test_int8_wants_a_quantized_bundle(tiny: Path, backend_of: str) -> None:
    with pytest.raises(TargetError, match=r"nothing in it is quantized to int8, .*`tandemrt calibrate quantize "):
        Pipeline.open(tiny, target=f"{backend_of}:cpu:int8")


def test_a_used_up_buffer_is_seen_by_nobody_else(tiny: Path) -> None:
    """Closing while a binding lives on: the binding says so, and a second session is untouched."""
    shapes = {"latent_sample": (1, 4, 2, 2)}
    sessions = [open_session(tiny / "vae_decoder" / "model.onnx", Target("openvino", "cpu")) for _ in range(2)]
    first, second = (session.bind(shapes) for session in sessions)
    sessions[0].close()
    with pytest.raises(ExecutionError, match="vae_decoder: the model is closed"):
        first.run()
    second.run()
    assert np.isfinite(second.outputs["sample"]).all()


@pytest.mark.parametrize("small", [True, False])
def test_a_small_model_has_a_second_batch_to_itself(tiny: Path, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that runs which take turns, as those of adaptive guidance do, need not prepare for other shapes each time."""
    granted, compiled = backend._granted, list[Any]()
    monkeypatch.setattr(backend, "_granted", lambda *given: compiled.append(granted(*given)) or compiled[-1])
    if not small:
        monkeypatch.setattr(backend, "_TWICE_BYTES", 0)
    model = tiny / "vae_decoder" / "model.onnx"
    session, reference = (
        open_session(model, Target("openvino", "cpu")),
        open_session(model, Target("onnxruntime", "cpu")),
    )
    assert len(compiled) == 1
    for shape in ((2, 4, 2, 2), (1, 4, 2, 2), (2, 4, 3, 2), (3, 4, 2, 2)):
        made = []
        for one in (session, reference):
            binding = one.bind({"latent_sample": shape})
            binding.inputs["latent_sample"][...] = np.random.default_rng(1).standard_normal(shape)
            binding.run()
            made.append(binding.outputs["sample"].copy())
        np.testing.assert_allclose(*made, atol=1e-4)
    assert len(compiled) == 1 + small
    session.close()
    with pytest.raises(ExecutionError, match="the model is closed"):
        session.bind({"latent_sample": (1, 4, 2, 2)})


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx_data"])
def test_a_model_that_changed_is_not_read_for_a_second_batch(tmp_path: Path, file: str) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    unet = tmp_path / "bundle" / "unet"
    if file == "model.onnx_data":
        save_model(
            load_model(unet / "model.onnx"),
            str(unet / "model.onnx"),
            save_as_external_data=True,
            location=file,
            size_threshold=0,
        )
        resign(tmp_path / "bundle")
    asked = {"prompt": "red", "num_inference_steps": 2, "seed": 7, "output_type": "np"}
    with Pipeline.open(tmp_path / "bundle", "openvino:cpu") as pipe:
        expected = pipe(**asked)
        with (unet / file).open("r+b") as stream:
            changed = bytes([stream.read(1)[0] ^ 1])
            stream.seek(0)
            stream.write(changed)
        np.testing.assert_array_equal(pipe(**asked).images, expected.images)
        with pytest.raises(BundleError, match=rf"unet/{file}: sha256, got"):
            pipe(**asked, guidance_scale=1.0)
        np.testing.assert_array_equal(pipe(**asked).images, expected.images)


def test_generate_on_openvino(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--prompt", "red", "--num-inference-steps", "2", "--output-dir", str(out)]
    assert main(["generate", str(tiny), *arguments, "--target", "openvino:cpu:fp32"]) == 0
    assert list(out.glob("*.png"))
    capsys.readouterr()


def test_auto_takes_openvino_where_onnxruntime_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_target("auto").backend == "onnxruntime"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    target = parse_target("auto")
    assert (target.backend, target.precision) == ("openvino", None)
    assert "ONNX Runtime is not" in target.reason


def test_doctor_lists_what_the_processor_grants() -> None:
    (status,) = (status for status in probe_backends() if status.backend == "openvino")
    assert status.targets[0] == Target("openvino", "cpu")
    assert (Target("openvino", "cpu", "bf16") in status.targets) == HAS_BF16


def test_without_openvino_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TargetError, match=r'Run `pip install "tandemrt\[openvino\]"`'):
        open_session(tiny / "unet" / "model.onnx", Target("openvino", "cpu"))
    with pytest.raises(TargetError, match="openvino: is not installed"):
        Pipeline.open(tiny, target="openvino:cpu")
