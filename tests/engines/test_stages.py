"""Stages of a cut denoiser, fed each other's results, compute what the whole one does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tandemrt.engines.graph_files import read_graph, write_graph
from tandemrt.engines.slots import lora_slots
from tandemrt.engines.stages import StageGraph, stage_graphs
from tandemrt.runtime.errors import ArgumentError, BundleError
from tandemrt.runtime.shapes import evaluated

from .small_denoisers import FAMILIES

SIZES = {"batch": 2, "height": 8, "width": 16, "sequence": 5, "steps": 2}
DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
PLAIN = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
OPTIMIZED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
Arrays = dict[str, npt.NDArray[Any]]


def inputs_of(model: onnx.ModelProto) -> Arrays:
    random = np.random.default_rng(5)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = evaluated([size.dim_param or size.dim_value for size in tensor.shape.dim], SIZES)
        assert shape is not None
        feeds[value.name] = random.standard_normal(shape).astype(DTYPES[tensor.elem_type])
    return feeds


def ran(model: onnx.ModelProto, feeds: Arrays, weights: Path, folder: Path, level: Any) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(write_graph(model, folder, weights), options)
    names = [value.name for value in model.graph.output]
    given = {value.name: feeds[value.name] for value in model.graph.input}
    return dict(zip(names, session.run(names, given), strict=True))


def composed(stages: Sequence[StageGraph], feeds: Arrays, weights: Path, folder: Path, level: Any = PLAIN) -> Arrays:
    """Everything that the stages make, one after another; what they hand on has the shapes they state."""
    values = dict(feeds)
    for one in stages:
        made = ran(one.model, values, weights, folder, level)
        stated = [(spec.shape, values[spec.name].shape) for spec in one.stage.inputs]
        sizes = {name: size for shape, found in stated for name, size in zip(shape, found, strict=True)
                 if isinstance(name, str)}  # fmt: skip
        for spec in one.stage.outputs:
            assert made[spec.name].shape == evaluated(spec.shape, sizes)
            assert made[spec.name].dtype == spec.dtype
        values |= made
    return values


def require_equal(
    model: onnx.ModelProto, stages: Sequence[StageGraph], weights: Path, folder: Path, levels: Sequence[Any] = (PLAIN,)
) -> None:
    feeds = inputs_of(model)
    for level in levels:
        whole = ran(model, feeds, weights, folder, level)
        made = composed(stages, feeds, weights, folder, level)
        for name, expected in whole.items():
            np.testing.assert_array_equal(made[name], expected)
            assert expected.std() > 1e-2


@pytest.fixture
def shapes_unet(shapes_bundle: Path) -> Path:
    return shapes_bundle / "unet" / "model.onnx"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_stages_of_the_trained_unet_compute_what_it_does(shapes_unet: Path, tmp_path: Path, count: int) -> None:
    model = read_graph(shapes_unet)
    stages = stage_graphs(model, count, where="unet")
    require_equal(model, stages, shapes_unet.parent, tmp_path, (PLAIN, OPTIMIZED))
    weights = [{tensor.name for tensor in one.model.graph.initializer} for one in stages]
    large = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert sum(len(own & large) for own in weights) == len(large)
    assert [one.stage.index for one in stages] == list(range(count))
    assert sum(one.stage.share for one in stages) == pytest.approx(1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_every_family_compute_what_the_whole_does(
    exported: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    path = exported(family)
    model = read_graph(path)
    for count in (2, 3, 4):
        require_equal(model, stage_graphs(model, count), path.parent, tmp_path, (PLAIN, OPTIMIZED))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "block"),
    [("sd15", "up_blocks.1.attentions.1"), ("bk-sdm", "up_blocks.0.resnets.0"),
     ("sdxl", "mid_block.attentions.0.transformer_blocks.2"), ("sd3", "transformer_blocks.3")],
)  # fmt: skip
def test_stages_are_cut_where_they_are_asked_to_be(
    exported: Callable[[str], Path], tmp_path: Path, family: str, block: str
) -> None:
    path = exported(family)
    model = read_graph(path)
    stages = stage_graphs(model, at=(block,))
    assert stages[1].stage.begins == block
    require_equal(model, stages, path.parent, tmp_path)


@pytest.mark.slow
def test_stages_keep_the_lora_slots_of_their_own_projections(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = exported("sd15")
    model = lora_slots(read_graph(path), slots=1, rank=2)
    stages = stage_graphs(model, 2)
    require_equal(model, stages, path.parent, tmp_path)
    own = [{spec.name for spec in one.stage.inputs if spec.name.startswith("lora/down")} for one in stages]
    whole = {value.name for value in model.graph.input if value.name.startswith("lora/down")}
    assert own[0] | own[1] == whole
    assert not any("attn" in name for name in own[0] & own[1])


def test_later_stages_are_conditioned_anew(shapes_unet: Path, tmp_path: Path) -> None:
    """Another text and time step in the second stage change its prediction, as if its blocks alone saw them."""
    stages = stage_graphs(read_graph(shapes_unet), 2)
    feeds = inputs_of(read_graph(shapes_unet))
    values = composed(stages, feeds, shapes_unet.parent, tmp_path)
    names = {spec.name for spec in stages[1].stage.inputs}
    assert {"timestep", "encoder_hidden_states"} <= names
    assert "sample" not in names
    for name in ("timestep", "encoder_hidden_states"):
        other = ran(stages[1].model, {**values, name: feeds[name] + 1}, shapes_unet.parent, tmp_path, PLAIN)
        assert np.abs(other["out_sample"] - values["out_sample"]).max() > 1e-3


def test_what_cannot_be_cut_is_refused(shapes_unet: Path, tiny_path: Path) -> None:
    model = read_graph(shapes_unet)
    with pytest.raises(ArgumentError, match=r"unet: stages to cut a denoiser into, got 5, expected 2\.\.4"):
        stage_graphs(model, 5, where="unet")
    with pytest.raises(ArgumentError, match=r"stages to cut a denoiser into, got 1, expected 2\.\.4"):
        stage_graphs(model, 1)
    with pytest.raises(ArgumentError, match=r"a block that the graph does not have.*got 'up_blocks.9.resnets.0'.*one"):
        stage_graphs(model, at=("up_blocks.9.resnets.0",))
    blocks = [one.stage.begins for one in stage_graphs(model, 3)]
    with pytest.raises(ArgumentError, match="order of the cuts"):
        stage_graphs(model, at=(blocks[2], blocks[1]))
    with pytest.raises(ArgumentError, match="a block that the graph does not have, or begins with"):
        stage_graphs(model, at=(blocks[0],))
    with pytest.raises(ArgumentError, match="text_encoder: no denoiser, and nothing else is cut into stages"):
        stage_graphs(read_graph(tiny_path / "text_encoder" / "model.onnx"), 2, where="text_encoder")
    with pytest.raises(ArgumentError, match="no denoiser whose blocks are told by its nodes' names"):
        stage_graphs(read_graph(tiny_path / "unet" / "model.onnx"), 2)


def blocks(*named: tuple[str, str], before: Sequence[Any] = (), behind: Sequence[Any] = ()) -> onnx.ModelProto:
    """A denoiser of one node a block: names and operators. Further nodes stand before the blocks and behind them."""
    names = [name for name, _ in named]
    nodes = [
        helper.make_node(op, [read, *(["text"] if op == "Add" else [])], [name], name=f"{name}/{op}")
        for read, (name, op) in zip(["sample", *names], named, strict=False)
    ]
    text = helper.make_node("ReduceMean", ["encoder_hidden_states"], ["text"], name="text/ReduceMean", keepdims=1)
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ("batch", 4, "height", "width")),
        helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, ("batch", "sequence", 6)),
    ]
    made = [text, *before, *nodes, *behind]
    output = helper.make_tensor_value_info(made[-1].output[0], TensorProto.FLOAT, ("batch", 4, "height", "width"))
    one = numpy_helper.from_array(np.ones((), np.float32), "one")
    graph = helper.make_graph(made, "denoiser", inputs, [output], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_stages_are_no_more_than_blocks() -> None:
    model = blocks(("transformer_blocks.0", "Add"), ("transformer_blocks.1", "Add"))
    assert len(stage_graphs(model, 2)) == 2
    with pytest.raises(ArgumentError, match="got 3, expected at most 2, as many as it has blocks"):
        stage_graphs(model, 3)


def test_a_shape_that_follows_from_no_size_does_not_cross() -> None:
    model = blocks(("transformer_blocks.0", "NonZero"), ("transformer_blocks.1", "Neg"))
    with pytest.raises(BundleError, match=r"unet: shape of 'transformer_blocks.0', which crosses a cut"):
        stage_graphs(model, 2, where="unet")


def test_sizes_are_asked_of_what_a_stage_has(tmp_path: Path) -> None:
    """The whole graph asks the latent and a first block's result for sizes; the stage asks what it is given anyway."""
    before = [
        helper.make_node("Cast", ["sample"], ["cast"], name="Cast", to=TensorProto.FLOAT16),
        helper.make_node("Shape", ["cast"], ["sides"], name="Shape", start=2, end=4),
        helper.make_node("Shape", ["sample"], ["sizes"], name="Shape_1"),
    ]
    behind = [
        helper.make_node("Expand", ["one", "sides"], ["mask"], name="Expand"),
        helper.make_node("Reshape", ["transformer_blocks.2", "sizes"], ["shaped"], name="Reshape"),
        helper.make_node("Add", ["shaped", "mask"], ["out_sample"], name="Add"),
    ]
    named = (("transformer_blocks.0", "Add"), ("transformer_blocks.1", "Add"), ("transformer_blocks.2", "Neg"))
    model = blocks(*named, before=before, behind=behind)
    stages = stage_graphs(model, at=("transformer_blocks.2",))
    assert [spec.name for spec in stages[1].stage.inputs] == ["stage/transformer_blocks.1"]
    require_equal(model, stages, tmp_path, tmp_path / "graph")


def test_the_latent_is_given_where_nothing_else_has_its_sizes(tmp_path: Path) -> None:
    before = [
        helper.make_node("Cast", ["sample"], ["cast"], name="Cast", to=TensorProto.FLOAT16),
        helper.make_node("Shape", ["cast"], ["sizes"], name="Shape"),
    ]
    behind = [helper.make_node("Reshape", ["transformer_blocks.1", "sizes"], ["out_sample"], name="Reshape")]
    named = (("transformer_blocks.0", "Flatten"), ("transformer_blocks.1", "Neg"))
    model = blocks(*named, before=before, behind=behind)
    stages = stage_graphs(model, 2)
    assert [spec.name for spec in stages[1].stage.inputs] == ["stage/transformer_blocks.0", "sample"]
    assert "Cast" not in {node.op_type for node in stages[1].model.graph.node}
    require_equal(model, stages, tmp_path, tmp_path / "graph")
