"""What a checked request makes: its texts, its rows, its pictures."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from PIL import Image

from .auto_placement import AutoPlacement
from .binding import Conditioning
from .bundle import Bundle
from .conditioning import conditioned
from .control import Control
from .editing import Beginning, Editing, begin
from .errors import CancelledError
from .handover import Handover, handed_over
from .images import Float32, image_from_pixels
from .loras import Fitted
from .models import Models
from .noise import Noise
from .output import Output, RowTiming, StepEvent, Timings
from .plan import Plan
from .pool import Lease
from .ran_on import Ran
from .request import Request
from .rows import Rows
from .sampler import SampledRow
from .sampling import open_loop
from .state import State
from .step_engines import StepEngines
from .stream import Events, Stage
from .text import DroppedText
from .trace import span

Stop = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request and what follows from it; `size` is the pictures' height and width.

    whole: all of the plan, of which `plan` is the rows from `first` on that this generation runs.
    """

    request: Request
    whole: Plan
    first: int
    plan: Plan
    size: tuple[int, int]
    noise: Noise
    editing: Editing | None
    controls: tuple[Control, ...]
    loras: Fitted
    decoder: str
    preview_decoder: str
    at_once: bool

    def beginning(self, latents: Float32) -> State:
        """The state before the first row, where the whole plan begins at these latents.

        The noise that rows before drew elsewhere is drawn here too, so that the next row draws what it would have.
        """
        if self.request.start is None:
            return State.begin(self.plan.table, latents)
        for _ in range(int(self.whole.table.draws_noise[: self.first].sum())):
            self.noise.draw()
        return State(self.request.start.state.copy())


@dataclass(frozen=True, slots=True)
class Painter:
    """What jobs of a bundle are painted with."""

    bundle: Bundle
    models: Models
    steps: StepEngines
    auto: AutoPlacement

    def painted(self, job: Job, cancelled: threading.Event, lease: Lease, asked: float) -> Events:
        """Run a job, one event a row; asked: when it was asked for, of time.perf_counter.

        Raises:
            CancelledError: it was cancelled, or the models were closed.
            ExecutionError: a model failed, or returned NaN or Inf.
        """
        plan = job.plan
        timings: list[RowTiming] = []
        ran = Ran(lease)

        def stop() -> None:
            self.models.require_open()
            if cancelled.is_set():
                raise CancelledError("generation", f"cancelled after row {len(timings)} of {plan.table.rows}")

        stop()
        began = time.perf_counter()
        with span("text"):
            conditioning, dropped = self._conditioned(job, stop, ran)
        text_ms, encoding = _since(began), time.perf_counter()
        beginning = self._begun(job, conditioning, stop, ran)
        image_ms = _since(encoding)
        yield Stage.ENCODED
        conditioning = job.loras.beside(beginning.behind(conditioning))
        space = self.bundle.manifest.latent
        rows = Rows(
            plan, conditioning, job.noise.fill, beginning.kept_from(job.first), job.controls, job.loras, ran,
            job.at_once, (space.scaling_factor, space.shift_factor),
        )  # fmt: skip
        loop, fused = open_loop(rows, job.noise.shape, self.models, self.steps, self.auto, before=stop)
        stop()
        state = job.beginning(beginning.latents)
        for done in loop.run(state):
            name = plan.denoisers[done.row]
            timings.append(RowTiming(name, done.model_ms, done.total_ms, done.guidance, done.together))
            yield self._event(job, done, timings[-1], stop, ran)
            stop()
        yield Stage.SAMPLED
        decoding, latents = time.perf_counter(), state.latents
        pixels = self._pixels(job, latents, state, stop, ran)
        spent = Timings(
            text_ms, image_ms, tuple(timings), _since(decoding), _since(asked), fused and bool(timings),
            ran.by_component(), ran.tried,
        )  # fmt: skip
        return Output(
            _images(pixels) if job.request.output_type == "pil" else pixels,
            latents,
            spent,
            plan.having_run([row.guidance for row in timings]),
            job.noise.seeds,
            dropped,
            job.loras.applied,
            self._handover(job, state),
        )

    def _conditioned(self, job: Job, stop: Stop, ran: Ran) -> tuple[dict[str, Conditioning], tuple[DroppedText, ...]]:
        """What the texts make of the plan's denoisers' and ControlNets' inputs, and the text that was cut."""
        plan, strict = job.plan, job.request.strict_prompts
        if not plan.table.rows:  # all of them ran where the hand-over came from
            return {}, ()
        encode = functools.partial(self.models.encode_texts, job.loras, strict=strict, before=stop, ran=ran)
        names = dict.fromkeys((*plan.denoisers, *(control.component for control in job.controls)))
        return conditioned(job.request, self.bundle.manifest, plan, names, job.size, encode)

    def _begun(self, job: Job, conditioning: dict[str, Conditioning], stop: Stop, ran: Ran) -> Beginning:
        """What the plan begins at; what ControlNets read is put into their `conditioning`."""
        encode = functools.partial(self.models.encode_pictures, before=stop, ran=ran)
        with span("pictures"):
            beginning = begin(job.editing, job.whole, job.noise, encode, job.request.latents)
        for control in job.controls:
            name = control.component
            conditioning[name] = control.conditioning(conditioning[name], job.request.pictures)
        return beginning

    def _event(self, job: Job, done: SampledRow, timing: RowTiming, stop: Stop, ran: Ran) -> StepEvent:
        """A row's event, with a preview where it is due."""
        every, row, table = job.request.previews, job.first + done.row, job.plan.table
        preview: tuple[Image.Image, ...] = ()
        if every and (row + 1) % every == 0 and done.denoised is not None:
            with span("preview", row):
                preview = _images(self.models.decode(job.preview_decoder, done.denoised(), before=stop, ran=ran))
        step, timestep = int(table.steps[done.row]), float(table.timesteps[done.row])
        return StepEvent(row, job.whole.table.rows, step, timestep, timing, preview)

    def _pixels(self, job: Job, latents: Float32, state: State, stop: Stop, ran: Ran) -> tuple[Float32, ...]:
        """The pictures of the last state, (H, W, 3) each, where the request wants any."""
        wanted = job.request.output_type != "latent" and job.request.until is None
        with span("decode"):
            scaled = state.held if state.scaled else None
            decoded = self.models.decode(job.decoder, latents, before=stop, ran=ran, scaled=scaled)
            return tuple(decoded) if wanted else ()

    def _handover(self, job: Job, state: State) -> Handover | None:
        until, start, bundle = job.request.until, job.request.start, self.bundle
        if until is None:
            return None
        before = {} if start is None else start.models
        own = {name: bundle.manifest.model_digest(name) for name in dict.fromkeys(job.plan.denoisers)}
        return handed_over(job.whole, until, state.arrays, bundle.digest, job.noise.seed, {**before, **own})


def _images(pixels: Iterable[Float32]) -> tuple[Image.Image, ...]:
    return tuple(image_from_pixels(picture) for picture in pixels)


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
