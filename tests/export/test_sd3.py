"""SD3: three text encoders, rectified flow, latents of 16 channels, pictures to start from, engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from PIL import Image, ImageDraw

from ..engines.families import require_engines
from ..engines.tandem import require_tandem
from .family import PROMPT, SIZE, Family, drawn, require_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory, true_depth: bool) -> Iterator[Family]:
    family = Family("sd3-medium", tmp_path_factory.mktemp("sd3"), {}, true_depth=true_depth)
    yield family
    family.pipe.close()


def test_sd3_with_three_text_encoders(sd3: Family) -> None:
    same = {
        "num_inference_steps": 3,
        "guidance_scale": 7.0,
        "prompt_3": "an oil painting",
        "negative_prompt": "blur",
    }
    found = sd3.actual(**same)
    require_same(found, sd3.expected(**same))
    assert np.abs(found - sd3.actual(**{**same, "prompt_3": "a photograph"})).max() > 1e-4
    assert sd3.pipe.bundle.manifest.latent.channels == 16
    assert sd3.pipe.bundle.manifest.text.max_length == 77 + 256


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_sd3_starts_from_a_picture(sd3: Family, strength: float) -> None:
    same = {"num_inference_steps": 5, "guidance_scale": 7.0, "strength": strength, "negative_prompt": "blur"}
    found = sd3.actual(image=drawn(), **same)
    require_same(found, sd3.painted_by(StableDiffusion3Img2ImgPipeline, {}, image=drawn(), **SIZE, **same))
    mirrored = drawn().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(found - sd3.actual(image=mirrored, **same)).max() > 1e-2


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_sd3_paints_within_a_mask(sd3: Family, strength: float) -> None:
    """Latents, not pictures: diffusers' pipeline (0.42) decodes without adding the VAE's shift_factor back.

    They are held as pictures in 0..1 would be, though they spread wider.
    """
    same = {"num_inference_steps": 5, "guidance_scale": 7.0, "strength": strength, "image": drawn(), **SIZE}
    theirs = sd3.painted_by(StableDiffusion3InpaintPipeline, {}, mask_image=mask(), output_type="latent", **same)
    latents = {"seed": 7, "output_type": "latent"}
    ours = sd3.pipe(PROMPT, mask_image=mask(), **latents, **same).latents[0]
    require_same(ours, theirs.numpy())
    everywhere = sd3.pipe(PROMPT, **latents, **same).latents[0]
    assert np.abs(ours - everywhere).max() > 1e-2


def test_sd3_builds_on_every_backend(sd3: Family, tmp_path: Path) -> None:
    require_engines(sd3.pipe.bundle, tmp_path, ("text_encoder_3", "transformer"))


def test_sd3_in_tandem(sd3: Family, tmp_path: Path) -> None:
    require_tandem(sd3.pipe.bundle.path, tmp_path, "transformer", prompt=PROMPT, guidance_scale=7.0, **SIZE)


def mask() -> Image.Image:
    """White, to be painted anew, in the middle."""
    image = Image.new("L", (SIZE["width"], SIZE["height"]), 0)
    ImageDraw.Draw(image).rectangle((32, 16, 95, 47), fill=255)
    return image
