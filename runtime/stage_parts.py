"""The runs that a window of stages needs, each with its buffers and its text, bound before the first row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .backends.base import Array, Binding, Handed, Handing, Lying, Session, Shape
from .binding import Conditioning
from .errors import BundleError
from .manifest import TensorSpec
from .shapes import evaluated
from .stage_work import Pipelining
from .stages import CARRIED, call_sizes
from .tensors import latent_names
from .trace import span
from .transfers import place, take

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stages:
    """A denoiser's stages in their order, and the inputs of the whole. hands: as of `Worker`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    sessions: Sequence[Session]
    hands: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A stage's buffers; `sample` is the latent's place in them, where the stage has one.

    label: what its runs are called on a timeline. latent: what the stage calls the latent.
    """

    label: str
    binding: Binding
    sample: Array | None
    latent: str

    @property
    def makers(self) -> dict[str, Binding]:
        """The binding itself by everything that it makes, as `give` of other parts is handed it."""
        return dict.fromkeys(self.binding.outputs, self.binding)

    def give(self, sample: Float32 | Lying, timestep: float, handed: Mapping[str, Binding]) -> None:
        """Write what the next run reads; copies, so that what others hand on may change meanwhile.

        Raises:
            ExecutionError: see `take`.
        """
        carried = {name: handed[name] for name in self.binding.inputs if name.startswith(CARRIED)}
        lying = [sample.handed(self.latent)] if isinstance(sample, Lying) and self.sample is not None else []
        if lying or isinstance(self.binding, Handing):
            take(self.label, self.binding, [*(Handed(name, maker, name) for name, maker in carried.items()), *lying])
        else:
            for name, maker in carried.items():
                self.binding.inputs[name][...] = maker.outputs[name]
        if self.sample is not None and not isinstance(sample, Lying):
            self.sample[...] = sample
        if "timestep" in self.binding.inputs:
            self.binding.inputs["timestep"].fill(timestep)

    def run(self) -> None:
        with span("model", self.label):
            self.binding.run()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a window runs.

    own: every stage under the text that is its own in the window. conditional: those whose own text is the
    unconditional one, under the other, which fill the pipeline. again: the last stage once more, under a stride.
    prediction: what the last stage calls it.
    """

    own: tuple[Part, ...]
    conditional: tuple[Part, ...]
    again: Part | None
    prediction: str

    @property
    def chains(self) -> tuple[tuple[Part, ...], ...]:
        """What fills the pipeline: all stages under the conditional text, and under the other those that are read."""
        half = len(self.conditional)
        return (*self.conditional, *self.own[half:]), self.own[:half]


def bound_parts(
    stages: Stages, pipelining: Pipelining, conditioning: Conditioning, shape: Shape, before: Callable[[], None]
) -> Parts:
    """Bind what a window of latents of this shape, (B, C, h, w), needs.

    before: called before each stage is bound, and loaded where it was not; what it raises ends the binding.

    Raises:
        BundleError: the shape of an input does not follow from the latent's.
        EngineError: no engine of a stage takes these shapes, or it is damaged.
        ExecutionError: the backend cannot allocate.
    """

    def part(index: int, conditional: bool) -> Part:
        before()
        return _part(stages, index, conditioning, conditional, shape)

    count = len(stages.sessions)
    own = tuple(part(index, pipelining.conditional(index)) for index in range(count))
    filling = tuple(part(index, True) for index in range(count) if not pipelining.conditional(index))
    again = part(count - 1, True) if pipelining.stride > 1 else None
    return Parts(own, filling, again, latent_names(stages.inputs).prediction)


def _part(stages: Stages, index: int, conditioning: Conditioning, conditional: bool, shape: Shape) -> Part:
    """A stage's buffers under one text."""
    session = stages.sessions[index]
    text = conditioning.conditional if conditional else conditioning.unconditional or {}
    more = 0 if conditioning.channels is None else conditioning.channels.shape[1]
    latent = latent_names(stages.inputs).sample
    given = {name: values.shape for name, values in (*text.items(), *conditioning.whole.items())}
    given[latent] = (shape[0], shape[1] + more, *shape[2:])
    sizes = call_sizes((*stages.inputs, *session.inputs), given, shape[0])
    where = f"{stages.name}, stage {index + 1} of {len(stages.sessions)}"
    shapes = {spec.name: _evaluated(where, spec, sizes) for spec in session.inputs}
    with span("bind", where):
        binding = session.bind(shapes)
    handed = (latent, latent_names(stages.inputs).prediction) if stages.hands else ()
    left = [one for one in (*binding.inputs, *binding.outputs) if one.startswith(CARRIED) or one in handed]
    place(binding, {name: values for name, values in text.items() if name in binding.inputs}, left)
    sample = binding.inputs.get(latent)
    if sample is not None and conditioning.channels is not None:
        sample[:, shape[1] :] = conditioning.channels
    branch = "conditional" if conditional else "unconditional"
    return Part(f"{where} ({branch})", binding, None if sample is None else sample[:, : shape[1]], latent)


def _evaluated(where: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    shape = evaluated(spec.shape, sizes)
    if shape is None:
        raise BundleError(where, f"shape of {spec.name}", got=spec.shape, expected=f"formulas of {', '.join(sizes)}")
    return shape
