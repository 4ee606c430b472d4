"""From decoded arrays to pictures, and to PNG files that say how they were made."""

from __future__ import annotations

import io
import operator
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from .files import write_whole

Float32 = npt.NDArray[np.float32]


def pixels_from_decoded(decoded: Float32) -> Float32:
    """A decoder's output (B, 3, H, W) in [-1, 1] as (B, H, W, 3) float32 in [0, 1]."""
    pixels: Float32 = np.clip(decoded * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    return pixels


def image_from_pixels(pixels: Float32) -> Image.Image:
    """One picture (H, W, 3) in [0, 1] as 8-bit RGB, rounded to nearest."""
    return Image.fromarray((pixels * np.float32(255)).round().astype(np.uint8))


def save_png(image: Image.Image, path: Path, facts: Mapping[str, str], *, replace: bool = True) -> None:
    """Write the PNG that `png_bytes` makes; the file appears whole or not at all.

    Raises:
        FileExistsError: a file of that name is there, and `replace` is off.
        OSError: the folder cannot be written or is full.
    """
    write_whole(path, operator.methodcaller("write", png_bytes(image, facts)), replace=replace)


def png_bytes(image: Image.Image, facts: Mapping[str, str]) -> bytes:
    """A PNG whose text chunks hold `facts`."""
    info, stream = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in facts.items():
        info.add_itxt(key, value)
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()
