"""What the stages of a cut denoiser do at each step of a stale pipeline, as AsyncDiff has it.

At a step of the pipeline all stages run at once: the first on this step's latent, each other one on what the stages
before it made when they last ran. Skip connections too are as old as that, however far they reach. With a stride of 2
the stages run at every second step, and the last of them for two time steps: for this step's prediction on a worker
more, and for the next one's.

Sources: czg1225/AsyncDiff, `asyncdiff/async_sd.py` (`run_mode`, `cache_sync`, `unet_forward`); kaist-dmlab/Hybridiff,
`hybridiff/hybrid_sd.py` (which text). There, parity is that of the step; here, that of its place in the window, as with
AsyncDiff's own first step as the warm-up. The step that fills the pipeline has its own time step, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import PlanError
from .stages import MOST_STAGES

STRIDES = (1, 2)


@dataclass(frozen=True, slots=True)
class Pipelining:
    """How many stages, how often they run, and whether they are given the time step before; checked where it is made.

    Raises:
        PlanError: a value out of range.
    """

    stages: int = 2
    stride: int = 1
    time_shift: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.stages <= MOST_STAGES:
            expected = f"2..{MOST_STAGES}"
            raise PlanError("placement_config: model_n", "stages of a pipeline", got=self.stages, expected=expected)
        if self.stride not in STRIDES:
            raise PlanError("placement_config: stride", "out of range", got=self.stride, expected="1 or 2")

    @property
    def workers(self) -> int:
        """How many run at once."""
        return self.stages + self.stride - 1

    def calls(self, stage: int) -> int:
        """How many runs of a stage may be at once: those with the unconditional text fill the pipeline under both."""
        again = self.stride > 1 and stage == self.stages - 1
        return 2 if again or not self.conditional(stage) else 1

    def conditional(self, stage: int) -> bool:
        """Whether a stage is given the conditional text: the second half of them is, the first the unconditional."""
        return stage >= self.stages // 2

    def devices(self, count: int) -> tuple[int, ...]:
        """On which of so many devices each stage runs: where outside the window the branch of its text does."""
        return tuple(0 if count == 1 or self.conditional(stage) else 1 for stage in range(self.stages))


@dataclass(frozen=True, slots=True)
class StageWork:
    """A step of the pipeline.

    time_of: the step whose time step all stages are given; None where none runs. again: that of a further run of the
    last stage on the same activations. The prediction is what that run makes; without one what the last stage makes, or
    made at the step before.
    """

    time_of: int | None = None
    again: int | None = None


def window_work(pipelining: Pipelining, first: int, last: int, steps: int) -> Iterator[tuple[int, StageWork]]:
    """The steps behind the one that fills the pipeline, `first`, to `last`, of a run of `steps`."""
    shift = int(pipelining.time_shift)
    for step in range(first + 1, last + 1):
        if pipelining.stride == 1:
            yield step, StageWork(step - shift)
        elif (step - first) % 2:
            ahead = min(step + 1, steps - 1)
            yield step, StageWork(ahead - shift, step - shift)
        else:
            yield step, StageWork()
