"""As few layers in floating point as a budget allows: the worst of all components together, judged by pictures."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..engines.job import Progress
from ..runtime.bundle import Bundle
from ..runtime.cli.reporter import Reporter
from ..runtime.engine_files import origin_of
from ..runtime.errors import CalibrationError
from ..runtime.manifest import Loss, Quantization
from .budget import fewest_kept
from .derived import Derived
from .judged import Judge, Way
from .ledger import Ledger
from .quantize_job import Job
from .quantizers import FORMATS, NEEDS_SAMPLES, TOOLS, Quantizer, Work

Kept = Mapping[str, tuple[str, ...]]
"""A candidate: the components that are quantized in it, of each the layers that are kept for the budget."""

Losses = Mapping[Way, Loss]


class Search:
    """Candidates in one bundle in the making, whose layers are kept in the order of what they take from pictures."""

    def __init__(self, job: Job, derived: Derived, ledger: Ledger | None, reporter: Reporter) -> None:
        """ledger: has what was measured by then; needed where there is a budget.

        Raises:
            ArgumentError, BundleError, CalibrationError, ExecutionError: samples or a graph cannot be used.
        """
        self._job, self._derived, self._ledger, self._note = job, derived, ledger, reporter.note
        progress = reporter.progress
        self._quantizers = {name: _quantizer(job, name, ledger, progress) for name in job.names}
        self._there: dict[str, tuple[str, ...]] = {}
        budget = job.plan.budget
        self._judge = Judge(job.bundle, job.judged, budget, job.scorer, progress)
        self._searcher = None
        if job.searched is not None:
            self._searcher = Judge(job.bundle, job.searched, budget, job.scorer, progress)
        self._ranking: Iterator[tuple[str, tuple[str, ...]]] | None = None
        self._ranked: list[tuple[str, tuple[str, ...]]] = []

    @property
    def most(self) -> int:
        """How many weights' layers can be kept: of each component all but one's, else it would not be quantized."""
        return sum(len(one.layers) - 1 for one in self._quantizers.values())

    def settled(self) -> Losses:
        """Leave in the bundle what keeps to the budget, and say what it takes, by prompts that were not searched with.

        Where the fewest layers that do with the search's prompts do not with these, more are kept.

        Raises:
            CalibrationError: no number of them meets it; the nearest is named.
            TandemError: as `Judge.losses`.
        """
        count = 0 if self._searcher is None else self._fewest(self._searcher)
        tried: dict[int, Losses] = {}
        while True:
            losses = self._judge.losses(self._made(self._kept(count)), self._ways)
            tried[count] = {way: msgspec.structs.replace(one, judged=len(tried) + 1) for way, one in losses.items()}
            self._tell("judged with", count, tried[count])
            if _holds(tried[count].values()):
                return tried[count]
            if count == self.most:
                raise self._missed(tried)
            count = min(self.most, count + 2 ** (len(tried) - 1))

    @property
    def _ways(self) -> tuple[Way, ...]:
        return tuple(dict.fromkeys(way for ways in self._job.ways.values() for way in ways))

    def _fewest(self, judge: Judge) -> int:
        """Of how many weights the layers have to be kept for the search's prompts."""
        tried: dict[int, Losses] = {}

        def holds(count: int) -> bool:
            tried[count] = self._searched(judge, self._kept(count), self._ways)
            self._tell("searched with", count, tried[count])
            return _holds(tried[count].values())

        count = fewest_kept(self.most, holds)
        if count is None:
            raise self._missed(tried)
        return count

    def _tell(self, how: str, count: int, losses: Losses) -> None:
        """Say of a candidate what it reaches of the budget, where there is one."""
        if self._job.plan.budget.asks:
            kept = sum(map(len, self._kept(count).values()))
            self._note(f"{how} {kept} kept: {reached(losses.values())}")

    def _searched(self, judge: Judge, kept: Kept, ways: Sequence[Way]) -> Losses:
        """What a candidate takes with the search's prompts, as it was measured before where it was."""
        if self._ledger is None:
            raise ValueError("a search needs a ledger")
        painting, budget = judge.painting, self._job.plan.budget
        facts = [sorted(kept.items()), painting.prompts_sha256, painting.seed]
        candidate = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        keys = {way: f"{candidate}, {way}" for way in ways}
        unknown = [way for way, key in keys.items() if self._ledger.get(key) is None]
        if unknown:
            for way, loss in judge.losses(self._made(kept), unknown).items():
                self._ledger.put(keys[way], msgspec.to_builtins(loss))
        bounds = {"min_psnr_db": budget.min_psnr_db, "min_accuracy": budget.min_accuracy}
        return {way: msgspec.convert({**self._ledger.get(key), **bounds}, Loss) for way, key in keys.items()}

    def _kept(self, count: int) -> Kept:
        """The candidate that keeps the layers of so many weights, the worst ones."""
        if count and self._ranking is None:
            self._ranking = self._merged()
        if self._ranking is not None:
            self._ranked += islice(self._ranking, max(0, count - len(self._ranked)))
        kept: dict[str, tuple[str, ...]] = dict.fromkeys(self._quantizers, ())
        for name, layers in self._ranked[:count]:
            kept[name] = (*kept[name], *layers)
        return kept

    def _merged(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The layers of all components with their components' names, those first that take most from pictures."""
        merged = heapq.merge(*(self._weighed(name) for name in self._quantizers))
        return ((name, layers) for _, name, layers in merged)

    def _weighed(self, name: str) -> Iterator[tuple[float, str, tuple[str, ...]]]:
        """A component's layers, of each weight's the negative of what they take: of what the component takes alone."""
        quantizer, taken = self._quantizers[name], 1.0
        if len(self._quantizers) > 1 and self._searcher is not None:
            alone = self._searched(self._searcher, {name: ()}, self._job.ways[name])
            taken = float(np.mean([10 ** (-one.psnr_db / 10) for one in alone.values()]))
        for one in islice(quantizer.ranked(), len(quantizer.layers) - 1):
            yield -one.share * taken, name, one.layers

    def _made(self, kept: Kept) -> Bundle:
        """The bundle that holds a candidate; graphs that it holds already are not written again."""
        for name in self._quantizers:
            wanted = kept.get(name)
            if self._there.get(name) == wanted:
                continue
            if wanted is None:
                self._derived.restore(name)
                del self._there[name]
            else:
                self._derived.replace(name, partial(self._written, name, wanted))
                self._there[name] = wanted
        return self._derived.opened()

    def _written(self, name: str, kept: tuple[str, ...], out: Path) -> Quantization:
        job, searched = self._job, self._job.searched
        done = self._quantizers[name].write(out, kept)
        settings: dict[str, Any] = {**done.settings, "kept_for_the_budget": len(kept)}
        if searched is not None:
            facts = {"prompts": len(searched.prompts), "prompts_sha256": searched.prompts_sha256}
            settings["searched_with"] = {**facts, "seed": searched.seed}
        trajectories = job.trajectories if job.plan.format in NEEDS_SAMPLES else None
        return Quantization(
            format=job.plan.format,
            tool=str(settings.pop("tool", "tandemrt")),
            version=str(settings.pop("version", version("tandemrt"))),
            settings=settings,
            layers=len(done.layers),
            kept=done.kept,
            float_model=origin_of(job.bundle, name),
            trajectories=None if trajectories is None else trajectories.digest,
        )

    def _missed(self, tried: Mapping[int, Losses]) -> CalibrationError:
        """What says that no candidate keeps to the budget, and which is nearest to it."""
        nearest = max(tried, key=lambda count: min(_margins(tried[count].values())))
        _, metric, got, expected = min(_margins(tried[nearest].values()))
        layers = sum(len(names) for one in self._quantizers.values() for names in one.layers)
        kept = sum(map(len, self._kept(nearest).values()))
        where = f"{', '.join(self._quantizers)}, with {kept} of {layers} layers in floating point, the nearest"
        remedy = "Ask for less, for another format, or keep more with --keep."
        return CalibrationError(where, f"budget of {metric}", got=got, expected=expected, remedy=remedy)


def _quantizer(job: Job, name: str, ledger: Ledger | None, progress: Progress) -> Quantizer:
    plan, trajectories, count = job.plan, job.trajectories, job.samples(name)
    samples = None if trajectories is None or count is None else partial(trajectories.samples, name)
    work = Work(
        model=job.bundle.model_path(name),
        samples=samples,
        count=count or 0,
        keep=job.keep[name],
        ranges=job.ranges(name),
        ledger=ledger,
        progress=progress,
    )
    make = FORMATS[plan.format] if plan.tool is None else TOOLS[plan.tool][1]
    return make(work, plan.int8)


def reached(losses: Iterable[Loss]) -> str:
    """Of each figure that a budget has the one that is nearest to it or furthest beyond, and whether it holds."""
    worst: dict[str, tuple[float, str, str, str]] = {}
    for found in sorted(_margins(losses)):
        worst.setdefault(found[1], found)
    told = []
    for margin, metric, got, expected in worst.values():
        figure = f"accuracy {got}" if metric == "accuracy" else got
        told.append(f"{figure}, {'misses' if margin < 0 else 'holds'} {expected.removeprefix('at least ')}")
    return "; ".join(told)


def _holds(losses: Iterable[Loss]) -> bool:
    return all(loss.holds for loss in losses)


def _margins(losses: Iterable[Loss]) -> list[tuple[float, str, str, str]]:
    """How far within its budget each figure is, relative to it and negative beyond; its name, itself and the budget."""
    found = []
    for loss in losses:
        if loss.min_psnr_db is not None:
            margin = loss.psnr_db / loss.min_psnr_db - 1
            found.append((margin, "psnr_db", f"{loss.psnr_db:.1f} dB", f"at least {loss.min_psnr_db:.4g} dB"))
        if loss.min_accuracy is not None and loss.accuracy is not None and loss.float_accuracy is not None:
            least = loss.min_accuracy * loss.float_accuracy
            margin = loss.accuracy / least - 1 if least else 0.0
            expected = f"at least {least:.4g}, of the float bundle's {loss.float_accuracy:.3f}"
            found.append((margin, "accuracy", f"{loss.accuracy:.3f}", expected))
    return found
