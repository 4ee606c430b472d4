"""Sockets on which no wait outlasts its bounds: while a name is looked up, a connection made, bytes sent or read.

A timeout of the socket's own would begin anew with every byte; a thread that cuts it would take longer to start than
what a server on the same machine takes to answer.
"""

from __future__ import annotations

import errno
import io
import os
import queue
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
# How often a wait looks whether it was cancelled.
LOOK_S = 0.05
_UNDER_WAY = (errno.EINPROGRESS, errno.EWOULDBLOCK)
# Made in a moment; the default one, for many sockets, is a file of the system's.
_Selector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)


@dataclass(frozen=True, slots=True)
class Bounds:
    """When waiting ends: at `ends`, of time.monotonic, or from any thread, when it is cancelled.

    closed: set when what waits is closed with all that it does, which ends waiting as well.
    """

    ends: float
    cancelled: threading.Event
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def left_s(self) -> float:
        """How many seconds are left; 0 or less when it has ended."""
        return self.ends - time.monotonic()

    @property
    def stopped(self) -> bool:
        """Whether it was cancelled, by itself or with all the rest."""
        return self.cancelled.is_set() or self.closed.is_set()

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self.stopped or self.left_s <= 0

    def look_s(self) -> float:
        """How many seconds to wait before the next look; TimeoutError where waiting has ended."""
        left = self.left_s
        if left <= 0 or self.stopped:
            raise TimeoutError("cancelled" if self.stopped else "its time is over")
        return min(left, LOOK_S)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until it has ended."""
        until = time.monotonic() + seconds
        while not self.over and (left := until - time.monotonic()) > 0:
            self.cancelled.wait(min(left, LOOK_S))


class BoundedSocket(io.RawIOBase):
    """A connected socket for `http.client`, that is read and written within bounds.

    Any use of it after they have ended raises TimeoutError. Closing it leaves the socket open.
    """

    def __init__(self, sock: socket.socket, bounds: Bounds) -> None:
        self._sock, self._bounds = sock, bounds

    def makefile(self, *_: Any, **_options: Any) -> io.BufferedReader:
        """What is read of it, as of a socket."""
        return io.BufferedReader(self)

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[_waited(self._sock, partial(self._sock.send, left), self._bounds) :]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return _waited(self._sock, partial(self._sock.recv_into, buffer), self._bounds)

    def close(self) -> None:
        """Nothing: whoever opened the socket closes it."""


def connected(host: str, port: int, bounds: Bounds) -> socket.socket:
    """A connection to the first of a host's addresses that takes one.

    Each has an even share of the time that is left, so that one that does not answer leaves some for the next.

    Raises:
        OSError: none takes one; TimeoutError within the bounds.
        ValueError: what is no name of a host.
    """
    places = _looked_up(host, port, bounds)
    for left in range(len(places), 0, -1):
        share = replace(bounds, ends=time.monotonic() + bounds.left_s / left)
        try:
            return _connected(places[-left], share)
        except OSError:
            if left == 1:
                raise
    raise OSError(f"{host} has no address")


def over_tls(sock: socket.socket, context: ssl.SSLContext, host: str, bounds: Bounds) -> ssl.SSLSocket:
    """The connection over TLS, with a host of that name; it closes with the one that is given.

    Raises:
        ssl.SSLCertVerificationError: the certificate is not trusted, or of another name.
        OSError: it cannot be had; TimeoutError within the bounds.
    """
    made = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        _waited(made, made.do_handshake, bounds)
    except BaseException:
        made.close()
        raise
    return made


def has_come(sock: socket.socket) -> bool:
    """Whether there is something to read, be it the connection's end."""
    with _Selector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _looked_up(host: str, port: int, bounds: Bounds) -> list[Any]:
    """A host's addresses, as `socket.getaddrinfo` tells them; on a thread, as nothing ends a look-up."""
    found: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except Exception as error:  # it is raised there
            found.put(error)

    threading.Thread(target=look_up, name="tandemrt-look-up", daemon=True).start()
    while True:
        wait_s = bounds.look_s()
        try:
            places = found.get(timeout=wait_s)
        except queue.Empty:
            continue
        if isinstance(places, Exception):
            raise places
        return places


def _connected(place: Any, bounds: Bounds) -> socket.socket:
    family, kind, protocol, _, address = place
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        failure = sock.connect_ex(address)
        if failure in _UNDER_WAY:
            with _Selector() as selector:
                selector.register(sock, selectors.EVENT_WRITE)
                while not selector.select(bounds.look_s()):
                    pass
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, os.strerror(failure))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _waited(sock: socket.socket, call: Callable[[], T], bounds: Bounds) -> T:
    """What a call on the socket gives, which may wait; it is told now and then to look up."""
    while True:
        sock.settimeout(bounds.look_s())
        try:
            return call()
        except TimeoutError:
            continue
