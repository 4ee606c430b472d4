"""Float16 graphs in other types: the numbers stay what they were, the inputs and outputs keep their types."""

from __future__ import annotations

import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from tandemrt.engines import retyped as module
from tandemrt.engines.blocks import work_by_block
from tandemrt.engines.build import ensure_engine
from tandemrt.engines.graph_files import read_graph, weight
from tandemrt.engines.retyped import WEIGHTS_NAME, retyped, write_retyped
from tandemrt.runtime.engine_files import read_layers
from tandemrt.runtime.errors import BundleError

from .conftest import Requests
from .test_build import VERSIONS, left_in, silent
from .test_layers import edited

WIDTH = 64


def half_graph(folder: Path, width: int = WIDTH, *, beside: bool = True) -> Path:
    """x · W in float16 plus constants, then an island: Softmax in float32. Input and output are float16."""
    weights = np.random.default_rng(0).standard_normal((width, width)).astype(np.float16)
    island = np.linspace(0, 1, width).astype(np.float32)
    shift = numpy_helper.from_array(np.array(0.5, np.float16))
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["product"]),
        helper.make_node("Constant", [], ["shift"], value=shift),
        helper.make_node("Add", ["product", "shift"], ["sum"]),
        helper.make_node(
            "ConstantOfShape", ["size"], ["filled"], value=helper.make_tensor("", TensorProto.FLOAT16, [1], [0.25])
        ),
        helper.make_node("Add", ["sum", "filled"], ["more"]),
        helper.make_node("Cast", ["more"], ["more_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["more_float", "island"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["soft"]),
        helper.make_node("Cast", ["soft"], ["y"], to=TensorProto.FLOAT16),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", width]) for name in "xy"]
    tensors = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(island, "island")]
    tensors.append(numpy_helper.from_array(np.array([width], np.int64), "size"))
    graph = helper.make_graph(nodes, "halves", ends[:1], ends[1:], tensors)
    graph.value_info.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT16, ["rows", width]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx", save_as_external_data=beside, location="weights.bin", size_threshold=128)
    return folder / "model.onnx"


def ran(model: Path) -> np.ndarray:
    import onnxruntime  # noqa: PLC0415

    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float16)
    return onnxruntime.InferenceSession(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("beside", [True, False])
def test_in_float32_the_numbers_stay(beside: bool, tmp_path: Path) -> None:
    source = half_graph(tmp_path / "half", beside=beside)
    made = write_retyped(read_graph(source), TensorProto.FLOAT, tmp_path / "whole", source.parent)
    onnx.checker.check_model(made, full_check=True)
    graph = onnx.load(made, load_external_data=False).graph
    assert {tensor.data_type for tensor in graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}
    assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == [TensorProto.FLOAT16] * 2
    assert Counter(node.op_type for node in graph.node)["Cast"] == 4
    found = ran(made)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, ran(source), rtol=1e-2)


def test_in_bfloat16_nothing_is_float16_but_the_ends(tmp_path: Path) -> None:
    source = half_graph(tmp_path / "half")
    made = write_retyped(read_graph(source), TensorProto.BFLOAT16, tmp_path / "brain", source.parent)
    typed = onnx.shape_inference.infer_shapes(onnx.load(made, load_external_data=False), strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in typed.value_info}
    brain, whole = TensorProto.BFLOAT16, TensorProto.FLOAT
    assert types == {
        "x_inside": brain, "product": brain, "shift": brain, "sum": brain, "filled": brain, "more": brain,
        "more_float": whole, "scaled": whole, "soft": whole, "y_inside": brain,
    }  # fmt: skip
    before, after = (
        {tensor.name: weight(tensor, path.parent) for tensor in read_graph(path).graph.initializer}
        for path in (source, made)
    )
    assert after["weights"].dtype.name == "bfloat16"
    np.testing.assert_allclose(after["weights"].astype(np.float32), before["weights"].astype(np.float32), rtol=2**-8)
    np.testing.assert_array_equal(after["island"], before["island"])


@pytest.mark.parametrize("beside", [True, False])
def test_weights_may_move_and_nothing_else_change(beside: bool, tmp_path: Path) -> None:
    source = half_graph(tmp_path / "half", beside=beside)
    made = write_retyped(read_graph(source), None, tmp_path / "moved", source.parent)
    loaded = [onnx.load(path) for path in (made, source)]
    for model in loaded:
        for tensor in model.graph.initializer:
            tensor.ClearField("data_location")  # which stays as a trace of the file
    assert loaded[0] == loaded[1]
    assert made.stat().st_size < 3000 < WIDTH**2 * 2 <= (tmp_path / "moved" / WEIGHTS_NAME).stat().st_size


def test_the_graph_given_stays_as_it_is(tmp_path: Path) -> None:
    graph = read_graph(half_graph(tmp_path / "half"))
    before = graph.SerializeToString()
    assert retyped(graph, TensorProto.BFLOAT16).SerializeToString() != before
    assert graph.SerializeToString() == before


def test_weights_are_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 16)
    source = half_graph(tmp_path / "half", width=2048)
    graph = read_graph(source)
    tracemalloc.start()
    write_retyped(graph, TensorProto.FLOAT, tmp_path / "whole", source.parent)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "whole" / WEIGHTS_NAME).stat().st_size >= 4 * 2048**2
    assert peak < 1 << 20


def test_weights_that_are_cut_off_are_refused(tmp_path: Path) -> None:
    source = half_graph(tmp_path / "half")
    (source.parent / "weights.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"weight 'weights', got '5 bytes', expected '?8192 bytes"):
        write_retyped(read_graph(source), TensorProto.FLOAT, tmp_path / "whole", source.parent)


def halved(model: onnx.ModelProto) -> None:
    """Let a float32 graph compute in float16 but for its sines, its inputs and outputs as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are small
        half = convert_float_to_float16(model, keep_io_types=True, op_block_list=["Sin"])
    model.CopyFrom(half)


def test_work_in_bfloat16_is_that_in_float16(tmp_path: Path) -> None:
    kernel = numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float16), "kernel")
    nodes = [
        helper.make_node("Cast", ["sample"], ["half"], name="cast_0/Cast", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "kernel"], ["convolved"], name="conv_1/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["convolved", "again"], ["twice"], name="conv_2/Conv"),
        helper.make_node("Cast", ["twice"], ["prediction"], name="cast_3/Cast", to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width, "h", "w"])
            for name, width in (("sample", 4), ("prediction", 2))]  # fmt: skip
    again = numpy_helper.from_array(np.ones((2, 8, 1, 1), np.float16), "again")
    graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], [kernel, again])
    opsets = [helper.make_opsetid("", 20)]  # as exports have it: no convolution of it takes bfloat16
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    brain = write_retyped(model, TensorProto.BFLOAT16, tmp_path / "brain", tmp_path)
    assert work_by_block(brain, {"sample": (2, 4, 8, 8)}, "unet") == {
        "conv_1": 2 * 64 * 8 * 4 * 9,
        "conv_2": 2 * 64 * 2 * 8,
    }


def test_tensorrt_rtx_builds_a_float16_bundle_in_bfloat16(tiny_path: Path, requests: Requests, tmp_path: Path) -> None:
    bundle = edited(tiny_path, tmp_path / "bundle", halved, "fp16")
    half, brain = (
        requests(f"tensorrt-rtx:sm89:{precision}", components=("unet",), bundle=bundle)[0]
        for precision in ("fp16", "bf16")
    )
    assert half.key != brain.key
    outcome = ensure_engine(brain, tmp_path / "cache", silent, VERSIONS)
    engine = outcome.engine
    assert engine.ingredients.precision == "bf16"
    assert {spec.dtype for spec in (*engine.inputs, *engine.outputs)} == {"float32"}
    assert left_in(tmp_path / "cache") == [brain.key]
    precisions = {layer.precision for layer in read_layers(outcome.folder)}
    assert "bfloat16" in precisions or "bf16" in precisions, precisions
    assert "half" not in precisions
