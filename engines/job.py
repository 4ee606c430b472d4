"""What a builder is given and what it hands back; both cross a process boundary as JSON."""

from __future__ import annotations

from collections.abc import Callable

from ..runtime.engine_files import InputRange, Layer
from ..runtime.manifest import Frozen

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many parts of it are behind, and how many there are."""


class Job(Frozen, frozen=True, kw_only=True):
    """One build. model: the ONNX file's path, weights beside it. folder: where the engine's files go.

    device, precision: as in `Ingredients`. profiles: none where the engine takes every shape.
    timings: a file of what builders measured before, where the backend measures.
    """

    component: str
    model: str
    folder: str
    backend: str
    device: str
    precision: str
    profiles: tuple[dict[str, InputRange], ...]
    flags: dict[str, str | int | bool]
    timings: str | None = None


class Built(Frozen, frozen=True, kw_only=True):
    """What a builder made: its files in the job's folder, and what it tells of them; see `Engine`."""

    files: tuple[str, ...]
    layers: tuple[Layer, ...] = ()
    profile_memory_bytes: tuple[int, ...] = ()
    versions: dict[str, str]
    peak_memory_bytes: int = 0
