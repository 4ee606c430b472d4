"""Pictures in a folder: which there are, their pixels, and the prompts that TandemRT wrote into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..runtime.cli.picture_files import read_picture
from ..runtime.errors import ArgumentError, CalibrationError
from .quality import Pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 16


def picture_files(option: str, folder: Path) -> tuple[Path, ...]:
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


def paired(files: Sequence[Path], references: Sequence[Path]) -> tuple[tuple[tuple[Path, Path], ...], list[Path]]:
    """Pictures with their references of the same name, whatever the suffix, and those of either without their like."""
    named, known = {path.stem: path for path in references}, {path.stem for path in files}
    pairs = tuple((path, named[path.stem]) for path in files if path.stem in named)
    strays = [path for path in files if path.stem not in named]
    return pairs, strays + [path for path in references if path.stem not in known]


def pixels_of(path: Path) -> Pixels:
    """A picture, (H, W, 3) uint8."""
    return np.asarray(read_picture("picture", path).image.convert("RGB"))


def batches(files: Sequence[Path]) -> Iterator[list[Pixels]]:
    """Pictures of one size each time, at most 16."""
    batch: list[Pixels] = []
    for picture in map(pixels_of, files):
        if batch and (len(batch) == BATCH or picture.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(picture)
    yield batch


def prompt_in(path: Path) -> str:
    """What a picture says that it was painted of; CalibrationError where it says nothing."""
    prompt = read_picture("picture", path).image.info.get("prompt")
    if not isinstance(prompt, str):
        raise CalibrationError(str(path), "holds no prompt", remedy="Give --prompts FILE with one for each picture.")
    return prompt
