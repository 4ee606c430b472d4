"""A published architecture with random weights, exported once: the bundle, and the checkpoint that peers read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.errors import BenchmarkError, BundleError

Progress = Callable[[str, int, int], None]
_MAKERS = ("tandemrt", "torch", "diffusers", "transformers", "onnx")


def preset_bundle(name: str, scale: str, dtype: str, cache: Path, progress: Progress) -> Path:
    """The folder of a preset in the cache, made if it is not there: `bundle`, `checkpoint`, and further models by name.

    Raises:
        ArgumentError: no such preset.
        BenchmarkError: what exports it is not installed.
        ExportError, CheckpointError: it cannot be exported, or the cache cannot be written.
    """
    try:
        return _made(name, scale, dtype, cache, progress)
    except ImportError as error:
        if (error.name or "tandemrt").startswith("tandemrt"):
            raise
        remedy = 'Install it: pip install "tandemrt[export]"'
        raise BenchmarkError("--preset", f"needs {error.name}, which cannot be imported here", remedy=remedy) from error


def _made(name: str, scale: str, dtype: str, cache: Path, progress: Progress) -> Path:
    """As `preset_bundle`."""
    from tandemrt.export.bundle import export_bundle  # noqa: PLC0415
    from tandemrt.export.plan import PresetPlan  # noqa: PLC0415
    from tandemrt.export.presets import read_preset  # noqa: PLC0415
    from tandemrt.export.random_checkpoint import write_checkpoint  # noqa: PLC0415
    from tandemrt.runtime.staging import Staging, writing_failed  # noqa: PLC0415

    preset = read_preset(name)
    made_by = ",".join(f"{one} {metadata.version(one)}" for one in _MAKERS)
    folder = cache / "presets" / f"{name}-{scale}-{dtype}-{hashlib.sha256(made_by.encode()).hexdigest()[:12]}"
    if _whole(folder / name):
        return folder
    with Staging(folder, force=folder.exists()) as staging:
        try:
            added = write_checkpoint(preset, staging.folder, scale)  # type: ignore[arg-type]
        except OSError as error:
            raise writing_failed(folder, error) from error
        plan = PresetPlan(name, staging.folder / name, scale, dtype)  # type: ignore[arg-type]
        export_bundle(plan.export_plan(staging.folder / "checkpoint", added), progress)
        staging.publish()
    return folder


def _whole(bundle: Path) -> bool:
    try:
        Bundle.open(bundle)
    except BundleError:
        return False
    return True
