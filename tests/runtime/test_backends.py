"""Targets, and the backend interface that ONNX Runtime and OpenVINO stand behind alike."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, save_model

from tandemrt.runtime.backends import open_session
from tandemrt.runtime.backends.base import Array, Binding, Session
from tandemrt.runtime.errors import ArgumentError, ExecutionError, TargetError
from tandemrt.runtime.targets import Target

from .tiny_bundle import TEXT_WIDTH, write_tiny_bundle

CPU = Target("onnxruntime", "cpu")
OPENVINO = Target("openvino", "cpu", "fp32")
UNET_SHAPES = {"sample": (2, 4, 8, 10), "timestep": (1,), "encoder_hidden_states": (2, 5, TEXT_WIDTH)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backends") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(params=[CPU, OPENVINO], ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    given: Target = request.param
    return given


@pytest.fixture
def unet(tiny: Path, target: Target) -> Session:
    return open_session(tiny / "unet" / "model.onnx", target)


def random_inputs(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in UNET_SHAPES.items()}


def fill(binding: Binding, values: dict[str, Array]) -> None:
    for name, value in values.items():
        binding.inputs[name][...] = value


def saved(
    folder: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
) -> Path:
    """A model of `nodes` saved as folder/odd/model.onnx; tensors are given as name: (type, shape)."""
    infos = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in tensors.items()]
        for tensors in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "odd", infos[0], infos[1])
    (folder / "odd").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    save_model(model, str(folder / "odd" / "model.onnx"))
    return folder / "odd" / "model.onnx"


def test_specs_are_the_graph_s(unet: Session) -> None:
    assert [(spec.name, spec.dtype, spec.shape) for spec in unet.inputs] == [
        ("sample", "float32", ("batch", 4, "height", "width")),
        ("timestep", "float32", (1,)),
        ("encoder_hidden_states", "float32", ("batch", "sequence", TEXT_WIDTH)),
    ]
    assert [spec.name for spec in unet.outputs] == ["out_sample"]


def test_a_run_equals_onnxruntime_called_plainly(unet: Session, tiny: Path, target: Target) -> None:
    plain = onnxruntime.InferenceSession(str(tiny / "unet" / "model.onnx"), providers=["CPUExecutionProvider"])
    binding = unet.bind(UNET_SHAPES)
    for seed in range(3):
        values = random_inputs(seed)
        fill(binding, values)
        binding.run()
        (expected,) = plain.run(None, values)
        tolerance = 0.0 if target == CPU else 1e-5
        np.testing.assert_allclose(binding.outputs["out_sample"], expected, rtol=tolerance, atol=tolerance)
        assert np.abs(expected).max() > 0.1


def test_runs_use_the_same_arrays(unet: Session) -> None:
    """Inputs are written in place, outputs appear in the arrays handed out when binding."""
    binding = unet.bind(UNET_SHAPES)
    output = binding.outputs["out_sample"]
    address = output.ctypes.data
    seen = []
    for seed in (0, 1, 0):
        fill(binding, random_inputs(seed))
        output.fill(np.nan)
        binding.run()
        assert binding.outputs["out_sample"] is output
        assert output.ctypes.data == address
        assert np.isfinite(output).all()
        seen.append(output.copy())
    np.testing.assert_array_equal(seen[0], seen[2])
    assert (seen[0] != seen[1]).any()
    with pytest.raises(TypeError):
        binding.outputs["out_sample"] = output.copy()  # type: ignore[index]


def test_bindings_of_other_shapes_live_side_by_side(unet: Session) -> None:
    small = unet.bind({"sample": (1, 4, 2, 2), "timestep": (1,), "encoder_hidden_states": (1, 1, TEXT_WIDTH)})
    large = unet.bind(UNET_SHAPES)
    fill(large, random_inputs(0))
    large.run()
    before = large.outputs["out_sample"].copy()
    small.inputs["sample"].fill(1)
    small.run()
    assert small.outputs["out_sample"].shape == (1, 4, 2, 2)
    np.testing.assert_array_equal(large.outputs["out_sample"], before)


def test_eight_threads_on_one_session_equal_serial_runs(unet: Session) -> None:
    def outputs(seeds: list[int]) -> list[Array]:
        binding = unet.bind(UNET_SHAPES)
        results = []
        for seed in seeds:
            fill(binding, random_inputs(seed))
            binding.run()
            results.append(binding.outputs["out_sample"].copy())
        return results

    serial = outputs(list(range(160)))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(outputs, [list(range(start, 160, 8)) for start in range(8)]))
    for start, part in enumerate(parts):
        for expected, result in zip(serial[start::8], part, strict=True):
            np.testing.assert_array_equal(result, expected)


def test_output_shapes_follow_symbols_and_products(tiny: Path, target: Target) -> None:
    decoder = open_session(tiny / "vae_decoder" / "model.onnx", target)
    assert decoder.outputs[0].shape == ("batch", 3, "8*height", "8*width")
    binding = decoder.bind({"latent_sample": (2, 4, 3, 5)})
    binding.run()
    assert binding.outputs["sample"].shape == (2, 3, 24, 40)


@pytest.mark.parametrize("stated", ["2*n", "2 * n", "n * 2", "n*m"])
def test_products_need_no_run_at_binding(
    stated: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    inputs = {"x": (TensorProto.FLOAT, ["n"]), "z": (TensorProto.FLOAT, ["m"])}
    session = open_session(saved(tmp_path, [node], inputs, {"y": (TensorProto.FLOAT, [stated])}), target)
    monkeypatch.setattr(session, "run", None)
    assert session.bind({"x": (3,), "z": (2,)}).outputs["y"].shape == (6,)


@pytest.mark.parametrize("stated", [[None, None], ["rows", "columns"], ["n//1 + n", "(m - 1) + 1"]])
def test_output_shapes_that_no_symbol_explains_are_measured(stated: list[Any], target: Target, tmp_path: Path) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    model = saved(tmp_path, [node], {"x": (TensorProto.FLOAT, ["n", "m"])}, {"y": (TensorProto.FLOAT, stated)})
    binding = open_session(model, target).bind({"x": (2, 3)})
    binding.inputs["x"][...] = np.arange(6).reshape(2, 3)
    binding.run()
    np.testing.assert_array_equal(binding.outputs["y"], [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]])


def test_an_output_shape_the_model_lies_about_is_an_error(target: Target, tmp_path: Path) -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["y"])]
    model = saved(tmp_path, nodes, {"x": (TensorProto.FLOAT, ["n"])}, {"y": (TensorProto.INT64, [1, "n"])})
    with pytest.raises(ExecutionError, match=r"odd: (ONNX Runtime|OpenVINO) failed"):
        binding = open_session(model, target).bind({"x": (4,)})
        binding.run()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TensorProto.FLOAT16, np.float16), (TensorProto.INT32, np.int32), (TensorProto.INT64, np.int64)],
)
def test_buffers_have_the_graph_s_type(kind: int, dtype: type, target: Target, tmp_path: Path) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    model = saved(tmp_path, [node], {"x": (kind, ["n"])}, {"y": (kind, ["2*n"])})
    binding = open_session(model, target).bind({"x": (3,)})
    binding.inputs["x"][...] = [1, 2, 3]
    binding.run()
    assert binding.inputs["x"].dtype == binding.outputs["y"].dtype == dtype
    assert binding.outputs["y"].tolist() == [1, 2, 3, 1, 2, 3]


def test_a_type_numpy_has_not_is_refused(target: Target, tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    tensors = (TensorProto.BFLOAT16, ["n"])
    model = saved(tmp_path, [node], {"x": tensors}, {"y": tensors})
    with pytest.raises(TargetError, match=r"odd: type of 'x', got '(tensor\()?bfloat16"):
        open_session(model, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, r"unet: inputs, got \['encoder_hidden_states', 'sample'\], expected sample, timestep"),
        ({"extra": (1,)}, "unet: inputs, got"),
        ({"sample": (2, 3, 8, 8)}, r"unet: shape of input 'sample', got \(2, 3, 8, 8\), expected \(batch, 4, height"),
        ({"sample": (2, 4, 8)}, "shape of input 'sample'"),
        ({"sample": (0, 4, 8, 8)}, "shape of input 'sample'"),
        ({"sample": (2, 4, -8, 8)}, "shape of input 'sample'"),
        ({"timestep": (2,)}, r"shape of input 'timestep', got \(2,\), expected \(1\)"),
        ({"encoder_hidden_states": (3, 5, TEXT_WIDTH)}, "shape of input 'encoder_hidden_states'"),
        ({"sample": (2, 4, 1 << 40, 1 << 40)}, "buffers cannot be allocated"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str, unet: Session) -> None:
    shapes = {name: shape for name, shape in {**UNET_SHAPES, **change}.items() if shape is not None}
    with pytest.raises(ExecutionError, match=message):
        unet.bind(shapes)


def test_a_failing_run_is_an_execution_error_and_silent(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = open_session(tiny / "text_encoder" / "model.onnx", CPU)
    binding = encoder.bind({"input_ids": (1, 3)})
    binding.inputs["input_ids"].fill(1 << 40)
    with pytest.raises(ExecutionError, match="text_encoder: ONNX Runtime failed"):
        binding.run()
    binding.inputs["input_ids"].fill(0)
    binding.run()
    assert capfd.readouterr() == ("", "")


def test_warnings_stay_off_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A graph whose output contradicts its declared shape makes ONNX Runtime warn when left to itself."""
    node = helper.make_node("Concat", ["x", "x"], ["y"], axis=0)
    model = saved(tmp_path, [node], {"x": (TensorProto.FLOAT, [2])}, {"y": (TensorProto.FLOAT, [3])})
    open_session(model, CPU)
    assert capfd.readouterr().err == ""
    onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    assert "onnxruntime" in capfd.readouterr().err


def test_use_after_close_is_an_error(unet: Session) -> None:
    binding = unet.bind(UNET_SHAPES)
    unet.close()
    unet.close()
    with pytest.raises(ExecutionError, match="unet: the model is closed"):
        binding.run()
    with pytest.raises(ExecutionError, match="unet: the model is closed"):
        unet.bind(UNET_SHAPES)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"])
def test_what_cannot_be_loaded_is_an_error(content: bytes, target: Target, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExecutionError, match=r"(ONNX Runtime|OpenVINO) cannot load the model"):
        open_session(path, target)
    with pytest.raises(ExecutionError, match=r"(ONNX Runtime|OpenVINO) cannot load the model"):
        open_session(tmp_path / "missing.onnx", target)


def test_the_other_format_of_onnxruntime_is_not_read(tiny: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    source = str(tiny / "vae_decoder_tiny" / "model.onnx")
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    onnxruntime.InferenceSession(str(tmp_path / "model.ort"), providers=["CPUExecutionProvider"])
    with pytest.raises(ExecutionError, match="cannot load the model"):
        open_session(tmp_path / "model.ort", CPU)


def test_threads_are_counted(tiny: Path, target: Target) -> None:
    model = tiny / "unet" / "model.onnx"
    for threads in (0, 2**31):
        with pytest.raises(ArgumentError, match=rf"number of threads, got {threads}, expected a whole number in 1\.\."):
            open_session(model, target, threads=threads)
    results = []
    for threads in (1, 2):
        binding = open_session(model, target, threads=threads).bind(UNET_SHAPES)
        fill(binding, random_inputs(0))
        binding.run()
        results.append(binding.outputs["out_sample"].copy())
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_without_onnxruntime_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TargetError, match=r'Run `pip install "tandemrt\[cpu\]"`'):
        open_session(tiny / "unet" / "model.onnx", CPU)


def test_a_provider_that_was_not_granted_is_no_silent_fallback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted = SimpleNamespace(get_providers=lambda: ["OtherProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: granted)
    with pytest.raises(TargetError, match=r"granted, got \['OtherProvider'\], expected CPUExecutionProvider alone"):
        open_session(tiny / "unet" / "model.onnx", CPU)
