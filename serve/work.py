"""What is painted for a caller: his request, checked, and who paints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from tandemrt.runtime import Output, Request, StepEvent
from tandemrt.runtime.manifest import Manifest
from tandemrt.runtime.plan import Plan, Schedule, compile_plan
from tandemrt.runtime.stream import Stage

from .limits import Limits
from .problems import conflict
from .protocol import Asked, request_of, require_within
from .served import Served

Seen = Callable[[StepEvent | Stage], None]


@dataclass(frozen=True, slots=True)
class Work:
    """A request within the limits, and what it comes to.

    plan: of `Served.known` steps. shape: of its latents, (pictures, C, h, w).
    """

    request: Request
    plan: Plan
    shape: tuple[int, int, int, int]


class UncompiledError(Exception):
    """A plan is wanted that has yet to be compiled."""


class Painter(Protocol):
    """Paints for callers, each in his turn; of one event loop."""

    @property
    def unready(self) -> str:
        """Why no request is taken; empty where one is."""

    async def warm_up(self, request: Request) -> None:
        """Paint a picture, and be ready."""

    def drain(self) -> None:
        """Take no further request."""

    async def close(self) -> None:
        """Wait until what was taken has ended."""

    def require_room(self) -> None:
        """Raise Problem where no request would be taken now: before its body is read."""

    async def painted(self, work: Work, seconds: float, seen: Seen | None = None) -> Output:
        """What a request makes, when it is its turn; the caller's own cancellation ends its work.

        seen: called with each row and stage, on the event loop.

        Raises:
            Problem: not ready, too many wait, or it took longer than so many seconds.
            TandemError: as a call of the pipeline.
        """


def work_of(asked: Asked, tensors: dict[str, Any], served: Served, limits: Limits, *, compiling: bool = True) -> Work:
    """What is asked for, checked.

    compiling: whether its plan is compiled where it has not been, which may take longer than an event loop has time.

    Raises:
        UncompiledError: the plan has not been, and is not to be now.
        Problem: a limit is passed, or another model, bundle or plan is wanted.
        RequestError, PlanError: an argument cannot be used.
    """
    served.require(asked.model)
    served.require_models(asked.models or {})
    request = request_of(asked, tensors, served.digest, limits)
    schedule, manifest = replace(request.schedule, steps=served.known(request.steps)), served.manifest
    plan = _compiled(_Wanted(id(manifest), repr(schedule), manifest, schedule), compiling=compiling)
    if asked.plan not in (None, plan.digest):
        raise conflict(f"plan: got {str(asked.plan)[:16]!r}, expected {plan.digest[:16]!r}, which the request makes.")
    shape = request.latent_shape(manifest, tuple(dict.fromkeys(plan.denoisers)))
    require_within(plan.table.rows, shape, manifest.latent.downsampling, limits)
    return Work(request, plan, shape)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A plan of a bundle's; as another one where it is of the same bundle, which it keeps, and told the same."""

    bundle: int
    told: str
    manifest: Manifest = field(compare=False)
    schedule: Schedule = field(compare=False)


@lru_cache(maxsize=64)
def _kept(_: _Wanted) -> list[Plan]:
    """Where a plan is kept once it is compiled: most callers ask for the same."""
    return []


def _compiled(wanted: _Wanted, *, compiling: bool) -> Plan:
    """As `compile_plan`, unless it is kept; UncompiledError where it is neither kept nor to be compiled."""
    kept = _kept(wanted)
    if not kept:
        if not compiling:
            raise UncompiledError
        kept.append(compile_plan(wanted.manifest, wanted.schedule))
    return kept[0]
