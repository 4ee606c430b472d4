"""What denoisers are given beside the latent and the time step, for both branches of guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .binding import Conditioning
from .bundle import Bundle
from .errors import RequestError
from .manifest import Component, Manifest, TextConditioning
from .pictures_in import Size
from .plan import Plan
from .request import SIZES, Request
from .request_checks import checked_array
from .tensors import GUIDANCE_EMBEDDING, spec_of
from .text import Embeddings, merged
from .tokenizer import DroppedText, PromptTokenizer

Float32 = npt.NDArray[np.float32]
Encode = Callable[[Sequence[Sequence[str]]], tuple[Embeddings, tuple[DroppedText, ...]]]

# The names of the pooled text in a UNet and in a transformer.
_POOLED = ("text_embeds", "pooled_projections")
_SIZES = "time_ids"
MAX_TEXT_VALUES = 1 << 28  # of all pictures' hidden states


def check_conditioning(request: Request, manifest: Manifest, plan: Plan) -> None:
    """Refuse what cannot condition these denoisers, before anything runs.

    Raises:
        RequestError: embeddings of wrong shapes, or without their pooled vectors; prompts for more text encoders than
            there are; SDXL's sizes where no denoiser of the plan takes them, or half of them; too many pictures for
            so much text.
    """
    text, guided = manifest.text, any(plan.guided)
    if request.prompt_embeds is not None:
        _check_embeddings(request, "", text, request.batch, None)
    tokens = text.max_length if request.prompt_embeds is None else request.prompt_embeds.shape[1]
    if request.negative_prompt_embeds is not None:
        prompts = 1 if len(request.negative_prompt_embeds) == 1 else request.batch
        _check_embeddings(request, "negative_", text, prompts, tokens)
    elif guided and tokens != text.max_length and not _zero_negative(request, text):
        raise RequestError(
            "prompt_embeds",
            "tokens",
            got=tokens,
            expected=f"{text.max_length}, as the negative prompt has under guidance",
            remedy="Give negative_prompt_embeds of as many tokens too.",
        )
    if request.pictures * tokens * text.width > MAX_TEXT_VALUES:
        raise RequestError(
            "prompt, num_images_per_prompt",
            "values that all pictures' text has",
            got=f"{request.pictures} x {tokens} x {text.width}",
            expected=f"at most {MAX_TEXT_VALUES}",
            remedy="Ask for fewer pictures at once.",
        )
    _check_prompts(request, text)
    _check_sizes(request, [manifest.components[name] for name in plan.denoisers])


def conditioned(
    request: Request, manifest: Manifest, plan: Plan, names: Iterable[str], size: Size, encode: Encode
) -> tuple[dict[str, Conditioning], tuple[DroppedText, ...]]:
    """The conditioning of the denoisers and ControlNets called `names`, and the text that was cut.

    size: the picture's height and width. encode: prompts, a list for each text encoder, to their joint embeddings.
    """
    embeddings, negative, dropped = encoded(request, manifest.text, encode, guided=any(plan.guided))
    conditional = _inputs(embeddings, request, _time_ids(request, "", size))
    unconditional = None
    if negative is not None:
        branch = "" if request.negative_original_size is None else "negative_"
        unconditional = _inputs(negative, request, _time_ids(request, branch, size))
    scale = plan.guidance_scale
    return {name: _for(manifest.components[name], conditional, unconditional, scale) for name in names}, dropped


def encoded(
    request: Request, text: TextConditioning, encode: Encode, *, guided: bool
) -> tuple[Embeddings, Embeddings | None, tuple[DroppedText, ...]]:
    """What the texts make for both branches, the unconditional one where rows are guided, and the text that was cut.

    encode: as of `conditioned`. Embeddings that the request brings are taken as they are.
    """
    dropped: tuple[DroppedText, ...] = ()
    if request.prompt_embeds is not None:
        embeddings = Embeddings(request.prompt_embeds, request.pooled_prompt_embeds)
    else:
        embeddings, dropped = encode(request.prompts)
    if not guided:
        return embeddings, None, dropped
    negative, cut = _negative(request, text, embeddings, encode)
    return embeddings, negative, dropped + cut


def dropped_text(bundle: Bundle, request: Request, *, guided: bool) -> tuple[DroppedText, ...]:
    """What a bundle's text encoders have no room for, before any of them runs; guided: whether rows are.

    Raises:
        RequestError: the request is strict, and there is some.
        BundleError: as `PromptTokenizer`.
    """
    dropped: list[tuple[str, DroppedText]] = []
    read = (request.prompts, request.negative_prompts if guided else ())
    for index, (name, facts) in enumerate(bundle.manifest.text.encoders.items()):
        texts = [text for by_encoder in read if by_encoder for text in by_encoder[index]]
        if texts:
            tokenizer = _tokenizer(bundle.tokenizer_path(name), facts.max_length, bundle.digest)
            dropped += [(name, cut) for cut in tokenizer.tokenize(texts, strict=request.strict_prompts).dropped]
    return merged(dropped)


@lru_cache(maxsize=8)
def _tokenizer(path: Path, max_length: int, _bundle: str) -> PromptTokenizer:
    """The tokenizer in a file of the bundle of this digest; it takes a while to load."""
    return PromptTokenizer(path, max_length)


def brings_text(request: Request, *, guided: bool) -> bool:
    """Whether a request brings embeddings for all that is read; with any other, one bundle may encode what another not.

    guided: whether rows are. Where a bundle's `zero_negative` is on, it reads zeros in place of a text.
    """
    return request.prompt_embeds is not None and (not guided or request.negative_prompt_embeds is not None)


def guidance_embedding(scale: float, width: int) -> Float32:
    """What a denoiser that was distilled to one guided branch reads instead of guidance: (width,) float32.

    Sines and cosines of (scale - 1) · 1000, as `get_guidance_scale_embedding` of diffusers' pipelines makes them
    (Meng et al. 2023, 2210.03142; the frequencies are those of time step embeddings).
    """
    half = width // 2
    step = np.log(np.float32(10_000)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(scale - 1) * np.float32(1000) * frequencies
    embedding = np.zeros(width, np.float32)
    embedding[:half], embedding[half : 2 * half] = np.sin(angles), np.cos(angles)
    return embedding


def _for(
    component: Component,
    conditional: Mapping[str, Float32],
    unconditional: Mapping[str, Float32] | None,
    guidance_scale: float,
) -> Conditioning:
    """The part of both branches that the component takes."""

    def taken(branch: Mapping[str, Float32]) -> dict[str, Float32]:
        return {spec.name: branch[spec.name] for spec in component.inputs if spec.name in branch}

    spec = spec_of(component.inputs, GUIDANCE_EMBEDDING)
    if spec is None:
        return Conditioning(taken(conditional), None if unconditional is None else taken(unconditional))
    embedding = guidance_embedding(guidance_scale, int(spec.shape[-1]))
    pictures = len(conditional["encoder_hidden_states"])
    return Conditioning({**taken(conditional), GUIDANCE_EMBEDDING: np.tile(embedding, (pictures, 1))})


def _inputs(embeddings: Embeddings, request: Request, time_ids: Float32) -> dict[str, Float32]:
    """Everything a denoiser may want, a row for each picture."""

    def rows(values: Float32) -> Float32:
        per_prompt = np.broadcast_to(values, (request.batch, *values.shape[1:]))
        repeated: Float32 = per_prompt.repeat(request.num_images_per_prompt, axis=0)
        return repeated

    pooled = {} if embeddings.pooled is None else dict.fromkeys(_POOLED, rows(embeddings.pooled))
    return {"encoder_hidden_states": rows(embeddings.hidden), _SIZES: rows(time_ids), **pooled}


def _negative(
    request: Request, text: TextConditioning, conditional: Embeddings, encode: Encode
) -> tuple[Embeddings, tuple[DroppedText, ...]]:
    if request.negative_prompt_embeds is not None:
        return Embeddings(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds), ()
    if _zero_negative(request, text):
        pooled = None if conditional.pooled is None else np.zeros_like(conditional.pooled)
        return Embeddings(np.zeros_like(conditional.hidden), pooled), ()
    return encode(request.negative_prompts)


def _zero_negative(request: Request, text: TextConditioning) -> bool:
    """Whether the unconditional branch reads zeros; a negative prompt that is given as "" is read as it is."""
    return text.zero_negative and request.negative_prompt is None and request.negative_prompt_embeds is None


def _time_ids(request: Request, branch: str, size: Size) -> Float32:
    """(1, 6) float32: original height and width, top and left of the crop, target height and width."""
    original = getattr(request, f"{branch}original_size") or size
    crop = getattr(request, f"{branch}crops_coords_top_left") or (0, 0)
    target = getattr(request, f"{branch}target_size") or size
    return np.array([[*original, *crop, *target]], np.float32)


def _check_embeddings(request: Request, prefix: str, text: TextConditioning, prompts: int, tokens: int | None) -> None:
    embeds = getattr(request, f"{prefix}prompt_embeds")
    pooled, name = getattr(request, f"{prefix}pooled_prompt_embeds"), f"{prefix}pooled_prompt_embeds"
    tokens = max(embeds.shape[1], 1) if tokens is None else tokens
    checked_array(f"{prefix}prompt_embeds", embeds, (prompts, tokens, text.width))
    if pooled is not None:
        if not text.pooled_width:
            raise RequestError(name, "the bundle uses no pooled text", remedy="Leave it out.")
        checked_array(name, pooled, (prompts, text.pooled_width))
    elif text.pooled_width:
        expected = f"a float32 array ({prompts}, {text.pooled_width})"
        raise RequestError(name, f"not given beside {prefix}prompt_embeds", expected=expected)


def _check_prompts(request: Request, text: TextConditioning) -> None:
    for prefix in ("prompt", "negative_prompt"):
        for number in (2, 3):
            name, count = f"{prefix}_{number}", len(text.encoders)
            if getattr(request, name) is None:
                continue
            if number > count:
                expected = f"at most {count}, {', '.join(text.encoders)}"
                raise RequestError(name, "text encoders of the bundle", expected=expected, remedy="Leave it out.")
            if prefix == "negative_prompt" and _zero_negative(request, text):
                raise RequestError(
                    name,
                    "given without negative_prompt, whose absence means no text at all to this bundle",
                    remedy="Give negative_prompt too; it may be empty.",
                )


def _check_sizes(request: Request, denoisers: Sequence[Component]) -> None:
    given = [name for name in SIZES if getattr(request, name) is not None]
    if given and not any(spec_of(component.inputs, _SIZES) for component in denoisers):
        raise RequestError(given[0], "no denoiser of the plan is conditioned on sizes", remedy="Leave it out.")
    negative = [name for name in given if name.startswith("negative_")]
    for needed in ("negative_original_size", "negative_target_size"):
        if negative and needed not in negative:
            raise RequestError(negative[0], f"given without {needed}", remedy="Give both.")
