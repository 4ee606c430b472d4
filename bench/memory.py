"""What a process takes of memory, as Linux tells it, and processes that have done nothing before."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from tandemrt.runtime.errors import BenchmarkError

Result = TypeVar("Result")


def peak_gib() -> float:
    """The most that was resident of this process, mapped parts of files among it."""
    return _status_kib("VmHWM") / 2**20


def resident_mib(pid: int | None = None) -> float:
    """What is resident of this process, or of another, mapped parts of files among it.

    Raises:
        FileNotFoundError, ProcessLookupError: the other has ended.
    """
    return _status_kib("VmRSS", pid) / 2**10


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a module's function in an interpreter of its own; raises what it raises.

    Raises:
        BenchmarkError: the interpreter was ended.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        try:
            return fresh.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            where = function.__name__.replace("_", " ")
            raise BenchmarkError(where, "its process was ended, most likely because memory ran out") from error


def _status_kib(name: str, pid: int | None = None) -> int:
    with Path("/proc", "self" if pid is None else str(pid), "status").open(encoding="ascii") as status:
        kib = next((int(line.split()[1]) for line in status if line.startswith(f"{name}:")), None)
    if kib is None:  # it has ended, and nobody has taken note
        raise ProcessLookupError(errno.ESRCH, "has ended", f"process {pid}")
    return kib
