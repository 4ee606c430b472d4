"""The files a run of `generate` writes: their names, and what they say about how they were made."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ArgumentError, TandemError
from ..images import save_png
from ..manifest_files import MANIFEST_NAME

SLUG_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Names:
    """Where the pictures of one prompt go: `0003-seed7-a-red-circle.png`, previews in a folder of their own."""

    folder: Path
    number: int
    prompt: str

    def picture(self, seed: int) -> Path:
        return self.folder / f"{self._stem(seed)}.png"

    def preview(self, seed: int, row: int) -> Path:
        return self.folder / "previews" / f"{self._stem(seed)}-row{row + 1:03d}.png"

    def _stem(self, seed: int) -> str:
        return f"{self.number:04d}-seed{seed}-{slug(self.prompt)}"


def slug(text: str) -> str:
    """`text` as lower-case ASCII letters, digits and single hyphens, at most 40 of them; `prompt` if none is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = "".join(char if char.isalnum() else " " for char in plain).split()
    return "-".join(words)[:SLUG_CHARACTERS].rstrip("-") or "prompt"


def png_facts(request: Mapping[str, Any], seed: int, facts: Mapping[str, Any]) -> dict[str, str]:
    """The text of one picture.

    request: the arguments of `Pipeline.__call__` that paint this picture again, among `num_images_per_prompt` others.
    facts: what is the same for the whole run; what is no text becomes JSON.
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    return {
        "prompt": request["prompt"],
        "negative_prompt": request["negative_prompt"] or "",
        "seed": str(seed),
        "request": json.dumps(request),
        **texts,
    }


def maker_facts(bundle: str, target: str) -> dict[str, str]:
    """What of a picture's text tells who made it; bundle: its digest."""
    return {"bundle": bundle, "target": target, "tandemrt": version("tandemrt")}


def check_folder(files: Iterable[Path], *, force: bool, option: str = "--output-dir") -> None:
    """Make sure that `files` can be written later; nothing is replaced without `force`. No folder is made yet.

    option: what says where they go.

    Raises:
        ArgumentError: a file is already there, or is a folder, or would lie in a bundle, which may hold no other files.
        TandemError: a folder cannot be written.
    """
    files = tuple(files)
    place = files[0].parent
    try:
        taken = [path for path in files if path.exists() or path.is_symlink()]
        folder = next((path for path in files if path.is_dir()), None)
        if folder is not None:
            raise ArgumentError(option, "a folder, where a file is to be", got=str(folder))
        if taken and not force:
            raise _taken(taken[0], more=len(taken) - 1)
        for place in sorted({path.parent for path in files}):
            _require_outside_bundles(place)
            nearest = next(part for part in (place, *place.parents) if part.exists())
            with tempfile.TemporaryFile(dir=nearest):
                pass
    except OSError as error:
        raise unwritable(place, error, option) from error


def _require_outside_bundles(folder: Path) -> None:
    real = Path(os.path.realpath(folder))
    bundle = next((part for part in (real, *real.parents) if os.path.lexists(part / MANIFEST_NAME)), None)
    if bundle is not None:
        raise ArgumentError(str(folder), f"inside the bundle {bundle}", remedy="Choose a folder outside the bundle.")


def write_picture(image: Image.Image, path: Path, facts: Mapping[str, str], *, force: bool) -> None:
    """Write a PNG whole or not at all, in a folder that is made if need be; nothing is replaced without `force`.

    Raises:
        ArgumentError: a file of that name has appeared meanwhile.
        TandemError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(image, path, facts, replace=force)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        raise unwritable(path, error) from error


def _taken(path: Path, more: int = 0) -> ArgumentError:
    others = f" and {more} more" if more else ""
    remedy = "Give --force to replace, another --seed or another --output-dir."
    return ArgumentError(str(path), f"already there{others}; pictures are not replaced", remedy=remedy)


def unwritable(path: Path, error: OSError, option: str = "--output-dir") -> TandemError:
    """What is said where the system refuses to write a file, whose place another `option` would change."""
    space = "Free some space, or give" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Give"
    remedy = f"{space} another {option}."
    return TandemError(str(path), f"cannot be written ({error.strerror or error})", remedy=remedy)
