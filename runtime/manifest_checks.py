"""What a manifest must say to be used, as far as it shows without the files."""

from __future__ import annotations

import math
import re

from .errors import BundleError
from .manifest import MANIFEST_NAME, SEAL_NAME, FileRecord, Manifest
from .tensors import check_role

TOKENIZER = "tokenizer/tokenizer.json"
MAX_PATH_CHARACTERS = 255
MAX_EXTENT = 1 << 16

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
        check_role(where, name, component)
    for role in ("text_encoder", "denoiser", "vae_decoder"):
        if not any(component.role == role for component in manifest.components.values()):
            raise BundleError(where, f"no component with role {role!r}", remedy="Export the bundle again.")
    if TOKENIZER not in manifest.files:
        raise BundleError(where, f"no {TOKENIZER} among the files", remedy="Export the bundle again.")


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
    for name, value in (
        ("latent.shift_factor", latent.shift_factor),
        ("defaults.guidance_scale", defaults.guidance_scale),
    ):
        if not math.isfinite(value):
            raise BundleError(where, name, got=value, expected="a finite number")
