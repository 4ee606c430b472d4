"""ONNX graphs in the place of weights, as optimum leaves them: what becomes of them, and which are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from onnx import TensorProto, helper, numpy_helper

from tandemrt.export import adopt, graph
from tandemrt.export.bundle import export_bundle
from tandemrt.export.checkpoint import read_controlnet
from tandemrt.export.graph import onnx_from_module, save
from tandemrt.export.jobs import jobs
from tandemrt.export.plan import Added, ExportPlan, LoraSource
from tandemrt.export.sources import read_sources
from tandemrt.export.verify import verify_bundle
from tandemrt.runtime import Pipeline
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.cli import main
from tandemrt.runtime.errors import ArgumentError, CheckpointError, ExportError

from .mini import UNET_FILE, edit_json, edit_tensors

Change = Callable[[onnx.ModelProto], None]

pytestmark = pytest.mark.slow

GRAPHS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
SYMBOLS = {"batch": "batch_size", "sequence": "sequence_length", "height": "latent_height", "width": "latent_width"}


@pytest.fixture(scope="module")
def found(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint as optimum exports one, with what older ones do otherwise too; not to be written to."""
    folder = tmp_path_factory.mktemp("found")
    for job in jobs(read_sources(ExportPlan(checkpoint, folder / "out"))):
        (folder / job.name).mkdir()
        made = job.graph()
        path = save(onnx_from_module(job.name, made), folder / job.name)
        (folder / job.name / "config.json").write_text(json.dumps({**made.config, "_name_or_path": "/home/me"}))
        edit(path, FOREIGN.get(job.name, rename_symbols))
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(checkpoint / name, folder / name)
    shutil.copy(checkpoint / "model_index.json", folder)
    return folder


@pytest.fixture
def own(found: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(found, tmp_path / "own"))


@pytest.fixture(scope="module")
def bundle(found: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(export_bundle(ExportPlan(found, tmp_path_factory.mktemp("adopted") / "bundle")))


def edit(path: Path, change: Change) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def rename_symbols(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = " ".join(SYMBOLS.get(word, word) for word in size.dim_param.split())


def one_whole_time_step(model: onnx.ModelProto, op_type: str = "Unsqueeze", to: int = TensorProto.FLOAT) -> None:
    """A scalar int64 `timestep` that gets its axis in the graph and is cast after that, as in optimum's exports."""
    rename_symbols(model)
    for node in model.graph.node:
        node.input[:] = ["time_row" if name == "timestep" else name for name in node.input]
    axis = numpy_helper.from_array(np.array([0 if op_type == "Unsqueeze" else 1], np.int64), "axis")
    model.graph.initializer.append(axis)
    ahead = [
        helper.make_node(op_type, ["timestep", "axis"], ["lifted"]),
        helper.make_node("Cast", ["lifted"], ["cast"], to=to),
        helper.make_node("Cast", ["cast"], ["time_row"], to=TensorProto.FLOAT),
    ]
    for node in reversed(ahead):
        model.graph.node.insert(0, node)
    (old,) = (value for value in model.graph.input if value.name == "timestep")
    old.CopyFrom(helper.make_tensor_value_info("timestep", TensorProto.INT64, []))


def token_ids_of_32_bits(model: onnx.ModelProto) -> None:
    """Token ids of int32, another order of outputs and one more: an encoder of an older optimum."""
    rename_symbols(model)
    for node in model.graph.node:
        node.input[:] = ["wide_ids" if name == "input_ids" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["wide_ids"], to=TensorProto.INT64))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    model.graph.node.append(helper.make_node("Identity", ["last_hidden_state"], ["hidden_states.1"]))
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in reversed(model.graph.output)]
    more = onnx.ValueInfoProto.FromString(outputs[-1].SerializeToString())
    more.name = "hidden_states.1"
    del model.graph.output[:]
    model.graph.output.extend([more, *outputs])


def take_an_unused_input(model: onnx.ModelProto) -> None:
    rename_symbols(model)
    model.graph.node[0].doc_string = "/home/me/vae.py(7): forward"
    model.metadata_props.add(key="from", value="/home/me")
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch_size"]))


FOREIGN: dict[str, Change] = {
    "text_encoder": token_ids_of_32_bits,
    "unet": one_whole_time_step,
    "vae_decoder": take_an_unused_input,
}


def adopted(folder: Path) -> None:
    """All that happens to an export before it is written."""
    for job in jobs(read_sources(ExportPlan(folder, folder.parent / "out"))):
        job.graph()


def test_an_export_by_optimum_becomes_a_bundle(bundle: Bundle, checkpoint: Path) -> None:
    components = bundle.manifest.components
    assert set(components) == set(GRAPHS)
    assert not any(component.evidence for component in components.values())
    assert [(spec.name, spec.dtype, spec.shape) for spec in components["unet"].inputs[:2]] == [
        ("sample", "float32", ("batch", 4, "height", "width")),
        ("timestep", "float32", ("steps",)),
    ]
    assert [spec.name for spec in components["text_encoder"].outputs] == ["last_hidden_state", "pooler_output"]
    assert not [path for path in bundle.path.rglob("*") if path.is_file() and b"/home/me" in path.read_bytes()]
    asked = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "np"}
    reference = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    # The pipeline has put another `steps_offset` in the one it read.
    reference.scheduler = DDIMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    reference.set_progress_bar_config(disable=True)
    theirs = reference("a red circle", generator=torch.Generator().manual_seed(7), **asked).images[0]
    with Pipeline.open(bundle.path) as pipe:
        ours = pipe("a red circle", seed=7, **asked).images[0]
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_time_steps_are_no_longer_whole_nor_shared_by_all_rows(bundle: Bundle) -> None:
    session = onnxruntime.InferenceSession(bundle.model_path("unet"), providers=["CPUExecutionProvider"])
    row = {"sample": np.ones((1, 4, 4, 4), np.float32), "encoder_hidden_states": np.ones((1, 5, 16), np.float32)}
    steps = np.array([417, 417.25, 3], np.float32)
    alone = [session.run(None, {**row, "timestep": steps[index : index + 1]})[0] for index in range(3)]
    together = session.run(None, {**{name: values.repeat(3, 0) for name, values in row.items()}, "timestep": steps})[0]
    assert np.abs(alone[0] - alone[1]).max() > 1e-6
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)


def test_a_checkpoint_gives_evidence(found: Path, checkpoint: Path, tmp_path: Path) -> None:
    plan = ExportPlan(found, tmp_path / "bundle", verify_against=checkpoint)
    components = Bundle.open(export_bundle(plan)).manifest.components
    for component in components.values():
        assert len(component.evidence) == 3
        assert all(each.holds and each.value > 0 for each in component.evidence)


def test_another_checkpoint_shows(found: Path, own_checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(own_checkpoint / "unet" / UNET_FILE, lambda tensors: tensors["conv_in.bias"].add_(0.1))
    with pytest.raises(ExportError, match=r"unet: out_sample: max_relative_error to PyTorch"):
        export_bundle(ExportPlan(found, tmp_path / "bundle", verify_against=own_checkpoint))
    assert not (tmp_path / "bundle").exists()


def test_weights_in_files_of_their_own_are_copied(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(own / "unet" / "model.onnx")
    frequencies = np.linspace(0, 1, 4, dtype=np.float32)
    constant = helper.make_node("Constant", [], ["unread"], value=numpy_helper.from_array(frequencies))
    model.graph.node.insert(0, constant)
    onnx.save(
        model, own / "unet" / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0,
        convert_attribute=True,
    )  # fmt: skip
    together = Bundle.open(export_bundle(ExportPlan(own, tmp_path / "together")))
    assert {path.name for path in (together.path / "unet").iterdir()} == {"config.json", "model.onnx"}
    for module in (graph, adopt):
        monkeypatch.setattr(module, "EXTERNAL_DATA_ABOVE", 1000)
    apart = Bundle.open(export_bundle(ExportPlan(own, tmp_path / "apart")))
    assert {path.name for path in (apart.path / "unet").iterdir()} == {"config.json", "model.onnx", "model.onnx_data"}


def test_what_optimum_s_pipelines_save_is_read_too(own: Path) -> None:
    edit_json(own / "model_index.json", _class_name="ORTStableDiffusionPipeline")
    for name, class_name in (("unet", "ORTUnet"), ("vae_decoder", "ORTVaeDecoder"), ("vae_encoder", "ORTVaeEncoder")):
        edit_json(own / name / "config.json", _class_name=class_name)
    sources = read_sources(ExportPlan(own, own / "out"))
    assert [part.class_name for part in sources.parts().values()] == [
        "CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL", "AutoencoderKL",
    ]  # fmt: skip


def test_the_command_says_that_nothing_was_compared(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(found), str(tmp_path / "bundle")]) == 0
    assert capsys.readouterr().out.count("not compared with PyTorch") == len(GRAPHS)
    assert main(["verify", str(tmp_path / "bundle"), "--checkpoint", str(found)]) == 1
    assert "an ONNX graph, which there is nothing in PyTorch to compare with" in capsys.readouterr().err


def keep_weights_at(location: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


def read_past_the_end(model: onnx.ModelProto) -> None:
    keep_weights_at("config.json")(model)
    model.graph.initializer[0].external_data.add(key="offset", value="1000000")


def halve_a_weight(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def break_a_weight(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def read_an_unknown_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch_size"]))
    model.graph.node.append(helper.make_node("Identity", ["mask"], ["unread"]))


def rename_an_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", [model.graph.output[-1].name], ["other"]))
    model.graph.output[-1].name = "other"


def fix_the_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def state_another_width(model: onnx.ModelProto) -> None:
    model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = 32


def replay(change: Change) -> Change:
    """A change of the graph as it was before the one that made it optimum's."""

    def undone(model: onnx.ModelProto) -> None:
        del model.graph.node[:3]
        for node in model.graph.node:
            node.input[:] = ["timestep" if name == "time_row" else name for name in node.input]
        model.graph.initializer.remove(next(each for each in model.graph.initializer if each.name == "axis"))
        change(model)

    return undone


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("unet", keep_weights_at("../vae_decoder/model.onnx"), r"file that it is made of, got '../vae_decoder/model"),
        ("unet", keep_weights_at("/etc/hostname"), r"file that it is made of, got '/etc/hostname'"),
        ("unet", keep_weights_at(".."), r"file that it is made of, got '..'"),
        ("unet", keep_weights_at("n" * 300), r"file that it is made of, got 'nnn"),
        ("unet", keep_weights_at("a\0b"), r"file that it is made of, got 'a"),
        ("unet", keep_weights_at("absent"), r"file that it is made of, got 'absent'"),
        ("unet", keep_weights_at("link"), r"file that it is made of, got 'link'.*do not use this one unless you trust"),
        ("unet", read_past_the_end, r"unet/model.onnx: weights cannot be read"),
        ("vae_decoder", halve_a_weight, r"vae_decoder/model.onnx: weights of another precision.*Export it in fp32"),
        ("vae_encoder", break_a_weight, r"vae_encoder/model.onnx: NaN or infinite weights in "),
        ("vae_decoder", read_an_unknown_input, r"tensors of the graph: an unknown mask"),
        ("text_encoder", rename_an_output, r"text_encoder/model.onnx: tensors of the graph: no last_hidden_state"),
        ("unet", fix_the_batch, r"unet/model.onnx: sample: tensor.*with dynamic axes"),
        ("unet", state_another_width, r"unet/model.onnx: encoder_hidden_states: tensor, got .*32.*, expected .*16\)"),
        ("unet", replay(partial(one_whole_time_step, to=TensorProto.INT64)), r"timestep cannot be .*a cast to a float"),
        ("unet", replay(partial(one_whole_time_step, op_type="Expand")), r"timestep cannot be .*an axis added first"),
    ],
)
def test_a_graph_that_cannot_be_adapted_is_refused(own: Path, component: str, change: Change, message: str) -> None:
    (own / "unet" / "link").symlink_to("/etc/hostname")
    edit(own / component / "model.onnx", change)
    with pytest.raises(CheckpointError, match=message):
        adopted(own)


def test_a_file_that_is_no_graph_is_refused(own: Path) -> None:
    path = own / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"unet/model.onnx: not an ONNX graph"):
        adopted(own)


def overflow(model: onnx.ModelProto) -> None:
    big = numpy_helper.from_array(np.array(3e38, np.float32), "big")
    change_the_result(model, helper.make_node("Mul", ["result", "big"], ["sample"]), big)


def crop(model: onnx.ModelProto) -> None:
    bounds = [numpy_helper.from_array(np.array([value], np.int64), f"bound_{value}") for value in (1, 9999, 2)]
    node = helper.make_node("Slice", ["result", *(each.name for each in bounds)], ["sample"])
    change_the_result(model, node, *bounds)


def change_the_result(model: onnx.ModelProto, node: onnx.NodeProto, *weights: onnx.TensorProto) -> None:
    for each in model.graph.node:
        each.output[:] = ["result" if name == "sample" else name for name in each.output]
    model.graph.initializer.extend(weights)
    model.graph.node.append(node)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overflow, "vae_decoder: sample: NaN or infinity on sample inputs"),
        (crop, r"vae_decoder: sample: output shape, got \(2, 3, \d+, \d+\), expected \(2, 3"),
    ],
)
def test_implausible_results_are_not_published(own: Path, tmp_path: Path, change: Change, message: str) -> None:
    edit(own / "vae_decoder" / "model.onnx", change)
    with pytest.raises(ExportError, match=message):
        export_bundle(ExportPlan(own, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_the_autoencoder_s_halves_must_agree(own: Path) -> None:
    edit_json(own / "vae_encoder" / "config.json", scaling_factor=0.13025)
    with pytest.raises(
        CheckpointError, match=r"vae_encoder: scaling_factor: latent space, got 0.13025, expected 0.18215"
    ):
        adopted(own)


def test_graphs_of_other_models_are_refused(own: Path) -> None:
    edit_json(own / "unet" / "config.json", _class_name="ControlNetModel")
    with pytest.raises(CheckpointError, match="an ONNX graph of a ControlNet, expected one of a unet"):
        read_controlnet(own / "unet")


def test_a_bundle_is_not_adopted_again(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a bundle already"):
        export_bundle(ExportPlan(bundle.path, tmp_path / "again"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "fp16", "--dtype fp16: text_encoder is an ONNX graph, which is taken as it is"),
        ("added", (Added("controlnet_canny", Path("canny")),), "--add controlnet_canny: unet is an ONNX graph"),
        ("loras", (LoraSource(Path("style.safetensors")),), "--lora: unet is an ONNX graph"),
    ],
)
def test_what_needs_weights_is_refused(found: Path, tmp_path: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        read_sources(ExportPlan(found, tmp_path / "bundle", **{option: value}))  # type: ignore[arg-type]


def test_weights_are_not_compared_with_a_checkpoint_of_the_user_s_choice(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--verify-against: is for ONNX graphs"):
        read_sources(ExportPlan(checkpoint, tmp_path / "bundle", verify_against=checkpoint))


def test_graphs_prove_nothing_about_graphs(found: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an ONNX graph, which there is nothing in PyTorch to compare with"):
        export_bundle(ExportPlan(found, tmp_path / "bundle", verify_against=found))
    with pytest.raises(CheckpointError, match="an ONNX graph, which there is nothing in PyTorch to compare with"):
        verify_bundle(bundle, ExportPlan(found, bundle.path))
