"""How a contender is spoken to: JSON lines on its stdin and stdout, whatever the libraries it uses print.

First comes the job, one object, and is answered when the models are open, by the seconds since the interpreter began.
Then every line is a seed, answered by what its picture took. A contender that fails answers with `error` and ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

BEGAN = time.perf_counter()


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
    """What a contender offers after it has opened its models."""

    def paint(self, seed: int, clock: Clock) -> Any:
        """The picture of the job's prompt for this seed, (H, W, 3) float32 in 0..1; its parts' seconds to the clock."""
        raise NotImplementedError

    def words(self) -> Mapping[str, str]:
        """What is to be told of the last picture besides figures."""
        return {}


def serve(opened: Callable[[Mapping[str, Any]], Painter]) -> None:
    """Answer until stdin ends. `opened` makes the painter of a job.

    A picture is saved as .npy to the job's `pictures` folder, named by its seed.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(facts: Mapping[str, Any]) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    try:
        job = json.loads(sys.stdin.readline())
        painter = opened(job)
        answer({"figures": {"open_s": time.perf_counter() - BEGAN}})
        for line in sys.stdin:
            answer(_painted(painter, job, int(line)))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


def _painted(painter: Painter, job: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    import numpy as np  # noqa: PLC0415

    clock = Clock()
    began = time.perf_counter()
    picture = painter.paint(seed, clock)
    total = time.perf_counter() - began
    np.save(os.path.join(job["pictures"], f"{job['name']}-{seed}.npy"), np.asarray(picture, np.float32))  # noqa: PTH118
    return {"figures": {"total_s": total, **clock.figures, "peak_mib": _peak_mib()}, "words": dict(painter.words())}


def _peak_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
