"""The memory that a contender's process takes on GPUs, at its peak."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .nvml import Gpus

INTERVAL_S = 0.05


class DeviceMemory:
    """Looks at GPUs again and again while a process has its turn; who has none is taken to change nothing.

    What is taken between two looks and given back is not seen. Where NVML does not tell of a process by itself, its
    memory is what more is taken in its turns.
    """

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus
        self._kept: dict[int, int] = {}

    @contextmanager
    def turn(self, pid: int) -> Iterator[list[int]]:
        """The turn of a process; the list has its peak in bytes when it is over."""
        before, ended = self._gpus.used_bytes(), threading.Event()
        looks = [self._look(pid)]
        peak: list[int] = []

        def look() -> None:
            while not ended.wait(INTERVAL_S):
                looks.append(self._look(pid))

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield peak
        finally:
            ended.set()
            looking.join()
            looks.append(self._look(pid))
            kept, alone, together = self._kept.get(pid, 0), *map(max, zip(*looks, strict=True))
            self._kept[pid] = max(kept + looks[-1][1] - before, 0)
            peak.append(alone or max(kept + together - before, 0))

    def _look(self, pid: int) -> tuple[int, int]:
        """What the process has taken by NVML, and what all have."""
        return self._gpus.used_bytes_by(pid), self._gpus.used_bytes()
