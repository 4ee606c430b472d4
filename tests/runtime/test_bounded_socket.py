"""A socket's waits end when they have to, whatever the other side does."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tandemrt.runtime.bounded_socket import BoundedSocket, Bounds, connected, over_tls

Pair = tuple[socket.socket, socket.socket]
# More than any of these waits takes beside others, and less than those that are without their bounds.
LATE_S = 60.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    own, other = socket.socketpair()
    with own, other:
        yield own, other


def within(seconds: float, cancelled: threading.Event | None = None) -> Bounds:
    return Bounds(time.monotonic() + seconds, cancelled or threading.Event())


def bounded(own: socket.socket, seconds: float, cancelled: threading.Event | None = None) -> BoundedSocket:
    return BoundedSocket(own, within(seconds, cancelled))


def test_what_comes_in_time_is_read_and_sent(pair: Pair) -> None:
    sock = bounded(pair[0], 10)
    sock.sendall(b"asked")
    assert pair[1].recv(100) == b"asked"
    # Longer than a wait is before it looks up.
    later = threading.Timer(0.15, pair[1].sendall, [b"a line\nand more"])
    later.start()
    file = sock.makefile("rb")
    assert file.readline() == b"a line\n"
    file.close()
    sock.close()
    pair[0].sendall(b"still open")
    later.join()


def test_drops_do_not_prolong_a_wait(pair: Pair) -> None:
    dropping = threading.Event()

    def drop() -> None:
        while not dropping.wait(0.02):
            pair[1].sendall(b".")

    thread = threading.Thread(target=drop)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError, match="its time is over"):
            bounded(pair[0], 0.2).makefile().read(1000)
    finally:
        dropping.set()
        thread.join()
    assert 0.2 <= time.monotonic() - began < LATE_S


def test_nobody_who_reads_is_not_waited_for(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="its time is over"):
        bounded(pair[0], 0.2).sendall(bytes(64 << 20))
    assert 0.2 <= time.monotonic() - began < LATE_S


@pytest.mark.parametrize("closes", [False, True])
def test_a_wait_is_cancelled(closes: bool, pair: Pair) -> None:
    bounds, began = within(600), time.monotonic()
    threading.Timer(0.05, (bounds.closed if closes else bounds.cancelled).set).start()
    with pytest.raises(TimeoutError, match="cancelled"):
        BoundedSocket(pair[0], bounds).makefile().read(1)
    assert time.monotonic() - began < LATE_S


def test_a_pause_ends_with_its_bounds() -> None:
    bounds, began = within(0.2), time.monotonic()
    bounds.wait(0.05)
    assert time.monotonic() - began >= 0.05
    assert not bounds.stopped
    bounds.wait(600)
    assert bounds.over
    assert 0.2 <= time.monotonic() - began < LATE_S


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """One where a connection is neither taken nor refused: as many wait for it as may."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as waiting:
        port: int = server.getsockname()[1]
        with pytest.raises(TimeoutError):
            for _ in range(8):
                waiting.enter_context(connected("127.0.0.1", port, within(1)))
        yield port


def addressed(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Have every host have these ports of this machine as its addresses."""
    places = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in ports]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)


def test_the_address_that_takes_a_connection_is_taken(
    open_port: int, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    addressed(monkeypatch, 9, silent_port, open_port)
    began = time.monotonic()
    with connected("two.example", 80, within(4)) as sock:
        assert sock.getpeername()[1] == open_port
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert time.monotonic() - began >= 1.9  # half of what the one that refused had left was the silent one's


def test_addresses_that_do_not_answer_are_not_waited_for(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    addressed(monkeypatch, silent_port, silent_port)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connected("two.example", 80, within(0.3))
    assert 0.3 <= time.monotonic() - began < LATE_S
    cancelled, began = threading.Event(), time.monotonic()
    threading.Timer(0.05, cancelled.set).start()
    with pytest.raises(TimeoutError, match="cancelled"):
        connected("two.example", 80, within(600, cancelled))
    assert time.monotonic() - began < LATE_S


def test_who_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    addressed(monkeypatch, 9, 9)
    with pytest.raises(ConnectionRefusedError):
        connected("two.example", 80, within(10))


def test_a_name_that_is_not_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = threading.Event()

    def look_up(*_: Any, **__: Any) -> Any:
        found.wait(600)
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="its time is over"):
        connected("slow.example", 80, within(0.2))
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(TimeoutError, match="cancelled"):
        connected("slow.example", 80, within(30, cancelled))
    assert 0.2 <= time.monotonic() - began < LATE_S
    found.set()
    with pytest.raises(socket.gaierror, match="not known"):
        connected("slow.example", 80, within(10))


def test_a_handshake_that_is_not_answered(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        over_tls(pair[0], ssl.create_default_context(), "127.0.0.1", within(0.2))
    assert 0.2 <= time.monotonic() - began < LATE_S
