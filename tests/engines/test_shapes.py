"""The trained family on every backend that builds here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandemrt.runtime.bundle import Bundle

from .families import require_engines


@pytest.mark.slow
def test_the_shapes_family_builds_on_every_backend(shapes_bundle: Path, tmp_path: Path) -> None:
    components = ("text_encoder", "unet_small", "vae_decoder_tiny", "vae_encoder")
    require_engines(Bundle.open(shapes_bundle), tmp_path, components)
