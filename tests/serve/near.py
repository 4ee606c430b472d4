"""Parts of a pipeline on replicas of this process, without Ray, and a server before them."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from starlette.testclient import TestClient

from tandemrt.runtime import CancelledError, Output, Pipeline, Request, StepEvent
from tandemrt.runtime.bounded_socket import Bounds
from tandemrt.runtime.targets import parse_target
from tandemrt.serve.app import application_of
from tandemrt.serve.limits import Limits
from tandemrt.serve.metrics import Metrics
from tandemrt.serve.problems import busy
from tandemrt.serve.ray_replica import DECODER, TEXT, LostError, Place, Replica
from tandemrt.serve.ray_spread import Spread
from tandemrt.serve.served import Served

DENOISERS = ("unet", "unet_free")


class Near:
    """Replicas of this process; what goes there and comes back is sent as between machines.

    lost: how many answers of each part are yet to be lost; a denoiser's after its first row.
    """

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self.replicas = replicas
        self.lost: dict[str, int] = {}
        self.asked: list[str] = []
        self.full, self.late, self.slow_s = False, False, 0

    async def encode(self, request: Request, seconds: float) -> Any:
        self.asked.append(TEXT)
        assert request.start is None  # whose state texts do not need
        embeds = await self.replicas[TEXT].encode(sent(request), seconds)
        self._lose(TEXT)
        return sent(embeds)

    async def paint(self, part: str, request: Request, seconds: float) -> AsyncIterator[StepEvent | Output]:
        if self.full:
            raise sent(busy(3))
        self.asked.append(part)
        if self.late:
            time.sleep(seconds + 0.01)  # the server's clock has no turn meanwhile
            raise sent(CancelledError(part, "took longer than it may"))
        await asyncio.sleep(self.slow_s)
        replica = self.replicas[part]
        painting = replica.paint(sent(request), seconds)
        try:
            async for one in painting:
                yield sent(one)
                self._lose(part)
        finally:
            await painting.aclose()  # type: ignore[attr-defined]

    def _lose(self, part: str) -> None:
        if self.lost.get(part):
            self.lost[part] -= 1
            raise LostError(part, "its replica is gone")


class Beside:
    """A branch's replica, which works, has too many who wait for it, or hangs for as long as the request may run."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.how = "works"
        self.asked: list[str] = []

    def __call__(self, name: str, inputs: Any, bounds: Bounds) -> Any:
        self.asked.append(name)
        if self.how == "busy":
            raise sent(busy(3))
        began = time.monotonic()
        while self.how == "hangs":
            if bounds.over:
                raise CancelledError(name, "its branch took longer than it may")
            assert time.monotonic() < began + 10
            time.sleep(0.01)
        return sent(asyncio.run(self.replica.run_component(name, sent(dict(inputs)), bounds.left_s)))


def sent(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@contextmanager
def replicas_at(place: Place) -> Iterator[dict[str, Replica]]:
    """One of each part."""
    made = {part: Replica(place, part, 1) for part in (TEXT, *DENOISERS, DECODER)}
    try:
        yield made
    finally:
        for one in made.values():
            one.close()


@contextmanager
def spread(
    pipe: Pipeline, near: Near, limits: Limits | None = None, apart: tuple[str, ...] = ()
) -> Iterator[httpx.Client]:
    limits, metrics = limits or Limits(running=4), Metrics()
    served = Served.on(pipe.bundle, parse_target("onnxruntime:cpu"))
    painter = Spread(served.manifest, near, limits, metrics, apart)
    with TestClient(application_of(painter, served, limits, None, metrics)) as client:
        while client.get("/v2/health/ready").status_code != 200:
            time.sleep(0.01)
        near.asked.clear()
        yield client
