"""Where guidance's branches run on engines whose profiles take some calls alone, on stand-ins for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandemrt.engines.profiles import input_ranges, parse_profile
from tandemrt.runtime.bundle import Bundle
from tandemrt.runtime.variant import PLAIN

from ..runtime.engine_writing import write_engines
from ..runtime.stand_in_gpus import Gpus, stand_in
from ..runtime.tiny_bundle import write_tiny_bundle
from .on_gpus import SIDE, painted, require_same_pictures, write_variants

HYBRID: dict[str, Any] = {"steps": {"unet": 2, "unet_small": 2}}
GUIDED, UNGUIDED = (f"{8 * SIDE}:b1:{calls}" for calls in ("guided", "unguided"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return stand_in(monkeypatch, "sm89")


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Path]:
    """A bundle, and beside it a cache with engines, of its denoisers for these calls alone."""

    def build(profile: str) -> Path:
        write_tiny_bundle(tmp_path / "bundle")
        write_engines(tmp_path / "cache", tmp_path / "bundle", "sm89", "text_encoder", "vae_decoder")
        bundle = Bundle.open(tmp_path / "bundle")
        for name in HYBRID["steps"]:
            ranges = input_ranges(name, bundle.component(name), bundle.manifest, parse_profile(profile))
            write_variants(tmp_path, {name: [PLAIN]}, profiles=(ranges,))
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("profile", "can"), [(GUIDED, {"batched"}), (UNGUIDED, {"parallel", "sequential"})], ids=["guided", "unguided"]
)
def test_auto_tries_what_the_profiles_take(built: Callable[..., Path], gpus: Gpus, profile: str, can: set[str]) -> None:
    folder = built(profile)
    out = painted(folder, placement="auto", **HYBRID)
    assert out.timings.tried.keys() == can
    assert {row.placement for row in out.plan.ran} <= can
    require_same_pictures(out, painted(folder, "onnxruntime:cpu", **HYBRID))
    assert gpus.wrong == []
