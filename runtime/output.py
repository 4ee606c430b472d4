"""What a generation gives back: pictures, timings, and events on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from .cloud import CloudTiming
from .handover import Handover
from .plan import Plan, RowGuidance
from .ran_on import RanOn
from .text import DroppedText

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowTiming:
    """One row: its denoiser, how long that took in all branches, the whole row with it, what became of guidance.

    together: how many rows ran as one CUDA graph, of which it is one; they share their time equally.
    """

    denoiser: str
    model_ms: float
    total_ms: float
    guidance: RowGuidance
    together: int = 1


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a generation's time went, in milliseconds.

    image_ms: making an image to start from and those of ControlNets ready. What all of it took, `total_ms`, also holds
        the loading and binding of models before the first row, waiting for generations with other LoRAs where engines
        are refitted, and a server's steps, which are in none of the others.
    step_engines: whether the rows ran on step engines of the user's cache, one call each, or on the denoisers.
    ran_on: what each component ran on, by what its calls differed in; an engine that was there and not used is told.
    tried: where placement `auto` chose, what a guided row of each denoiser took together when it was tried, now or at
        another time, by placement.
    """

    text_ms: float
    image_ms: float
    rows: tuple[RowTiming, ...]
    decode_ms: float
    total_ms: float
    step_engines: bool
    ran_on: Mapping[str, tuple[RanOn, ...]]
    tried: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def together(cls, parts: Sequence[Timings]) -> Timings:
        """Those of a generation's parts as one's; the last part decodes."""
        names = dict.fromkeys(name for part in parts for name in part.ran_on)
        return cls(
            text_ms=sum(part.text_ms for part in parts),
            image_ms=sum(part.image_ms for part in parts),
            rows=tuple(row for part in parts for row in part.rows),
            decode_ms=parts[-1].decode_ms,
            total_ms=sum(part.total_ms for part in parts),
            step_engines=any(part.rows for part in parts) and all(part.step_engines for part in parts if part.rows),
            ran_on={
                name: tuple(dict.fromkeys(one for part in parts for one in part.ran_on.get(name, ()))) for name in names
            },
            tried={name: ms for part in parts for name, ms in part.tried.items()},
        )

    @property
    def denoise_ms(self) -> float:
        return sum(row.total_ms for row in self.rows)


@dataclass(frozen=True, slots=True)
class Output:
    """What a generation made.

    images: PIL images, or one (H, W, 3) float32 array each for `output_type="np"`, none for `latent`.
    latents: (pictures, C, h, w) float32, as the last row left them.
    seeds: for each picture the seed its noise was drawn with, so that a random one can be used again; the same number
        throughout where one seed was given for several pictures or none was: `seed=seeds[0]` repeats those.
    dropped_text: what was cut from prompts that were too long.
    loras: the components that each of the request's LoRAs changed, by the LoRA's path.
    handover: where it stands, for another to go on from, where the request said `until`; there are no images then.
    cloud: what each hand-over with a server took, also the one that failed. degraded: why steps that were a server's
        ran here, on a denoiser of this side; empty where they did not. `plan` has all steps as they ran, and `plan.ran`
        and `timings.rows` those rows of it that ran here.
    """

    images: tuple[Image.Image, ...] | tuple[Float32, ...]
    latents: Float32
    timings: Timings
    plan: Plan
    seeds: tuple[int, ...]
    dropped_text: tuple[DroppedText, ...]
    loras: Mapping[str, tuple[str, ...]]
    handover: Handover | None = None
    cloud: tuple[CloudTiming, ...] = ()
    degraded: str = ""

    def __repr__(self) -> str:
        return (
            f"<Output {len(self.images)} images, latents {self.latents.shape}, {self.timings.total_ms:.0f} ms"
            f"{' on step engines' if self.timings.step_engines else ''}, "
            f"seeds {self.seeds}, {len(self.dropped_text)} dropped texts, {self.plan!r}>"
        )


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A finished row of the plan: `row` of `rows`, the inference `step` it belongs to, and who ran it.

    preview: the pictures as the denoiser now expects them, where the request asked for previews; otherwise empty.
    """

    row: int
    rows: int
    step: int
    timestep: float
    timing: RowTiming
    preview: tuple[Image.Image, ...]
