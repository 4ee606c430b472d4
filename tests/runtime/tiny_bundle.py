"""A valid bundle of a few kilobytes: real graphs whose outputs depend on every input, with fixed weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from tandemrt.runtime.files import file_sha256
from tandemrt.runtime.manifest import (
    Component,
    Defaults,
    Evidence,
    FileRecord,
    LatentSpace,
    Manifest,
    Quantization,
    QuantizationFormat,
    SchedulerDefaults,
    Source,
    TensorSpec,
    TextConditioning,
    TextEncoding,
)
from tandemrt.runtime.manifest_files import MANIFEST_NAME, SEAL_NAME, write

MAX_LENGTH = 12
TEXT_WIDTH = 8
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = (("r", "e"), ("re", "d</w>"), ("b", "l"), ("u", "e</w>"), ("bl", "ue</w>"))
SCHEDULER = SchedulerDefaults(
    class_name="DPMSolverMultistepScheduler",
    config={
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
    },
)
# What a UNet calls a residual, what a ControlNet calls it, and its height and width.
RESIDUALS = (
    ("down_block_additional_residual_0", "down_block_res_sample_0", ("height", "width")),
    ("down_block_additional_residual_1", "down_block_res_sample_1", ("height // 2", "width // 2")),
    ("mid_block_additional_residual", "mid_block_res_sample", ("height // 2", "width // 2")),
)
ONNX_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def write_tiny_bundle(folder: Path) -> Manifest:
    """Write the bundle to `folder`, which is made if need be; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder / "tokenizer")
    text = TextConditioning(
        encoders={"text_encoder": TextEncoding(max_length=MAX_LENGTH, width=TEXT_WIDTH)}, width=TEXT_WIDTH
    )
    return write_bundle(folder, _components(vocabulary), text)


def write_bundle(
    folder: Path, models: Mapping[str, tuple[onnx.ModelProto, Component]], text: TextConditioning, **facts: Any
) -> Manifest:
    """Write models, scheduler and manifest beside tokenizers that are there; `facts` are further manifest entries."""
    components = {}
    for name, (graph, component) in models.items():
        (folder / name).mkdir()
        # One component keeps its weights beside the model, as those over 2 GB do; shapes and axes must stay inside.
        external = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 64}
        onnx.save_model(graph, str(folder / name / "model.onnx"), **(external if name == "unet" else {}))
        components[name] = component
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": SCHEDULER.class_name, **SCHEDULER.config}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2), encoding="utf-8")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}\n', encoding="utf-8")
    manifest = Manifest(
        **{
            "format": 1,
            "producers": {"tandemrt": "0.1.0"},
            "components": components,
            "files": file_records(folder),
            "latent": LatentSpace(channels=4, downsampling=8, scaling_factor=1.0),
            "text": text,
            "scheduler": SCHEDULER,
            "defaults": Defaults(height=64, width=64, num_inference_steps=10, guidance_scale=5.0),
            **facts,
        }
    )
    write(manifest, folder)
    return manifest


def file_records(folder: Path) -> dict[str, FileRecord]:
    """The records of every file under `folder` but the manifest and its seal."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST_NAME, SEAL_NAME))
    return {
        path.relative_to(folder).as_posix(): FileRecord(size=path.stat().st_size, sha256=file_sha256(path))
        for path in paths
    }


def resign(folder: Path, edit: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> None:
    """List the files as they are now, as an author of a hostile bundle would, after `edit` of the manifest."""
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    write(edit(msgspec.structs.replace(manifest, files=file_records(folder))), folder)


def quantization_in(form: QuantizationFormat) -> Quantization:
    """What a manifest says of a component in a format."""
    computes = form in ("int8", "fp8")
    return Quantization(
        format=form,
        tool="test",
        version="1",
        settings={},
        layers=1,
        float_model="ab" * 32,
        trajectories="cd" * 32 if computes else None,
    )


def call_quantized(folder: Path, form: QuantizationFormat, *names: str) -> None:
    """Let the manifest of the files as they are now say that components are in a format."""

    def edit(manifest: Manifest) -> Manifest:
        told = {
            name: msgspec.structs.replace(manifest.components[name], quantization=quantization_in(form))
            for name in names
        }
        return msgspec.structs.replace(manifest, components={**manifest.components, **told})

    resign(folder, edit)


@dataclass
class Graph:
    """Nodes and weights gathered into a model."""

    name: str
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.RandomState(self.seed)

    def weight(self, *shape: int, scale: float) -> str:
        return self.constant((self._random.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, array: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op_type: str, inputs: Iterable[str], output: str = "", **attributes: object) -> str:
        module = f"{op_type.lower()}_{len(self.nodes)}"
        output = output or module
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=f"{module}/{op_type}", **attributes))
        return output

    def model(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> onnx.ModelProto:
        infos = [
            [helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], spec.shape) for spec in specs]
            for specs in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "tiny", infos[0], infos[1], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def _components(vocabulary: int) -> dict[str, tuple[onnx.ModelProto, Component]]:
    return {
        "text_encoder": text_encoder("text_encoder", vocabulary, TEXT_WIDTH, ("last_hidden_state", "pooler_output")),
        "unet": denoiser("unet", seed=1, hidden=8),
        "unet_small": denoiser("unet_small", seed=2, hidden=4),
        "vae_decoder": decoder("vae_decoder", seed=3, hidden=8),
        "vae_decoder_tiny": decoder("vae_decoder_tiny", seed=4, hidden=4),
    }


def text_encoder(
    name: str, vocabulary: int, width: int, outputs: Iterable[str], seed: int = 0
) -> tuple[onnx.ModelProto, Component]:
    """tanh of a running sum of embeddings, so that the order of tokens counts; pooled outputs are its mean.

    Each output is other than the one before it by a factor; `hidden_states` and `last_hidden_state` are not pooled.
    """
    graph = Graph(name, seed)
    embedded = graph.node("Gather", [graph.weight(vocabulary, width, scale=0.7), "input_ids"])
    running = graph.node("CumSum", [embedded, graph.constant(np.array(1, np.int64))])
    states = graph.node("Tanh", [graph.node("MatMul", [running, graph.weight(width, width, scale=0.4)])])
    specs = []
    for index, output in enumerate(outputs):
        scaled = graph.node("Mul", [states, graph.constant(np.array(1 - index / 4, np.float32))])
        if "hidden_state" in output:
            graph.node("Identity", [scaled], output)
            specs.append(float_spec(output, "batch", "sequence", width))
        else:
            graph.node("ReduceMean", [scaled, graph.constant(np.array([1], np.int64))], output, keepdims=0)
            specs.append(float_spec(output, "batch", width))
    inputs = (TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),)
    return described(graph, inputs, tuple(specs), role="text_encoder")


def denoiser(
    name: str,
    seed: int,
    hidden: int,
    *,
    widths: Mapping[str, int] = MappingProxyType({}),
    behind: int = 0,
    steered: bool = False,
) -> tuple[onnx.ModelProto, Component]:
    """0.9 · latent + a gated convolution of it, shifted by the text, by sines of the time step, and by what is added.

    widths: of the text, where it is not TEXT_WIDTH, and of further inputs. One with `pooled_projections` has a
        transformer's names and 16 channels.
    behind: how many channels it reads behind the latent's. steered: whether it takes a ControlNet's three residuals.
    """
    graph = Graph(name, seed)
    added = {key: width for key, width in widths.items() if key != "encoder_hidden_states"}
    text_width = widths.get("encoder_hidden_states", TEXT_WIDTH)
    transformer = "pooled_projections" in added
    channels, latent, result = (
        (16, "hidden_states", "out_hidden_states") if transformer else (4, "sample", "out_sample")
    )
    axis = graph.constant(np.array([1], np.int64))
    text = graph.node("ReduceMean", ["encoder_hidden_states", axis], keepdims=0)
    text = graph.node("MatMul", [text, graph.weight(text_width, hidden, scale=1.0)])
    steps = graph.node("Unsqueeze", ["timestep", axis]) if added else "timestep"
    time = graph.node("Mul", [steps, graph.constant(np.geomspace(0.002, 0.2, hidden).astype(np.float32))])
    shift = graph.node("Add", [text, graph.node("Sin", [time])])
    for extra, width in added.items():
        scale = 0.01 if extra == "time_ids" else 0.5
        shift = graph.node("Add", [shift, graph.node("MatMul", [extra, graph.weight(width, hidden, scale=scale)])])
    shift = graph.node("Unsqueeze", [shift, graph.constant(np.array([2, 3], np.int64))])
    read = graph.weight(hidden, channels + behind, 3, 3, scale=0.2)
    convolved = graph.node("Conv", [latent, read], pads=[1, 1, 1, 1])
    for index, residual in enumerate(RESIDUALS if steered else ()):
        scales = graph.constant(np.array([1, 1, 2, 2] if index else [1, 1, 1, 1], np.float32))
        grown = graph.node("Resize", [residual[0], "", scales], mode="nearest")
        convolved = graph.node("Add", [convolved, grown])
    gated = graph.node("Tanh", [graph.node("Add", [convolved, shift])])
    small = graph.node("Conv", [gated, graph.weight(channels, hidden, 1, 1, scale=0.1)])
    if behind:
        bounds = [graph.constant(np.array([value], np.int64)) for value in (0, channels, 1)]
        kept = graph.node("Slice", [latent, *bounds])
    else:
        kept = latent
    kept = graph.node("Mul", [kept, graph.constant(np.array(0.9, np.float32))])
    graph.node("Add", [kept, small], result)
    inputs = (
        float_spec(latent, "batch", channels + behind, "height", "width"),
        float_spec("timestep", "batch" if added else 1),
        float_spec("encoder_hidden_states", "batch", "sequence", text_width),
        *(float_spec(extra, "batch", width) for extra, width in added.items()),
        *(float_spec(name, "batch", hidden, *sides) for name, _, sides in (RESIDUALS if steered else ())),
    )
    outputs = (float_spec(result, "batch", channels, "height", "width"),)
    model, component = described(graph, inputs, outputs, role="denoiser")
    return model, msgspec.structs.replace(component, prediction_type="epsilon", spatial_multiple=2)


def controlnet(name: str, seed: int, hidden: int) -> tuple[onnx.ModelProto, Component]:
    """Three residuals from latent, time step, text and picture, multiplied by the scale."""
    graph = Graph(name, seed)
    axis = graph.constant(np.array([1], np.int64))
    text = graph.node("ReduceMean", ["encoder_hidden_states", axis], keepdims=0)
    shift = graph.node("MatMul", [text, graph.weight(TEXT_WIDTH, hidden, scale=1.0)])
    steps = graph.node("Unsqueeze", ["timestep", axis])
    shift = graph.node("Add", [shift, graph.node("Sin", [steps])])
    seen = graph.node("Conv", ["controlnet_cond", graph.weight(hidden, 3, 8, 8, scale=0.1)], strides=[8, 8])
    convolved = graph.node("Conv", ["sample", graph.weight(hidden, 4, 3, 3, scale=0.2)], pads=[1, 1, 1, 1])
    shift = graph.node("Unsqueeze", [shift, graph.constant(np.array([2, 3], np.int64))])
    mixed = graph.node("Tanh", [graph.node("Add", [graph.node("Add", [seen, convolved]), shift])])
    fine = graph.node("Mul", [mixed, "conditioning_scale"], RESIDUALS[0][1])
    coarse = graph.node("AveragePool", [fine], RESIDUALS[1][1], kernel_shape=[2, 2], strides=[2, 2])
    graph.node("Neg", [coarse], RESIDUALS[2][1])
    inputs = (
        float_spec("sample", "batch", 4, "height", "width"),
        float_spec("timestep", "batch"),
        float_spec("encoder_hidden_states", "batch", "sequence", TEXT_WIDTH),
        float_spec("controlnet_cond", "batch", 3, "8 * height", "8 * width"),
        float_spec("conditioning_scale", 1),
    )
    outputs = tuple(float_spec(given, "batch", hidden, *sides) for _, given, sides in RESIDUALS)
    return described(graph, inputs, outputs, role="controlnet")


def decoder(name: str, seed: int, hidden: int, channels: int = 4) -> tuple[onnx.ModelProto, Component]:
    """A transposed convolution to eight times the size; tanh keeps the pixels in [-1, 1]."""
    graph = Graph(name, seed)
    weight = graph.weight(channels, hidden, 8, 8, scale=0.4)
    grown = graph.node("ConvTranspose", ["latent_sample", weight], strides=[8, 8])
    colours = graph.node("Conv", [graph.node("Tanh", [grown]), graph.weight(3, hidden, 1, 1, scale=0.5)])
    graph.node("Tanh", [colours], "sample")
    inputs = (float_spec("latent_sample", "batch", channels, "height", "width"),)
    outputs = (float_spec("sample", "batch", 3, "8*height", "8*width"),)
    return described(graph, inputs, outputs, role="vae_decoder")


def encoder(name: str, seed: int, output: str) -> tuple[onnx.ModelProto, Component]:
    """A strided convolution to an eighth of the size: `latent_parameters` (mean, log variance) or `latent_sample`."""
    graph = Graph(name, seed)
    channels = 8 if output == "latent_parameters" else 4
    graph.node("Conv", ["sample", graph.weight(channels, 3, 8, 8, scale=0.2)], output, strides=[8, 8])
    inputs = (float_spec("sample", "batch", 3, "height", "width"),)
    outputs = (float_spec(output, "batch", channels, "height // 8", "width // 8"),)
    return described(graph, inputs, outputs, role="vae_encoder")


def float_spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def described(
    graph: Graph, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, role: str
) -> tuple[onnx.ModelProto, Component]:
    component = Component(
        role=role,
        model=f"{graph.name}/model.onnx",
        inputs=inputs,
        outputs=outputs,
        precision="fp32",
        source=Source(class_name="Tiny", sha256="0" * 64),
        parameters=sum(int(np.prod(weight.dims)) for weight in graph.weights),
        evidence=(Evidence(metric="max_relative_error", value=0.0, threshold=1e-4, input_shapes={}),),
    )
    return graph.model(inputs, outputs), component


def write_tokenizer(folder: Path) -> int:
    """CLIP's kind of byte-pair encoding with five merges; returns the size of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in MERGES), BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(MERGES), end_of_word_suffix="</w>", unk_token=EOS))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, vocabulary[EOS]), (BOS, vocabulary[BOS]), trim_offsets=False, add_prefix_space=False
    )
    folder.mkdir()
    # An encoder takes its vocabulary from the file itself, so the settings name the special tokens alone.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "pad_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(tokens)
