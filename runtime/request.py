"""What a caller asks for: one frozen request, checked where it is made and against a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .arguments import whole_number
from .errors import RequestError
from .handover import Handover, require_seed_of
from .manifest import Manifest
from .pictures_in import Pictures, Size, picture_size
from .plan import Schedule
from .plan_steps import Steps
from .request_checks import checked_array, checked_loras, require_count, require_pictures, side, size_pair, texts

Float32 = npt.NDArray[np.float32]
MAX_PIXELS = 1 << 28

OutputType = Literal["pil", "np", "latent"]

SIZES = tuple(
    f"{branch}{name}"
    for branch in ("", "negative_")
    for name in ("original_size", "target_size", "crops_coords_top_left")
)

TEXTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

NEEDS = {
    "image": ("mask_image", "strength"),
    "control_image": ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"),
}


@dataclass(frozen=True)
class Request:
    """One generation. Names and meanings are those of diffusers' `StableDiffusionPipeline` where it has them.

    prompt, negative_prompt: a text or a batch of texts; one negative prompt serves the whole batch.
    prompt_2, prompt_3, negative_prompt_2, negative_prompt_3: for a second and third text encoder, which read the first
        prompt otherwise; an empty text stands for that too. One serves the whole batch.
    steps: see `Schedule.steps`; `num_inference_steps` is the same for a plain number.
    solver, solver_config, timesteps, eta, guidance_scale, guidance_interval, guidance, guidance_config, placement,
        placement_config: see `Schedule`; None is what the bundle says.
    height, width: pixels; the bundle's defaults otherwise.
    num_images_per_prompt: pictures for each prompt; a prompt's pictures stand together.
    seed: one number seeds one generator for the whole batch, as a single `torch.Generator` does in diffusers; a
        sequence seeds one for each picture. A random one is drawn, and reported, when it is None. For two
        pictures, `seed=7` and `seed=[7, 8]` are therefore not the same.
    seed_device: whose random numbers, torch's on the CPU or on CUDA.
    latents: standard normal noise to start from, (pictures, C, H/8, W/8) float32, instead of the seed's.
        With an image it is the noise that is added; diffusers' inpainting, given latents, begins at them alone even
        where strength is below 1.
    prompt_embeds, negative_prompt_embeds: (prompts, tokens, width) float32, instead of texts.
    pooled_prompt_embeds, negative_pooled_prompt_embeds: (prompts, width) float32, beside these where a bundle uses
        pooled text.
    original_size, target_size, crops_coords_top_left and the same for the negative prompt: SDXL's sizes as (height,
        width) and (top, left); height and width of the picture, and (0, 0), otherwise.
    image: what to start from instead of noise alone; a PIL image, an array (H, W, 3) of uint8 or of float32 in
        [0, 1], or a list of these, one for each prompt. Its size is the picture's unless height and width are given,
        to which a PIL image is resized.
    mask_image: where to paint anew, white being new; as `image`, in grey or (H, W). Without it, everywhere.
    strength: see `Schedule`; with an image 0.8 by default, with a mask too 1.0, as in StableDiffusion's pipelines. (In
        diffusers those for SDXL have 0.3 and 0.9999, those for SD3 0.6.)
    control_image: what a ControlNet reads, of the forms of `image`, or several by the ControlNets' names:
        `{"canny": edges, "depth": depths}`. Where there is no `image`, its size is the picture's by default.
    controlnet_conditioning_scale: how strongly ControlNets steer (default 1.0); control_guidance_start and
        control_guidance_end: the part of the rows, as fractions, in which they do (0.0 and 1.0). A number, or numbers
        by name.
    loras: LoRAs by path, a safetensors file or a folder of peft's, each with how strongly it counts: 1 is what it was
        trained for, 0 leaves the models as they are. Needs engines with slots for them, of `tandemrt build-engine
        --lora-slots N --lora-rank R`. One changes the text encoders it is for and those of the plan's denoisers that
        have all of its modules; `Output.loras` tells which.
    decoder: which of the bundle's decoders paints; the first by default.
    output_type: `pil` images, `np` (pictures, H, W, 3) float32 in [0, 1], or `latent`.
    previews: decode a preview after every so many rows, with the tiny decoder where there is one; 0 for none.
    strict_prompts: refuse prompts that are too long instead of cutting and reporting them.
    until: stop before this inference step, counted from 0, with `Output.handover` in place of pictures; the number of
        steps for all of them. start: go on from such a hand-over, of a request that was the same but for what paints
        the rest; its seed is taken where none is given. The same models make the same bits of both parts as of the
        whole. Not with adaptive guidance or `hybridiff`.

    Raises:
        RequestError: an argument cannot be used; the message names it.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    steps: Steps | None = None
    num_inference_steps: int | None = None
    solver: str | None = None
    solver_config: Mapping[str, Any] | None = None
    timesteps: Sequence[int] | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    height: int | None = None
    width: int | None = None
    num_images_per_prompt: int = 1
    seed: int | Sequence[int] | None = None
    seed_device: Literal["cpu", "cuda"] = "cpu"
    latents: Float32 | None = None
    prompt_embeds: Float32 | None = None
    negative_prompt_embeds: Float32 | None = None
    decoder: str | None = None
    output_type: OutputType = "pil"
    previews: int = 0
    strict_prompts: bool = False
    prompt_2: str | Sequence[str] | None = None
    prompt_3: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    negative_prompt_3: str | Sequence[str] | None = None
    pooled_prompt_embeds: Float32 | None = None
    negative_pooled_prompt_embeds: Float32 | None = None
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    image: Pictures | None = None
    mask_image: Pictures | None = None
    strength: float | None = None
    control_image: Pictures | Mapping[str, Pictures] | None = None
    controlnet_conditioning_scale: float | Mapping[str, float] | None = None
    control_guidance_start: float | Mapping[str, float] | None = None
    control_guidance_end: float | Mapping[str, float] | None = None
    loras: Mapping[str | Path, float] | None = None
    guidance: str = "fixed"
    guidance_config: Mapping[str, Any] | None = None
    placement: str = "batched"
    placement_config: Mapping[str, Any] | None = None
    start: Handover | None = None
    until: int | None = None

    def __post_init__(self) -> None:
        self._check_embeddings()
        self._check_texts()
        if self.steps is not None and self.num_inference_steps is not None:
            raise RequestError("steps", "given beside num_inference_steps", remedy="Give one of them.")
        if self.num_inference_steps is not None and whole_number(self.num_inference_steps) is None:
            got = self.num_inference_steps
            raise RequestError("num_inference_steps", "not usable", got=got, expected="a whole number, 1 or more")
        if self.output_type not in ("pil", "np", "latent"):
            raise RequestError("output_type", "unknown", got=self.output_type, expected="pil, np or latent")
        require_pictures(self.num_images_per_prompt)
        previews = whole_number(self.previews)
        if previews is None or previews < 0:
            raise RequestError("previews", "not usable", got=self.previews, expected="a whole number, 0 or more")
        if isinstance(self.seed, Sequence) and len(self.seed) != self.pictures:
            raise RequestError("seed", "how many there are", got=len(self.seed), expected=f"1 or {self.pictures}")
        if self.loras is not None:
            checked_loras(self.loras)
        if self.start is not None:
            require_seed_of(self.start, self.seed, self.pictures)
        for needed, names in NEEDS.items():
            for name in names:
                if getattr(self, name) is not None and getattr(self, needed) is None:
                    raise RequestError(name, f"given without {needed}", remedy="Give both.")
        for name in SIZES:
            if getattr(self, name) is not None:
                size_pair(name, getattr(self, name))

    def _check_texts(self) -> None:
        """One of prompt and prompt_embeds; further prompts beside a first one, as many as there are of it or one."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise RequestError(
                "prompt", "exactly one of prompt and prompt_embeds is needed", remedy="Give one of them."
            )
        if self.batch == 0:
            name = "prompt" if self.prompt_embeds is None else "prompt_embeds"
            raise RequestError(name, "an empty list", expected="at least one prompt")
        for prefix in ("", "negative_"):
            for name in (f"{prefix}prompt", f"{prefix}prompt_2", f"{prefix}prompt_3"):
                if getattr(self, name) is None:
                    continue
                if getattr(self, f"{prefix}prompt_embeds") is not None:
                    raise RequestError(name, f"given beside {prefix}prompt_embeds", remedy="Give one of them.")
                require_count(name, len(texts(name, getattr(self, name))), self.batch)

    def _check_embeddings(self) -> None:
        for prefix in ("", "negative_"):
            embeds = getattr(self, f"{prefix}prompt_embeds")
            pooled = getattr(self, f"{prefix}pooled_prompt_embeds")
            if embeds is not None:
                checked_array(f"{prefix}prompt_embeds", embeds, (None, None, None))
            if pooled is not None:
                checked_array(f"{prefix}pooled_prompt_embeds", pooled, (None, None))
                if embeds is None:
                    what = f"given without {prefix}prompt_embeds"
                    raise RequestError(f"{prefix}pooled_prompt_embeds", what, remedy="Give both, or a text.")

    @cached_property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """What each text encoder in turn reads; nothing where embeddings are given."""
        return self._by_encoder("prompt", None)

    @cached_property
    def negative_prompts(self) -> tuple[tuple[str, ...], ...]:
        """What each text encoder in turn reads for the unconditional branch; nothing where embeddings are given."""
        return self._by_encoder("negative_prompt", "")

    def _by_encoder(self, name: str, absent: str | None) -> tuple[tuple[str, ...], ...]:
        """The texts of that name, of its second and third; those of the first where another is absent or empty."""
        given = getattr(self, name)
        first = absent if given is None else given
        if first is None or getattr(self, f"{name}_embeds") is not None:
            return ()
        every = [texts(name, getattr(self, key) or first) for key in (name, f"{name}_2", f"{name}_3")]
        longest = max(map(len, every))
        return tuple(listed * (longest // len(listed)) for listed in every)

    @property
    def batch(self) -> int:
        """How many prompts."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 0 if self.prompt is None else len(texts("prompt", self.prompt))

    @property
    def pictures(self) -> int:
        """How many pictures: prompts times `num_images_per_prompt`."""
        return self.batch * int(self.num_images_per_prompt)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a call that asks for the same."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            steps=self.num_inference_steps if self.steps is None else self.steps,
            solver=self.solver,
            solver_config=self.solver_config,
            timesteps=self.timesteps,
            eta=self.eta,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            guidance=self.guidance,
            guidance_config=self.guidance_config,
            placement=self.placement,
            placement_config=self.placement_config,
            strength=self._strength,
        )

    @property
    def _strength(self) -> float:
        if self.strength is not None or self.image is None:
            return 1.0 if self.strength is None else self.strength
        return 0.8 if self.mask_image is None else 1.0

    @property
    def _given_size(self) -> Size | None:
        """Height and width of the image to start from, or of the first that steers, where there is one."""
        if self.image is not None:
            return picture_size("image", self.image)
        control = self.control_image
        if isinstance(control, Mapping):
            control = next(iter(control.values()), None)
        return None if control is None else picture_size("control_image", control)

    def latent_shape(self, manifest: Manifest, denoisers: Sequence[str]) -> tuple[int, int, int, int]:
        """The latent's shape (pictures, C, h, w) for these denoisers.

        Raises:
            RequestError: a size is not a positive multiple of what decoder and denoisers need, or is over the bounds:
                16384 pixels a side, 2**28 pixels in all pictures together.
        """
        multiple = max(manifest.components[name].spatial_multiple for name in denoisers)
        pixels = multiple * manifest.latent.downsampling
        default = self._given_size or (manifest.defaults.height, manifest.defaults.width)
        height = side("height", default[0] if self.height is None else self.height, pixels)
        width = side("width", default[1] if self.width is None else self.width, pixels)
        if self.pictures * height * width > MAX_PIXELS:
            raise RequestError(
                "height, width",
                "pixels of all pictures together",
                got=f"{self.pictures} x {height} x {width}",
                expected=f"at most {MAX_PIXELS}",
                remedy="Ask for a smaller size, or for fewer pictures at once.",
            )
        factor = manifest.latent.downsampling
        return self.pictures, manifest.latent.channels, height // factor, width // factor
