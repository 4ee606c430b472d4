"""Which engines of the cache take a call, by what is known of it before anything ran: the shape of its latents."""

from __future__ import annotations

from pathlib import Path

from .backends.base import Shape
from .bundle import Bundle
from .engine_files import Engine
from .engine_search import fitting_engines
from .errors import EngineError
from .shapes import evaluated
from .stages import call_sizes
from .targets import Target
from .tensors import latent_names
from .variant import Variant


def foreseen_engines(
    bundle: Bundle, name: str, target: Target, shape: Shape, *, cache: Path | None = None, variant: Variant
) -> list[Engine]:
    """The engines that run component `name` for latents of a shape, the best first; loads nothing.

    target, cache, variant: as of `fitting_engines`. shape: (B, C, h, w), B counting both branches where one call has
    both. An engine's profile must take what follows from it; what does not, the text's length, is not looked at.

    Raises:
        EngineError: there is none, with the command that builds one.
    """

    def fitting(shapes: dict[str, Shape] | None) -> list[Engine]:
        return [found.engine for found in fitting_engines(bundle, name, target, shapes, cache=cache, variant=variant)]

    try:
        built = fitting(None)
    except EngineError:
        return fitting({latent_names(bundle.component(name).inputs).sample: shape})  # tells the size to build for too
    # What none takes of the call, none takes: then this tells why.
    taking = [engine for engine in built if _takes(bundle, name, engine, shape)]
    return taking or fitting(_known_shapes(bundle, name, built[0], shape))


def _known_shapes(bundle: Bundle, name: str, engine: Engine, shape: Shape) -> dict[str, Shape]:
    """The shapes of those of an engine's inputs that follow from the latents'."""
    inputs = bundle.component(name).inputs
    latent = latent_names(inputs).sample
    # Other channels than the latents' own are stated as a number.
    sizes = call_sizes((*inputs, *engine.inputs), {latent: shape}, shape[0])
    shapes = {spec.name: evaluated(spec.shape, sizes) for spec in engine.inputs}
    return {name: known for name, known in shapes.items() if known is not None}


def _takes(bundle: Bundle, name: str, engine: Engine, shape: Shape) -> bool:
    """Whether a profile of an engine takes latents of a shape, whatever the shapes of its other inputs."""
    profiles, shapes = engine.ingredients.profiles, _known_shapes(bundle, name, engine, shape)
    return not profiles or any(
        all(ranges[one].holds(known) for one, known in shapes.items() if one in ranges) for ranges in profiles
    )
