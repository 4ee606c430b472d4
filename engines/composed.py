"""What is made of a component's graph before it is built: LoRA slots, time steps folded, a step engine, a stage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx

from ..runtime.bundle import Bundle
from ..runtime.engine_files import InputRange, Shape
from ..runtime.errors import BundleError
from ..runtime.manifest import Component, Manifest, TensorSpec
from ..runtime.shapes import evaluated
from ..runtime.step_row import GUIDANCE_SCALE
from ..runtime.tensors import spec_of
from ..runtime.variant import UPDATE, Variant
from .fold import folded
from .graph_files import read_graph, spec
from .profiles import Point, Profile
from .slots import lora_slots
from .stages import Nominal, stage_graphs
from .step import step_graph, update_graph


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed graph's sha256, and the component as it is with the graph's own inputs and outputs."""

    sha256: str
    facts: Component


def composed(model: Path, variant: Variant, where: str, *, hands: bool = False) -> onnx.ModelProto:
    """The graph of a variant: slots first, so that what a step engine adds has none; weights stay in their files.

    hands: of a step engine, as of `step_graph`: for the backends in `ENGINES_ONLY`.

    Raises:
        ArgumentError: nothing of the kind can be made of the graph.
        BundleError: the graph cannot be read, or leaves open how it is to be composed.
    """
    graph = read_graph(model)
    if variant == UPDATE:
        return update_graph(graph, where=where)
    if variant.lora_slots:
        graph = lora_slots(graph, slots=variant.lora_slots, rank=variant.lora_rank, where=where)
    if variant.timesteps:
        graph = folded(graph, variant.timesteps, model.parent, where=where)
    if variant.step:
        graph = step_graph(graph, guided=variant.step == "guided", hands=hands, where=where)
    if variant.stage:
        graph = stage_graphs(graph, variant.stage[1], at=variant.cuts, where=where)[variant.stage[0]].model
    return graph


def composed_facts(bundle: Bundle, name: str, variant: Variant, *, hands: bool = False) -> Composed:
    """What a request needs to know of component `name` as this variant; raises as `composed`."""
    return _facts(bundle, name, composed(bundle.model_path(name), variant, name, hands=hands))


def _facts(bundle: Bundle, name: str, graph: onnx.ModelProto) -> Composed:
    inputs, outputs = (
        tuple(spec(value, name) for value in values) for values in (graph.graph.input, graph.graph.output)
    )
    facts = msgspec.structs.replace(bundle.component(name), inputs=inputs, outputs=outputs)
    return Composed(hashlib.sha256(graph.SerializeToString()).hexdigest(), facts)


def composed_stages(bundle: Bundle, name: str, variant: Variant, count: int) -> dict[Variant, Composed]:
    """What requests need to know of denoiser `name` as this variant cut into so many stages of even work.

    Even at the bundle's default size, whatever profiles are wanted, since stages work together that are of one cut.

    Raises:
        ArgumentError: it cannot be cut so; otherwise as `composed`.
    """
    manifest = bundle.manifest
    scale = manifest.latent.downsampling
    nominal = Nominal(manifest.defaults.height // scale, manifest.defaults.width // scale, manifest.text.max_length)
    whole = composed(bundle.model_path(name), variant, name)
    made = stage_graphs(whole, count, nominal=nominal, where=name)
    cuts = tuple(one.stage.begins for one in made[1:])
    return {
        msgspec.structs.replace(variant, stage=(one.stage.index, count), cuts=cuts): _facts(bundle, name, one.model)
        for one in made
    }


def step_ranges(name: str, inputs: Sequence[TensorSpec], manifest: Manifest, profile: Profile) -> dict[str, InputRange]:
    """The shapes of a step engine's inputs at a profile's smallest, best and largest call.

    Its axes are called `batch` (pictures), `height` and `width` (of the latent), `sequence` and `steps`, or formulas.

    Raises:
        BundleError: an axis has another name.
    """
    # Each row of the denoiser's batch has a time step.
    branches = 1 if spec_of(inputs, GUIDANCE_SCALE) is None else 2
    low, best, high = (_sizes(manifest, point, branches) for point in profile.points(guided_by_default=False))
    return {
        one.name: InputRange(min=_shape(name, one, low), opt=_shape(name, one, best), max=_shape(name, one, high))
        for one in inputs
    }


def _sizes(manifest: Manifest, point: Point, branches: int) -> Mapping[str, int]:
    scale = manifest.latent.downsampling
    return {
        "batch": point.images,
        "height": point.height // scale,
        "width": point.width // scale,
        "sequence": manifest.text.max_length,
        "steps": point.images * branches,
    }


def _shape(name: str, one: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    shape = evaluated(one.shape, sizes)
    if shape is None:
        raise BundleError(
            name, f"shape of input {one.name!r}", got=one.shape, expected=f"formulas of {', '.join(sizes)}"
        )
    return shape
