"""Buffers of models that work on latents: denoisers and the ControlNets beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .backends.base import Array, Binding, Session, Shape
from .errors import BundleError, ExecutionError
from .lora_slots import Adapter, slot_inputs
from .manifest import TensorSpec
from .ran_on import serving
from .shapes import evaluated
from .tensors import TAKEN, latent_names, spec_of
from .trace import span
from .transfers import place

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A model's inputs beside latent and time step by name, (B, …) float32 each.

    `unconditional` may be None where no row of it is guided.
    channels: what follows the latent in its channels, (B, …, h, w) float32, where it reads more.
    whole: inputs that belong to no picture, of any shape.
    adapters: LoRAs, for a model that has slots for them.
    branch: which one `conditional` holds; another than it says where a worker has the other branch alone.
    """

    conditional: Mapping[str, Float32]
    unconditional: Mapping[str, Float32] | None = None
    channels: Float32 | None = None
    whole: Mapping[str, Float32] = field(default_factory=dict)
    adapters: Sequence[Adapter] = ()
    branch: Literal["conditional", "unconditional"] = "conditional"

    def label(self, name: str, *, guided: bool) -> str:
        """What a call of component `name` for one branch or both is called on a timeline."""
        return f"{name} ({'both' if guided else self.branch})"


@dataclass(slots=True)
class Bound:
    """A model's binding and those of its buffers that every row writes and reads.

    label: what its calls are called on a timeline.
    residuals: where ControlNets' results go by name, the middle one last; `steered` while they hold any.
    """

    label: str
    binding: Binding
    sample: Array
    timestep: Array
    residuals: Mapping[str, Array]
    steered: bool = False


def bind(
    name: str, session: Session, conditioning: Conditioning, shape: Shape, *, guided: bool, hands: bool = False
) -> Bound:
    """The buffers of component `name` for one or both guidance branches, with the conditioning already in place.

    shape: the latents', (B, C, h, w). hands: whether the sample and the prediction are left where the backend runs.

    Raises:
        ExecutionError: a guided row without unconditional branch, or the backend cannot allocate.
        BundleError: the shape of a residual does not follow from the latent's.
    """
    given = dict(conditioning.conditional)
    if guided:
        other = conditioning.unconditional
        if other is None:
            raise ExecutionError(name, "a guided row without an unconditional branch")
        given = {key: np.concatenate([other[key], values]) for key, values in given.items()}
    given.update(conditioning.whole)
    names, batch, channels = latent_names(session.inputs), shape[0] * (1 + guided), shape[1]
    more = 0 if conditioning.channels is None else conditioning.channels.shape[1]
    sample_shape = (batch, channels + more, *shape[2:])
    timestep = spec_of(session.inputs, "timestep")
    residuals = _residual_shapes(name, session.inputs, names.sample, sample_shape)
    shapes = {
        names.sample: sample_shape,
        "timestep": tuple(batch if isinstance(size, str) else size for size in timestep.shape) if timestep else (),
        **{key: values.shape for key, values in given.items()},
        **residuals,
    }
    session = serving(session, shapes)
    given.update(slot_inputs(session.inputs, conditioning.adapters))
    with span("bind", name):
        binding = session.bind({**shapes, **{key: values.shape for key, values in given.items()}})
    place(binding, {**given, **dict.fromkeys(residuals, 0.0)}, (names.sample, names.prediction) if hands else ())
    sample = binding.inputs[names.sample]
    if conditioning.channels is not None:
        sample[:, channels:] = np.concatenate([conditioning.channels] * (1 + guided))
    return Bound(
        conditioning.label(name, guided=guided),
        binding,
        sample[:, :channels],
        binding.inputs["timestep"],
        {residual: binding.inputs[residual] for residual in residuals},
    )


def _residual_shapes(name: str, inputs: tuple[TensorSpec, ...], latent: str, sample: Shape) -> dict[str, Shape]:
    """The shapes of a denoiser's residual inputs, in their order, for a latent of this shape."""
    by_name = {spec.name: spec for spec in inputs}
    if TAKEN.mid not in by_name:
        return {}
    sizes = {str(stated): size for stated, size in zip(by_name[latent].shape, sample, strict=True)}
    shapes: dict[str, Shape] = {}
    for residual in TAKEN.names(by_name):
        shape = evaluated(by_name[residual].shape, sizes)
        if shape is None:
            expected = f"formulas of {', '.join(sizes)}"
            raise BundleError(name, f"shape of {residual}", got=by_name[residual].shape, expected=expected)
        shapes[residual] = shape
    return shapes
