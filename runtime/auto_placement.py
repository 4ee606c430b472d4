"""Which placement is fastest: tried once for a bundle, a target and a machine, and remembered in the user's cache."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from .architecture import cpu_architecture, usable_cpus
from .backends import gpu_names
from .backends.base import Shape
from .bundle import Bundle
from .errors import CancelledError, EngineError, ExecutionError, TandemError
from .files import write_whole
from .manifest import Frozen
from .placement import Placed, refusal
from .plan import Plan
from .targets import Target, installed_version, nvidia_gpus
from .trace import span

FORMAT = 2
MAX_BYTES = 1 << 16
CANDIDATES = ("batched", "parallel", "sequential")
_ROUNDS = 3
_POLL_S = 0.05
# What another placement must gain over one before it in the list: less is noise.
_GAIN = 0.97


class Ground(Frozen, frozen=True, kw_only=True):
    """All that a measurement rests on; another of anything is measured anew.

    bundle: of its files alone. models: the denoisers of guided rows and the ControlNets beside them, with the keys of
        the engines that they may run on.
    """

    format: int
    bundle: str
    target: str
    threads: int | None
    versions: Mapping[str, str]
    machine: tuple[str, ...]
    models: Mapping[str, tuple[str, ...]]
    shape: tuple[int, ...]
    devices: tuple[str, ...]
    placements: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class Measurement(Frozen, frozen=True, kw_only=True):
    """What a guided row of each denoiser took together, by placement, in milliseconds."""

    ground: Ground
    ms: Mapping[str, float]

    @property
    def fastest(self) -> str:
        best = next(iter(self.ms))
        for placement, ms in self.ms.items():
            best = placement if ms < _GAIN * self.ms[best] else best
        return best


class AutoPlacement:
    """Chooses placements for a bundle on a target; safe to share between threads, of which one measures at a time."""

    def __init__(
        self, bundle: Bundle, target: Target, threads: int | None, cache: Path, alone: Callable[[], int | None]
    ) -> None:
        """alone: see `Turns.alone`. Measured beside other generations, a choice is kept as long as this object."""
        self._bundle, self._target, self._threads, self._cache = bundle, target, threads, cache
        self._alone = alone
        self._lock = threading.Lock()
        self._made: dict[str, Measurement] = {}

    def choose(
        self,
        plan: Plan,
        shape: Shape,
        models: Mapping[str, tuple[str, ...]],
        place: Callable[[str], Placed],
        before: Callable[[], None],
        without: Mapping[str, EngineError],
    ) -> Measurement | None:
        """What decides on the placement of a plan's guided rows, for latents of this shape; None where it has none.

        models: as of `Ground`. place: what predicts the rows in a placement, with its models loaded.
        before: called before each row that is tried, and again and again while another's trial is waited for, before
            one of its own; what it raises ends the trial, of which nothing is remembered.
        without: placements that are not tried, since engines are missing for them, and which.

        A placement that fails is left out, and then the choice is not kept beyond this object.

        Raises:
            EngineError, ExecutionError: as `place` and the rows, or of `without`, where no placement is left.
        """
        if not any(plan.guided):
            return None
        possible = (one for one in CANDIDATES if refusal(one, self._target, self._threads) is None)
        listed = [one for one in possible if one not in without]
        if not listed:
            raise next(iter(without.values()))
        ground = self._ground(shape, models, listed)
        if (known := self._known(ground)) is not None:
            return known
        while not self._lock.acquire(timeout=_POLL_S):
            before()
        try:
            if (known := self._known(ground)) is not None:
                return known
            placed, alone = _placed(listed, place, before), self._alone()
            measurement = Measurement(ground=ground, ms=_measured(plan, shape, placed, before))
            whole = len(measurement.ms) == len(listed)
            if whole and alone is not None and self._alone() == alone:
                _remember(self._path(ground), measurement)
            return self._made.setdefault(ground.key, measurement)
        finally:
            self._lock.release()

    def _known(self, ground: Ground) -> Measurement | None:
        """A measurement on this ground, by this object or in the cache."""
        made = self._made.get(ground.key) or _remembered(self._path(ground), ground)
        return None if made is None else self._made.setdefault(ground.key, made)

    def _path(self, ground: Ground) -> Path:
        return self._cache / "placements" / f"{ground.key}.json"

    def _ground(self, shape: Shape, models: Mapping[str, tuple[str, ...]], listed: Sequence[str]) -> Ground:
        return Ground(
            format=FORMAT,
            bundle=self._bundle.manifest.files_digest,
            target=str(self._target),
            threads=self._threads,
            versions={"tandemrt": version("tandemrt"), self._target.backend: installed_version(self._target.backend)},
            machine=(cpu_architecture(), f"{usable_cpus()} CPUs", *nvidia_gpus()),
            models=models,
            shape=tuple(shape),
            devices=gpu_names(self._target),
            placements=tuple(listed),
        )


class _Failed(dict[str, TandemError]):
    """Why placements are left out."""

    @contextmanager
    def noting(self, placement: str, before: Callable[[], None]) -> Iterator[None]:
        """Go on where a placement fails, unless the whole generation is to end, which `before` tells."""
        try:
            yield
        except CancelledError:
            raise
        except (EngineError, ExecutionError) as error:
            before()
            self[placement] = error.again()

    def require_fewer(self, placements: Collection[str]) -> None:
        """Raise why the first one failed where all of them did."""
        if len(self) == len(placements):
            raise next(iter(self.values()))


def _placed(listed: Sequence[str], place: Callable[[str], Placed], before: Callable[[], None]) -> dict[str, Placed]:
    """What predicts the rows in each of these placements that there can be."""
    placed, failed = dict[str, Placed](), _Failed()
    for one in listed:
        with failed.noting(one, before):
            placed[one] = place(one)
    failed.require_fewer(listed)
    return placed


def _measured(plan: Plan, shape: Shape, placed: Mapping[str, Placed], before: Callable[[], None]) -> dict[str, float]:
    """The least that the first guided row of each denoiser takes, in turns, in each of these placements that runs."""
    rows = {name: row for row, name in reversed(list(enumerate(plan.denoisers))) if plan.guided[row]}
    sample = np.zeros(shape, np.float32)
    least = {one: dict.fromkeys(rows, float("inf")) for one in placed}
    failed = _Failed()
    try:
        for round_, one in product(range(1 + _ROUNDS), placed):
            if one in failed:
                continue
            with failed.noting(one, before):
                for name, row in rows.items():
                    before()
                    with span(f"try {one}", row):
                        took = placed[one].predict(row, sample, guided=True).model_ms
                    if round_:  # the first round sets up what is set up late
                        least[one][name] = min(least[one][name], took)
    finally:
        for each in placed.values():
            each.rest()
    failed.require_fewer(placed)
    return {one: sum(by_name.values()) for one, by_name in least.items() if one not in failed}


def _remembered(path: Path, ground: Ground) -> Measurement | None:
    """A measurement on this ground; None where there is none, or something else in its place."""
    try:
        with path.open("rb") as stream:
            measurement = msgspec.json.decode(stream.read(MAX_BYTES), type=Measurement)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    whole = measurement.ground == ground and set(measurement.ms) == set(ground.placements)
    return measurement if whole else None


def _remember(path: Path, measurement: Measurement) -> None:
    """Keep a measurement for the next time. Where the cache cannot be written, that costs another measurement."""

    def write(stream: BinaryIO) -> None:
        stream.write(msgspec.json.format(msgspec.json.encode(measurement, order="deterministic"), indent=2) + b"\n")

    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
