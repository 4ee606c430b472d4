"""How good pictures are: their distance from a reference, and how sure a share of right ones is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Scorer = Callable[[Sequence[str], Pixels], Sequence[bool]]
"""Given prompts and their pictures, (B, H, W, 3) uint8 RGB, says of each picture whether it shows its prompt."""

MAX_PSNR_DB = 99.0
_PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5


def psnr_db(picture: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures of one shape, uint8, in dB; at most 99, which equal ones have.

    Raises:
        ValueError: they are not uint8 of one shape.
    """
    _require_pictures(picture, reference)
    error = float(np.square(picture.astype(np.float64) - reference).mean())
    return MAX_PSNR_DB if error == 0 else min(MAX_PSNR_DB, 10 * math.log10(_PEAK**2 / error))


def ssim(picture: Pixels, reference: Pixels) -> float:
    """Structural similarity of two pictures, (H, W, 3) uint8 with H and W 11 or more: -1..1, and 1 for equal ones.

    The mean over the channels and over all places where the window lies inside the picture: Wang et al. 2004, with
    their Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03.

    Raises:
        ValueError: they are not uint8 of one shape, or are smaller than the window.
    """
    _require_pictures(picture, reference)
    if picture.ndim != 3 or min(picture.shape[:2]) < _WINDOW:
        raise ValueError(f"pictures: got {picture.shape}, expected (H, W, channels) with sides from {_WINDOW} on")
    x, y = picture.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())


def latent_error(latents: Float32, reference: Float32) -> float:
    """Relative root-mean-square error: the RMS of the difference divided by that of the reference; 0 for equal ones.

    Raises:
        ValueError: they are not of one shape.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"latents: got {latents.shape}, expected {reference.shape} as the reference")
    expected = reference.astype(np.float64)
    error = math.sqrt(float(np.square(latents - expected).mean()))
    size = math.sqrt(float(np.square(expected).mean()))
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion of 1 or more trials (Wilson 1927)."""
    z = 1.959964
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return middle - half, middle + half


def _require_pictures(picture: Pixels, reference: Pixels) -> None:
    if picture.shape != reference.shape or picture.dtype != np.uint8 or reference.dtype != np.uint8:
        got = f"{picture.shape} {picture.dtype} and {reference.shape} {reference.dtype}"
        raise ValueError(f"pictures: got {got}, expected uint8 of one shape")


def _windowed(values: Float64) -> Float64:
    """(H, W, channels) weighted by the Gaussian window, wherever that lies inside: (H - 10, W - 10, channels)."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        places = values.shape[axis] - _WINDOW + 1
        parts = (values.take(range(index, index + places), axis) for index in range(_WINDOW))
        values = sum((weight * part for weight, part in zip(weights, parts, strict=True)), np.zeros(()))
    return values
