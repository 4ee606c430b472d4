"""`tandemrt calibrate collect` on a tiny bundle, and what it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

PROMPTS = ("red", "blue red", "a red blue", "blue blue", "red a", "blue a")
STEPS = 5
Collect = Callable[..., int]


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr."""
    return capsys.readouterr().err.splitlines()[-1]
