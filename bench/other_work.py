"""What a machine's processors do besides what is measured: busy seconds of all, and of this process's family."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
# Columns behind a processor's name, in ticks: user, nice, system, idle, iowait, irq, softirq, steal; more are parts.
_IDLE, _COUNTED = (3, 4), 8


@dataclass(frozen=True, slots=True)
class Look:
    """Seconds at one moment: on the clock, of busy processors (see `busy_s`), and of these what was our own."""

    at_s: float
    busy_s: float | None
    own_s: float


def look() -> Look:
    """Now."""
    return Look(time.monotonic(), busy_s(), own_s())


def other_cores(before: Look, after: Look) -> float | None:
    """How many processors others had on average between two looks; None where the system does not tell."""
    if before.busy_s is None or after.busy_s is None or after.at_s <= before.at_s:
        return None
    others_s = after.busy_s - before.busy_s - (after.own_s - before.own_s)
    return max(others_s, 0.0) / (after.at_s - before.at_s)


def busy_s(stat: Path = STAT) -> float | None:
    """Seconds since the system began in which the processors that we may use were busy, or withheld from the system.

    None where it does not tell.
    """
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    try:
        lines = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    ticks = [[int(value) for value in line[1 : 1 + _COUNTED]] for line in lines if line and line[0] in usable]
    if not ticks:
        return None
    busy = sum(value for columns in ticks for index, value in enumerate(columns) if index not in _IDLE)
    return float(busy / os.sysconf("SC_CLK_TCK"))


def own_s() -> float:
    """Seconds that this process was busy, and those that it started and that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)
