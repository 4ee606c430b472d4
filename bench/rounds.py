"""Entrants painting in turns: every round all of them paint the same seed, each round another one first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tandemrt.runtime.errors import BenchmarkError

from .contenders import Answer, Contender
from .probes import ENERGY, NO_PROBES, Probes
from .room import Room

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
    """
    taken = {name: Taken() for name in entrants}
    references = {name: entrant.reference or next(iter(entrants)) for name, entrant in entrants.items()}
    running: dict[str, Contender] = {}
    opened: dict[Callable[[], Contender], Contender] = {}
    room, done, work = Room(), 0, len(entrants) * (1 + rounds.total)
    try:
        for name, entrant in entrants.items():
            progress(f"open {name}", done, work)
            with _failing(taken[name], running, name):
                if entrant.start not in opened:
                    room.require(name, entrant.memory_bytes)
                    contender = opened[entrant.start] = entrant.start()
                    taken[name].opened = _asked(contender, contender.opened, probes)
                    room.take(entrant.memory_bytes)
                running[name] = opened[entrant.start]
            done += 1
        for round_ in range(rounds.total):
            seed, files = rounds.seed + round_, {}
            for index, name in _order(tuple(entrants), round_):
                progress(f"round {round_ + 1} of {rounds.total}: {name}", done, work)
                done += 1
                if name in running:
                    with _failing(taken[name], running, name):
                        file = pictures / f"{index}-{seed}.npy"
                        ask = partial(running[name].painted, seed, entrants[name].arguments, file)
                        answer = _asked(running[name], ask, probes)
                        files[name] = file
                        _keep(taken[name], answer, counts=round_ >= rounds.warm_up)
            if round_ >= rounds.warm_up:
                _compare(taken, files, references)
            for file in files.values():
                file.unlink()
        progress("done", work, work)
    finally:
        for contender in opened.values():
            contender.close()
    return taken


def require_measured(taken: Mapping[str, Taken], names: Iterable[str]) -> None:
    """Raise BenchmarkError for the first of these that has no figures: a report without it would say nothing."""
    for name in names:
        if taken[name].failed:
            raise BenchmarkError(name, taken[name].failed)


def psnr_db(picture: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """Of two pictures, (H, W, 3) float32 in 0..1; at most 200, which equal ones reach."""
    error = float(np.square(picture.astype(np.float64) - reference).mean())
    return MOST_DB if error == 0 else min(MOST_DB, -10 * float(np.log10(error)))


@contextmanager
def _failing(taken: Taken, running: dict[str, Contender], name: str) -> Iterator[None]:
    """What ends an entrant is kept in place of its figures, and the others go on."""
    try:
        yield
    except BenchmarkError as error:
        taken.failed = str(error).partition(": ")[2]
        taken.rounds.clear()
        taken.psnr_db.clear()
        running.pop(name, None)


def _asked(contender: Contender, ask: Callable[[], Answer], probes: Probes) -> Answer:
    """A contender's answer with what was seen of its turn."""
    with probes.turn(contender.pid) as seen:
        answer = ask()
    return answer.with_figures(seen)


def _keep(taken: Taken, answer: Answer, *, counts: bool) -> None:
    if taken.first is None:
        taken.first = answer
    if counts:
        taken.rounds.append(answer)


def _order(names: Sequence[str], round_: int) -> Sequence[tuple[int, str]]:
    """The names with their indices, those before the round's first behind the others."""
    first, numbered = round_ % len(names), tuple(enumerate(names))
    return (*numbered[first:], *numbered[:first])


def _compare(taken: Mapping[str, Taken], files: Mapping[str, Path], references: Mapping[str, str]) -> None:
    """Add the distance of the round's pictures to their references'; where one of another size is, there is none."""
    pictures = {name: np.load(file) for name, file in files.items()}
    for name, picture in pictures.items():
        reference = pictures.get(references[name])
        if reference is not None and references[name] != name and picture.shape == reference.shape:
            taken[name].psnr_db.append(psnr_db(picture, reference))
