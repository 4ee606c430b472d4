"""Image-to-image and inpainting: where a generation begins, and what of the image stays.

The random numbers are drawn in the order of diffusers' StableDiffusionImg2ImgPipeline and
StableDiffusionInpaintPipeline (those for SDXL and SD3 draw in the same): for the image's distribution, for the noise
that is added, for the masked image's distribution. Two things differ for batches: every picture of a prompt starts
from that prompt's image, where diffusers would deal several images out in turn; and with a seed for each picture, each
draws for its own image when inpainting too. StableDiffusion3InpaintPipeline (0.42) forgets the latents' shift when it
decodes; here inpainted latents are decoded as all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .binding import Conditioning
from .errors import RequestError
from .manifest import Component, LatentSpace, Manifest
from .noise import Noise
from .pictures_in import Size, colour_pixels, mask_pixels
from .plan import Plan
from .request import Request
from .request_checks import require_count
from .tensors import latent_names, spec_of

Float32 = npt.NDArray[np.float32]
# An encoder's name and pictures (N, 3, H, W) in [-1, 1] to what it makes of them.
EncodePictures = Callable[[str, Float32], Float32]

_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE = -30.0, 20.0


@dataclass(frozen=True, slots=True)
class Editing:
    """What a request says about an image, checked.

    encoder: the component that encodes it, to a distribution or, as a tiny one does, to a latent.
    image: (N, 3, H, W) in [-1, 1], N being 1 or the number of prompts.
    mask: (N, 1, H, W), 1 where the image is painted anew; None in image-to-image.
    concatenated: the denoisers of the plan that read the mask and the masked image behind the latent. What the others
        make of the rest of the image is replaced after each of their rows.
    strength: as the schedule's. space: where the latents are.
    """

    encoder: str
    is_distribution: bool
    image: Float32
    mask: Float32 | None
    concatenated: frozenset[str]
    strength: float
    space: LatentSpace


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where an edit begins.

    latents: (B, C, h, w) before the first row.
    channels: what denoisers read behind the latent, by name, (B, 1 + C, h, w).
    keep: to be called after a row with its index and the latents, in which the rest of the image is then put back.
    """

    latents: Float32
    channels: Mapping[str, Float32] = field(default_factory=dict)
    keep: Callable[[int, Float32], None] | None = None

    def behind(self, conditioning: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        """The conditioning of each denoiser with the channels it reads."""
        return {name: replace(given, channels=self.channels.get(name)) for name, given in conditioning.items()}

    def kept_from(self, first: int) -> Callable[[int, Float32], None] | None:
        """`keep`, of rows that are counted from this one."""
        keep = self.keep
        return keep if keep is None or first == 0 else lambda row, latents: keep(first + row, latents)


def checked_editing(request: Request, manifest: Manifest, plan: Plan, size: Size) -> Editing | None:
    """What the request says about an image to start from, or None; `size` is the picture's height and width.

    Raises:
        RequestError: the bundle has no encoder for images; a mask without an image, or none for a denoiser that needs
            one; an image or mask that cannot be used, or not as many as prompts.
    """
    denoisers = dict.fromkeys(plan.denoisers)
    concatenated = frozenset(name for name in denoisers if reads_mask(manifest.components[name], manifest.latent))
    if request.mask_image is None and concatenated:
        remedy = "Give image= and mask_image=, or steps= on another denoiser."
        raise RequestError("mask_image", f"denoiser {min(concatenated)!r} inpaints and needs one", remedy=remedy)
    if request.image is None:
        return None
    encoders = manifest.names("vae_encoder")
    if not encoders:
        remedy = "Export it again with the VAE's encoder."
        raise RequestError("image", "the bundle has no encoder for images", remedy=remedy)
    image = colour_pixels("image", request.image, size) * np.float32(2) - np.float32(1)
    require_count("image", len(image), request.batch)
    mask = None
    if request.mask_image is not None:
        mask = mask_pixels("mask_image", request.mask_image, size)
        require_count("mask_image", len(mask), request.batch)
    distribution = spec_of(manifest.components[encoders[0]].outputs, "latent_parameters") is not None
    return Editing(encoders[0], distribution, image, mask, concatenated, request.schedule.strength, manifest.latent)


def begin(
    editing: Editing | None, plan: Plan, noise: Noise, encode: EncodePictures, added: Float32 | None
) -> Beginning:
    """Where the plan begins: at noise, or at the image brought there.

    encode: runs the encoder. added: standard normal noise instead of the seed's, (B, C, h, w) float32.
    """
    if editing is None:
        return Beginning((noise.draw() if added is None else added) * np.float32(plan.table.init_noise_sigma))

    def encoded(pictures: Float32) -> Float32:
        made = encode(editing.encoder, pictures)
        return _each_picture(_sampled(_each_picture(made, noise) if noise.by_picture else made, editing, noise), noise)

    mask, pure = editing.mask, editing.mask is not None and editing.strength == 1
    kept_rows = [mask is not None and name not in editing.concatenated for name in plan.denoisers]
    clean = encoded(editing.image) if not pure or any(kept_rows) else None
    added = noise.draw() if added is None else added
    kept, amount = plan.table.noised[0].tolist()
    latents = (
        added * np.float32(plan.table.init_noise_sigma) if clean is None or pure else kept * clean + amount * added
    )
    if mask is None:
        return Beginning(latents)
    channels: dict[str, Float32] = {}
    factor = editing.space.downsampling
    coarse = _each_picture(mask[:, :, ::factor, ::factor], noise)
    if editing.concatenated:
        read = np.concatenate([coarse, encoded(editing.image * (mask < 0.5))], axis=1)
        channels = dict.fromkeys(editing.concatenated, read)
    elif editing.is_distribution:
        # diffusers encodes the masked image for every UNet: what comes after must draw the same numbers.
        noise.draw(max(len(editing.image), len(mask)))
    if clean is None or not any(kept_rows):
        return Beginning(latents, channels)
    scratch = np.empty((2, *latents.shape), np.float32)
    keep = _Rest(kept_rows, plan.table.noised[1:].tolist(), clean, added, coarse < 0.5, scratch)
    return Beginning(latents, channels, keep)


@dataclass(frozen=True, slots=True)
class _Rest:
    """Puts back what is outside the mask, `fixed` (B, 1, h, w), noised as far as the row left the latents.

    scratch: room for two latents, (2, B, C, h, w) float32, so that no row allocates.
    """

    rows: Sequence[bool]
    noised: Sequence[Sequence[float]]
    clean: Float32
    noise: Float32
    fixed: npt.NDArray[np.bool_]
    scratch: Float32

    def __call__(self, row: int, latents: Float32) -> None:
        if self.rows[row]:
            kept, amount = self.noised[row]
            noised, added = self.scratch
            np.multiply(self.clean, kept, out=noised)
            np.multiply(self.noise, amount, out=added)
            np.add(noised, added, out=noised)
            np.copyto(latents, noised, where=self.fixed)


def _sampled(encoded: Float32, editing: Editing, noise: Noise) -> Float32:
    """Latents (N, C, h, w) from what the encoder made: drawn from its distribution (N, 2C, h, w), or just these."""
    latents = encoded
    if editing.is_distribution:
        mean, log_variance = np.split(encoded, 2, axis=1)
        deviation = np.exp(np.float32(0.5) * np.clip(log_variance, _MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE))
        latents = mean + deviation * noise.draw(len(encoded))
    scaled: Float32 = (latents - np.float32(editing.space.shift_factor)) * np.float32(editing.space.scaling_factor)
    return scaled


def _each_picture(values: Float32, noise: Noise) -> Float32:
    """One row for each picture, from one for all or one for each prompt."""
    repeated: Float32 = values.repeat(noise.shape[0] // len(values), axis=0)
    return repeated


def reads_mask(component: Component, space: LatentSpace) -> bool:
    """Whether a denoiser reads a mask and a masked image behind the latent, as inpainting UNets do."""
    spec = spec_of(component.inputs, latent_names(component.inputs).sample)
    return spec is not None and spec.shape[1:2] == (2 * space.channels + 1,)
