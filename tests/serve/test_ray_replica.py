"""A replica by itself, and one whose branch of guidance is another's: what befalls them, and who is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandemrt.runtime import BundleError, ExecutionError, Handover, Pipeline, Request
from tandemrt.serve import ray_replica
from tandemrt.serve.ray_replica import TEXT, Place, Replica

from .near import Beside, Near, replicas_at, spread
from .test_handoff import JOB


@pytest.fixture(scope="module")
def place(bundle: Path, pipe: Pipeline) -> Place:
    return Place(str(bundle), pipe.bundle.digest)


@pytest.fixture(scope="module")
def replicas(place: Place) -> Iterator[dict[str, Replica]]:
    with replicas_at(place) as made:
        yield made


@pytest.fixture(scope="module")
def beside(place: Place) -> Iterator[Beside]:
    replica = Replica(place, "unet", 1)
    yield Beside(replica)
    replica.close()


@pytest.fixture
def leading(place: Place, beside: Beside) -> Iterator[Replica]:
    """A replica whose branch without the prompt is another one's."""
    beside.how = "works"
    replica = Replica(place, "unet", 1, beside)
    yield replica
    replica.close()


def test_branches_on_two_replicas(
    pipe: Pipeline, replicas: dict[str, Replica], leading: Replica, beside: Beside
) -> None:
    with spread(pipe, Near({**replicas, "unet": leading}), apart=("unet",)) as client:
        beside.asked.clear()
        answer = client.post("/v1/handoff", json={**JOB, "until": 5})
        rest = pipe(**JOB, placement="sequential", until=2)
        wanted = pipe(**JOB, start=rest.handover, until=5)
        np.testing.assert_array_equal(Handover.from_bytes(answer.content).state, wanted.handover.state)
        assert beside.asked == ["unet", "unet"]


def test_what_befalls_a_branch_is_told_and_its_caller_stays_healthy(
    pipe: Pipeline, replicas: dict[str, Replica], leading: Replica, beside: Beside
) -> None:
    with spread(pipe, Near({**replicas, "unet": leading}), apart=("unet",)) as client:
        beside.how = "busy"
        answer = client.post("/v1/handoff", json={**JOB, "until": 2})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "busy")
        assert answer.headers["retry-after"] == "3"
        assert not leading._failed
        beside.how = "hangs"
        began = time.monotonic()
        answer = client.post("/v1/handoff", json={**JOB, "until": 2, "timeout": 0.3})
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline")
        assert time.monotonic() - began < 1.3
        asyncio.run(leading.check_health())
        assert not leading._failed
        beside.how = "works"
        assert client.post("/v1/handoff", json={**JOB, "until": 2}).status_code == 200


def test_who_leaves_does_not_wait_for_a_branch(pipe: Pipeline, leading: Replica, beside: Beside) -> None:
    beside.how = "hangs"
    beside.asked.clear()
    request = Request(**pipe.encode_prompt("red"), steps={"unet": 2}, until=2, seed=7, placement="parallel")

    async def left_s() -> float:
        painting = leading.paint(request, 60)
        asking = asyncio.ensure_future(painting.__anext__())
        while not beside.asked:
            await asyncio.sleep(0.01)
        began = time.monotonic()
        asking.cancel()
        await asyncio.wait([asking])
        return time.monotonic() - began

    assert asyncio.run(left_s()) < 1


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
