"""What a manifest must say to be used, as far as it shows without the files."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import msgspec

from .errors import BundleError
from .guidance_defaults import check_guidance_defaults
from .manifest import Component, FileRecord, Manifest, Quantization, TextEncoding
from .manifest_files import MANIFEST_NAME, SEAL_NAME
from .tensors import CONTROLNET_PREFIX, ENCODED, GUIDANCE_EMBEDDING, check_role, spec_of

TOKENIZER_FILE = "tokenizer.json"
MAX_PATH_CHARACTERS = 255
MAX_EXTENT = 1 << 16
MAX_ENCODERS = 3
MAX_TEXT_VALUES = 1 << 24  # of one prompt's hidden states
MIN_GUIDANCE_WIDTH = 4  # its frequencies fall from 1 to 1/10000 in half as many steps, less one
TIME_IDS = 6  # original height and width, top and left of the crop, target height and width

_SEGMENT = re.compile(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: Manifest, where: str) -> None:
    """Compare a manifest with what every bundle has; `where` names it in errors.

    Raises:
        BundleError: a path that is unsafe or stands for two files; a role without component; tensors, sizes or
            numbers that cannot be used.
    """
    _check_listing(manifest.files, where)
    _check_components(manifest, where)
    _check_facts(manifest, where)
    check_guidance_defaults(manifest.defaults, where)
    _check_steps(manifest, where)
    _check_text(manifest, where)
    _check_conditioned(manifest, where)


def _check_listing(files: dict[str, FileRecord], where: str) -> None:
    """Paths that mean the same file everywhere, also where case does not count; plausible sizes and digests."""
    spelled: dict[str, str] = {}
    for name, record in files.items():
        segments = name.split("/")
        if len(name) > MAX_PATH_CHARACTERS or not all(_SEGMENT.fullmatch(segment) for segment in segments):
            raise BundleError(
                where,
                "path of a file",
                got=name[: MAX_PATH_CHARACTERS + 1],
                expected=f"at most {MAX_PATH_CHARACTERS} of A-Z a-z 0-9 _ . - and /, inside the bundle",
                remedy="Do not use this bundle unless you trust its origin.",
            )
        for depth in range(1, len(segments) + 1):
            prefix = "/".join(segments[:depth])
            if spelled.setdefault(prefix.lower(), prefix) != prefix:
                raise BundleError(
                    where, "two paths that differ in case only", got=name, expected=f"only {spelled[prefix.lower()]!r}"
                )
            if depth < len(segments) and prefix in files:
                raise BundleError(where, "a path that is both file and folder", got=prefix)
        if name.lower() in (MANIFEST_NAME, SEAL_NAME):
            raise BundleError(where, "a manifest that lists itself", got=name)
        if record.size < 0:
            raise BundleError(where, f"size of {name!r}", got=record.size, expected="0 or more bytes")
        if not _SHA256.fullmatch(record.sha256):
            raise BundleError(where, f"sha256 of {name!r}", got=record.sha256[:80], expected="64 hexadecimal digits")


def _check_components(manifest: Manifest, where: str) -> None:
    for name, component in manifest.components.items():
        if not _NAME.fullmatch(name):
            raise BundleError(where, "component name", got=name[:80], expected="lower-case letters, digits and _")
        if component.model not in manifest.files or not component.model.endswith(".onnx"):
            expected = "an .onnx file that the manifest lists"
            raise BundleError(where, f"model of component {name!r}", got=component.model[:256], expected=expected)
        if component.role == "denoiser" and component.prediction_type is None:
            raise BundleError(where, f"denoiser {name!r} without a prediction type", remedy="Export the bundle again.")
        if (component.role == "controlnet") != (name.removeprefix(CONTROLNET_PREFIX) not in ("", name)):
            expected = f"{CONTROLNET_PREFIX}NAME for a ControlNet, and for no other"
            raise BundleError(where, f"name of a {component.role}", got=name, expected=expected)
        check_role(where, name, component)
        if component.quantization is not None:
            _check_quantization(where, name, component.quantization)
        if component.role == "vae_encoder":
            _check_encoded(where, name, component, manifest.latent.channels)
    for role in ("text_encoder", "denoiser", "vae_decoder"):
        if not any(component.role == role for component in manifest.components.values()):
            raise BundleError(where, f"no component with role {role!r}", remedy="Export the bundle again.")


def _check_quantization(where: str, name: str, stated: Quantization) -> None:
    """Numbers and digests that inspect shows and engines are chosen by."""
    if stated.layers < 1:
        raise BundleError(where, f"quantized layers of {name!r}", got=stated.layers, expected="1 or more")
    losses = stated.losses
    digests = {
        "float_model": stated.float_model,
        **({} if stated.trajectories is None else {"trajectories": stated.trajectories}),
        **{f"bundle of loss {index}": loss.bundle for index, loss in enumerate(losses)},
        **{f"prompts_sha256 of loss {index}": loss.prompts_sha256 for index, loss in enumerate(losses)},
    }
    for fact, digest in digests.items():
        if not _SHA256.fullmatch(digest):
            what = f"quantization of {name!r}: {fact}"
            raise BundleError(where, what, got=digest[:80], expected="64 hexadecimal digits")
    if stated.computes and stated.trajectories is None:
        raise BundleError(where, f"quantization of {name!r}: {stated.format} without trajectories")
    for index, loss in enumerate(losses):
        numbers = [value for value in msgspec.structs.astuple(loss) if isinstance(value, float)]
        if not all(map(math.isfinite, numbers)) or loss.prompts < 1:
            got = f"{numbers} of {loss.prompts} prompts"
            raise BundleError(where, f"quantization of {name!r}: loss {index}", got=got, expected="finite numbers")


def _check_facts(manifest: Manifest, where: str) -> None:
    """Numbers a generation divides by or allocates with."""
    latent, text, defaults = manifest.latent, manifest.text, manifest.defaults
    extents = {
        "latent.channels": latent.channels,
        "latent.downsampling": latent.downsampling,
        **{f"text.{name}.max_length": encoder.max_length for name, encoder in text.encoders.items()},
        **{f"text.{name}.width": encoder.width for name, encoder in text.encoders.items()},
        "text.width": text.width,
        "defaults.height": defaults.height,
        "defaults.width": defaults.width,
        "defaults.num_inference_steps": defaults.num_inference_steps,
        **{f"components.{name}.spatial_multiple": part.spatial_multiple for name, part in manifest.components.items()},
    }
    for name, extent in extents.items():
        if not 1 <= extent <= MAX_EXTENT:
            raise BundleError(where, name, got=extent, expected=f"1 to {MAX_EXTENT}")
    if not math.isfinite(latent.scaling_factor) or latent.scaling_factor == 0:
        raise BundleError(where, "latent.scaling_factor", got=latent.scaling_factor, expected="a number other than 0")
    if not math.isfinite(latent.shift_factor):
        raise BundleError(where, "latent.shift_factor", got=latent.shift_factor, expected="a finite number")
    if not 0 <= defaults.guidance_scale < math.inf:
        expected = "a finite number, 0 or more"
        raise BundleError(where, "defaults.guidance_scale", got=defaults.guidance_scale, expected=expected)
    if not 0 <= defaults.eta <= 1:
        raise BundleError(where, "defaults.eta", got=defaults.eta, expected="0 to 1")
    timesteps = defaults.timesteps
    if timesteps is None:
        return
    falling = all(later < earlier for earlier, later in pairwise(timesteps))
    if not timesteps or not falling or not 0 <= timesteps[-1] <= timesteps[0] <= MAX_EXTENT:
        expected = f"falling whole numbers in {MAX_EXTENT}..0"
        raise BundleError(where, "defaults.timesteps", got=timesteps, expected=expected)


def _check_steps(manifest: Manifest, where: str) -> None:
    """The plan that runs by default is of the bundle's denoisers, and has as many steps as it is said to."""
    defaults, denoisers = manifest.defaults, manifest.names("denoiser")
    if defaults.steps is None:
        return
    for name, count in defaults.steps:
        if name not in denoisers:
            expected = f"one of {', '.join(denoisers)}"
            raise BundleError(where, "defaults.steps: unknown denoiser", got=name[:80], expected=expected)
        if count < 1:
            raise BundleError(where, f"defaults.steps: {name}", got=count, expected="1 or more steps")
    total = sum(count for _, count in defaults.steps)
    if total != defaults.num_inference_steps:
        expected = f"{defaults.num_inference_steps}, as num_inference_steps"
        raise BundleError(where, "defaults.steps: number of steps in all", got=total, expected=expected)
    if defaults.timesteps is not None and len(defaults.timesteps) != total:
        expected = f"{total}, as defaults.steps"
        raise BundleError(
            where, "defaults.timesteps: how many there are", got=len(defaults.timesteps), expected=expected
        )


def _check_encoded(where: str, name: str, component: Component, channels: int) -> None:
    """An encoder for images makes one thing, of the latent's channels."""
    made = {spec.name: spec.shape[1] for spec in component.outputs if spec.name in ENCODED}
    fits = all(isinstance(stated, str) or stated == ENCODED[output] * channels for output, stated in made.items())
    if len(made) != 1 or not fits:
        expected = " or ".join(f"{output} of {count * channels}" for output, count in ENCODED.items())
        raise BundleError(where, f"channels of vae_encoder {name!r}", got=made, expected=expected)


def _check_text(manifest: Manifest, where: str) -> None:
    """The text encoders are there with what is taken from them, and what they make fits the other models."""
    text = manifest.text
    behind = False
    for name, facts in text.encoders.items():
        _check_encoder(manifest, where, name, facts)
        if facts.joins == "width" and behind:
            raise BundleError(where, f"text.{name}.joins", got="width", expected="sequence, as the encoder before it")
        behind = behind or facts.joins == "sequence"
    beside = [facts for facts in text.encoders.values() if facts.joins == "width"]
    lengths, width = sorted({facts.max_length for facts in beside}), sum(facts.width for facts in beside)
    if len(lengths) > 1:
        raise BundleError(where, "text: max_length of encoders side by side", got=lengths, expected="one length")
    widest = max([width, *(facts.width for facts in text.encoders.values() if facts.joins == "sequence")])
    count = len(text.encoders)
    if not 1 <= count <= MAX_ENCODERS or widest > text.width or not 0 <= text.zero_tokens <= MAX_EXTENT:
        got = f"{count} encoders, width {text.width}, zero_tokens {text.zero_tokens}"
        expected = f"1 to {MAX_ENCODERS} encoders, width {widest} or more, zero_tokens 0 to {MAX_EXTENT}"
        raise BundleError(where, "text", got=got, expected=expected)
    if text.max_length * text.width > MAX_TEXT_VALUES:
        got = f"{text.max_length} x {text.width}"
        raise BundleError(where, "text: tokens and width", got=got, expected=f"at most {MAX_TEXT_VALUES} values")


def _check_conditioned(manifest: Manifest, where: str) -> None:
    """What the other models are given is as wide as it is made."""
    for name, component in manifest.components.items():
        if component.role not in ("denoiser", "controlnet"):
            continue
        for tensor, size in _conditioned_sizes(manifest).items():
            spec = spec_of(component.inputs, tensor)
            stated = size if spec is None else spec.shape[-1]
            if isinstance(stated, int) and stated != size:
                what = f"last dimension of {tensor} of {component.role} {name!r}"
                raise BundleError(where, what, got=stated, expected=f"{size}, what the text encoders make")
        guidance = spec_of(component.inputs, GUIDANCE_EMBEDDING)
        width = MIN_GUIDANCE_WIDTH if guidance is None else guidance.shape[-1]
        if not isinstance(width, int) or not MIN_GUIDANCE_WIDTH <= width <= MAX_EXTENT:
            what, expected = (
                f"width of {GUIDANCE_EMBEDDING} of {name!r}",
                f"a number, {MIN_GUIDANCE_WIDTH} to {MAX_EXTENT}",
            )
            raise BundleError(where, what, got=width, expected=expected)


def _conditioned_sizes(manifest: Manifest) -> dict[str, int]:
    pooled = manifest.text.pooled_width
    return {
        "encoder_hidden_states": manifest.text.width,
        "text_embeds": pooled,
        "pooled_projections": pooled,
        "time_ids": TIME_IDS,
    }


def _check_encoder(manifest: Manifest, where: str, name: str, facts: TextEncoding) -> None:
    component: Component | None = manifest.components.get(name)
    if component is None or component.role != "text_encoder":
        known = ", ".join(manifest.names("text_encoder"))
        raise BundleError(where, "text: no such text encoder", got=name, expected=f"one of {known}")
    if f"{facts.tokenizer}/{TOKENIZER_FILE}" not in manifest.files:
        missing = f"{facts.tokenizer}/{TOKENIZER_FILE}"
        raise BundleError(where, f"no {missing[:256]} among the files", remedy="Export the bundle again.")
    used = [facts.hidden_state] if facts.pooled is None else [facts.hidden_state, facts.pooled]
    specs = [spec_of(component.outputs, output) for output in used]
    if not all(spec is not None and spec.dtype == "float32" for spec in specs):
        raise BundleError(
            where,
            f"outputs of text_encoder {name!r}",
            got=", ".join(f"{spec.name} {spec.dtype}" for spec in component.outputs),
            expected=", ".join(f"{output} float32" for output in used),
            remedy="Export the bundle again.",
        )
    if (facts.pooled is None) != (facts.pooled_width == 0) or not 0 <= facts.pooled_width <= MAX_EXTENT:
        expected = f"1 to {MAX_EXTENT} with a pooled output, 0 without one"
        raise BundleError(where, f"text.{name}.pooled_width", got=facts.pooled_width, expected=expected)
