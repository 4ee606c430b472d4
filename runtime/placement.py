"""Where a denoiser's branches of guidance run: in one call, one after the other, or at once on two workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .architecture import usable_cpus
from .backends.base import Array, Handing, Lying, Session, Shape
from .binding import Bound, Conditioning, bind
from .control import Control, Running, Steering, steer
from .errors import RequestError, TandemError, TargetError
from .plan import Plan
from .targets import ENGINES_ONLY, Target
from .tensors import LatentNames, latent_names
from .trace import span
from .transfers import take

Float32 = npt.NDArray[np.float32]
Sessions = Mapping[str, Session]
Sample = Float32 | Lying
_NUMBERS = count(1)  # of crews, whose threads have lanes on a timeline


@dataclass(frozen=True, slots=True)
class Branches:
    """What a denoiser predicted in a row, (B, C, h, w) float32 each; the next row overwrites it.

    unconditional: None where the row ran no such branch. model_ms: the denoiser with its ControlNets, all branches.
    running: the row's ControlNets. why: where the placement decided that there is one branch.
    seen: told the discrepancy of both branches, where the placement goes by it. taus: of a row in Hybridiff's window.
    lying: the conditional and, where there is one, the unconditional prediction where they were made; the arrays above
        hold neither where the denoiser leaves them there.
    """

    conditional: Float32
    unconditional: Float32 | None
    model_ms: float
    running: Sequence[Running]
    placement: str
    why: str = ""
    seen: Callable[[float], None] | None = None
    taus: tuple[int, int] | None = None
    lying: Sequence[Lying] = ()


class Placed(Protocol):
    """Predicts a plan's rows; used by one thread at a time."""

    def bind(self, calls: Iterable[tuple[int, bool]], shape: Shape) -> None:
        """Have the buffers of these calls, of `Plan.calls`, for latents of this shape; `predict` makes what is missing.

        Raises:
            ExecutionError, BundleError: as of `predict`.
        """

    def predict(self, row: int, sample: Sample, *, guided: bool) -> Branches:
        """The row's prediction for the model's input `sample`, (B, C, h, w) float32, in one or both branches.

        Of a sample that lies where the denoisers run, with its further channels, the predictions are left there.

        Raises:
            ExecutionError: a model failed, or the backend cannot allocate.
            BundleError: a ControlNet's results are not what the denoiser takes.
        """

    def rest(self) -> None:
        """Let threads go; the next row starts them anew."""


class Worker:
    """A plan's denoisers with their ControlNets and buffers; used by one thread at a time.

    sessions, conditioning: of both kinds of models, by component. hands: whether all samples lie where the denoisers
    run, and their predictions are left there.
    """

    def __init__(
        self,
        plan: Plan,
        sessions: Sessions,
        conditioning: Mapping[str, Conditioning],
        controls: tuple[Control, ...] = (),
        *,
        hands: bool = False,
    ) -> None:
        self._hands = hands
        self._plan, self._sessions, self._conditioning, self._controls = plan, sessions, conditioning, controls
        self._steering = Steering(controls, sessions, conditioning) if controls else None
        self._calls: dict[tuple[str, bool], Call] = {}

    def unconditional(self) -> Worker:
        """Another that has the unconditional branch alone, in the conditional one's place."""
        alone = {
            name: replace(given, conditional=given.unconditional, unconditional=None, branch="unconditional")
            for name, given in self._conditioning.items()
            if given.unconditional is not None
        }
        return Worker(self._plan, self._sessions, alone, self._controls, hands=self._hands)

    def prepared(self, row: int, sample: Sample, *, guided: bool) -> Call:
        """The call that predicts a row for `sample`, in both branches where it is guided; its `run` does."""
        call, batch = self.call(row, sample.shape, guided=guided), sample.shape[0]
        call.give(sample, [0, batch] if guided else [0])
        call.timestep = float(self._plan.table.timesteps[row])
        call.bound.timestep.fill(call.timestep)
        return call

    def call(self, row: int, shape: Shape, *, guided: bool) -> Call:
        """The row's denoiser and ControlNets for latents of this shape, with buffers that are made once."""
        name = self._plan.denoisers[row]
        call = self._calls.get((name, guided)) or self._bound(name, shape, guided)
        if self._steering is not None:
            call.running = self._steering.running(call.bound, row, guided=guided)
        return call

    def _bound(self, name: str, shape: Shape, guided: bool) -> Call:
        session = self._sessions[name]
        bound = bind(name, session, self._conditioning[name], shape, guided=guided, hands=self._hands)
        self._calls[name, guided] = Call(bound, latent_names(session.inputs))
        return self._calls[name, guided]


@dataclass(slots=True)
class Call:
    """A denoiser's buffers, and what the row at hand asks of it.

    lies: whether what it is given lies where it runs.
    """

    bound: Bound
    names: LatentNames
    timestep: float = 0.0
    running: Sequence[Running] = ()
    lies: bool = False

    @property
    def prediction(self) -> Array:
        """(B or 2B, C, h, w) float32."""
        return self.bound.binding.outputs[self.names.prediction]

    def lying(self, first: int = 0) -> Lying:
        """The prediction where it was made, from a picture on."""
        return Lying(self.bound.binding, self.names.prediction, self.prediction.shape, first)

    def give(self, sample: Sample, at: Sequence[int]) -> None:
        """Write the denoiser's input to each of these places in its batch.

        Raises:
            ExecutionError: see `take`.
        """
        if isinstance(sample, Lying):
            take(self.bound.label, self.bound.binding, [sample.handed(self.names.sample, one) for one in at])
            self.lies = True
            return
        for one in at:
            self.bound.sample[one : one + len(sample)] = sample

    def run(self) -> None:
        if self.lies and self.running and isinstance(self.bound.binding, Handing):
            self.bound.binding.read(self.names.sample)  # for the ControlNets
        # What overflows is found in the prediction, where the row is known; on a worker's thread it would warn.
        with np.errstate(over="ignore", invalid="ignore"):
            steer(self.running, self.bound, self.timestep)
        with span("model", self.bound.label):
            self.bound.binding.run()


class Batched:
    """Both branches in one call of 2B rows, the unconditional ones first; see `Placed`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def bind(self, calls: Iterable[tuple[int, bool]], shape: Shape) -> None:
        """See `Placed`."""
        for row, guided in calls:
            self._worker.call(row, shape, guided=guided)

    def predict(self, row: int, sample: Sample, *, guided: bool) -> Branches:
        call = self._worker.prepared(row, sample, guided=guided)
        began = time.perf_counter()
        call.run()
        model_ms = (time.perf_counter() - began) * 1e3
        made, batch = call.prediction, sample.shape[0]
        unconditional = made[:batch] if guided else None
        lying = (call.lying(batch), call.lying()) if guided else (call.lying(),)
        return Branches(made[-batch:], unconditional, model_ms, call.running, "batched", lying=lying)

    def rest(self) -> None:
        """There are none."""


class Sequential:
    """A call of B rows for each branch, one after the other: half the memory for activations; see `Placed`."""

    def __init__(self, worker: Worker) -> None:
        self._conditional, self._unconditional = worker, worker.unconditional()

    def bind(self, calls: Iterable[tuple[int, bool]], shape: Shape) -> None:
        """See `Placed`."""
        for row, guided in calls:
            for worker in (self._conditional, *([self._unconditional] if guided else [])):
                worker.call(row, shape, guided=False)

    def predict(self, row: int, sample: Sample, *, guided: bool) -> Branches:
        calls = [self._conditional.prepared(row, sample, guided=False)]
        if guided:
            calls.append(self._unconditional.prepared(row, sample, guided=False))
        began = time.perf_counter()
        for call in calls:
            call.run()
        return _branches(calls, began, "sequential")

    def rest(self) -> None:
        """There are none."""


class Parallel:
    """A call of B rows for each branch, both at once; see `Placed`.

    both: of the rows with two, on sessions that take two calls at once.
    alone: of the rows with one, for which such a session has less to give. other: what the unconditional branch of rows
    with two runs on where it has a device to itself.
    """

    def __init__(self, both: Worker, alone: Worker, other: Worker | None = None) -> None:
        self._conditional, self._unconditional, self._alone = both, (other or both).unconditional(), alone
        self._crew = Crew(2)

    def bind(self, calls: Iterable[tuple[int, bool]], shape: Shape) -> None:
        """See `Placed`."""
        for row, guided in calls:
            for worker in (self._conditional, self._unconditional) if guided else (self._alone,):
                worker.call(row, shape, guided=False)

    def predict(self, row: int, sample: Sample, *, guided: bool) -> Branches:
        if not guided:
            call = self._alone.prepared(row, sample, guided=False)
            began = time.perf_counter()
            call.run()
            return _branches([call], began, "parallel")
        calls = [worker.prepared(row, sample, guided=False) for worker in (self._conditional, self._unconditional)]
        began = time.perf_counter()
        self._crew.run([call.run for call in calls])
        return _branches(calls, began, "parallel")

    def rest(self) -> None:
        """See `Placed`."""
        self._crew.rest()


class Crew:
    """The caller's thread and others beside it, `workers` in all, which start when they are first needed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._others: ThreadPoolExecutor | None = None

    def run(self, works: Sequence[Callable[[], object]]) -> None:
        """Do works at once, each on a thread of its own; no more than there are workers.

        At the end of all it returns, or raises what the first of them did that failed.
        """
        if self._others is None:
            self._others = ThreadPoolExecutor(self._workers - 1, f"tandemrt-branch-{next(_NUMBERS)}")
        begun = [self._others.submit(copy_context().run, work) for work in works[1:]]
        try:
            works[0]()
        finally:
            wait(begun)  # a run cannot be stopped, and its buffers must not be touched before it ends
        while begun:  # none is left behind in this frame, which an error's traceback holds, as the other way round
            begun.pop(0).result()

    def rest(self) -> None:
        """Let the threads go; the next works start them anew."""
        if self._others is not None:
            self._others.shutdown()
            self._others = None


def refusal(placement: str, target: Target, threads: int | None) -> TandemError | None:
    """Why a target cannot place branches so; None where it can.

    threads: how many CPU threads a model may use; None for all.
    """
    if placement not in ("parallel", "hybridiff") or target.backend in ENGINES_ONLY:
        return None
    if target.device != "cpu":
        return TargetError(
            "placement",
            "branches in parallel",
            got=str(target),
            expected="a target of a CPU, or a flavour of TensorRT",
            remedy="Ask for placement batched or sequential.",
        )
    workers = usable_cpus() if threads is None else min(threads, usable_cpus())
    if workers >= 2:
        return None
    return RequestError(
        "placement",
        "CPU threads for two workers",
        got=workers,
        expected="2 or more",
        remedy="Open the pipeline with more threads, or ask for placement batched or sequential.",
    )


def _branches(calls: Sequence[Call], began: float, placement: str) -> Branches:
    model_ms = (time.perf_counter() - began) * 1e3
    running = [one for call in calls for one in call.running]
    unconditional = calls[1].prediction if len(calls) > 1 else None
    lying = tuple(call.lying() for call in calls)
    return Branches(calls[0].prediction, unconditional, model_ms, running, placement, lying=lying)
