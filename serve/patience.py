"""Connections on which a client leaves things half done: a header that does not come, an answer that is not read."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

LOG = logging.getLogger("tandemrt.serve")
# How long a header may take to come, and an answer may stand still, in seconds.
PATIENCE_S = 30.0
# How long a connection on which nothing is asked is kept when the server ends, in seconds.
GOODBYE_S = 0.5
_LOOKS_S = 0.1


@dataclass(slots=True)
class _Seen:
    """How a connection was when it changed last.

    state: its request, whether that is answered, how many bytes are left here, and how many in the kernel.
    """

    state: tuple[Any, bool, int, int]
    since: float
    asked: float


class Patience:
    """Hangs up on uvicorn's connections, which would otherwise wait for their clients for ever.

    longest_s: how long a request may take, from its header to the last byte of its answer.
    ending: the server ends; who asks nothing is not waited for. Over TLS it would be for half a minute, until he says
        goodbye, which clients that keep a connection do not.
    """

    def __init__(self, connections: Collection[Any], longest_s: float) -> None:
        self._connections, self._longest_s = connections, longest_s
        self._seen: dict[Any, _Seen] = {}
        self._unseen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ending = False

    async def keep(self) -> None:
        """Look at the connections until this is cancelled."""
        while True:
            await asyncio.sleep(_LOOKS_S)
            self.look()

    def look(self) -> None:
        """Hang up on those whose time is over; one that cannot be looked at is told of, once, and passed over."""
        before, self._seen = self._seen, {}
        for one in list(self._connections):
            self._look_at(one, before.get(one))

    def _look_at(self, connection: Any, before: _Seen | None) -> None:
        try:
            self._seen[connection] = seen = _looked_at(connection, before)
            if self._is_over(seen):
                connection.transport.abort()
        except Exception:  # what it is asked for is uvicorn's own, and asyncio's, and may not be there
            if connection not in self._unseen:
                self._unseen.add(connection)
                LOG.exception("a connection cannot be looked at, and is not hung up on")

    def _is_over(self, seen: _Seen) -> bool:
        _, answered, left, _ = seen.state
        now = time.monotonic()
        if not answered and not left:  # the server's turn
            return now - seen.asked > self._longest_s
        patience = GOODBYE_S if self.ending and not left else PATIENCE_S
        return now - seen.since > patience or (left > 0 and now - seen.asked > self._longest_s)


def _looked_at(connection: Any, before: _Seen | None) -> _Seen:
    """How a connection is now; before: how it was."""
    request, now = connection.cycle, time.monotonic()
    answered = request is None or request.response_complete
    left = connection.transport.get_write_buffer_size()
    state = request, answered, left, _kernel_bytes(connection.transport)
    if before is not None and before.state == state:
        return before
    return _Seen(state, now, now if before is None or before.state[0] is not request else before.asked)


def _kernel_bytes(transport: Any) -> int:
    """How many bytes the kernel has yet to bring to the client; 0 where it does not tell.

    It takes more only when a third of what it keeps is gone, which is megabytes: with a slow reader, minutes.
    """
    count = bytearray(4)
    try:
        import fcntl  # noqa: PLC0415 (Windows has none)
        import termios  # noqa: PLC0415

        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
    except (ImportError, OSError, ValueError):
        return 0
    return int.from_bytes(count, sys.byteorder)
