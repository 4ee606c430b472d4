"""Contenders painting in turns: every round all of them paint the same seed, each round another one first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandemrt.runtime.errors import BenchmarkError

from .contenders import Answer, Contender

ORDER = "contenders in turns, every round beginning with the next one"
MOST_DB = 200.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds that go before and that count, and the first one's seed; each next round has the next."""

    warm_up: int
    count: int
    seed: int

    @property
    def total(self) -> int:
        return self.warm_up + self.count


@dataclass(slots=True)
class Taken:
    """What one contender took.

    opened, first: of opening, in seconds since its start, and of its first picture. rounds: of those that count.
    psnr_db: of each of their pictures, to that of the first contender. failed: why it has no figures.
    """

    opened: Answer | None = None
    first: Answer | None = None
    rounds: list[Answer] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    failed: str = ""

    def samples(self, name: str) -> tuple[float, ...]:
        """A figure of every round that counts; of a part that a round did not have, 0."""
        return tuple(answer.figures.get(name, 0.0) for answer in self.rounds)

    @property
    def parts(self) -> tuple[str, ...]:
        """The figures that rounds told, in their order."""
        return tuple(dict.fromkeys(name for answer in self.rounds for name in answer.figures))


def in_rounds(start: Mapping[str, Callable[[], Contender]], rounds: Rounds, progress: Progress) -> dict[str, Taken]:
    """Open the contenders one after the other, then let them paint in turns; one that fails is left out from there on.

    The first is the one that pictures are compared with.
    """
    taken = {name: Taken() for name in start}
    running: dict[str, Contender] = {}
    work = len(start) * (1 + rounds.total)
    done = 0
    try:
        for name, opening in start.items():
            progress(f"open {name}", done, work)
            with _Failing(taken[name], running, name):
                running[name] = opening()
                taken[name].opened = running[name].opened()
            done += 1
        for round_ in range(rounds.total):
            seed = rounds.seed + round_
            for name in _order(tuple(start), round_):
                progress(f"round {round_ + 1} of {rounds.total}: {name}", done, work)
                if name in running:
                    with _Failing(taken[name], running, name):
                        _round(taken[name], running[name].painted(seed), counts=round_ >= rounds.warm_up)
                done += 1
            if round_ >= rounds.warm_up:
                _compare(taken, running, next(iter(start)), seed)
        progress("done", work, work)
    finally:
        for contender in running.values():
            contender.close()
    return taken


def psnr_db(picture: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Of two pictures, (H, W, 3) float32 in 0..1; at most 200, which equal ones reach."""
    error = float(np.square(picture.astype(np.float64) - reference).mean())
    return MOST_DB if error == 0 else min(MOST_DB, -10 * float(np.log10(error)))


class _Failing:
    """What ends a contender is kept with its figures, and the others go on."""

    def __init__(self, taken: Taken, running: dict[str, Contender], name: str) -> None:
        self._taken, self._running, self._name = taken, running, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if not isinstance(error, BenchmarkError):
            return False
        self._taken.failed = str(error).partition(": ")[2]
        self._taken.rounds.clear()
        self._taken.psnr_db.clear()
        contender = self._running.pop(self._name, None)
        if contender is not None:
            contender.close()
        return True


def _round(taken: Taken, answer: Answer, *, counts: bool) -> None:
    if taken.first is None:
        taken.first = answer
    if counts:
        taken.rounds.append(answer)


def _order(names: Sequence[str], round_: int) -> Sequence[str]:
    first = round_ % len(names)
    return (*names[first:], *names[:first])


def _compare(taken: Mapping[str, Taken], running: Mapping[str, Contender], first: str, seed: int) -> None:
    """Add the distance of the round's pictures to the first contender's; a picture of another size has none."""
    pictures = {name: contender.picture(seed) for name, contender in running.items()}
    for name, picture in pictures.items():
        if name != first and first in pictures and picture.shape == pictures[first].shape:
            taken[name].psnr_db.append(psnr_db(picture, pictures[first]))
