"""Hybridiff's placement: branches in parallel and, within a window, the denoiser's stages all at once.

Within the window each stage works on what the stages before it made a step ago, the first ones under the unconditional
text, the others under the conditional one, and what comes out serves both branches; see `stage_work`.

Source: kaist-dmlab/Hybridiff, `hybridiff/hybrid_sd.py` and its pipelines (CVPR 2026).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from .backends.base import Array, Binding, Session, Shape
from .binding import Conditioning
from .discrepancy import Discrepancy
from .errors import BundleError
from .manifest import TensorSpec
from .placement import Branches, Crew, Placed
from .plan import Plan
from .shapes import evaluated
from .stage_work import StageWork, window_work
from .stages import CARRIED
from .tensors import latent_names
from .trace import span
from .window import Window

Float32 = npt.NDArray[np.float32]
_WINDOW = "in the window: one prediction serves both branches"


@dataclass(frozen=True, slots=True)
class Stages:
    """A denoiser's stages in their order, and the inputs of the whole."""

    name: str
    inputs: tuple[TensorSpec, ...]
    sessions: Sequence[Session]


class Hybridiff:
    """A plan's rows in and out of the window; see `Placed`. One generation's.

    outside: predicts rows that run both branches whole.
    """

    def __init__(
        self, plan: Plan, window: Window, outside: Placed, stages: Stages, conditioning: Mapping[str, Conditioning]
    ) -> None:
        self._plan, self._window, self._outside, self._stages = plan, window, outside, stages
        self._conditioning = conditioning[stages.name]
        self._discrepancy = Discrepancy(window.taus, plan.table.rows)
        self._work: dict[int, StageWork] = {}
        self._crew = Crew()
        # By stage and whether the text is the conditional one; the run that the last stage has more under a stride.
        self._parts: dict[tuple[int, bool], _Part] = {}
        self._again: _Part | None = None

    def predict(self, row: int, sample: Float32, *, guided: bool) -> Branches:
        """See `Placed`."""
        phase = self._discrepancy.phase(row)
        if phase == "branches":
            made = self._outside.predict(row, sample, guided=guided)
            if made.unconditional is not None:
                apart = self._discrepancy.measured(made.conditional, made.unconditional)
                self._discrepancy.record(row, apart)
                made = replace(made, discrepancy=apart)
            return made
        if phase == "fill":
            self._bind(sample.shape)
            last = self._discrepancy.steps[-1]
            self._work = dict(window_work(self._window.pipelining, row, last, self._plan.table.rows))
            return self._filled(row, sample)
        return self._pipelined(self._work[row], sample)

    def rest(self) -> None:
        """See `Placed`."""
        self._outside.rest()
        self._crew.rest()

    def _filled(self, row: int, sample: Float32) -> Branches:
        """Both texts run through the stages at once; each stage hands on what it made under its own."""
        began = time.perf_counter()
        chains = [partial(self._chain, conditional, sample, self._time(row)) for conditional in (True, False)]
        self._crew.run(chains)
        return self._branches(self._own(-1), began, "filling")

    def _chain(self, conditional: bool, sample: Float32, timestep: float) -> None:
        """Run the stages one after the other under one text, those whose results under it are read."""
        handed: dict[str, Array] = {}
        for index in range(len(self._stages.sessions)):
            if not conditional and self._window.pipelining.conditional(index):
                break
            part = self._parts[index, conditional]
            part.give(sample, timestep, handed)
            part.run()
            handed.update(part.binding.outputs)

    def _pipelined(self, work: StageWork, sample: Float32) -> Branches:
        """All stages at once, each on what was handed on before."""
        began = time.perf_counter()
        own = [self._own(index) for index in range(len(self._stages.sessions))]
        if work.time_of is None:
            return self._branches(own[-1], began, "held")
        handed = {name: array for part in own for name, array in part.binding.outputs.items()}
        for part in own:
            part.give(sample, self._time(work.time_of), handed)
        again = None
        if work.again is not None:
            again = self._again = self._again or self._part(len(own) - 1, True, sample.shape)
            again.give(sample, self._time(work.again), handed)
        running = own if again is None else [*own, again]
        self._crew.run([part.run for part in running])
        return self._branches(running[-1], began, "pipelined")

    def _branches(self, part: _Part, began: float, placement: str) -> Branches:
        model_ms = (time.perf_counter() - began) * 1e3
        prediction = part.binding.outputs[latent_names(self._stages.inputs).prediction]
        return Branches(prediction, None, model_ms, (), placement, _WINDOW, taus=self._discrepancy.found)

    def _own(self, index: int) -> _Part:
        """A stage under the text that is its own in the window."""
        index %= len(self._stages.sessions)
        return self._parts[index, self._window.pipelining.conditional(index)]

    def _time(self, row: int) -> float:
        return float(self._plan.table.timesteps[row])

    def _bind(self, shape: Shape) -> None:
        for index in range(len(self._stages.sessions)):
            own = self._window.pipelining.conditional(index)
            for conditional in (True,) if own else (True, False):
                self._parts[index, conditional] = self._part(index, conditional, shape)

    def _part(self, index: int, conditional: bool, shape: Shape) -> _Part:
        """A stage's buffers under one text, for latents of this shape.

        Raises:
            BundleError: the shape of an input does not follow from the latent's.
            ExecutionError: the backend cannot allocate.
        """
        stages, session, conditioning = self._stages, self._stages.sessions[index], self._conditioning
        text = conditioning.conditional if conditional else conditioning.unconditional or {}
        more = 0 if conditioning.channels is None else conditioning.channels.shape[1]
        latent = latent_names(stages.inputs).sample
        whole = {**text, **conditioning.whole, latent: np.empty((shape[0], shape[1] + more, *shape[2:]), np.float32)}
        sizes = {
            str(stated): size
            for spec in stages.inputs
            if spec.name in whole
            for stated, size in zip(spec.shape, whole[spec.name].shape, strict=True)
        }
        # A time step for each picture, whatever its size is called; `bind` does so too.
        sizes |= {str(size): shape[0] for spec in session.inputs if spec.name == "timestep" for size in spec.shape}
        where = f"{stages.name}, stage {index + 1} of {len(stages.sessions)}"
        shapes = {spec.name: _evaluated(where, spec, sizes) for spec in session.inputs}
        with span("bind", where):
            binding = session.bind(shapes)
        for name, values in text.items():
            if name in binding.inputs:
                binding.inputs[name][...] = values
        sample = binding.inputs.get(latent)
        if sample is not None and conditioning.channels is not None:
            sample[:, shape[1] :] = conditioning.channels
        branch = "conditional" if conditional else "unconditional"
        return _Part(f"{where} ({branch})", binding, None if sample is None else sample[:, : shape[1]])


@dataclass(frozen=True, slots=True)
class _Part:
    """A stage's buffers; `sample` is the latent's place in them, where the stage has one.

    label: what its runs are called on a timeline.
    """

    label: str
    binding: Binding
    sample: Array | None

    def give(self, sample: Float32, timestep: float, handed: Mapping[str, Array]) -> None:
        """Write what the next run reads; copies, so that what others hand on may change meanwhile."""
        for name, array in self.binding.inputs.items():
            if name.startswith(CARRIED):
                array[...] = handed[name]
        if self.sample is not None:
            self.sample[...] = sample
        if "timestep" in self.binding.inputs:
            self.binding.inputs["timestep"].fill(timestep)

    def run(self) -> None:
        with span("model", self.label):
            self.binding.run()


def _evaluated(where: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    shape = evaluated(spec.shape, sizes)
    if shape is None:
        raise BundleError(where, f"shape of {spec.name}", got=spec.shape, expected=f"formulas of {', '.join(sizes)}")
    return shape
