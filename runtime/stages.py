"""Stages of a denoiser that was cut at block boundaries: what each takes and makes, and what one hands to another.

A stage reads the text, the time step and what else its own blocks are conditioned on; it takes from the stages before
it what they made of the latent, skip connections among it. A prediction is what the last makes. Where a stage needs no
more of the latent than its size, it has the latent among its inputs and does not read its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .errors import BundleError
from .manifest import Frozen, TensorSpec

CARRIED = "stage/"  # what the names of tensors begin with that one stage hands to another
MOST_STAGES = 4


class Stage(Frozen, frozen=True, kw_only=True):
    """One stage of a cut: its place, the block it begins with, its tensors.

    multiply_adds: of a call at the sizes the cut was balanced for; share: of the whole denoiser's, 0..1. What several
    stages compute for themselves counts in each.
    """

    index: int
    count: int
    begins: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiply_adds: int
    share: float

    @property
    def taken(self) -> tuple[TensorSpec, ...]:
        """What earlier stages made."""
        return tuple(one for one in self.inputs if one.name.startswith(CARRIED))


def check_stages(stages: Sequence[Stage], where: str) -> None:
    """Check that stages are those of one cut, in order and complete.

    Raises:
        BundleError: one is missing, or takes what no earlier one makes.
    """
    remedy = "Build all stages anew."
    places = [(stage.index, stage.count) for stage in stages]
    wanted = [(index, len(stages)) for index in range(len(stages))]
    if places != wanted:
        raise BundleError(where, "stages and their count", got=places, expected=str(wanted), remedy=remedy)
    made: dict[str, TensorSpec] = {}
    for stage in stages:
        strange = next((one for one in stage.taken if made.get(one.name) != one), None)
        if strange is not None:
            what = f"stage {stage.index + 1} takes {strange.name!r}"
            raise BundleError(where, what, got=made.get(strange.name), expected=str(strange), remedy=remedy)
        made |= {one.name: one for one in stage.outputs}


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
