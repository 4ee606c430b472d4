"""What requests have to bring, given as it is or in a file that may change meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from tandemrt.runtime.errors import ArgumentError
from tandemrt.runtime.tokens import token_in_file

LOG = logging.getLogger("tandemrt.serve")
# How often the file is looked at, at most, in seconds: a new token counts so soon.
_EVERY_S = 0.5


class TokenFile:
    """The token in a file, which is read anew when the file changes; while it holds none, the last one counts."""

    def __init__(self, path: Path) -> None:
        """Read it; ArgumentError if it cannot be read, or holds no token."""
        self._path = path
        self._seen = self._stamp()
        self._token, self._looked = self._read(), time.monotonic()

    async def current(self) -> str:
        """What requests have to bring now; the file is looked at beside the event loop, which no disk may hold up."""
        if time.monotonic() - self._looked >= _EVERY_S:
            self._looked = time.monotonic()
            await asyncio.to_thread(self._look)
        return self._token

    def _look(self) -> None:
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self._token = self._read()
                LOG.warning("%s: a new token counts from now on", self._where)
        except ArgumentError as error:
            LOG.error("%s The last token counts.", error)

    @property
    def _where(self) -> str:
        return f"--token-file {self._path}"

    def _stamp(self) -> tuple[int, int, int] | None:
        """What changes with the file; None where there is none."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> str:
        return token_in_file(self._where, self._path)
