"""Pictures that a run starts from or is steered by: files, read once, and what is recorded of them."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..errors import ArgumentError

MAX_PICTURE_BYTES = 256 << 20
# Pillow knows formats whose reading starts other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture upright in its own colours, and the file it is from."""

    image: Image.Image
    path: Path
    sha256: str

    @property
    def facts(self) -> dict[str, str]:
        """Path and digest, JSON-able."""
        return {"path": str(self.path), "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class PictureFiles:
    """The pictures of a run; of `control` the keys are ControlNets, or None for the only one there is."""

    image: PictureFile | None
    mask: PictureFile | None
    control: Mapping[str | None, PictureFile]

    def arguments(self) -> dict[str, Any]:
        """The arguments of `Request` that they are."""
        return self._by_argument(lambda picture: picture.image)

    def facts(self) -> dict[str, Any]:
        """What is recorded of them, by argument of `Request`; JSON-able."""
        return self._by_argument(lambda picture: picture.facts)

    def _by_argument(self, made: Any) -> dict[str, Any]:
        found = {"image": self.image, "mask_image": self.mask}
        arguments = {name: made(picture) for name, picture in found.items() if picture is not None}
        if None in self.control:
            arguments["control_image"] = made(self.control[None])
        elif self.control:
            arguments["control_image"] = {name: made(picture) for name, picture in self.control.items()}
        return arguments


def read_picture(option: str, path: Path) -> PictureFile:
    """Read a picture file, turned as its camera says.

    Raises:
        ArgumentError: it cannot be read, is no picture of a known format, is damaged, or is too large; `option` names
            it.
    """
    where = f"{option} {path}"
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise ArgumentError(where, f"cannot be read ({error.strerror})", remedy="Check the path.") from error
    if len(raw) > MAX_PICTURE_BYTES:
        raise ArgumentError(where, "size", got=f"over {MAX_PICTURE_BYTES} bytes", expected="a smaller file")
    try:
        with warnings.catch_warnings():
            # Of more pixels than Pillow takes for sane it warns first; far more it refuses by itself.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble on
        expected = f"a whole file of {', '.join(FORMATS)}"
        raise ArgumentError(where, f"not a usable picture ({error})", expected=expected) from error
    return PictureFile(upright, path, hashlib.sha256(raw).hexdigest())
