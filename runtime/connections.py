"""HTTP exchanges with one server, each within its bounds; a few connections are kept open between them."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from .bounded_socket import BoundedSocket, Bounds, connected, has_come, over_tls

MAX_ANSWER_BYTES = 64 << 20
# How many are kept, and for how many seconds: fewer than the server keeps those that nobody uses.
KEPT, KEPT_S = 4, 12.0
# The header that tells a server for how many seconds it is waited for, from then on: the rest of the bounds.
TIMEOUT_HEADER = "Request-Timeout"
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a server."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered; a body longer than MAX_ANSWER_BYTES is cut after a few bytes more."""

    status: int
    reason: str
    headers: http.client.HTTPMessage
    body: bytes


class Connections:
    """Those to one server; safe to share between threads. tls: None for plain HTTP."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _hang_up, self._idle)

    def close(self) -> None:
        """Hang up on those that nobody uses; what is asked after it makes another."""
        with self._lock:
            idle = self._idle[:]
            self._idle.clear()
        _hang_up(idle)

    def answered(self, question: Question, bounds: Bounds) -> Answer:
        """What is answered, all of it within the bounds.

        A kept connection that the server has closed meanwhile is replaced by a new one.

        Raises:
            OSError, http.client.HTTPException, ValueError: there was no answer, or not all of it; TimeoutError where
                the bounds ended it.
        """
        kept = self._kept()
        if kept is not None:
            try:
                return self._answered(kept, question, bounds)
            except _ClosedError:
                self.close()  # those that were kept beside it are no better
        return self._answered(self._opened(bounds), question, bounds)

    def _answered(self, connection: _Connection, question: Question, bounds: Bounds) -> Answer:
        try:
            answer = connection.answered(question, bounds)
        except BaseException:
            connection.hang_up()
            raise
        with self._lock:
            keep = connection.reusable and len(self._idle) < KEPT
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.hang_up()
        return answer

    def _kept(self) -> _Connection | None:
        """The one that was used last, if the server has not hung up on it."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.fresh:
                return connection
            connection.hang_up()

    def _opened(self, bounds: Bounds) -> _Connection:
        sock = connected(self._host, self._port, bounds)
        try:
            own = sock if self._tls is None else over_tls(sock, self._tls, self._host, bounds)
        except BaseException:
            sock.close()
            raise
        return _Connection(self._host, self._port, own)


class _ClosedError(Exception):
    """A connection that had been kept was closed by the server before it was asked."""


class _Connection(http.client.HTTPConnection):
    """One that is open, with `own` as its socket; reusable: whether it may be asked again."""

    auto_open = 0

    def __init__(self, host: str, port: int, own: socket.socket) -> None:
        super().__init__(host, port)
        if isinstance(own, ssl.SSLSocket):
            self.default_port = http.client.HTTPS_PORT
        self.own, self.reusable, self._since = own, False, 0.0

    @property
    def fresh(self) -> bool:
        """Whether it was used a short while ago, and the server has not said anything since, such as goodbye."""
        return time.monotonic() - self._since < KEPT_S and not has_come(self.own)

    def answered(self, question: Question, bounds: Bounds) -> Answer:
        self.sock = BoundedSocket(self.own, bounds)
        try:
            told = {**question.headers, TIMEOUT_HEADER: f"{max(bounds.left_s, 0.001):.3f}"}
            self.request(question.method, question.path, question.body, told)
            answer = self.getresponse()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            if self.reusable:
                raise _ClosedError from error
            raise
        self.reusable = False
        received = bytearray()
        while len(received) <= MAX_ANSWER_BYTES and (chunk := answer.read(_CHUNK)):
            received += chunk
        if answer.length and len(received) <= MAX_ANSWER_BYTES:
            raise http.client.IncompleteRead(bytes(received), answer.length)
        self.reusable, self._since = answer.isclosed() and not answer.will_close, time.monotonic()
        return Answer(answer.status, answer.reason, answer.headers, bytes(received))

    def hang_up(self) -> None:
        self.close()
        self.own.close()


def _hang_up(connections: list[_Connection]) -> None:
    for connection in connections:
        connection.hang_up()
