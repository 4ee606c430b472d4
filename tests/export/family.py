"""A family at reduced width: in diffusers' own pipeline, and on the bundle exported from it.

The deepest families have every kind of block in its true place, but no more than a few of those that follow each other
in a row: torch's tracing takes its time for each. `pytest --deep` has them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from tandemrt.export import random_checkpoint
from tandemrt.export.bundle import export_bundle
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.presets import Model, models, read_preset
from tandemrt.runtime import Pipeline

from ..interop.picture import psnr_db

PSNR_DB = 45
PROMPT = "a red cat on a mat"
SIZE = {"height": 64, "width": 128}
# Blocks in a row, by what configurations call their number.
LONGEST = {"layers_per_block": 1, "transformer_layers_per_block": 2, "num_hidden_layers": 4, "num_layers": 4}
Pixels = npt.NDArray[np.float32]


class Family:
    """A preset's random weights at tiny scale: in diffusers' pipeline, and in a pipeline on the bundle made of them.

    added: further models by component, by their names among the presets. true_depth: with all their blocks.
    """

    def __init__(self, name: str, folder: Path, added: Mapping[str, str], *, true_depth: bool = True) -> None:
        preset = msgspec.structs.replace(read_preset(name), added=dict(added))
        with at_depth(true_depth):
            self.folders = random_checkpoint.write_checkpoint(preset, folder, "tiny")
        further = tuple(Added(component, path) for component, path in self.folders.items())
        self.checkpoint = folder / "checkpoint"
        bundle = export_bundle(
            ExportPlan(self.checkpoint, folder / "bundle", further, guidance_scale=preset.guidance_scale)
        )
        self.reference = DiffusionPipeline.from_pretrained(self.checkpoint, dtype=torch.float32)
        self.reference.set_progress_bar_config(disable=True)
        self.pipe = Pipeline.open(bundle)

    def expected(self, switch: tuple[int, UNet2DConditionModel] | None = None, **arguments: Any) -> Pixels:
        """diffusers' picture, with another UNet from a step on where `switch` says so."""
        large = self.reference.components.get("unet")

        def after_step(pipe: Any, index: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
            if switch is not None and index + 1 == switch[0]:
                pipe.unet = switch[1]
            return tensors

        try:
            generator = torch.Generator().manual_seed(7)
            return self.reference(
                PROMPT, generator=generator, output_type="np", callback_on_step_end=after_step, **SIZE, **arguments
            ).images[0]
        finally:
            if large is not None:
                self.reference.unet = large

    def painted_by(self, kind: Any, parts: Mapping[str, Any], **arguments: Any) -> Any:
        """What another of diffusers' pipelines makes of the same models; `parts`: what it takes besides."""
        pipeline = kind(**self.reference.components, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            PROMPT, generator=torch.Generator().manual_seed(7), **{"output_type": "np", **arguments}
        ).images[0]

    def actual(self, **arguments: Any) -> Pixels:
        """The runtime's picture."""
        return self.pipe(PROMPT, seed=7, output_type="np", **SIZE, **arguments).images[0]


@contextmanager
def at_depth(true_depth: bool) -> Iterator[None]:
    """Write checkpoints with all their blocks, or with at most `LONGEST` in a row."""
    architectures = models() if true_depth else {name: _shortened(model) for name, model in models().items()}
    with mock.patch.object(random_checkpoint, "models", lambda: architectures):
        yield


def drawn() -> Image.Image:
    """A picture of no particular subject, of the size that is painted."""
    values = np.random.default_rng(7).integers(0, 256, (SIZE["height"], SIZE["width"], 3), np.uint8)
    return Image.fromarray(values)


def require_same(actual: Pixels, expected: Pixels, least_db: float = PSNR_DB) -> None:
    assert actual.std() > 1e-2
    assert psnr_db(actual, expected) >= least_db


def _shortened(model: Model) -> Model:
    kept = {key: _at_most(most, model.config[key]) for key, most in LONGEST.items() if key in model.config}
    return msgspec.structs.replace(model, config={**model.config, **kept})


def _at_most(most: int, value: Any) -> Any:
    return [_at_most(most, each) for each in value] if isinstance(value, list) else min(most, value)


def require_one_time_step_serves(model: Path, given: Mapping[str, npt.NDArray[Any]]) -> None:
    """A denoiser's graph takes one time step for a whole batch, or one for each of its rows."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows = next(iter(given.values())).shape[0]
    made = [session.run(None, {**given, "timestep": np.full(count, 417.25, np.float32)})[0] for count in (1, rows)]
    np.testing.assert_allclose(*made, atol=1e-6)
