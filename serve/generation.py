"""OpenAI's body of `images/generations`, with what diffusion models take besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from tandemrt.runtime.plan_steps import parse_steps

from .problems import malformed, unusable
from .protocol import Asked


class Generation(msgspec.Struct, frozen=True):
    """What is asked for; other keys are passed over.

    size: `512x768` is width by height, `auto` the bundle's. steps: also `10,15` or `unet:10,unet_small:15`.
    strict_prompts: refuse prompts that are too long instead of cutting and telling them.
    """

    prompt: str
    model: str | None = None
    n: int = 1
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | str | dict[str, int] | None = None
    guidance_scale: float | None = None
    strict_prompts: bool = False


def generation_of(body: bytes) -> Generation:
    """What a body asks for; Problem where it is malformed, or a value is of another type than it has to be."""
    try:
        return msgspec.json.decode(body, type=Generation)
    except msgspec.ValidationError as error:
        raise unusable(f"request: {error}.") from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise malformed(f"request: no JSON ({error}).") from error


def generation_of_query(query: Mapping[str, str]) -> Generation:
    """What an address asks for; Problem where a value cannot be used."""
    try:
        return msgspec.convert(query, Generation, strict=False)
    except msgspec.ValidationError as error:
        raise unusable(f"query: {error}.") from error


def asked_for(wanted: Generation, denoisers: Sequence[str]) -> Asked:
    """OpenAI's request in our words.

    Raises:
        Problem: its size is none.
        PlanError: its steps are none.
    """
    width = height = None
    if wanted.size != "auto":
        width, _, height = wanted.size.partition("x")
        if not all(side.isascii() and side.isdigit() and len(side) <= 5 for side in (width, height)):
            raise unusable(f"size: got {wanted.size[:40]!r}, expected such as '512x512', or 'auto'.")
    return Asked(
        prompt=wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        num_images_per_prompt=wanted.n,
        width=None if width is None else int(width),
        height=None if height is None else int(height),
        seed=wanted.seed,
        steps=list(parse_steps(wanted.steps, denoisers)) if isinstance(wanted.steps, str) else wanted.steps,
        guidance_scale=wanted.guidance_scale,
        strict_prompts=wanted.strict_prompts,
        model=wanted.model,
    )
