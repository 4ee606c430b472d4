"""What tests ask of processes that they did not start themselves."""

from __future__ import annotations

import time
from pathlib import Path


def require_ended(pid: int) -> None:
    """Fail unless a process ends in some seconds; one that nobody has taken note of has ended."""
    for _ in range(100):
        try:
            told = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            return
        if told.rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")
