"""What a caller asks for: one frozen request, checked where it is made and against a bundle."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .arguments import whole_number
from .errors import RequestError
from .manifest import Manifest
from .plan import Schedule, Steps
from .rng import new_generator

Float32 = npt.NDArray[np.float32]
MAX_SIDE = 16_384
MAX_PICTURES = 4096
MAX_PIXELS = 1 << 28

OutputType = Literal["pil", "np", "latent"]

# Arguments of diffusers' pipelines that have another name here.
_INSTEAD = {
    "generator": "Give seed=, a number or one for each picture.",
    "callback": "Use pipe.stream(...), which gives an event after each row.",
    "callback_on_step_end": "Use pipe.stream(...), which gives an event after each row.",
    "return_dict": "Leave it out: what comes back is an Output with images.",
    "sigmas": "Give timesteps=, or sigma keys such as use_karras_sigmas in solver_config=.",
}


@dataclass(frozen=True)
class Request:
    """One generation. Names and meanings are those of diffusers' `StableDiffusionPipeline` where it has them.

    prompt, negative_prompt: a text or a batch of texts; one negative prompt serves the whole batch.
    steps: see `Schedule.steps`; `num_inference_steps` is the same for a plain number.
    solver, solver_config, timesteps, eta, guidance_scale, guidance_interval: see `Schedule`.
    height, width: pixels; the bundle's defaults otherwise.
    num_images_per_prompt: pictures for each prompt; a prompt's pictures stand together.
    seed: one number seeds one generator for the whole batch, as a single `torch.Generator` does in diffusers; a
        sequence seeds one for each picture. A random one is drawn, and reported, when it is None. For two
        pictures, `seed=7` and `seed=[7, 8]` are therefore not the same.
    seed_device: whose random numbers, torch's on the CPU or on CUDA.
    latents: standard normal noise to start from, (pictures, C, H/8, W/8) float32, instead of the seed's.
    prompt_embeds, negative_prompt_embeds: (prompts, tokens, width) float32, instead of texts.
    decoder: which of the bundle's decoders paints; the first by default.
    output_type: `pil` images, `np` (pictures, H, W, 3) float32 in [0, 1], or `latent`.
    previews: decode a preview after every so many rows, with the tiny decoder where there is one; 0 for none.
    strict_prompts: refuse prompts that are too long instead of cutting and reporting them.

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
    eta: float = 0.0
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
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

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise RequestError(
                "prompt", "exactly one of prompt and prompt_embeds is needed", remedy="Give one of them."
            )
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise RequestError("negative_prompt", "given beside negative_prompt_embeds", remedy="Give one of them.")
        if self.steps is not None and self.num_inference_steps is not None:
            raise RequestError("steps", "given beside num_inference_steps", remedy="Give one of them.")
        if self.num_inference_steps is not None and whole_number(self.num_inference_steps) is None:
            got = self.num_inference_steps
            raise RequestError("num_inference_steps", "not usable", got=got, expected="a whole number, 1 or more")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, name)
            if embeds is not None:
                checked_array(name, embeds, (None, None, None))
        if self.output_type not in ("pil", "np", "latent"):
            raise RequestError("output_type", "unknown", got=self.output_type, expected="pil, np or latent")
        require_pictures(self.num_images_per_prompt)
        previews = whole_number(self.previews)
        if previews is None or previews < 0:
            raise RequestError("previews", "not usable", got=self.previews, expected="a whole number, 0 or more")
        if self.batch == 0:
            name = "prompt" if self.prompt_embeds is None else "prompt_embeds"
            raise RequestError(name, "an empty list", expected="at least one prompt")
        negatives = self.negative_prompts
        if negatives is not None and len(negatives) not in (1, self.batch):
            raise RequestError(
                "negative_prompt",
                "how many there are",
                got=len(negatives),
                expected=f"1 or {self.batch}, as the prompts",
            )
        if isinstance(self.seed, Sequence) and len(self.seed) != self.pictures:
            raise RequestError("seed", "how many there are", got=len(self.seed), expected=f"1 or {self.pictures}")

    @cached_property
    def prompts(self) -> tuple[str, ...] | None:
        return None if self.prompt is None else _texts("prompt", self.prompt)

    @cached_property
    def negative_prompts(self) -> tuple[str, ...] | None:
        return None if self.negative_prompt is None else _texts("negative_prompt", self.negative_prompt)

    @property
    def batch(self) -> int:
        """How many prompts."""
        given = self.prompt_embeds if self.prompts is None else self.prompts
        return 0 if given is None else len(given)

    @property
    def pictures(self) -> int:
        """How many pictures: prompts times `num_images_per_prompt`."""
        return self.batch * int(self.num_images_per_prompt)

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
        )

    def latent_shape(self, manifest: Manifest, denoisers: Sequence[str]) -> tuple[int, int, int, int]:
        """The latent's shape (pictures, C, h, w) for these denoisers.

        Raises:
            RequestError: a size is not a positive multiple of what decoder and denoisers need, or is over the bounds:
                16384 pixels a side, 2**28 pixels in all pictures together.
        """
        multiple = max(manifest.components[name].spatial_multiple for name in denoisers)
        pixels = multiple * manifest.latent.downsampling
        height = _side("height", manifest.defaults.height if self.height is None else self.height, pixels)
        width = _side("width", manifest.defaults.width if self.width is None else self.width, pixels)
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


class Noise:
    """The standard normal noise of one request, in the order diffusers draws it."""

    def __init__(self, request: Request, shape: tuple[int, int, int, int]) -> None:
        seed = secrets.randbits(32) if request.seed is None else request.seed
        seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
        self.seeds = seeds if len(seeds) == request.pictures else seeds * request.pictures
        self._shape = shape
        self._generators = [new_generator(value, request.seed_device) for value in seeds]

    def draw(self) -> Float32:
        """Fresh noise: (pictures, C, h, w) float32."""
        if len(self._generators) == 1:
            return self._generators[0].randn(self._shape)
        return np.concatenate([generator.randn((1, *self._shape[1:])) for generator in self._generators])


def checked_array(where: str, array: Float32, shape: tuple[int | None, ...]) -> Float32:
    """`array` if it is float32, finite and of `shape` (None: any size).

    Raises:
        RequestError: it is not.
    """
    wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise RequestError(where, "type", got=getattr(array, "dtype", type(array).__name__), expected="a float32 array")
    fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
    if not fits:
        raise RequestError(where, "shape", got=array.shape, expected=wanted)
    if not np.isfinite(array).all():
        raise RequestError(where, "holds NaN or Inf", expected="finite values")
    return array


def require_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise RequestError when one of the names `given` is not `known`."""
    for name in given:
        if name not in known:
            alike = get_close_matches(name, known, n=1)
            remedy = _INSTEAD.get(name) or (f"Did you mean {alike[0]}=?" if alike else "Leave it out.")
            raise RequestError(name, "unknown argument", expected=f"one of {', '.join(known)}", remedy=remedy)


def require_pictures(value: object) -> None:
    """Raise RequestError when `value` is no usable `num_images_per_prompt`."""
    pictures = whole_number(value)
    if pictures is None or not 1 <= pictures <= MAX_PICTURES:
        expected = f"a whole number in 1..{MAX_PICTURES}"
        raise RequestError("num_images_per_prompt", "not usable", got=value, expected=expected)


def _side(name: str, given: object, multiple: int) -> int:
    pixels = whole_number(given)
    if pixels is None or not 0 < pixels <= MAX_SIDE or pixels % multiple:
        expected = f"a positive multiple of {multiple} pixels, at most {MAX_SIDE}"
        remedy = ""
        if pixels is not None:
            nearest = min((pixels + multiple // 2) // multiple, MAX_SIDE // multiple)
            remedy = f"Ask for {max(nearest, 1) * multiple}."
        raise RequestError(name, "not usable", got=given, expected=expected, remedy=remedy)
    return pixels


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(value, str | Sequence):
        raise RequestError(name, "type", got=type(value).__name__, expected="a string or a sequence of strings")
    return (value,) if isinstance(value, str) else tuple(value)
