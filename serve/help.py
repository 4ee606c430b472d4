"""What a device's log tells of its cloud: when its help is lost, when it comes back, and never a prompt."""

from __future__ import annotations

import logging
import threading

from tandemrt.runtime import Output
from tandemrt.runtime.cli.reporter import one_line

LOG = logging.getLogger("tandemrt.serve")


class Help:
    """Whether a cloud helps, told whenever that changes, and not with each picture; safe to share between threads."""

    def __init__(self) -> None:
        self._reason, self._lock = "", threading.Lock()

    def of(self, output: Output) -> None:
        """Take note of what was painted; where the cloud was not asked, that says nothing of it."""
        if output.degraded:
            self.lost(output.degraded)
        elif output.cloud:
            self.back()

    def lost(self, degraded: str) -> None:
        """Take note of why it did not help, as `Output.degraded` says it."""
        reason = degraded.partition(":")[0]
        with self._lock:
            # Left alone since it failed, it fails as before, which was told.
            changed = reason != self._reason and not (reason == "broken" and self._reason)
            self._reason = reason if changed else self._reason
        if changed:
            LOG.warning("the cloud does not help, its steps run here: %s", one_line(degraded))

    def back(self) -> None:
        """Take note that it helps; a warning, since what is no more than information is not shown on a terminal."""
        with self._lock:
            before, self._reason = self._reason, ""
        if before:
            LOG.warning("the cloud helps now")
