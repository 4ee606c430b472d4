"""A socket's waits end when they have to, whatever the other side does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tandemrt.runtime.bounded_socket import BoundedSocket

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    own, other = socket.socketpair()
    with own, other:
        yield own, other


def bounded(own: socket.socket, seconds: float, cancelled: threading.Event | None = None) -> BoundedSocket:
    return BoundedSocket(own, time.monotonic() + seconds, cancelled or threading.Event())


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
    assert 0.2 <= time.monotonic() - began < 1


def test_nobody_who_reads_is_not_waited_for(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="its time is over"):
        bounded(pair[0], 0.2).sendall(bytes(64 << 20))
    assert 0.2 <= time.monotonic() - began < 1


def test_a_wait_is_cancelled(pair: Pair) -> None:
    cancelled, began = threading.Event(), time.monotonic()
    threading.Timer(0.05, cancelled.set).start()
    with pytest.raises(TimeoutError, match="cancelled"):
        bounded(pair[0], 30, cancelled).makefile().read(1)
    assert time.monotonic() - began < 1
