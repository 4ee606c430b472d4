"""Clients who leave things half done, and more of them than there is room for."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tandemrt.runtime import Pipeline
from tandemrt.runtime.cloud import JSON
from tandemrt.serve import command, patience
from tandemrt.serve.limits import Limits
from tandemrt.serve.patience import Patience

from .asking import Pace, asked, connection, counted, measured, status_of, until
from .conftest import run_apart, serving

JOB: dict[str, Any] = {"prompt": "red", "steps": 1, "seed": 7, "until": 1}
HEAD = f"POST /v1/handoff HTTP/1.1\r\nContent-Type: {JSON}\r\nContent-Length: 100000"


@dataclass
class Asking:
    """A request on a connection, whose answer has come to an end."""

    response_complete: bool = False


@dataclass(eq=False)
class Connected:
    """A connection of uvicorn's; left: how many bytes are to be read, each time somebody looks."""

    cycle: Asking | None = None
    left: Iterator[int] = field(default_factory=lambda: iter(lambda: 0, 1))
    aborted: bool = False

    @property
    def transport(self) -> Connected:
        return self

    def get_write_buffer_size(self) -> int:
        return next(self.left)

    def get_extra_info(self, _: str) -> Connected:
        return self

    def fileno(self) -> int:  # of no socket
        return -1

    def abort(self) -> None:
        self.aborted = True


def always(count: int) -> Iterator[int]:
    return iter(lambda: count, -1)


def given_up(connections: dict[str, Connected], longest_s: float, *, ending: bool = False) -> set[str]:
    """Who is hung up on within a second, with a patience of 0.4 s."""

    async def run() -> None:
        keeping = Patience(connections.values(), longest_s)
        keeping.ending = ending
        with suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(keeping.keep(), 1.0)

    run_apart(run())
    return {name for name, one in connections.items() if one.aborted}


def test_who_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def connections() -> dict[str, Connected]:
        return {
            "says nothing": Connected(),
            "has been answered": Connected(Asking(response_complete=True)),
            "is painted for": Connected(Asking()),
            "reads": Connected(Asking(), iter(range(10**9, 0, -1))),
            "does not read": Connected(Asking(), always(1000)),
            "does not read the end": Connected(Asking(response_complete=True), always(1000)),
        }

    idle, stuck = {"says nothing", "has been answered"}, {"does not read", "does not read the end"}
    monkeypatch.setattr(patience, "PATIENCE_S", 0.4)
    assert given_up(connections(), 60) == idle | stuck
    assert given_up(connections(), 0.2) == connections().keys()
    monkeypatch.setattr(patience, "PATIENCE_S", 60)
    assert given_up(connections(), 60) == set()
    monkeypatch.setattr(patience, "GOODBYE_S", 0.2)
    assert given_up(connections(), 60, ending=True) == idle


def test_one_that_cannot_be_looked_at_does_not_end_the_looking(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost() -> int:
        raise AttributeError("it has no transport any more")

    monkeypatch.setattr(patience, "PATIENCE_S", 0.4)
    assert given_up({"odd": Connected(Asking(), iter(lost, -1)), "says nothing": Connected()}, 60) == {"says nothing"}
    assert [record.getMessage() for record in caplog.records] == [
        "a connection cannot be looked at, and is not hung up on"
    ]


class Written(asyncio.Protocol):
    """A connection of a server that has written an answer, of more than the kernel takes."""

    cycle = Asking(response_complete=True)

    def __init__(self, connections: list[Written]) -> None:
        self.connections = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(bytes(32 << 20))
        self.connections.append(self)


async def until_later(true: Any) -> None:
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


def test_who_reads_slowly_and_steadily_is_not_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes more of an answer only when much of what it has is gone."""
    now = [0.0]

    async def run() -> None:
        monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
        connections: list[Written] = []
        server = await asyncio.get_running_loop().create_server(lambda: Written(connections), "127.0.0.1", 0)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(server.sockets[0].getsockname())
            reader.setblocking(False)
            await until_later(lambda: connections)
            keeping, (one,) = Patience(connections, 600), connections
            taken: list[bytes] = []

            def changes() -> bool:
                """Whether a look after some bytes have been read finds the connection as it was not before."""
                with suppress(BlockingIOError):
                    taken.append(reader.recv(4096))
                assert len(taken) < 60  # so little that the kernel takes no more
                keeping.look()
                return keeping._seen[one].since == now[0]

            for _ in range(15):
                now[0] += 20
                await until_later(changes)
                assert not one.transport.is_closing()

            assert one.transport.get_write_buffer_size() > 0
            for _ in range(10):  # what is on its way yet may change it once more
                now[0] += 31
                await asyncio.sleep(0.05)
                keeping.look()
            assert one.transport.is_closing()
        server.close()
        await server.wait_closed()

    run_apart(run())


def test_a_header_that_does_not_come_is_not_waited_for(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.4)
    with serving(pipe) as client:
        address = client.base_url.host, client.base_url.port or 0
        with socket.create_connection(address, timeout=10) as first, socket.create_connection(address, 10) as second:
            first.sendall(b"GET /v2 HTTP/1.1\r\nX-Half")
            second.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTTP/1.1\r\nX-Ha")
            assert first.recv(100) == b""
            received = bytearray()
            with suppress(ConnectionResetError):
                while chunk := second.recv(1 << 16):
                    received += chunk
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert client.get("/v2/health/live").status_code == 200


def test_a_stream_that_is_not_read_ends(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    asked_for = "prompt=red&steps=unet:20&size=1024x1024&previews=1"
    with serving(pipe) as client, socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect((client.base_url.host, client.base_url.port or 0))
        unread.sendall(f"GET /v1/images/stream?{asked_for} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        until(lambda: counted(client, "/v1/images/stream", "client_left") == 1, 60)
        until(lambda: measured(client, "tandemrt_running") == 0)


def test_where_there_is_no_room_no_body_is_read(slow: Pipeline, pace: Pace) -> None:
    with pace.held(), serving(slow, Limits(waiting=0), ready=False) as client:
        assert status_of(connection(client, HEAD)) == 503
        pace.open.set()
        until(lambda: client.get("/v2/health/ready").status_code == 200)
        with pace.held():
            running = asked(client, JOB)
            until(lambda: measured(client, "tandemrt_running") == 1)
            assert status_of(connection(client, HEAD)) == 429
            pace.open.set()
            assert status_of(running) == 200


def test_so_many_bodies_are_read_at_once(pipe: Pipeline) -> None:
    def status() -> int:
        return client.post("/v1/handoff", json=JOB).status_code

    with serving(pipe, Limits(waiting=1)) as client:
        others = [connection(client, HEAD, b"{") for _ in range(3)]
        (answered,), *_ = select.select(others, [], [], 20)
        assert status_of(answered) == 429
        first, second = (other for other in others if other is not answered)
        assert status() == 429
        first.close()
        until(lambda: status() == 200)
        second.close()


def test_an_answer_that_is_there_is_given_where_there_is_no_room(slow: Pipeline, pace: Pace) -> None:
    key = {"Idempotency-Key": "one"}
    with serving(slow, Limits(waiting=0)) as client:
        made = client.post("/v1/handoff", json=JOB, headers=key).content
        with pace.held():
            running = asked(client, JOB)
            until(lambda: measured(client, "tandemrt_running") == 1)
            assert client.post("/v1/handoff", json=JOB).status_code == 429
            assert client.post("/v1/handoff", json=JOB, headers=key).content == made
            pace.open.set()
            assert status_of(running) == 200


def test_who_waits_for_what_another_has_asked_for_may_leave(slow: Pipeline, pace: Pace) -> None:
    body = json.dumps(JOB).encode()
    headers = {"Content-Type": JSON, "Idempotency-Key": "one"}
    lines = "".join(f"\r\n{name}: {value}" for name, value in headers.items())
    head = f"POST /v1/handoff HTTP/1.1{lines}\r\nContent-Length: {len(body)}"

    with serving(slow, Limits(waiting=1)) as client:

        def refused() -> bool:
            try:
                return client.post("/v1/handoff", content=body, headers=headers, timeout=0.3).status_code == 429
            except httpx.TimeoutException:
                return False

        with pace.held():
            first = connection(client, head, body)
            until(lambda: measured(client, "tandemrt_running") == 1)
            others = [connection(client, head, body) for _ in range(2)]
            (answered,), *_ = select.select(others, [], [], 20)
            assert status_of(answered) == 429
            next(other for other in others if other is not answered).close()
            until(lambda: not refused())
            pace.open.set()
            assert status_of(first) == 200
        assert measured(client, "tandemrt_call_requests_count") == 1


def test_so_many_connections_are_answered(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_OTHERS", 1)
    with serving(pipe, Limits(waiting=0)) as client:  # the first
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)):
            assert client.get("/v2/health/live").status_code == 200
            assert status_of(connection(client, "GET /v2/health/live HTTP/1.1")) == 503
        until(lambda: client.get("/v2/health/live").status_code == 200)
