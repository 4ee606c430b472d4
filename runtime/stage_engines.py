"""Which engines of the cache are the stages of a denoiser, for latents of a shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .backends.base import Shape
from .bundle import Bundle
from .foreseen_engines import foreseen_engines
from .targets import Target
from .variant import Variant


def find_stages(
    bundle: Bundle, name: str, targets: Sequence[Target], shape: Shape, *, cache: Path | None = None
) -> tuple[Variant, ...]:
    """What the engines are that are component `name`'s stages, all of one cut, in their order; loads nothing.

    targets: of each stage. The rest is as of `foreseen_engines`.

    Raises:
        EngineError: one is missing, or has no profile for such latents, with the command that builds it.
    """
    variants = list[Variant]()
    for index, target in enumerate(targets):
        wanted = Variant(stage=(index, len(targets)), cuts=variants[0].cuts if variants else ())
        found = foreseen_engines(bundle, name, target, shape, cache=cache, variant=wanted)
        variants.append(found[0].ingredients.variant)
    return tuple(variants)
