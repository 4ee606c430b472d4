"""What an export is asked to do, checked before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..runtime.errors import ArgumentError
from ..runtime.manifest import Precision, Role
from .presets import Scale, read_preset

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps are behind, and how many there are."""

_ADDED_ROLES: dict[str, Role] = {"unet": "denoiser", "vae_decoder": "vae_decoder"}
_ADDED_NAME = re.compile(r"(unet|vae_decoder)_[a-z0-9]+(_[a-z0-9]+)*")
MAX_STEPS = 1000


@dataclass(frozen=True)
class Added:
    """A further component: its `name` in the bundle (`unet_*` or `vae_decoder_*`) and the folder it is read from."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        if not _ADDED_NAME.fullmatch(self.name):
            raise ArgumentError(
                "--add",
                "component name",
                got=self.name,
                expected="unet_NAME or vae_decoder_NAME in lower case, such as unet_small",
            )

    @property
    def role(self) -> Role:
        """What the component does in the bundle."""
        return _ADDED_ROLES["unet" if self.name.startswith("unet_") else "vae_decoder"]


@dataclass(frozen=True)
class ExportPlan:
    """One export: a diffusers directory becomes the bundle `out`, with `added` components beside the main ones.

    dtype: `fp32`, or `fp16` for half-precision weights and arithmetic with fp32 islands; inputs and outputs stay fp32.
    guidance_scale, num_inference_steps: the bundle's defaults for a generation; None keeps the format's.
    allow_pickle: take pickled weights where there are no others.
    force: replace `out` where it is a bundle already.
    """

    checkpoint: Path
    out: Path
    added: tuple[Added, ...] = ()
    dtype: Precision = "fp32"
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    force: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Precision):
            raise ArgumentError("--dtype", "precision", got=self.dtype, expected=" or ".join(get_args(Precision)))
        names = [added.name for added in self.added]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ArgumentError("--add", "a component given twice", got=twice, expected="every name once")
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ArgumentError("--guidance-scale", "guidance", got=scale, expected="a finite number from 0 up")
        steps = self.num_inference_steps
        if steps is not None and not 1 <= steps <= MAX_STEPS:
            raise ArgumentError("--num-inference-steps", "steps", got=steps, expected=f"1..{MAX_STEPS}")

    def as_json(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        return {
            "checkpoint": str(self.checkpoint),
            "out": str(self.out),
            "added": {added.name: str(added.folder) for added in self.added},
            "dtype": self.dtype,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "allow_pickle": self.allow_pickle,
            "force": self.force,
        }


@dataclass(frozen=True)
class PresetPlan:
    """One export of a preset with random weights; the rest as in `ExportPlan`, with the preset's defaults for None."""

    name: str
    out: Path
    scale: Scale = "full"
    dtype: Precision = "fp32"
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        read_preset(self.name)
        self.export_plan(Path(), {})

    def export_plan(self, checkpoint: Path, added: Mapping[str, Path]) -> ExportPlan:
        """The export of the preset's models once they lie in `checkpoint` and the folders `added`."""
        preset = read_preset(self.name)
        return ExportPlan(
            checkpoint=checkpoint,
            out=self.out,
            added=tuple(Added(name, folder) for name, folder in added.items()),
            dtype=self.dtype,
            guidance_scale=preset.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            num_inference_steps=(
                preset.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps
            ),
            force=self.force,
        )

    def as_json(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        facts = self.export_plan(Path(), {}).as_json()
        del facts["checkpoint"], facts["added"], facts["allow_pickle"]
        return {"preset": self.name, "scale": self.scale, **facts}


def no_progress(message: str, done: int, total: int) -> None:
    """Report to nobody."""
