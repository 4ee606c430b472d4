"""Measures of quality: against values computed elsewhere, and scorers that are asked for by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from tandemrt.bench.shapes.scenes import render, scenes
from tandemrt.calibrate.quality import latent_error, psnr_db, scorer_of, ssim, wilson_interval
from tandemrt.runtime.errors import ArgumentError


def waves(phase: float) -> np.ndarray:
    """A picture, (37, 52, 3) uint8, that any machine computes alike."""
    rows, columns, channels = np.indices((37, 52, 3))
    values = np.sin(rows / 5 + phase) + np.cos(columns / 7 - phase) + np.sin(channels + rows * columns / 300)
    return np.rint((values + 3) * 42.5).astype(np.uint8)


def test_psnr_is_that_of_eight_bit_pictures():
    picture = np.full((64, 64, 3), 100, np.uint8)
    assert psnr_db(picture, picture + np.uint8(1)) == pytest.approx(20 * math.log10(255))
    # Differences are taken as signed numbers, not modulo 256.
    assert psnr_db(np.zeros_like(picture), np.full_like(picture, 255)) == pytest.approx(0)
    assert psnr_db(picture, picture) == 99.0


def test_ssim_is_that_of_the_paper():
    # scikit-image 0.26's structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # channel_axis=-1, data_range=255), whose window is the paper's.
    assert ssim(waves(0.3), waves(0.0)) == pytest.approx(0.9438696806318266, abs=1e-12)
    assert ssim(waves(2.0), waves(0.0)) == pytest.approx(0.04835761830387028, abs=1e-12)
    assert ssim(waves(1.0), waves(1.0)) == 1.0


@pytest.mark.parametrize("measure", [psnr_db, ssim])
@pytest.mark.parametrize("other", [waves(0)[:, 1:], waves(0).astype(np.float32)], ids=["shape", "type"])
def test_pictures_that_cannot_be_compared_are_an_error(measure, other):
    with pytest.raises(ValueError, match="expected uint8 of one shape"):
        measure(other, waves(0))


def test_a_picture_smaller_than_the_window_has_no_ssim():
    with pytest.raises(ValueError, match="sides from 11 on"):
        ssim(waves(0)[:10], waves(1)[:10])


def test_latent_error_is_relative():
    reference = np.array([[3.0, -4.0]], np.float32)
    assert latent_error(1.5 * reference, reference) == pytest.approx(0.5)
    assert latent_error(reference, reference) == 0
    assert (latent_error(0 * reference, 0 * reference), latent_error(reference, 0 * reference)) == (0, math.inf)
    with pytest.raises(ValueError, match="as the reference"):
        latent_error(reference[0], reference)


def test_wilson_interval_is_the_published_one():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), interval in published.items():
        assert wilson_interval(successes, trials) == pytest.approx(interval, abs=5e-5)


def test_the_shapes_scorer_is_found_by_its_name():
    chosen = scenes(3, 3, "held_out")
    pictures = np.stack([render(scene) for scene in chosen])
    scorer = scorer_of("tandemrt.bench.shapes.checker:shows")
    assert scorer([scene.caption for scene in chosen], pictures) == (True, True, True)
    with pytest.raises(ArgumentError, match="no caption of the shapes family"):
        scorer(["a castle"], pictures[:1])


def test_a_scorer_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scores.py").write_text(
        "def bright(prompts, pictures):\n    return [p.mean() > 127 for p in pictures]\n"
    )
    path = list(sys.path)
    scorer = scorer_of("own_scores:bright")
    pictures = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 255)])
    assert scorer(["a", "b"], pictures) == (False, True)
    assert sys.path == path
    with pytest.raises(ArgumentError, match="how many answers it gave, got 2, expected 1"):
        scorer(["a"], pictures)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tandemrt.bench.shapes.checker", "not a scorer"),
        ("os; x:y", "not a scorer"),
        ("tandemrt.bench.shapes.checker:", "not a scorer"),
        ("tandemrt.bench.shapes.checker:sees", "no function sees"),
        ("tandemrt.bench.shapes.checker:MINIMUM_IOU", "no function MINIMUM_IOU"),
        ("no_such_module:shows", "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_what_is_no_scorer_is_refused(text, message):
    with pytest.raises(ArgumentError, match=message):
        scorer_of(text)
