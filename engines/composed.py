"""Engines of graphs that were made of a component's: step engines, folded time steps, LoRA slots."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import onnx

from ..runtime.bundle import Bundle
from ..runtime.engine_files import PLAIN, InputRange, Shape
from ..runtime.errors import ArgumentError, BundleError
from ..runtime.manifest import Manifest, TensorSpec, file_sha256
from ..runtime.shapes import evaluated
from ..runtime.step_row import GUIDANCE_SCALE
from ..runtime.targets import Target
from ..runtime.tensors import spec_of
from .graph_files import spec, write_graph
from .plan import Request, grouped, ingredients_of, require_buildable
from .profiles import Point, Profile, check_profiles


@contextlib.contextmanager
def composed_requests(
    bundle: Bundle, name: str, target: Target, profiles: Sequence[Profile], composed: tuple[str, onnx.ModelProto]
) -> Iterator[tuple[Request, ...]]:
    """The requests to build what was composed of component `name`, as in `requests_of`; they hold inside the context.

    composed: the variant's name, which the runtime asks for it by, and its graph; its axes are called `batch`
        (pictures), `height` and `width` (of the latent), `sequence` and `steps`, or formulas of these. Whether it runs
        both guidance branches is its own affair, so profiles that speak of guidance are refused.

    Raises:
        ArgumentError: a profile that is outside the model or speaks of guidance, or the variant is called `plain`.
        BundleError: an input whose shape does not follow from the profile.
        TargetError: as `requests_of`.
    """
    variant, graph = composed
    if variant == PLAIN:
        raise ArgumentError(name, "name of what was composed", got=variant, expected="another one")
    component = bundle.component(name)
    check_profiles(profiles, bundle.manifest, [name])
    require_buildable(target)
    inputs, outputs = ([spec(value, name) for value in values] for values in (graph.graph.input, graph.graph.output))
    facts = msgspec.structs.replace(component, inputs=tuple(inputs), outputs=tuple(outputs))
    ranges = [(profile.name, symbol_ranges(name, inputs, bundle.manifest, profile)) for profile in profiles]
    groups = grouped(target, ranges)
    with tempfile.TemporaryDirectory() as folder:
        model = write_graph(graph, Path(folder), bundle.model_path(name).parent)
        made_of = [ingredients_of(bundle, name, target, tuple(one for _, one in group)) for group in groups]
        yield tuple(
            Request(
                name,
                target,
                model,
                facts,
                msgspec.structs.replace(one, graph=file_sha256(model), variant=variant),
                tuple(named for named, _ in group),
            )
            for one, group in zip(made_of, groups, strict=True)
        )


def symbol_ranges(
    name: str, inputs: Sequence[TensorSpec], manifest: Manifest, profile: Profile
) -> dict[str, InputRange]:
    """The shapes of inputs at a profile's smallest, best and largest call, from what their axes are called.

    Raises:
        ArgumentError: the profile speaks of guidance.
        BundleError: an axis has another name.
    """
    if profile.guidance != "any":
        remedy = "Leave it out: a composed graph runs the branches it was composed for."
        raise ArgumentError(f"--profile {profile.name}", "guidance", got=profile.guidance, remedy=remedy)
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
