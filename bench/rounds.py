"""Entrants painting in turns: every round all of them paint the same seed, each round another one first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tandemrt.runtime.errors import BenchmarkError

from .contenders import Answer, Contender
from .probes import ENERGY, NO_PROBES, Probes
from .room import Room

ORDER = "contenders in turns, every round beginning with the next one"
MOST_DB = 200.0
Progress = Callable[[str, int, int], None]
Picture = npt.NDArray[np.float32]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds that go before and that count, and the first one's seed; each next round has the next."""

    warm_up: int
    count: int
    seed: int

    @property
    def total(self) -> int:
        return self.warm_up + self.count


@dataclass(frozen=True, slots=True)
class Entrant:
    """What paints in every round. Entrants with the same `start` share the process that it starts.

    arguments: what differs from the process's job in this one's pictures. reference: the entrant whose pictures they
    are compared with; the first of all where none is named. memory_bytes: the least that it needs.
    """

    start: Callable[[], Contender]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    memory_bytes: int = 0


@dataclass(slots=True)
class Taken:
    """What one contender took.

    opened, first: of opening, in seconds since its start, and of its first picture. rounds: of those that count.
    psnr_db: of each of their pictures, to that of its reference. failed: why it has no figures.
    """

    opened: Answer | None = None
    first: Answer | None = None
    rounds: list[Answer] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    failed: str = ""

    def samples(self, name: str) -> tuple[float, ...]:
        """A figure of every round that counts; of a part that a round did not have, 0."""
        return tuple(answer.figures.get(name, 0.0) for answer in self.rounds)

    def tells(self, name: str) -> bool:
        """Whether every round that counts told a figure."""
        return bool(self.rounds) and all(name in answer.figures for answer in self.rounds)

    def add(self, start: Taken) -> None:
        """Add the picture of a fresh start, with what opening took; energy is that of both."""
        self.opened = start.opened
        if start.opened is not None:
            opened, painted = start.opened.figures, start.rounds[0].figures
            both = {name: opened[name] + painted[name] for name in ENERGY if name in opened and name in painted}
            self.rounds.append(Answer({**opened, **painted, **both}, start.rounds[0].words))

    @property
    def parts(self) -> tuple[str, ...]:
        """The figures that rounds told, in their order."""
        return tuple(dict.fromkeys(name for answer in self.rounds for name in answer.figures))


def in_rounds(
    entrants: Mapping[str, Entrant],
    rounds: Rounds,
    pictures: Path,
    progress: Progress,
    probes: Probes = NO_PROBES,
) -> dict[str, Taken]:
    """Open the entrants' processes one after the other, then let them paint in turns; one that fails is left out.

    One whose weights do not fit into the memory that is left is not opened. pictures: an empty folder. probes: what is
    told of a turn besides what the contender tells.

    Raises:
        BenchmarkError: the first entrant failed: without it, what the others took would say nothing.
    """
    turns, done, work = _Turns(entrants, probes), 0, len(entrants) * (1 + rounds.total)
    try:
        for name in entrants:
            progress(f"open {name}", done, work)
            done += 1
            turns.open(name)
        for round_ in range(rounds.total):
            counts, painted = round_ >= rounds.warm_up, dict[str, Picture]()
            for name in rotated(tuple(entrants), round_):
                progress(f"round {round_ + 1} of {rounds.total}: {name}", done, work)
                done += 1
                painted |= turns.paint(name, rounds.seed + round_, pictures / "picture.npy", counts=counts)
            if counts:
                turns.compare(painted)
        progress("done", work, work)
    finally:
        turns.close()
    return turns.taken


def rotated(every: Sequence[Item], round_: int) -> tuple[Item, ...]:
    """All of them, those before the round's first behind the others: each round begins with the next one."""
    first = round_ % len(every)
    return (*every[first:], *every[:first])


def psnr_db(picture: Picture, reference: Picture) -> float:
    """Of two pictures, (H, W, 3) float32 in 0..1, finite; at most 200, which equal ones reach."""
    error = float(np.square(picture.astype(np.float64) - reference).mean())
    return MOST_DB if error == 0 else min(MOST_DB, -10 * float(np.log10(error)))


@contextmanager
def failing(taken: Mapping[str, Taken], name: str) -> Iterator[None]:
    """What ends an entrant is kept in place of its figures, and the others go on; that of the first is raised."""
    try:
        yield
    except BenchmarkError as error:
        if name == next(iter(taken)):
            raise
        taken[name].failed = str(error).partition(": ")[2]
        taken[name].rounds.clear()
        taken[name].psnr_db.clear()


class _Turns:
    """Entrants whose processes are open, and what they took; those that failed have no further turns."""

    def __init__(self, entrants: Mapping[str, Entrant], probes: Probes) -> None:
        self.taken = {name: Taken() for name in entrants}
        self._entrants, self._probes, self._room = entrants, probes, Room()
        self._opened: dict[Callable[[], Contender], Contender] = {}

    def open(self, name: str) -> None:
        """Open an entrant's process, if it is not another one's too."""
        entrant, taken = self._entrants[name], self.taken[name]
        owner = next(other for other, one in self._entrants.items() if one.start is entrant.start)
        if owner != name:
            taken.failed = self.taken[owner].failed
            return
        with failing(self.taken, name):
            self._room.require(name, entrant.memory_bytes)
            contender = self._opened[entrant.start] = entrant.start()
            taken.opened = self._asked(contender, contender.opened)
            self._room.take(entrant.memory_bytes)

    def paint(self, name: str, seed: int, file: Path, *, counts: bool) -> dict[str, Picture]:
        """The entrant's picture of a seed by its name, none of one that failed. file: where it lies meanwhile."""
        entrant, taken = self._entrants[name], self.taken[name]
        if taken.failed:
            return {}
        with failing(self.taken, name):
            contender = self._opened[entrant.start]
            answer = self._asked(contender, partial(contender.painted, seed, entrant.arguments, file))
            picture = np.load(file)
            file.unlink()
            if not np.isfinite(picture).all():
                raise BenchmarkError(name, "returned NaN or Inf")
            if taken.first is None:
                taken.first = answer
            if counts:
                taken.rounds.append(answer)
            return {name: picture}
        return {}

    def compare(self, pictures: Mapping[str, Picture]) -> None:
        """Add the distances of a round's pictures to their references'; of another size than those, they have none."""
        first = next(iter(self._entrants))
        for name, picture in pictures.items():
            reference = self._entrants[name].reference or first
            meant = pictures.get(reference)
            if meant is not None and reference != name and picture.shape == meant.shape:
                self.taken[name].psnr_db.append(psnr_db(picture, meant))

    def close(self) -> None:
        """End all processes."""
        for contender in self._opened.values():
            contender.close()

    def _asked(self, contender: Contender, ask: Callable[[], Answer]) -> Answer:
        """A contender's answer with what was seen of its turn."""
        with self._probes.turn(contender.pid) as seen:
            answer = ask()
        return answer.with_figures(seen)
