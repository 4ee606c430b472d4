"""`tandemrt calibrate quality`: how good the pictures of a folder are, beside those of another or by their prompts."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.cli.picture_files import read_picture
from ..runtime.cli.reporter import Reporter
from ..runtime.errors import ArgumentError, TandemError
from .frechet import FeatureStatistics, frechet_distance
from .perceptual import clip_likeness, inception_features, lpips_distance
from .prompts import read_prompts
from .quality import Pixels, Scorer, psnr_db, ssim, wilson_interval
from .scorers import scorer_of

DESCRIPTION = (
    "Measure the pictures of a folder: beside those of another, of the same names (psnr, ssim, lpips) or as a whole "
    "(fid), and by their prompts (clip, and a scorer of your own). What needs networks whose weights are not here is "
    "told, and the rest is measured."
)
EPILOG = """\
measures:
  psnr   in dB, at most 99, which equal pictures have; higher is closer
  ssim   structural similarity, 1 for equal pictures
  lpips  distance by AlexNet's features, 0 for equal pictures
  fid    Frechet distance of Inception's features over both folders; lower is closer, thousands of pictures are needed
  clip   CLIP score, 100 times the cosine of prompt and picture by CLIP ViT-L/14; higher is better

examples:
  tandemrt calibrate quality int8/ --against fp32/
  tandemrt calibrate quality split/ --against coco/ --measure fid clip --prompts captions.csv
  tandemrt calibrate quality split/ --scorer my_scores:shows
"""
PAIRED, AGAINST, PROMPTED = ("psnr", "ssim", "lpips"), ("psnr", "ssim", "lpips", "fid"), ("clip",)
MEASURES = (*AGAINST, *PROMPTED)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 16


@dataclass(frozen=True, slots=True)
class QualityPlan:
    """What to measure of which pictures. `asked`: whether the measures were named, and so have to be had."""

    pictures: Path
    against: Path | None
    prompts: Path | None
    column: str | None
    measures: tuple[str, ...]
    asked: bool
    scorer: str | None
    inception: Path | None
    clip: Path | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tandemrt calibrate quality`."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="the folder of what is measured")
    parser.add_argument("--against", type=Path, metavar="REFERENCES", help="the folder they are compared with")
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=MEASURES,
        metavar="NAME",
        help=f"{', '.join(MEASURES)} (default: all there can be)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="the pictures' prompts in the order of their names, one a line or a CSV file (default: those that "
        "TandemRT wrote into the pictures)",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="the column (default: the first there is of caption, prompt and text)"
    )
    parser.add_argument(
        "--scorer", metavar="MODULE:FUNCTION", help="what is given prompts and pictures, and says which are right"
    )
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="the network of fid: weights as torch-fidelity has them (.pth), "
        "a TorchScript module (.pt) or an ONNX graph",
    )
    parser.add_argument("--clip", type=Path, metavar="DIR", help="the model of clip, as transformers saves one")


def plan_from_arguments(namespace: argparse.Namespace) -> QualityPlan:
    """The command line as a plan.

    Raises:
        ArgumentError: a measure was asked for that needs --against.
    """
    asked = tuple(dict.fromkeys(namespace.measure or ()))
    if namespace.against is None and set(asked) & set(AGAINST):
        needy = [name for name in asked if name in AGAINST]
        raise ArgumentError("--measure", f"{', '.join(needy)} without --against", remedy="Give --against FOLDER.")
    there_can_be = PROMPTED if namespace.against is None else MEASURES
    return QualityPlan(
        pictures=namespace.pictures,
        against=namespace.against,
        prompts=namespace.prompts,
        column=namespace.column,
        measures=asked or there_can_be,
        asked=bool(asked),
        scorer=namespace.scorer,
        inception=namespace.inception,
        clip=namespace.clip,
    )


def run(plan: QualityPlan, reporter: Reporter) -> dict[str, Any]:
    """Measure; what cannot be measured is told, and does not keep the rest from it.

    Raises:
        TandemError: a folder holds no picture or a damaged one, the prompts or the scorer cannot be used.
    """
    scorer = None if plan.scorer is None else scorer_of(plan.scorer)
    job = _Job(plan, reporter, _files("PICTURES", plan.pictures))
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
        references = {path.stem: path for path in _files("--against", self._against)}
        values = []
        for done, path in enumerate(self.files, start=1):
            if path.stem not in references:
                what = f"{self._against} has no picture named {path.stem}"
                raise _NotMeasuredError(name, what, remedy="The pictures of both folders need the same names.")
            picture, reference = _pixels(path), _pixels(references[path.stem])
            if picture.shape != reference.shape:
                got, expected = _size(picture), f"{_size(reference)} as {references[path.stem]}"
                raise _NotMeasuredError(name, f"{path} has another size", got=got, expected=expected)
            values.append(measure(picture, reference))
            self.reporter.progress(name, done, len(self.files))
        worst = min(values) if lower_is_worse else max(values)
        return {"mean": statistics.fmean(values), "median": statistics.median(values), "worst": worst}

    def fid(self) -> dict[str, float]:
        """FID of the two folders."""
        with _optional("fid"):
            extract = inception_features(self.plan.inception)
        folders = {"fid": self.files, "fid, references": _files("--against", self._against)}
        found = []
        for label, files in folders.items():
            if len(files) < 2:
                raise _NotMeasuredError(
                    "fid", "pictures in a folder", got=len(files), expected="2 or more, better thousands"
                )
            statistics_of = FeatureStatistics()
            for pictures in _batches(files):
                statistics_of.add(extract(np.stack(pictures)))
                self.reporter.progress(label, statistics_of.count, len(files))
            found.append(statistics_of)
        return {"value": frechet_distance(*found)}

    def clip(self) -> dict[str, float]:
        """CLIP score: mean, median and worst."""
        with _optional("clip"):
            prompts = self._prompts()
            likeness = clip_likeness(self.plan.clip)
        values: list[float] = []
        for pictures in _batches(self.files):
            values += likeness(prompts[len(values) : len(values) + len(pictures)], pictures)
            self.reporter.progress("clip", len(values), len(self.files))
        return {"mean": statistics.fmean(values), "median": statistics.median(values), "worst": min(values)}

    def scored(self, scorer: Scorer) -> dict[str, float]:
        """The share of pictures that a scorer takes for right, with its 95% Wilson interval."""
        prompts, right, done = self._prompts(), 0, 0
        for pictures in _batches(self.files):
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
            return tuple(_prompt_in(path) for path in self.files)
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


def _files(option: str, folder: Path) -> tuple[Path, ...]:
    """A folder's pictures by name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ArgumentError(
            f"{option} {folder}", f"cannot be read ({error.strerror})", remedy="Check the path."
        ) from error
    if not found:
        raise ArgumentError(f"{option} {folder}", "holds no picture", expected=f"files of {', '.join(SUFFIXES)}")
    return tuple(found)


def _pixels(path: Path) -> Pixels:
    """(H, W, 3) uint8"""
    return np.asarray(read_picture("picture", path).image.convert("RGB"))


def _batches(files: Sequence[Path]) -> Iterator[list[Pixels]]:
    """Pictures of one size each time, at most 16."""
    batch: list[Pixels] = []
    for picture in map(_pixels, files):
        if batch and (len(batch) == BATCH or picture.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(picture)
    yield batch


def _prompt_in(path: Path) -> str:
    prompt = read_picture("picture", path).image.info.get("prompt")
    if not isinstance(prompt, str):
        raise ArgumentError(str(path), "holds no prompt", remedy="Give --prompts FILE with one for each picture.")
    return prompt


def _size(picture: Pixels) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
