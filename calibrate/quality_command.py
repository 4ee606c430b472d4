"""`tandemrt calibrate quality`: how good the pictures of a folder are, beside those of another or by their prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backends.buffers import one_line
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError, TandemError
from .frechet import FeatureStatistics, frechet_distance
from .perceptual import clip_likeness, inception_features, lpips_distance
from .picture_folders import batches, picture_files, pixels_of, prompt_in
from .prompts import read_prompts
from .quality import Pixels, Scorer, psnr_db, ssim, wilson_interval
from .quality_arguments import QualityPlan, add_arguments, plan_from_arguments
from .scorers import scorer_of

__all__ = ["add_arguments", "plan_from_arguments", "run", "status", "summary"]


def run(plan: QualityPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure; what cannot be measured is told, and does not keep the rest from it.

    Raises:
        TandemError: a folder holds no picture or a damaged one, the prompts or the scorer cannot be used.
    """
    scorer = None if plan.scorer is None else scorer_of(plan.scorer)
    job = _Job(plan, reporter, picture_files("PICTURES", plan.pictures))
    measured: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in plan.measures:
        found = job.measured(name)
        if isinstance(found, _NotMeasuredError):
            missing[name] = str(found)
            reporter.warn(f"not measured: {found}")
        else:
            measured[name] = found
    if scorer is not None:
        measured["scorer"] = job.scored(scorer)
    return {
        "pictures": str(plan.pictures),
        "count": len(job.files),
        "against": None if plan.against is None else str(plan.against),
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
    """1 where a measure that was asked for could not be had."""
    return int(result["asked"] and bool(result["not_measured"]))


class _NotMeasuredError(TandemError):
    """One measure cannot be had, which leaves the others alone."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A plan at work."""

    plan: QualityPlan
    reporter: Reporter
    files: tuple[Path, ...]

    def measured(self, name: str) -> dict[str, float] | _NotMeasuredError:
        """A measure by its name, or what keeps it from being had."""
        try:
            return _MEASURES[name](self)
        except _NotMeasuredError as error:
            return error

    def paired(
        self, name: str, measure: Callable[[Pixels, Pixels], float], *, lower_is_worse: bool
    ) -> dict[str, float]:
        """A measure of each picture and its reference: mean, median and worst."""
        references = {path.stem: path for path in picture_files("--against", self._against)}
        values = []
        for done, path in enumerate(self.files, start=1):
            if path.stem not in references:
                what = f"{self._against} has no picture named {path.stem}"
                raise _NotMeasuredError(name, what, remedy="The pictures of both folders need the same names.")
            picture, reference = pixels_of(path), pixels_of(references[path.stem])
            if picture.shape != reference.shape:
                got, expected = _size(picture), f"{_size(reference)} as {references[path.stem]}"
                raise _NotMeasuredError(name, f"{path} has another size", got=got, expected=expected)
            with _computing(name):
                values.append(measure(picture, reference))
            self.reporter.progress(name, done, len(self.files))
        worst = min(values) if lower_is_worse else max(values)
        return {"mean": statistics.fmean(values), "median": statistics.median(values), "worst": worst}

    def fid(self) -> dict[str, float]:
        """FID of the two folders."""
        with _optional("fid"):
            extract = inception_features(self.plan.inception)
        folders = {"fid": self.files, "fid, references": picture_files("--against", self._against)}
        found = []
        for label, files in folders.items():
            if len(files) < 2:
                raise _NotMeasuredError(
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
        with _optional("clip"):
            prompts = self._prompts()
            likeness = clip_likeness(self.plan.clip)
        values: list[float] = []
        for pictures in batches(self.files):
            with _computing("clip"):
                values += likeness(prompts[len(values) : len(values) + len(pictures)], pictures)
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

    @property
    def _against(self) -> Path:
        if self.plan.against is None:
            raise ArgumentError("--against", "not given")
        return self.plan.against

    def _prompts(self) -> tuple[str, ...]:
        """Each picture's prompt: of the file in the order of names, or of the picture itself."""
        if self.plan.prompts is None:
            return tuple(prompt_in(path) for path in self.files)
        prompts = read_prompts(self.plan.prompts, self.plan.column, repeats=True)
        if len(prompts) != len(self.files):
            expected = f"{len(self.files)}, one for each picture"
            remedy = "Leave --prompts out for pictures of `tandemrt`, which hold their own."
            where = f"--prompts {self.plan.prompts}"
            raise ArgumentError(where, "prompts", got=len(prompts), expected=expected, remedy=remedy)
        return prompts


_MEASURES: Mapping[str, Callable[[_Job], dict[str, float]]] = {
    "psnr": lambda job: job.paired("psnr", psnr_db, lower_is_worse=True),
    "ssim": lambda job: job.paired("ssim", ssim, lower_is_worse=True),
    "lpips": lambda job: job.paired("lpips", _lpips(), lower_is_worse=False),
    "fid": _Job.fid,
    "clip": _Job.clip,
}


def _lpips() -> Callable[[Pixels, Pixels], float]:
    with _optional("lpips"):
        return lpips_distance()


@contextmanager
def _optional(name: str) -> Iterator[None]:
    """What keeps one measure from being made ready; wrong arguments still end the run."""
    try:
        yield
    except ArgumentError:
        raise
    except TandemError as error:
        raise _NotMeasuredError(
            error.where if error.where != name else name, error.what, remedy=error.remedy
        ) from error


@contextmanager
def _computing(name: str) -> Iterator[None]:
    """What keeps one measure from being computed of pictures that are sound."""
    try:
        yield
    except Exception as error:  # torch's and ONNX Runtime's errors have no common class
        what = f"cannot be computed of these pictures ({one_line(error)})"
        raise _NotMeasuredError(name, what, remedy="Measure others, or leave it out with --measure.") from error


def _size(picture: Pixels) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
