"""Time steps folded into constants and tables change no bit of what a graph computes as it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from tandemrt.engines import fold
from tandemrt.engines.fold import folded
from tandemrt.engines.graph_files import read_graph, weight, write_graph
from tandemrt.engines.step import step_graph
from tandemrt.runtime import manifest_files as manifests
from tandemrt.runtime.backends.base import Session
from tandemrt.runtime.errors import ArgumentError, BundleError, PlanError
from tandemrt.runtime.plan import Schedule, compile_plan
from tandemrt.runtime.step_sampler import StepEngine
from tandemrt.runtime.variant import Variant

from ..runtime.tiny_bundle import denoiser
from ..runtime.tiny_families import write_tiny_sdxl
from .loops import Open, Walk, conditioning, denoisers, latent_shape, on_onnxruntime, on_openvino

ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
NONE = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
STEPS = (981.0, 500.5, 1.0)
# What a bias that takes a constant in beforehand rounds otherwise, relative to the largest value.
ADDED_TO_BIAS = 1e-5
ON_OPENVINO = 1e-4


class Run:
    """A graph on ONNX Runtime, at one level of its optimizations."""

    def __init__(self, path: Path, level: Any = NONE) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Mapping[str, npt.NDArray[Any]], **more: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        (result,) = self._session.run(["out_sample"], {**inputs, **more})
        return result


def given(graph: onnx.GraphProto, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Normal noise for every input but the time step and its place."""
    random, sizes = np.random.default_rng(0), {"batch": batch, "sequence": 6, "height": 8, "width": 16}
    return {
        value.name: random.standard_normal(
            [size.dim_value or sizes[size.dim_param] for size in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in graph.input
        if value.name not in ("timestep", "step_index")
    }


def resnets(model: onnx.ModelProto) -> int:
    return sum("time_emb_proj" in node.name for node in model.graph.node)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_one_step_becomes_constants(shapes_bundle: Path, tmp_path: Path) -> None:
    source = shapes_bundle / "unet_one_step"
    whole = read_graph(source / "model.onnx")
    one = folded(whole, [999.0], source)
    onnx.checker.check_model(one, full_check=True)
    assert "timestep" not in [value.name for value in one.graph.input]
    saved = ops(whole) - ops(one)
    # The embedding's two layers and a projection for every ResNet.
    assert saved["Gemm"] + saved["MatMul"] == resnets(whole) + 2
    assert saved["Sin"] == saved["Cos"] == 1
    assert {node.name for node in one.graph.node} < {node.name for node in whole.graph.node}
    path, inputs = write_graph(one, tmp_path, source), given(one.graph, 2)
    unfolded, got = Run(source / "model.onnx"), Run(path)(inputs)
    for rows in (1, 2):
        np.testing.assert_array_equal(got, unfolded(inputs, timestep=np.full(rows, 999, np.float32)))
    optimized = Run(source / "model.onnx", ALL)(inputs, timestep=np.full(2, 999, np.float32))
    scale = np.abs(optimized).max()
    np.testing.assert_allclose(Run(path, ALL)(inputs), optimized, rtol=0, atol=ADDED_TO_BIAS * scale)


def test_a_schedule_becomes_tables(shapes_bundle: Path, tmp_path: Path) -> None:
    source = shapes_bundle / "unet_small"
    whole = read_graph(source / "model.onnx")
    several = folded(whole, STEPS, source)
    onnx.checker.check_model(several, full_check=True)
    assert ops(several)["Gather"] - ops(whole)["Gather"] == resnets(whole)
    path, inputs = write_graph(several, tmp_path, source), given(several.graph, 2)
    for level in (NONE, ALL):
        unfolded, run = Run(source / "model.onnx", level), Run(path, level)
        for index, timestep in enumerate(STEPS):
            expected = unfolded(inputs, timestep=np.full(2, timestep, np.float32))
            np.testing.assert_array_equal(run(inputs, step_index=np.array(index)), expected)
    with pytest.raises(Exception, match="out of data bounds"):
        run(inputs, step_index=np.array(len(STEPS)))


@pytest.mark.parametrize("opened", [on_onnxruntime, on_openvino])
def test_folded_step_engines_walk_their_schedule(shapes_bundle: Path, tmp_path: Path, opened: Open) -> None:
    manifest = manifests.decode((shapes_bundle / "tandem.json").read_bytes(), "shapes")
    steps, source = {"unet_small": 4}, shapes_bundle / "unet_small"
    # A solver with rows of the same time step, and more rows than steps.
    plan = compile_plan(manifest, Schedule(steps=steps, solver="pndm", guidance_scale=2.0))
    timesteps = tuple(dict.fromkeys(plan.table.timesteps.tolist()))
    assert len(timesteps) < plan.table.rows
    tables = folded(read_graph(source / "model.onnx"), timesteps, source)
    engine = opened(write_graph(step_graph(tables, guided=True), tmp_path, source))
    walk = Walk(plan, conditioning(manifest, plan), latent_shape(manifest, plan))
    expected, _ = walk.end(walk.unfused(denoisers(shapes_bundle, plan)))
    got, _ = walk.end(
        walk.fused({("unet_small", True): StepEngine(engine, Variant(step="guided", timesteps=timesteps))})
    )
    if opened is on_openvino:
        scale = np.abs(expected.latents).max()
        np.testing.assert_allclose(got.latents, expected.latents, rtol=0, atol=ON_OPENVINO * scale)
    else:
        np.testing.assert_array_equal(got.arrays, expected.arrays)
    with pytest.raises(PlanError, match="unet_small: row 0: a time step that the engine was not built for, got"):
        walk.fused(built_with(engine, (1.0,)))


def built_with(engine: Session, timesteps: tuple[float, ...]) -> dict[tuple[str, bool], StepEngine]:
    return {("unet_small", True): StepEngine(engine, Variant(step="guided", timesteps=timesteps))}


def test_where_the_text_joins_only_what_comes_before_is_folded(tmp_path: Path) -> None:
    write_tiny_sdxl(tmp_path / "bundle")
    source = tmp_path / "bundle" / "unet"
    whole = read_graph(source / "model.onnx")
    several = folded(whole, STEPS, source)
    assert ops(whole) - ops(several) == Counter({"Unsqueeze": 1, "Mul": 1, "Sin": 1})
    path, inputs = write_graph(several, tmp_path / "folded", source), given(several.graph, 3)
    unfolded, run = Run(source / "model.onnx"), Run(path)
    for index, timestep in enumerate(STEPS):
        expected = unfolded(inputs, timestep=np.full(3, timestep, np.float32))
        np.testing.assert_array_equal(run(inputs, step_index=np.array(index)), expected)


def test_only_the_weights_of_the_time_embedding_are_read(
    shapes_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shapes_bundle / "unet_small"
    outside = tmp_path / "outside"
    outside.mkdir()
    whole = onnx.load_model(source / "model.onnx")
    onnx.save_model(whole, str(outside / "model.onnx"), save_as_external_data=True, location="data", size_threshold=0)
    read: dict[str, TensorProto] = {}

    def reading(tensor: TensorProto, folder: Path) -> npt.NDArray[np.generic]:
        read[tensor.name] = tensor
        return weight(tensor, folder)

    monkeypatch.setattr(fold, "weight", reading)
    one = fold.folded(read_graph(outside / "model.onnx"), [10.0], outside)
    large = [name for name, tensor in read.items() if np.prod(tensor.dims) > 64]
    assert large
    assert all("time_emb" in name for name in large)
    kept = {tensor.name: tensor for tensor in one.graph.initializer}
    assert sum(tensor.data_location == TensorProto.EXTERNAL for tensor in kept.values()) > 50
    whole = onnx.load_model(source / "model.onnx")  # saved, it referred to the file outside
    inside = {tensor.name: tensor for tensor in fold.folded(whole, [10.0], source).graph.initializer}
    made = [name for name, tensor in kept.items() if tensor.data_location != TensorProto.EXTERNAL]
    assert made
    assert all(kept[name].raw_data == inside[name].raw_data for name in made)


HALF = """
<ir_version: 10, opset_import: ["": 20]>
denoiser (float[batch, 4, height, width] sample, float[steps] timestep, float[batch, sequence, 6] encoder_hidden_states)
  => (float[batch, 4, height, width] out_sample)
{
  wide = Sin(timestep)
  narrow = Cast<to: int = 10>(wide)
  half = Cast<to: int = 10>(sample)
  sum = Add(half, narrow)
  out_sample = Cast<to: int = 1>(sum)
}
"""


@pytest.mark.parametrize("steps", [STEPS[:1], STEPS])
def test_half_precision_graphs_fold_in_their_precision(tmp_path: Path, steps: tuple[float, ...]) -> None:
    model = onnx.parser.parse_model(HALF)
    few = folded(model, steps, tmp_path)
    assert [tensor.data_type for tensor in few.graph.initializer] == [TensorProto.FLOAT16]
    inputs = given(few.graph, 1)
    onnx.save(model, tmp_path / "whole.onnx")
    expected = Run(tmp_path / "whole.onnx")(inputs, timestep=np.array(steps[:1], np.float32))
    index = {"step_index": np.array(0)} if len(steps) > 1 else {}
    got = Run(write_graph(few, tmp_path, tmp_path))(inputs, **index)
    # Without half-precision kernels ONNX Runtime leaves out the rounding of a value that it casts back at once.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2**-11 * 2)


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    model, _ = denoiser("unet", seed=1, hidden=4)
    for steps, got in (([], r"\[\]"), ([float("nan")], r"\[nan\]")):
        with pytest.raises(ArgumentError, match=f"time steps to fold, got {got}, expected one finite number or more"):
            folded(model, steps, tmp_path)
    with pytest.raises(ArgumentError, match="no time step to fold, got 'sample, encoder_hidden_states'"):
        folded(folded(model, [1.0], tmp_path), [1.0], tmp_path)
    (sine,) = [node for node in model.graph.node if node.op_type == "Sin"]
    reader = next(node for node in model.graph.node if sine.output[0] in node.input)
    reader.op_type = "MatMul"
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(BundleError, match=r"MatMul '.*' reads the time step, which cannot be folded there"):
        folded(model, [1.0], tmp_path)
