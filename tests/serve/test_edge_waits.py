"""How long a device waits for its server, whatever it waits for, and over which connections."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from tandemrt.runtime import CancelledError, Cloud, ExecutionError, Pipeline, TandemError, cloud, there
from tandemrt.runtime.bounded_socket import Bounds
from tandemrt.runtime.cloud import JSON
from tandemrt.runtime.connections import KEPT_S, TIMEOUT_HEADER
from tandemrt.runtime.errors import CloudError
from tandemrt.serve.patience import PATIENCE_S
from tandemrt.serve.problems import slow
from tandemrt.serve.service import Service

from . import asking
from .conftest import serving
from .edge import HERE, TANDEM, painted, port_of
from .faults import Faults, between


def test_a_connection_is_kept_and_replaced(bundle: Path, client: httpx.Client) -> None:
    with (
        between(port_of(client)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=proxy.url) as edge,
    ):
        assert proxy.connections == 1
        for _ in range(2):
            assert edge(**TANDEM).degraded == ""
        assert proxy.connections == 1
        proxy.begin()  # those that are there end
        for _ in range(2):
            output = edge(**TANDEM)
            assert (output.degraded, output.cloud[0].tries) == ("", 1)
        assert proxy.connections == 1


def test_all_hand_overs_have_one_deadline_which_the_server_is_told(
    bundle: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    answered = Service._answered

    async def slowly(self: Service, request: Request, key: Any, seconds: float, make: Any) -> Response:
        told.append(float(request.headers[TIMEOUT_HEADER]))
        assert seconds <= told[-1]
        await asyncio.sleep(0.2)
        return await answered(self, request, key, seconds, make)

    monkeypatch.setattr(Service, "_answered", slowly)
    steps = [("cloud:unet", 1), ("unet_free", 1), ("cloud:unet", 1), ("unet_free", 1)]
    output = painted(bundle, str(client.base_url), {**TANDEM, "steps": steps}, seconds=20)
    assert output.degraded == ""
    assert 20 - 5 < told[0] <= 20
    assert told[1] <= 20 - output.cloud[0].seconds + 0.001
    assert output.cloud[0].seconds >= 0.2


def test_each_try_tells_what_is_left_with_the_same_key(
    bundle: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, str, bytes]] = []
    pauses = iter((0.3, 0.0))
    handoff = Service.handoff

    async def refusing(self: Service, request: Request) -> Response:
        told.append((float(request.headers[TIMEOUT_HEADER]), request.headers["idempotency-key"], await request.body()))
        pause = next(pauses)
        if pause:
            await asyncio.sleep(pause)
            raise slow(pause)
        return await handoff(self, request)

    monkeypatch.setattr(Service, "handoff", refusing)
    with serving(pipe) as client:
        output = painted(bundle, str(client.base_url), seconds=20)
    assert (output.degraded, output.cloud[0].tries) == ("", 2)
    (first, *same), (second, *again) = told
    assert same == again
    assert second <= first - 0.3


def test_a_server_works_no_longer_than_it_is_waited_for(client: httpx.Client) -> None:
    job = {**HERE, "steps": {"unet": 100}, "until": 100}
    for left, status, what in (
        ("0.00001", 504, "longer than"),
        ("soon", 400, "Request-Timeout: got 'soon', expected seconds"),
        ("-1", 400, "Request-Timeout: got '-1'"),
        ("nan", 400, "Request-Timeout: got 'nan'"),
        ("60", 200, ""),
        ("inf", 200, ""),
    ):
        answer = client.post("/v1/handoff", json=job, headers={TIMEOUT_HEADER: left})
        assert answer.status_code == status, answer.text
        assert not what or what in answer.json()["error"]["message"]


def test_a_bodys_way_is_within_what_a_server_is_waited_for(client: httpx.Client) -> None:
    def late() -> Iterator[bytes]:
        body = json.dumps({**HERE, "until": 2}).encode()
        yield body[:10]
        time.sleep(0.6)
        yield body[10:]

    headers = {"content-type": JSON, TIMEOUT_HEADER: "0.5"}
    assert client.post("/v1/handoff", content=late(), headers=headers).status_code == 504


def test_connections_are_kept_for_less_long_than_the_server_keeps_them() -> None:
    assert KEPT_S < PATIENCE_S


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_opening_does_not_wait_long_for_a_server_that_says_nothing(
    silent: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(there, "OPENING_S", 0.1)
    began = time.monotonic()
    with Pipeline.open(bundle, threads=1, cloud=silent) as edge:
        assert time.monotonic() - began < 25
        assert "cloud:unet" in edge.manifest.components


def test_who_waits_while_another_asks_has_his_own_end(
    silent: str, bundle: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(there, "OPENING_S", 0.05)
    asked = there.There(Cloud(silent, seconds=600), pipe.bundle.manifest)
    first = threading.Event()
    asker = threading.Thread(target=ended, args=(asked, asked.bounds(first)))
    asker.start()
    while not asked._lock.locked():
        time.sleep(0.01)
    began = time.monotonic()
    late = ended(asked, Bounds(time.monotonic() + 0.2, threading.Event()))
    assert (type(late), getattr(late, "reason", "")) == (CloudError, "deadline")
    cancelled = threading.Event()
    cancelled.set()
    assert type(ended(asked, asked.bounds(cancelled))) is CancelledError
    for _ in range(3):  # who waits for another, and no longer, has not found that the server fails
        assert getattr(ended(asked, Bounds(time.monotonic() + 0.05, threading.Event())), "reason", "") == "deadline"
    assert asked.cloud._failures == 0
    assert 0.2 <= time.monotonic() - began < 60
    first.set()
    asker.join(60)
    assert not asker.is_alive()


def ended(asked: there.There, bounds: Bounds) -> TandemError | None:
    """How asking a server ended."""
    try:
        asked.ask(bounds)
    except TandemError as error:
        return error
    return None


def test_a_failure_when_a_pipeline_is_opened_costs_no_try(bundle: Path, client: httpx.Client) -> None:
    with between(port_of(client), down=Faults(cut_after=10, connections=3)) as proxy:
        proxy.begin()
        with Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=20)) as edge:
            assert proxy.connections == 1
            output = edge(**TANDEM)
    assert (output.degraded, output.cloud[0].tries) == ("", 3)


def test_a_server_that_fails_is_left_alone_for_a_while(bundle: Path, client: httpx.Client) -> None:
    with (
        between(port_of(client), down=Faults(cut_after=10)) as proxy,
        Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=20)) as edge,
    ):
        proxy.begin()
        assert edge(**TANDEM).degraded.startswith("unreachable")
        asked = proxy.connections
        assert edge(**TANDEM).degraded.startswith("broken")
        assert proxy.connections == asked


@pytest.mark.parametrize("down", [Faults(swallowed=True), Faults(cut_after=10)], ids=["an answer", "the next try"])
def test_closing_a_pipeline_ends_its_waits_for_the_server(
    down: Faults, bundle: Path, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "_FIRST_PAUSE_S", 15.0)
    with between(port_of(client), down=down) as proxy, ThreadPoolExecutor(1) as threads:
        edge = Pipeline.open(bundle, threads=1, cloud=Cloud(proxy.url, seconds=60))
        proxy.begin()
        painting = threads.submit(edge, **TANDEM)
        asking.until(lambda: len(proxy.sent) > 0)
        edge.close()
        with pytest.raises(CancelledError, match="the pipeline was closed while the cloud ran a part of it"):
            painting.result(50)


def test_a_closed_pipeline_sends_nothing(bundle: Path, client: httpx.Client) -> None:
    with between(port_of(client)) as proxy, Pipeline.open(bundle, threads=1, cloud=proxy.url) as edge:
        begun = edge.stream(**{**TANDEM, "steps": [("unet_free", 2), ("cloud:unet", 2), ("unet_free", 1)]})
        next(begun)
        waiting = edge.stream(**TANDEM)
        proxy.begin()
        edge.close()
        with pytest.raises(ExecutionError, match="used after it was closed"):
            edge(**TANDEM)
        for stream in (begun, waiting):
            with pytest.raises(CancelledError, match="the pipeline was closed while"):
                stream.result()
        assert (proxy.connections, proxy.sent) == (0, b"")


def test_a_cloud_of_two_pipelines_outlives_one(bundle: Path, client: httpx.Client) -> None:
    shared = Cloud(str(client.base_url))
    Pipeline.open(bundle, threads=1, cloud=shared).close()
    with Pipeline.open(bundle, threads=1, cloud=shared) as edge:
        assert edge(**TANDEM).degraded == ""
