"""A picture's parts on replicas, without Ray: the bits of one process, whatever befalls a replica."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tandemrt.runtime import BundleError, ExecutionError, Handover, Output, Pipeline, Request, StepEvent
from tandemrt.runtime.targets import parse_target
from tandemrt.serve import ray_replica
from tandemrt.serve.app import application_of
from tandemrt.serve.limits import Limits
from tandemrt.serve.metrics import Metrics
from tandemrt.serve.problems import busy
from tandemrt.serve.ray_replica import DECODER, TEXT, LostError, Place, Replica
from tandemrt.serve.ray_spread import Spread
from tandemrt.serve.served import Served

from .test_handoff import JOB, message

DENOISERS = ("unet", "unet_free")


class Near:
    """Replicas of this process; what goes there and comes back is sent as between machines.

    lost: how many answers of each part are yet to be lost; a denoiser's after its first row.
    """

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self.replicas = replicas
        self.lost: dict[str, int] = {}
        self.asked: list[str] = []
        self.full, self.slow_s = False, 0

    async def encode(self, request: Request, seconds: float) -> Any:
        self.asked.append(TEXT)
        embeds = await self.replicas[TEXT].encode(sent(request), seconds)
        self._lose(TEXT)
        return sent(embeds)

    async def paint(self, part: str, request: Request, seconds: float) -> AsyncIterator[StepEvent | Output]:
        if self.full:
            raise busy(3)
        self.asked.append(part)
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


def sent(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture(scope="module")
def place(bundle: Path, pipe: Pipeline) -> Place:
    return Place(str(bundle), pipe.bundle.digest)


@pytest.fixture(scope="module")
def replicas(place: Place) -> Iterator[dict[str, Replica]]:
    made = {part: Replica(place, part, 1) for part in (TEXT, *DENOISERS, DECODER)}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def near(replicas: dict[str, Replica]) -> Near:
    return Near(replicas)


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


def shown(encoded: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(encoded))).tobytes()


def picture(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return shown(answer.json()["data"][0]["b64_json"])


@pytest.mark.parametrize("lost", [{}, {TEXT: 1, "unet": 1, "unet_free": 1, DECODER: 1}])
def test_pictures_are_those_of_one_process(lost: dict[str, int], pipe: Pipeline, near: Near) -> None:
    with spread(pipe, near) as client:
        near.lost = dict(lost)
        assert picture(client.post("/v1/images/generations", json=JOB)) == pipe(**JOB).images[0].tobytes()
        tries = 2 if lost else 1
        assert near.asked == [part for part in (TEXT, "unet", "unet_free", DECODER) for _ in range(tries)]
        told = client.get("/metrics").text
    assert 'tandemrt_rows_total{denoiser="unet"}' in told
    assert ('tandemrt_lost_total{part="unet"} 1.0' in told) == bool(lost)


def test_hand_overs_are_those_of_one_process(pipe: Pipeline, near: Near) -> None:
    with spread(pipe, near) as client:
        for until in (1, 3, 5):
            handover = Handover.from_bytes(client.post("/v1/handoff", json={**JOB, "until": until}).content)
            np.testing.assert_array_equal(handover.state, pipe(**JOB, until=until).handover.state)
        near.asked.clear()
        kind = {"content-type": "application/x-safetensors"}
        body = message(pipe(**JOB, until=2).handover, until=4)
        answer = client.post("/v1/handoff", content=body, headers=kind)
        assert near.asked == [TEXT, "unet_free"]
        np.testing.assert_array_equal(Handover.from_bytes(answer.content).state, pipe(**JOB, until=4).handover.state)
        whole = message(pipe(**JOB, until=5).handover, until=5)
        assert client.post("/v1/handoff", content=whole, headers=kind).status_code == 200


def test_each_row_is_told_once(pipe: Pipeline, near: Near) -> None:
    asked = {"prompt": "red", "steps": "unet:2,unet_free:3", "seed": 7, "previews": 2}
    with spread(pipe, near) as client:
        near.lost = {"unet": 1, "unet_free": 1}
        lines = client.get("/v1/images/stream", params=asked).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert events.pop(-2) == {"stage": "sampled"}
    assert [event["row"] for event in events[:-1]] == [0, 1, 2, 3, 4]
    assert [bool(event["previews"]) for event in events[:-1]] == [False, True, False, True, False]
    assert shown(events[-1]["b64_json"][0]) == pipe(**JOB).images[0].tobytes()


def test_branches_on_two_replicas(pipe: Pipeline, place: Place, replicas: dict[str, Replica]) -> None:
    other, ran = Replica(place, "unet", 1), []

    def elsewhere(name: str, inputs: Any) -> Any:
        ran.append(name)
        return sent(asyncio.run(other.run_component(name, sent(dict(inputs)), 10)))

    leading = Replica(place, "unet", 1, elsewhere)
    try:
        with spread(pipe, Near({**replicas, "unet": leading}), apart=("unet",)) as client:
            ran.clear()
            answer = client.post("/v1/handoff", json={**JOB, "until": 5})
            rest = pipe(**JOB, placement="sequential", until=2)
            wanted = pipe(**JOB, start=rest.handover, until=5)
            np.testing.assert_array_equal(Handover.from_bytes(answer.content).state, wanted.handover.state)
            assert ran == ["unet", "unet"]
    finally:
        leading.close()
        other.close()


@pytest.mark.parametrize("part", [TEXT, "unet", DECODER])
def test_who_loses_two_replicas_is_told(part: str, pipe: Pipeline, near: Near) -> None:
    with spread(pipe, near) as client:
        near.lost = {part: 2}
        answer = client.post("/v1/images/generations", json=JOB)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "replica_lost")
        assert int(answer.headers["retry-after"]) >= 1
        assert picture(client.post("/v1/images/generations", json=JOB)) == pipe(**JOB).images[0].tobytes()


def test_parts_that_are_full_and_parts_that_are_late(pipe: Pipeline, near: Near) -> None:
    with spread(pipe, near, Limits(running=1, waiting=0, seconds=20)) as client:
        near.full = True
        answer = client.post("/v1/images/generations", json=JOB)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        near.full = False
        near.slow_s = 5
        began = time.monotonic()
        answer = client.post("/v1/handoff", json={**JOB, "until": 2, "timeout": 0.05})
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline")
        assert time.monotonic() - began < 1.05
        near.slow_s = 0
        assert client.post("/v1/handoff", json={**JOB, "until": 1}).status_code == 200
        refused = client.post("/v1/handoff", json={**JOB, "until": 1, "negative_prompt": ["a", "b", "c"]})
        assert refused.status_code == 422


def test_another_bundle_on_a_machine(place: Place) -> None:
    with pytest.raises(BundleError, match=r"another bundle, got .* Put the same bundle on every machine"):
        Replica(Place(place.bundle, "0" * 64), TEXT, 1)


def test_a_replica_is_healthy_while_its_models_are(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(place, TEXT, 1)
    broken: list[str] = ["once"]
    encode = replica._pipe.encode_prompt

    def encoding(**arguments: Any) -> Any:
        if broken:
            raise ExecutionError("text_encoder", broken.pop())
        return encode(**arguments)

    async def walked() -> None:
        await replica.check_health()
        monkeypatch.setattr(replica._pipe, "encode_prompt", encoding)
        with pytest.raises(ExecutionError, match="once"):
            await replica.encode(Request(prompt="red"), 10)
        broken.append("again")
        with pytest.raises(ExecutionError, match="again"):
            await replica.check_health()
        await replica.check_health()
        monkeypatch.setattr(ray_replica, "HANGS_S", 0.05)
        monkeypatch.setattr(replica._pipe, "encode_prompt", lambda **_: time.sleep(0.4))
        with pytest.raises(ExecutionError, match="took longer than it may"):
            await replica.encode(Request(prompt="red"), 0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(ExecutionError, match="a call of a model should have ended"):
            await replica.check_health()

    try:
        asyncio.run(walked())
    finally:
        replica.close()
