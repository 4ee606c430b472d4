"""Connections on which a client leaves things half done: a header that does not come, an answer that is not read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# How long a header may take to come, and an answer may stand still, in seconds; who asks nothing when the server ends.
PATIENCE_S, GOODBYE_S = 30.0, 0.5
_LOOKS_S = 0.1


@dataclass(slots=True)
class _Seen:
    """How a connection was when it changed last: its request, whether that is answered, and how many bytes are left."""

    state: tuple[Any, bool, int]
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
        self.ending = False

    async def keep(self) -> None:
        """Look at the connections until this is cancelled."""
        while True:
            await asyncio.sleep(_LOOKS_S)
            self._seen = {one: self._looked_at(one) for one in list(self._connections)}
            for one, seen in self._seen.items():
                if self._is_over(seen):
                    one.transport.abort()

    def _looked_at(self, connection: Any) -> _Seen:
        request, now = connection.cycle, time.monotonic()
        answered = request is None or request.response_complete
        state = request, answered, connection.transport.get_write_buffer_size()
        seen = self._seen.get(connection)
        if seen is not None and seen.state == state:
            return seen
        return _Seen(state, now, now if seen is None or seen.state[0] is not request else seen.asked)

    def _is_over(self, seen: _Seen) -> bool:
        _, answered, left = seen.state
        now = time.monotonic()
        if not answered and not left:  # the server's turn
            return now - seen.asked > self._longest_s
        patience = GOODBYE_S if self.ending and not left else PATIENCE_S
        return now - seen.since > patience or (left > 0 and now - seen.asked > self._longest_s)
