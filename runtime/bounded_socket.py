"""A socket for `http.client` on which no wait outlasts its end, however slowly bytes come.

A timeout of the socket's own would begin anew with every byte; a thread that cuts it would take longer to start than
what a server on the same machine takes to answer.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

# How often a wait looks whether it was cancelled.
LOOK_S = 0.05


class BoundedSocket(io.RawIOBase):
    """A connected socket that is read and written until `ends`, of time.monotonic, or until it is cancelled.

    What it is used for behind either raises TimeoutError. Closing it leaves the socket open.
    """

    def __init__(self, sock: socket.socket, ends: float, cancelled: threading.Event) -> None:
        self._sock, self._ends, self._cancelled = sock, ends, cancelled

    def makefile(self, *_: Any, **_options: Any) -> io.BufferedReader:
        """What is read of it, as of a socket."""
        return io.BufferedReader(self)

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._waited(self._sock.send, left) :]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._waited(self._sock.recv_into, buffer)

    def close(self) -> None:
        """Nothing: whoever opened the socket closes it."""

    def _waited(self, call: Callable[[Any], int], buffer: Any) -> int:
        """What a call on the socket gives, which may wait; it is told now and then to look up."""
        while True:
            left = self._ends - time.monotonic()
            if left <= 0 or self._cancelled.is_set():
                raise TimeoutError("cancelled" if left > 0 else "its time is over")
            self._sock.settimeout(min(left, LOOK_S))
            try:
                return call(buffer)
            except TimeoutError:
                continue
