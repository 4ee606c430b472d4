"""What calibration measured, as the manifest keeps it: the evidence behind a bundle's defaults."""

from __future__ import annotations

from typing import Literal

import msgspec

QualityMeasure = Literal["latent_error", "psnr_db", "ssim", "accuracy"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Immutable and without unknown fields, as the manifest's own entries."""


class RowTime(_Record, frozen=True, kw_only=True):
    """How long a row of one picture took in its denoiser, in milliseconds: the median over rounds, and the extremes.

    `rounds_ms` are all of them, in the order in which the denoisers took turns.
    """

    median_ms: float
    least_ms: float
    most_ms: float
    rounds_ms: tuple[float, ...] = ()


class CallTime(_Record, frozen=True, kw_only=True):
    """How long a call for one picture takes a quantized component beside the float one, in turns within one run.

    The medians over `rounds` in milliseconds, and the quantized one's time by the float one's in the same round: the
    median and the extremes. A denoiser's call is a row. `target`, `threads` and `machine` are as in `SplitCalibration`.
    """

    float_ms: float
    quantized_ms: float
    ratio: float
    least_ratio: float
    most_ratio: float
    rounds: int
    target: str
    threads: int | None
    machine: tuple[str, ...]


class SplitPoint(_Record, frozen=True, kw_only=True):
    """A plan that was measured: its runs of steps, its cost as a share of the large denoiser's, and its quality.

    `cost_interval`: the 96% interval of the cost's median over rounds, where rows were timed for this point.
    Quality is to the pictures of the large denoiser alone from the same noise, the median over pictures.
    `right`: how many pictures the scorer let pass, where there was one.
    """

    steps: tuple[tuple[str, int], ...]
    cost: float
    latent_error: float
    psnr_db: float
    ssim: float
    right: int | None = None
    cost_interval: tuple[float, float] | None = None


class SplitHeldOut(_Record, frozen=True, kw_only=True):
    """What the plan that was chosen and the large denoiser alone come to on prompts that it was not chosen with.

    `prompts_sha256` and `seed` are as in `SplitCalibration`.
    """

    prompts: int
    prompts_sha256: str
    seed: int
    chosen: SplitPoint
    large: SplitPoint


class SplitCalibration(_Record, frozen=True, kw_only=True):
    """The sweep that `defaults.steps` was chosen from, by `chosen_by` among the plans that cost `budget` or less.

    `files_sha256` is `Manifest.files_digest` as it was: where it is no longer, other models have taken its place.
    `row_times` are by denoiser, with ` unguided` behind it where one branch of guidance ran. `prompts_sha256` is of the
    prompts, one a line; prompt i had `seed` + i. `machine` is what it ran on, `threads` how many a model was given,
    None where the backend chose. `scorer_sha256` is of the scorer's source.
    `held_out` is there where a sweep was given such prompts.
    """

    files_sha256: str
    large: str
    small: str
    target: str
    threads: int | None
    machine: tuple[str, ...]
    versions: dict[str, str]
    row_times: dict[str, RowTime]
    prompts: int
    prompts_sha256: str
    seed: int
    scorer: str | None
    scorer_sha256: str | None
    budget: float
    chosen_by: QualityMeasure
    points: tuple[SplitPoint, ...]
    held_out: SplitHeldOut | None = None


class GuidanceCalibration(_Record, frozen=True, kw_only=True):
    """What a stored way to leave guidance out came to, on `held_out` prompts that it was not chosen with.

    `numbers` are what is stored, chosen with `prompts` prompts for a plan of these runs of `steps` and this guidance.
    `files_sha256`, `threads`, `machine`, `prompts_sha256` and `scorer_sha256` are as in `SplitCalibration`.
    A way was good enough where the PSNR of the pictures' mean squared error to full guidance is `min_psnr_db`, and
    where the share of pictures that `scorer` lets pass is lower by `max_lost`, at most; either may be absent.
    `branches`: runs of one branch of the denoiser a picture, the mean, of `full_branches` with full guidance.
    `time_ratio`: the time of the rows by that with full guidance in the same turn, the median.
    """

    files_sha256: str
    numbers: dict[str, float]
    steps: tuple[tuple[str, int], ...]
    guidance_scale: float
    target: str
    threads: int | None
    machine: tuple[str, ...]
    versions: dict[str, str]
    seed: int
    prompts: int
    prompts_sha256: str
    held_out: int
    held_out_sha256: str
    min_psnr_db: float | None
    scorer: str | None
    scorer_sha256: str | None
    max_lost: float | None
    branches: float
    full_branches: int
    time_ratio: float
    psnr_db: float
    worst_psnr_db: float
    right: int | None = None
    right_in_full: int | None = None


class Calibrations(_Record, frozen=True, kw_only=True):
    """What was measured for the bundle's defaults; None where nothing was.

    `guidance`: by what it was measured for, `interval`, `adaptive` or `hybridiff`.
    """

    split: SplitCalibration | None = None
    guidance: dict[str, GuidanceCalibration] = {}

    def outdated(self, files_digest: str) -> tuple[str, ...]:
        """What was measured with other files than those with this `Manifest.files_digest`: `split`, or of guidance."""
        split = {} if self.split is None else {"split": self.split.files_sha256}
        measured = {**split, **{name: one.files_sha256 for name, one in self.guidance.items()}}
        return tuple(name for name, files_sha256 in measured.items() if files_sha256 != files_digest)
