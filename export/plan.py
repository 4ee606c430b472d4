"""What an export is asked to do, checked before anything heavy is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..runtime.cli import values
from ..runtime.errors import ArgumentError
from ..runtime.manifest import Precision, Role
from .presets import Scale, read_preset

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps are behind, and how many there are."""

_ADDED_ROLES: dict[str, Role] = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "vae_decoder": "vae_decoder",
    "controlnet": "controlnet",
}
_ADDED_NAME = re.compile(rf"({'|'.join(_ADDED_ROLES)})_[a-z0-9]+(_[a-z0-9]+)*")
MAX_STEPS = 1000


@dataclass(frozen=True)
class Added:
    """A further component: its `name` in the bundle, such as `unet_small`, and the folder or file it is read from."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        if not _ADDED_NAME.fullmatch(self.name):
            raise ArgumentError(
                "--add",
                "component name",
                got=self.name,
                expected=f"{', '.join(f'{kind}_NAME' for kind in _ADDED_ROLES)} in lower case, such as unet_small",
            )

    @property
    def role(self) -> Role:
        """What the component does in the bundle."""
        return next(role for kind, role in _ADDED_ROLES.items() if self.name.startswith(f"{kind}_"))


@dataclass(frozen=True)
class LoraSource:
    """A LoRA to fuse into the checkpoint's models: its file or peft's folder, and the number its updates count times.

    scale: any finite number; 1 is what it was trained for, 0 leaves the weights as they are.
    """

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ArgumentError("--lora", f"scale of {self.path}", got=self.scale, expected="a finite number")


def parse_lora(text: str) -> LoraSource:
    """`FILE` or `FILE:SCALE`; raises ArgumentError as `values.parse_lora`."""
    return LoraSource(*values.parse_lora(text))


@dataclass(frozen=True)
class ExportPlan:
    """One export: a checkpoint becomes the bundle `out`, with `added` components beside the main ones.

    checkpoint: a diffusers directory, or one safetensors file, which needs a `tokenizer`; see `read_single_file`.
    denoiser, vae: taken in place of the checkpoint's own; a denoiser may be one file of weights.
    loras: fused into the main denoiser and the text encoders, all at once.
    dtype: `fp32`, or `fp16` for half-precision weights and arithmetic with fp32 islands; inputs and outputs stay fp32.
    solver, solver_config: the bundle's scheduler, as `tandemrt generate` names it; None keeps the checkpoint's.
    guidance_scale, num_inference_steps, timesteps, eta: the bundle's defaults for a generation; None for the format's.
    allow_pickle: take pickled weights where there are no others.
    verify_against: the checkpoint to compare ONNX graphs with that stand in the place of weights.
    force: replace `out` where it is a bundle already.
    """

    checkpoint: Path
    out: Path
    added: tuple[Added, ...] = ()
    tokenizer: Path | None = None
    denoiser: Path | None = None
    vae: Path | None = None
    loras: tuple[LoraSource, ...] = ()
    dtype: Precision = "fp32"
    solver: str | None = None
    solver_config: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float = 0.0
    allow_pickle: bool = False
    verify_against: Path | None = None
    force: bool = False

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
        if self.timesteps is not None and steps not in (None, len(self.timesteps)):
            expected = f"{len(self.timesteps)}, as --timesteps"
            raise ArgumentError("--num-inference-steps", "steps", got=steps, expected=expected)

    def as_json(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        return {
            "checkpoint": str(self.checkpoint),
            "out": str(self.out),
            "added": {added.name: str(added.folder) for added in self.added},
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
            "denoiser": None if self.denoiser is None else str(self.denoiser),
            "vae": None if self.vae is None else str(self.vae),
            "loras": [{"path": str(lora.path), "scale": lora.scale} for lora in self.loras],
            "dtype": self.dtype,
            "solver": self.solver,
            "solver_config": dict(self.solver_config),
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "eta": self.eta,
            "allow_pickle": self.allow_pickle,
            "verify_against": None if self.verify_against is None else str(self.verify_against),
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
            timesteps=preset.timesteps,
            eta=preset.eta,
            force=self.force,
        )

    def as_json(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        facts = self.export_plan(Path(), {}).as_json()
        sources = ("checkpoint", "added", "tokenizer", "denoiser", "vae", "loras")
        for key in (*sources, "solver", "solver_config", "allow_pickle", "verify_against"):
            del facts[key]
        return {"preset": self.name, "scale": self.scale, **facts}


def no_progress(message: str, done: int, total: int) -> None:
    """Report to nobody."""
