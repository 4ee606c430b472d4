"""Which engines of the cache are the stages of a denoiser, for latents of a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .backends.base import Shape
from .bundle import Bundle
from .engine_files import Engine
from .engine_search import fitting_engines
from .shapes import evaluated
from .stages import call_sizes
from .targets import Target
from .tensors import latent_names
from .variant import Variant


def find_stages(
    bundle: Bundle, name: str, targets: Sequence[Target], shape: Shape, *, cache: Path | None = None
) -> tuple[Variant, ...]:
    """What the engines are that are component `name`'s stages, all of one cut, in their order; loads nothing.

    targets: of each stage; they and cache as of `fitting_engines`. shape: the latents', (B, C, h, w); an engine's
    profile must take what follows from it. What does not, the text's length, is not looked at.

    Raises:
        EngineError: one is missing, or has no profile for such latents, with the command that builds it.
    """
    variants = list[Variant]()
    for index, target in enumerate(targets):
        wanted = Variant(stage=(index, len(targets)), cuts=variants[0].cuts if variants else ())
        built = [found.engine for found in fitting_engines(bundle, name, target, cache=cache, variant=wanted)]
        shapes = _known_shapes(bundle, name, built[0], shape)
        fitting = next((engine for engine in built if _takes(engine, shapes)), None)
        if fitting is None:  # what none takes of the call, none takes: this tells why
            fitting = fitting_engines(bundle, name, target, shapes, cache=cache, variant=wanted)[0].engine
        variants.append(fitting.ingredients.variant)
    return tuple(variants)


def _known_shapes(bundle: Bundle, name: str, stage: Engine, shape: Shape) -> dict[str, Shape]:
    """The shapes of those of a stage's inputs that follow from the latents'."""
    inputs = bundle.component(name).inputs
    latent = latent_names(inputs).sample
    # Other channels than the latents' own are stated as a number.
    sizes = call_sizes((*inputs, *stage.inputs), {latent: shape}, shape[0])
    shapes = {spec.name: evaluated(spec.shape, sizes) for spec in stage.inputs}
    return {name: known for name, known in shapes.items() if known is not None}


def _takes(engine: Engine, shapes: Mapping[str, Shape]) -> bool:
    """Whether a profile of an engine takes these, whatever the shapes of its other inputs."""
    profiles = engine.ingredients.profiles
    return not profiles or any(
        all(ranges[name].holds(shape) for name, shape in shapes.items() if name in ranges) for ranges in profiles
    )
