"""ONNX graphs from elsewhere, made to take and to give what a bundle's graphs do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxscript import ir

from ..runtime.errors import CheckpointError, ExportError
from ..runtime.manifest import LatentSpace, Role, TensorSpec, TextEncoding
from ..runtime.safetensors_files import listed
from .agreement import latent_space
from .autoencoders import decoder_tensors, encoder_tensors
from .checkpoint import Part
from .denoisers import shared_inputs, unet_conditioning
from .facts import denoiser_facts
from .foreign_graph import ForeignGraph
from .graph import EXTERNAL_DATA_ABOVE
from .modules import extent, float_spec
from .samples import Inputs
from .session import OnnxRun
from .text_encoders import TOKEN_IDS, clip_outputs
from .weights import parameters

Tensors = tuple[TensorSpec, ...]

# Double precision is for a few constants, such as frequencies.
_ARITHMETIC = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_WHOLE = (ir.DataType.INT32, ir.DataType.INT64)
# What a time step passes through as it is, before it is cast to the network's type.
_MOVES = ("Unsqueeze", "Expand", "Reshape", "Identity")
_FROM_A_CHECKPOINT = "Export the checkpoint itself."


@dataclass(frozen=True)
class AdoptedGraph:
    """As `modules.Graph`, with an adapted ONNX model in the module's place; `source` is the graph as it was found."""

    role: Role
    inputs: Tensors
    outputs: Tensors
    config: Mapping[str, Any]
    model: ir.Model
    parameters: int
    source: Path
    multiple: int = 1

    def run(self, given: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name for a graph of one input.

        Raises:
            ExportError: ONNX Runtime cannot load or run it.
        """
        return self._session.named({self.inputs[0].name: given})

    @cached_property
    def _session(self) -> OnnxRun:
        return OnnxRun(self.source.parent.name, self.source)


def adopt_text_encoder(part: Part, encoding: TextEncoding) -> AdoptedGraph:
    """A CLIP text encoder with the tensors of `text_encoder_graph`.

    Raises, as the others do:
        CheckpointError: the graph is not in float32, holds NaN or infinity, or has other tensors than its configuration
            and the bundle want.
    """
    return _adopted(part, "text_encoder", (TOKEN_IDS,), clip_outputs(part, encoding))


def adopt_unet(part: Part) -> AdoptedGraph:
    """A UNet with the tensors of `denoiser_graph`."""
    facts = denoiser_facts(part)
    inputs = (*shared_inputs("sample", facts), *unet_conditioning(facts))
    outputs = (float_spec("out_sample", "batch", facts.out_channels, "height", "width"),)
    return _adopted(part, "denoiser", inputs, outputs, facts.multiple)


def adopt_decoder(part: Part, bundle: LatentSpace) -> AdoptedGraph:
    """A decoder with the tensors of `decoder_graph`; it must read the bundle's own latent space."""
    own = latent_space(part)
    if own != bundle:
        raise CheckpointError(str(part.config_path), "latent space of a graph", got=own, expected=f"{bundle}")
    return _adopted(part, "vae_decoder", *decoder_tensors(part, bundle))


def adopt_encoder(part: Part) -> AdoptedGraph:
    """An autoencoder's encoder with the tensors of `encoder_graph`."""
    return _adopted(part, "vae_encoder", *encoder_tensors(part), latent_space(part).downsampling)


def require_plausible(name: str, graph: AdoptedGraph, model: Path, inputs: Inputs) -> None:
    """Run an adapted graph on disk once, where there is nothing to compare it with.

    Raises:
        ExportError: ONNX Runtime cannot load or run it, or an output has another shape or holds NaN or infinity.
    """
    results = OnnxRun(name, model)(inputs)
    sizes = {
        axis: size
        for spec in graph.inputs
        for axis, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(axis, str)
    }
    for spec, result in zip(graph.outputs, results, strict=True):
        expected = tuple(extent(size, sizes) for size in spec.shape)
        if result.shape != expected:
            raise ExportError(f"{name}: {spec.name}", "output shape", got=result.shape, expected=str(expected))
        if not np.isfinite(result).all():
            raise ExportError(f"{name}: {spec.name}", "NaN or infinity on sample inputs", remedy=_FROM_A_CHECKPOINT)


def _adopted(part: Part, role: Role, inputs: Tensors, outputs: Tensors, multiple: int = 1) -> AdoptedGraph:
    if not isinstance(part.weights, ForeignGraph):
        raise TypeError(f"{part.folder} holds no graph")
    where = str(part.weights.path)
    model = _read(where, part.weights)
    _adapt(where, model.graph, inputs, outputs)
    config = {key: value for key, value in part.config.items() if not key.startswith("_")}
    if "_class_name" in part.config:
        config["_class_name"] = part.class_name
    return AdoptedGraph(role, inputs, outputs, config, model, parameters(part.weights), part.weights.path, multiple)


def _read(where: str, graph: ForeignGraph) -> ir.Model:
    """The graph as float32, with what will not be external again brought into memory."""
    model = graph.read()
    # What only tells of another machine and another run.
    model.metadata_props.clear()
    model.doc_string = None
    try:
        for node in (node for each in (model.graph, *model.functions.values()) for node in each.all_nodes()):
            node.metadata_props.clear()
            node.doc_string = None
            for name, attribute in node.attributes.items():
                if isinstance(attribute.value, ir.ExternalTensor):
                    values = ir.Tensor(attribute.value.numpy().copy(), name=attribute.value.name)
                    node.attributes[name] = ir.AttrTensor(name, values)
        tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
        if sum(tensor.nbytes for tensor in tensors) <= EXTERNAL_DATA_ABOVE:
            ir.external_data.load_to_model(model)
        floats = [tensor for tensor in tensors if tensor.dtype.is_floating_point()]
        foreign = [str(tensor.name) for tensor in floats if tensor.dtype not in _ARITHMETIC]
        broken = [] if foreign else [str(each.name) for each in floats if not np.isfinite(each.numpy()).all()]
    except Exception as error:  # a length, an offset or a shape that does not fit the bytes there are
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(where, f"weights cannot be read ({first})", remedy="Export it again.") from error
    if foreign:
        what = "weights of another precision"
        raise CheckpointError(where, what, got=listed(foreign), expected="float32", remedy="Export it in fp32.")
    if broken:
        raise CheckpointError(where, f"NaN or infinite weights in {listed(broken)}", remedy=_FROM_A_CHECKPOINT)
    return model


def _adapt(where: str, graph: ir.Graph, inputs: Tensors, outputs: Tensors) -> None:
    """Let a graph have these inputs and outputs and no others, in this order and under these symbols."""
    given = {str(value.name): value for value in graph.inputs if value.name not in graph.initializers}
    made = {str(value.name): value for value in graph.outputs}
    wanted = {spec.name for spec in inputs}
    missing = sorted(wanted - given.keys()) + sorted({spec.name for spec in outputs} - made.keys())
    unknown = sorted(name for name in given.keys() - wanted if given[name].uses())
    if missing or unknown:
        raise CheckpointError(
            where,
            f"tensors of the graph: {'no' if missing else 'an unknown'} {(missing or unknown)[0]}",
            got=", ".join((*given, *made)),
            expected=", ".join(spec.name for spec in (*inputs, *outputs)),
            remedy=_FROM_A_CHECKPOINT,
        )
    # Types and sizes in between are those of the graph as it was, and are inferred anew.
    for value in (value for node in graph for value in node.outputs if not value.is_graph_output()):
        value.type = value.shape = None
    taken = [_adapted_input(where, graph, given[spec.name], spec) for spec in inputs]
    for spec in outputs:
        _require_fitting(where, made[spec.name], spec)
        made[spec.name].shape = ir.Shape(spec.shape)
    graph.inputs.clear()
    graph.inputs.extend(taken)
    graph.outputs.clear()
    graph.outputs.extend(made[spec.name] for spec in outputs)


def _adapted_input(where: str, graph: ir.Graph, value: ir.Value, spec: TensorSpec) -> ir.Value:
    if spec.name == "timestep":
        _let_time_flow(where, graph, value)
    elif spec.dtype == "int64" and value.dtype == ir.DataType.INT32:
        value = _cast(graph, value, ir.DataType.INT64)
    _require_fitting(where, value, spec)
    value.shape = ir.Shape(spec.shape)
    return value


def _let_time_flow(where: str, graph: ir.Graph, timestep: ir.Value) -> None:
    """Make a time step one number per row, and any number, where it is a single one or a whole one."""
    if timestep.dtype in _WHOLE:
        timestep.type = ir.TensorType(ir.DataType.FLOAT)
    if timestep.shape is not None and len(timestep.shape) == 0:
        for node in timestep.consumers():
            if node.op_type != "Unsqueeze" or _axes(node) != [0]:
                raise _stuck(where, node, "an axis added first")
            node.outputs[0].replace_all_uses_with(timestep)
            graph.remove(node, safe=True)
    timestep.shape = ir.Shape(["steps"])
    pending = [timestep]
    while pending:
        for node in pending.pop().consumers():
            if node.op_type == "Cast" and node.attributes["to"].as_int() in _WHOLE:
                raise _stuck(where, node, "a cast to a floating-point type")
            if node.op_type in _MOVES:
                pending += node.outputs


def _stuck(where: str, node: ir.Node, expected: str) -> CheckpointError:
    what = "timestep cannot be made one number per row"
    return CheckpointError(where, what, got=f"{node.op_type} {node.name}", expected=expected, remedy=_FROM_A_CHECKPOINT)


def _axes(node: ir.Node) -> list[int]:
    """What an Unsqueeze adds; nothing where it is computed."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    constant = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    return [] if constant is None else [int(axis) for axis in constant.numpy().reshape(-1)]


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A new input of another type, cast to the old one's."""
    new = ir.Value(name=value.name, type=ir.TensorType(dtype), shape=value.shape)
    node = ir.node("Cast", [new], attributes={"to": int(value.dtype)}, name=f"{value.name}/Cast")
    value.replace_all_uses_with(node.outputs[0])
    graph.insert_before(graph[0], node)
    return new


def _require_fitting(where: str, value: ir.Value, spec: TensorSpec) -> None:
    """Compare a tensor's type and sizes, where they are stated, with what the bundle wants of it."""
    stated = [size if isinstance(size, int) else None for size in value.shape or ()]
    fits = value.shape is None or (
        len(stated) == len(spec.shape)
        and all(size is None or size == wanted for size, wanted in zip(stated, spec.shape, strict=True))
    )
    if value.dtype != ir.DataType.from_numpy(np.dtype(spec.dtype)) or not fits:
        raise CheckpointError(
            f"{where}: {spec.name}",
            "tensor",
            got=f"{value.dtype} {value.shape}",
            expected=f"{spec.dtype} ({', '.join(map(str, spec.shape))})",
            remedy="Export it in fp32 with dynamic axes, and check config.json beside it.",
        )
