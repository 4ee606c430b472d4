"""Stages of a denoiser that was cut at block boundaries: what each takes and makes, and what one hands to another.

A stage reads the text, the time step and what else its own blocks are conditioned on; it takes from the stages before
it what they made of the latent, skip connections among it. A prediction is what the last makes. Where a stage needs no
more of the latent than its size, it has the latent among its inputs and does not read its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .manifest import Frozen, TensorSpec

CARRIED = "stage/"  # what the names of tensors begin with that one stage hands to another
MOST_STAGES = 4


class Stage(Frozen, frozen=True, kw_only=True):
    """One stage of a cut: its place, the block it begins with, its tensors.

    share: of the whole denoiser's multiply-adds at the sizes the cut was balanced for, 0..1. What several stages
    compute for themselves counts in each.
    """

    index: int
    count: int
    begins: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    share: float


def call_sizes(inputs: Iterable[TensorSpec], shapes: Mapping[str, Sequence[int]], pictures: int) -> dict[str, int]:
    """What each symbol in these inputs' shapes stands for in a call.

    shapes: of inputs by name, of which some may be left out. pictures: B; a call has a time step for each, whatever
    the size of that input is called, as in `bind`.
    """
    sizes: dict[str, int] = {}
    for spec in inputs:
        given = shapes.get(spec.name, [pictures] * len(spec.shape) if spec.name == "timestep" else None)
        if given is not None:
            sizes |= {stated: size for stated, size in zip(spec.shape, given, strict=True) if isinstance(stated, str)}
    return sizes
