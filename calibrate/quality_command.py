"""`tandemrt calibrate quality`: how good the pictures of a folder are, beside those of another or by their prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backends.buffers import one_line
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError, CalibrationError, TandemError
from .frechet import FeatureStatistics, frechet_distance
from .perceptual import clip_likeness, inception_features, lpips_distance
from .picture_folders import batches, paired, picture_files, pixels_of, prompt_in
from .prompts import normalised, read_prompts
from .quality import Pixels, Scorer, psnr_db, ssim, wilson_interval
from .quality_arguments import PAIRED, QualityPlan, add_arguments, plan_from_arguments
from .scorers import scorer_of

__all__ = ["add_arguments", "plan_from_arguments", "run", "status", "summary"]

_TOLD = 5  # of names in a sentence


def run(plan: QualityPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure; what cannot be measured is told, and does not keep the rest from it.

    Raises:
        ArgumentError: a folder holds no picture or a damaged one, or --prompts or --scorer cannot be used.
    """
    measures = {name: _MEASURES[name] for name in plan.measures}
    if plan.scorer is not None:
        measures["scorer"] = partial(_Job.scored, scorer=scorer_of(plan.scorer))
    files = picture_files("PICTURES", plan.pictures)
    pairs, strays = _pairs(plan, files, reporter) if set(measures) & set(PAIRED) else ((), [])
    job = _Job(plan, reporter, files, pairs, _given_prompts(plan, files, reporter))
    measured: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, measure in measures.items():
        found = _tried(measure, job)
        if isinstance(found, TandemError):
            missing[name] = str(found)
            reporter.warn(f"not measured: {found}")
        else:
            measured[name] = found
    return {
        "pictures": str(plan.pictures),
        "count": len(job.files),
        "against": None if plan.against is None else str(plan.against),
        "unpaired": list(map(str, strays)),
        "measures": measured,
        "not_measured": missing,
        "asked": plan.asked,
    }


def summary(result: Mapping[str, Any]) -> Iterator[str]:
    """One line a measure."""
    yield f"{result['count']} pictures of {result['pictures']}"
    for name, facts in result["measures"].items():
        yield f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in facts.items())


def status(result: Mapping[str, Any]) -> int:
    """1 where nothing was measured, or not what was asked for; a scorer is always asked for."""
    missing = result["not_measured"]
    return int(not result["measures"] or "scorer" in missing or (result["asked"] and bool(missing)))


@dataclass(frozen=True, slots=True)
class _Job:
    """A plan at work. pairs: pictures with their references. given: the prompts of --prompts."""

    plan: QualityPlan
    reporter: Reporter
    files: tuple[Path, ...]
    pairs: tuple[tuple[Path, Path], ...]
    given: tuple[str, ...] | None

    def paired(
        self, name: str, measure: Callable[[Pixels, Pixels], float], *, lower_is_worse: bool
    ) -> dict[str, float]:
        """A measure of each picture and its reference: mean, median and worst."""
        if not self.pairs:
            what = f"{self.plan.against} has no picture named as one of {self.plan.pictures}"
            raise CalibrationError(name, what, remedy="The pictures of both folders need the same names.")
        values = []
        for done, (path, like) in enumerate(self.pairs, start=1):
            picture, reference = pixels_of(path), pixels_of(like)
            if picture.shape != reference.shape:
                got, expected = _size(picture), f"{_size(reference)} as {like}"
                raise CalibrationError(name, f"{path} has another size", got=got, expected=expected)
            with _computing(name):
                values.append(measure(picture, reference))
            _require_number(name, path, values[-1])
            self.reporter.progress(name, done, len(self.pairs))
        worst = min(values) if lower_is_worse else max(values)
        return {"mean": statistics.fmean(values), "median": statistics.median(values), "worst": worst}

    def fid(self) -> dict[str, float]:
        """FID of the two folders."""
        extract = inception_features(self.plan.inception)
        folders = {"fid": self.files, "fid, references": picture_files("--against", _against(self.plan))}
        found = []
        for label, files in folders.items():
            if len(files) < 2:
                raise CalibrationError(
                    "fid", "pictures in a folder", got=len(files), expected="2 or more, better thousands"
                )
            statistics_of = FeatureStatistics()
            for pictures in batches(files):
                with _computing("fid"):
                    statistics_of.add(extract(np.stack(pictures)))
                self.reporter.progress(label, statistics_of.count, len(files))
            found.append(statistics_of)
        with _computing("fid"):
            return {"value": frechet_distance(*found)}

    def clip(self) -> dict[str, float]:
        """CLIP score: mean, median and worst."""
        prompts = self._prompts()
        likeness = clip_likeness(self.plan.clip)
        values: list[float] = []
        for pictures in batches(self.files):
            done = len(values)
            with _computing("clip"):
                values += likeness(prompts[done : done + len(pictures)], pictures)
            for path, value in zip(self.files[done:], values[done:], strict=False):
                _require_number("clip", path, value)
            self.reporter.progress("clip", len(values), len(self.files))
        return {"mean": statistics.fmean(values), "median": statistics.median(values), "worst": min(values)}

    def scored(self, scorer: Scorer) -> dict[str, float]:
        """The share of pictures that a scorer takes for right, with its 95% Wilson interval."""
        prompts, right, done = self._prompts(), 0, 0
        for pictures in batches(self.files):
            right += sum(scorer(prompts[done : done + len(pictures)], np.stack(pictures)))
            done += len(pictures)
            self.reporter.progress("scorer", done, len(self.files))
        low, high = wilson_interval(right, done)
        return {"share": right / done, "low": low, "high": high}

    def _prompts(self) -> tuple[str, ...]:
        """Each picture's prompt: of the file in the order of names, or of the picture itself."""
        return tuple(prompt_in(path) for path in self.files) if self.given is None else self.given


_MEASURES: Mapping[str, Callable[[_Job], dict[str, float]]] = {
    "psnr": lambda job: job.paired("psnr", psnr_db, lower_is_worse=True),
    "ssim": lambda job: job.paired("ssim", ssim, lower_is_worse=True),
    "lpips": lambda job: job.paired("lpips", lpips_distance(), lower_is_worse=False),
    "fid": _Job.fid,
    "clip": _Job.clip,
}


def _tried(measure: Callable[[_Job], dict[str, float]], job: _Job) -> dict[str, float] | TandemError:
    """A measure, or what keeps it from being had; what cannot be used as an argument still ends the run."""
    try:
        return measure(job)
    except ArgumentError:
        raise
    except TandemError as error:
        return error


def _pairs(
    plan: QualityPlan, files: tuple[Path, ...], reporter: Reporter
) -> tuple[tuple[tuple[Path, Path], ...], list[Path]]:
    """See `paired`; pictures without their like are told, where others have theirs."""
    pairs, strays = paired(files, picture_files("--against", _against(plan)))
    if pairs and strays:
        told = ", ".join(map(str, strays[:_TOLD])) + " …" * (len(strays) > _TOLD)
        reporter.warn(f"{len(pairs)} pairs of pictures are compared; without their like are {len(strays)}: {told}")
    return pairs, strays


def _against(plan: QualityPlan) -> Path:
    if plan.against is None:
        raise ArgumentError("--against", "not given")
    return plan.against


def _given_prompts(plan: QualityPlan, files: tuple[Path, ...], reporter: Reporter) -> tuple[str, ...] | None:
    """The prompts of --prompts, one for each picture; None where it is not given, or the pictures hold prompts of it.

    As `pictures` paints the first ones, and each once, its pictures are not those of the file's lines in turn.
    """
    if plan.prompts is None:
        return None
    prompts = read_prompts(plan.prompts, plan.column, repeats=True)
    known = set(map(normalised, prompts))
    try:
        painted_of_them = all(normalised(prompt_in(path)) in known for path in files)
    except CalibrationError:
        painted_of_them = False
    if painted_of_them:
        reporter.note(f"prompts are those in the pictures, all of which {plan.prompts} holds")
        return None
    if len(prompts) != len(files):
        where, expected = f"--prompts {plan.prompts}", f"{len(files)}, one for each picture"
        remedy = "Give a file of the pictures' own prompts; those of `tandemrt` hold them, and need none."
        raise ArgumentError(where, "prompts", got=len(prompts), expected=expected, remedy=remedy)
    return prompts


def _require_number(name: str, path: Path, value: float) -> None:
    """Raise CalibrationError where a network made nothing of a picture."""
    if not math.isfinite(value):
        remedy = "Look at the picture, or leave the measure out with --measure."
        raise CalibrationError(name, f"of {path}", got=value, expected="a finite number", remedy=remedy)


@contextmanager
def _computing(name: str) -> Iterator[None]:
    """What keeps one measure from being computed of pictures that are sound."""
    try:
        yield
    except Exception as error:  # torch's and ONNX Runtime's errors have no common class
        what = f"cannot be computed of these pictures ({one_line(error)})"
        raise CalibrationError(name, what, remedy="Measure others, or leave it out with --measure.") from error


def _size(picture: Pixels) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
