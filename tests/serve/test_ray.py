"""A picture's parts on replicas, without Ray: the bits of one process, whatever befalls a replica."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tandemrt.runtime import CancelledError, Handover, Pipeline, Request
from tandemrt.serve.limits import Limits
from tandemrt.serve.metrics import Metrics
from tandemrt.serve.ray_replica import DECODER, TEXT, Place, Replica
from tandemrt.serve.ray_spread import Spread

from .asking import decoded, events_of, pictures_of
from .conftest import run_apart
from .near import Near, replicas_at, sent, spread
from .test_handoff import JOB, message


@pytest.fixture(scope="module")
def place(bundle: Path, pipe: Pipeline) -> Place:
    return Place(str(bundle), pipe.bundle.digest)


@pytest.fixture(scope="module")
def replicas(place: Place) -> Iterator[dict[str, Replica]]:
    with replicas_at(place) as made:
        yield made


@pytest.fixture
def near(replicas: dict[str, Replica]) -> Near:
    return Near(replicas)


def picture(answer: httpx.Response) -> bytes:
    return bytes(pictures_of(answer)[0].tobytes())


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


def test_what_is_cut_from_texts_is_told(pipe: Pipeline, near: Near) -> None:
    long = {**JOB, "prompt": "red " * 200}
    with spread(pipe, near) as client:
        told = client.post("/v1/images/generations", json=long).json()["dropped"]
        strict = client.post("/v1/handoff", json={**long, "until": 2, "strict_prompts": True})
    assert told
    assert told == json.loads(json.dumps([asdict(one) for one in pipe(**long).dropped_text]))
    assert (strict.status_code, strict.json()["error"]["type"]) == (422, "unusable")


def test_each_row_is_told_once(pipe: Pipeline, near: Near) -> None:
    asked = {"prompt": "red", "steps": "unet:2,unet_free:3", "seed": 7, "previews": 2}
    with spread(pipe, near) as client:
        near.lost = {"unet": 1, "unet_free": 1}
        events = [facts for _, facts in events_of(client.get("/v1/images/stream", params=asked))]
    assert events.pop(-2) == {"stage": "sampled"}
    assert [event["row"] for event in events[:-1]] == [0, 1, 2, 3, 4]
    shown_after = {event["row"] for event in events[:-1] if event["previews"]}
    assert 3 in shown_after <= {1, 3}  # who reads late is given the last alone
    assert decoded(events[-1]["b64_json"][0]).tobytes() == pipe(**JOB).images[0].tobytes()


@pytest.mark.parametrize("part", [TEXT, "unet", DECODER])
def test_who_loses_two_replicas_is_told(part: str, pipe: Pipeline, near: Near) -> None:
    with spread(pipe, near) as client:
        near.lost = {part: 2}
        answer = client.post("/v1/images/generations", json=JOB)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "replica_lost")
        assert int(answer.headers["retry-after"]) >= 1
        assert picture(client.post("/v1/images/generations", json=JOB)) == pipe(**JOB).images[0].tobytes()


class LateAtFirst(Near):
    """Whose machines come up later than a picture may take."""

    tries = 0

    async def encode(self, request: Request, seconds: float) -> Any:
        self.tries += 1
        if self.tries == 1:
            raise sent(CancelledError(TEXT, "waited for longer than it may take"))
        return await super().encode(request, seconds)


def test_parts_that_come_late_are_waited_for(pipe: Pipeline, replicas: dict[str, Replica]) -> None:
    near = LateAtFirst(replicas)

    async def run() -> None:
        painter = Spread(pipe.manifest, near, Limits(running=4), Metrics())
        await painter.warm_up(Request(prompt="", seed=0))
        assert (painter.unready, near.tries) == ("", 2)

    run_apart(run())


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
        near.slow_s, near.late = 0, True
        answer = client.post("/v1/handoff", json={**JOB, "until": 2, "timeout": 0.05})
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline")
        near.late = False
        assert client.post("/v1/handoff", json={**JOB, "until": 1}).status_code == 200
        refused = client.post("/v1/handoff", json={**JOB, "until": 1, "negative_prompt": ["a", "b", "c"]})
        assert refused.status_code == 422
