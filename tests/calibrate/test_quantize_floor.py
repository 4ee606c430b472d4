"""Without a budget a component that ruins pictures is named, with the budget to try."""

from __future__ import annotations

import pytest

from tandemrt.calibrate.judged import Way
from tandemrt.calibrate.quantize_floor import floor_warnings
from tandemrt.runtime.manifest import Loss

LARGE, SMALL = Way((("unet", 4),), "vae_decoder"), Way((("unet_small", 4),), "vae_decoder")
TINY = Way((("unet", 4),), "vae_decoder_tiny")
WAYS = {
    "text_encoder": (LARGE, SMALL),
    "unet": (LARGE,),
    "unet_small": (SMALL,),
    "vae_decoder": (LARGE, SMALL),
    "vae_decoder_tiny": (TINY,),
}


def loss(psnr_db: float, ssim: float = 0.95) -> Loss:
    return Loss(psnr_db=psnr_db, worst_psnr_db=psnr_db, ssim=ssim, latent_error=0.1, bundle="", prompts=2,
                prompts_sha256="", seed=0, painted="")  # fmt: skip


@pytest.mark.parametrize(
    ("poor", "named", "asked"),
    [
        ({TINY: loss(26.8, 0.66)}, "vae_decoder_tiny", 30),
        ({SMALL: loss(29.9)}, "unet_small", 30),
        ({SMALL: loss(33.5, 0.8)}, "unet_small", 36),
        ({LARGE: loss(20.0), SMALL: loss(35.0, 0.89)}, "text_encoder, unet, vae_decoder", 30),
    ],
)
def test_what_may_be_at_fault_is_named(poor: dict[Way, Loss], named: str, asked: int) -> None:
    """And not what is shown with another as well that does no harm."""
    losses = {LARGE: loss(30.0, 0.9), SMALL: loss(42.0), TINY: loss(40.0)} | poor
    told = list(floor_warnings(WAYS, losses, held_out=True))
    assert len(told) == len(poor)
    assert told[0].startswith(f"{named}: pictures of {next(iter(poor))} are ")
    assert f"Try --min-psnr {asked}, which" in told[0]


def test_good_pictures_are_no_reason_to_warn() -> None:
    losses = {LARGE: loss(30.0, 0.9), SMALL: loss(30.0), TINY: loss(30.0)}
    assert list(floor_warnings(WAYS, losses, held_out=True)) == []
