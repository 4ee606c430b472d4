"""The `tandemrt build-engine` command that makes what a call lacks, as errors tell it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from .backends.base import Shape
from .bundle import Bundle
from .cache import cache_folder, default_cache
from .engine_files import REFIT, VERSION_COMPATIBLE, Engine
from .errors import BUILD, TandemError
from .targets import Target
from .variant import UPDATE, Variant

# The input whose last two axes are the picture's, height and width; of step engines the last.
SEEN = ("sample", "hidden_states", "latent_sample", "noise")


def build_command(
    bundle: Bundle,
    name: str,
    target: Target,
    variant: Variant,
    shapes: Mapping[str, Shape] | None = None,
    cache: Path | None = None,
) -> str:
    """The command that builds component `name` in a variant for a target; shapes as of `call_profile`.

    cache: as of `cache_folder`; it is named where it is not the default one.
    """
    place = cache_folder(cache)
    profile = None if shapes is None else call_profile(bundle, name, variant, shapes)
    return (
        f"tandemrt build-engine {shlex.quote(str(bundle.path))} --target {target} --component {name}{variant.options}"
        + (f" --profile {profile}" if profile else "")
        + (f" --cache {shlex.quote(str(place))}" if place != default_cache() else "")
    )


def rebuild_command(
    bundle: Bundle, name: str, target: Target, engine: Engine, shapes: Mapping[str, Shape], cache: Path | None = None
) -> str:
    """The command that builds component `name` again as an engine was made, for a call; else as `build_command`."""
    made_of = engine.ingredients
    flags = (f" --{flag.replace('_', '-')}" for flag in (REFIT, VERSION_COMPATIBLE) if made_of.flags.get(flag))
    return build_command(bundle, name, target, made_of.variant, shapes, cache) + "".join(flags)


def exact_remedy(error: TandemError, command: str) -> str:
    """An error's remedy with the whole command for `build-engine`."""
    return error.remedy.replace(BUILD, f"`{command}`")


def call_profile(bundle: Bundle, name: str, variant: Variant, shapes: Mapping[str, Shape]) -> str | None:
    """`WIDTHxHEIGHT:bPICTURES` in pixels, as `--profile` takes it; None where no shape shows a picture's size.

    A denoiser's even batch is taken for both branches of guidance; the profile covers one branch of it too.

    shapes: of the component's inputs in a call, or of the latents (B, C, h, w) as `noise` alone.
    """
    role = bundle.component(name).role
    seen = next((one for one in SEEN if one in shapes), None)
    if seen is None or role == "text_encoder":
        return None
    pictures, _, height, width = shapes[seen]
    scale = 1 if role == "vae_encoder" and seen == "sample" else bundle.manifest.latent.downsampling
    if role not in ("denoiser", "controlnet"):
        pictures = 1
    elif seen != "noise" and pictures % 2 == 0:
        pictures //= 2
    guidance = f":{variant.step}" if variant.step and variant != UPDATE else ""
    return f"{width * scale}x{height * scale}:b{pictures}{guidance}"
