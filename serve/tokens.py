"""What requests have to bring, given as it is or in a file that may change meanwhile."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tandemrt.runtime.cli.cloud_options import token_in_file
from tandemrt.runtime.errors import ArgumentError

LOG = logging.getLogger("tandemrt.serve")


class TokenFile:
    """The token in a file, which is read anew when the file changes; while it holds none, the last one counts."""

    def __init__(self, path: Path) -> None:
        """Read it; ArgumentError if it cannot be read, or holds no token."""
        self._path = path
        self._seen = self._stamp()
        self._token = self._read()

    @property
    def token(self) -> str:
        """What requests have to bring now."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self._token = self._read()
                LOG.warning("%s: a new token counts from now on", self._where)
        except ArgumentError as error:
            LOG.error("%s The last token counts.", error)
        return self._token

    @property
    def _where(self) -> str:
        return f"--token-file {self._path}"

    def _stamp(self) -> tuple[int, int, int] | None:
        """What changes with the file; None where there is none."""
        try:
            status = os.stat(self._path)  # noqa: PTH116 (before every request)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> str:
        return token_in_file(self._where, self._path)
