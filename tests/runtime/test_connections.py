"""Connections to a server: a few are kept, and one that the server has closed is nobody's failure."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tandemrt.runtime import connections as module
from tandemrt.runtime.bounded_socket import Bounds
from tandemrt.runtime.connections import Connections, Question

QUESTION = Question("POST", "/asked", b"body", {"X-Of": "ours"})


class Server(ThreadingHTTPServer):
    """Answers with what it was asked; what befalls the next answers is in `faults`, one for each.

    made: how many connections there were. open: who answers on those that are. together: whoever waits for whom.
    goes_on: what silence waits for. told: for how long each was waited for, as it said.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[str] = []
        self.made = 0
        self.open: list[_Handler] = []
        self.together = threading.Barrier(1)
        self.goes_on = threading.Event()
        self.told: list[str | None] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.made += 1
        super().process_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one segment an answer
    server: Server

    def setup(self) -> None:
        self.server.open.append(self)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.server.open.remove(self)

    def do_POST(self) -> None:
        fault = self.server.faults.pop(0) if self.server.faults else ""
        asked = self.rfile.read(int(self.headers["content-length"]))
        self.server.told.append(self.headers[module.TIMEOUT_HEADER])
        self.server.together.wait(10)
        if fault == "no answer":
            self.close_connection = True
            return
        if fault == "silence":
            self.server.goes_on.wait(60)
        self.send_response(200, "Fine")
        self.send_header("Content-Length", str(len(asked) + (fault == "cut")))
        self.end_headers()
        self.wfile.write(asked)
        self.wfile.flush()
        self.close_connection = fault in ("goodbye", "cut")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def connections(server: Server) -> Iterator[Connections]:
    made = Connections("127.0.0.1", server.server_address[1], None)
    yield made
    made.close()


def within(seconds: float) -> Bounds:
    return Bounds(time.monotonic() + seconds, threading.Event())


def require_answer(connections: Connections) -> None:
    answer = connections.answered(QUESTION, within(10))
    assert (answer.status, answer.reason, answer.body) == (200, "Fine", b"body")
    assert answer.headers["content-length"] == "4"


def test_a_connection_is_kept(server: Server, connections: Connections) -> None:
    for _ in range(3):
        require_answer(connections)
    assert server.made == 1
    connections.close()
    require_answer(connections)
    assert server.made == 2


def test_one_that_nobody_used_for_long_is_not(
    server: Server, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_S", 0.0)
    for _ in range(2):
        require_answer(connections)
    assert server.made == 2


def test_one_that_was_closed_is_replaced(server: Server, connections: Connections) -> None:
    server.faults = ["goodbye", "", "no answer", ""]
    require_answer(connections)
    while server.open:  # it hangs up while nobody asks
        time.sleep(0.01)
    require_answer(connections)
    require_answer(connections)  # it hangs up when it is asked
    assert (server.made, server.faults) == (3, [])


def test_a_new_one_that_breaks_is_a_failure(server: Server, connections: Connections) -> None:
    for fault, error in (("no answer", ConnectionError), ("cut", http.client.IncompleteRead)):
        server.faults = [fault]
        with pytest.raises(error):
            connections.answered(QUESTION, within(10))
    require_answer(connections)
    assert server.made == 3


def test_a_kept_one_has_its_bounds(server: Server, connections: Connections) -> None:
    require_answer(connections)
    server.faults = ["silence"]
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connections.answered(QUESTION, within(0.2))
    assert 0.2 <= time.monotonic() - began < 50
    server.goes_on.set()
    require_answer(connections)  # and what comes late is not the next question's
    assert server.made == 2


def test_what_is_left_is_told(server: Server, connections: Connections) -> None:
    bounds = within(100)
    connections.answered(QUESTION, bounds)
    server.faults = ["no answer"]  # a kept one, which is replaced
    left = bounds.left_s
    connections.answered(QUESTION, bounds)
    first, second, again = (float(one or "nan") for one in server.told)
    assert left - 0.001 <= first <= 100
    assert bounds.left_s - 0.001 <= again <= second <= left + 0.001


def test_a_few_are_kept_of_many(server: Server, connections: Connections) -> None:
    count = 2 + module.KEPT
    server.together = threading.Barrier(count)
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda _: require_answer(connections), range(count)))
    assert server.made == count
    ends = time.monotonic() + 10
    while len(server.open) > module.KEPT and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(server.open) == module.KEPT


def test_an_answer_that_is_too_long_is_cut(
    server: Server, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 1000)
    long = Question("POST", "/", bytes(1 << 20), {})
    answer = connections.answered(long, within(10))
    assert 1000 < len(answer.body) < 1 << 20
    require_answer(connections)
    assert server.made == 2
