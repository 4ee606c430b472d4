"""How a contender is spoken to: JSON lines on its stdin and stdout, whatever the libraries it uses print.

First comes the job, one object, and is answered when the models are open, by the seconds since the interpreter began
and by what runs: versions, threads, precision.
Then every line is an object: a seed, arguments of this picture alone, and the file it is to be saved to as .npy, (H, W,
3) float32. It is answered by what the picture took, or with `error`, as is a job whose models cannot be opened.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

BEGAN = time.perf_counter()
_AT_IMPORT: dict[str, float] = {}


class Clock:
    """Collects what the parts of a picture take, in seconds."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds within to the part of this name."""
        began = time.perf_counter()
        yield
        self.figures[name] = self.figures.get(name, 0.0) + time.perf_counter() - began


class Painter:
    """What a contender offers after it has opened its models.

    packages: the distributions whose versions are told. prepared_s: seconds of opening that went to what its users do
    once, such as converting a model; they are not counted.
    """

    packages: tuple[str, ...] = ()
    prepared_s = 0.0

    def setting(self) -> Mapping[str, str]:
        """What it runs with, in words: `threads`, `precision`, `device`, what is `otherwise` than with others."""
        return {}

    def paint(self, seed: int, arguments: Mapping[str, Any], clock: Clock) -> Any:
        """The picture of the job's prompt for this seed, (H, W, 3) float32 in 0..1; its parts' seconds to the clock.

        arguments: what differs from the job, of those who can.
        """
        raise NotImplementedError

    def words(self) -> Mapping[str, str]:
        """What is to be told of the last picture besides figures."""
        return {}

    def figures(self) -> Mapping[str, float]:
        """What is to be told of it besides seconds; not timed."""
        return {}


def imported() -> None:
    """Note that a contender has imported its library: the seconds until then, and the peak of memory."""
    _AT_IMPORT.update(import_s=time.perf_counter() - BEGAN, import_peak_mib=_peak_mib())


def serve(opened: Callable[[Mapping[str, Any]], Painter]) -> None:
    """Answer until stdin ends. `opened` makes the painter of a job."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(facts: Mapping[str, Any]) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    try:
        job = json.loads(sys.stdin.readline())
        painter = opened(job)
    except Exception as error:
        answer(_failure(error))
        return
    figures = {"open_s": time.perf_counter() - BEGAN - painter.prepared_s, **_AT_IMPORT}
    answer({"figures": figures, "words": {"runs": _versions(painter.packages), **painter.setting()}})
    for line in sys.stdin:
        answer(_painted(painter, json.loads(line)))


def _failure(error: Exception) -> Mapping[str, str]:
    """What ended a picture, for the report; where it arose goes to stderr."""
    traceback.print_exception(error)
    message = " ".join(str(error).split())
    # Our own errors say all that there is to say.
    return {"error": message if hasattr(error, "exit_status") else f"{type(error).__name__}: {message}"}


def _painted(painter: Painter, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    import numpy as np  # noqa: PLC0415

    clock = Clock()
    began = time.perf_counter()
    try:
        picture = painter.paint(asked["seed"], asked["arguments"], clock)
    except Exception as error:
        return _failure(error)
    total = time.perf_counter() - began
    np.save(asked["file"], np.asarray(picture, np.float32))
    figures = {"total_s": total, **clock.figures, "peak_mib": _peak_mib(), **painter.figures()}
    return {"figures": figures, "words": dict(painter.words())}


def ran_told(ran: Any) -> str:
    """What a model ran on, and why not on something else. ran: a `RanOn`."""
    return ", ".join((str(ran), *ran.refused, *((ran.unasked,) if ran.unasked else ())))


def threads_told(threads: int | None, chosen_by: str) -> str:
    """A job's threads in words."""
    return f"{chosen_by}'s choice" if threads is None else str(threads)


def _versions(packages: Sequence[str]) -> str:
    """The interpreter's version, and those of the packages that are installed."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in packages}
    installed = (f"{name} {one.version}" for name, one in found.items() if one is not None)
    return ", ".join((f"Python {platform.python_version()}", *installed))


def _peak_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
