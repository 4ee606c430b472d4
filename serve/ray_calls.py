"""How the parts of a pipeline ask each other, through Ray Serve's handles; what goes wrong there in our words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from tandemrt.runtime import CancelledError, Output, Request, StepEvent
from tandemrt.runtime.backends.base import Array
from tandemrt.runtime.bounded_socket import Bounds

from .problems import busy, unready
from .ray_replica import TEXT, Encoded, LostError

# How often who waits for a branch looks whether the request has ended meanwhile.
_LOOKS_S = 0.05


class Handles:
    """The parts of a pipeline by name, asked through their deployments' handles; see `Calls`."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        self._handles = handles

    async def encode(self, request: Request, seconds: float) -> Encoded:
        """See `Calls`."""
        response = self._handles[TEXT].encode.remote(request, seconds)
        try:
            with told_apart(TEXT):
                encoded: Encoded = await response
                return encoded
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def paint(self, part: str, request: Request, seconds: float) -> AsyncIterator[StepEvent | Output]:
        """See `Calls`."""
        response = self._handles[part].options(stream=True).paint.remote(request, seconds)
        try:
            with told_apart(part):
                async for one in response:
                    yield one
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise


class Branch:
    """What runs a branch of guidance on a replica of its own; see `tandemrt.serve.ray_replica.Remote`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __call__(self, name: str, inputs: Mapping[str, Array], bounds: Bounds) -> Mapping[str, Array]:
        """Run a component there; what runs on there when the bounds are passed is cancelled.

        Raises:
            CancelledError: the bounds are passed.
            Problem: too many wait for it, or it could not be deployed.
            LostError: two replicas that were asked are gone.
            TandemError: as `Pipeline.run_component`.
        """
        try:
            return self._made(name, inputs, bounds)
        except LostError:
            return self._made(name, inputs, bounds)

    def _made(self, name: str, inputs: Mapping[str, Array], bounds: Bounds) -> Mapping[str, Array]:
        with told_apart(name):
            response = self._handle.run_component.remote(name, dict(inputs), bounds.left_s)
            while not bounds.over:
                if (made := _made_by_now(response)) is not None:
                    return made
            response.cancel()
        raise CancelledError(name, "its branch on another replica took longer than it may, or was cancelled")


def _made_by_now(response: Any) -> Mapping[str, Array] | None:
    """What a branch made; None where it has not yet."""
    try:
        made: Mapping[str, Array] = response.result(timeout_s=_LOOKS_S)
    except RayTaskError:  # which may be a TimeoutError too, one that was raised there
        raise
    except TimeoutError:
        return None
    return made


@contextmanager
def told_apart(part: str) -> Iterator[None]:
    """Ray's errors in our words: a part's own as they were raised there, LostError where nobody was left to.

    Raises:
        Problem: too many wait for the part, or it could not be deployed.
        LostError: its replica is gone.
    """
    try:
        yield
    except BackPressureError as full:
        raise busy(max(1, math.ceil(full.retry_after_s or 1))) from full
    except DeploymentUnavailableError as missing:
        raise unready(f"{part} is not deployed") from missing
    except RayTaskError as failed:
        if isinstance(failed.cause, RayError) or not isinstance(failed.cause, Exception):
            raise LostError(part, "what its replica was given, or made, is gone") from failed
        raise failed.cause from None
    except (RayError, ReplicaUnavailableError) as gone:
        raise LostError(part, f"its replica is gone ({type(gone).__name__})") from gone


def threads_here() -> int:
    """How many CPUs Ray has given to this replica: 1 at least."""
    import ray  # noqa: PLC0415

    resources: Mapping[str, Any] = ray.get_runtime_context().get_assigned_resources()
    return max(1, int(resources.get("CPU", 1)))
