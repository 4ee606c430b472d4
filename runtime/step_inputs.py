"""What the inputs of step engines are given that no row changes, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from . import step_row as names
from .backends.base import Array, Shape
from .binding import Conditioning
from .errors import BundleError, ExecutionError
from .manifest import TensorSpec
from .plan import Plan
from .shapes import evaluated
from .tensors import spec_of


def history_of(inputs: Sequence[TensorSpec]) -> int:
    """How many earlier predictions the state of a step engine with these inputs holds.

    Raises:
        BundleError: they are no step engine's.
    """
    state = spec_of(inputs, names.STATE)
    if state is None or not isinstance(state.shape[0], int):
        listed = ", ".join(spec.name for spec in inputs)
        expected = f"{names.STATE} of a fixed first size among them"
        raise BundleError("step engine", "inputs", got=listed, expected=expected)
    return state.shape[0] - 1


def given_inputs(name: str, plan: Plan, conditioning: Conditioning, *, guided: bool) -> dict[str, Array]:
    """What no row of a plan changes among a step engine's inputs, by name.

    That is its conditioning, (B, …) float32 or, where `guided`, (2B, …) with the unconditional rows first, and the
    guidance scale, (1,) float32; what belongs to no picture, of any shape; further channels, (B, …, h, w) float32.

    Raises:
        ExecutionError: a guided row without an unconditional branch.
    """
    given: dict[str, Array] = dict(conditioning.conditional)
    if guided:
        other = conditioning.unconditional
        if other is None:
            raise ExecutionError(name, "a guided row without an unconditional branch")
        given = {one: np.concatenate([other[one], values]) for one, values in given.items()}
        given[names.GUIDANCE_SCALE] = np.array([plan.guidance_scale], np.float32)
    given.update(conditioning.whole)
    if conditioning.channels is not None:
        given[names.CHANNELS] = conditioning.channels
    return given


def input_shapes(
    name: str, inputs: Sequence[TensorSpec], given: Mapping[str, Array], shape: Shape, *, guided: bool
) -> dict[str, Shape]:
    """The shape of each of a step engine's inputs, for what it is given and latents of this shape.

    given: of `given_inputs`. shape: the latents', (B, C, h, w), of B pictures whether or not the row is guided.

    Raises:
        BundleError: one does not follow from the latent's.
    """
    noise = spec_of(inputs, names.NOISE)
    sizes = {} if noise is None else {str(stated): size for stated, size in zip(noise.shape, shape, strict=True)}
    shapes: dict[str, Shape] = {}
    for spec in inputs:
        stated = evaluated(spec.shape, sizes)
        if spec.name in given:
            stated = given[spec.name].shape
        elif spec.name == "timestep" and stated is None:
            stated = (shape[0] * (1 + guided),)
        if stated is None:
            raise BundleError(name, f"shape of {spec.name}", got=spec.shape, expected=f"formulas of {', '.join(sizes)}")
        shapes[spec.name] = stated
    return shapes
