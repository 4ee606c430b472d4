"""Families at reduced width and their true topology: exported, run, and compared with diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler, UNet2DConditionModel

from tandemrt.export.bundle import export_bundle
from tandemrt.export.checkpoint import read_checkpoint, read_denoiser
from tandemrt.export.denoisers import denoiser_graph
from tandemrt.export.plan import Added, ExportPlan
from tandemrt.export.presets import read_preset
from tandemrt.export.random_checkpoint import write_checkpoint
from tandemrt.runtime import Pipeline

pytestmark = pytest.mark.slow

PSNR_DB = 45
PROMPT = "a red cat on a mat"
SIZE = {"height": 64, "width": 96}
Pixels = npt.NDArray[np.float32]


class Family:
    """A preset's random weights at tiny scale: in diffusers' pipeline, and in a pipeline on the bundle made of them."""

    def __init__(self, name: str, folder: Path, added: tuple[str, ...] = ()) -> None:
        preset = read_preset(name)
        self.folders = write_checkpoint(preset, folder, "tiny")
        further = tuple(Added(component, self.folders[component]) for component in added)
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

    def actual(self, **arguments: Any) -> Pixels:
        """The runtime's picture."""
        return self.pipe(PROMPT, seed=7, output_type="np", **SIZE, **arguments).images[0]


def require_same(actual: Pixels, expected: Pixels) -> None:
    assert actual.std() > 1e-2
    assert -10 * np.log10(np.mean(np.square(actual.astype(np.float64) - expected))) >= PSNR_DB


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    family = Family("hybrid-sdxl", tmp_path_factory.mktemp("sdxl"), ("unet_small",))
    yield family
    family.pipe.close()


def test_sdxl_without_a_negative_prompt(sdxl: Family) -> None:
    same = {"num_inference_steps": 3, "guidance_scale": 5.0}
    require_same(sdxl.actual(**same), sdxl.expected(**same))


def test_sdxl_with_two_prompts_and_sizes(sdxl: Family) -> None:
    same = {
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "prompt_2": "an oil painting",
        "negative_prompt": "blurry",
        "negative_prompt_2": "a photograph",
        "original_size": (512, 768),
        "target_size": (64, 96),
        "crops_coords_top_left": (8, 16),
    }
    found = sdxl.actual(**same)
    require_same(found, sdxl.expected(**same))
    assert np.abs(found - sdxl.actual(num_inference_steps=2, guidance_scale=5.0)).max() > 1e-3


def test_sdxl_hands_over_to_koala(sdxl: Family) -> None:
    small = UNet2DConditionModel.from_pretrained(sdxl.folders["unet_small"], dtype=torch.float32)
    expected = sdxl.expected(switch=(2, small), num_inference_steps=4, guidance_scale=7.0)
    found = sdxl.actual(steps={"unet": 2, "unet_small": 2}, guidance_scale=7.0)
    require_same(found, expected)
    assert np.abs(found - sdxl.actual(num_inference_steps=4, guidance_scale=7.0)).max() > 1e-3


@pytest.mark.parametrize(
    ("scheduler", "ours", "theirs"),
    [
        (LCMScheduler, {"solver": "lcm", "timesteps": [800]}, {"timesteps": [800]}),
        (TCDScheduler, {"solver": "tcd", "eta": 1.0, "num_inference_steps": 3}, {"eta": 1.0, "num_inference_steps": 3}),
    ],
)
def test_sdxl_as_hyper_sd_samples_it(
    sdxl: Family, scheduler: Any, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> None:
    own = sdxl.reference.scheduler
    sdxl.reference.scheduler = scheduler.from_config(own.config)
    try:
        expected = sdxl.expected(guidance_scale=0.0, **theirs)
    finally:
        sdxl.reference.scheduler = own
    require_same(sdxl.actual(guidance_scale=0.0, **ours), expected)


def test_sd3_with_three_text_encoders(tmp_path: Path) -> None:
    family = Family("sd3-medium", tmp_path)
    with family.pipe:
        same = {
            "num_inference_steps": 3,
            "guidance_scale": 7.0,
            "prompt_3": "an oil painting",
            "negative_prompt": "blur",
        }
        found = family.actual(**same)
        require_same(found, family.expected(**same))
        assert np.abs(found - family.actual(**{**same, "prompt_3": "a photograph"})).max() > 1e-4
    assert family.pipe.bundle.manifest.latent.channels == 16
    assert family.pipe.bundle.manifest.text.max_length == 77 + 256


def test_latent_consistency_models_of_two_sizes(tmp_path: Path) -> None:
    family = Family("hybrid-sd-lcm", tmp_path, ("unet_small",))
    part = read_denoiser(family.folders["unet_small"], read_checkpoint(family.checkpoint)).part
    small = denoiser_graph(part).module.unet
    with family.pipe:
        expected = family.expected(switch=(2, small), num_inference_steps=4, guidance_scale=7.0)
        found = family.actual(steps={"unet": 2, "unet_small": 2}, guidance_scale=7.0)
        require_same(found, expected)
        assert np.abs(found - family.actual(steps={"unet": 2, "unet_small": 2}, guidance_scale=2.0)).max() > 1e-4
