"""Measures of quality: against values computed elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tandemrt.calibrate.quality import latent_error, psnr_db, ssim, wilson_interval


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
